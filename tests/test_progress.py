"""Progress: a bar on a terminal; in a log a plain line every half minute, and never a carriage return."""

import ast
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from avid import progress

ROOT = Path(__file__).parents[1]
PROGRAM = """
from tqdm import tqdm
from avid import progress
progress.EVERY_S = 0
for i in progress.bar(range(3), "reading", unit="file"):
    tqdm.write(f"file {i} has no sound")
"""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when they are added to clock[0]."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    err = capsys.readouterr().err
    assert "\r" not in err
    return err.splitlines()


def test_a_log_gets_a_line_every_half_minute_and_a_last_one(clock, capsys):
    for _ in progress.bar(range(100), "training"):
        clock[0] += 1
    assert lines(capsys) == [
        "training: 30 of 100 steps, 30%, after 00:30, 1.0 steps/s, 01:10 left",
        "training: 60 of 100 steps, 60%, after 01:00, 1.0 steps/s, 00:40 left",
        "training: 90 of 100 steps, 90%, after 01:30, 1.0 steps/s, 00:10 left",
        "training: 100 of 100 steps, 100%, after 01:40, 1.0 steps/s",
    ]


def test_earlier_work_counts_as_done_but_not_for_the_rate(clock, capsys):
    with progress.bar(desc="reading", total=1100, initial=1000, unit="file") as bar:
        clock[0] += 40
        bar.set_postfix_str("2 unreadable")
        bar.update(20)
        clock[0] += 1
    assert lines(capsys) == [
        "reading: 1,020 of 1,100 files, 93%, after 00:40, 0.5 files/s, 02:40 left, 2 unreadable"
    ]


def test_of_batch_the_plural_is_batches(clock, capsys):
    for _ in progress.bar(range(3), unit="batch"):
        clock[0] += 1
    assert lines(capsys) == ["3 of 3 batches, 100%, after 00:03, 1.0 batches/s"]


def test_an_unknown_total_shows_a_count_and_a_disabled_bar_nothing(clock, capsys):
    for _ in progress.bar(iter("abc"), "counting", unit="letter"):
        clock[0] += 2
    for _ in progress.bar(range(100), disable=True):
        clock[0] += 10
    assert lines(capsys) == ["counting: 3 letters, after 00:06, 0.5 letters/s"]


def test_an_interrupted_bar_shows_how_far_it_came(clock, capsys):
    with pytest.raises(KeyboardInterrupt), progress.bar(total=10) as bar:
        clock[0] += 4
        bar.update(2)
        raise KeyboardInterrupt
    assert lines(capsys) == ["2 of 10 steps, 20%, after 00:04, 0.5 steps/s, 00:16 left"]


def test_other_lines_are_not_mixed_with_carriage_returns():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, check=True)
    assert b"\r" not in done.stdout + done.stderr and b"\x1b" not in done.stdout + done.stderr
    assert done.stdout.decode().splitlines() == [f"file {i} has no sound" for i in range(3)]
    seen = [line.partition(",")[0] for line in done.stderr.decode().splitlines()]
    assert seen == [f"reading: {n} of 3 files" for n in (1, 2, 3)]


@pytest.mark.parametrize("columns", [60, 120])
def test_on_a_terminal_the_bar_has_its_width(columns):
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("COLUMNS", "LINES", "TQDM_NCOLS"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=end, stderr=end, env=environment)
    os.close(end)
    shown = b""
    try:
        while block := os.read(terminal, 65536):
            shown += block
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(terminal)
    assert done.returncode == 0
    bars = [
        part for part in re.split(r"[\r\n]+|\x1b\[A", shown.decode()) if "files/s" in part or "%|" in part
    ]
    assert len(bars) > 1 and "100%" in bars[-1] and "3/3" in bars[-1]
    assert columns - 20 < max(len(bar.rstrip()) for bar in bars) <= columns


def test_every_bar_comes_from_progress():
    """tqdm.write is for lines; bars come from progress.bar, which knows a terminal from a log."""
    found = set()
    for folder in (".", "avid", "avid/tools", "studies", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tqdm", "tqdm.tqdm", "trange"):
                    found.add(path.name)
    assert found == {"progress.py"}
