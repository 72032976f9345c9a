"""Networks that were trained on the toy world, tested on real sounds and real videos.

    python -m studies.real --esc10 DIR     ESC-10 with the checkpoints of the studies: 5 folds, linear SVM on
                                           frozen features; a contact sheet of sounds
    python -m studies.real --media DIR     a contact sheet: segments of the videos in a folder, and the
                                           sounds nearest to their pictures
    python -m studies.real                 only the table, from studies/results/real.csv

Run the other studies first: their checkpoints must be below --runs. A checkpoint that has a row in the CSV is
not evaluated again.
"""

import argparse
from pathlib import Path

from avid import config

from . import runs


def command_line(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--esc10", metavar="DIR", help="folder of ESC-50 or ESC-10, with audio/ and meta/")
    parser.add_argument("--media", metavar="DIR", help="folder of videos with sound")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where the studies' checkpoints are (default: runs)"
    )
    parser.add_argument(
        "--results", metavar="DIR", help="folder for the CSV, tables and figures (default: the repository's)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import json

import numpy as np

import eval_linear
from avid import data, datasets, evaluation, media

from . import both, figures, measures, robust, sources, temporal

METHODS = (  # of each study, those that are evaluated
    (
        robust.STUDY,
        [{"method": m, "faulty": "0.3", "change": robust.LONG} for m in ("xid", "weighted", "robust")],
    ),
    (temporal.STUDY, [{"method": m} for m in ("contrast", "all", "sound-alone")]),
    (both.STUDY, [{"method": "robust_temporal"}]),
    (sources.STUDY, [sources.group("frontend", name) for name in sources.FRONTENDS]),
)
SEGMENT_S = 2.0  # of a real video


def checkpoints(folder, seeds):
    """Yield (study, group, seed, run folder) of the runs to evaluate that have a checkpoint."""
    for study, groups in METHODS:
        for run in study.plan(seeds):
            out = runs.folder_of(study, run, Path(folder) / "studies" / study.name, quick=False)
            if run.group in groups and (out / "last.pt").exists():
                yield study, run.group, run.seed, out


def esc10(path, root, folder, seeds):
    """Add a row for each checkpoint, and one for an untrained network with the same settings."""
    done = {(row["study"], row["method"], row["faulty"], row["seed"]) for row in runs.read(path)}
    for study, group, seed, out in checkpoints(folder, seeds):
        untrained = f"untrained, {group['method'] if study is sources.STUDY else f'as in {study.name}'}"
        for method in (group["method"], untrained):
            row = {
                "study": study.name,
                "method": method,
                "faulty": group.get("faulty", ""),
                "seed": str(seed),
            }
            if method != group["method"]:
                row["faulty"] = ""
            if tuple(row.values()) in done:
                continue
            random = method != group["method"]
            ckpt = ["random", "--cfg", str(out / "config.yaml")] if random else [str(out / "last.pt")]
            where = out / "untrained" if random else out
            options = [
                "--data",
                "esc50",
                "--root",
                root,
                "--split",
                "all",
                "--mode",
                "svm",
                "--out",
                str(where),
            ]
            settings = [
                "data.subset=esc10",
                "data.workers=0",
                "data.in_memory=true",
                "eval.clips=10",
                f"seed={seed}",
            ]
            eval_linear.main(eval_linear.command_line(["--ckpt", *ckpt, *options, *settings]))
            result = json.loads((where / "svm-audio-esc50-esc10-all.json").read_text(encoding="utf-8"))
            folds = [fold["top1"] for fold in result["divisions"]]
            protocol = "--data esc50 --split all --mode svm data.subset=esc10 eval.clips=10"
            runs.add(
                path, {**row, "settings": protocol, "ESC-10 top1": result["top1"], "ESC-10 folds": folds}
            )
            done.add(tuple(row.values()))


def table(rows):
    """The table: mean and deviation over seeds of the mean over folds."""
    lines = []
    for key in dict.fromkeys((row["study"], row["method"], row["faulty"]) for row in rows):
        selected = runs.select(rows, study=key[0], method=key[1], faulty=key[2])
        name = f"{key[1]}, {float(key[2]):.0%} faulty" if key[2] else key[1]
        lines.append([key[0], name, (selected, "ESC-10 top1"), str(len(selected))])
    return runs.table(["study", "features", "ESC-10, top-1, %", "runs"], lines)


def segments(folder):
    """A datasets.Table of segments of SEGMENT_S, up to ten of each video in a folder that has picture and
    sound; the label is the file."""
    paths, starts_s = [], []
    for path in sorted(Path(folder).iterdir()):
        try:
            with media.Media(path) as file:
                first_s, last_s = file.first_s, file.last_s
        except media.MediaError as error:
            print(f"left out {path}: {error}")
            continue
        for start_s in np.arange(first_s, last_s - SEGMENT_S, SEGMENT_S)[:10]:
            paths.append(path.name)
            starts_s.append(start_s)
    classes = sorted(set(paths))
    if len(paths) < 2:
        config.stop(f"{folder} holds no videos with picture and sound of {2 * SEGMENT_S:g} s and more")
    starts_s, labels = np.array(starts_s), np.array([classes.index(path) for path in paths])
    ends_s, fold = starts_s + SEGMENT_S, np.zeros(len(paths), np.int64)
    return datasets.Table("real videos", Path(folder), paths, labels, classes, starts_s, ends_s, fold, {}, [])


def contact_sheet(path, table, out, query, space):
    """Some pictures or sounds of a table of real files, and the sounds of all of them that are nearest by a
    checkpoint."""
    cfg = config.load(str(out / "config.yaml"), ["data.workers=0", f"out={out}"])
    network, _ = measures.trained(cfg)
    device = next(network.parameters()).device
    modalities = tuple(dict.fromkeys((query, "audio")))
    clips = data.Clips(table, cfg, training=False, modalities=modalities, clips=1)
    found = evaluation.extract(network, clips, device)
    print(f"written: {figures.neighbours(path, found, table, cfg, query=query, space=space)}")


def main(arguments):
    results, images = runs.folders(arguments)
    path = results / "real.csv"
    if arguments.esc10:
        esc10(path, arguments.esc10, arguments.runs, arguments.seeds)
    if arguments.esc10 or arguments.media:
        last = list(checkpoints(arguments.runs, arguments.seeds[:1]))
        if not last:
            config.stop(f"no checkpoints of the studies below {arguments.runs}; run them first")
    if arguments.esc10:
        sounds = datasets.load(config.Data(name="esc50", root=arguments.esc10, subset="esc10"), "all")
        contact_sheet(images / "real-sounds.png", sounds, last[-1][-1], "audio", "features")
    if arguments.media:
        contact_sheet(
            images / "real-neighbours.png", segments(arguments.media), last[-1][-1], "video", "embeddings"
        )
    rows = runs.read(path)
    if not rows:
        config.stop(f"{path} holds nothing yet; run: python -m studies.real --esc10 DIR")
    runs.publish("real", table(rows), arguments)


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
