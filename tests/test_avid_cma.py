"""AVID and AVID+CMA: the losses against their equations in float64 with loops, and training runs as a user
starts them.
"""

import math

import numpy as np
import pytest
import torch
from test_losses import unit
from test_train import TINY, assert_same, final, metrics

import train
from avid import avid_cma, config, losses
from avid.config import ConfigError
from avid.memory_bank import MemoryBank

TAU = 0.3


# ------------------------------------------------------------------------------------------------- the losses


def memories(batch=5, positives=3, negatives=17, dim=6):
    """Live embeddings x B×D, and memories: positives B×P×D, negatives B×K×D."""
    return (
        unit(batch, dim, seed=0).requires_grad_(),
        unit(batch, positives, dim, seed=1),
        unit(batch, negatives, dim, seed=2),
    )


def test_instance_loss_is_the_softmax_over_own_negatives():
    x, positives, negatives = memories()
    loss = losses.instance(x, positives, negatives, TAU)
    for i, row in enumerate(x.detach().double()):
        e_p = [math.exp(row @ p / TAU) for p in positives[i].double()]
        against = sum(math.exp(row @ n / TAU) for n in negatives[i].double())
        expected = -sum(math.log(e / (e + against)) for e in e_p) / len(e_p)
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


def test_nce_tells_data_from_noise():
    """−log P(data|p) of each positive, their mean, and −log P(noise|n) of each negative, their sum."""
    x, positives, negatives = memories()
    Z = losses.partition(x, negatives, TAU)
    scores = [
        math.exp(row @ n / TAU) for i, row in enumerate(x.detach().double()) for n in negatives[i].double()
    ]
    assert Z.item() == pytest.approx(sum(scores) / len(scores), rel=1e-5)
    loss = losses.nce(x, positives, negatives, TAU, Z)
    noise = negatives.shape[1] * Z.item()
    for i, row in enumerate(x.detach().double()):
        e_p = [math.exp(row @ p / TAU) for p in positives[i].double()]
        e_n = [math.exp(row @ n / TAU) for n in negatives[i].double()]
        expected = -sum(math.log(e / (e + noise)) for e in e_p) / len(e_p) - sum(
            math.log(noise / (e + noise)) for e in e_n
        )
        assert loss[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", [losses.instance, losses.nce])
def test_gradients_reach_the_live_embeddings_only_and_stay_finite(form):
    x, positives, negatives = memories()
    for m in (positives, negatives):
        m.requires_grad_()
    extra = (torch.tensor(2.0),) if form is losses.nce else ()
    form(x, positives, negatives, 0.01, *extra).sum().backward()  # e^{100}: no overflow
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert positives.grad is None and negatives.grad is None


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_own_negatives_are_compared_in_float32_under_autocast(low):
    x, positives, negatives = memories()
    for form, extra in ((losses.instance, ()), (losses.nce, (torch.tensor(1.5),))):
        plain = form(x, positives, negatives, 0.07, *extra)
        with torch.autocast("cpu", low):
            torch.testing.assert_close(form(x, positives, negatives, 0.07, *extra), plain, rtol=0, atol=0)
    plain = losses.partition(x, negatives, 0.07)
    with torch.autocast("cpu", low):
        assert torch.equal(losses.partition(x, negatives, 0.07), plain)


# ---------------------------------------------------------------------------------------------- own negatives


def test_own_negatives_are_uniform_and_never_the_sample_itself():
    bank = MemoryBank(7, 4, 0.5, 0)
    index = torch.tensor([2, 6, 2])
    drawn = torch.stack([bank.own_negatives(index, 5, seed) for seed in range(2000)])  # 2000×3×5
    assert drawn.shape == (2000, 3, 5)
    for row, i in enumerate(index.tolist()):
        counts = torch.bincount(drawn[:, row].flatten(), minlength=7)
        assert counts[i] == 0
        others = counts[counts > 0]
        assert len(others) == 6 and others.min() > 1500 and others.max() < 1850  # 1667 each
    assert (drawn[:, 0] != drawn[:, 2]).any(
        1
    ).float().mean() > 0.9  # each row has its own draw, even of the same instance
    assert torch.equal(bank.own_negatives(index, 5, 3), drawn[3])


def test_own_negatives_leave_out_excluded_instances():
    bank = MemoryBank(8, 4, 0.5, 0)
    index, excluded = torch.tensor([0, 5]), torch.tensor([[3, 7], [0, 6]])
    drawn = torch.cat([bank.own_negatives(index, 50, seed, excluded) for seed in range(20)], 1)
    assert set(drawn[0].tolist()) == {1, 2, 4, 5, 6}
    assert set(drawn[1].tolist()) == {1, 2, 3, 4, 7}
    with pytest.raises(ConfigError, match="leaves no negatives among 3 videos"):
        MemoryBank(3, 4, 0.5, 0).own_negatives(torch.tensor([0]), 5, 0, torch.tensor([[1, 2]]))


@pytest.mark.parametrize("form", ["softmax", "nce"])
def test_own_and_shared_candidates_are_equal_in_expectation(form):
    """Over many draws of K negatives the mean loss is the same, whether they are drawn for one sample or for
    all.
    """
    bank, K, draws = MemoryBank(5000, 8, 0.5, 0), 32, 1500
    index, x = torch.tensor([11]), unit(1, 8, seed=5)
    own, shared = [], []
    for seed in range(draws):
        negatives = {"own": bank.own_negatives(index, K, seed)}
        candidates = bank.candidates(index, K, seed)
        keep = candidates.valid.clone()
        keep[candidates.column] = False  # the sample itself is the positive
        negatives["shared"] = candidates.index[keep][None]
        for found, drawn in ((own, negatives["own"]), (shared, negatives["shared"])):
            pair = bank.audio[index][:, None], bank.audio[drawn]
            loss = (
                losses.instance(x, *pair, TAU)
                if form == "softmax"
                else losses.nce(x, *pair, TAU, torch.tensor(1.2))
            )
            found.append(loss.item())
    error = (np.var(own) / draws + np.var(shared) / draws) ** 0.5
    assert abs(np.mean(own) - np.mean(shared)) < 4 * error
    assert error < 0.02 * np.mean(own)


# -------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("by", ["consensus", "union", "video", "audio"])
def test_positives_are_the_most_similar_by_both_modalities(by, monkeypatch):
    monkeypatch.setattr(avid_cma, "SIMILARITIES", 100)  # blocks of 4 queries
    bank, k = MemoryBank(25, 5, 0.5, 1), 4
    found = torch.zeros(25, k, dtype=torch.int32)
    avid_cma.find_positives(found, bank, by)
    v, a = bank.video.double(), bank.audio.double()
    combine = {"consensus": min, "union": max, "video": lambda s, _: s, "audio": lambda _, h: h}[by]
    for i in range(25):
        alike = {j: combine(float(v[i] @ v[j]), float(a[i] @ a[j])) for j in range(25) if j != i}
        assert found[i].tolist() == sorted(sorted(alike, key=alike.get)[-k:])


def test_consensus_needs_similarity_in_both_modalities():
    """Sample 1 looks like sample 0 but sounds different. Sample 2 is somewhat similar to it in both
    modalities. By consensus sample 2 agrees with sample 0, and sample 1 does not.
    """
    bank = MemoryBank(3, 3, 0.5, 0)
    somewhat = torch.tensor([0.8, 0.6, 0.0])
    bank.video[:] = torch.stack([torch.eye(3)[0], torch.eye(3)[0], somewhat])
    bank.audio[:] = torch.stack([torch.eye(3)[0], torch.eye(3)[2], somewhat])
    for by, expected in (("consensus", 2), ("union", 1), ("video", 1), ("audio", 2)):
        found = torch.zeros(3, 1, dtype=torch.int32)
        avid_cma.find_positives(found, bank, by)
        assert found[0].item() == expected, by


class Step:
    """The bank, the loss terms and the embeddings of a training step."""

    def __init__(self, *settings, clips=4, moments=1, instances=20):
        self.cfg = config.load("toy", ["bank.candidates=own", "bank.num_negatives=9", *settings])
        self.bank = MemoryBank(instances, 6, 0.5, 0)
        self.terms = avid_cma.Discrimination(self.cfg, self.bank, warmup_steps=4, epoch_steps=2)
        self.index = torch.tensor([3, 11, 3, 7])[:clips]
        self.local = lambda x: x.repeat_interleave(moments, 0)
        self.video, self.audio = (unit(clips * moments, 6, seed=s).requires_grad_() for s in (8, 9))


def test_xid_is_the_sum_of_both_directions_over_own_negatives():
    step = Step(moments=2)
    loss = step.terms.xid(step.video, step.audio, step.index, step.local, 5, agreed=False)
    drawn = step.local(step.bank.own_negatives(step.index, 9, step.cfg.seed + 5))
    for i, instance in enumerate(step.local(step.index).tolist()):
        expected = 0.0
        for x, memory in ((step.video, step.bank.audio), (step.audio, step.bank.video)):
            e = torch.exp(memory @ x[i].detach() / step.cfg.loss.temperature)
            expected -= math.log(e[instance] / (e[instance] + e[drawn[i]].sum()))
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)


