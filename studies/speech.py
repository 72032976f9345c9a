"""Lips and speech, on 1,000 sentences of one talker of the GRID corpus.

    python -m studies.speech --videos DIR          the runs that studies/results/speech.csv lacks, then
                                                   the tables and the figure; DIR holds manifest.csv
    python -m studies.speech --videos DIR --only intervals --seeds 0
    python -m studies.speech --table --figures

Frames are whole and without jitter, but in timewise-crops, whose random crops keep 70 to 100 % of the frame.
Methods whose networks take the largest value over time: xid, plain xID on whole sentences; intervals,
xID where an instance is a quarter of a sentence, hardly longer than a clip, so that other moments of the same
sentence are negatives; contrast, on sentences, with the clips themselves as positives in place of memories;
tasks, all temporal tasks without a contrast. With networks that keep time (model.video=timewise):
timewise-xid, as intervals; timewise, as contrast; timewise-tasks, the contrast and all temporal tasks. Then
timewise-xid, timewise-robust and timewise-oracle with 30 % of the training sounds swapped.
"""

from . import runs

VIDEOS_HELP = "folder with manifest.csv (path,label,split and the six words) and its clips"

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=VIDEOS_HELP)

import dataclasses
import functools
from pathlib import Path

import numpy as np

from avid import config, data, evaluation
from avid.temporal_tasks import TASKS
from avid.tools import sync

from . import figures, measures, robust, swapped

WORDS = ("command", "colour", "preposition", "letter", "digit", "adverb")
BASE = (
    "data.name=manifest video.frames=16 video.fps=25 video.size=48 video.crop_area=[1,1] "
    "video.crop_ratio=[1,1] video.jitter=[0,0,0,0] audio.seconds=0.64 audio.mels=64 audio.rate_hz=16000 "
    "optim.epochs=40 optim.batch_size=128 optim.lr=1e-3 log.check_epochs=0 eval.clips=4 "
    "bank.num_negatives=1024"
).split()
TEMPORAL_TASKS = (
    "temporal.moments=2", "optim.epochs=20", "temporal.speeds=[1,2]", "temporal.reverse=true",
    *(f"weights.{task}=1" for task in TASKS),
)  # fmt: skip
INTERVAL_S, LENGTH_S = 0.72, 2.88  # of an instance; of the part of a sentence that is cut into instances
IN_INTERVALS = ("optim.epochs=10",)  # of four instances a sentence: as many clips as the others
CONTRAST = (
    "weights.xid=0", "weights.contrast_va=1", "weights.contrast_av=1",
    "contrast.temperature=0.1", "contrast.n_pos=0", "contrast.k_pos=0", "contrast.negatives=64",
    "contrast.batch=true",
)  # fmt: skip
CROPS = ("video.crop_area=[0.7,1]", "video.crop_ratio=[0.9,1.11]")
TIMEWISE = ("model.video=timewise", "model.audio=timewise", "model.depth=2")
STEP_S, LONGEST_S = 0.08, 0.8  # of sync: two frames, and the largest shift
METHODS = {
    "xid": (),
    "intervals": IN_INTERVALS,
    "contrast": CONTRAST,
    "tasks": (*TEMPORAL_TASKS, "weights.xid=0"),
    "timewise-xid": (*TIMEWISE, *IN_INTERVALS),
    "timewise": (*TIMEWISE, *CONTRAST),
    "timewise-crops": (*TIMEWISE, *CONTRAST, *CROPS),
    "timewise-tasks": (*TIMEWISE, *CONTRAST, *TEMPORAL_TASKS),
    "timewise-robust": (*TIMEWISE, *IN_INTERVALS, *robust.ROBUST, "loss.warmup_epochs=4"),
    "timewise-oracle": (*TIMEWISE, *IN_INTERVALS, "loss.warmup_epochs=4"),
}
INTERVALS = ("intervals", "timewise-xid", "timewise-robust", "timewise-oracle")  # an instance is a part
METHODS_UNSWAPPED = (
    "untrained", "timewise", "timewise-xid", "contrast", "xid", "intervals", "timewise-tasks", "tasks",
    "timewise-crops",
)  # fmt: skip
METHODS_SWAPPED = ("timewise-xid", "timewise-robust", "timewise-oracle")
SHARE = 0.3
MEASURES = {
    "v→a instance R@1": "lips → speech, R@1",
    "v→a instance R@5": "R@5",
    "a→v instance R@1": "speech → lips, R@1",
    "a→v instance R@5": "R@5",
    "sync": "in sync, within two frames",
    **{f"{word} probe video": f"{word} by lips, probe" for word in WORDS},
    **{f"{word} probe audio": f"{word} by sound, probe" for word in WORDS},
}


