"""ESC-10, in-domain: what does the network of sound learn from the sounds of the training folds alone?

    python -m studies.esc10 --videos DIR      all rows that are not in studies/results/esc10.csv yet, then the
                                              table; DIR is ESC-50's or ESC-10's, with audio/ and meta/
    python -m studies.esc10 --table

Of each of the five folds, a network is trained on the other four by the terms of sound (speed, direction,
order, contrast of two moments), without a label and without a sound of the fold, and a linear SVM judges its
features on the fold. Beside it: an untrained network; mean and deviation of each log-mel band, without a
network; and networks of studies.own, studies.speech and studies.robust, whose checkpoints are asked below
--runs where they are there. Each also with the statistics behind its features.
"""

from . import runs

HOLDS = "folder of ESC-50 or ESC-10, with audio/ and meta/esc50.csv"

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=HOLDS)

import dataclasses
from pathlib import Path

import numpy as np

import train
from avid import config, data, evaluation
from benchmarks import log_mel_statistics

from . import figures, measures, own, robust, speech

BASE = (
    "data.name=esc50 data.subset=esc10 data.need=any audio.seconds=1 audio.mask_time=0.2 "
    "audio.mask_frequency=0.2 "
    "temporal.moments=2 temporal.speeds=[1,2,4] temporal.reverse=true optim.epochs=60 log.check_epochs=0 "
    "contrast.temperature=0.1 contrast.n_pos=0 contrast.k_pos=0 contrast.negatives=128 eval.clips=10 "
    "weights.xid=0 "
    "weights.contrast_aa=1 weights.speed_audio=1 weights.direction_audio=1 weights.order_audio=1"
).split()
OTHERS = {  # method: (study, the group of its runs), whose checkpoints are asked
    "vggsound, xid": (own.STUDY, own.group("xid", 0)),
    "vggsound, temporal": (own.STUDY, own.group("temporal", 0)),
    "GRID, intervals-tasks": (speech.STUDY, speech.group("intervals-tasks", 0)),
    "toy, robust": (robust.STUDY, robust.group("robust", 0.3, robust.LONG)),
}
METHODS = ("statistics", "untrained", "in-domain", *OTHERS)


def plan(seeds):
    return [runs.Run({"method": method}, seed, ()) for seed in seeds for method in METHODS]


def root(run, arguments):
    if not arguments.videos:
        config.stop(f"--videos DIR is missing: {HOLDS}")
    return arguments.videos


def measure(run, cfg):
    """Top-1 over the five folds, percent, and of each fold; with the statistics, and without."""
    method, top1 = run.group["method"], {"": [], " with statistics": []}
    network, asked = other(run, cfg)
    for fold in range(1, 6):
        here = dataclasses.replace(
            cfg, out=f"{cfg.out}/fold{fold}", data=dataclasses.replace(cfg.data, split=str(fold))
        )
        both = next(iter(evaluation.tables(here)))
        bands = [log_mel_statistics.statistics(table, dataclasses.replace(cfg.audio)) for table in both]
        if method == "in-domain":
            train.main(dataclasses.replace(here, data=dataclasses.replace(here.data, split=f"train{fold}")))
            network, _ = measures.trained(here)
        elif method == "untrained":
            network = measures.untrained(here, ("audio",))
        if method == "statistics":
            top1[""].append(judge(bands, both, cfg))
            continue
        sounds = [data.Clips(table, on_sounds(asked or here, here), False, ("audio",)) for table in both]
        device = next(network.parameters()).device
        found = [evaluation.extract(network, clips, device).features["audio"] for clips in sounds]
        top1[""].append(judge(found, both, cfg))
        behind = [np.concatenate([x, y.repeat(x.shape[1], 1)], 2) for x, y in zip(found, bands, strict=True)]
        top1[" with statistics"].append(judge(behind, both, cfg))
    means = {f"top1{what}": float(np.mean(values)) for what, values in top1.items() if values}
    return means | {f"folds{what}": values for what, values in top1.items() if values}


def judge(found, both, cfg):
    """Top-1 of a linear SVM, percent: features of the (training, test) table, n×K×F."""
    (x, new_x), (y, new_y) = found, (table.labels for table in both)
    return evaluation.linear_probe(x, y, new_x, new_y, cfg.seed, "svm")["top1"]


def other(run, cfg):
    """The network and the settings of another study's run of this seed; None, None: it has its own."""
    if run.group["method"] not in OTHERS:
        return None, None
    study, group = OTHERS[run.group["method"]]
    (theirs,) = (one for one in study.plan([run.seed]) if one.group == group)
    there = runs.folder_of(study, theirs, Path(cfg.out).parents[1] / study.name, quick=False)
    if not (there / "last.pt").exists():
        config.stop(f"no checkpoint in {there}; run first: python -m studies.{study.name}")
    asked = config.load(str(there / "config.yaml"), [f"out={there}"])
    return measures.trained(asked)[0], asked


def on_sounds(asked, here):
    """The settings of a network, on the sounds of this fold."""
    return dataclasses.replace(asked, data=here.data, eval=here.eval)


def tables(rows):
    lines = []
    for method in METHODS:
        if mine := runs.select(rows, method=method):
            columns = "top1", "top1 with statistics"
            lines.append([method, *((mine, column) for column in columns), str(len(mine))])
    return {"esc10": runs.table(["features", "ESC-10, top-1, %", "with the statistics", "runs"], lines)}


def draw(rows, images, folder, arguments):
    shown = {"top1": "ESC-10, top-1, %", "top1 with statistics": "with the statistics, %"}
    yield figures.bars(images / "esc10.png", rows, METHODS, shown)


def nothing(tasks, arguments):
    """Nothing is written before the runs: the sounds are there."""


STUDY = runs.Study(
    "esc10", "small", tuple(BASE), plan, measure, tables, draw, prepare=nothing, root=root, world="ESC-10"
)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
