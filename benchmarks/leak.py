"""Can the temporal tasks be solved without looking at the content? Train them on videos in which nothing
happens.

    python benchmarks/leak.py [--root data/still] [--epochs 60] [key=value …]

Writes still pictures with steady noise as mp4 files, with the toy's size and encoder. Trains `toy_temporal`
on them, and prints the held-out accuracy of every task beside chance and its 99.9 % band. An accuracy above
the band was learned from codec artefacts, padding, or the position in the file.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avid import cli, config


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--root", type=Path, default=Path("data/still"), help="default: data/still")
    parser.add_argument("--epochs", type=int, default=60, help="default: 60")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import json
import subprocess

import numpy as np
import torch

from avid import progress, temporal_tasks, toy
from avid.spectrogram import edge_s

MANY = 1000  # draws, by which the share of questions with an answer is known
DRAWS = 2  # how often evaluation.confusions asks about each held-out video


def write(root, world, count=300):
    """Still videos below root/train and root/test: one of the toy's frames, and white noise."""
    for i in progress.bar(range(count), f"writing {root}", unit="video"):
        path = root / ("test" if i % 3 == 0 else "train") / f"{i:05d}.mp4"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((7, i))
        motion, kind = list(toy.TEMPO)[i % 4], list(toy.KINDS)[i % 10]
        frame = toy.picture(kind, toy.course(motion, toy.TEMPO[motion], world.seconds, rng), world, rng)[0]
        wave = rng.uniform(0.05, 0.2) * rng.standard_normal(round(world.seconds * world.rate_hz))
        frames = np.broadcast_to(frame, (round(world.seconds * world.fps), *frame.shape))
        part = path.with_suffix(".part")
        toy.encode(part, np.ascontiguousarray(frames), np.clip(wave, -1, 1).astype(np.float32), world)
        part.replace(path)


def many(cfg):
    """The labels of MANY draws, as a batch."""
    edge, length_s = edge_s(cfg.audio), max(cfg.video.frames / cfg.video.fps, cfg.audio.seconds)
    usable = edge, cfg.toy.seconds - edge, length_s
    draws = [
        temporal_tasks.plan(*usable, cfg.temporal, np.random.default_rng(seed))[1] for seed in range(MANY)
    ]
    return {kind: torch.tensor([labels[kind] for labels in draws]) for kind in draws[0]}


def main(arguments):
    cfg = config.load("toy_temporal", arguments.overrides)
    write(arguments.root, cfg.toy)
    out = Path("runs/leak")
    settings = [
        "data.name=folder",
        f"data.root={arguments.root}",
        f"optim.epochs={arguments.epochs}",
        f"out={out}",
    ]
    settings += [f"log.check_epochs={arguments.epochs}", *arguments.overrides]
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--cfg", "toy_temporal", *settings], check=True)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    answers = DRAWS * len(list((arguments.root / "test").iterdir()))
    print(f"{'task':18s} {'held out':>9s} {'chance':>8s}   99.9 % band")
    batch = many(cfg)
    for task, number in temporal_tasks.classes(cfg).items():
        share = 1 / number
        known = temporal_tasks.TASKS[task].targets(batch) != temporal_tasks.UNKNOWN
        questions = answers * known.sum().item() / MANY  # one or two a video, less those without an answer
        band = 3.3 * 100 * np.sqrt(share * (1 - share) / questions)
        accuracy = last[f"held-out {task} %"]
        verdict = "LEAK" if accuracy > 100 * share + band else "nothing to read"
        print(f"{task:18s} {accuracy:8.1f}% {100 * share:7.1f}%   ± {band:.1f}   {verdict}")


if __name__ == "__main__":
    main(arguments)