def plan(seeds):
    made = [runs.Run(group(m, 0.0), seed, METHODS.get(m, ())) for seed in seeds for m in METHODS_UNSWAPPED]
    return made + [runs.Run(group(m, SHARE), seed, METHODS[m]) for seed in seeds for m in METHODS_SWAPPED]


def group(method, faulty):
    return {"method": method, "faulty": f"{faulty:g}"}


def manifest(run, arguments):
    """The path of the manifest that a run trains on, below --root."""
    if not arguments.videos:
        config.stop(f"--videos DIR is missing: {VIDEOS_HELP}")
    source = Path(arguments.videos) / swapped.NAME
    folder = swapped.folder_of(arguments.root, source, float(run.group["faulty"]), run.seed)
    return folder / ("intervals.csv" if run.group["method"] in INTERVALS else swapped.NAME)


def prepare(tasks, arguments):
    """Write the manifests and the clips of all runs."""
    for _, run, *_ in tasks:
        source = Path(arguments.videos) / swapped.NAME
        written = swapped.write(arguments.root, source, float(run.group["faulty"]), run.seed)
        write_intervals(written, written.with_name("intervals.csv"))


def write_intervals(source, path):
    """Write the manifest with every training sentence cut into consecutive instances of INTERVAL_S."""
    rows = []
    for row in runs.read(source):
        starts = np.arange(0, LENGTH_S - INTERVAL_S / 2, INTERVAL_S) if row["split"] == "train" else [None]
        for start_s in starts:
            ends = {"start": "", "end": ""}
            if start_s is not None:
                ends = {"start": f"{start_s:.2f}", "end": f"{start_s + INTERVAL_S:.2f}"}
            rows.append(row | ends)
    swapped.write_manifest(path, rows)


def feature_quality(subject):
    """Measures of held-out sentences, percent: cross-modal retrieval, a linear probe of each word, sync."""
    cfg = subject.cfg
    whole = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, root=str(Path(cfg.data.root).with_name(swapped.NAME)))
    )
    tables = [swapped.originals(table) for table in measures.tables(whole)]
    known, new = (
        evaluation.extract(subject.network, data.Clips(table, cfg, training=False), subject.device)
        for table in tables
    )
    result = evaluation.cross_modal(new, tables[1].labels[new.index], ks=(1, 5))
    for word in WORDS:
        words = (np.array(t.columns[word])[part.index] for t, part in zip(tables, (known, new), strict=True))
        y, new_y = measures.numbered(*words)
        for modality in data.MODALITIES:  # the mean over a sentence: the times of the words are unknown
            x, new_x = (part.video_level("features", modality)[:, None] for part in (known, new))
            result[f"{word} probe {modality}"] = evaluation.linear_probe(x, y, new_x, new_y, cfg.seed)["top1"]
    found = sync.measure(subject, tables[1], STEP_S, LONGEST_S)
    ways = {"sync": "similarity", "sync by order": "order_cross"}
    result |= {name: found[f"{way} within one step"] for name, way in ways.items() if f"{way} exact" in found}
    return result | {"sync chance": found["chance within one step"]}


def tables(rows):
    finds = {column: head for column, head in MEASURES.items() if "probe" not in column}
    words = {column: head.removesuffix(", probe") for column, head in MEASURES.items() if "probe" in column}
    return {
        "speech-0": of_methods(rows, 0.0, finds),
        f"speech-{SHARE:g}": of_methods(rows, SHARE, finds | {"AUROC": "AUROC of the weights"}),
        "speech-words": of_methods(rows, 0.0, words),
    }


def of_methods(rows, share, columns):
    """A table of the runs with this share of swapped sounds, a line a method."""
    lines = [
        [m, *((selected, column) for column in columns), str(len(selected))]
        for m in ("untrained", *METHODS)
        if (selected := runs.select(rows, method=m, faulty=f"{share:g}"))
    ]
    return runs.table([f"{share:.0%} swapped", *columns.values(), "runs"], lines)


def draw(rows, images, folder, arguments):
    shown = {c: f"{head}, %" for c, head in MEASURES.items() if "R@5" not in c}
    yield figures.bars(images / "speech.png", runs.select(rows, faulty="0"), ["untrained", *METHODS], shown)


STUDY = runs.Study(
    name="speech",
    cfg="small",
    base=tuple(BASE),
    plan=plan,
    measure=functools.partial(swapped.measure, feature_quality=feature_quality),
    tables=tables,
    figures=draw,
    prepare=prepare,
    root=manifest,
    world="GRID, talker s1, 1,000 sentences",
)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
