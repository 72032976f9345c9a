"""Does a distorted copy of a real clip find its original? The second paper's evaluation, on the clips of
`own`.

    python -m studies.fingerprint --videos DIR     all that is not in studies/results/fingerprint.csv yet,
                                                   then the table and the curves; DIR as of studies.own
    python -m studies.fingerprint --table --figures

Asks the checkpoints of studies.own, below --runs, about the rest of each clip, which they have not seen.
Copies of each of 13 distortions at 3 strengths, by picture, by sound and by both.
"""

from . import own, runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__, videos=own.HOLDS)

import dataclasses
from pathlib import Path

import numpy as np

from avid import config, data
from avid.tools import fingerprint

from . import figures, measures

METHODS = ("untrained", "xid", "temporal", "both")
BY = {"video": "picture", "audio": "sound", "joint": "both"}


def plan(seeds):
    return [
        run
        for run in own.plan(seeds)
        if run.group == own.group(run.group["method"], 0) and run.group["method"] in METHODS
    ]


def measure(run, cfg):
    """R@1 of the copies, by the checkpoint of the same run of studies.own."""
    out = Path(cfg.out)
    if run.group["method"] == "untrained":
        subject = measures.subject(measures.untrained(cfg), cfg, trained=False)
    else:
        there = out.parents[1] / own.STUDY.name / out.name
        if not (there / "last.pt").exists():
            config.stop(f"no checkpoint in {there}; run first: python -m studies.own")
        theirs = config.load(str(there / "config.yaml"), [f"out={there}"])
        network, _ = measures.trained(theirs)
        subject = dataclasses.replace(measures.subject(network, theirs), cfg=cfg, out=out)
    found = fingerprint.measure(subject, measures.tables(cfg)[1], data.MODALITIES, (1, 5))
    return {key: value for key, value in found.items() if "class" not in key}


def curves():
    """{(what, distortion): its strengths}: those that change what is asked by."""
    kinds = fingerprint.PROTOCOL
    return {
        (what, name): kind.strengths
        for what in BY
        for name, kind in kinds.items()
        if what == "joint" or kind.modality in (what, "both")
    }


def tables(rows):
    """The mean over strengths: a row a distortion, a column a method and what is asked by."""
    by_method = {m: mine for m in METHODS if (mine := runs.select(rows, method=m))}
    head = [f"{m}, by {word}" for word in BY.values() for m in by_method]
    lines = []
    for name, kind in fingerprint.PROTOCOL.items():
        line = [name]
        for what in BY:
            for mine in by_method.values():
                asked = (what, name) in curves()
                line.append((means(mine, what, name, kind.strengths), "R@1") if asked else "")
        lines.append(line)
    return {"fingerprint": runs.table(["R@1, mean over strengths", *head], lines)}


def means(rows, what, name, strengths):
    """Rows with the mean over strengths as their column R@1."""
    return [
        {"R@1": str(np.mean([float(row[f"{name} {s:g} {what} instance R@1"]) for s in strengths]))}
        for row in rows
    ]


def draw(rows, images, folder, arguments):
    """R@1 against strength, a panel a distortion, a line a method, by both together."""
    names = [name for what, name in curves() if what == "joint"]
    figure, axes = figures.panels(len(names), 2.6, 2.2)
    for axis, name in zip(axes, names, strict=True):
        strengths = fingerprint.PROTOCOL[name].strengths
        for method in METHODS:
            mine = runs.select(rows, method=method)
            found = [runs.mean_std(mine, f"{name} {s:g} joint instance R@1") for s in strengths]
            if mine:
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
