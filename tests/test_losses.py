"""The losses against the equations of docs/method.md, written again with plain loops in float64."""

import contextlib
import functools
import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from avid import config, losses, memory_bank, models, temporal_tasks

TAU, TAU_S, TAU_T = 0.07, 0.02, 0.07
ESTIMATORS = ("bootstrap", "swapped", "neighbor", "cycle")
EXPONENT = {  # of S_v, from v̄_i, ā_i, v̄_j, ā_j; of S_a with the modalities exchanged
    "bootstrap": lambda v_i, a_i, v_j, a_j: v_i @ a_j / TAU_S,
    "swapped": lambda v_i, a_i, v_j, a_j: a_i @ v_j / TAU_S,
    "neighbor": lambda v_i, a_i, v_j, a_j: v_i @ v_j / TAU_S,
    "cycle": lambda v_i, a_i, v_j, a_j: v_i @ a_i / TAU_T + a_i @ v_j / TAU_S + v_j @ a_j / TAU_T,
}


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def example(negatives=12, whole_bank=False, seed=0, num_instances=20, dim=6):
    """A batch, its memories, and candidates with duplicates: in the batch, and again among those drawn."""
    bank_video = unit(num_instances, dim, seed=seed)
    bank_audio = F.normalize(bank_video + 0.8 * unit(num_instances, dim, seed=seed + 1), dim=1)
    index = [3, 7, 3, 11, 0]
    drawn = torch.randint(num_instances, (negatives,), generator=torch.Generator().manual_seed(seed)).tolist()
    candidates = list(range(num_instances)) if whole_bank else index + [7, 5, 5] + drawn
    return SimpleNamespace(
        video=F.normalize(bank_video[index] + 0.5 * unit(5, dim, seed=seed + 2), dim=1).requires_grad_(),
        audio=F.normalize(bank_audio[index] + 0.5 * unit(5, dim, seed=seed + 3), dim=1).requires_grad_(),
        own_video=bank_video[index],
        own_audio=bank_audio[index],
        bank_video=bank_video[candidates],
        bank_audio=bank_audio[candidates],
        valid=torch.tensor([instance not in candidates[:j] for j, instance in enumerate(candidates)]),
        column=torch.tensor([candidates.index(instance) for instance in index]),
    )


def robust_xid(w, soft=0.5, estimator="cycle"):
    names = ("video", "audio", "bank_video", "bank_audio", "valid", "column")
    taus = dict(temperature=TAU, tau_s=TAU_S, tau_t=TAU_T)
    return losses.robust_xid(*(getattr(w, name) for name in names), soft=soft, estimator=estimator, **taus)


def full_soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t):
    """S_v and S_a, each B×C: the means that losses.attend returns over the rows of the identity matrix.

    Also checks that losses.soft_targets returns their products with the memories.
    """
    *steps, bias = losses.soft_exponents(estimator, own_video, own_audio, video, audio, valid, tau_t)
    S = [losses.attend(x, k, torch.eye(len(valid)), bias, tau_s)[1] for x, k in steps]
    means = losses.soft_targets(estimator, own_video, own_audio, video, audio, valid, tau_s, tau_t)
    for mean, expected in zip(means, (S[0] @ audio, S[1] @ video), strict=True):
        torch.testing.assert_close(mean, expected)
    return S


@pytest.fixture(params=[1, 7, 8192])
def piece(request, monkeypatch):
    """How many candidates the fast form takes at a time."""
    monkeypatch.setattr(losses, "PIECE", request.param)


def float64(w):
    def convert(x):
        return x.detach().numpy().astype(np.float64) if x.is_floating_point() else x.tolist()

    return SimpleNamespace(**{name: convert(x) for name, x in vars(w).items()})


def reference_softmax(exponents, valid):
    """exp(e_j) / Σ_k exp(e_k) over the valid candidates, 0 elsewhere."""
    largest = max(e for e, ok in zip(exponents, valid, strict=True) if ok)
    terms = [math.exp(e - largest) if ok else 0.0 for e, ok in zip(exponents, valid, strict=True)]
    return [t / sum(terms) for t in terms]


