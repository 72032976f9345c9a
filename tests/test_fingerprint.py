"""Fingerprinting: undistorted copies are found, distorted ones differ, and only the distorted modality is
read again.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import chirps, numbers, write_media

from avid import config, data, datasets, evaluation, models
from avid.media import MediaError
from avid.tools import fingerprint
from avid.tools.fingerprint import PROTOCOL, Copies

ROOT = Path(__file__).parents[1]
TINY = (
    "toy.train=16 toy.test=8 toy.seconds=2 toy.size=32 data.workers=0 video.size=32 video.frames=4 "
    "audio.seconds=0.5 audio.mels=32 audio.rate_hz=16000 model.width=4 model.depth=1 model.embedding=16 "
    "eval.clips=2 eval.calibration_batches=2 optim.batch_size=8"
).split()
EACH = [(name, strength) for name, kind in PROTOCOL.items() for strength in kind.strengths]
IDENTITIES = {"crop": 1.0, "blur": 1e-6, "rotation": 0, "gain": 0, "clipping": 0, "noise": 300, "speed": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(evaluation.Subject of an untrained network, table of 8 toy videos)."""
    out = tmp_path_factory.mktemp("fingerprint")
    cfg = config.load("toy", [*TINY, f"data.root={out / 'data'}"])
    torch.manual_seed(0)
    network = models.AudioVisual(cfg.model).eval()
    subject = evaluation.Subject(network, cfg, torch.device("cpu"), "random", "untrained", out)
    train, table = next(evaluation.tables(cfg))
    evaluation.calibrate_batch_norm(subject, train)
    return subject, table


def limit_protocol(monkeypatch, **strengths):
    """The protocol reduced to these strengths."""
    kinds = {name: PROTOCOL[name]._replace(strengths=(strength,)) for name, strength in strengths.items()}
    monkeypatch.setattr(fingerprint, "PROTOCOL", kinds)


def measure(world, modalities=data.MODALITIES):
    return fingerprint.measure(*world, modalities, (1, 5))


def test_a_copy_without_distortion_is_its_original(world, monkeypatch):
    subject, table = world
    limit_protocol(monkeypatch, **IDENTITIES)
    result = measure(world)
    found = {key: value for key, value in result.items() if "R@" in key and not key.startswith("chance")}
    assert len(found) == len(IDENTITIES) * 3 * 2 * 2 and set(found.values()) == {100.0}
    for name, strength in IDENTITIES.items():
        for modality in data.MODALITIES if name == "speed" else (PROTOCOL[name].modality,):
            clean = evaluation.features_of(subject, table, modality).video_level("features", modality)
            copies = fingerprint.copy_features(subject, table, modality, name, strength)
            np.testing.assert_allclose(copies, clean, atol=1e-5)


@pytest.mark.parametrize("name, strength", EACH)
def test_a_copy_differs_from_its_original_only_in_content(world, name, strength):
    subject, table = world
    for modality in data.MODALITIES if name == "speed" else (PROTOCOL[name].modality,):
        original = data.Clips(table, subject.cfg, training=False, modalities=(modality,))[0]
        copy, again = (Copies(table, subject.cfg, modality, name, strength)[0] for _ in range(2))
        assert copy.keys() == original.keys() and copy["index"] == 0
        assert (
            copy[modality].shape == original[modality].shape
            and copy[modality].dtype == original[modality].dtype
        )
        assert all(
            not torch.equal(clip, clean)
            for clip, clean in zip(copy[modality], original[modality], strict=True)
        )
        assert torch.equal(copy[modality], again[modality])


def test_only_the_distorted_modality_is_read_again(world, monkeypatch):
    measured = {}
    for distorted, name, strength, other in (
        ("video", "crop", 0.5, "loudness"),
        ("audio", "gain", -24, "picture"),
    ):
        for modality in data.MODALITIES:
            evaluation.features_of(*world, modality)  # kept: the gallery is not read again

        def must_not_be_called(*_):
            raise AssertionError

        def extract_copies(network, clips, *more, extract=evaluation.extract):
            assert isinstance(clips, Copies)
            return extract(network, clips, *more)

        with monkeypatch.context() as patch:
            limit_protocol(patch, **{name: strength})
            patch.setattr(data.Clips, other, must_not_be_called)
            patch.setattr(Copies, other, must_not_be_called)
            patch.setattr(evaluation, "extract", extract_copies)
            measured = measure(world)
        kept = "audio" if distorted == "video" else "video"
        assert measured[f"{name} {strength} {kept} instance R@1"] == 100


