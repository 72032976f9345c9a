"""Fingerprinting: does a distorted copy of a real clip find its original? The second paper's evaluation, on
the clips of studies.own.

    python -m studies.fingerprint --videos DIR     the runs that studies/results/fingerprint.csv lacks,
                                                   then the table and the curves; DIR as of studies.own
    python -m studies.fingerprint --table --figures

The networks are those of studies.own, whose checkpoints must be below --runs. Queries and gallery are the
last part of each clip, which training did not see. There are 13 distortions at 3 strengths; copies are found
by picture, by sound, and by both together.
"""

from . import own, runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=own.VIDEOS_HELP)

import dataclasses
from pathlib import Path

import numpy as np

from avid import config, data
from avid.tools import fingerprint

from . import figures, measures

METHODS = ("untrained", "xid", "temporal", "both")
QUERIES = {"video": "picture", "audio": "sound", "joint": "both"}


def plan(seeds):
    return [
        run
        for run in own.plan(seeds)
        if run.group == own.group(run.group["method"], 0) and run.group["method"] in METHODS
    ]


def measure(run, cfg):
    """R@1 of the copies, with the checkpoint of the same run of studies.own."""
    out = Path(cfg.out)
    if run.group["method"] == "untrained":
        subject = measures.subject(measures.untrained(cfg), cfg, trained=False)
    else:
        there = out.parents[1] / own.STUDY.name / out.name
        if not (there / "last.pt").exists():
            config.stop(f"no checkpoint in {there}; run first: python -m studies.own")
        their_cfg = config.load(str(there / "config.yaml"), [f"out={there}"])
        network, _ = measures.trained(their_cfg)
        subject = dataclasses.replace(measures.subject(network, their_cfg), cfg=cfg, out=out)
    found = fingerprint.measure(subject, measures.tables(cfg)[1], data.MODALITIES, (1, 5))
    return {key: value for key, value in found.items() if "class" not in key}


def curves():
    """{(query, distortion): strengths}, without the distortions that leave the query's modality unchanged."""
    kinds = fingerprint.PROTOCOL
    return {
        (query, name): kind.strengths
        for query in QUERIES
        for name, kind in kinds.items()
        if query == "joint" or kind.modality in (query, "both")
    }


def tables(rows):
    """Means over strengths: one row per distortion, one column per method and query."""
    by_method = {m: selected for m in METHODS if (selected := runs.select(rows, method=m))}
    head = [f"{m}, by {word}" for word in QUERIES.values() for m in by_method]
    lines = []
    for name, kind in fingerprint.PROTOCOL.items():
        line = [name]
        for query in QUERIES:
            for selected in by_method.values():
                measured = (query, name) in curves()
                line.append(
                    (mean_over_strengths(selected, query, name, kind.strengths), "R@1") if measured else ""
                )
        lines.append(line)
    return {"fingerprint": runs.table(["R@1, mean over strengths", *head], lines)}


def mean_over_strengths(rows, query, name, strengths):
    """Rows whose column R@1 is the mean over the strengths of a distortion."""
    return [
        {"R@1": str(np.mean([float(row[f"{name} {s:g} {query} instance R@1"]) for s in strengths]))}
        for row in rows
    ]


def draw(rows, images, folder, arguments):
    """R@1 against strength, by picture and sound together: one panel per distortion, one curve per method."""
    names = [name for query, name in curves() if query == "joint"]
    figure, axes = figures.panels(len(names), 2.6, 2.2)
    for axis, name in zip(axes, names, strict=True):
        strengths = fingerprint.PROTOCOL[name].strengths
        for method in METHODS:
            selected = runs.select(rows, method=method)
            found = [runs.mean_std(selected, f"{name} {s:g} joint instance R@1") for s in strengths]
            if selected:
                axis.plot(range(len(strengths)), [mean for mean, _ in found], ".-", label=method)
        axis.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths], fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_ylim(0, 105)
        axis.grid(alpha=0.3)
    figures.legend(figure)
    yield figures.save(figure, images / "fingerprint.png")


STUDY = own.STUDY._replace(name="fingerprint", plan=plan, measure=measure, tables=tables, figures=draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
