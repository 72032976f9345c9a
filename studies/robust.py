"""Robust-xID on the toy world: do weights find faulty pairs, do soft targets find the kind, and are the features better?

    python -m studies.robust                       all runs that are not in studies/results/robust.csv yet, then tables and figures
    python -m studies.robust --only xid robust     only these methods
    python -m studies.robust --table --figures     tables and figures from what is there

Methods: xid, plain; weighted, weights alone; four estimators of soft targets alone; robust, weights and the cycle's soft targets; oracle,
weights by the manifest, 1 of a true pair and 0 of a faulty one, instead of the weights, or so from the first step on. Each at 0, 30
and 60 % of faulty pairs. Then robust at 30 % with one setting changed at a time.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

from unittest import mock

import numpy as np
import torch

import train

from . import figures, measures

BASE = (
    "toy.train=600 toy.test=300 toy.seconds=4 video.size=32 audio.seconds=1 audio.mels=40 "
    "optim.epochs=24 optim.batch_size=32 log.check_epochs=4 log.every_steps=72 eval.clips=2 loss.warmup_epochs=12"
).split()
WEIGHTS, SOFT = ("loss.w_min=0.25",), ("loss.soft=0.5",)
ROBUST = (*WEIGHTS, *SOFT, "loss.estimator=cycle")
METHODS = {
    "xid": (),
    "weighted": WEIGHTS,
    **{f"soft-{estimator}": (*SOFT, f"loss.estimator={estimator}") for estimator in measures.ESTIMATORS},
    "robust": ROBUST,
}
ORACLES = {"oracle": (), "oracle-from-start": ("loss.warmup_epochs=0",)}  # weights of 0 and 1 from the manifest
FAULTY = (0.0, 0.3, 0.6)
CHANGES = {  # one at a time, of robust at 30 %
    "δ": ("loss.delta", -1, 1),
    "κ": ("loss.kappa", 0.1, 2),
    "w_min": ("loss.w_min", 0, 0.5),
    "λ": ("loss.soft", 0.25, 0.75),
    "τ_s": ("loss.tau_s", 0.05, 0.1),
    "τ_t": ("loss.tau_t", 0.03, 0.3),
    "warm-up, epochs": ("loss.warmup_epochs", 0, 4, 8, 16, 20),
}
MEASURES = {  # of the table: column of the CSV, head
    "kind probe video": "kind by picture, probe",
    "kind probe audio": "kind by sound, probe",
    "kind video R@1": "picture → picture",
    "kind audio R@1": "sound → sound",
    "v→a class R@1": "picture → sound",
    "a→v class R@1": "sound → picture",
    "AUROC": "AUROC of the weights",
}
CURVES = ("v→a class R@1", "a→v class R@1", "agreement_mean", "agreement_std")


def plan(seeds):
    """The comparison of all seeds first, then the changes."""
    made = []
    for seed in seeds:
        made.append(runs.Run(group("untrained", 0.0), seed, ()))
        for faulty in FAULTY:
            methods = METHODS | (ORACLES if faulty else {})
            made += [runs.Run(group(m, faulty), seed, (f"toy.faulty={faulty:g}", *s)) for m, s in methods.items()]
    for seed in seeds:
        for name, (key, *values) in CHANGES.items():
            for value in values:
                settings = ("toy.faulty=0.3", *ROBUST, f"{key}={value:g}")
                made.append(runs.Run(group("robust-changed", 0.3, f"{name} = {value:g}"), seed, settings))
    return made


def group(method, faulty, change=""):
    return {"method": method, "faulty": f"{faulty:g}", "change": change}


def measure(run, cfg):
    """Train, unless the method is `untrained`, and measure."""
    method = run.group["method"]
    if method == "untrained":
        return measures.knowledge(measures.untrained(cfg), cfg)
    table, _ = measures.tables(cfg)
    if method in ORACLES:
        with mock.patch.object(train, "pair_weights", by_manifest(table)):
            train.main(cfg)
    else:
        train.main(cfg)
    network, saved = measures.trained(cfg)
    bank = measures.bank_of(saved, cfg)
    result = measures.knowledge(network, cfg) | measures.pair_judgement(bank, table, cfg.loss)
    for estimator in measures.ESTIMATORS:
        masses, matrix = measures.soft_targets(bank, table, cfg.loss, estimator)
        result |= masses
        if method == "xid":  # one bank, judged by all four
            result[f"matrix {estimator}"] = matrix
    return result | measures.curve(cfg, CURVES)


def by_manifest(table):
    """In place of train.pair_weights: 1 of a true pair, 0 of a faulty one; 1 during the warm-up."""
    true = torch.tensor(np.array(table.columns["faulty"]) == "0").float()  # N
    return lambda index, bank, loss, robust: true[index] if robust else torch.ones(len(index))


def tables(rows):
    main, text = runs.select(rows, change=""), {}
    shares = [f"{faulty:g}" for faulty in FAULTY]
    for faulty in shares:
        lines = []
        for method in ["untrained", *METHODS, *ORACLES]:
            mine = runs.select(main, method=method, faulty="0" if method == "untrained" else faulty)
            if mine:
                lines.append([method, *((mine, column) for column in MEASURES), str(len(mine))])
        if lines:
            text[f"robust-{faulty}"] = runs.table([f"{float(faulty):.0%} faulty", *MEASURES.values(), "runs"], lines)
    judged = {f"{e}, plain xID's bank": (e, "xid") for e in measures.ESTIMATORS}
    judged |= {f"{e}, the bank trained with it": (e, f"soft-{e}") for e in measures.ESTIMATORS}
    head = [
        "mass, %",
        *(f"same kind, {float(f):.0%} faulty" for f in shares),
        *(f"on faulty, {float(f):.0%}" for f in shares[1:]),
    ]
    lines = []
    for name, (e, method) in judged.items():
        mine = [runs.select(main, method=method, faulty=f) for f in shares]
        lines.append([name, *((m, f"{e} same kind") for m in mine), *((m, f"{e} on faulty") for m in mine[1:])])
    text["robust-targets"] = runs.table(head, lines)
    same_seeds = {row["seed"] for row in runs.select(rows, method="robust-changed")}
    as_it_is = [row for row in runs.select(main, method="robust", faulty="0.3") if row["seed"] in same_seeds]
    changed = {change: runs.select(rows, change=change) for change in dict.fromkeys(row["change"] for row in rows) if change}
    lines = [
        [change, *((mine, column) for column in MEASURES), str(len(mine))]
        for change, mine in {"robust, as it is": as_it_is, **changed}.items()
    ]
    if changed:
        text["robust-changes"] = runs.table(["30 % faulty", *MEASURES.values(), "runs"], lines)
    return text


def draw(rows, images, folder, arguments):
    main, methods = runs.select(rows, change=""), [*METHODS, *ORACLES]
    shares = [f"{faulty:g}" for faulty in FAULTY]
    shown = {c: f"{head}, %" for c, head in MEASURES.items() if "probe" in c or "class" in c}
    yield figures.bars(images / "robust.png", main, methods, shown, ("faulty", shares))
    curves = {"v→a class R@1": "picture → sound, R@1 by kind, %", "a→v class R@1": "sound → picture, R@1 by kind, %"}
    yield figures.bands(images / "robust-curves.png", runs.select(main, faulty="0.3"), methods, curves)
    yield figures.weights(images / "robust-weights.png", main, ("xid", "weighted", "robust"), shares[1:])
    yield figures.soft_targets(images / "robust-targets.png", runs.select(main, method="xid"), shares)
    yield from figures.pictures(STUDY, ("xid", "robust"), images, folder, arguments, faulty="0.3")


STUDY = runs.Study("robust", "toy", BASE, plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
