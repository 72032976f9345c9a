"""What the objective and the memory bank cost, and what storing the bank in half precision changes.

    python benchmarks/criterion.py [--parts objective all update neighbourhood dtype] [--instances 232067]
        [--repeats 30] [--json FILE]

objective      forward, backward and the bank's update, K negatives: shared by the batch, as avid does, and
               gathered per sample (B×K×D memories a modality), as AVID-CMA's public code does; plain xID, and
               robust: weights and cycle soft targets, also by losses.robust_xid_by_matrices
all            the robust objective against all instances of the bank, and the memory that it takes beside the
               bank
update         the bank's update at several numbers of instances
neighbourhood  positives and negatives of 64 instances from the bank (docs/method.md section 7), negatives
               uniform and harder
dtype          the loss, its gradient and the agreement after some hundred updates, float32 against half
               precision

The ways of one part take turns. Milliseconds are medians over rounds; a ratio is computed in each round.
Memories and embeddings are random.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli, config

PARTS = ("objective", "all", "update", "neighbourhood", "dtype")


def command_line():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument(
        "--instances", type=int, default=232_067, help="N, videos in the bank (default: 232067)"
    )
    parser.add_argument("--negatives", type=int, default=1024, help="K (default: 1024)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="default: 64 256")
    parser.add_argument("--repeats", type=int, default=30, help="rounds that count (default: 30)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the bank"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the figures, a file a part: FILE.json becomes FILE.objective.json, …",
    )
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import math

import numpy as np
import report
import torch
from torch.nn import functional as F

from avid import losses, memory_bank

D = 128
LOSS = config.Loss(w_min=0.25, soft=0.5)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def unit(n, seed):
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)), dim=1).to(DEVICE)


class Step:
    """A step on a batch of B instances: the objective and the bank's update."""

    def __init__(self, bank, batch, negatives):
        self.bank, self.negatives = bank, negatives
        self.index = torch.randperm(bank.num_instances, generator=torch.Generator().manual_seed(1))[
            :batch
        ].to(DEVICE)
        self.video, self.audio = unit(batch, 2).requires_grad_(), unit(batch, 3).requires_grad_()
        self.seed = 0

    def run(self, objective, robust):
        self.seed += 1
        self.video.grad = self.audio.grad = None
        loss = objective(self, robust)  # B
        s = self.bank.read("agreement", self.index)
        w_min = LOSS.w_min if robust else 1.0
        weight = losses.faulty_positive_weights(
            s, *self.bank.agreement_mean_std(), w_min, LOSS.delta, LOSS.kappa
        )
        losses.weighted_mean(loss, weight).backward()
        self.bank.update(self.index, self.video.detach(), self.audio.detach())


def shared(step, robust, robust_xid=losses.robust_xid):
    """avid's own way, as train.Objective.robust_xid."""
    c = step.bank.candidates(step.index, step.negatives, step.seed)
    video, audio = step.bank.read("video", c.index), step.bank.read("audio", c.index)
    return robust_xid(
        step.video, step.audio, video, audio, c.valid, c.column, temperature=LOSS.temperature,
        soft=LOSS.soft if robust else 0.0, estimator="cycle", tau_s=LOSS.tau_s, tau_t=LOSS.tau_t,
    )  # fmt: skip


def matrices(step, robust):
    """The same candidates by the equations as they stand."""
    return shared(step, robust, losses.robust_xid_by_matrices)


def gathered(step, robust):
    """The plain way: K negatives for each sample, their memories gathered, and the equations as they
    stand."""
    bank, index = step.bank, step.index
    generator = torch.Generator().manual_seed(step.seed)
    drawn = torch.randint(bank.num_instances, (len(index), step.negatives), generator=generator).to(DEVICE)
    among = torch.cat([index[:, None], drawn], 1)  # B×(1+K)
    video, audio = bank.video[among].float(), bank.audio[among].float()  # B×(1+K)×D
    loss = 0.0
    for x, own, keys, others in (
        # x, what it steps from in a cycle, keys, where that step leads
        (step.video, audio[:, 0], audio, video),
        (step.audio, video[:, 0], video, audio),
    ):
        log_p = F.log_softmax(torch.einsum("bd,bkd->bk", x, keys) / LOSS.temperature, 1)  # B×(1+K)
        if not robust:
            loss = loss - log_p[:, 0]
            continue
        last = (video * audio).sum(2) / LOSS.tau_t  # B×(1+K)
        target = LOSS.soft * F.softmax(torch.einsum("bd,bkd->bk", own, others) / LOSS.tau_s + last, 1)
        target[:, 0] += 1 - LOSS.soft
        loss = loss - (target * log_p).sum(1)
    return loss


