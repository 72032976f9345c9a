"""Synchronisation: every shift is a mean over equally many pairs, and is read from the right times of real
files.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import numbers, write_media

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import eval_retrieval
from avid import config, data, datasets, evaluation, media, temporal_tasks
from avid.tools import sync

RATE_HZ, SECONDS = 16000, 9
SETTINGS = (
    "data.workers=0 video.size=64 video.frames=4 video.fps=8 audio.seconds=0.5 audio.rate_hz=16000 "
    "audio.mels=0 model.width=4 model.depth=1 model.embedding=16 eval.clips=4 eval.crop=1 "
    "eval.calibration_batches=2 "
    "toy.train=8 toy.test=8 toy.seconds=5 toy.size=32 optim.batch_size=8"
).split()


def test_each_shift_is_the_mean_over_as_many_pairs():
    scores = np.random.default_rng(0).standard_normal((3, 11, 11))
    curves = sync.by_shift(scores, reach=4)
    assert curves.shape == (3, 9)
    for column, shift in enumerate(range(-4, 5)):
        pairs = [(i, i + shift) for i in range(11) if 0 <= i + shift < 11]
        pairs = sorted(sorted(pairs), key=lambda pair: abs(sum(pair) / 2 - 5))[:7]  # those around the middle
        for video in range(3):
            expected = np.mean([scores[video][pair] for pair in pairs])
            centre = {sum(pair) / 2 for pair in pairs}
            if shift % 2 == 0:  # otherwise two choices are equally near to the middle
                assert curves[video, column] == pytest.approx(expected)
            assert len(pairs) == 7 and max(centre) - min(centre) == 6


def test_the_shift_of_a_pair_is_the_moment_of_sound_minus_that_of_picture():
    """The sound of moment j is heard with the picture of moment i: shift j − i."""
    i, j = np.mgrid[:9, :9]
    for shift in range(-3, 4):
        curve = sync.by_shift((j - i == shift)[None].astype(float), reach=3)
        assert curve.tolist() == [[float(s == shift) for s in range(-3, 4)]]


@pytest.mark.parametrize(
    ("overrides", "asked_s", "expected"),
    [
        (["video.frames=8", "audio.seconds=1.5"], None, (0.25, 8)),
        (["video.frames=16", "audio.seconds=1"], None, (0.5, 4)),
        (["video.frames=32", "audio.seconds=2"], None, (0.5, 4)),  # at most half a second
        ([], 0.3, (0.3, 6)),
        ([], 2.0, (2.0, 1)),
        ([], 0.1, (0.1, 20)),
    ],
)
def test_a_step_is_half_of_the_shorter_clip(overrides, asked_s, expected):
    assert sync.steps(config.load("toy", overrides), asked_s) == expected


@pytest.mark.parametrize("asked_s", [2.1, 0.01, 0.0, -1.0, float("nan")])
def test_a_step_out_of_range_is_an_error(asked_s):
    with pytest.raises(config.ConfigError, match=r"--step .* cannot be used; expected 0\.05 to 2 s"):
        sync.steps(config.load("toy"), asked_s)


def test_other_tasks_refuse_the_step_of_sync(capsys):
    with pytest.raises(SystemExit) as ended:
        eval_retrieval.command_line(["--ckpt", "random", "--step", "0.5"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --step is of --task sync alone; leave it out\n"
    assert eval_retrieval.command_line("--ckpt random --task sync --step 0.5".split()).step == 0.5


# ------------------------------------------------------------------------------------------------- real files


def sweep(late_s):
    """1×n float32: a tone that rises by 700 Hz a second, late by `late_s`."""
    t = np.arange(SECONDS * RATE_HZ) / RATE_HZ - late_s
    return (0.5 * np.sin(2 * np.pi * (800 * t + 350 * t * t)))[None].astype(np.float32)


class Clock(torch.nn.Module):
    """A network that reads the time from a picture's number or a tone's pitch, and embeds it."""

    temporal = torch.nn.Module()
    temporal.heads = torch.nn.ModuleDict()

    def encode(self, modality, clips):
        if modality == "video":
            mean, std = (torch.tensor(x)[:, None, None, None] for x in (data.PIXEL_MEAN, data.PIXEL_STD))
            images = ((clips * std + mean) * 255).permute(0, 2, 3, 4, 1)  # B×T×S×S×3
            time_s = torch.tensor([np.mean(numbers(clip)) / 25 for clip in images.numpy()])
        else:
            hz = clips[:, 0].mean(1).argmax(1) * RATE_HZ / 512  # B: the pitch in the middle of a rising tone
            time_s = (hz - 800) / 700
        angle = (time_s.float() / SECONDS * np.pi)[:, None]
        unit = torch.cat([angle.cos(), angle.sin()], 1)
        return unit, unit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three videos, each with its own delay of the sound: (folder, delays)."""
    folder = tmp_path_factory.mktemp("sync")
    delays = {"a": 0.0, "b": 0.5, "c": -0.75}
    for name, late_s in delays.items():
        write_media(folder / f"{name}.mp4", np.arange(SECONDS * 25) / 25, sweep(late_s), RATE_HZ)
    return folder, delays


