"""Robust-xID on the toy world: do the weights detect faulty pairs, do the soft targets find the right kind,
and do the features improve?

    python -m studies.robust                       the runs that studies/results/robust.csv lacks, then
                                                   tables and figures
    python -m studies.robust --only xid robust     only these methods
    python -m studies.robust --seeds 3 4 --only "48 epochs"     two more seeds of the longer runs
    python -m studies.robust --table --figures     tables and figures from the CSV

Methods: xid, plain xID; weighted, with weights; soft-*, with the soft targets of one of four estimators;
robust, with weights and the cycle's soft targets. Upper bounds by the ground truth: oracle, weights of 1 for
true and 0 for faulty pairs; oracle-from-start, the same without a warm-up; soft-oracle, soft targets by kind.
All train for 24 epochs with 0, 30 and 60 % of faulty pairs, and most also for 48 epochs with 30 %. Then xid,
soft-cycle and robust at a lower temperature, and robust for 48 epochs with one setting changed at a time
(robust-changed).
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
}  # which use the ground truth
FAULTY = (0.0, 0.3, 0.6)
LONG, LONGER = "48 epochs", ("toy.faulty=0.3", "optim.epochs=48", "loss.warmup_epochs=24")
LOW_TEMPERATURE = "τ = 0.1"
CHANGES = {  # one setting at a time, in robust with 30 % of faulty pairs, 48 epochs
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
    """First the runs of 48 epochs, then those of 24, then the changed settings; each seed by seed."""
    made = []
    for seed in seeds:
        for m, s in (METHODS | {m: ORACLES[m] for m in ("soft-oracle", "oracle")}).items():
            made.append(runs.Run(group(m, 0.3, LONG), seed, (*LONGER, *s)))
    for seed in seeds:
        for m in ("xid", "soft-cycle", "robust"):
            made.append(
                runs.Run(
                    group(m, 0.3, LOW_TEMPERATURE),
                    seed,
                    ("toy.faulty=0.3", *METHODS[m], "loss.temperature=0.1"),
                )
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
        return measures.feature_quality(measures.untrained(cfg), cfg)
    table, _ = measures.tables(cfg)
    with oracle(method, table):
        train.main(cfg)
    network, saved = measures.trained(cfg)
    bank = measures.bank_of(saved, cfg)
    result = measures.feature_quality(network, cfg) | measures.weight_statistics(bank, table, cfg.loss)
    for estimator in measures.ESTIMATORS:
        masses, matrix = measures.soft_targets(bank, table, cfg.loss, estimator)
        result |= masses
        if method == "xid":  # all four estimators on the same bank
            result[f"matrix {estimator}"] = matrix
    return result | measures.curve(cfg, CURVES)


@contextlib.contextmanager
def oracle(method, table):
    """A context in which training uses the ground truth of the manifest in place of the estimated weights
    (oracle) or soft targets (soft-oracle); other methods train as usual."""
    seen, heard = map(torch.from_numpy, measures.kinds(table))  # N
    draw, drawn = memory_bank.MemoryBank.candidates, []

    def candidates(bank, *arguments):
        drawn[:] = [draw(bank, *arguments)]
        return drawn[0]

    def soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
        """S_v is uniform over the sounds of the picture's kind, S_a over the pictures of the sound's kind;
        if there are none, the target is the instance itself."""
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
            patches.enter_context(oracle_weights(table))
        yield


def oracle_weights(table):
    """A context in which true pairs weigh 1 and faulty ones 0, by the manifest; all 1 in the warm-up."""
    true = torch.tensor(np.array(table.columns["faulty"]) == "0").float()  # N

    def pair_weights(index, bank, loss, robust):
        return true[index] if robust else torch.ones(len(index))

    return mock.patch.object(train, "pair_weights", pair_weights)


def tables(rows):
    main, text = runs.select(rows, change=""), {}
    shares = [f"{faulty:g}" for faulty in FAULTY]
    untrained = runs.select(main, method="untrained")

    def compare(name, head, lines):
        seeds = {row["seed"] for selected in lines.values() for row in selected}
        lines = {"untrained": [row for row in untrained if row["seed"] in seeds]} | lines
        cells = [
            [method, *((selected, column) for column in MEASURES), str(len(selected))]
            for method, selected in lines.items()
            if selected
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
        [m, *((difference(selected, long["xid"]), column) for column in MEASURES)]
        for m, selected in long.items()
        if selected and m != "xid"
    ]
    text["robust-gains"] = runs.table([f"30% faulty, {LONG}, over plain xID", *MEASURES.values()], gains)
    compare(
        "robust-cold",
        f"30% faulty, {LOW_TEMPERATURE}",
        {m: runs.select(rows, method=m, change=LOW_TEMPERATURE) for m in methods},
    )
    if changed := one_at_a_time(rows):
        compare("robust-changed", f"30% faulty, {LONG}", changed)
    estimates = {f"{e}, plain xID's bank": (e, "xid") for e in measures.ESTIMATORS}
    estimates |= {f"{e}, the bank trained with it": (e, f"soft-{e}") for e in measures.ESTIMATORS}
    head = [
        "mass, %",
        *(f"same kind, {float(f):.0%} faulty" for f in shares),
        f"same kind, 30% faulty, {LONG}",
        *(f"on faulty, {float(f):.0%}" for f in shares[1:]),
        f"on faulty, 30%, {LONG}",
    ]
    lines = []
    for name, (e, method) in estimates.items():
        selected = [*(runs.select(main, method=method, faulty=f) for f in shares), long[method]]
        lines.append(
            [name, *((m, f"{e} same kind") for m in selected), *((m, f"{e} on faulty") for m in selected[1:])]
        )
    text["robust-targets"] = runs.table(head, lines)
    return text


def difference(rows, baseline):
    """Each row minus the baseline's row of the same seed, by column of MEASURES; other seeds are left out."""
    by_seed = {row["seed"]: row for row in baseline}
    pairs = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    return [
        {column: str(float(row[column]) - float(other[column])) for column in MEASURES}
        for row, other in pairs
    ]


