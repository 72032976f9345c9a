"""Restarts by torchrun: one of two processes is killed during training; torchrun ends the other one, starts
both again, and they resume.

    python tests/long/restart.py --kills 3 --out restarts

The end must be, bit for bit, that of two undisturbed processes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "data.root=world toy.train=16 toy.test=4 toy.seconds=1 toy.size=32 data.workers=0 video.size=32 "
    "video.frames=4 audio.seconds=0.5 audio.mels=32 model.width=4 model.depth=1 model.embedding=16 "
    "bank.num_negatives=16 optim.batch_size=8 optim.epochs=20 log.every_steps=1 log.check_epochs=0"
).split()


def start(folder, name, restarts):
    """torchrun with two processes; what they print goes to <folder>/<name>.log."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        f"--max-restarts={restarts}",
    ]
    return subprocess.Popen(
        [*torchrun, str(ROOT / "train.py"), f"out={name}", *SETTINGS],
        cwd=folder,
        stdout=open(folder / f"{name}.log", "wb"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def ranks(process):
    """The processes that torchrun started and that are alive."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=3, help="default: 3")
    parser.add_argument("--out", type=Path, required=True, help="folder for world and runs; must not exist")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    assert start(arguments.out, "whole", 0).wait() == 0, "the undisturbed run failed"
    process, rng = start(arguments.out, "killed", 2 * arguments.kills), random.Random(0)
    for kill in range(arguments.kills):
        saved, after = arguments.out / "killed" / "last.pt", time.time()
        while not saved.exists() or saved.stat().st_mtime < after:  # not yet resumed since the last kill
            assert process.poll() is None, "torchrun ended too early, or was too fast for the kills"
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        alive = ranks(process)
        victim = rng.choice(range(len(alive)))
        os.kill(alive[victim], signal.SIGKILL)
        print(f"kill {kill + 1}: process {victim}")
    assert process.wait() == 0, (arguments.out / "killed.log").read_text()[-3000:]
    whole, killed = (
        torch.load(arguments.out / name / "last.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert whole["step"] == killed["step"] == 40
    for part in ("network", "bank"):
        for name, value in whole[part].items():
            assert torch.equal(value, killed[part][name]), f"{part} {name} differs"
    resumed = (arguments.out / "killed.log").read_text(errors="replace").count("resuming killed")
    print(
        f"{arguments.kills} kills, resumed {resumed} times; the end is bit for bit that of the undisturbed "
        "run"
    )


if __name__ == "__main__":
    main()
