"""Robust-xID on the toy world: do weights find faulty pairs, do soft targets find the kind, and are the
features better?

    python -m studies.robust                       all runs that are not in studies/results/robust.csv yet,
                                                   then tables and figures
    python -m studies.robust --only xid robust     only these methods
    python -m studies.robust --seeds 3 4 --only "48 epochs"     two more seeds of what trains longer
    python -m studies.robust --table --figures     tables and figures from what is there

Methods: xid, plain; weighted, weights alone; four estimators of soft targets alone; robust, weights and the
cycle's soft targets; oracle, weights by the manifest, 1 of a true pair and 0 of a faulty one, or so from the
first step on; soft-oracle, soft targets by the manifest. All train for 24 epochs at 0, 30 and 60 % of faulty
pairs, and for 48 epochs at 30 %. Then xid, soft-cycle and robust at a lower temperature, and robust of 48
epochs with one setting changed at a time (robust-changed).
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

import contextlib
from unittest import mock

import numpy as np
import torch

import train
from avid import losses, memory_bank

from . import figures, measures

BASE = (
    "toy.train=600 toy.test=300 toy.seconds=4 video.size=32 audio.seconds=1 audio.mels=40 optim.epochs=24 "
    "optim.batch_size=32 log.check_epochs=4 log.every_steps=72 eval.clips=2 loss.warmup_epochs=12"
).split()
WEIGHTS, SOFT = ("loss.w_min=0.25",), ("loss.soft=0.5",)
ROBUST = (*WEIGHTS, *SOFT, "loss.estimator=cycle")
METHODS = {
    "xid": (),
    "weighted": WEIGHTS,
    **{f"soft-{estimator}": (*SOFT, f"loss.estimator={estimator}") for estimator in measures.ESTIMATORS},
    "robust": ROBUST,
}
ORACLES = {
    "soft-oracle": SOFT,
    "oracle": (),
    "oracle-from-start": ("loss.warmup_epochs=0",),
}  # told by the manifest
FAULTY = (0.0, 0.3, 0.6)
LONG, LONGER = "48 epochs", ("toy.faulty=0.3", "optim.epochs=48", "loss.warmup_epochs=24")
COLD = "τ = 0.1"
CHANGES = {  # one at a time, of robust at 30 %, 48 epochs
    "δ": ("loss.delta", -1, 1),
    "κ": ("loss.kappa", 0.1, 2),
    "w_min": ("loss.w_min", 0, 0.5),
    "λ": ("loss.soft", 0.25, 0.75),
    "τ_s": ("loss.tau_s", 0.05, 0.1),
    "τ_t": ("loss.tau_t", 0.03, 0.3),
    "warm-up, epochs": ("loss.warmup_epochs", 0, 12, 36),
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
    """Every seed's runs of 48 epochs first, then those of 24, then the changes."""
    made = []
    for seed in seeds:
        for m, s in (METHODS | {m: ORACLES[m] for m in ("soft-oracle", "oracle")}).items():
            made.append(runs.Run(group(m, 0.3, LONG), seed, (*LONGER, *s)))
    for seed in seeds:
        for m in ("xid", "soft-cycle", "robust"):
            made.append(
                runs.Run(group(m, 0.3, COLD), seed, ("toy.faulty=0.3", *METHODS[m], "loss.temperature=0.1"))
            )
        made.append(runs.Run(group("untrained", 0.0), seed, ()))
        for faulty in FAULTY:
            methods = METHODS | {m: s for m, s in ORACLES.items() if faulty or m == "soft-oracle"}
            made += [
                runs.Run(group(m, faulty), seed, (f"toy.faulty={faulty:g}", *s)) for m, s in methods.items()
            ]
    for seed in seeds:
        for name, (key, *values) in CHANGES.items():
            for value in values:
                changed = group("robust-changed", 0.3, f"{name} = {value:g}")
                made.append(runs.Run(changed, seed, (*LONGER, *ROBUST, f"{key}={value:g}")))
    return made


def group(method, faulty, change=""):
    return {"method": method, "faulty": f"{faulty:g}", "change": change}


def measure(run, cfg):
    """Train, unless the method is `untrained`, and measure."""
    method = run.group["method"]
    if method == "untrained":
        return measures.knowledge(measures.untrained(cfg), cfg)
    table, _ = measures.tables(cfg)
    with told(method, table):
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


@contextlib.contextmanager
def told(method, table):
    """While it lasts, the manifest is in place of what an oracle's training would estimate: of the weights,
    or of soft targets."""
    seen, heard = map(torch.from_numpy, measures.kinds(table))  # N
    draw, drawn = memory_bank.MemoryBank.candidates, []

    def candidates(bank, *arguments):
        drawn[:] = [draw(bank, *arguments)]
        return drawn[0]

    def soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
        """S_v the same for all sounds of the kind that is seen, S_a for all pictures of the kind that is
        heard; where there is none, the own."""
        index, column, own = (
            drawn[0].index,
            drawn[0].column,
            torch.nn.functional.one_hot(drawn[0].column, len(valid)).bool(),
        )
        S_v = (seen[index[column], None] == heard[index]) & valid  # B×C
        S_a = (heard[index[column], None] == seen[index]) & valid
        S_v, S_a = (torch.where(S.any(1, keepdim=True), S, own).float() for S in (S_v, S_a))
        return (S_v / S_v.sum(1, keepdim=True)) @ audio, (S_a / S_a.sum(1, keepdim=True)) @ video

    with contextlib.ExitStack() as patches:
        if method == "soft-oracle":
            patches.enter_context(mock.patch.object(memory_bank.MemoryBank, "candidates", candidates))
            patches.enter_context(mock.patch.object(losses, "soft_targets", soft_targets))
        elif method in ORACLES:
            patches.enter_context(weighed(table))
        yield


