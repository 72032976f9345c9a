"""Kills packing at random moments again and again: are the bytes those of undisturbed packing?

    python tests/long/packed.py --kills 10 [--seed 0] [--videos 60]

In: nothing; a toy world and the packs are written into a temporary folder. A kill is SIGKILL, of the command
alone, whose processes must then end by themselves, or of all of them at once. Exit code 1 if bytes differ.
"""

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes
sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]  # tests, and the project

import test_packed

from avid import config, toy


def main(kills, seed, videos):
    with tempfile.TemporaryDirectory() as folder:
        root = toy.write(folder, config.Toy(train=videos, test=1), 0, os.cpu_count(), progress=False)
        whole, other = Path(folder) / "whole", Path(folder) / "killed"
        assert test_packed.killed(root, whole, 0, random.Random(seed), 0.0) == 0
        met = test_packed.killed(root, other, kills, random.Random(seed), 4.0)
        same = test_packed.content(whole) == test_packed.content(other)
        shards = len(list(whole.glob("*.tar")))
    found = "the same bytes" if same else "OTHER BYTES"
    print(f"{kills} kills, {met} of them at work; {shards} shards: {found}")
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=60)
    arguments = parser.parse_args()
    raise SystemExit(0 if main(arguments.kills, arguments.seed, arguments.videos) else 1)