def reference_soft_targets(w, estimator):
    S_v, S_a = [], []
    for v_i, a_i in zip(w.own_video, w.own_audio, strict=True):
        pairs = list(zip(w.bank_video, w.bank_audio, strict=True))
        S_v.append(
            reference_softmax([EXPONENT[estimator](v_i, a_i, v_j, a_j) for v_j, a_j in pairs], w.valid)
        )
        S_a.append(
            reference_softmax([EXPONENT[estimator](a_i, v_i, a_j, v_j) for v_j, a_j in pairs], w.valid)
        )
    return np.array(S_v), np.array(S_a)


def reference_losses(w, soft, S_v, S_a):
    result = []
    for i, column in enumerate(w.column):
        P_v = reference_softmax([w.video[i] @ a_j / TAU for a_j in w.bank_audio], w.valid)
        P_a = reference_softmax([w.audio[i] @ v_j / TAU for v_j in w.bank_video], w.valid)
        loss = 0.0
        for j in range(len(w.valid)):
            if w.valid[j]:
                loss -= ((1 - soft) * (j == column) + soft * S_v[i][j]) * math.log(P_v[j])
                loss -= ((1 - soft) * (j == column) + soft * S_a[i][j]) * math.log(P_a[j])
        result.append(loss)
    return np.array(result)


def reference_weights(agreement, mean, std, w_min, delta, kappa):
    def cdf(x):
        return 0.5 * (1 + math.erf(x / math.sqrt(2)))

    return [
        w_min + (1 - w_min) * cdf((s - (mean + delta * std)) / (math.sqrt(kappa) * std)) for s in agreement
    ]


def assert_close(ours, reference, tolerance=1e-5):
    np.testing.assert_allclose(ours.detach().numpy(), reference, rtol=tolerance, atol=tolerance)


def test_attention_is_the_softmax_and_its_normaliser(piece):
    w = example()
    bias = torch.where(w.valid, 0.3 * torch.arange(len(w.valid)), -math.inf)
    total, S = losses.attend(w.video, w.bank_audio, torch.eye(len(w.valid)), bias, TAU)
    r = float64(w)
    exponents = [
        [v @ a_j / TAU + b for a_j, b in zip(r.bank_audio, bias.tolist(), strict=True)] for v in r.video
    ]
    assert_close(S, [reference_softmax(e, r.valid) for e in exponents])
    assert_close(total, [math.log(sum(map(math.exp, e))) for e in exponents])
    assert not w.valid.all() and (S[:, ~w.valid] == 0).all()


HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


@HALVES
def test_a_half_precision_bank_gives_the_loss_of_its_memories_in_float32(half):
    w = example()
    w.bank_video, w.bank_audio = w.bank_video.to(half).float(), w.bank_audio.to(half).float()
    expected = robust_xid(w)
    gradient = torch.autograd.grad(expected.sum(), w.video)[0]
    w.bank_video, w.bank_audio = w.bank_video.to(half), w.bank_audio.to(half)
    loss = robust_xid(w)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss.sum(), w.video)[0], gradient)
    w.video, w.audio = w.video.to(half), w.audio.to(half)
    from_halves = robust_xid(w)
    w.video, w.audio = w.video.float(), w.audio.float()
    assert torch.equal(from_halves, robust_xid(w))
    memories = [x.to(half) for x in (w.own_video, w.own_audio, w.bank_video, w.bank_audio)]
    S, T = (
        losses.soft_targets("cycle", *m, w.valid, TAU_S, TAU_T)
        for m in (memories, [x.float() for x in memories])
    )
    assert torch.equal(S[0], T[0]) and torch.equal(S[1], T[1])


def robust_xid_of(estimator):
    w = example()
    return [robust_xid(w, 0.5, estimator)], [w.video, w.audio]


def contrast_of_clips():
    x, matched = (unit(7, 8, seed=seed).requires_grad_() for seed in (0, 1))
    return [losses.contrast(x, matched, unit(7, 4, 8, seed=2), unit(7, 20, 8, seed=3), TAU)], [x, matched]


def soft_target_means():
    w = example()
    memories = (w.own_video, w.own_audio, w.bank_video, w.bank_audio)
    return losses.soft_targets("cycle", *memories, w.valid, TAU_S, TAU_T), []


