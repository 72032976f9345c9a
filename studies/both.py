"""Both papers at once beside each alone, on the toy world with 30 % of faulty pairs.

    python -m studies.both                       all runs that are not in studies/results/both.csv yet, then
                                                 tables and figures
    python -m studies.both --table --figures     tables and figures from what is there

All see two clips of each video in the same number of steps: xid and robust at their own speed, forwards;
temporal (all tasks and the contrast of clips) and robust_temporal (robust in place of the contrast across) at
drawn speeds and directions.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

from avid.temporal_tasks import TASKS

from . import figures, robust, temporal

BASE = (  # twice as long as temporal: soft targets need it, see robust
    *temporal.BASE,
    *"toy.faulty=0.3 bank.num_negatives=512 loss.temperature=0.3".split(),
    *"optim.epochs=40 loss.warmup_epochs=20".split(),
)  # fmt: skip
ALONE = (
    "weights.xid=1", *(f"weights.{name}=0" for name in (*temporal.CONTRASTS, *TASKS)),
    "temporal.speeds=[1]", "temporal.reverse=false",
)  # fmt: skip
SHORT = ("kind probe video", "motion probe video", "v→a class R@1", "a→v class R@1")  # of README.md's table
METHODS = {
    "xid": ALONE,
    "robust": (*ALONE, *robust.ROBUST),
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
        [m, *((mine, column) for column in temporal.MEASURES), str(len(mine))]
        for m, mine in by_method.items()
        if mine
    ]
    answers = [
        [m, *((by_method[m], task) for task in TASKS)]
        for m in ("temporal", "robust_temporal")
        if by_method[m]
    ]
    short = [[m, *((mine, column) for column in SHORT)] for m, mine in by_method.items() if mine]
    return {
        "both": runs.table(["30 % faulty", *temporal.MEASURES.values(), "runs"], lines),
        "both-short": runs.table(["30 % faulty", *(temporal.MEASURES[column] for column in SHORT)], short),
        "both-tasks": runs.table(["held-out, %", *(task.replace("_", ", ") for task in TASKS)], answers),
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
