"""Statistics of a data set's spectrograms are right, are the same after an interruption, and are stored in
checkpoints.
"""

import json
import subprocess
import sys

import forked
import numpy as np
import pytest
import torch
from conftest import tone
from test_data import folder_table, good, settings
from test_train import ROOT, TINY, command, final, run

from avid import config, data, evaluation
from avid.tools import statistics


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """40 short sounds of different levels and pitches, one of them unreadable."""
    root, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    for k in range(40):
        wave = rng.uniform(0.05, 1.0) * tone(200 + 150 * k, 0.8, 16000) + rng.normal(0, 0.01, 12800)
        good(root / f"{k:02d}.wav", wave=wave.astype(np.float32), codecs=("", "pcm_s16le"), seconds=0)
    (root / "20.wav").write_bytes(b"no sound")
    return folder_table(root)


def cfg(frontend="log", workers=0, **audio):
    made = settings(audio={"seconds": 0.25, "frontend": frontend, **audio}, clips=3)
    made.data.workers = workers
    return made


@pytest.mark.parametrize("frontend", ["log", "avid"])
def test_statistics_are_the_mean_and_deviation_of_all_columns(table, tmp_path, frontend):
    out = tmp_path / "statistics.npz"
    statistics.measure(table, cfg(frontend), out)
    seen = dict(np.load(out))
    bands = {"log": 16, "avid": 129}[frontend]
    filler = " ".join(["0/1"] * bands)
    clips = data.Clips(table, cfg(frontend, statistics=filler), training=False, modalities=("audio",))
    columns = np.concatenate([clips[k]["audio"].reshape(-1, bands) for k in range(40) if k != 20]).astype(
        float
    )
    assert seen["count"] == len(columns) == 39 * 3 * 12  # round(0.25 · 50) columns a clip
    np.testing.assert_allclose(seen["mean"], columns.mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen["std"], np.maximum(columns.std(0), 1.0), rtol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.npz"]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_measurement_ends_in_the_same_bits(table, tmp_path, monkeypatch, workers):
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    statistics.measure(table, cfg(), whole)
    monkeypatch.setattr(statistics, "SAVE_S", 0.0)
    loader, seen = data.loader, []

    def interrupted(*arguments, **options):
        for batch in loader(*arguments, **options):
            seen.append(len(batch["index"]))
            if len(seen) == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(data, "loader", interrupted)
    with pytest.raises(KeyboardInterrupt):
        statistics.measure(table, cfg(workers=workers), out)
    assert not out.exists()
    statistics.measure(table, cfg(workers=workers), out)
    assert sum(seen[2:]) == 39 - seen[0]  # sounds that were read are not read again
    first, second = (dict(np.load(path)) for path in (whole, out))
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_an_unfinished_measurement_is_refused_for_other_settings(table, tmp_path, monkeypatch):
    out = tmp_path / "out.npz"
    monkeypatch.setattr(data, "loader", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        statistics.measure(table, cfg(), out)
    for other in (cfg(mels=8), cfg(frontend="avid")):
        with pytest.raises(
            config.ConfigError, match=r"out.npz.unfinished is of other files or settings; delete it"
        ):
            statistics.measure(table, other, out)
    (tmp_path / "out.npz.unfinished").write_bytes(b"half")
    with pytest.raises(config.ConfigError, match=r"cannot be read .*; delete it to begin anew"):
        statistics.measure(table, cfg(), out)


def test_a_band_that_hardly_varies_is_not_amplified(tmp_path):
    for k in range(3):
        good(
            tmp_path / f"{k}.wav", wave=np.zeros((1, 12800), np.float32), codecs=("", "pcm_s16le"), seconds=0
        )
    statistics.measure(folder_table(tmp_path), cfg(), tmp_path / "out.npz")
    found = np.load(tmp_path / "out.npz")
    assert found["mean"].tolist() == [-100.0] * 16 and found["std"].tolist() == [1.0] * 16


def test_too_many_unreadable_files_end_the_measurement(tmp_path):
    for k in range(120):
        (tmp_path / f"{k}.wav").write_bytes(b"no sound")
    with pytest.raises(data.MediaError, match=r"could not be used, more than data.max_bad_share"):
        statistics.measure(folder_table(tmp_path), cfg(), tmp_path / "out.npz")


# ----------------------------------------------------------------------------------------------- the settings


def test_a_file_of_statistics_is_replaced_by_its_numbers(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, mean=np.array([-50.0, -40.25, 1e-3]), std=np.array([10, 20.5, 1]))
    cfg = config.load("toy", ["audio.mels=3", f"audio.statistics={path}"])
    assert cfg.audio.statistics == "-50/10 -40.25/20.5 0.001/1"
    path.unlink()  # the settings hold the numbers, not the file's name
    config.save(cfg, tmp_path / "config.yaml")
    assert config.load(tmp_path / "config.yaml") == cfg
    assert config.band_statistics(cfg.audio) == ((-50.0, -40.25, 0.001), (10.0, 20.5, 1.0))
    assert config.load(tmp_path / "config.yaml", ["audio.statistics="]).audio.statistics == ""


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"mean": [1.0, 2.0], "std": [1.0]}, "are no pairs of finite numbers"),
        ({"mean": [1.0, np.nan], "std": [1.0, 1.0]}, "are no pairs of finite numbers"),
        ({"mean": [1.0], "std": [-1.0]}, "are no pairs of finite numbers"),
        ({"mean": []}, "is no .npz file with mean and std"),
        (
            {"mean": np.array([object()]), "std": [1.0]},
            "is no .npz file with mean and std",
        ),  # no code is run from it
        (b"something else", "is no .npz file with mean and std"),
        (None, "no file"),
    ],
)
def test_a_file_without_statistics_is_refused(tmp_path, content, complaint):
    path = tmp_path / "a.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(config.ConfigError, match=complaint) as caught:
        config.load("toy", [f"audio.statistics={path}"])
    assert "python -m avid statistics" in str(caught.value)


