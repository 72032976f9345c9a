"""Training and search on a small folder of real videos: 100 clips in the wild. The first part of each clip is
for training, the last part for the queries. Repeated with 30 and 60 % of the training sounds swapped.

    python -m studies.own --videos DIR               the runs that studies/results/own.csv lacks, then the
                                                     tables and the figure; DIR holds own.csv and
                                                     manifest.csv
    python -m studies.own --videos DIR --seeds 0 --only xid robust
    python -m studies.own --table --figures          tables and the figure from the CSV

All runs are `--cfg small`. Methods: xid, plain xID; weighted, with weights; soft, with soft targets; robust,
with weights and soft targets; oracle, with weights by the ground truth; temporal, all temporal tasks and
contrasts; both, temporal with Robust-xID in place of its cross-modal contrast; xid-15 and xid-50,
xid for that many epochs in place of 150. The methods that take two clips of each video train for half as many
epochs: as many clips, the same time.
"""

from . import runs

VIDEOS_HELP = (
    "folder with own.csv (path,label,split,start,end), manifest.csv (path,label,split) and their clips"
)

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=VIDEOS_HELP)

import dataclasses
import functools
from pathlib import Path

import numpy as np

from avid import config, data, datasets, evaluation
from avid.temporal_tasks import TASKS
from avid.tools import sync

from . import figures, measures, robust, swapped

EPOCHS = config.load("small").optim.epochs
BASE = ("data.name=manifest", "log.check_epochs=0")
ROBUST = (*robust.ROBUST, f"loss.warmup_epochs={EPOCHS // 2}")
TWO_CLIPS = (  # of each video
    "temporal.moments=2", "temporal.speeds=[1,2]", "temporal.reverse=true", f"optim.epochs={EPOCHS // 2}",
    "contrast.temperature=0.1", "contrast.n_pos=0", "contrast.k_pos=0", "contrast.negatives=64",
    *(f"weights.{name}=1" for name in ("contrast_vv", "contrast_aa", *TASKS)),
)  # fmt: skip
SHORTER = {f"xid-{epochs}": (f"optim.epochs={epochs}",) for epochs in (15, 50)}
METHODS = {
    "xid": (),
    "weighted": (*robust.WEIGHTS, f"loss.warmup_epochs={EPOCHS // 2}"),
    "soft": (*robust.SOFT, "loss.estimator=cycle", f"loss.warmup_epochs={EPOCHS // 2}"),
    "robust": ROBUST,
    "oracle": (f"loss.warmup_epochs={EPOCHS // 2}",),  # weights by the manifest
    "temporal": (*TWO_CLIPS, "weights.xid=0", "weights.contrast_va=1", "weights.contrast_av=1"),
    "both": (*TWO_CLIPS, *robust.ROBUST, f"loss.warmup_epochs={EPOCHS // 4}"),
    **SHORTER,
}
METHODS_UNSWAPPED = ("untrained", "xid", "weighted", "robust", "temporal", "both")  # without swapped sounds
METHODS_SWAPPED = ("xid", "robust", "weighted", "soft", "oracle", *SHORTER)  # with them
SHORT = ("untrained", "xid", "robust", "temporal")  # of README.md's table
SHARES = (0.3, 0.6)
MEASURES = {  # of the table: column of the CSV, head
    "v→a instance R@1": "picture → its sound, R@1",
    "v→a instance R@5": "R@5",
    "a→v instance R@1": "sound → its picture, R@1",
    "a→v instance R@5": "R@5",
    "video instance R@1": "picture → picture",
    "audio instance R@1": "sound → sound",
    "kind probe video": "kind by picture, probe",
    "kind probe audio": "kind by sound, probe",
    "sync": "in sync, within a step",
}


def plan(seeds):
    """First the runs without swapped sounds, then 30 %, then 60 %; each seed by seed."""
    made = [runs.Run(group(m, 0.0), seed, METHODS.get(m, ())) for seed in seeds for m in METHODS_UNSWAPPED]
    for share in SHARES:
        made += [runs.Run(group(m, share), seed, METHODS[m]) for seed in seeds for m in METHODS_SWAPPED]
    return made


def group(method, faulty):
    return {"method": method, "faulty": f"{faulty:g}"}


def manifest(run, arguments):
    """The path of the manifest that a run trains on, below --root."""
    if not arguments.videos:
        config.stop(f"--videos DIR is missing: {VIDEOS_HELP}")
    return (
        swapped.folder_of(arguments.root, clip_list(arguments), float(run.group["faulty"]), run.seed)
        / swapped.NAME
    )


def clip_list(arguments):
    return Path(arguments.videos) / "own.csv"


def prepare(tasks, arguments):
    """Write the manifests and the clips of all runs."""
    for _, run, *_ in tasks:
        swapped.write(arguments.root, clip_list(arguments), float(run.group["faulty"]), run.seed)