def test_the_partition_is_estimated_once():
    """It is estimated at the first step from the first negatives [A] and then kept, also in a checkpoint."""
    step = Step("loss.form=nce")
    assert set(step.terms.state_dict()) == {"partition"}
    step.terms.xid(step.video, step.audio, step.index, step.local, 0, agreed=False)
    first = step.terms.partition.item()
    negatives = step.bank.audio[step.bank.own_negatives(step.index, 9, step.cfg.seed)]
    assert first == pytest.approx(losses.partition(step.video, negatives, step.cfg.loss.temperature).item())
    step.terms.xid(step.video, step.audio, step.index, step.local, 1, agreed=False)
    assert step.terms.partition.item() == first
    other = Step("loss.form=nce").terms
    other.load_state_dict(step.terms.state_dict())
    assert other.estimated and other.partition.item() == first


def test_agreement_begins_after_the_warm_up_and_is_refreshed_every_few_epochs():
    step = Step("weights.cma=1", "agreement.positives=3", "agreement.every_epochs=5")
    found = []
    for number in range(30):
        assert step.terms.agrees(number) == (number >= 4)
        found.append(step.terms.positives.clone())
        index, video, audio = step.index, *(unit(4, 6, seed=100 + 2 * number + m) for m in (0, 1))
        step.bank.update(index, video, audio)
    changed = [n for n in range(1, 30) if not torch.equal(found[n], found[n - 1])]
    assert changed == [4, 14, 24]  # every 5 epochs of 2 steps
    assert set(step.terms.state_dict()) == {"positives"}


