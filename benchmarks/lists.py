"""Starting on a long list: how long until train.py has its table of videos, and what memory that takes.

    python benchmarks/lists.py [--rows 200000 2000000] [--layouts kinetics400 audioset …] [--folder DIR]
                               [--json FILE]

Writes the lists of each layout and as many empty files as they name (a tenth as many more for the part that
training is checked on), and has a process of its own for each reads them as train.py does: the training part
and the checked part, some rows of it, the hash of all rows that a checkpoint holds. Seconds are of processor
time, user and system, with the directory already in the page cache; memory is the largest that was resident,
imports included. --folder keeps the files for the next time.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli

LAYOUTS = ("kinetics400", "audioset", "vggsound", "manifest", "folder")


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    add = parser.add_argument
    add("--rows", nargs="+", type=int, default=[200_000], metavar="N", help="videos (default: 200000)")
    add("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, metavar="D", help="default: all of them")
    add("--folder", metavar="DIR", help="where the files are written, and stay; default: a temporary folder")
    add("--json", metavar="FILE", help="write the figures there")
    add("--start", nargs=2, metavar=("D", "ROOT"), help=argparse.SUPPRESS)  # what the processes are asked
    return parser.parse_args()


def start(layout, root):
    """Read a data set as train.py does; prints a dict of figures."""
    import json
    import resource
    import time

    from avid import config, datasets

    data = config.Data(name=layout, root=root)
    seconds = {}

    def timed(name, function, *arguments):
        before = time.process_time()
        result = function(*arguments)
        seconds[name] = time.process_time() - before
        return result

    train, held_out = timed("both parts", datasets.for_training, data)
    timed("take", datasets.take, held_out, range(2000))
    timed("hash", datasets.table_hash, train)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    figures = {"videos": len(train), "all, s": sum(seconds.values())}
    figures |= {f"{name}, s": value for name, value in seconds.items()} | {"peak, GB": peak_gb}
    print(json.dumps(figures))


if (
    __name__ == "__main__"
):  # before the heavy imports: --help answers at once, and torch's memory is not counted
    arguments = command_line()
    if arguments.start:
        start(*arguments.start)
        raise SystemExit

import json
import random
import subprocess
import tempfile

import report

CLASSES = 400


def names(count, seed=0):
    """So many YouTube-like identifiers, no two alike."""
    rng, letters = random.Random(seed), "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return [f"{''.join(rng.choices(letters, k=6))}{i:05x}" for i in range(count)]


def touch(root, files):
    for folder in {file.rpartition("/")[0] for file in files}:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for file in files:
        open(root / file, "wb").close()


def text(root, name, lines):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def make(layout, root, count):
    """The lists of a layout and empty files: `count` of its training part, a tenth as many of the checked
    one.
    """
    parts = {"train": names(count), "test": names(count // 10, seed=1)}
    label = [f"class number {k}" for k in range(CLASSES)]
    if layout == "kinetics400":
        for part, ids in zip(("train", "val"), parts.values(), strict=True):
            head = "label,youtube_id,time_start,time_end,split,is_cc"
            rows = (
                f'"{label[i % CLASSES]}",{name},{i % 90},{i % 90 + 10},{part},0' for i, name in enumerate(ids)
            )
            text(root, f"annotations/{part}.csv", [head, *rows])
            where = (
                f"{part}/{label[i % CLASSES]}/{name}_{i % 90:06d}_{i % 90 + 10:06d}.mp4"
                for i, name in enumerate(ids)
            )
            touch(root, list(where))
    elif layout == "audioset":
        labels = [f"/m/{k:05x}" for k in range(527)]
        text(
            root,
            "class_labels_indices.csv",
            ["index,mid,display_name"] + [f'{k},{mid},"Sound, of {k}"' for k, mid in enumerate(labels)],
        )
        for part, ids in zip(("unbalanced_train", "eval"), parts.values(), strict=True):
            rows = (
                f'{name}, {i % 500}.000, {i % 500 + 10}.000, "{labels[i % 527]},{labels[i * 7 % 527]}"'
                for i, name in enumerate(ids)
            )
            text(
                root,
                f"{part}_segments.csv",
                ["# one", "# two", "# YTID, start_seconds, end_seconds, positive_labels", *rows],
            )
            touch(root, [f"{part}_segments/{name}_{i % 500:06d}.mp4" for i, name in enumerate(ids)])
    elif layout == "vggsound":
        rows = [
            f'{name},{i % 500},"{label[i % CLASSES]}, of it",{part}'
            for part, ids in parts.items()
            for i, name in enumerate(ids)
        ]
        text(root, "vggsound.csv", rows)
        touch(
            root, [f"video/{name}_{i % 500:06d}.mp4" for ids in parts.values() for i, name in enumerate(ids)]
        )
    elif layout == "manifest":
        where = [
            (part, f"videos/{i % CLASSES}/{name}.mp4", i)
            for part, ids in parts.items()
            for i, name in enumerate(ids)
        ]
        rows = (f'{path},"{label[i % CLASSES]}",{part},{i % 7},{i % 7 + 10}' for part, path, i in where)
        text(root, "manifest.csv", ["path,label,split,start,end", *rows])
        touch(root, [path for _, path, _ in where])
    else:
        touch(
            root,
            [
                f"{part}/{label[i % CLASSES]}/{name}.mp4"
                for part, ids in parts.items()
                for i, name in enumerate(ids)
            ],
        )


def main(arguments):
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in arguments.rows:
            for layout in arguments.layouts:
                root = Path(arguments.folder or temporary) / f"{layout}-{count}"
                if not (root / "whole").exists():
                    make(layout, root, count)
                    (root / "whole").touch()
                command = [sys.executable, __file__, "--start", layout, str(root)]
                for _ in range(2):  # the first brings the directories into memory
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append({"layout": layout, **json.loads(done.stdout)})
    report.show("starting on a list, seconds of processor time", rows, arguments.json)


if __name__ == "__main__":
    main(arguments)
