"""The memory bank against plain loops and sets: its memories, its draws, and its running sums."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from avid import config, data
from avid.memory_bank import MemoryBank, _skip, draw_sample, row_seed


def batch(num_instances, size, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(num_instances, (size,), generator=generator)
    video, audio = F.normalize(torch.randn(2, size, dim, generator=generator), dim=2)
    return index, video, audio


def collapse(bank, video, audio):
    """Move every memory all the way to one direction (the bank's momentum must be 0)."""
    n = len(bank.video)
    bank.update(torch.arange(n), video.expand(n, -1), audio.expand(n, -1))


def all_finite(bank):
    return all(torch.isfinite(x).all() for x in bank.state_dict().values())


def test_a_fresh_bank_is_random_on_the_sphere_and_the_same_for_a_seed():
    bank, again, other = MemoryBank(500, 16, 0.5, 3), MemoryBank(500, 16, 0.5, 3), MemoryBank(500, 16, 0.5, 4)
    for modality in ("video", "audio"):
        memory = getattr(bank, modality)
        assert memory.shape == (500, 16) and memory.dtype == torch.float32
        assert torch.allclose(memory.norm(dim=1), torch.ones(500))
        assert memory.mean(0).norm() < 0.15  # 1 / √500 = 0.045 expected
        assert torch.equal(memory, getattr(again, modality)) and not torch.equal(
            memory, getattr(other, modality)
        )
    mean, std = bank.agreement_mean_std()
    # the memories of the two modalities are independent
    assert abs(mean) < 0.05 and std == pytest.approx(1 / 16**0.5, rel=0.15)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_update_moves_the_memory_of_an_instance_once(momentum):
    bank = MemoryBank(12, 6, momentum, 0)
    expected = {name: getattr(bank, name).double().numpy().copy() for name in ("video", "audio")}
    _, video, audio = batch(12, 6, 6, 1)
    index = [4, 9, 4, 0, 9, 4]
    bank.update(torch.tensor(index), video, audio)
    for name, x in (("video", video), ("audio", audio)):
        for b, i in enumerate(index):
            if i not in index[:b]:
                moved = momentum * expected[name][i] + (1 - momentum) * x[b].double().numpy()
                expected[name][i] = moved / np.sqrt((moved**2).sum())
        np.testing.assert_allclose(getattr(bank, name).numpy(), expected[name], atol=1e-6)
    agreement = [float(v @ a) for v, a in zip(expected["video"], expected["audio"], strict=True)]
    np.testing.assert_allclose(bank.agreement.numpy(), agreement, atol=1e-6)


def test_the_bank_stays_float32_and_out_of_the_graph_with_bf16_embeddings():
    bank, same = MemoryBank(20, 8, 0.5, 0), MemoryBank(20, 8, 0.5, 0)
    index, video, audio = batch(20, 8, 8, 0)
    video, audio = video.bfloat16().requires_grad_(), audio.bfloat16().requires_grad_()
    bank.update(index, video, audio)
    same.update(index, video.float(), audio.float())
    assert bank.video.dtype == bank.audio.dtype == torch.float32 and not bank.video.requires_grad
    assert torch.equal(bank.video, same.video) and torch.equal(bank.audio, same.audio)


@pytest.mark.parametrize("dtype, rounding", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_a_half_precision_bank_follows_the_float32_one_and_tracks_its_own_agreement(
    dtype, rounding, tmp_path
):
    whole, bank = MemoryBank(60, 8, 0.5, 0), MemoryBank(60, 8, 0.5, 0, dtype)
    assert (
        bank.video.dtype == bank.audio.dtype == getattr(torch, dtype)
        and bank.agreement.dtype == torch.float32
    )
    assert torch.equal(bank.video, whole.video.to(bank.video.dtype))
    for seed in range(200):
        index, video, audio = batch(60, 32, 8, seed)
        for each in (whole, bank):
            each.update(index, video, F.normalize(video + 0.5 * audio, dim=1))
    # each update halves the error: at most two roundings remain, and a little more after normalising
    for name in ("video", "audio"):
        error = (getattr(bank, name).float() - getattr(whole, name)).abs().max()
        assert 0 < error < 4 * rounding
    stored = (bank.video.double() * bank.audio.double()).sum(1)
    assert torch.allclose(bank.agreement.double(), stored, atol=1e-6)
    assert bank.agreement_sum == pytest.approx(bank.agreement.double().sum().item(), abs=1e-10)
    assert bank.agreement_sum_squares == pytest.approx(
        bank.agreement.double().square().sum().item(), abs=1e-10
    )
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other = MemoryBank(60, 8, 0.5, 1, dtype)
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    assert all(torch.equal(x, other.state_dict()[name]) and x.dtype == other.state_dict()[name].dtype
               for name, x in bank.state_dict().items())  # fmt: skip


def test_running_mean_and_std_equal_the_full_ones_after_many_updates():
    bank = MemoryBank(60, 8, 0.5, 0)
    for seed in range(400):
        index, video, audio = batch(60, 32, 8, seed)  # some instance is almost always in the batch twice
        bank.update(index, video, F.normalize(video + 0.5 * audio, dim=1) if seed % 2 else audio)
    full = [
        float(v @ a) for v, a in zip(bank.video.double().numpy(), bank.audio.double().numpy(), strict=True)
    ]
    mean, std = bank.agreement_mean_std()
    assert mean.item() == pytest.approx(np.mean(full), abs=1e-6) and std.item() == pytest.approx(
        np.std(full), abs=1e-6
    )
    stored = bank.agreement.double()
    assert bank.agreement_sum == pytest.approx(stored.sum().item(), abs=1e-10)
    assert bank.agreement_sum_squares == pytest.approx(stored.square().sum().item(), abs=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_candidates_are_the_batch_and_the_drawn_negatives_each_instance_valid_once(seed):
    bank = MemoryBank(40, 4, 0.5, 0)
    index, _, _ = batch(40, 16, 4, seed)
    c = bank.candidates(index, 30, seed)
    instances, seen = c.index.tolist(), set()
    assert (
        len(instances) == 16 + 30
        and instances[:16] == index.tolist()
        and 0 <= min(instances) <= max(instances) < 40
    )
    for instance, valid in zip(instances, c.valid.tolist(), strict=True):
        assert valid == (instance not in seen)
        seen.add(instance)
    assert c.column.tolist() == [instances.index(i) for i in index.tolist()]
    assert c.valid[c.column].all()


def test_all_candidates_are_the_bank_itself():
    bank = MemoryBank(9, 4, 0.5, 0)
    c = bank.candidates(torch.tensor([5, 2, 5]), "all", 0)
    assert c.valid.tolist() == [True] * 9 and c.column.tolist() == [5, 2, 5]
    for name in ("video", "audio", "agreement"):
        assert bank.read(name, c.index) is getattr(bank, name)  # no copy


def test_draws_depend_on_the_seed_alone():
    bank, index = MemoryBank(1000, 4, 0.5, 0), torch.tensor([1, 2])
    first = bank.candidates(index, 64, 7)
    torch.manual_seed(0)
    bank.update(*batch(1000, 16, 4, 0))
    assert torch.equal(bank.candidates(index, 64, 7).index, first.index)
    assert not torch.equal(bank.candidates(index, 64, 8).index, first.index)


def test_negatives_are_drawn_uniformly():
    bank = MemoryBank(10, 4, 0.5, 0)
    drawn = torch.cat([bank.candidates(torch.tensor([0]), 100, seed).index[1:] for seed in range(100)])
    counts = torch.bincount(drawn, minlength=10)
    assert (counts - 1000).abs().max() < 5 * 30  # five standard deviations: √(10000 · 0.1 · 0.9) = 30


def test_a_step_never_reads_the_whole_bank():
    bank, touched = MemoryBank(5000, 4, 0.5, 0), set()
    whole = {x.untyped_storage().data_ptr() for x in (bank.video, bank.audio, bank.agreement)}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
            if any(x.numel() >= 5000 or x.untyped_storage().data_ptr() in whole for x in tensors):
                touched.add(function.overloadpacket)
            return result

    with Watch():
        bank.update(*batch(5000, 32, 4, 0))
        bank.candidates(torch.arange(32), 64, 0)
        bank.agreement_mean_std()
    assert touched == {torch.ops.aten.index_select, torch.ops.aten.index_put_}  # rows read, rows written


@pytest.mark.parametrize("num_instances", [1, 2, 50])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_collapsed_bank_stays_finite(num_instances, sign):
    bank = MemoryBank(num_instances, 8, 0.0, 0)
    one = F.normalize(torch.arange(1.0, 9.0), dim=0)
    for _ in range(3):
        collapse(bank, one, sign * one)
        bank.update(torch.tensor([0]), one[None], sign * one[None])  # a batch of one
    mean, std = bank.agreement_mean_std()
    assert all_finite(bank) and mean.item() == pytest.approx(sign, abs=1e-6) and 0 <= std.item() < 1e-6
    health = bank.health()
    expected = 1.0 if num_instances > 1 else 0.0  # a single instance has no other
    assert health["cosine_video"] == pytest.approx(expected, abs=1e-5)
    assert health["agreement_mean"] == pytest.approx(sign, abs=1e-6)


def test_rounding_never_makes_the_variance_negative():
    bank = MemoryBank(3, 4, 0.5, 0)
    bank.agreement_sum.fill_(3 * 0.1)
    bank.agreement_sum_squares.fill_(3 * 0.1**2 - 1e-15)
    assert bank.agreement_mean_std()[1] == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), "opposite"])
