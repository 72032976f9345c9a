"""Watches an hour of training and evaluation for growth of memory, descriptors, threads, or processes.

    python tests/long/soak.py --minutes 60 --out soak
    python tests/long/soak.py --minutes 60 --out soak --packed --epochs 1000000   one training on packed data

In: nothing; a toy world is written below --out. Out: soak.csv with a line every few seconds, soak.png, and
the numbers of the first and of the last quarter. One process, watched from outside, trains again and again,
with two decoding processes and checks of held-out videos, and evaluates each time by linear probe and
retrieval.
"""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes

import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]  # tests, and the project
import forked

SETTINGS = (
    "data.root=world toy.train=48 toy.test=16 toy.seconds=2 toy.size=32 data.workers=2 video.size=32 "
    "video.frames=4 audio.seconds=0.5 audio.mels=32 model.width=4 model.depth=1 model.embedding=16 "
    "bank.num_negatives=16 optim.batch_size=8 log.every_steps=6 log.check_epochs=4 eval.clips=2"
).split()
PANELS = {  # column: title
    "rss_MiB": "resident memory, MiB",
    "descriptors": "open descriptors",
    "threads": "threads",
    "processes": "processes",
    "shm_MiB": "/dev/shm, MiB",
    "shm_files": "files in /dev/shm",
}
WARM_UP = 0.1  # share of the time that is left out, while libraries fill their caches


def cycles(settings, epochs):
    """Train and evaluate for ever; runs in the watched process."""
    import runpy

    cycle = 0
    while True:
        out = f"run/{cycle % 2}"
        for name in ("last.pt", "last.previous.pt"):
            Path(out, name).unlink(missing_ok=True)
        ckpt = ["--ckpt", f"{out}/last.pt"]
        for script, more in (
            ("train.py", [f"optim.epochs={epochs}"]),
            ("eval_linear.py", ckpt),
            ("eval_retrieval.py", ckpt),
        ):
            sys.argv = [str(forked.ROOT / script), *more, *settings, f"out={out}", f"seed={cycle}"]
            handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            runpy.run_path(sys.argv[0], run_name="__main__")
            for number, handler in handlers.items():
                signal.signal(number, handler)
        for path in Path(out, "features").iterdir():  # each checkpoint has its own
            path.unlink()
        cycle += 1
        print(f"cycle {cycle} done", flush=True)


def sample(group):
    """Numbers from /proc, summed over a group of processes."""
    found = dict.fromkeys(PANELS, 0.0)
    for pid in forked.group(group):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            fields = dict(line.partition(":")[::2] for line in status.splitlines())
            # pages shared by forks count for each process: Pss is slower to read
            found["rss_MiB"] += int(fields["VmRSS"].split()[0]) / 1024 if "VmRSS" in fields else 0
            found["threads"] += int(fields["Threads"])
            found["descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
            found["processes"] += 1
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    shared = [
        path.stat() for path in Path("/dev/shm").iterdir() if path.name.startswith(("torch_", "psm_", "sem."))
    ]
    return found | {"shm_MiB": sum(stat.st_size for stat in shared) / 2**20, "shm_files": len(shared)}


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [row["s"] / 60 for row in rows]
    figure, axes = plt.subplots(2, 3, figsize=(12, 5), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        axis.plot(minutes, [row[name] for row in rows], linewidth=0.8)
        axis.set(title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("minutes")
    figure.savefig(path, dpi=110)


def pack(out):
    """The toy world, packed below `out`: the settings that name it."""
    from avid import config, toy

    files = toy.write(out / "world", config.load("toy", SETTINGS).toy, 0, 1, progress=False)
    command = [sys.executable, "-m", "avid", "pack", str(files), str(out / "packed"), "--data=toy"]
    command += ["--audio-rate=16000", "--shard-gb=0.001"]
    subprocess.run(command, check=True, cwd=forked.ROOT)
    return ["data.name=packed", "data.root=packed"]


def main(minutes, out, every_s, epochs, packed):
    out.mkdir(parents=True)
    settings = SETTINGS + (pack(out) if packed else [])
    begin = time.monotonic()
    process = forked.start("", [], out, out / "log", before=Cycles(settings, epochs))
    rows = []
    with open(out / "soak.csv", "w", newline="") as file:
        lines = csv.DictWriter(file, ["s", *PANELS])
        lines.writeheader()
        while time.monotonic() - begin < 60 * minutes:
            time.sleep(every_s)
            if not process.is_alive():
                raise SystemExit(f"it ended with {process.exitcode}:\n{(out / 'log').read_text()[-3000:]}")
            rows.append({"s": round(time.monotonic() - begin, 1), **sample(process.pid)})
            lines.writerow(rows[-1])
            file.flush()
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    leaked = forked.left(process.pid, seconds=10)
    draw(rows, out / "soak.png")
    done = (out / "log").read_text().count(" done\n")
    print(
        f"{minutes:g} minutes, {done} trainings with evaluation, {len(rows)} samples, {len(leaked)} "
        "processes left at the end"
    )
    rows = [row for row in rows if row["s"] > WARM_UP * 60 * minutes]
    quarter = len(rows) // 4
    print(f"{'':12s}{'first quarter':>24s}{'last quarter':>24s}   median (least to most)")
    for name in PANELS:
        parts = [np.array([row[name] for row in part]) for part in (rows[:quarter], rows[-quarter:])]
        print(
            f"{name:12s}"
            + "".join(f"{np.median(x):10.1f} ({x.min():.1f} to {x.max():.1f})".rjust(24) for x in parts)
        )
    return leaked


class Cycles:
    """`cycles`, as forked.start calls it first: it never returns."""

    def __init__(self, settings, epochs):
        self.settings, self.epochs = settings, epochs

    def __call__(self):
        cycles(self.settings, self.epochs)


if __name__ == "__main__":
    forked.from_here()
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--minutes", type=float, default=60.0)
    arguments.add_argument(
        "--out", type=Path, required=True, help="folder for world, runs and figures; must not exist"
    )
    arguments.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds between samples")
    arguments.add_argument("--epochs", type=int, default=40, help="of each training")
    arguments.add_argument("--packed", action="store_true", help="train and evaluate on packed data")
    asked = arguments.parse_args()
    leaked = main(asked.minutes, asked.out.resolve(), asked.every, asked.epochs, asked.packed)
    raise SystemExit(1 if leaked else 0)
