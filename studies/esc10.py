"""ESC-10, in-domain: what does the audio network learn from the training folds alone?

    python -m studies.esc10 --videos DIR      the runs that studies/results/esc10.csv lacks, then the table;
                                              DIR is ESC-50's or ESC-10's folder, with audio/ and meta/
    python -m studies.esc10 --table

For each of the five folds, a network is pre-trained without labels on the other four, by the audio terms
(speed, direction and order of clips, contrast of two clips). A linear SVM on its frozen features is then
tested on the fold. It is compared with an untrained network, with the mean and deviation of each log-mel band
(no network), and with networks of studies.own, studies.speech and studies.robust, whose checkpoints must be
below --runs. Each set of features is also tested with the log-mel statistics appended.
"""

from . import runs

VIDEOS_HELP = "folder of ESC-50 or ESC-10, with audio/ and meta/esc50.csv"

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=VIDEOS_HELP)

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
OTHERS = {  # method: the study and the group of the runs whose checkpoints are used
    "vggsound, xid": (own.STUDY, own.group("xid", 0)),
    "vggsound, temporal": (own.STUDY, own.group("temporal", 0)),
    "GRID, timewise-tasks": (speech.STUDY, speech.group("timewise-tasks", 0)),
    "toy, robust": (robust.STUDY, robust.group("robust", 0.3, robust.LONG)),
}
METHODS = ("statistics", "untrained", "in-domain", *OTHERS)


def plan(seeds):
    return [runs.Run({"method": method}, seed, ()) for seed in seeds for method in METHODS]


def root(run, arguments):
    if not arguments.videos:
        config.stop(f"--videos DIR is missing: {VIDEOS_HELP}")
    return arguments.videos


def measure(run, cfg):
    """Top-1, percent: the mean over the five folds and each fold; without and with the log-mel statistics."""
    method, top1 = run.group["method"], {"": [], " with statistics": []}
    network, their_cfg = other_network(run, cfg)
    for fold in range(1, 6):
        fold_cfg = dataclasses.replace(
            cfg, out=f"{cfg.out}/fold{fold}", data=dataclasses.replace(cfg.data, split=str(fold))
        )
        both = next(iter(evaluation.tables(fold_cfg)))
        bands = [log_mel_statistics.statistics(table, cfg.audio) for table in both]
        if method == "in-domain":
            train.main(
                dataclasses.replace(fold_cfg, data=dataclasses.replace(fold_cfg.data, split=f"train{fold}"))
            )
            network, _ = measures.trained(fold_cfg)
        elif method == "untrained":
            network = measures.untrained(fold_cfg, ("audio",))
        if method == "statistics":
            top1[""].append(svm_top1(bands, both, cfg))
            continue
        sounds = [
            data.Clips(table, with_data_of(their_cfg or fold_cfg, fold_cfg), False, ("audio",))
            for table in both
        ]
        device = next(network.parameters()).device
        features = [evaluation.extract(network, clips, device).features["audio"] for clips in sounds]
        top1[""].append(svm_top1(features, both, cfg))
        joined = [
            np.concatenate([x, y.repeat(x.shape[1], 1)], 2) for x, y in zip(features, bands, strict=True)
        ]
        top1[" with statistics"].append(svm_top1(joined, both, cfg))
    means = {f"top1{what}": float(np.mean(values)) for what, values in top1.items() if values}
    return means | {f"folds{what}": values for what, values in top1.items() if values}


def svm_top1(features, both, cfg):
    """Top-1 of a linear SVM, percent. features: of the (training, test) table, n×K×F each."""
    (x, new_x), (y, new_y) = features, (table.labels for table in both)
    return evaluation.linear_probe(x, y, new_x, new_y, cfg.seed, "svm")["top1"]


def other_network(run, cfg):
    """The network and the settings of another study's run of the same seed; (None, None) for this study's own
    methods."""
    if run.group["method"] not in OTHERS:
        return None, None
    study, group = OTHERS[run.group["method"]]
    (theirs,) = (other for other in study.plan([run.seed]) if other.group == group)
    there = runs.folder_of(study, theirs, Path(cfg.out).parents[1] / study.name, quick=False)
    if not (there / "last.pt").exists():
        config.stop(f"no checkpoint in {there}; run first: python -m studies.{study.name}")
    their_cfg = config.load(str(there / "config.yaml"), [f"out={there}"])
    return measures.trained(their_cfg)[0], their_cfg


def with_data_of(cfg, fold_cfg):
    """The settings of a network, with the data and the evaluation of this fold."""
    return dataclasses.replace(cfg, data=fold_cfg.data, eval=fold_cfg.eval)


def tables(rows):
    lines = []
    for method in METHODS:
        if selected := runs.select(rows, method=method):
            columns = "top1", "top1 with statistics"
            lines.append([method, *((selected, column) for column in columns), str(len(selected))])
    return {"esc10": runs.table(["features", "ESC-10, top-1, %", "with the statistics", "runs"], lines)}


def draw(rows, images, folder, arguments):
    shown = {"top1": "ESC-10, top-1, %", "top1 with statistics": "with the statistics, %"}
    yield figures.bars(images / "esc10.png", rows, METHODS, shown)


def prepare(tasks, arguments):
    """No files have to be written before the runs: the data set is there."""


STUDY = runs.Study(
    "esc10", "small", tuple(BASE), plan, measure, tables, draw, prepare=prepare, root=root, world="ESC-10"
)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