def test_an_embedding_that_cannot_be_normalised_leaves_the_memory_unchanged(broken):
    bank = MemoryBank(6, 4, 0.5, 0)
    index, (video, audio) = torch.tensor([1, 4]), F.normalize(torch.ones(2, 2, 4), dim=2)
    before = bank.video.clone()
    video[0] = -bank.video[1] if broken == "opposite" else broken
    bank.update(index, video, audio)
    assert (
        all_finite(bank)
        and torch.equal(bank.video[1], before[1])
        and not torch.equal(bank.video[4], before[4])
    )
    assert bank.agreement[1] == pytest.approx((bank.video[1] @ bank.audio[1]).item(), abs=1e-6)
    assert torch.allclose(bank.video.norm(dim=1), torch.ones(6))
    assert bank.agreement_mean_std()[0].item() == pytest.approx(bank.agreement.mean().item(), abs=1e-6)


def test_health_is_the_mean_cosine_of_two_instances():
    bank = MemoryBank(30, 6, 0.5, 0)
    bank.update(torch.arange(20), *(F.normalize(torch.ones(20, 6), dim=1),) * 2)
    health = bank.health()
    for name in ("video", "audio"):
        x = getattr(bank, name).double().numpy()
        pairs = [x[i] @ x[j] for i in range(30) for j in range(30) if i != j]
        assert health[f"cosine_{name}"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert health["agreement_mean"] == pytest.approx(bank.agreement.mean().item(), abs=1e-6)
    assert health["agreement_std"] == pytest.approx(bank.agreement.std(correction=0).item(), abs=1e-6)
    assert all(isinstance(value, float) for value in health.values())


def test_a_bank_loaded_from_its_state_continues_identically(tmp_path):
    bank, other = MemoryBank(40, 8, 0.5, 0), MemoryBank(40, 8, 0.5, 1)
    for seed in range(5):
        bank.update(*batch(40, 16, 8, seed))
    torch.save(bank.state_dict(), tmp_path / "bank.pt")
    other.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    for seed in range(5, 10):
        bank.update(*batch(40, 16, 8, seed))
        other.update(*batch(40, 16, 8, seed))
    for name, x in bank.state_dict().items():
        assert torch.equal(x, other.state_dict()[name]), name
    assert bank.agreement_mean_std() == other.agreement_mean_std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda_draws_the_same_and_never_waits_for_the_device():
    host, bank = MemoryBank(300, 8, 0.5, 0), MemoryBank(300, 8, 0.5, 0).cuda()
    index, video, audio = batch(300, 64, 8, 0)
    on_device = [x.cuda() for x in (index, video, audio)]
    bank.update(*on_device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        bank.update(*on_device)
        c = bank.candidates(on_device[0], 128, 5)
        bank.agreement_mean_std()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host.update(index, video, audio)
    host.update(index, video, audio)
    assert torch.allclose(bank.video.cpu(), host.video, atol=1e-6)
    for name, x in vars(host.candidates(index, 128, 5)).items():
        assert torch.equal(getattr(c, name).cpu(), x), name


# ---------------------------------------------------------------------------------- neighbourhoods, section 7


def neighbourhoods(bank, contrast, draws, instance=3, modality="audio"):
    index = torch.full((draws,), instance)
    return bank.neighbourhood(modality, index, contrast, range(draws))


def test_positives_are_drawn_by_similarity_from_the_nearest_and_negatives_from_the_rest():
    """χ² of many first draws against exp(sim/τ). No other instances are drawn."""
    bank = MemoryBank(12, 4, 0.5, seed=0)
    contrast = config.Contrast(n_pos=1, k_pos=4, tau_p=0.5, negatives=1, tau_n=0.5)
    draws = 4000
    positives, negatives = neighbourhoods(bank, contrast, draws)
    similarity = (bank.audio @ bank.audio[3]).double()
    similarity[3] = -math.inf
    nearest = similarity.topk(4).indices
    rest = torch.tensor([i for i in range(12) if i != 3 and i not in nearest])
    for drawn, among, tau in ((positives[:, 0], nearest, 0.5), (negatives[:, 0], rest, 0.5)):
        assert set(drawn.tolist()) <= set(among.tolist())
        expected = draws * (similarity[among] / tau).softmax(0)
        counts = torch.bincount(drawn, minlength=12)[among]
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert chi_square < 30  # 3 and 6 degrees of freedom: p < 1e-4


def test_positives_and_negatives_are_drawn_without_replacement_and_do_not_overlap():
    bank = MemoryBank(40, 8, 0.5, seed=1)
    positives, negatives = neighbourhoods(bank, config.Contrast(n_pos=3, k_pos=6, negatives=20), 200)
    assert positives.shape == (200, 3) and negatives.shape == (200, 20)
    for near, far in zip(positives.tolist(), negatives.tolist(), strict=True):
        assert len({*near, *far, 3}) == 24


def test_uniform_negatives_are_uniform_and_harder_ones_are_nearer():
    bank = MemoryBank(60, 8, 0.5, seed=2)
    similarity = bank.audio @ bank.audio[3]
    uniform, hard = (
        neighbourhoods(bank, config.Contrast(k_pos=4, negatives=5, tau_n=tau), 2000)[1]
        for tau in (math.inf, 0.1)
    )
    counts = torch.bincount(uniform.flatten(), minlength=60)
    drawn = counts[counts > 0].double()
    assert len(drawn) == 60 - 4 - 1
    chi_square = ((drawn - drawn.mean()) ** 2 / drawn.mean()).sum()
    assert chi_square < 110  # 54 degrees of freedom: p < 1e-4
    assert similarity[hard].mean() > similarity[uniform].mean() + 0.1


def test_a_row_draws_the_same_at_any_place_in_the_batch():
    bank = MemoryBank(40, 8, 0.5, seed=1)
    contrast = config.Contrast(n_pos=2, k_pos=6, negatives=10)
    together = bank.neighbourhood("video", torch.tensor([3, 5]), contrast, [11, 12])
    alone = bank.neighbourhood("video", torch.tensor([5]), contrast, [12])
    assert all(torch.equal(x[1:], y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("tau_n", [math.inf, 0.5])
def test_neighbours_drawn_ahead_in_decoding_processes_are_the_same(tau_n):
    """Each place in the batch of a training step has its own seed. The loader stacks the draws."""
    bank, contrast = (
        MemoryBank(40, 8, 0.5, seed=1),
        config.Contrast(n_pos=2, k_pos=6, negatives=10, tau_n=tau_n),
    )
    cfg = config.load("temporal", ["seed=5", "contrast.n_pos=2", "contrast.k_pos=6", "contrast.negatives=10"])
    cfg.contrast.tau_n = tau_n
    clips = data.Clips(range(40), cfg, training=True)
    items = [clips.neighbours((data.OF_A_STEP, 7, place)) for place in (2, 3)]
    batch = torch.utils.data.default_collate(items)
    index = torch.tensor([3, 5])
    for modality in data.MODALITIES:
        seeds = [row_seed(5, modality, 7, place) for place in (2, 3)]
        ahead = bank.neighbourhood(
            modality, index, contrast, seeds, (batch[f"near_{modality}"], batch[f"far_{modality}"])
        )
        now = bank.neighbourhood(modality, index, contrast, seeds)
        assert all(torch.equal(x, y) for x, y in zip(ahead, now, strict=True))
    assert clips.neighbours((5, 0, 0)) == {}  # not the draw of a training step


def test_seeds_differ_by_seed_modality_step_and_place_and_never_by_process():
    seeds = [
        row_seed(*key) for key in itertools.product((0, 1), ("video", "audio"), (0, 1, 1000), (0, 1, 255))
    ]
    assert len(set(seeds)) == len(seeds) == 36 and all(0 <= seed < 2**63 for seed in seeds)
    script = "from avid.memory_bank import row_seed; print(row_seed(3, 'audio', 5, 7))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert int(done.stdout) == row_seed(3, "audio", 5, 7)


def test_no_extra_positives_and_a_small_bank():
    bank = MemoryBank(8, 4, 0.5, seed=1)
    positives, negatives = neighbourhoods(bank, config.Contrast(n_pos=0, k_pos=0, negatives=100), 3)
    assert positives.shape == (3, 0) and sorted(negatives[0].tolist()) == [0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="lower it"):
        neighbourhoods(bank, config.Contrast(k_pos=7), 1)


def test_skip_leaves_out_the_excluded_numbers():
    excluded = torch.tensor([[7, 0, 3], [2, 1, 0], [9, 8, 4]])
    left = _skip(torch.arange(7).repeat(3, 1), excluded)
    assert left.tolist() == [[i for i in range(10) if i not in row] for row in excluded.tolist()]


def test_neighbours_in_a_half_precision_bank():
    bank = MemoryBank(40, 8, 0.5, 1, "bfloat16")
    contrast = config.Contrast(n_pos=4, k_pos=4, negatives=10, tau_n=0.5)
    positives, negatives = neighbourhoods(bank, contrast, 20)
    similarity = bank.audio.float() @ bank.audio[3].float()
    similarity[3] = -math.inf
    nearest = set(similarity.topk(4).indices.tolist())
    assert all(set(row) == nearest for row in positives.tolist())
    assert not nearest & set(negatives.flatten().tolist()) and 3 not in negatives


# ----------------------------------------------------------------------------- neighbourhoods out of a sample


def test_a_sample_is_uniform_and_without_repeats():
    contrast = config.Contrast(sample=6)
    samples = torch.stack([draw_sample(15, contrast, seed) for seed in range(4000)])  # 4000×6
    assert all(len(set(row)) == 6 for row in samples.tolist())
    for place in (0, 5):  # in random order: each place is uniform
        counts = torch.bincount(samples[:, place], minlength=15).double()
        assert ((counts - 4000 / 15) ** 2 / (4000 / 15)).sum() < 40  # χ², 14 degrees of freedom: p < 1e-3
    together = torch.zeros(15, 15)
    for row in samples.tolist():
        together[row[0], row[1]] += 1
    expected = 4000 / (15 * 14)
    off = together[~torch.eye(15, dtype=torch.bool)]
    assert ((off - expected) ** 2 / expected).sum() < 290  # 209 degrees of freedom: p < 2e-4
    assert draw_sample(15, config.Contrast(), 0) is None
    assert sorted(draw_sample(4, contrast, 0).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("tau_n", [math.inf, 0.5])
def test_neighbours_out_of_a_sample_follow_the_law_of_the_sampled_bank(tau_n):
    """Counts of positives and negatives against loops over all subsets of the others, in float64."""
    bank, itself, draws = MemoryBank(9, 4, 0.5, seed=0), 3, 6000
    contrast = config.Contrast(n_pos=1, k_pos=2, tau_p=0.5, negatives=2, tau_n=tau_n, sample=6)
    counts, right = torch.zeros(2, 9), torch.zeros(2, 9, dtype=torch.double)
    for seed in range(draws):
        sample = draw_sample(9, contrast, seed)
        near, far = bank.neighbourhood(
            "audio", torch.tensor([itself]), contrast, [seed + draws], None, sample
        )
        assert itself not in near and itself not in far
        assert {*near[0].tolist(), *far[0].tolist()} <= set(sample.tolist())
        counts[0, near[0]] += 1
        counts[1, far[0]] += 1
    similarity = (bank.audio.double() @ bank.audio[itself].double()).tolist()
    others = [i for i in range(9) if i != itself]
    subsets = list(itertools.combinations(others, 5))  # sample − 1 of the others, all equally likely
    for subset in subsets:
        ranked = sorted(subset, key=lambda i: -similarity[i])
        nearest, rest = ranked[:2], ranked[2:]
        weights = [math.exp(similarity[i] / 0.5) for i in nearest]
        for i, w in zip(nearest, weights, strict=True):
            right[0, i] += w / sum(weights) / len(subsets)
        weights = [math.exp(similarity[i] / tau_n) for i in rest]
        for first, second in itertools.permutations(range(3), 2):  # two of the three, one after the other
            p = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
            for i in (rest[first], rest[second]):
                right[1, i] += p / len(subsets)
    for found, expected in zip(counts.double(), right * draws, strict=True):
        possible = expected > 0
        assert not found[~possible].any()
        chi_square = ((found - expected) ** 2 / expected)[possible].sum()
        assert chi_square < 35  # at most 7 degrees of freedom: p < 2e-5


def test_a_sample_of_all_instances_has_the_neighbours_of_the_bank():
    bank = MemoryBank(30, 8, 0.5, seed=1)
    contrast = config.Contrast(n_pos=3, k_pos=3, negatives=100, sample=30)
    index = torch.tensor([3, 17])
    sample = draw_sample(30, contrast, 4)
    near, far = bank.neighbourhood("video", index, contrast, [1, 2], None, sample)
    whole = bank.neighbourhood("video", index, contrast, [1, 2])
    for one, other in zip((near, far), whole, strict=True):
        assert torch.equal(one.sort(1).values, other.sort(1).values)
    memories = bank.neighbours("video", index, contrast, [1, 2], None, sample)
    assert torch.equal(memories[0], bank.video[near]) and torch.equal(memories[1], bank.video[far])


def test_the_cost_of_a_sample_does_not_depend_on_the_size_of_the_bank():
    """Only the rows of the sample are read and multiplied, for any N."""
    contrast = config.Contrast(n_pos=1, k_pos=2, negatives=4, sample=20)
    for n in (50, 500):
        bank, read = MemoryBank(n, 4, 0.5, seed=0), []
        real = bank.read
        bank.read = lambda name, index, real=real, read=read: read.append(index.numel()) or real(name, index)
        bank.neighbours("audio", torch.arange(3), contrast, [1, 2, 3], None, draw_sample(n, contrast, 0))
        assert sorted(read) == [3, 20]
