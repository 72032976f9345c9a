"""Real sound and real videos, which the toy's networks have never heard or seen.

    python -m studies.real --esc10 DIR     ESC-10 by the studies' checkpoints: 5 folds, linear SVM on frozen
                                           features; a sheet of sounds
    python -m studies.real --media DIR     a sheet: pieces of the videos in a folder, and the sounds that
                                           their pictures find
    python -m studies.real                 only the table, from studies/results/real.csv

Run the other studies first: their checkpoints are needed, below --runs. A checkpoint that has a row is not
asked again.
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
        "--results",
        metavar="DIR",
        help="folder of the CSV and all that is made of it (default: the repository's)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import json

import numpy as np

import eval_linear
from avid import data, datasets, evaluation, media

from . import both, figures, measures, robust, sources, temporal

METHODS = (  # of each study, whose features are asked
    (
        robust.STUDY,
        [{"method": m, "faulty": "0.3", "change": robust.LONG} for m in ("xid", "weighted", "robust")],
    ),
    (temporal.STUDY, [{"method": m} for m in ("contrast", "all", "sound-alone")]),
    (both.STUDY, [{"method": "robust_temporal"}]),
    (sources.STUDY, [sources.group("frontend", name) for name in sources.FRONTENDS]),
)
PIECE_S = 2.0  # of a real video


def checkpoints(folder, seeds):
    """(study, group, seed, run folder) of the runs whose features are asked, where they have a checkpoint."""
    for study, groups in METHODS:
        for run in study.plan(seeds):
            out = runs.folder_of(study, run, Path(folder) / "studies" / study.name, quick=False)
            if run.group in groups and (out / "last.pt").exists():
                yield study, run.group, run.seed, out


def esc10(path, root, folder, seeds):
    """A row for each checkpoint, and one for an untrained network of the same settings."""
    done = {(row["study"], row["method"], row["faulty"], row["seed"]) for row in runs.read(path)}
    for study, group, seed, out in checkpoints(folder, seeds):
        floor = f"untrained, {group['method'] if study is sources.STUDY else f'as in {study.name}'}"
        for method in (group["method"], floor):
            facts = {
                "study": study.name,
                "method": method,
                "faulty": group.get("faulty", ""),
                "seed": str(seed),
            }
            if method != group["method"]:
                facts["faulty"] = ""
            if tuple(facts.values()) in done:
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
            result = json.loads((where / "svm-audio-esc50-all.json").read_text(encoding="utf-8"))
            folds = [fold["top1"] for fold in result["divisions"]]
            asked = "--data esc50 --split all --mode svm data.subset=esc10 eval.clips=10"
            runs.add(path, {**facts, "settings": asked, "ESC-10 top1": result["top1"], "ESC-10 folds": folds})
            done.add(tuple(facts.values()))


def table(rows):
    """Mean and deviation over seeds of the mean over folds."""
    lines = []
    for key in dict.fromkeys((row["study"], row["method"], row["faulty"]) for row in rows):
        mine = runs.select(rows, study=key[0], method=key[1], faulty=key[2])
        name = f"{key[1]}, {float(key[2]):.0%} faulty" if key[2] else key[1]
        lines.append([key[0], name, (mine, "ESC-10 top1"), str(len(mine))])
    return runs.table(["study", "features", "ESC-10, top-1, %", "runs"], lines)


def pieces(folder):
    """The videos of a folder that have picture and sound, in pieces: a datasets.Table, labelled by their
    file."""
    paths, starts_s = [], []
    for path in sorted(Path(folder).iterdir()):
        try:
            with media.Media(path) as file:
                first_s, last_s = file.first_s, file.last_s
        except media.MediaError as error:
            print(f"left out {path}: {error}")
            continue
        for start_s in np.arange(first_s, last_s - PIECE_S, PIECE_S)[:10]:
            paths.append(path.name)
            starts_s.append(start_s)
    classes = sorted(set(paths))
    if len(paths) < 2:
        config.stop(f"{folder} holds no videos with picture and sound of {2 * PIECE_S:g} s and more")
    starts_s, labels = np.array(starts_s), np.array([classes.index(path) for path in paths])
    ends_s, fold = starts_s + PIECE_S, np.zeros(len(paths), np.int64)
    return datasets.Table("real videos", Path(folder), paths, labels, classes, starts_s, ends_s, fold, {}, [])


def sheet(path, parts, out, query, space):
    """Pictures or sounds of a table of real files, and the sounds that a checkpoint finds first among them
    all."""
    cfg = config.load(str(out / "config.yaml"), ["data.workers=0", f"out={out}"])
    network, _ = measures.trained(cfg)
    device = next(network.parameters()).device
    modalities = tuple(dict.fromkeys((query, "audio")))
    clips = data.Clips(parts, cfg, training=False, modalities=modalities, clips=1)
    found = evaluation.extract(network, clips, device)
    print(f"written: {figures.neighbours(path, found, parts, cfg, query=query, space=space)}")


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
        sheet(images / "real-sounds.png", sounds, last[-1][-1], "audio", "features")
    if arguments.media:
        sheet(images / "real-neighbours.png", pieces(arguments.media), last[-1][-1], "video", "embeddings")
    rows = runs.read(path)
    if not rows:
        config.stop(f"{path} holds nothing yet; run: python -m studies.real --esc10 DIR")
    runs.publish("real", table(rows), arguments)


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(arguments)