def weighed(table):
    """While it lasts, a pair weighs 1 if it is true by the manifest, 0 if faulty; 1 in the warm-up."""
    true = torch.tensor(np.array(table.columns["faulty"]) == "0").float()  # N

    def pair_weights(index, bank, loss, robust):
        return true[index] if robust else torch.ones(len(index))

    return mock.patch.object(train, "pair_weights", pair_weights)


def tables(rows):
    main, text = runs.select(rows, change=""), {}
    shares = [f"{faulty:g}" for faulty in FAULTY]
    untrained = runs.select(main, method="untrained")

    def compare(name, head, lines):
        seeds = {row["seed"] for mine in lines.values() for row in mine}
        lines = {"untrained": [row for row in untrained if row["seed"] in seeds]} | lines
        cells = [
            [what, *((mine, column) for column in MEASURES), str(len(mine))]
            for what, mine in lines.items()
            if mine
        ]
        text[name] = runs.table([head, *MEASURES.values(), "runs"], cells)

    methods = [*METHODS, *ORACLES]
    for faulty in shares:
        compare(
            f"robust-{faulty}",
            f"{float(faulty):.0%} faulty",
            {m: runs.select(main, method=m, faulty=faulty) for m in methods},
        )
    long = {m: runs.select(rows, method=m, change=LONG) for m in methods}
    compare("robust-long", f"30% faulty, {LONG}", long)
    gains = [
        [m, *((over(mine, long["xid"]), column) for column in MEASURES)]
        for m, mine in long.items()
        if mine and m != "xid"
    ]
    text["robust-gains"] = runs.table([f"30% faulty, {LONG}, over plain xID", *MEASURES.values()], gains)
    compare(
        "robust-cold", f"30% faulty, {COLD}", {m: runs.select(rows, method=m, change=COLD) for m in methods}
    )
    if changed := one_at_a_time(rows):
        compare("robust-changed", f"30% faulty, {LONG}", changed)
    judged = {f"{e}, plain xID's bank": (e, "xid") for e in measures.ESTIMATORS}
    judged |= {f"{e}, the bank trained with it": (e, f"soft-{e}") for e in measures.ESTIMATORS}
    head = [
        "mass, %",
        *(f"same kind, {float(f):.0%} faulty" for f in shares),
        f"same kind, 30% faulty, {LONG}",
        *(f"on faulty, {float(f):.0%}" for f in shares[1:]),
        f"on faulty, 30%, {LONG}",
    ]
    lines = []
    for name, (e, method) in judged.items():
        mine = [*(runs.select(main, method=method, faulty=f) for f in shares), long[method]]
        lines.append(
            [name, *((m, f"{e} same kind") for m in mine), *((m, f"{e} on faulty") for m in mine[1:])]
        )
    text["robust-targets"] = runs.table(head, lines)
    return text


def over(rows, others):
    """What each row has more than the row of the same seed among `others`, by column of MEASURES: rows."""
    by_seed = {row["seed"]: row for row in others}
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    return [
        {column: str(float(row[column]) - float(other[column])) for column in MEASURES}
        for row, other in pairs
    ]


def one_at_a_time(rows):
    """{a change: its rows}, before them robust as it is, of the same seeds; empty where nothing was changed
    yet."""
    changed = runs.select(rows, method="robust-changed")
    seeds = {row["seed"] for row in changed}
    as_it_is = [row for row in runs.select(rows, method="robust", change=LONG) if row["seed"] in seeds]
    changes = dict.fromkeys(row["change"] for row in changed)
    return (
        {"robust, as it is": as_it_is} | {c: runs.select(changed, change=c) for c in changes}
        if changed
        else {}
    )


def draw(rows, images, folder, arguments):
    main, methods = runs.select(rows, change=""), [*METHODS, *ORACLES]
    shares = [f"{faulty:g}" for faulty in FAULTY]
    shown = {c: f"{head}, %" for c, head in MEASURES.items() if "probe" in c or "class" in c}
    yield figures.bars(
        images / "robust.png", main, methods, shown, ("faulty", {f: f"{float(f):.0%} faulty" for f in shares})
    )
    some = runs.select(rows, faulty="0.3")
    lengths = {"": "24 epochs", LONG: LONG}
    yield figures.bars(images / "robust-long.png", some, methods, shown, ("change", lengths))
    curves = {
        "v→a class R@1": "picture → sound, R@1 by kind, %",
        "a→v class R@1": "sound → picture, R@1 by kind, %",
    }
    yield figures.bands(images / "robust-curves.png", runs.select(some, change=LONG), methods, curves)
    groups = {f"{float(f):.0%} faulty": runs.select(main, faulty=f) for f in shares} | {
        f"30% faulty, {LONG}": runs.select(rows, change=LONG)
    }
    faulty = {title: mine for title, mine in groups.items() if not title.startswith("0%")}
    yield figures.weights(images / "robust-weights.png", faulty, ("xid", "weighted", "robust"))
    xid = {title: runs.select(mine, method="xid") for title, mine in groups.items()}
    yield figures.soft_targets(images / "robust-targets.png", xid)
    if changed := one_at_a_time(rows):
        named = [row | {"method": change} for change, mine in changed.items() for row in mine]
        yield figures.bars(images / "robust-changed.png", named, list(changed), shown)
    yield from figures.pictures(
        STUDY, ("xid", "robust"), images, folder, arguments, faulty="0.3", change=LONG
    )


STUDY = runs.Study("robust", "toy", tuple(BASE), plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
