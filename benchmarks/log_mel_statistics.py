"""Sound classification without a network: mean and standard deviation of each log-mel band over the file, and
a linear SVM.

    python benchmarks/log_mel_statistics.py --root /data/esc50 [--split all] [data.subset=esc10] [key=value …]

The protocol is that of `eval_linear.py --data esc50 --mode svm`: official folds, the SVM's C chosen on a
fifth of the training part.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avid import cli, config


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--root", required=True, help="folder of ESC-50")
    parser.add_argument("--split", default="all", help="1 to 5, or all (default)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import dataclasses

import numpy as np

from avid import evaluation, progress
from avid.media import Media
from avid.spectrogram import edge_s, spectrogram


def statistics(table, audio):
    """n×1×2·bins: mean and standard deviation of each band of the whole file."""
    rows = []
    for path in progress.bar(table.paths, table.name, unit="file", leave=False):
        with Media(table.root / path, ("audio",)) as media:
            whole = dataclasses.replace(audio, seconds=media.last_s - media.first_s - 2 * edge_s(audio))
            image = spectrogram(media, media.first_s + edge_s(audio), whole)[0].numpy()  # F×bins
        rows.append(np.concatenate([image.mean(0), image.std(0)]))
    return np.stack(rows)[:, None]


def main(arguments):
    given = [
        "data.name=esc50",
        f"data.root={arguments.root}",
        f"data.split={arguments.split}",
        *arguments.overrides,
    ]
    cfg = config.load("robust", given)
    with evaluation.plain_errors():
        top1 = []
        for train, test in evaluation.tables(cfg):
            x, y = (statistics(table, cfg.audio) for table in (train, test))
            top1.append(evaluation.linear_probe(x, train.labels, y, test.labels, cfg.seed, "svm")["top1"])
            print(f"{test.name}: top1 {top1[-1]:.1f}")
    print(f"mean top1 {np.mean(top1):.1f}")


if __name__ == "__main__":
    main(arguments)
