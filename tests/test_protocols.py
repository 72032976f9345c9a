"""Evaluation protocols of other papers: the features they use, what is trained and what is not, and the
results.
"""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tone
from sklearn import svm
from torch.nn import functional as F

import eval_linear
from avid import config, data, datasets, evaluation, protocols, toy


def subject(tmp_path, *settings):
    arguments = [
        "--ckpt",
        "random",
        "--out",
        str(tmp_path / "out"),
        "--data",
        "folder",
        "--root",
        str(tmp_path),
    ]
    small = (
        "model.width=4 model.depth=1 video.size=32 video.frames=4 audio.mels=32 audio.seconds=0.5 "
        "data.workers=0 eval.clips=2 eval.calibration_batches=1 optim.batch_size=4"
    ).split()
    return evaluation.subject(eval_linear.command_line([*arguments, *small, *settings]))


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """The folder of two easy classes: bright pictures with a high tone, dark ones with a low tone; train and
    test parts.
    """
    root = tmp_path_factory.mktemp("two")
    for part, count in (("train", 8), ("test", 4)):
        for k in range(count):
            for label, hz, light in (("high", 3000, 220), ("low", 200, 30)):
                (root / part / label).mkdir(parents=True, exist_ok=True)
                frames = np.full((24, 48, 48, 3), light, np.uint8)
                toy.encode(
                    root / part / label / f"{k}.mp4", frames, tone(hz, 1.5, 16000)[0], config.Toy(size=48)
                )
    return root


def tables(root):
    return tuple(
        datasets.load(config.Data(name="folder", root=str(root)), part) for part in ("train", "test")
    )


# ---------------------------------------------------------------------------------------------- linear_layers


def test_the_stages_of_avids_network_have_the_published_feature_sizes():
    network = protocols.StageClassifiers(torch.nn.Identity(), width=64, classes=400)
    assert [stage[0].num_features for stage in network.stages.values()] == [9216, 8192, 9216, 8192]
    assert all(stage[1].out_features == 400 for stage in network.stages.values())