def test_avids_spectrogram_needs_statistics_and_says_where_they_are():
    cfg = config.load("avid")
    with pytest.raises(config.ConfigError) as caught:
        config.band_statistics(cfg.audio)
    assert "audio-spectDB-24k-513-norm-stats.npz" in str(caught.value)
    assert "python -m avid statistics --out FILE.npz" in str(caught.value)
    done = subprocess.run(
        [sys.executable, "train.py", "--cfg", "avid"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: audio.frontend=avid needs audio.statistics"
    )


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_carries_its_statistics(tmp_path):
    """A run is trained with AVID's spectrogram; the evaluation works although the file of statistics was
    deleted.
    """
    world = [f"data.root={tmp_path}", "audio.frontend=avid", *TINY]
    done = subprocess.run(
        [sys.executable, "-m", "avid", "statistics", "--out", str(tmp_path / "toy.npz"), *world],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "257 bands" in done.stdout and "audio.statistics=" in done.stdout
    out, given = tmp_path / "run", ("audio.frontend=avid", "optim.epochs=1", "log.check_epochs=1")
    run(tmp_path, out, *given, f"audio.statistics={tmp_path / 'toy.npz'}")
    (tmp_path / "toy.npz").unlink()
    text = final(out)["config"]["audio"]["statistics"]
    assert len(text.split()) == 257
    run(tmp_path, out, *given, f"audio.statistics={text}")  # resumes
    forked.run("eval_linear.py", ["--ckpt", out / "last.pt", "--modality", "audio"], tmp_path)
    assert "top1" in json.loads((out / "linear-audio-toy-test.json").read_text())
    done = subprocess.run(
        command(tmp_path, out, *given, "audio.statistics="), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "needs audio.statistics" in done.stderr


def test_a_released_checkpoint_takes_avids_spectrogram_by_itself(tmp_path):
    """A checkpoint with the names of AVID-CMA: video needs no statistics, and the error for audio names the
    missing file.
    """
    path = tmp_path / "released.pth.tar"
    network = evaluation.models.AudioVisual(config.load("avid").model)
    torch.save(
        {"model": {f"module.{name}": x for name, x in network.state_dict().items()}, "epoch": 30}, path
    )
    arguments = evaluation_arguments(path, tmp_path)
    cfg = evaluation.subject(arguments).cfg
    assert (cfg.audio.frontend, cfg.video.size, config.bands(cfg.audio)) == ("avid", 224, 257)
    good(tmp_path / "videos" / "a.mp4", seconds=2.5)
    table = folder_table(tmp_path / "videos")
    assert data.Clips(table, cfg, False, ("video",), clips=1)[0]["video"].shape == (1, 3, 8, 224, 224)
    with pytest.raises(config.ConfigError, match=r"audio-spectDB-24k-513-norm-stats.npz of its repository"):
        data.Clips(table, cfg, False, ("audio",))
    stats = tmp_path / "theirs.npz"
    np.savez(stats, mean=np.full(257, -20.0), std=np.full(257, 15.0))
    arguments.overrides = [f"audio.statistics={stats}"]
    cfg = evaluation.subject(arguments).cfg
    batch = data.collate([data.Clips(table, cfg, False, ("audio",), clips=1)[0]])
    heard = batch["audio"].flatten(0, 1)
    normalised = data.to_device(batch, torch.device("cpu"), cfg.audio)["audio"]
    torch.testing.assert_close(normalised, (heard + 20) / (15 + 1e-5))


def evaluation_arguments(path, out):
    import eval_linear

    return eval_linear.command_line(
        ["--ckpt", str(path), "--out", str(out), "--data", "folder", "--root", str(out)]
    )