def objective(bank, arguments):
    for batch in arguments.batches:
        step = Step(bank, batch, arguments.negatives)
        ways = {
            "gathered, plain": lambda s=step: s.run(gathered, False),
            "shared, plain": lambda s=step: s.run(shared, False),
            "gathered, robust": lambda s=step: s.run(gathered, True),
            "shared, robust": lambda s=step: s.run(shared, True),
            "matrices, robust": lambda s=step: s.run(matrices, True),
        }
        ms = report.in_turns(ways, arguments.repeats)
        for name in ways:
            ratios = {
                f"÷ {other}": float(np.median(ms[name] / ms[other]))
                for other in ("gathered, plain", "gathered, robust")
            }
            yield {"what": name, "batch": batch, "ms": float(np.median(ms[name])), **ratios}


def everything(bank, arguments):
    for batch in arguments.batches:
        step = Step(bank, batch, "all")
        step.run(shared, True)
        before = report.memory_gb()
        step.run(shared, True)
        memory = 1e3 * (report.peak_gb() - before)
        ms = report.in_turns(
            {"all": lambda s=step: s.run(shared, True)}, max(arguments.repeats // 10, 1), warm_up=0
        )["all"]
        yield {"what": "robust, all negatives", "batch": batch, "ms": float(np.median(ms)), "peak MB": memory}


def update(_, arguments):
    sizes = sorted({10_000, 100_000, arguments.instances, 1_000_000})
    banks = {n: memory_bank.MemoryBank(n, D, 0.5, 0, arguments.dtype).to(DEVICE) for n in sizes}
    for batch in arguments.batches:
        steps = {n: Step(bank, batch, arguments.negatives) for n, bank in banks.items()}
        ways = {
            n: lambda s=s: s.bank.update(s.index, s.video.detach(), s.audio.detach())
            for n, s in steps.items()
        }
        ms = report.in_turns(ways, 5 * arguments.repeats)
        for n in sizes:
            yield {"what": f"N = {n:,}", "batch": batch, "ms": float(np.median(ms[n]))}


def neighbourhood(bank, arguments):
    index = torch.randperm(bank.num_instances)[:64].to(DEVICE)
    for name, tau_n in (("uniform negatives", math.inf), ("negatives by exp(sim/0.5)", 0.5)):
        contrast = config.Contrast(negatives=arguments.negatives, tau_n=tau_n)

        def draw(contrast=contrast):
            bank.neighbourhood("video", index, contrast, range(64))

        ms = report.in_turns({name: draw}, max(arguments.repeats // 5, 1), warm_up=1)[name]
        before = report.memory_gb()
        draw()
        memory = 1e3 * (report.peak_gb() - before)
        yield {"what": name, "batch": 64, "ms": float(np.median(ms)), "peak MB": memory}


def dtype(_, arguments):
    """Banks of 10,000 instances, updated 400 times with the same embeddings near the same random means,
    momentum 0.5."""
    n, batch, names = 10_000, 256, ("float32", "float16", "bfloat16")
    means = unit(n, 4), F.normalize(unit(n, 4) + unit(n, 5), dim=1)  # picture and sound agree at 0.7
    banks = {name: memory_bank.MemoryBank(n, D, 0.5, 0, name).to(DEVICE) for name in names}
    generator = torch.Generator().manual_seed(6)
    for step in range(400):
        index = torch.randint(n, (batch,), generator=generator).to(DEVICE)
        video, audio = (F.normalize(x[index] + 0.5 * unit(batch, 10 + 2 * step + k), dim=1)
                        for k, x in enumerate(means))  # fmt: skip
        for bank in banks.values():
            bank.update(index, video, audio)
    found = {}
    for name, bank in banks.items():
        step = Step(bank, batch, arguments.negatives)
        step.video, step.audio = (x[step.index].clone().requires_grad_() for x in means)
        step.seed = 7
        loss = shared(step, True)
        (gradient,) = torch.autograd.grad(loss.mean(), step.video)
        found[name] = loss.detach(), gradient, bank.agreement, *bank.agreement_mean_std()
    whole = found["float32"]
    for name in names[1:]:
        loss, gradient, agreement, mean, std = found[name]
        yield {
            "what": name,
            "batch": batch,
            "mean loss": loss.mean().item(),
            "Δ mean loss": (loss.mean() - whole[0].mean()).item(),
            "largest Δ of a loss": (loss - whole[0]).abs().max().item(),
            "Δ gradient, relative": ((gradient - whole[1]).norm() / whole[1].norm()).item(),
            "largest Δ of an agreement": (agreement - whole[2]).abs().max().item(),
            "Δ μ": (mean - whole[3]).item(),
            "Δ σ": (std - whole[4]).item(),
        }


def main(arguments):
    bank = memory_bank.MemoryBank(arguments.instances, D, 0.5, 0, arguments.dtype).to(DEVICE)
    for part, work in zip(PARTS, (objective, everything, update, neighbourhood, dtype), strict=True):
        if part in arguments.parts:
            bank = f"bank of {arguments.instances:,}×{D} {arguments.dtype}"
            title = f"{part}: {bank}, {arguments.negatives} negatives"
            path = arguments.json and Path(arguments.json).with_suffix(f".{part}.json")  # one file a part
            report.show(title, list(work(bank, arguments)), path)
            print()


if __name__ == "__main__":
    main(arguments)