def feature_quality(subject):
    """Measures of the last part of each clip, in percent: cross-modal retrieval; retrieval of the clip's
    first part within a modality; a linear probe of the kind, tested on files that it was not trained on;
    and sync."""
    cfg = subject.cfg
    tables = [swapped.originals(table) for table in measures.tables(cfg)]
    first, last = (
        evaluation.extract(subject.network, data.Clips(table, cfg, training=False), subject.device)
        for table in tables
    )
    result = evaluation.cross_modal(last, tables[1].labels[last.index], ks=(1, 5))
    files = [np.array(table.paths)[part.index] for table, part in zip(tables, (first, last), strict=True)]
    parts = [
        np.array(table.columns["part"])[part.index] for table, part in zip(tables, (first, last), strict=True)
    ]
    for modality in data.MODALITIES:
        query, key = (part.video_level("features", modality) for part in (last, first))
        found = evaluation.nearest(query, key, 5)
        same = evaluation.recall(found, lambda q, f: files[1][q] == files[0][f], (1, 5))
        result |= {f"{modality} instance {k}": value for k, value in same.items()}
        known, new = parts[0] == "train", parts[1] == "test"
        probe = evaluation.linear_probe(
            first.features[modality][known], tables[0].labels[first.index][known],
            last.features[modality][new], tables[1].labels[last.index][new], cfg.seed,
        )  # fmt: skip
        result[f"kind probe {modality}"] = probe["top1"]
    return result | sync_columns(subject, tables[1])


def sync_columns(subject, table):
    """Percent of the clips that are in sync within one step, chance, and the number of clips that are long
    enough for it. Returns no columns if there are none."""
    one_clip = dataclasses.replace(subject.cfg, eval=dataclasses.replace(subject.cfg.eval, clips=1))
    step_s, reach = sync.steps(one_clip)
    grid = sync.Grid(table, one_clip, step_s, reach)
    length_s = np.array(table.end_s) - table.start_s
    long = datasets.take(table, length_s > grid.length_s + reach * step_s + 0.1)
    if not len(long):
        return {}
    found = sync.measure(dataclasses.replace(subject, cfg=one_clip), long)
    return {"sync": found["similarity within one step"], "sync chance": found["chance within one step"],
            "sync clips": found["videos"]}  # fmt: skip


def tables(rows):
    text, by_share = {}, {}
    for share in (0.0, *SHARES):
        by_share[share] = {
            m: runs.select(rows, method=m, faulty=f"{share:g}") for m in ("untrained", *METHODS)
        }
        by_share[share] = {method: selected for method, selected in by_share[share].items() if selected}
    lines = [
        [m, *((selected, column) for column in MEASURES), str(len(selected))]
        for m, selected in by_share[0.0].items()
    ]
    text["own"] = runs.table(["", *MEASURES.values(), "runs"], lines)
    short = [column for column in MEASURES if "→" in column]
    text["own-short"] = runs.table(
        ["100 clips", *(MEASURES[c] for c in short)],
        [[m, *((by_share[0.0].get(m, []), c) for c in short)] for m in SHORT],
    )
    columns = {c: MEASURES[c] for c in MEASURES if c != "sync"} | {"AUROC": "AUROC of the weights"}
    for share in SHARES:
        lines = [
            [m, *((selected, column) for column in columns), str(len(selected))]
            for m, selected in by_share[share].items()
        ]
        text[f"own-{share:g}"] = runs.table([f"{share:.0%} swapped", *columns.values(), "runs"], lines)
    with_tasks = {
        m: selected for m, selected in by_share[0.0].items() if any(selected[0].get(task) for task in TASKS)
    }
    temporal = config.load("small", TWO_CLIPS).temporal
    accuracies = [["chance", *(f"{100 / len(task.classes(temporal)):.0f}" for task in TASKS.values()), ""]]
    accuracies += [
        [m, *((selected, task) for task in TASKS), str(len(selected))] for m, selected in with_tasks.items()
    ]
    text["own-tasks"] = runs.table(
        ["rest of the clips, %", *(t.replace("_", ", ") for t in TASKS), "runs"], accuracies
    )
    return text


def draw(rows, images, folder, arguments):
    shown = {c: f"{head}, %" for c, head in MEASURES.items() if "R@5" not in c}
    shares = {f"{share:g}": f"{share:.0%} swapped" for share in (0.0, *SHARES)}
    yield figures.bars(images / "own.png", rows, ["untrained", *METHODS], shown, ("faulty", shares))


STUDY = runs.Study(
    "own",
    "small",
    BASE,
    plan,
    functools.partial(swapped.measure, feature_quality=feature_quality),
    tables,
    draw,
    prepare=prepare,
    root=manifest,
    world="vggsound, 100 clips",
)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
