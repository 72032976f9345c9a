"""How the recipe of `--cfg small` was found: a search on the training parts of 100 real clips alone.

    python -m studies.recipe --videos DIR      the runs that studies/results/recipe.csv lacks, then the table;
                                               DIR holds own.csv and its clips
    python -m studies.recipe --table

The part of each clip that studies.own trains on is cut once more: training sees its first 60 %, the rest of
it asks. The part that studies.own asks about is not used. All runs are `--cfg small`, for 80 epochs, with the
change that is their name.
"""

from . import runs

VIDEOS_HELP = "folder with own.csv (path,label,split,start,end) and its clips"

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=VIDEOS_HELP)

from pathlib import Path

import train
from avid import config, data, evaluation

from . import figures, measures, own, swapped

BASE = ("data.name=manifest", "optim.epochs=80", "log.check_epochs=0")
SHARE = 0.6  # of a training part that is trained on here
METHODS = {  # each starts from `small`: 4 frames at 4 fps, τ = 0.1, batches of 32
    "small": (),
    "8 frames at 8 fps": ("video.frames=8", "video.fps=8"),
    "8 frames at 8 fps, τ = 0.3": ("video.frames=8", "video.fps=8", "loss.temperature=0.3"),
    "τ = 0.3": ("loss.temperature=0.3",),
    "τ = 0.15": ("loss.temperature=0.15",),
    "τ = 0.07": ("loss.temperature=0.07",),
    "batches of 16": ("optim.batch_size=16",),
    "masked sound": ("audio.mask_time=0.2", "audio.mask_frequency=0.2"),
}
MEASURES = {column: head for column, head in own.MEASURES.items() if "→" in column}


def plan(seeds):
    return [runs.Run({"method": m}, seed, settings) for seed in seeds for m, settings in METHODS.items()]


def manifest(run, arguments):
    """The path of the manifest of all runs, below --root."""
    if not arguments.videos:
        config.stop(f"--videos DIR is missing: {VIDEOS_HELP}")
    return Path(arguments.root) / f"{Path(arguments.videos).name}-recipe" / swapped.NAME


def prepare(tasks, arguments):
    """Write the manifest: each training part of own.csv in two parts, beside links to the clips."""
    path = manifest(None, arguments)
    rows = []
    for row in runs.read(own.clip_list(arguments)):
        if row["split"] == "train":
            start_s, end_s = float(row["start"]), float(row["end"])
            cut_s = start_s + SHARE * (end_s - start_s)
            rows.append(row | {"end": f"{cut_s:.2f}"})
            rows.append(row | {"split": "test", "start": f"{cut_s:.2f}"})
    if not rows:
        config.stop(f"no list with clips: {own.clip_list(arguments)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    swapped.link(rows, arguments.videos, path.parent)
    swapped.write_manifest(path, rows)


def measure(run, cfg):
    """R@1 and R@5 of the rests across modalities, percent."""
    train.main(cfg)
    network, _ = measures.trained(cfg)
    _, rest = measures.tables(cfg)
    device = next(network.parameters()).device
    found = evaluation.extract(network, data.Clips(rest, cfg, training=False), device)
    return evaluation.cross_modal(found, rest.labels[found.index], ks=(1, 5))


def tables(rows):
    lines = []
    for method in METHODS:
        if selected := runs.select(rows, method=method):
            lines.append(
                [method, *((selected, column) for column in (*MEASURES, "cpu_s")), str(len(selected))]
            )
    head = ["80 epochs", *MEASURES.values(), "processor, s", "runs"]
    return {"recipe": runs.table(head, lines)}


def draw(rows, images, folder, arguments):
    shown = {column: f"{head}, %" for column, head in MEASURES.items() if "R@5" not in column}
    yield figures.bars(images / "recipe.png", rows, METHODS, shown)


STUDY = runs.Study(
    "recipe", "small", BASE, plan, measure, tables, draw, prepare=prepare, root=manifest,
    world="vggsound, training parts of 100 clips",
)  # fmt: skip

if __name__ == "__main__":
    runs.main(STUDY, arguments)