def weights_of_pairs():
    """The agreement, the weights from it, and a weighted loss."""
    w = example()
    s = losses.agreement(w.bank_video, w.bank_audio)
    weight = losses.faulty_positive_weights(s, s.mean(), s.std(), 0.25, 0.1, 0.5)
    loss = s.clone().requires_grad_()
    return [s, weight, losses.weighted_mean(loss, weight)], [loss]


def bank_after_an_update():
    """The state, statistics and draws of a bank after an update."""
    bank = memory_bank.MemoryBank(40, 8, 0.5, 0)
    index, ways = torch.arange(12), config.Contrast(n_pos=3, k_pos=6, negatives=10, tau_n=0.5)
    bank.update(index, unit(12, 8, seed=4), unit(12, 8, seed=5))
    drawn = [x for name in ("video", "audio") for x in bank.neighbourhood(name, index, ways, range(12))]
    health = torch.tensor(list(bank.health().values()), dtype=torch.double)
    return [*bank.state_dict().values(), *drawn, *bank.agreement_mean_std(), health], []


COMPUTED = {
    **{f"robust xID, {name}": functools.partial(robust_xid_of, name) for name in ESTIMATORS},
    "contrast": contrast_of_clips,
    "soft targets": soft_target_means,
    "weights": weights_of_pairs,
    "bank": bank_after_an_update,
}


def compute(what, autocast):
    """The values, computed under `autocast`, and the gradients of their sum."""
    with autocast:
        values, leaves = COMPUTED[what]()
    return [*values, *(torch.autograd.grad(sum(x.sum() for x in values), leaves) if leaves else ())]


@HALVES
@pytest.mark.parametrize("what", COMPUTED)
def test_autocast_changes_no_bit(what, half):
    """At τ = 0.02, rounding to bfloat16 would move an exponent by 0.2. So all of this stays float32."""
    expected = compute(what, contextlib.nullcontext())
    found = compute(what, torch.autocast("cpu", dtype=half))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype and x.dtype not in (torch.bfloat16, torch.float16)
        assert torch.equal(x, y)


@HALVES
# the weights have no matrix product, so autocast never changes them
@pytest.mark.parametrize("what", [name for name in COMPUTED if name != "weights"])
def test_without_the_guards_half_precision_would_change_the_values(what, half, monkeypatch):
    """With every `enabled=False` removed, values change. So the test above does not pass by accident."""
    expected, autocast = compute(what, contextlib.nullcontext()), torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, **_: autocast(device, dtype=half))
    found = compute(what, autocast("cpu", dtype=half))
    assert not all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@HALVES
def test_autocast_changes_no_bit_of_the_whole_objective(half):
    """Every term of train.Objective, with weights, candidates and neighbours. The logits are in half
    precision."""
    robust, near = "weights.xid=1 loss.w_min=0.25 loss.soft=0.5", "contrast.k_pos=6 contrast.negatives=10"
    cfg = config.load("toy_temporal", [*robust.split(), *near.split(), "temporal.speeds=[1,2]"])
    torch.manual_seed(0)
    bank, index = memory_bank.MemoryBank(40, 8, 0.5, 0), torch.tensor([3, 7, 3, 11])
    video, audio = unit(8, 8, seed=1), unit(8, 8, seed=2)
    batch = {"index": index, "speed": torch.tensor([[0, 1]] * 4), "direction": torch.tensor([[1, 0]] * 4)}
    batch["order"] = torch.tensor([0, 1, 2, -1])
    for key in ("video", "audio"):  # as the decoding processes draw the neighbours
        draws = [memory_bank.draw_neighbours(40, cfg.contrast, seed) for seed in range(4)]
        batch[f"near_{key}"], batch[f"far_{key}"] = map(torch.stack, zip(*draws, strict=True))
    logits = {
        name: torch.randn(len(task.targets(batch)), len(task.classes(cfg.temporal))).to(half)
        for name, task in temporal_tasks.TASKS.items()
    }
    output = models.Output(video, audio, None, None, logits)
    objective = train.Objective(cfg, bank, SimpleNamespace(rank=0, size=1), epoch_steps=1)
    expected, accuracies = objective(output, batch, index, step=1)
    assert expected.keys() == {name for name, weight in vars(cfg.weights).items() if weight}
    with torch.autocast("cpu", dtype=half):
        found, accuracies_again = objective(output, batch, index, step=1)
    for name, value in (expected | accuracies).items():
        assert value.dtype == torch.float32 and torch.equal((found | accuracies_again)[name], value), name


