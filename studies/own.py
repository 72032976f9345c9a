"""A folder of real videos that searches itself: 100 clips in the wild, trained on the beginning of each and
searched by the rest; and the same with 30 and 60 % of the training sounds swapped.

    python -m studies.own --videos DIR               all runs that are not in studies/results/own.csv yet,
                                                     then the tables and the figure; DIR holds own.csv
                                                     and manifest.csv
    python -m studies.own --videos DIR --seeds 0 --only xid robust
    python -m studies.own --table --figures          tables and the figure from what is there

All runs are `--cfg small`. Methods: xid, plain; weighted, weights alone; soft, soft targets alone; robust,
both; oracle, weights by the truth; temporal, all tasks and contrasts; both, temporal with robust in place of
its contrast across; xid-15 and xid-50, xid for as many epochs in place of 150. Those with two clips a video
pass half as often over the videos: as many clips, the same time.
"""

from . import runs

HOLDS = "folder with own.csv (path,label,split,start,end), manifest.csv (path,label,split) and their clips"

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=HOLDS)

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
TWO = (  # clips a video
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
    "temporal": (*TWO, "weights.xid=0", "weights.contrast_va=1", "weights.contrast_av=1"),
    "both": (*TWO, *robust.ROBUST, f"loss.warmup_epochs={EPOCHS // 4}"),
    **SHORTER,
}
WHOLE = ("untrained", "xid", "weighted", "robust", "temporal", "both")  # without swapped sounds
DOUBTING = ("xid", "robust", "weighted", "soft", "oracle", *SHORTER)  # with them
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
    """Seed by seed, the whole sounds first, then the smaller share of swapped ones."""
    made = [runs.Run(group(m, 0.0), seed, METHODS.get(m, ())) for seed in seeds for m in WHOLE]
    for share in SHARES:
        made += [runs.Run(group(m, share), seed, METHODS[m]) for seed in seeds for m in DOUBTING]
    return made


def group(method, faulty):
    return {"method": method, "faulty": f"{faulty:g}"}


def manifest(run, arguments):
    """The manifest that a run trains on, below --root."""
    if not arguments.videos:
        config.stop(f"--videos DIR is missing: {HOLDS}")
    return (
        swapped.folder_of(arguments.root, of_videos(arguments), float(run.group["faulty"]), run.seed)
        / swapped.NAME
    )


def of_videos(arguments):
    return Path(arguments.videos) / "own.csv"


def prepare(tasks, arguments):
    """Write what `manifest` names."""
    for _, run, *_ in tasks:
        swapped.write(arguments.root, of_videos(arguments), float(run.group["faulty"]), run.seed)


def knowledge(subject):
    """What is found from the rest of each clip: its own other half, and its beginning by the same modality;
    the kind by a probe, of files that the probe has not seen; and whether it is in sync. Percent."""
    cfg = subject.cfg
    tables = [swapped.originals(table) for table in measures.tables(cfg)]
    begin, rest = (
        evaluation.extract(subject.network, data.Clips(table, cfg, training=False), subject.device)
        for table in tables
    )
    result = evaluation.cross_modal(rest, tables[1].labels[rest.index], ks=(1, 5))
    files = [np.array(table.paths)[part.index] for table, part in zip(tables, (begin, rest), strict=True)]
    parts = [
        np.array(table.columns["part"])[part.index] for table, part in zip(tables, (begin, rest), strict=True)
    ]
    for modality in data.MODALITIES:
        query, key = (part.video_level("features", modality) for part in (rest, begin))
        found = evaluation.nearest(query, key, 5)
        same = evaluation.recall(found, lambda q, f: files[1][q] == files[0][f], (1, 5))
        result |= {f"{modality} instance {k}": value for k, value in same.items()}
        known, new = parts[0] == "train", parts[1] == "test"
        probe = evaluation.linear_probe(
            begin.features[modality][known], tables[0].labels[begin.index][known],
            rest.features[modality][new], tables[1].labels[rest.index][new], cfg.seed,
        )  # fmt: skip
        result[f"kind probe {modality}"] = probe["top1"]
    return result | in_sync(subject, tables[1])


def in_sync(subject, table):
    """How many of the clips that are long enough prefer no shift of their sound, within a step, and how many
    there are; nothing where none is."""
    one = dataclasses.replace(subject.cfg, eval=dataclasses.replace(subject.cfg.eval, clips=1))
    step_s, reach = sync.steps(one)
    grid = sync.Grid(table, one, step_s, reach)
    length_s = np.array(table.end_s) - table.start_s
    long = datasets.take(table, length_s > grid.length_s + reach * step_s + 0.1)
    if not len(long):
        return {}
    found = sync.measure(dataclasses.replace(subject, cfg=one), long)
    return {"sync": found["similarity within one step"], "sync chance": found["chance within one step"],
            "sync clips": found["videos"]}  # fmt: skip


def tables(rows):
    text, of = {}, {}
    for share in (0.0, *SHARES):
        of[share] = {m: runs.select(rows, method=m, faulty=f"{share:g}") for m in ("untrained", *METHODS)}
        of[share] = {method: mine for method, mine in of[share].items() if mine}
    lines = [[m, *((mine, column) for column in MEASURES), str(len(mine))] for m, mine in of[0.0].items()]
    text["own"] = runs.table(["", *MEASURES.values(), "runs"], lines)
    short = [column for column in MEASURES if "→" in column]
    text["own-short"] = runs.table(
        ["100 clips", *(MEASURES[c] for c in short)],
        [[m, *((mine, c) for c in short)] for m, mine in of[0.0].items()],
    )
    columns = {c: MEASURES[c] for c in MEASURES if c != "sync"} | {"AUROC": "AUROC of the weights"}
    for share in SHARES:
        lines = [
            [m, *((mine, column) for column in columns), str(len(mine))] for m, mine in of[share].items()
        ]
        text[f"own-{share:g}"] = runs.table([f"{share:.0%} swapped", *columns.values(), "runs"], lines)
    told = {m: mine for m, mine in of[0.0].items() if any(mine[0].get(task) for task in TASKS)}
    temporal = config.load("small", TWO).temporal
    answers = [["chance", *(f"{100 / len(task.classes(temporal)):.0f}" for task in TASKS.values()), ""]]
    answers += [[m, *((mine, task) for task in TASKS), str(len(mine))] for m, mine in told.items()]
    text["own-tasks"] = runs.table(
        ["rest of the clips, %", *(t.replace("_", ", ") for t in TASKS), "runs"], answers
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
    functools.partial(swapped.measure, knowledge=knowledge),
    tables,
    draw,
    prepare=prepare,
    root=manifest,
    world="vggsound, 100 clips",
)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
