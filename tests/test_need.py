"""data.need=any: files with only picture or only sound take part; terms that need both leave them out."""

import json
import shutil
import signal
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tone, write_media
from test_losses import unit

import train
from avid import (
    cli,
    config,
    data,
    datasets,
    distributed,
    evaluation,
    losses,
    memory_bank,
    models,
    temporal_tasks,
)
from avid.files import ConfigError
from avid.memory_bank import MemoryBank, PartialBank

BOTH, MUTE, SOUND = (True, True), (True, False), (False, True)
TASKS = (
    "temporal.moments=2 temporal.speeds=[1,2] temporal.reverse=true contrast.k_pos=2 contrast.n_pos=1 "
    "contrast.negatives=4 contrast.batch=true "
    + " ".join(f"weights.{name}=1" for name in vars(config.Weights()) if name != "cma")
).split()
SMALL = (
    "data.name=folder data.need=any data.workers=0 video.size=32 video.frames=4 audio.seconds=0.25 "
    "audio.mels=32 "
    "audio.rate_hz=16000 model.width=4 model.depth=1 model.embedding=16 bank.num_negatives=4 "
    "optim.batch_size=4 "
    "optim.epochs=2 log.every_steps=1 log.check_epochs=1"
).split()


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight videos: three with picture and sound, three mute, two sounds."""
    folder = tmp_path_factory.mktemp("videos")
    times, wave = np.arange(40) / 20, tone(440, 2.0, 16000)
    for i in range(3):
        write_media(folder / f"both{i}.mp4", times, wave * (1 - 0.2 * i), 16000)
        write_media(folder / f"mute{i}.mp4", times)
    for i in range(2):
        write_media(folder / f"sound{i}.wav", wave=wave, rate_hz=16000, codecs=(None, "pcm_s16le"))
    return folder


def settings(root, *more):
    return config.load("toy", [*SMALL, *TASKS, f"data.root={root}", *more])


def batch_of(cfg, root):
    """The collated training items of all eight files."""
    clips = data.training_clips(datasets.load(cfg.data, "train"), cfg)
    return data.collate([clips[i, (3, 0, i)] for i in range(len(clips))])


def test_a_batch_marks_what_each_file_holds_and_fills_in_what_it_lacks(videos):
    batch = batch_of(settings(videos), videos)
    assert batch["failures"] == []
    assert batch["held"].tolist() == [*[list(BOTH)] * 3, *[list(MUTE)] * 3, *[list(SOUND)] * 2]
    assert torch.equal(
        batch["audio"][3:6], batch["audio"][:3]
    )  # mute files take sound from the others in turn
    assert torch.equal(batch["video"][6:], batch["video"][:2])


def test_a_modality_that_no_file_of_the_batch_holds_is_none_and_its_output_zero(videos, tmp_path):
    for i in range(5):
        shutil.copy(videos / "sound0.wav", tmp_path / f"{i}.wav")
    cfg = settings(tmp_path)
    batch = data.to_device(batch_of(cfg, tmp_path), torch.device("cpu"), cfg.audio)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg))
    output = network(batch["video"], batch["audio"])
    assert batch["video"] is None and output.video.shape == output.audio.shape == (10, 16)
    assert output.video_features.shape == (10, 32) and not output.video.any() and output.audio.any(1).all()


def test_by_default_a_file_that_lacks_a_modality_is_not_used(videos):
    item = data.training_clips(
        datasets.load(config.Data("folder", str(videos)), "train"), settings(videos, "data.need=both")
    )[3, (3, 0, 3)]
    assert [reason for _, reason in item["failures"]][:1] == ["no sound"] and "held" not in item


def test_filled_in_clips_change_no_term(videos):
    """Terms and gradients are the same whatever fills in for a missing modality."""
    cfg = settings(videos, "loss.soft=0.5", "loss.w_min=0.25")
    batch = data.to_device(batch_of(cfg, videos), torch.device("cpu"), cfg.audio)
    torch.manual_seed(0)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).eval()  # no statistics across clips
    found = []
    for _ in range(2):
        bank = PartialBank(8, 16, 0.5, seed=0)
        objective = train.Objective(cfg, bank, SimpleNamespace(rank=0, size=1), epoch_steps=1)
        network.zero_grad()
        output = network(batch["video"], batch["audio"])
        terms, accuracies = objective(output, batch, batch["index"], 3)
        sum(terms.values()).backward()
        bank.update(batch["index"], output.video, output.audio)
        gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        found.append([*terms.values(), *accuracies.values(), *gradients, *bank.buffers()])
        assert len(terms) == len(vars(cfg.weights)) - 1 and all(term > 0 for term in terms.values())
        batch["audio"][6:12] = torch.randn_like(batch["audio"][6:12])  # of the mute files, two moments each
        batch["video"][12:] = torch.randn_like(batch["video"][12:])
    for before, after in zip(*found, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def terms_gradients_bank(cfg, items, rank=0, world=1):
    """(terms, gradients, bank) of a step of this rank on a batch of these items."""
    batch = data.to_device(data.collate(items), torch.device("cpu"), cfg.audio)
    torch.manual_seed(0)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).eval()  # no statistics across clips
    bank = PartialBank(8, 16, 0.5, seed=0)
    objective = train.Objective(cfg, bank, SimpleNamespace(rank=rank, size=world), epoch_steps=1)
    output, index = network(batch["video"], batch["audio"]), distributed.gather(batch["index"])
    terms, _ = objective(output, batch, index, 3)
    sum(terms.values()).backward()
    bank.update(index, output.video, output.audio)
    return terms, [torch.zeros(()) if p.grad is None else p.grad for p in network.parameters()], bank


def check_rank(rank, world, root, folder, order):
    """Runs in every rank; a failed assertion ends it with an exit code."""
    torch.set_num_threads(1)
    cfg = settings(root, "loss.soft=0.5", "loss.w_min=0.25")
    clips = data.training_clips(datasets.load(cfg.data, "train"), cfg)
    items = [clips[i, (data.OF_A_STEP, 3, position)] for position, i in enumerate(order)]
    terms, gradients, bank = terms_gradients_bank(cfg, [dict(item) for item in items])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    own = items[rank * len(items) // world : (rank + 1) * len(items) // world]
    own_terms, own_gradients, own_bank = terms_gradients_bank(cfg, own, rank, world)
    means = {name: distributed.total(term.detach()) / world for name, term in own_terms.items()}
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert len(terms) == len(vars(cfg.weights)) - 1 and all(term > 0 for term in terms.values())
    torch.testing.assert_close(means, {name: term.detach() for name, term in terms.items()}, **close)
    for local, whole in zip(own_gradients, gradients, strict=True):
        torch.testing.assert_close(
            distributed.total(local.expand_as(whole).contiguous()) / world, whole, **close
        )
    torch.testing.assert_close(dict(own_bank.named_buffers()), dict(bank.named_buffers()), **close)
    dist.destroy_process_group()


@pytest.mark.parametrize("order", [[0, 1, 2, 6, 3, 4, 5, 7], [0, 1, 6, 3, 4, 5]])
def test_two_ranks_equal_one_even_if_the_second_has_no_pair(order, videos, tmp_path):
    """The mean over the ranks, which DDP takes, of each term and gradient is that of the whole batch. The
    second half of the order is the second rank's: no file with both, or none with a sound."""
    forked.ranks(check_rank, 2, str(videos), str(tmp_path), order)