def one_at_a_time(rows):
    """{change: its rows}, preceded by robust unchanged with the same seeds; empty if there are no such runs
    yet."""
    changed = runs.select(rows, method="robust-changed")
    seeds = {row["seed"] for row in changed}
    unchanged = [row for row in runs.select(rows, method="robust", change=LONG) if row["seed"] in seeds]
    changes = dict.fromkeys(row["change"] for row in changed)
    return (
        {"robust, as it is": unchanged} | {c: runs.select(changed, change=c) for c in changes}
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
    at_30 = runs.select(rows, faulty="0.3")
    lengths = {"": "24 epochs", LONG: LONG}
    yield figures.bars(images / "robust-long.png", at_30, methods, shown, ("change", lengths))
    curves = {
        "v→a class R@1": "picture → sound, R@1 by kind, %",
        "a→v class R@1": "sound → picture, R@1 by kind, %",
    }
    yield figures.bands(images / "robust-curves.png", runs.select(at_30, change=LONG), methods, curves)
    groups = {f"{float(f):.0%} faulty": runs.select(main, faulty=f) for f in shares} | {
        f"30% faulty, {LONG}": runs.select(rows, change=LONG)
    }
    faulty = {title: selected for title, selected in groups.items() if not title.startswith("0%")}
    yield figures.weights(images / "robust-weights.png", faulty, ("xid", "weighted", "robust"))
    xid = {title: runs.select(selected, method="xid") for title, selected in groups.items()}
    yield figures.soft_targets(images / "robust-targets.png", xid)
    if changed := one_at_a_time(rows):
        named = [row | {"method": change} for change, selected in changed.items() for row in selected]
        yield figures.bars(images / "robust-changed.png", named, list(changed), shown)
    yield from figures.pictures(
        STUDY, ("xid", "robust"), images, folder, arguments, faulty="0.3", change=LONG
    )


STUDY = runs.Study("robust", "toy", tuple(BASE), plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