@pytest.mark.parametrize("held", [None, [[1, 1], [1, 0], [1, 1], [0, 1]]], ids=["both", "need=any"])
def test_other_clips_of_the_batch_can_be_negatives(held):
    """contrast.batch: of all other instances that have the modality, as they are now; never of the same."""
    near = "contrast.n_pos=2 contrast.k_pos=6 contrast.negatives=10 contrast.batch=true"
    cfg = config.load("toy_temporal", near.split())
    index = torch.tensor([3, 7, 3, 11])
    bank = (memory_bank.PartialBank if held else memory_bank.MemoryBank)(40, 8, 0.5, 0)
    live = {"video": unit(8, 8, seed=1).requires_grad_(), "audio": unit(8, 8, seed=2).requires_grad_()}
    batch, expected = {"index": index}, {}
    if held:
        batch["held"] = torch.tensor(held).bool()
        bank.mark(index, batch["held"])
    for key in live:
        draws = [memory_bank.draw_neighbours(40, cfg.contrast, seed) for seed in range(4)]
        batch[f"near_{key}"], batch[f"far_{key}"] = map(torch.stack, zip(*draws, strict=True))
    objective = train.Objective(cfg, bank, SimpleNamespace(rank=0, size=1), epoch_steps=1)
    output = models.Output(live["video"], live["audio"], None, None, {})
    found = objective.contrasts(output, batch, index, step=1)
    for query, key in (("video", "audio"), ("audio", "video"), ("video", "video"), ("audio", "audio")):
        draws = batch[f"near_{key}"], batch[f"far_{key}"]
        *memories, valid = bank.neighbours(key, index, cfg.contrast, None, draws)
        valid = valid or [torch.ones(x.shape[:2]).bool() for x in memories]
        positives, negatives = (
            [x[k][ok[k]] for k in range(4)] for x, ok in zip(memories, valid, strict=True)
        )
        there = [held is None or held[i][m == "audio"] for m in (query, key) for i in range(4)]
        per_clip = []
        for i, x in enumerate(live[query].double()):
            if not (there[i // 2] and there[4 + i // 2]):
                continue
            own = live[key][i ^ 1 if query == key else i].double()
            others = [live[key][j] for j in range(8) if index[j // 2] != index[i // 2] and there[4 + j // 2]]
            against = sum(
                (x @ n.double() / cfg.contrast.temperature).exp() for n in [*negatives[i // 2], *others]
            )
            exponents = [(x @ p.double() / cfg.contrast.temperature).exp() for p in (own, *positives[i // 2])]
            per_clip.append(sum(-(e / (e + against)).log() for e in exponents) / len(exponents))
        expected[f"contrast_{query[0]}{key[0]}"] = (sum(per_clip) / len(per_clip)).float()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(sum(terms.values()), [*live.values()]) for terms in (found, expected)]
    torch.testing.assert_close(*gradients)  # they reach the other clips, too


@pytest.mark.parametrize("w_min, delta, kappa", [(0.25, 0.0, 0.5), (0.0, -1.0, 0.25), (0.5, 0.7, 2.0)])
def test_weights_follow_the_normal_cdf_of_the_agreement(w_min, delta, kappa):
    agreement = torch.linspace(-0.4, 0.9, 14)
    # float64, as the bank returns them
    mean, std = (torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.15, dtype=torch.float64))
    ours = losses.faulty_positive_weights(agreement, mean, std, w_min, delta, kappa)
    assert ours.dtype == torch.float32
    assert_close(ours, reference_weights(agreement.double().tolist(), 0.2, 0.15, w_min, delta, kappa))


def test_faulty_pairs_weigh_less():
    mean, std = torch.tensor(0.5), torch.tensor(0.2)
    faulty, average, good = losses.faulty_positive_weights(
        torch.tensor([-0.6, 0.5, 0.95]), mean, std, 0.25, 0.0, 0.5
    )
    assert faulty == pytest.approx(0.25, abs=1e-4)
    assert average == pytest.approx((0.25 + 1) / 2) and average < good <= 1


@pytest.mark.parametrize("std", [0.0, 1e-12, 1e-8])
def test_weights_of_a_collapsed_bank_are_equal(std):
    agreement = 0.7 + torch.tensor([-1e-7, 0.0, 1e-7, 2e-7])  # equal up to rounding
    w = losses.faulty_positive_weights(agreement, torch.tensor(0.7), torch.tensor(std), 0.25, 1.0, 0.5)
    assert torch.equal(w, w[:1].expand(4))
    # the weight at s = μ, for any σ
    assert w[0] == pytest.approx(reference_weights([0.7], 0.7, 1.0, 0.25, 1.0, 0.5)[0])


def test_w_min_1_weighs_every_pair_exactly_1():
    w = losses.faulty_positive_weights(
        torch.linspace(-1, 1, 9), torch.tensor(0.3), torch.tensor(0.1), 1.0, 0.0, 0.5
    )
    assert torch.equal(w, torch.ones(9))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_soft_targets_agree_with_the_table_of_estimators(estimator):
    w = example()
    ours = full_soft_targets(
        estimator, w.own_video, w.own_audio, w.bank_video, w.bank_audio, w.valid, TAU_S, TAU_T
    )
    for S, reference in zip(ours, reference_soft_targets(float64(w), estimator), strict=True):
        assert_close(S, reference)
        assert_close(S.sum(1), np.ones(5))
        assert (S[:, ~w.valid] == 0).all()


def test_an_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match=r"cicle.*bootstrap, swapped, neighbor, cycle"):
        robust_xid(example(), estimator="cicle")


def test_the_first_term_of_cycle_cancels():
    w = float64(example())
    exact = EXPONENT["cycle"]
    S = reference_soft_targets(w, "cycle")
    try:
        EXPONENT["cycle"] = lambda v_i, a_i, v_j, a_j: exact(v_i, a_i, v_j, a_j) - v_i @ a_i / TAU_T
        without = reference_soft_targets(w, "cycle")
    finally:
        EXPONENT["cycle"] = exact
    w = example()
    ours = full_soft_targets(
        "cycle", w.own_video, w.own_audio, w.bank_video, w.bank_audio, w.valid, TAU_S, TAU_T
    )
    for modality in range(2):
        assert_close(ours[modality], S[modality])
        assert_close(ours[modality], without[modality])


def test_a_faulty_neighbour_counts_less_in_cycle_than_in_swapped():
    own = unit(1, 6, seed=0)
    video = torch.cat([own, own, unit(8, 6, seed=1)])  # 10×D: columns 0 and 1 look like the query
    audio = video.clone()
    audio[1] = -video[1]  # the sound of column 1 does not match its video
    valid = torch.ones(10, dtype=torch.bool)
    swapped, _ = full_soft_targets("swapped", own, own, video, audio, valid, TAU_S, TAU_T)
    cycle, _ = full_soft_targets("cycle", own, own, video, audio, valid, TAU_S, TAU_T)
    assert swapped[0, 1] == pytest.approx(swapped[0, 0].item()) and swapped[0, 1] > 0.4
    assert cycle[0, 1] / cycle[0, 0] == pytest.approx(math.exp(-2 / TAU_T), rel=1e-4)


def test_cross_entropy_is_finite_where_the_probability_is_zero():
    x, memories = torch.eye(3)[:2].requires_grad_(), torch.eye(3)
    valid, target = torch.tensor([True, False, True]), torch.tensor([[0.25, 0.0, 0.75], [1.0, 0.0, 0.0]])
    # exponents (2, −∞, 0) and (0, −∞, 0)
    loss = losses.cross_entropy(x, target @ memories, memories, valid, 0.5)
    expected = [math.log(math.exp(2) + 1) - 2 * 0.25, math.log(2)]
    assert loss.tolist() == pytest.approx(expected)
    loss.sum().backward()
    p = [math.exp(2) / (math.exp(2) + 1), 0.5]
    assert_close(
        x.grad, [[(p[0] - 0.25) / 0.5, 0, (1 - p[0] - 0.75) / 0.5], [(p[1] - 1) / 0.5, 0, (1 - p[1]) / 0.5]]
    )


@pytest.mark.parametrize("whole_bank", [False, True], ids=["drawn", "whole_bank"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_robust_xid_agrees_with_the_equations(estimator, piece, whole_bank):
    w = example(whole_bank=whole_bank)
    r = float64(w)
    assert_close(
        robust_xid(w, 0.5, estimator), reference_losses(r, 0.5, *reference_soft_targets(r, estimator))
    )


@pytest.mark.parametrize(
    "soft, estimator", [(0.0, "cycle"), *((0.5, name) for name in ESTIMATORS), (1.0, "neighbor")]
)
def test_gradients_agree_with_finite_differences(soft, estimator, piece):
    w = example()
    weight = torch.tensor([0.3, 1.0, 0.3, 0.8, 0.5])
    losses.weighted_mean(robust_xid(w, soft, estimator), weight).backward()
    r, weight = float64(w), weight.double().numpy()
    S = reference_soft_targets(r, estimator)
    for modality in ("video", "audio"):
        x, step = getattr(r, modality), 1e-5
        gradient = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            for sign in (1, -1):
                x[place] += sign * step
                gradient[place] += (
                    sign * (weight * reference_losses(r, soft, *S)).sum() / weight.sum() / (2 * step)
                )
                x[place] -= sign * step
        assert_close(getattr(w, modality).grad, gradient)


@contextlib.contextmanager
def in_float64(piece):
    """Makes the losses compute in float64 instead of float32, with `piece` candidates at a time."""
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(losses, "PIECE", piece),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@settings(max_examples=100, deadline=None)
@given(
    estimator=st.sampled_from(ESTIMATORS),
    soft=st.sampled_from([0.0, 0.3, 1.0]),
    batch=st.integers(1, 6),
    instances=st.integers(6, 40),
    negatives=st.integers(0, 60),
    dim=st.integers(1, 9),
    piece=st.integers(1, 70),
    tau=st.floats(0.02, 1),
    tau_s=st.floats(0.01, 1),
    tau_t=st.floats(0.03, 1),
    seed=st.integers(0, 2**31),
)
def test_the_fast_form_equals_the_plain_form(
    estimator, soft, batch, instances, negatives, dim, piece, tau, tau_s, tau_t, seed
):
    """Losses and gradients, for any shape. An instance that is drawn twice is valid once."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(instances, (batch,), generator=generator)
    with in_float64(piece):
        bank = memory_bank.MemoryBank(instances, dim, 0.5, seed)
        found = bank.candidates(index, negatives, seed)
        assert found.valid.sum() == len(set(found.index.tolist()))
        live = [F.normalize(torch.randn(batch, dim, generator=generator), dim=1) for _ in range(2)]
        results = []
        for form in (losses.robust_xid_by_matrices, losses.robust_xid):
            video, audio = (x.clone().requires_grad_() for x in live)
            memories = bank.read("video", found.index), bank.read("audio", found.index)
            taus = {"temperature": tau, "tau_s": tau_s, "tau_t": tau_t}
            loss = form(
                video, audio, *memories, found.valid, found.column, soft=soft, estimator=estimator, **taus
            )
            weight = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
            losses.weighted_mean(loss, weight).backward()
            results.append((loss.detach(), video.grad, audio.grad))
    for plain, fast in zip(*results, strict=True):
        assert plain.dtype == fast.dtype == torch.float64
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_plain_form_agrees_with_the_equations(estimator):
    w = example()
    r = float64(w)
    S = reference_soft_targets(r, estimator)
    taus = dict(temperature=TAU, tau_s=TAU_S, tau_t=TAU_T)
    w = SimpleNamespace(**{k: x.double() if x.is_floating_point() else x for k, x in vars(w).items()})
    loss = losses.robust_xid_by_matrices(
        w.video, w.audio, w.bank_video, w.bank_audio, w.valid, w.column, soft=0.5, estimator=estimator, **taus
    )
    assert_close(loss, reference_losses(r, 0.5, *S), tolerance=1e-12)
    memories = (w.own_video, w.own_audio, w.bank_video[w.valid], w.bank_audio[w.valid])
    for ours, reference in zip(
        losses.soft_target_matrices(estimator, *memories, TAU_S, TAU_T), S, strict=True
    ):
        assert_close(ours, reference[:, np.array(r.valid)], tolerance=1e-12)


def test_plain_xid_is_the_cross_entropy_of_the_pair():
    w = example()
    logits_v = (w.video @ w.bank_audio.T / TAU)[:, w.valid]  # B×valid
    logits_a = (w.audio @ w.bank_video.T / TAU)[:, w.valid]
    column = w.valid.cumsum(0)[w.column] - 1
    expected = F.cross_entropy(logits_v, column, reduction="none") + F.cross_entropy(
        logits_a, column, reduction="none"
    )
    assert_close(robust_xid(w, soft=0.0), expected.detach().numpy())


def test_invalid_candidates_do_not_change_the_loss():
    w = example()
    loss = robust_xid(w)
    assert not set(w.column.tolist()) & set((~w.valid).nonzero().flatten().tolist())
    w.bank_video[~w.valid] = w.own_video[0].clone()
    w.bank_audio[~w.valid] = w.own_audio[1].clone()
    assert torch.equal(robust_xid(w), loss)


def test_memories_get_no_gradient():
    w = example()
    memories = [w.bank_video, w.bank_audio]
    for memory in memories:
        memory.requires_grad_()
    robust_xid(w).sum().backward()
    assert all(memory.grad is None for memory in memories)
    assert w.video.grad.abs().max() > 0 and w.audio.grad.abs().max() > 0


@pytest.mark.parametrize("soft", [0.0, 0.5])
def test_no_tensor_is_larger_than_the_number_of_candidates(soft, monkeypatch):
    """Forward makes no larger tensor, and what it saves for backward does not grow with the candidates."""
    monkeypatch.setattr(losses, "PIECE", 8)
    w, created, kept = example(negatives=300), [], []
    candidates = len(w.valid)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            created.extend(
                x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not x._is_view()
            )
            return result

    with (
        Watch(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x),
    ):
        loss = robust_xid(w, soft)
    assert max(created) == candidates and max(kept) <= 5 * 6
    (gradient,) = torch.autograd.grad(loss.sum(), w.video)
    monkeypatch.setattr(losses, "PIECE", 8192)
    assert_close(gradient, torch.autograd.grad(robust_xid(w, soft).sum(), w.video)[0].numpy())


def test_a_robust_step_over_many_candidates_agrees_with_float64():
    """Enough candidates for several pieces. Loss and gradient against log-softmax and B×C targets."""
    n, batch, dim = 20000, 6, 16
    video, audio = unit(n, dim, seed=0), F.normalize(unit(n, dim, seed=0) + unit(n, dim, seed=1), dim=1)
    column, valid = (
        torch.arange(batch) * 3000,
        torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.9,
    )
    valid[column] = True
    v, a = (
        F.normalize(x[column] + 0.3 * unit(batch, dim, seed=2), dim=1).requires_grad_()
        for x in (video, audio)
    )
    example = SimpleNamespace(
        video=v, audio=a, bank_video=video, bank_audio=audio, valid=valid, column=column
    )
    loss = robust_xid(example)
    loss.sum().backward()

    video, audio = video.double(), audio.double()
    own_video, own_audio, outside = video[column], audio[column], torch.where(valid, 0.0, -math.inf).double()
    last = (video * audio).sum(1) / TAU_T + outside
    S_v, S_a = (
        F.softmax(own_audio @ video.T / TAU_S + last, 1),
        F.softmax(own_video @ audio.T / TAU_S + last, 1),
    )
    expected = []
    for x, S, memories in ((v, S_v, audio), (a, S_a, video)):
        x = x.detach().double().requires_grad_()
        log_p = F.log_softmax(x @ memories.T / TAU + outside, 1).clamp(min=-1e9)
        target = 0.5 * S
        target[torch.arange(batch), column] += 0.5
        expected.append(-(target * log_p).sum(1))
        (gradient,) = torch.autograd.grad(expected[-1].sum(), x)
        assert_close((v if memories is audio else a).grad, gradient.numpy())
    assert_close(loss, sum(expected).detach().numpy())


def test_weighted_mean_divides_by_the_weights():
    loss, weight = torch.tensor([2.0, 8.0, 5.0]), torch.tensor([1.0, 0.25, 0.5])
    assert losses.weighted_mean(loss, weight) == pytest.approx((2 + 2 + 2.5) / 1.75)
    assert losses.weighted_mean(loss, torch.ones(3)) == pytest.approx(5)
    assert losses.weighted_mean(loss, torch.zeros(3)) == 0


def test_ranks_that_share_their_total_weight_average_to_the_global_loss():
    loss, weight = torch.arange(1.0, 7.0), torch.tensor([1.0, 0.3, 0.9, 0.2, 0.25, 0.6])
    share = weight.sum() / 2  # two ranks
    ranks = [losses.weighted_mean(loss[part], weight[part], share) for part in (slice(0, 2), slice(2, 6))]
    assert sum(ranks) / 2 == pytest.approx(losses.weighted_mean(loss, weight).item())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("soft, estimator", [(0.0, "cycle"), *((0.5, name) for name in ESTIMATORS)])
def test_a_collapsed_bank_gives_finite_losses_and_gradients(soft, estimator, batch, sign):
    w = example()
    one = unit(6, seed=9)
    w.bank_video = one.expand_as(w.bank_video).clone()
    w.bank_audio = sign * one.expand_as(w.bank_audio)
    w.column = w.column[:batch]
    w.video, w.audio = (x.detach()[:batch].requires_grad_() for x in (w.video, w.audio))
    loss = robust_xid(w, soft, estimator)
    loss.sum().backward()
    assert_close(loss, np.full(batch, 2 * math.log(w.valid.sum())))  # no candidate stands out
    assert torch.isfinite(w.video.grad).all() and torch.isfinite(w.audio.grad).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_single_candidate_has_zero_loss(estimator):
    w = example()
    w = SimpleNamespace(**{name: x[:1].detach() for name, x in vars(w).items()})
    assert robust_xid(w, 0.5, estimator).item() == pytest.approx(0, abs=1e-5)


# ----------------------------------------------------------------- contrast with several positives, section 7


def reference_contrast(x, matched, positives, negatives, temperature):
    """The equation of section 7, written with loops in float64."""
    x, matched, positives, negatives = (t.detach().double() for t in (x, matched, positives, negatives))
    values = []
    for i in range(len(x)):
        against = sum(math.exp(x[i] @ n / temperature) for n in negatives[i])
        terms = [math.exp(x[i] @ p / temperature) for p in (matched[i], *positives[i])]
        values.append(-sum(math.log(term / (term + against)) for term in terms) / len(terms))
    return torch.tensor(values, dtype=torch.double)


@pytest.mark.parametrize("n_pos", [0, 1, 4])
@pytest.mark.parametrize("rows", [1, 7])
def test_contrast_agrees_with_the_equation(n_pos, rows):
    generator = torch.Generator().manual_seed(0)
    x, matched = (F.normalize(torch.randn(rows, 8, generator=generator), dim=1) for _ in range(2))
    positives, negatives = (
        F.normalize(torch.randn(rows, n, 8, generator=generator), dim=2) for n in (n_pos, 20)
    )
    loss = losses.contrast(x, matched, positives, negatives, 0.07)
    torch.testing.assert_close(
        loss.double(), reference_contrast(x, matched, positives, negatives, 0.07), atol=1e-5, rtol=1e-5
    )


def test_contrast_gives_gradients_to_both_clips_and_not_to_memories():
    x, matched, near, far = (
        torch.randn(shape, dtype=torch.double, requires_grad=True)
        for shape in ((3, 4), (3, 4), (3, 2, 4), (3, 5, 4))
    )
    loss = losses.contrast(x.float(), matched.float(), near.float(), far.float(), 0.5).sum()
    loss.backward()
    assert near.grad is None and far.grad is None
    for tensor in (x, matched):
        for at in ((0, 0), (2, 3)):
            step = torch.zeros_like(tensor)
            step[at] = 1e-4
            up, down = (
                reference_contrast(
                    *(t + s * step if t is tensor else t for t in (x, matched, near, far)), 0.5
                ).sum()
                for s in (1, -1)
            )
            assert tensor.grad[at].item() == pytest.approx(((up - down) / 2e-4).item(), abs=1e-4)


def test_contrast_of_extreme_logits_is_finite():
    ones = F.normalize(torch.ones(2, 4), dim=1)
    loss = losses.contrast(ones, -ones, ones[:, None], ones[:, None], 0.001)
    assert loss.isfinite().all()
