"""Robust-xID, which doubts its positives and its negatives, docs/method.md 1-5; contrast with several positives, 7.

In: live embeddings of a batch, memories of its own instances, of candidates or neighbours, plain tensors all of them.
Out: a loss a row, a weight a row, and their mean. B rows of the batch, C candidates, D dimensions.
"""

import math

import torch
from torch.nn import functional as F

FLAT = 1e-4  # a standard deviation of the agreement below this is rounding, not a difference between instances [C]
PIECE = 8192  # candidates at a time: B×8192 similarities are the most that is held


def cross_entropy(x, expected, memories, valid, temperature):
    """− Σ_j T(j|i) log P(m_j | x_i), P(m_j | x_i) = exp(x_i·m_j / τ) / Σ_k exp(x_i·m_k / τ), sections 1 and 4 [P].

    As Σ_j T(j|i) = 1, that is log Σ_k exp(x_i·m_k / τ) − x_i·t_i / τ: of the target only t_i = Σ_j T(j|i)·m_j is needed.
    x B×D, live; expected t_i B×D; memories C×D; valid C (bool): the others are outside the sum -> B, float32 even under
    autocast. Gradients reach x only. Nothing of size B×C is kept for backward.
    """
    x = x.float()
    return (
        LogSumExp.apply(x, memories, _exclude(valid), temperature)
        - (x * expected.detach()).sum(1) / temperature
    )


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
    """log Σ_j exp(e_ij) and Σ_j y_j·exp(e_ij) / Σ_k exp(e_ik), the softmax's mean of y, of e_ij = x_i·k_j / τ + b_j.

    x B×D; keys k_j C×D, values y_j C×E, of any float type; bias C -> B, B×E. An online softmax over pieces of the candidates: memory
    does not grow with C.
    """
    x = x.float() / temperature
    largest = x.new_full((len(x), 1), torch.finfo(x.dtype).min)  # B×1, of the exponents so far
    total, weighted = (
        x.new_zeros(len(x), 1),
        x.new_zeros(len(x), values.shape[1]),
    )  # Σ_j exp(e_ij − largest)·{1, y_j}
    with torch.autocast(x.device.type, enabled=False):
        for k, y, b in zip(keys.split(PIECE), values.split(PIECE), bias.split(PIECE), strict=True):
            e = torch.addmm(b, x, k.float().T)  # B×piece
            before, largest = largest, torch.maximum(largest, e.amax(1, keepdim=True))
            p, shrink = e.sub_(largest).exp_(), (before - largest).exp()  # B×piece, B×1
            total = shrink * total + p.sum(1, keepdim=True)
            weighted = torch.addmm(shrink * weighted, p, y.float())
    return (largest + total.log()).squeeze(1), weighted / total


@torch.no_grad()
def faulty_positive_weights(agreement, mean, std, w_min, delta, kappa):
    """w_i = w_min + (1 − w_min) · Φ((s_i − (μ + δσ)) / (√κ·σ)), section 3 [F].

    agreement s_i = v̄_i·ā_i B, mean μ and std σ over the whole bank (0-dim tensors) -> B, in w_min..1.
    As σ → 0 (a collapsed bank) no s_i differs from μ: every weight is w_min + (1 − w_min) · Φ(−δ/√κ).
    """
    score = torch.where(std > FLAT, (agreement - mean) / std.clamp(min=FLAT), 0.0)  # B
    return w_min + (1 - w_min) * torch.special.ndtr((score - delta) / math.sqrt(kappa))


