"""Robust-xID, which doubts its positives and its negatives, docs/method.md 1-5; contrast of clips, 7.

In: live embeddings of a batch, memories of its own instances, of candidates or neighbours: plain tensors.
Out: a loss a row, a weight a row, and their mean. B rows of the batch, C candidates, D dimensions.

The first half is the equations of docs/method.md, under the same numbers.
The second half computes (4c) without a B×C matrix. Training always uses it, also where the matrices would be
small: it is faster there too (benchmarks/criterion.py), and no threshold decides the bits of a run.
"""

import math

import torch
from torch.nn import functional as F

FLAT = 1e-4  # a standard deviation of the agreement below this is rounding [C]
NOTHING = -1e9  # the exponent of what is left out: finite, so that gradients are where all are left out
PIECE = 8192  # candidates at a time: B×8192 similarities are the most that is held


# ---------------------------------------------------------------------------------------------- the equations


def log_probabilities(x, memories, temperature):
    """log P(m_j | x_i), P(m_j | x_i) = exp(x_i·m_j / τ) / Σ_k exp(x_i·m_k / τ), (1b) [P].

    x B×D, live; memories of the candidates C×D, each instance once -> B×C, of the type that is given.
    """
    return F.log_softmax(x @ memories.T / temperature, 1)


@torch.no_grad()
def faulty_positive_weights(agreement, mean, std, w_min, delta, kappa):
    """w_i = w_min + (1 − w_min) · Φ((s_i − (μ + δσ)) / (√κ·σ)), (3a) [F].

    agreement s_i = v̄_i·ā_i B, mean μ and std σ over the whole bank (0-dim tensors) -> B, in w_min..1.
    As σ → 0 (a collapsed bank) no s_i differs from μ: every weight is w_min + (1 − w_min) · Φ(−δ/√κ).
    """
    score = torch.where(std > FLAT, (agreement - mean) / std.clamp(min=FLAT), 0.0)  # B
    return w_min + (1 - w_min) * torch.special.ndtr((score - delta) / math.sqrt(kappa))


@torch.no_grad()
def soft_target_matrices(estimator, v_i, a_i, v_j, a_j, tau_s, tau_t):
    """S_v(j|i), S_a(j|i), (4b) [P]: how candidate j relates to instance i, by memories alone.

    v_i, a_i B×D: the batch's own memories; v_j, a_j C×D: the candidates', each instance once -> B×C, B×C.
    """
    exponents = {  # of S_v, of S_a: B×C
        "bootstrap": (v_i @ a_j.T / tau_s, a_i @ v_j.T / tau_s),
        "swapped": (a_i @ v_j.T / tau_s, v_i @ a_j.T / tau_s),
        "neighbor": (v_i @ v_j.T / tau_s, a_i @ a_j.T / tau_s),
        "cycle": (
            (v_i * a_i).sum(1, keepdim=True) / tau_t + a_i @ v_j.T / tau_s + (v_j * a_j).sum(1) / tau_t,
            (a_i * v_i).sum(1, keepdim=True) / tau_t + v_i @ a_j.T / tau_s + (a_j * v_j).sum(1) / tau_t,
        ),
    }
    return [F.softmax(e, 1) for e in exponents[estimator]]


def robust_xid_by_matrices(
    video, audio, bank_video, bank_audio, valid, column, *, temperature, soft, estimator, tau_s, tau_t
):
    """L_soft(i) = − Σ_j T_v(j|i) log P(ā_j|v_i) − Σ_j T_a(j|i) log P(v̄_j|a_i), (4c) [P]; λ = 0: L_xID, (2).

    For readers, tests and benchmarks: takes and returns what `robust_xid` does, with every B×C matrix.
    """
    v_j, a_j = bank_video[valid], bank_audio[valid]  # v̄_j, ā_j C×D, each instance once
    own = valid.cumsum(0)[column] - 1  # B, where i itself stands among them
    S_v, S_a = soft_target_matrices(estimator, v_j[own], a_j[own], v_j, a_j, tau_s, tau_t)
    one_hot = F.one_hot(own, len(v_j))  # 1[i=j] B×C
    T_v = (1 - soft) * one_hot + soft * S_v  # B×C, (4a)
    T_a = (1 - soft) * one_hot + soft * S_a
    log_P_v = log_probabilities(video, a_j, temperature)  # log P(ā_j|v_i) B×C
    log_P_a = log_probabilities(audio, v_j, temperature)  # log P(v̄_j|a_i)
    return -(T_v * log_P_v).sum(1) - (T_a * log_P_a).sum(1)


def weighted_mean(loss, weight, total_weight=None):
    """Σ_i w_i·L(i) / Σ_i w_i, (3b) of L_xID, (5) of L_soft [P]: B, B -> scalar; 0 where all weights are 0.

    total_weight (0-dim): the sum that several ranks share instead of this batch's own. Where gradients are
    averaged over R ranks, as DistributedDataParallel does, it is Σw over all ranks / R.
    """
    total_weight = weight.sum() if total_weight is None else total_weight
    return (weight * loss).sum() / total_weight.clamp(min=torch.finfo(torch.float32).tiny)