def test_a_batch_without_what_the_terms_are_about_moves_nothing(videos):
    off = [f"weights.{name}=0" for name in vars(config.Weights())]
    cfg = settings(videos, *off, "weights.contrast_vv=1")
    clips = data.training_clips(datasets.load(cfg.data, "train"), cfg)
    terms, gradients, _ = terms_gradients_bank(cfg, [clips[i, (data.OF_A_STEP, 3, i)] for i in (6, 7)])
    assert terms == {"contrast_vv": 0} and not any(gradient.any() for gradient in gradients)


def bank_and_objective(*more):
    cfg = config.load(
        "toy_temporal", ["data.need=any", "contrast.k_pos=2", "contrast.n_pos=1", "weights.xid=1", *more]
    )
    bank = PartialBank(8, 6, 0.5, seed=0)
    return cfg, bank, train.Objective(cfg, bank, SimpleNamespace(rank=0, size=1), epoch_steps=1)


def test_xid_counts_pairs_alone():
    cfg, bank, objective = bank_and_objective("bank.num_negatives=all")
    index, held = torch.arange(4), torch.tensor([BOTH, MUTE, SOUND, BOTH])
    video, audio = unit(4, 6, seed=1), unit(4, 6, seed=2)
    bank.mark(index, held)
    bank.mark(torch.tensor([6]), torch.tensor([MUTE]))
    loss = objective.robust_xid(models.Output(video, audio, None, None, {}), index, 0, agreed=False)
    pairs = torch.tensor([0, 3, 4, 5, 7])  # instances of the bank that hold both
    losses_of = [
        -torch.log_softmax(x[i] @ bank_side[pairs].T / cfg.loss.temperature, 0)[k]
        for x, bank_side in ((video, bank.audio), (audio, bank.video))
        for k, i in enumerate([0, 3])
    ]
    torch.testing.assert_close(loss, sum(losses_of) / 2)