def test_cma_draws_positives_from_agreement_and_negatives_from_the_rest():
    step = Step("weights.cma=1", "agreement.positives=3", "agreement.negatives=6", instances=12)
    assert step.terms.agrees(4)
    alike = step.terms.positives[step.index].long()
    loss = step.terms.cma(step.video, step.audio, step.index, step.local, 4)
    drawn = step.bank.own_negatives(step.index, 6, 2**40 + step.cfg.seed + 4, alike)
    for i, instance in enumerate(step.index.tolist()):
        assert not {instance, *alike[i].tolist()} & set(drawn[i].tolist())
        expected = 0.0
        for x, memory in ((step.video, step.bank.video), (step.audio, step.bank.audio)):  # within a modality
            e = torch.exp(memory @ x[i].detach() / step.cfg.loss.temperature)
            against = e[drawn[i]].sum()
            expected -= sum(math.log(e[p] / (e[p] + against)) for p in alike[i]) / 3
        assert loss[i].item() == pytest.approx(expected, rel=1e-4)
    seen = step.bank.own_negatives(step.index, 9, step.cfg.seed + 4, alike)  # xid excludes the positives too
    excluded = step.terms.xid(step.video, step.audio, step.index, step.local, 4, agreed=True)
    plain = step.terms.xid(step.video, step.audio, step.index, step.local, 4, agreed=False)
    assert not any(set(a.tolist()) & set(n.tolist()) for a, n in zip(alike, seen, strict=True))
    assert not torch.equal(excluded, plain)


# ---------------------------------------------------------------------------------------------- training runs


SETTINGS = (
    "agreement.positives=4",
    "agreement.negatives=8",
    "agreement.every_epochs=2",
    "log.check_epochs=0",
)
AVID = ("bank.candidates=own", "loss.form=nce", "weights.xid=0.5", "optim.draws=copies")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tmp_path_factory.mktemp("world")


def pretrain(root, out, *settings):
    train.main(config.load("toy", [*TINY, f"data.root={root}", f"out={out}", *SETTINGS, *settings]))
    return final(out)


@pytest.fixture(scope="module")
def first_stage(world):
    """The folder of an AVID run."""
    pretrain(world, world / "avid", *AVID)
    return world / "avid"