def test_a_stage_is_max_pooled_over_all_time_steps(tmp_path):
    encoder = subject(tmp_path).network.video_model.eval()
    classifier = protocols.StageClassifiers(encoder, 4, 3).eval()
    clips = torch.randn(2, 3, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    found, x = classifier(clips), encoder.conv1(clips)
    for name, side in protocols.LAYERS.items():
        x = getattr(encoder, name)(x)
        pooled = F.adaptive_max_pool2d(x.amax(2), side).flatten(1)
        torch.testing.assert_close(found[name], classifier.stages[name](pooled), atol=1e-5, rtol=1e-5)


def test_linear_layers_learn_and_leave_the_encoder_alone(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "EPOCHS", 6)
    monkeypatch.setattr(protocols, "LR", 1e-2)
    monkeypatch.setattr(protocols, "BATCH", 8)
    tried = subject(tmp_path)
    before = copy.deepcopy(tried.network.state_dict())
    result = protocols.linear_layers(tried, *tables(two_classes), "video", tmp_path)
    assert result["best top1"] == max(result[f"{name} top1"] for name in protocols.LAYERS) == 100.0
    assert (result["videos"], result["train_videos"], result["skipped"]) == (8, 16, 0)
    assert all(torch.equal(before[name], x) for name, x in tried.network.state_dict().items())
    saved = torch.load(tmp_path / "linear_layers-folder-train.pt", weights_only=True)["classifier"]
    for name, x in before.items():
        part, _, rest = name.partition(".")
        if part == "video_model" and "running" not in name and "num_batches" not in name:
            assert torch.equal(saved[f"encoder.{rest}"], x), name  # only batch-norm statistics change [A]
    again = protocols.linear_layers(
        tried, *tables(two_classes), "video", tmp_path
    )  # finished: it is only tested
    assert again == result


def test_linear_layers_go_on_where_they_were_stopped(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "EPOCHS", 3)
    monkeypatch.setattr(protocols, "BATCH", 8)
    tried, parts = subject(tmp_path), tables(two_classes)
    whole = protocols.linear_layers(tried, *parts, "video", tmp_path / "whole")
    to_device, seen = data.to_device, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return to_device(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(data, "to_device", interrupted)
        patch.setattr(tried.cfg.log, "checkpoint_minutes", 0)
        with pytest.raises(KeyboardInterrupt):
            protocols.linear_layers(tried, *parts, "video", tmp_path / "stopped")
    assert protocols.linear_layers(tried, *parts, "video", tmp_path / "stopped") == whole
    one, other = (
        torch.load(tmp_path / name / "linear_layers-folder-train.pt", weights_only=True)["classifier"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- crisscross


def test_crisscross_uses_10752_features():
    encoder = evaluation.models.AudioNet(64).eval()
    sound = torch.randn(2, 1, 500, 80, generator=torch.Generator().manual_seed(0))
    numbers = protocols.last_maps(encoder, sound)
    assert numbers.shape == (2, 10752)
    lengths = numbers.view(2, 512, 7, 3).norm(dim=2)  # along time
    assert ((lengths - 1).abs() < 1e-4).logical_or(lengths == 0).all()


def test_crisscross_classifies_sounds_and_reports_the_c_chosen_on_the_test_part(
    two_classes, tmp_path, monkeypatch
):
    monkeypatch.setattr(protocols, "AUGMENTED", 2)
    monkeypatch.setattr(protocols, "CLIP_S", 1.0)
    fitted = []

    class Counted(svm.LinearSVC):
        def fit(self, x, y):
            fitted.append((self.C, x.shape))
            return super().fit(x, y)

    monkeypatch.setattr(svm, "LinearSVC", Counted)
    result = protocols.crisscross(subject(tmp_path), *tables(two_classes), "audio", tmp_path)
    assert [C for C, _ in fitted] == list(protocols.STRENGTHS)
    assert fitted[0][1] == (32, 32 * 21)  # two clips of each of 16 sounds; 8 · width channels
    assert result["top1"] == 100.0 and result["C"] in protocols.STRENGTHS
    assert result["top1"] >= result["C=0.0001 top1"]
    assert (result["videos"], result["train_videos"], result["skipped"]) == (8, 16, 0)


def test_crisscross_counts_a_file_that_cannot_be_used_once(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "AUGMENTED", 3)
    monkeypatch.setattr(protocols, "CLIP_S", 0.5)
    train, test = tables(two_classes)
    train.paths[0] = "none.mp4"
    result = protocols.crisscross(subject(tmp_path), train, test, "audio", tmp_path)
    assert (result["train_videos"], result["skipped"]) == (15, 1)


def test_crisscross_draws_every_training_clip_anew(two_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "AUGMENTED", 3)
    monkeypatch.setattr(protocols, "CLIP_S", 0.5)
    heard = []
    monkeypatch.setattr(
        protocols, "last_maps", lambda _, sound: heard.append(sound) or sound.flatten(1)[:, :5]
    )
    protocols.crisscross(subject(tmp_path), *tables(two_classes), "audio", tmp_path)
    training = torch.cat(heard[:-1])
    assert len(training) == 48 and len(heard[-1]) == 8
    assert len({tuple(x.flatten().tolist()) for x in training[:3]}) == 3  # of one sound


# ----------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(("mode", "modality"), [("linear_layers", "video"), ("crisscross", "audio")])
def test_the_command_takes_the_modality_of_its_protocol(two_classes, tmp_path, monkeypatch, mode, modality):
    seen = []

    def protocol(subject, train_table, test_table, modality, out):
        seen.append((modality, len(train_table), len(test_table), Path(out)))
        return {"top1": 50.0, "videos": 8, "train_videos": 16, "skipped": 0}

    monkeypatch.setitem(eval_linear.TRAINED, mode, protocol)
    options = ["--data", "folder", "--root", str(two_classes), "--out", str(tmp_path), "--mode", mode]
    small = "model.width=4 video.size=32 video.frames=4 audio.mels=32 data.workers=0".split()
    small.append("eval.calibration_batches=0")
    eval_linear.main(eval_linear.command_line(["--ckpt", "random", *options, *small]))
    assert seen == [(modality, 16, 8, tmp_path)]
    assert json.loads((tmp_path / f"{mode}-{modality}-folder-test.json").read_text())["top1"] == 50.0


def test_a_protocol_of_the_other_modality_is_refused(two_classes, tmp_path):
    for mode, other in ((protocols.linear_layers, "audio"), (protocols.crisscross, "video")):
        with pytest.raises(config.ConfigError, match=f"--mode {mode.__name__} needs --modality"):
            mode(subject(tmp_path), *tables(two_classes), other, tmp_path)
    with pytest.raises(config.ConfigError, match=r"needs --modality video and model.video=avid"):
        tried = subject(tmp_path)
        tried.cfg.model.video = "r3d_18"
        protocols.linear_layers(tried, *tables(two_classes), "video", tmp_path)