@torch.no_grad()
def soft_exponents(estimator, own_video, own_audio, video, audio, valid, tau_t):
    """From where to where the soft targets look, section 4 [P]: S(j|i) ∝ exp(x_i·k_j / τ_s + b_j).

    own_video v̄_i, own_audio ā_i B×D; video v̄_j, audio ā_j C×D; valid C (bool); tau_t τ_t. -> (x B×D, k C×D) of S_v, the same
    of S_a, b C: −inf where not valid. ValueError for an unknown estimator.
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
    if (
        estimator == "cycle"
    ):  # the last step, within j; the first, within i, is the same for every j and drops out
        bias = bias + agreement(video, audio) / tau_t
    return *steps[estimator], bias


@torch.no_grad()
def soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
    """What the candidates' memories are on average over S_v(j|i), S_a(j|i), section 4 [P]: all that the loss needs of S.

    Arguments as of `soft_exponents`; tau_s τ_s. -> Σ_j S_v(j|i)·ā_j, Σ_j S_a(j|i)·v̄_j, B×D each.
    """
    S_v, S_a, bias = soft_exponents(estimator, own_video, own_audio, video, audio, valid, tau_t)
    return attend(*S_v, audio, bias, tau_s)[1], attend(*S_a, video, bias, tau_s)[1]


def robust_xid(
    video, audio, bank_video, bank_audio, valid, column, *, temperature, soft, estimator, tau_s, tau_t
):
    """L_soft(i) = − Σ_j T_v(j|i) log P(ā_j|v_i) − Σ_j T_a(j|i) log P(v̄_j|a_i), T(j|i) = (1 − λ)·1[i=j] + λ·S(j|i), section 4 [P].

    video v_i, audio a_i B×D, live; bank_video v̄_j, bank_audio ā_j C×D of the candidates, of any float type; valid C (bool);
    column B (where i itself stands among them) -> losses B. Gradients reach video and audio only.
    soft λ: 0 is plain xID, section 2 [P]: no estimate is computed. ValueError for an unknown estimator.
    """
    own_video, own_audio = bank_video[column].float(), bank_audio[column].float()  # v̄_i, ā_i B×D
    expected_audio, expected_video = own_audio, own_video  # Σ_j 1[i=j]·ā_j, Σ_j 1[i=j]·v̄_j
    if soft:
        S_audio, S_video = soft_targets(
            estimator, own_video, own_audio, bank_video, bank_audio, valid, tau_s, tau_t
        )
        expected_audio = (1 - soft) * own_audio + soft * S_audio  # Σ_j T_v(j|i)·ā_j
        expected_video = (1 - soft) * own_video + soft * S_video  # Σ_j T_a(j|i)·v̄_j
    return cross_entropy(video, expected_audio, bank_audio, valid, temperature) + cross_entropy(
        audio, expected_video, bank_video, valid, temperature
    )


def weighted_mean(loss, weight, total_weight=None):
    """Σ_i w_i·L(i) / Σ_i w_i, sections 3 and 5 [P]: B, B -> scalar.

    total_weight (0-dim): the sum that several ranks share instead of this batch's own. Where gradients are averaged
    over R ranks, as DistributedDataParallel does, it is Σw over all ranks / R.
    """
    total_weight = weight.sum() if total_weight is None else total_weight
    return (weight * loss).sum() / total_weight.clamp(
        min=torch.finfo(torch.float32).tiny
    )  # all weights 0: 0, not NaN


def contrast(x, usual, positives, negatives, temperature):
    """L(i) = −1/|P_i| · Σ_{p∈P_i} log [ e^{x_i·p/τ} / (e^{x_i·p/τ} + Σ_{n∈N_i} e^{x_i·n/τ}) ], section 7 [P].

    x B×D: queries, live; usual B×D: the positive that each has anyway, live: gradients reach both; positives B×P×D (P may be 0) and
    negatives B×N×D: memories of any float type, without gradient -> losses B.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        usual = (x * usual.float()).sum(1, keepdim=True)  # B×1
        positive = (
            torch.cat([usual, torch.einsum("bd,bpd->bp", x, positives.detach().float())], 1) / temperature
        )  # B×(1+P)
        negative = torch.einsum("bd,bnd->bn", x, negatives.detach().float()) / temperature  # B×N
        against = negative.logsumexp(1, keepdim=True)  # B×1
        return F.softplus(against - positive).mean(1)  # −log [e^p / (e^p + e^a)] = log(1 + e^{a−p})


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