def test_the_second_stage_begins_with_weights_bank_and_partition_of_the_first(world, first_stage, capfd):
    """With a learning rate of almost zero only the agreement is new: weights, bank and Z̄ are those of the
    first stage.
    """
    before = final(first_stage)
    init = (f"init={first_stage / 'last.pt'}", "optim.lr=1e-12", "bank.momentum=0.999999")
    after = pretrain(world, world / "cma", *AVID, "weights.cma=0.25", "optim.epochs=1", *init)
    assert f"beginning with the weights of {first_stage / 'last.pt'}; with its bank" in "".join(
        capfd.readouterr()
    )
    assert torch.equal(after["ancestor"]["partition"], before["ancestor"]["partition"])
    torch.testing.assert_close(after["bank"]["video"], before["bank"]["video"], atol=1e-3, rtol=0)
    for name, weight in after["network"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weight, before["network"][name], atol=1e-6, rtol=0, msg=name)
    bank = MemoryBank(24, 16, 0.5, 0)
    bank.load_state_dict(before["bank"])
    expected = torch.zeros(24, 4, dtype=torch.int32)
    avid_cma.find_positives(expected, bank, "consensus")
    assert torch.equal(after["ancestor"]["positives"], expected)
    assert {"xid", "cma"} <= next(line for line in metrics(world / "cma") if "loss" in line).keys()


def test_a_second_stage_without_a_first_is_refused(world):
    with pytest.raises(ConfigError, match=r"weights.cma needs a bank that has learned: init=CHECKPOINT"):
        pretrain(world, world / "none", *AVID, "weights.cma=0.25")


def test_weights_alone_come_from_a_run_on_other_videos(world, first_stage):
    """The bank of that run holds other instances, so it is not taken over, and weights.cma is refused."""
    init, other = f"init={first_stage / 'last.pt'}", "toy.train=16"
    with pytest.raises(ConfigError, match=r"weights.cma needs a bank that has learned"):
        pretrain(world, world / "other", *AVID, "weights.cma=0.25", other, init)
    after = pretrain(world, world / "other", *AVID, "optim.lr=1e-12", "optim.epochs=1", other, init)
    assert len(after["bank"]["video"]) == 16
    name = "video_proj.projection.0.weight"
    torch.testing.assert_close(after["network"][name], final(first_stage)["network"][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("form", ["softmax", "nce"])
def test_a_stopped_run_goes_on_with_the_same_positives_and_partition(world, form, monkeypatch):
    """Stopped between two searches for positives, a run ends in the same bits as an uninterrupted one."""
    settings = [*AVID[:1], f"loss.form={form}", "weights.cma=0.5", "loss.warmup_epochs=1", "optim.epochs=3"]
    whole = pretrain(world, world / f"whole-{form}", *settings)
    with monkeypatch.context() as patch:
        after = train.run.Watch.after

        def stop(watch, step, *arguments):
            after(watch, step, *arguments)
            if step == 4:
                watch.kept.save(step + 1)
                raise KeyboardInterrupt

        patch.setattr(train.run.Watch, "after", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain(world, world / f"stopped-{form}", *settings)
    resumed = pretrain(world, world / f"stopped-{form}", *settings)
    for part in ("network", "bank", "ancestor"):
        assert_same(whole[part], resumed[part])


def test_settings_that_do_not_fit_together_are_refused():
    for settings, complaint in (
        (["loss.form=nce"], "wrong value for loss.form: nce; expected softmax"),
        (["bank.candidates=own", "loss.soft=0.5"], "wrong value for loss.soft: 0.5; expected 0"),
        (
            ["bank.candidates=own", "bank.num_negatives=all"],
            "wrong value for bank.num_negatives: all; expected a count",
        ),
        (["bank.candidates=own", "bank.spread=true"], "wrong value for bank.spread: True; expected false"),
        (["weights.cma=1", "weights.xid=0"], "weights.cma=1.0 needs weights.xid above 0"),
    ):
        with pytest.raises(ConfigError) as caught:
            config.load("toy", settings)
        assert complaint in str(caught.value)


def test_pair_weights_train_with_own_negatives(world):
    """The pair weights of section 3 work with candidates of either kind."""
    pretrain(world, world / "weighted", "bank.candidates=own", "loss.w_min=0.25", "optim.epochs=1")
    assert all(math.isfinite(line["loss"]) for line in metrics(world / "weighted") if "loss" in line)
