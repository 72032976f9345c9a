"""Synchronisation and localisation on the toy world: is a sound recognised as in sync with its picture, and
does the heat map for a sound lie on the thing that makes it?

    python -m studies.moments                       the runs that studies/results/moments.csv lacks, then
                                                    tables and the figure
    python -m studies.moments --only toy            only this method
    python -m studies.moments --table --figures     tables and the figure from the CSV

The methods are the packaged configurations toy (plain xID) and toy_temporal (with the temporal tasks), and an
untrained network with the settings of each. The measures are those of eval_retrieval.py --task sync and of
--task where, on the held-out videos.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

import numpy as np

import train
from avid.tools import sync, where

from . import figures, measures

METHODS = {  # the packaged configuration of each
    "untrained, as toy": "toy",
    "toy": "toy",
    "untrained, as toy_temporal": "toy_temporal",
    "toy_temporal": "toy_temporal",
}
WAYS = ("similarity", "order_cross")
ACCURACIES = ("within one step", "exact")
PLACES = {"brightest on the thing": "of the maps", "cells on the thing": "of random cells"}
COVERED = "covered by the thing"


def plan(seeds):
    return [runs.Run({"method": method}, seed, (), cfg) for seed in seeds for method, cfg in METHODS.items()]


def measure(run, cfg):
    """Train, unless the method is untrained, and measure."""
    if run.group["method"].startswith("untrained"):
        subject = measures.subject(measures.untrained(cfg), cfg, trained=False)
    else:
        train.main(cfg)
        subject = measures.subject(measures.trained(cfg)[0], cfg)
    table = measures.tables(cfg)[1]
    places, _ = where.measure(subject, table)
    return sync.measure(subject, table) | places


def measured_ways(rows):
    """Yield (method, way to score a shift, rows) for all that was measured."""
    for method in METHODS:
        selected = runs.select(rows, method=method)
        for way in WAYS:
            if selected and selected[0].get(f"{way} exact"):
                yield method, way, selected


def tables(rows):
    near, exact = (f"{float(rows[0][f'chance {how}']):.1f}" for how in ACCURACIES)
    lines = [["chance", near, near, exact, exact, ""]]
    for method, way, selected in measured_ways(rows):
        columns = [f"{way}{of} {how}" for how in ACCURACIES for of in ("", " control")]
        lines.append([f"{method}, {way}", *((selected, column) for column in columns), str(len(selected))])
    head = ["shift preferred, %", "within one step", "the same, control", "none", "the same, control", "runs"]
    by_method = {method: runs.select(rows, method=method) for method in METHODS}
    localisation = [
        [method, *((selected, f"{column} %") for column in (*PLACES, COVERED)), str(len(selected))]
        for method, selected in by_method.items()
        if selected
    ]
    on_thing = ["on the thing, %", *PLACES.values(), "of the picture", "runs"]
    return {"moments-sync": runs.table(head, lines), "moments-where": runs.table(on_thing, localisation)}


def draw(rows, images, folder, arguments):
    """The score of each shift of the sound: mean and deviation over seeds, the control in grey."""
    found = list(measured_ways(rows))
    figure, axes = figures.panels(len(found), 3.2, 2.8)
    for axis, (method, way, selected) in zip(axes, found, strict=True):
        for name, colour, label in ((way, "C0", "own sound"), (f"{way} control", "grey", "another video's")):
            curves = np.array([runs.numbers(row, f"{name} by shift") for row in selected])  # seeds×shifts
            x, mean = runs.numbers(selected[0], "shifts_s"), curves.mean(0)
            deviation = curves.std(0, ddof=1) if len(curves) > 1 else 0
            axis.plot(x, mean, color=colour, label=label, linewidth=1.3)
            axis.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(f"{method}\n{sync.LABELS[way]}", fontsize=9)
        axis.set_xlabel("delay of the sound, s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figures.legend(figure)
    yield figures.save(figure, images / "moments.png")


STUDY = runs.Study("moments", "toy", (), plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