def test_a_batch_without_pairs_has_zero_loss_and_gradient():
    _, bank, objective = bank_and_objective("bank.num_negatives=all")
    bank.mark(torch.arange(8), torch.tensor([MUTE, SOUND] * 4))
    video, audio = unit(4, 6, seed=1).requires_grad_(), unit(4, 6, seed=2).requires_grad_()
    loss = objective.robust_xid(models.Output(video, audio, None, None, {}), torch.arange(4), 0, False)
    loss.backward()
    assert loss == 0 and not video.grad.any() and not audio.grad.any()


def test_a_contrast_counts_only_valid_memories():
    x, matched, near, far = unit(3, 5, seed=0), unit(3, 5, seed=1), unit(6, 5, seed=2), unit(12, 5, seed=3)
    near, far = near.view(3, 2, 5), far.view(3, 4, 5)
    valid = (
        torch.tensor([[1, 1], [0, 1], [0, 0]]).bool(),
        torch.tensor([[1] * 4, [0, 1, 1, 0], [0] * 4]).bool(),
    )
    found = losses.contrast(x, matched, near, far, 0.2, valid)
    for i in range(2):
        alone = losses.contrast(
            x[[i]], matched[[i]], near[[i]][:, valid[0][i]], far[[i]][:, valid[1][i]], 0.2
        )
        torch.testing.assert_close(found[[i]], alone)
    assert found[2] == 0  # it has no negatives
    everything = torch.ones(3, 2).bool(), torch.ones(3, 4).bool()
    plain = losses.contrast(x, matched, near, far, 0.2)
    torch.testing.assert_close(losses.contrast(x, matched, near, far, 0.2, everything), plain)


