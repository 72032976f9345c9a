"""How far a long piece of work is: a bar on a terminal, plain lines elsewhere (a cluster's log, a file).

In: an iterable, or calls of `update`. Out: a bar on stderr that is redrawn, or a line now and then, without a
carriage return. Other lines are written by tqdm.write, above the bar.
"""

import sys
import time

from tqdm import tqdm

EVERY_S = 30.0  # between two lines


def bar(iterable=None, desc="", total=None, initial=0, unit="step", leave=True, disable=False):
    """tqdm's bar, as wide as the terminal, where stderr is one, else `Lines`: both can be iterated over.

    total: None, the iterable's length; initial: how many were done before; leave: the bar stays when all is
    done; disable: show nothing.
    """
    options = {"desc": desc, "total": total, "initial": initial, "unit": unit, "disable": disable}
    if sys.stderr.isatty():
        return tqdm(iterable, **options, leave=leave, dynamic_ncols=True)
    return Lines(iterable, **options)


class Lines:
    """A line every EVERY_S seconds, and one at the end; of tqdm's methods those that this project uses."""

    def __init__(self, iterable, desc, total, initial, unit, disable):
        self.iterable, self.desc, self.disable = iterable, desc, disable
        self.units = unit + ("es" if unit.endswith("ch") else "s")
        self.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total
        self.initial = self.n = initial
        self.postfix, self.shown = "", None  # what was done when the last line was written
        self.began_s = self.written_s = time.monotonic()

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n=1):
        self.n += n
        if time.monotonic() - self.written_s >= EVERY_S:
            self.write()

    def set_postfix_str(self, text):
        self.postfix = text

    def close(self):
        if self.shown != self.n:
            self.write()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def write(self):
        self.written_s, self.shown = time.monotonic(), self.n
        if self.disable:
            return
        done, seconds = self.n - self.initial, self.written_s - self.began_s
        parts = [f"{self.n:,} {self.units}"]
        if self.total:
            parts = [f"{self.n:,} of {self.total:,} {self.units}", f"{self.n / self.total:.0%}"]
        parts.append(f"after {tqdm.format_interval(seconds)}")
        if done and seconds:
            parts.append(f"{done / seconds:,.1f} {self.units}/s")
        if done and self.total and self.n < self.total:
            parts.append(f"{tqdm.format_interval((self.total - self.n) / done * seconds)} left")
        line = ", ".join([*parts, *filter(None, [self.postfix])])
        print(f"{self.desc}: {line}" if self.desc else line, file=sys.stderr, flush=True)
