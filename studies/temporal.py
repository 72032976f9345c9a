"""Temporal self-supervision on the toy world: what do the tasks of speed, direction and order add to the
contrast?

    python -m studies.temporal                      the runs that studies/results/temporal.csv lacks, then
                                                    tables and figures
    python -m studies.temporal --only contrast all  only these methods
    python -m studies.temporal --table --figures    tables and figures from the CSV

Methods: contrast, without a task, clips played forwards at normal speed; contrast-same-clips, without a task,
clips at random speeds and directions; the contrast with one kind of task (speed, direction, order-within
modalities, order-across modalities); all. Variants of contrast and all: positives only from the same video
(no-positives), hard negatives (hard), twice as many epochs (40-epochs). Variants of all: one modality alone
(video-alone, sound-alone), and contrasts with a quarter of a task's weight (all-quarter).
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

import train
from avid import config
from avid.temporal_tasks import TASKS

from . import figures, measures

CONTRASTS = ("contrast_vv", "contrast_aa", "contrast_va", "contrast_av")
BASE = (
    *"toy.train=600 toy.test=300 toy.seconds=4 temporal.speeds=[1,2,4] video.size=32 audio.mels=40".split(),
    *"optim.epochs=20 optim.batch_size=16 log.check_epochs=5 log.check_videos=100".split(),
    *"log.every_steps=74 eval.clips=3".split(),
    *(f"weights.{name}=1" for name in CONTRASTS),  # as in temporal.yaml
)
NO_POSITIVES = ("contrast.n_pos=0", "contrast.k_pos=0")
HARD = ("contrast.tau_n=0.1",)


def contrast_with(*kinds, modality=""):
    """Settings of the contrast with these kinds of task (speed, direction, order, or a single task); with
    `modality`, only the terms within it."""
    tasks = [task for task in TASKS if task.partition("_")[0] in kinds or task in kinds]
    if modality:
        tasks = [task for task in tasks if task.endswith(modality)]
    contrasts = [f"contrast_{modality[0] * 2}"] if modality else CONTRASTS
    off = [f"weights.{name}=0" for name in (*CONTRASTS, *TASKS) if name not in (*contrasts, *tasks)]
    speeds = [] if "speed" in kinds else ["temporal.speeds=[1]"]
    return (*off, *speeds, f"temporal.reverse={str('direction' in kinds).lower()}")


ALL = ("speed", "direction", "order")
METHODS = {
    "contrast": contrast_with(),
    "contrast-same-clips": tuple(f"weights.{task}=0" for task in TASKS),
    "speed": contrast_with("speed"),
    "direction": contrast_with("direction"),
    "order-within": contrast_with("order_video", "order_audio"),
    "order-across": contrast_with("order_cross"),
    "all": contrast_with(*ALL),
    "contrast-no-positives": (*contrast_with(), *NO_POSITIVES),
    "contrast-hard": (*contrast_with(), *HARD),
    "all-no-positives": (*contrast_with(*ALL), *NO_POSITIVES),
    "all-hard": (*contrast_with(*ALL), *HARD),
    "all-hard-no-positives": (*contrast_with(*ALL), *HARD, *NO_POSITIVES),
    "video-alone": contrast_with(*ALL, modality="video"),
    "sound-alone": contrast_with(*ALL, modality="audio"),
    "contrast-40-epochs": (*contrast_with(), "optim.epochs=40"),
    "all-40-epochs": (*contrast_with(*ALL), "optim.epochs=40"),
    "all-quarter": (
        *contrast_with(*ALL),
        *(f"weights.{name}=0.25" for name in CONTRASTS),
    ),  # as in toy_temporal.yaml
}
MEASURES = {  # of the table: column of the CSV, head
    "kind probe video": "kind by picture, probe",
    "kind probe audio": "kind by sound, probe",
    "motion probe video": "motion by picture, probe",
    "motion probe audio": "motion by sound, probe",
    "kind video R@1": "picture → picture",
    "kind audio R@1": "sound → sound",
    "v→a class R@1": "picture → sound",
    "a→v class R@1": "sound → picture",
}


def plan(seeds):
    return [
        runs.Run({"method": method}, seed, METHODS.get(method, ()))
        for seed in seeds
        for method in ["untrained", *METHODS]
    ]


def measure(run, cfg):
    """Train, unless the method is `untrained`, and measure."""
    if run.group["method"] == "untrained":
        return measures.feature_quality(measures.untrained(cfg), cfg, ("label", "motion"))
    train.main(cfg)
    network, _ = measures.trained(cfg)
    accuracies = measures.task_accuracies(network, cfg) if network.temporal.heads else {}
    names = ["v→a class R@1", *(f"held-out {task} %" for task in accuracies)]
    return (
        measures.feature_quality(network, cfg, ("label", "motion")) | accuracies | measures.curve(cfg, names)
    )


def tables(rows):
    by_method = {method: runs.select(rows, method=method) for method in ["untrained", *METHODS]}
    by_method = {method: selected for method, selected in by_method.items() if selected}
    lines = [
        [method, *((selected, column) for column in MEASURES), str(len(selected))]
        for method, selected in by_method.items()
    ]
    with_tasks = {
        method: selected
        for method, selected in by_method.items()
        if any(selected[0].get(task) for task in TASKS)
    }
    temporal = config.load("toy_temporal", BASE).temporal
    accuracies = [["chance", *(f"{100 / len(task.classes(temporal)):.0f}" for task in TASKS.values()), ""]]
    accuracies += [
        [method, *((selected, task) for task in TASKS), str(len(selected))]
        for method, selected in with_tasks.items()
    ]
    return {
        "temporal": runs.table(["", *MEASURES.values(), "runs"], lines),
        "temporal-tasks": runs.table(
            ["held-out, %", *(task.replace("_", ", ") for task in TASKS), "runs"], accuracies
        ),
    }


def draw(rows, images, folder, arguments):
    shown = {column: f"{head}, %" for column, head in MEASURES.items() if "probe" in column}
    yield figures.bars(images / "temporal.png", rows, ["untrained", *METHODS], shown)
    shown_methods = ["contrast", *(m for m in METHODS if "order" in m or m in ("speed", "direction", "all"))]
    shown_methods += [m for m in METHODS if m.endswith(("no-positives", "40-epochs"))]
    yield figures.bands(
        images / "temporal-curves.png",
        rows,
        shown_methods,
        {"v→a class R@1": "picture → sound, R@1 by kind, %"},
    )
    tasks = {f"held-out {task} %": f"{task.replace('_', ', ')}, held-out %" for task in TASKS}
    with_tasks = [method for method in METHODS if not method.startswith("contrast")]
    yield figures.bands(images / "temporal-tasks.png", rows, with_tasks, tasks)
    yield from figures.pictures(STUDY, ("contrast", "all"), images, folder, arguments)


STUDY = runs.Study("temporal", "toy_temporal", BASE, plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