def contrast(x, matched, positives, negatives, temperature, valid=None, others=None):
    """L(i) = − 1/|P_i| · Σ_{p∈P_i} log [ e^{x_i·p/τ} / (e^{x_i·p/τ} + Σ_{n∈N_i} e^{x_i·n/τ}) ], (7) [P].

    x B×D: queries, and matched B×D: the positive that each has in the batch, live: gradients reach both;
    positives B×P×D (P may be 0), negatives B×N×D: memories of any float type, without gradient -> B, float32
    even under autocast. valid: which memories count, bool of the rows of instances, b×P and b×N, B/b clips
    each; None: all. others: more negatives, live clips C×D that all queries share, and which of them count,
    B×C bool; gradients reach them [C].
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        matched = (x * matched.float()).sum(1, keepdim=True)  # B×1
        near = torch.einsum("bd,bpd->bp", x, positives.detach().float())  # B×P
        p = torch.cat([matched, near], 1) / temperature  # B×(1+P), the positives' exponents
        n = torch.einsum("bd,bnd->bn", x, negatives.detach().float()) / temperature  # B×N, the negatives'
        if valid is not None:
            near, far = (there.repeat_interleave(len(x) // len(there), 0) for there in valid)  # B×P, B×N
            n = n.masked_fill(~far, NOTHING)
        if others is not None:
            clips, there = others
            n = torch.cat([n, (x @ clips.float().T / temperature).masked_fill(~there, NOTHING)], 1)  # B×(N+C)
        against = n.logsumexp(1, keepdim=True)  # B×1, log Σ_n e^n
        loss = F.softplus(against - p)  # B×(1+P), −log [e^p / (e^p + e^a)] = log(1 + e^{a−p})
        if valid is None:
            return loss.mean(1)
        counts = torch.cat([torch.ones_like(matched), near], 1)  # B×(1+P), the matched one always does
        return (counts * loss).sum(1) / counts.sum(1)


# ------------------------------------------------------------------------- the same, without B×C in memory


def robust_xid(
    video, audio, bank_video, bank_audio, valid, column, *, temperature, soft, estimator, tau_s, tau_t
):
    """L_soft(i), (4c) [P]; with λ = `soft` = 0 L_xID, (2): no estimate is computed.

    video v_i, audio a_i B×D, live; bank_video v̄_j, bank_audio ā_j C×D of the candidates, of any float type;
    valid C (bool): once per instance, the others are outside the sums; column B: where i itself stands among
    them -> B, float32 even under autocast. Gradients reach video and audio only. ValueError for an unknown
    estimator.
    """
    own_video, own_audio = bank_video[column].float(), bank_audio[column].float()  # v̄_i, ā_i B×D
    target_audio, target_video = own_audio, own_video  # Σ_j 1[i=j]·ā_j, Σ_j 1[i=j]·v̄_j
    if soft:
        S_audio, S_video = soft_targets(
            estimator, own_video, own_audio, bank_video, bank_audio, valid, tau_s, tau_t
        )
        target_audio = (1 - soft) * own_audio + soft * S_audio  # Σ_j T_v(j|i)·ā_j
        target_video = (1 - soft) * own_video + soft * S_video  # Σ_j T_a(j|i)·v̄_j
    return cross_entropy(video, target_audio, bank_audio, valid, temperature) + cross_entropy(
        audio, target_video, bank_video, valid, temperature
    )


def cross_entropy(x, target, memories, valid, temperature):
    """− Σ_j T(j|i) log P(m_j | x_i) = log Σ_k exp(x_i·m_k / τ) − x_i·t_i / τ with t_i = Σ_j T(j|i)·m_j.

    This holds as Σ_j T(j|i) = 1. x B×D, live; target t_i B×D; memories C×D; valid C (bool) -> B, float32 even
    under autocast. Gradients reach x only. Nothing of size B×C is kept for backward.
    """
    x = x.float()
    return (
        LogSumExp.apply(x, memories, _exclude(valid), temperature)
        - (x * target.detach()).sum(1) / temperature
    )


@torch.no_grad()
def soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
    """Σ_j S_v(j|i)·ā_j and Σ_j S_a(j|i)·v̄_j, the memories that (4b) expects: all that the loss needs of S.

    own_video v̄_i, own_audio ā_i B×D; the candidates' video v̄_j, audio ā_j C×D, valid C (bool) -> B×D, B×D.
    ValueError for an unknown estimator.
    """
    S_v, S_a, bias = soft_exponents(estimator, own_video, own_audio, video, audio, valid, tau_t)
    return attend(*S_v, audio, bias, tau_s)[1], attend(*S_a, video, bias, tau_s)[1]


@torch.no_grad()
def soft_exponents(estimator, own_video, own_audio, video, audio, valid, tau_t):
    """The exponents of (4b) as x_i·k_j / τ_s + b_j -> (x B×D, k C×D) of S_v, the same of S_a, b C.

    Arguments as of `soft_targets`; b_j is −inf where j is not valid. A cycle's first step is the same for
    every j and drops out; its last is in b_j.
    """
    steps = {  # of S_v, of S_a
        "bootstrap": ((own_video, audio), (own_audio, video)),
        "swapped": ((own_audio, video), (own_video, audio)),
        "neighbor": ((own_video, video), (own_audio, audio)),
        "cycle": ((own_audio, video), (own_video, audio)),
    }
    if estimator not in steps:
        raise ValueError(f"unknown estimator {estimator} of soft targets; expected one of {', '.join(steps)}")
    bias = _exclude(valid)  # C
    if estimator == "cycle":
        bias = bias + agreement(video, audio) / tau_t
    return *steps[estimator], bias


class LogSumExp(torch.autograd.Function):
    """log Σ_j exp(x_i·m_j / τ + b_j): B. Its gradient is known in forward already: Σ_j P(j|i)·m_j / τ."""

    @staticmethod
    def forward(ctx, x, memories, bias, temperature):
        value, mean = attend(x, memories, memories, bias, temperature)
        ctx.save_for_backward(mean / temperature)  # B×D
        return value

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, None] * ctx.saved_tensors[0], None, None, None


@torch.no_grad()
def attend(x, keys, values, bias, temperature):
    """log Σ_j exp(e_ij), and Σ_j y_j·exp(e_ij) / Σ_k exp(e_ik), of the exponents e_ij = x_i·k_j / τ + b_j.

    x B×D; keys k_j C×D, values y_j C×E, of any float type; bias b_j C -> B, B×E, float32 even under autocast.
    An online softmax over pieces of the candidates: memory does not grow with C.
    """
    x = x.float() / temperature
    largest = x.new_full((len(x), 1), torch.finfo(x.dtype).min)  # B×1, of the exponents so far
    total = x.new_zeros(len(x), 1)  # B×1, Σ_j exp(e_ij − largest)
    weighted = x.new_zeros(len(x), values.shape[1])  # B×E, Σ_j y_j·exp(e_ij − largest)
    with torch.autocast(x.device.type, enabled=False):
        for k, y, b in zip(keys.split(PIECE), values.split(PIECE), bias.split(PIECE), strict=True):
            e = torch.addmm(b, x, k.float().T)  # B×piece
            before, largest = largest, torch.maximum(largest, e.amax(1, keepdim=True))
            p, shrink = e.sub_(largest).exp_(), (before - largest).exp()  # B×piece, B×1
            total = shrink * total + p.sum(1, keepdim=True)
            weighted = torch.addmm(shrink * weighted, p, y.float())
    return (largest + total.log()).squeeze(1), weighted / total


@torch.no_grad()
def agreement(video, audio):
    """s_j = v̄_j·ā_j: C×D, C×D of any float type -> C."""
    agreed = torch.empty(len(video), device=video.device)
    for part, v, a in zip(agreed.split(PIECE), video.split(PIECE), audio.split(PIECE), strict=True):
        torch.sum(v.float() * a.float(), 1, out=part)
    return agreed


def _exclude(valid):
    """0 where valid, −inf elsewhere: C (bool) -> C."""
    return torch.zeros_like(valid, dtype=torch.get_default_dtype()).masked_fill(~valid, -math.inf)


# -------------------------------------------------------------------- each sample's own negatives, AVID's way


def instance(x, positives, negatives, temperature):
    """−1/P · Σ_p log [ e^{x·p/τ} / (e^{x·p/τ} + Σ_n e^{x·n/τ}) ], (12b): the softmax over own negatives.

    x B×D, live; positives B×P×D, negatives B×K×D: memories -> B. The same as `contrast`, whose positives are
    all memories.
    """
    return contrast(x, positives[:, 0].detach(), positives[:, 1:], negatives, temperature)


def nce(x, positives, negatives, temperature, partition):
    """−1/P · Σ_p log P(data|p) − Σ_n log P(noise|n), P(data|m) = e^{x·m/τ} / (e^{x·m/τ} + K·Z̄), (12c) [A].

    Noise contrastive estimation: each memory by itself is told to be a positive or one of K draws of noise.
    Z̄ (0-dim) stands for the mean of e^{x·m/τ} over the bank, of `partition`. x B×D, live; positives B×P×D,
    negatives B×K×D: memories -> B.
    """
    with torch.autocast(x.device.type, enabled=False):
        positive = torch.einsum("bd,bpd->bp", x.float(), positives.detach().float()) / temperature  # B×P
        negative = torch.einsum("bd,bkd->bk", x.float(), negatives.detach().float()) / temperature  # B×K
        noise = math.log(negative.shape[1]) + partition.log()  # log(K·Z̄)
        return F.softplus(noise - positive).mean(1) + F.softplus(negative - noise).sum(1)


@torch.no_grad()
def partition(x, negatives, temperature):
    """Z̄, the mean of e^{x·n/τ}, (12c) [A]: x B×D, negatives B×K×D -> scalar, float32 even under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return (torch.einsum("bd,bkd->bk", x.float(), negatives.float()) / temperature).exp().mean()