def test_an_interrupted_measurement_goes_on_where_it_stopped(world, monkeypatch):
    limit_protocol(monkeypatch, rotation=7, gain=3)
    for modality in data.MODALITIES:
        evaluation.features_of(*world, modality)  # kept: from here on only copies are read
    extract, asked = evaluation.extract, []

    def interrupted(network, copies, *more):
        asked.append(copies.modalities)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return extract(network, copies, *more)

    monkeypatch.setattr(evaluation, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(world)
    result = measure(world)
    assert asked == [("video",), ("audio",), ("audio",)] and measure(world) == result


def test_joint_features_weigh_both_modalities_equally(world, monkeypatch):
    """Against cosines computed directly, with one modality distorted and with both."""
    subject, table = world
    clean = {m: evaluation.features_of(subject, table, m).video_level("features", m) for m in data.MODALITIES}
    for name, strength in (("noise", 0), ("speed", 2.0)):
        limit_protocol(monkeypatch, **{name: strength})
        query = dict(clean)
        for modality in data.MODALITIES if name == "speed" else ("audio",):
            query[modality] = fingerprint.copy_features(subject, table, modality, name, strength)
        cosines = sum(query[m].astype(float) @ clean[m].T.astype(float) for m in data.MODALITIES)  # n×n
        r1 = 100 * (cosines.argmax(1) == np.arange(len(table))).mean()
        assert measure(world)[f"{name} {strength:g} joint instance R@1"] == pytest.approx(r1)


def test_all_clips_of_a_copy_are_distorted_alike_and_by_the_seed(world, monkeypatch):
    subject, table = world
    grey = torch.full((3, 4, 32, 32), 127, dtype=torch.uint8)
    monkeypatch.setattr(data.Clips, "picture", lambda *_: grey)
    marks = [Copies(table, subject.cfg, "video", "overlay", 0.15)[index]["video"] for index in range(4)]
    assert all(torch.equal(first, second) for first, second in marks)
    assert len({tuple(mark.flatten().tolist()) for mark in marks}) == 4
    monkeypatch.setattr(subject.cfg, "seed", 1)
    assert not torch.equal(Copies(table, subject.cfg, "video", "overlay", 0.15)[0]["video"], marks[0])


def test_a_faster_copy_runs_through_the_whole_original(tmp_path):
    """At twice the speed, frames are twice as far apart and sounds half as far; the first clip begins and the
    last ends with the original.
    """
    wave = chirps([0.75], 4, 16000)
    write_media(tmp_path / "a.mp4", np.arange(100) / 25, wave, 16000)
    table = datasets.load(config.Data(name="folder", root=str(tmp_path)), "all")
    cfg = config.load(
        "toy",
        [
            "video.size=64",
            "video.frames=4",
            "video.fps=5",
            "audio.seconds=1",
            "audio.rate_hz=16000",
            "audio.mels=0",
        ],
    )
    for speed, step in ((1, 5), (2.0, 10)):
        clips = Copies(table, cfg, "video", "speed", speed)[0]["video"]  # 5×3×T×S×S
        seen = [numbers(clip.permute(1, 2, 3, 0)) for clip in clips]
        assert all((np.diff(clip) == step).all() for clip in seen)
        assert seen[0][0] == step // 2 and seen[-1][-1] == pytest.approx(100 - step / 2, abs=1.5)
    for speed in (1, 1.25, 1.5, 2.0):
        loud = Copies(table, cfg, "audio", "speed", speed)[0]["audio"][0, 0].amax(1)  # 100 columns of 10 ms
        heard = np.flatnonzero((loud > loud.max() - 20).numpy())
        assert (heard[0] + heard[-1]) / 200 == pytest.approx(0.78 / speed, abs=0.03)


def test_unreadable_files_and_copies_are_left_out_and_counted(world, tmp_path, monkeypatch):
    subject, table = world
    for path in table.paths:
        (tmp_path / Path(path).name).symlink_to((table.root / path).resolve())
    write_media(tmp_path / "silent.mp4", np.arange(50) / 25)
    torn, table = (
        Path(table.paths[3]).name,
        datasets.load(config.Data(name="folder", root=str(tmp_path)), "all"),
    )
    picture = Copies.picture

    def once(self, media, clip, rng):
        if Path(media.path).name == torn:
            raise MediaError("torn")
        return picture(self, media, clip, rng)

    limit_protocol(monkeypatch, rotation=0, gain=0)
    monkeypatch.setattr(Copies, "picture", once)
    result = measure((subject, table))
    assert (result["videos"], result["gallery_videos"], result["skipped"], result["unread_copies"]) == (
        8,
        8,
        1,
        1,
    )
    assert result["rotation 0 video instance R@1"] == result["gain 0 joint instance R@1"] == 100
    assert not any("class" in key for key in result)


def test_sounds_alone_have_no_joint_features(world, tmp_path):
    result = measure(world, ("audio",))
    found = [key for key in result if "R@" in key and not key.startswith("chance")]
    named = {key.split()[0] for key in found}
    assert named == {name for name, kind in PROTOCOL.items() if kind.modality != "video"}
    assert {key.split()[2] for key in found} == {"audio"}
    fingerprint.draw(tmp_path / "audio.png", result)
    assert (tmp_path / "audio.png").stat().st_size > 10_000


def test_a_sample_rate_without_mp3_is_refused_before_the_measurement():
    with pytest.raises(config.ConfigError, match=r"audio\.rate_hz=10000: MP3 has no sample rate"):
        fingerprint.check(config.Audio(rate_hz=10000))
    with pytest.raises(config.ConfigError, match=r"44100: MP3 has no bit rate of 16 kbit/s at 44100 Hz"):
        fingerprint.check(config.Audio(rate_hz=44100))  # the encoder would take 32 kbit/s


def test_the_script_writes_every_number_reproducibly(world, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "eval_retrieval.py"),
        *"--ckpt random --task fingerprint".split(),
        f"--out={tmp_path}",
    ]
    command += [f"data.root={world[1].root.parent}", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "retrieval-fingerprint-toy.png").stat().st_size > 20_000
    result = json.loads((tmp_path / "retrieval-fingerprint-toy-test.json").read_text())
    again = measure(world)
    assert again == {key: result[key] for key in again} and result["divisions"] == [again]
    printed = [line.split()[:2] for line in done.stdout.splitlines()]
    for name, strength in EACH:
        assert [name, f"{strength:g}"] in printed
        for modality in ("video", "audio", "joint"):
            for by in ("instance", "class"):
                r1, r5 = (result[f"{name} {strength:g} {modality} {by} R@{k}"] for k in (1, 5))
                assert 0 <= r1 <= r5 <= 100
    assert (
        result["videos"] == result["gallery_videos"] == 8
        and result["task"] == "fingerprint"
        and result["seed"] == 0
    )
