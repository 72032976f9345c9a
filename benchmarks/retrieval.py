"""The nearest rows of a gallery: evaluation.nearest against topk on the matrix of all similarities.

    python benchmarks/retrieval.py [--sizes 2000x20000 10000x100000] [--plain-mb 4000] [--repeats 3] [--json
    FILE]

Random unit features of 512 numbers, the 20 nearest, on the CPU as the evaluations do it. Ways take turns;
milliseconds are medians. Peak: the most memory that a way takes beside the features. A matrix larger than
--plain-mb is not made; then only evaluation.nearest is measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument(
        "--sizes", nargs="+", metavar="QxG", default=["2000x20000", "10000x100000"], help="queries x gallery"
    )
    parser.add_argument(
        "--plain-mb",
        type=float,
        default=4000,
        help="largest matrix of the plain way, 10⁶ bytes (default: 4000)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds that count (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # evaluation.nearest ranks on the CPU, and memory is the process's

import numpy as np
import report
import torch

from avid import evaluation

D, K = 512, 20


def unit(n, seed):
    x = np.random.default_rng(seed).standard_normal((n, D), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain(queries, gallery, k):
    return (torch.from_numpy(queries) @ torch.from_numpy(gallery).T).topk(k).indices.numpy()


def equal(a, b, queries, gallery):
    """Whether positions are equal; where they differ, similarities must be equal up to rounding."""
    differ = np.argwhere(a != b)
    near = [(queries[q] @ gallery[a[q, k]], queries[q] @ gallery[b[q, k]]) for q, k in differ]
    return bool(np.allclose(*zip(*near, strict=True), atol=1e-6)) if near else True


def measure(arguments):
    for size in arguments.sizes:
        q, g = map(int, size.split("x"))
        queries, gallery = unit(q, 0), unit(g, 1)
        ways = {"nearest": lambda x=queries, y=gallery: evaluation.nearest(x, y, K)}
        if 4e-6 * q * g <= arguments.plain_mb:
            ways["plain topk"] = lambda x=queries, y=gallery: plain(x, y, K)
        peak, found = {}, {}
        for name, way in ways.items():
            before = report.memory_gb()
            found[name] = way()
            peak[name] = 1e3 * (report.peak_gb() - before)
        ms = report.in_turns(ways, arguments.repeats, warm_up=0)
        for name in ways:
            row = {
                "what": name,
                "queries": q,
                "gallery": g,
                "ms": float(np.median(ms[name])),
                "peak MB": peak[name],
            }
            if len(ways) == 2:
                row["÷ plain"] = float(np.median(ms[name] / ms["plain topk"]))
                row["the same"] = str(equal(found["nearest"], found["plain topk"], queries, gallery))
            yield row


if __name__ == "__main__":
    report.show(f"the {K} nearest of {D} numbers", list(measure(arguments)), arguments.json)