def subject(folder, out):
    cfg = config.load("toy", [*SETTINGS, "data.name=folder", f"data.root={folder}"])
    table = datasets.load(cfg.data, "all")
    return evaluation.Subject(Clock(), cfg, torch.device("cpu"), "clock.pt", "clock", out), table


def test_a_network_that_knows_the_time_finds_each_delay(world, tmp_path):
    """A late sound matches best at the shift that equals its delay."""
    folder, delays = world
    known, table = subject(folder, tmp_path)
    result = sync.measure(known, table)
    assert (result["videos"], result["files"], result["skipped"], result["step_s"]) == (3, 3, 0, 0.25)
    shifts = result["shifts_s"]
    assert shifts == [k / 4 for k in range(-8, 9)]
    found = {
        shift: share for shift, share in zip(shifts, result["similarity preferred"], strict=True) if share
    }
    assert found == pytest.approx({late_s: 100 / 3 for late_s in delays.values()})
    assert result["similarity exact"] == result["similarity within one step"] == pytest.approx(100 / 3)
    assert result["chance exact"] == pytest.approx(100 / 17)
    assert result["chance within one step"] == pytest.approx(300 / 17)
    assert sum(result["similarity control preferred"]) == pytest.approx(100)
    sync.draw(tmp_path / "sync.png", result)
    assert (tmp_path / "sync.png").stat().st_size > 10_000


def test_a_single_video_has_no_control(world, tmp_path):
    folder, _ = world
    known, table = subject(folder, tmp_path)
    result = sync.measure(known, datasets.take(table, np.array([True, False, False])))
    assert result["videos"] == 1 and not any("control" in name for name in result)
    sync.draw(tmp_path / "sync.png", result)
    assert [row["preferred shift, % of videos"] for row in sync.rows(result)] == ["similarity", "chance"]


def test_features_are_kept(world, tmp_path, monkeypatch):
    known, table = subject(world[0], tmp_path)
    first = sync.measure(known, table)
    monkeypatch.setattr(evaluation, "extract", None)
    assert sync.measure(known, table) == first
    with pytest.raises(TypeError):  # other moments need other features
        sync.measure(known, table, 0.5)


def test_the_order_head_is_measured_too(world, tmp_path):
    """It takes the concatenated features of picture and sound and predicts whether they overlap."""
    known, table = subject(world[0], tmp_path)

    class Head(torch.nn.Module):
        def forward(self, pairs):  # B×4: two unit vectors
            near = (pairs[:, :2] * pairs[:, 2:]).sum(1)
            overlap = temporal_tasks.ORDERS.index("overlapping")
            return torch.nn.functional.one_hot(torch.full((len(pairs),), overlap), 3) * 5 * near[:, None]

    known.network.temporal = torch.nn.Module()
    known.network.temporal.heads = torch.nn.ModuleDict({"order_cross": Head()})
    result = sync.measure(known, table)
    assert result["order_cross preferred"] == result["similarity preferred"]
    assert result["order_cross exact"] == pytest.approx(100 / 3)
    lines = list(sync.rows(result))
    assert [line["preferred shift, % of videos"] for line in lines] == [
        "similarity", "similarity control", "order_cross", "order_cross control", "chance"
    ]  # fmt: skip


def test_a_video_that_is_too_short_is_left_out_by_name(world, tmp_path, capsys):
    for path in world[0].iterdir():
        (tmp_path / path.name).symlink_to(path)
    write_media(tmp_path / "short.mp4", np.arange(75) / 25, sweep(0)[:, : 3 * RATE_HZ], RATE_HZ)
    known, table = subject(tmp_path, tmp_path / "out")
    result = sync.measure(known, table)
    assert (result["videos"], result["files"], result["skipped"]) == (3, 4, 1)
    assert (
        "short.mp4: too short to shift its sound: 2.97 of 3.25 s; a lower eval.clips needs less"
        in capsys.readouterr().out
    )


def test_moments_lie_in_the_middle_of_the_file(world):
    cfg = config.load("toy", [*SETTINGS, "data.name=folder", f"data.root={world[0]}"])
    grid = sync.Grid(datasets.load(cfg.data, "all"), cfg, 0.25, 8)
    with media.Media(world[0] / "a.mp4") as file:
        moments = grid.evenly(*grid.usable(file))
        middle_s = (file.first_s + file.last_s) / 2
    assert len(moments) == 12 and np.allclose(np.diff([clip.start_s for clip in moments]), 0.25)
    assert (moments[0].start_s + moments[-1].start_s + grid.length_s) / 2 == pytest.approx(middle_s)
    assert {(clip.speed, clip.backward) for clip in moments} == {(1, False)}


def test_the_script_prints_and_writes_the_result(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "eval_retrieval.py"),
        *"--ckpt random --task sync --step 0.5".split(),
    ]
    command += [f"--out={tmp_path}", f"--root={tmp_path}", *SETTINGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "retrieval-sync-toy-test.json").read_text())
    assert result["task"] == "sync" and result["videos"] == result["files"] == 8 and result["step_s"] == 0.5
    assert 0 <= result["similarity exact"] <= result["similarity within one step"] <= 100
    assert "order_cross exact" not in result  # an untrained network has no such head
    assert (tmp_path / "retrieval-sync-toy.png").stat().st_size > 10_000
    assert "similarity control" in done.stdout and "chance" in done.stdout and "\r" not in done.stderr
