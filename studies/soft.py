"""Soft targets: how accurate must the estimate be, and what improves it? On the toy world with 30 % of faulty
pairs.

    python -m studies.soft                       the runs that studies/results/soft.csv lacks, then the
                                                 table and the figure
    python -m studies.soft --only mixed          only the mixtures with the ground truth
    python -m studies.soft --table --figures

mixed: targets that mix the ground truth of the manifest, at a given share, with the cycle's estimate.
changed: the cycle's estimate with one change. "all candidates" makes every memory a candidate; "slower bank"
uses a momentum of 0.9; "τ_s = τ" gives the estimate the temperature of the contrast (τ_s is 0.02 by
default, 15 times lower); "by certainty" gives each instance a share of soft target by the certainty of its
estimate, 1 − entropy / log C over its mean. xid is the baseline without soft targets; "xid, all candidates"
the same with every memory as a negative.
"""

from . import runs

if __name__ == "__main__":
    arguments = runs.command_line(__doc__)

import contextlib
import math
from unittest import mock

import torch

import train
from avid import losses

from . import figures, measures, robust

BASE = (*robust.BASE, *robust.LONGER, *robust.SOFT, "loss.estimator=cycle")
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
BASELINES = {"": (), "xid, all candidates": ("bank.num_negatives=all",)}  # without soft targets
CHANGES = {
    "all candidates": ("bank.num_negatives=all",),
    "slower bank": ("bank.momentum=0.9",),
    "τ_s = τ": ("loss.tau_s=0.3",),
    "by certainty": (),
}
MEASURES = {
    **{c: head for c, head in robust.MEASURES.items() if "probe" in c or "class" in c},
    "cycle same kind": "mass on the right kind",
    "cycle on faulty": "on faulty pairs",
}


def plan(seeds):
    made = []
    for seed in seeds:
        for change, settings in BASELINES.items():
            made.append(runs.Run({"method": "xid", "change": change}, seed, ("loss.soft=0", *settings)))
        made += [
            runs.Run({"method": "mixed", "change": f"{share:g} of the truth"}, seed, ()) for share in SHARES
        ]
        made += [runs.Run({"method": "changed", "change": name}, seed, s) for name, s in CHANGES.items()]
    return made


def measure(run, cfg):
    table, _ = measures.tables(cfg)
    with changed_targets(run, table):
        train.main(cfg)
    network, saved = measures.trained(cfg)
    masses, _ = measures.soft_targets(measures.bank_of(saved, cfg), table, cfg.loss, "cycle")
    return measures.feature_quality(network, cfg) | masses


@contextlib.contextmanager
def changed_targets(run, table):
    """A context in which training uses the mixed targets, or those by certainty, if the run has them."""
    method, change = run.group["method"], run.group["change"]
    estimate = losses.soft_targets
    with contextlib.ExitStack() as patches:
        if method == "mixed" and (share := float(change.partition(" ")[0])):
            patches.enter_context(robust.oracle("soft-oracle", table))
            truth = losses.soft_targets  # of the manifest, by robust.oracle

            def mixed(*arguments):
                pairs = zip(truth(*arguments), estimate(*arguments), strict=True)
                return tuple(share * right + (1 - share) * guess for right, guess in pairs)

            patches.enter_context(mock.patch.object(losses, "soft_targets", mixed))
        elif change == "by certainty":
            patches.enter_context(mock.patch.object(losses, "soft_targets", by_certainty))
        yield


@torch.no_grad()
def by_certainty(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
    """As `losses.soft_targets`, but an uncertain estimate is mixed with the instance's own memory:
    c_i·S_i + (1 − c_i)·own_i, where c_i = (1 − entropy_i / log C) / its mean over the batch, at most 1."""
    both = losses.soft_target_matrices(
        estimator, own_video, own_audio, video[valid].float(), audio[valid].float(), tau_s, tau_t
    )
    targets = []
    for S, memories, own in zip(both, (audio[valid], video[valid]), (own_audio, own_video), strict=True):
        certainty = 1 - torch.special.entr(S).sum(1, keepdim=True) / math.log(S.shape[1])  # B×1
        c = (certainty / certainty.mean().clamp(min=1e-6)).clamp(max=1)
        targets.append(c * (S @ memories.float()) + (1 - c) * own)
    return tuple(targets)


def tables(rows):
    lines = []
    for key in dict.fromkeys((row["method"], row["change"]) for row in sorted(rows, key=order)):
        selected = runs.select(rows, method=key[0], change=key[1])
        name = key[1] or key[0]
        lines.append([name, *((selected, column) for column in MEASURES), str(len(selected))])
    return {"soft": runs.table(["30 % faulty, 48 epochs", *MEASURES.values(), "runs"], lines)}


def order(row):
    return ["xid", "mixed", "changed"].index(row["method"])


def draw(rows, images, folder, arguments):
    """Cross-modal R@1 against the share of the ground truth in the targets."""
    figure, axes = figures.panels(2, 4.0, 3.0)
    for axis, column in zip(axes, ("v→a class R@1", "a→v class R@1"), strict=True):
        for share in SHARES:
            selected = runs.select(rows, method="mixed", change=f"{share:g} of the truth")
            axis.plot([share] * len(selected), [float(row[column]) for row in selected], "k.", markersize=4)
            if selected:
                axis.plot(share, runs.mean_std(selected, column)[0], "C0o")
        axis.set(
            title=f"{robust.MEASURES[column]}, R@1 by kind, %", xlabel="share of the truth in the targets"
        )
        axis.grid(alpha=0.3)
    yield figures.save(figure, images / "soft.png")


STUDY = runs.Study("soft", "toy", BASE, plan, measure, tables, draw)

if __name__ == "__main__":
    runs.main(STUDY, arguments)
