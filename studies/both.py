"""Both papers at once beside each alone, on the toy world with 30 % of faulty pairs.

    python -m studies.both                       the runs that studies/results/both.csv lacks, then tables and
                                                 figures
    python -m studies.both --table --figures     tables and figures from the CSV

All methods take two clips of each video and the same number of steps. The clips of xid and robust are played
forwards at normal speed; those of temporal and robust_temporal at random speeds and directions. temporal has
all temporal tasks and all contrasts; robust_temporal has Robust-xID in place of the cross-modal contrast.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

from avid.temporal_tasks import TASKS

from . import figures, robust, temporal

BASE = (  # twice as long as studies.temporal: soft targets need it, see studies.robust
    *temporal.BASE,
    *"toy.faulty=0.3 bank.num_negatives=512 loss.temperature=0.3".split(),
    *"optim.epochs=40 loss.warmup_epochs=20".split(),
)  # fmt: skip
NO_TEMPORAL = (
    "weights.xid=1", *(f"weights.{name}=0" for name in (*temporal.CONTRASTS, *TASKS)),
    "temporal.speeds=[1]", "temporal.reverse=false",
)  # fmt: skip
SHORT = ("kind probe video", "motion probe video", "v→a class R@1", "a→v class R@1")  # of README.md's table
METHODS = {
    "xid": NO_TEMPORAL,
    "robust": (*NO_TEMPORAL, *robust.ROBUST),
    "temporal": (),
    "robust_temporal": ("weights.xid=1", "weights.contrast_va=0", "weights.contrast_av=0", *robust.ROBUST),
}


def plan(seeds):
    return [
        runs.Run({"method": method}, seed, METHODS.get(method, ()))
        for seed in seeds
        for method in ["untrained", *METHODS]
    ]


def tables(rows):
    by_method = {method: runs.select(rows, method=method) for method in ["untrained", *METHODS]}
    lines = [
        [m, *((selected, column) for column in temporal.MEASURES), str(len(selected))]
        for m, selected in by_method.items()
        if selected
    ]
    accuracies = [
        [m, *((by_method[m], task) for task in TASKS)]
        for m in ("temporal", "robust_temporal")
        if by_method[m]
    ]
    short = [[m, *((selected, column) for column in SHORT)] for m, selected in by_method.items() if selected]
    return {
        "both": runs.table(["30 % faulty", *temporal.MEASURES.values(), "runs"], lines),
        "both-short": runs.table(["30 % faulty", *(temporal.MEASURES[column] for column in SHORT)], short),
        "both-tasks": runs.table(["held-out, %", *(task.replace("_", ", ") for task in TASKS)], accuracies),
    }


def draw(rows, images, folder, arguments):
    shown = {
        column: f"{head}, %"
        for column, head in temporal.MEASURES.items()
        if "probe" in column or "→" in column
    }
    yield figures.bars(images / "both.png", rows, ["untrained", *METHODS], shown)
    yield from figures.pictures(STUDY, tuple(METHODS), images, folder, arguments)


STUDY = runs.Study("both", "toy_temporal", BASE, plan, temporal.measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
