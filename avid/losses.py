"""Robust-xID, which doubts its positives and its negatives, docs/method.md 1-5; contrast with several positives, 7.

In: live embeddings of a batch, memories of its own instances, of candidates or neighbours, plain tensors all of them.
Out: a loss a row, a weight a row, and their mean. B rows of the batch, C candidates, D dimensions.
"""

import math

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FLAT = 1e-4  # a standard deviation of the agreement below this is rounding, not a difference between instances [C]


def log_probabilities(x, memories, valid, temperature):
    """log P(m_j | x_i) = x_i·m_j / τ − log Σ_k exp(x_i·m_k / τ), section 1 [P].

    x B×D, memories C×D, valid C (bool) -> B×C, float32 even under autocast; −inf where not valid, outside the sum.
    Gradients reach x only.
    """
    return F.log_softmax(_similarity(x, memories, temperature, _exclude(valid)), dim=1)


def cross_entropy(target, log_p):
    """− Σ_j T(j|i) log P(j|i), section 4 [P]: B×C, B×C -> B. Where T is 0, log P may be −inf and counts nothing."""
    return -(target * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)  # 0·−inf would be NaN


@torch.no_grad()
def faulty_positive_weights(agreement, mean, std, w_min, delta, kappa):
    """w_i = w_min + (1 − w_min) · Φ((s_i − (μ + δσ)) / (√κ·σ)), section 3 [F].

    agreement s_i = v̄_i·ā_i B, mean μ and std σ over the whole bank (0-dim tensors) -> B, in w_min..1.
    As σ → 0 (a collapsed bank) no s_i differs from μ: every weight is w_min + (1 − w_min) · Φ(−δ/√κ).
    """
    score = torch.where(std > FLAT, (agreement - mean) / std.clamp(min=FLAT), 0.0)  # B
    return w_min + (1 - w_min) * torch.special.ndtr((score - delta) / math.sqrt(kappa))


@torch.no_grad()
def soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
    """How the candidates relate to each instance, judged by memories alone: S_v(j|i), S_a(j|i), section 4 [P].

    own_video v̄_i, own_audio ā_i B×D; video v̄_j, audio ā_j C×D; valid C (bool); tau_s τ_s, tau_t τ_t.
    -> S_v, S_a, B×C each: rows sum to 1, 0 where not valid. ValueError for an unknown estimator.
    """
    steps = {  # from where to where: of S_v, of S_a
        "bootstrap": ((own_video, audio), (own_audio, video)),
        "swapped": ((own_audio, video), (own_video, audio)),
        "neighbor": ((own_video, video), (own_audio, audio)),
        "cycle": ((own_audio, video), (own_video, audio)),
    }
    if estimator not in steps:
        raise ValueError(f"unknown estimator {estimator} of soft targets; expected one of {', '.join(steps)}")
    bias = _exclude(valid)  # C
    if estimator == "cycle":  # the last step, within j; the first, within i, is the same for every j and drops out
        bias = bias + (video * audio).sum(1) / tau_t
    return tuple(F.softmax(_similarity(own, others, tau_s, bias), dim=1) for own, others in steps[estimator])


def mix_targets(S, column, soft):
    """T(j|i) = (1 − λ)·1[i=j] + λ·S(j|i), section 4 [P]: S B×C, column B (where i itself stands), soft λ -> B×C."""
    T = soft * S
    T[torch.arange(len(T), device=T.device), column] += 1 - soft
    return T


def robust_xid(
    video, audio, own_video, own_audio, bank_video, bank_audio, valid, column,
    *, temperature, soft, estimator, tau_s, tau_t, rows=None,
):  # fmt: skip
    """L_soft(i) = − Σ_j T_v(j|i) log P(ā_j|v_i) − Σ_j T_a(j|i) log P(v̄_j|a_i), section 4 [P].

    video v_i, audio a_i B×D, live; own_video v̄_i, own_audio ā_i B×D; bank_video v̄_j, bank_audio ā_j C×D of the
    candidates; valid C (bool); column B (where i stands among them) -> losses B. Gradients reach video and audio only.
    soft=0 is plain xID, section 2 [P]: no estimate is computed. ValueError for an unknown estimator.
    rows: so many rows at a time, worked out again in backward: memory is bounded by rows×C, for C = N, the whole bank.
    """

    def losses(video, audio, own_video, own_audio, column):
        log_p_v = log_probabilities(video, bank_audio, valid, temperature)  # B×C  log P(ā_j|v_i)
        log_p_a = log_probabilities(audio, bank_video, valid, temperature)  # B×C  log P(v̄_j|a_i)
        if soft == 0:
            i = torch.arange(len(column), device=column.device)
            return -log_p_v[i, column] - log_p_a[i, column]  # B
        S_v, S_a = soft_targets(estimator, own_video, own_audio, bank_video, bank_audio, valid, tau_s, tau_t)  # B×C
        T_v, T_a = mix_targets(S_v, column, soft), mix_targets(S_a, column, soft)  # B×C
        return cross_entropy(T_v, log_p_v) + cross_entropy(T_a, log_p_a)  # B

    batch = (video, audio, own_video, own_audio, column)
    if rows is None:
        return losses(*batch)
    chunks = zip(*(x.split(rows) for x in batch), strict=True)
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def weighted_mean(loss, weight, total_weight=None):
    """Σ_i w_i·L(i) / Σ_i w_i, sections 3 and 5 [P]: B, B -> scalar.

    total_weight (0-dim): the sum that several ranks share instead of this batch's own. Where gradients are averaged
    over R ranks, as DistributedDataParallel does, it is Σw over all ranks / R.
    """
    total_weight = weight.sum() if total_weight is None else total_weight
    return (weight * loss).sum() / total_weight.clamp(min=torch.finfo(torch.float32).tiny)  # all weights 0: 0, not NaN


def contrast(x, usual, positives, negatives, temperature):
    """L(i) = −1/|P_i| · Σ_{p∈P_i} log [ e^{x_i·p/τ} / (e^{x_i·p/τ} + Σ_{n∈N_i} e^{x_i·n/τ}) ], section 7 [P].

    x B×D: queries, live; usual B×D: the positive that each has anyway, live: gradients reach both; positives B×P×D (P may be 0) and
    negatives B×N×D: memories, without gradient -> losses B.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        usual = (x * usual.float()).sum(1, keepdim=True)  # B×1
        positive = torch.cat([usual, torch.einsum("bd,bpd->bp", x, positives.detach())], 1) / temperature  # B×(1+P)
        negative = torch.einsum("bd,bnd->bn", x, negatives.detach()) / temperature  # B×N
        against = negative.logsumexp(1, keepdim=True)  # B×1
        return F.softplus(against - positive).mean(1)  # −log [e^p / (e^p + e^a)] = log(1 + e^{a−p})


def _similarity(x, memories, temperature, bias):
    """x_i·m_j / τ + bias_j: B×D, C×D, C -> B×C, float32 even under autocast; memories get no gradient."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.addmm(bias, x.float(), memories.detach().float().T, alpha=1 / temperature)


def _exclude(valid):
    """0 where valid, −inf elsewhere: C (bool) -> C."""
    return torch.zeros_like(valid, dtype=torch.get_default_dtype()).masked_fill(~valid, -math.inf)