def test_the_bank_leaves_out_modalities_that_files_lack():
    bank, plain = PartialBank(8, 6, 0.5, seed=0), MemoryBank(8, 6, 0.5, seed=0)
    index, video, audio = torch.tensor([1, 2, 3]), unit(3, 6, seed=1), unit(3, 6, seed=2)
    bank.mark(index, torch.tensor([BOTH, MUTE, SOUND]))
    bank.update(index, video, audio)
    plain.update(index, video, audio)
    first = MemoryBank(8, 6, 0.5, seed=0)
    assert torch.equal(bank.video[[1, 2]], plain.video[[1, 2]]) and torch.equal(bank.video[3], first.video[3])
    assert torch.equal(bank.audio[[1, 3]], plain.audio[[1, 3]]) and torch.equal(bank.audio[2], first.audio[2])
    pairs = bank.agreement[[0, 1, 4, 5, 6, 7]].double()
    mean, std = bank.agreement_mean_std()
    torch.testing.assert_close(mean, pairs.mean())
    torch.testing.assert_close(std, pairs.std(correction=0))
    health, seen = bank.health(), bank.video[[0, 1, 2, 4, 5, 6, 7]].double()
    cosines = (seen @ seen.T)[~torch.eye(7, dtype=torch.bool)]
    assert health["cosine_video"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    for negatives in ("all", 16):
        found = bank.candidates(index, negatives, 0)
        numbers = torch.arange(8) if found.index is None else found.index
        assert not {2, 3} & set(numbers[found.valid].tolist())
        assert found.valid[found.column].all() and numbers[found.column[0]] == 1
    contrast = config.Contrast(k_pos=5, n_pos=5, negatives=2)
    near, _ = bank.neighbourhood("video", torch.tensor([1]), contrast, [0])
    assert 3 not in near[0].tolist()  # five of the six others that have a picture


@pytest.mark.parametrize("there, tau_n", [(6, 0.1), (6, float("inf")), (3, 0.1), (3, float("inf"))])
def test_of_few_memories_none_is_a_negative_that_is_a_positive_or_the_instance_itself(there, tau_n):
    bank, index = PartialBank(30, 6, 0.5, seed=0), torch.tensor([2])
    bank.mark(torch.arange(there, 30), torch.tensor([SOUND] * (30 - there)))
    contrast = config.Contrast(k_pos=4, n_pos=2, negatives=20, tau_n=tau_n)
    for seed in range(20):
        near, far, valid = bank.neighbours("video", index, contrast, [seed])
        positives, negatives = (
            (x[0, counts[0]] @ bank.video.T).argmax(1).tolist()
            for x, counts in zip((near, far), valid, strict=True)
        )
        assert 2 not in positives + negatives and not set(positives) & set(negatives)
        assert max(positives + negatives) < there and len(positives) == 2
        assert len(negatives) <= there - 5 or not negatives
        if tau_n < 1:
            assert len(negatives) == max(there - 5, 0)  # all others


@pytest.mark.parametrize("before, after", [("any", "both"), ("both", "any")])
def test_a_bank_of_another_need_is_not_taken(before, after, videos, tmp_path, capsys):
    few = "data.max_bad_share=1", "optim.epochs=1", "log.check_epochs=0", "optim.batch_size=2"
    train.main(settings(videos, *few, f"data.need={before}", f"out={tmp_path / 'a'}"))
    init = f"init={tmp_path / 'a' / 'last.pt'}"
    train.main(settings(videos, *few, f"data.need={after}", init, f"out={tmp_path / 'b'}"))
    assert "another data.need, or none: this one's begins at random" in capsys.readouterr().out


def test_training_with_all_terms_resumes_to_the_same_bits(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        shutil.copytree(videos, tmp_path / "data" / part)
    few = "optim.schedule=constant", "log.check_epochs=0"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    train.main(settings("data", "out=parts", "optim.epochs=1", *few))
    train.main(settings("data", "out=parts", *few))
    train.main(settings("data", "out=once", *few[:1], "log.check_epochs=2"))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    lines = [json.loads(line) for line in (tmp_path / "once" / "metrics.jsonl").read_text().splitlines()]
    seen = [line["loss"] for line in lines if "loss" in line]
    assert len(seen) == 4 and all(np.isfinite(seen))
    assert any("v→a instance R@1" in line for line in lines)  # of the files with both
    parts, once = (torch.load(tmp_path / out / "last.pt", weights_only=True) for out in ("parts", "once"))
    assert not once["bank"]["held"].all() and torch.equal(parts["bank"]["held"], once["bank"]["held"])
    for name, value in once["network"].items():
        assert torch.equal(parts["network"][name], value), name


def test_sounds_alone_train_the_audio_network(videos, tmp_path):
    for i in range(5):
        shutil.copy(videos / "sound0.wav", tmp_path / f"{i}.wav")
    off = [f"weights.{name}=0" for name in vars(config.Weights()) if "video" in config.needs(name)]
    cfg = settings(tmp_path, *off, f"out={tmp_path / 'run'}")
    before = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).state_dict()
    train.main(cfg)
    after = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["network"]
    still = [n for n in before if "running_mean" in n and not after[n].any()]
    assert all(name.startswith("video") for name in still) and len(still) == sum(
        "running_mean" in name and name.startswith("video") for name in before
    )


@pytest.mark.parametrize(
    "more, text",
    [
        (["bank.spread=true"], "bank.spread"),
        (["bank.candidates=own"], "bank.candidates"),
        ([f"weights.{n}=0" for n in vars(config.Weights()) if len(config.needs(n)) == 1], "one modality"),
    ],
)
def test_settings_that_do_not_work_with_any_are_refused(more, text):
    with pytest.raises(config.ConfigError, match=text):
        settings("x", *more)


def test_a_data_set_without_pictures_needs_terms_of_sound_alone():
    for more, text in ((["data.need=both"], "data.need=any"), ([], "weights.xid=1 needs them")):
        cfg = settings("x", "data.name=esc50", *more)
        with pytest.raises(config.ConfigError, match="no pictures") as error:
            cli.fits(cfg, 100)
        assert text in str(error.value)
    off = [f"weights.{name}=0" for name in vars(config.Weights()) if "video" in config.needs(name)]
    cli.fits(settings("x", "data.name=esc50", *off), 100)


def test_each_term_needs_its_modalities():
    assert {name: config.needs(name) for name in vars(config.Weights())} == {
        "xid": ("video", "audio"), "cma": ("video", "audio"),
        "contrast_vv": ("video",), "contrast_aa": ("audio",),
        "contrast_va": ("video", "audio"), "contrast_av": ("video", "audio"),
        "speed_video": ("video",), "speed_audio": ("audio",),
        "direction_video": ("video",), "direction_audio": ("audio",),
        "order_video": ("video",), "order_audio": ("audio",), "order_cross": ("video", "audio"),
    }  # fmt: skip


def test_confusion_matrices_leave_out_modalities_that_files_lack(videos):
    cfg = settings(videos)
    table = datasets.load(cfg.data, "train")
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg))
    counts = evaluation.confusions(network, table, cfg, torch.device("cpu"), draws=1)
    assert counts["direction_video"].sum() == 2 * 6 and counts["direction_audio"].sum() == 2 * 5
    assert counts["order_cross"].sum() <= 2 * 3


def test_the_bank_is_partial_if_files_may_lack_a_modality():
    assert memory_bank.kind(settings("x")) is PartialBank
    assert memory_bank.kind(config.load("toy")) is MemoryBank


def test_batch_norm_over_ranks_is_refused_if_a_batch_may_lack_a_modality():
    cfg = config.load("toy_temporal", ["data.need=any"])
    cli.fits(cfg, 800, processes=1)
    with pytest.raises(ConfigError, match=r"set optim.sync_bn=false"):
        cli.fits(cfg, 800, processes=2)
    cli.fits(config.load("toy_temporal", ["data.need=any", "optim.sync_bn=false"]), 800, processes=2)
