"""Embeddings of a user's own files, from Python and from the command line, and search among them."""

import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import another_writes_into, chirps, write_media
from test_train import TINY

import avid
from avid import config, data, datasets, embedding, evaluation, media, models, run
from avid.files import ConfigError
from avid.media import MediaError
from avid.tools import collection

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three videos with sound, a mute one, two sound files, a broken file, and a checkpoint of a tiny
    network."""
    root = tmp_path_factory.mktemp("own")
    frames, wave = np.arange(60) / 25, chirps((0.4, 1.9), 2.4, 48000)
    for i, kind in enumerate(("dogs", "dogs", "cats")):
        write_media(root / f"videos/{kind}/{i}.mp4", frames + i, np.roll(wave, 9000 * i), sound_from_s=i)
    write_media(root / "videos/cats/mute.mp4", np.arange(30) / 10)
    write_media(
        root / "videos/cats/meow.wav",
        wave=chirps((0.1, 0.7), 3.0, 22050),
        rate_hz=22050,
        codecs=("", "pcm_s16le"),
    )
    write_media(root / "videos/dogs/bark.ogg", wave=wave, codecs=("", "libopus"))
    (root / "videos/dogs/broken.mp4").write_bytes(b"no video")
    cfg = config.load("toy", TINY)
    torch.manual_seed(1)
    network = models.AudioVisual(cfg.model)
    for module in network.modules():  # mark the statistics as those of a trained network
        if hasattr(module, "num_batches_tracked"):
            module.num_batches_tracked.fill_(9)
    state = {"network": network.state_dict(), "config": dataclasses.asdict(cfg), "bank": {}}
    run.save_checkpoint(root / "last.pt", state)
    return root


@pytest.fixture(scope="module")
def model(folder):
    return avid.load(folder / "last.pt", device="cpu")


def files_of(folder):
    return sorted(path for path in (folder / "videos").rglob("*.*"))


# ----------------------------------------------------------------------------------------------- from Python


def test_import_avid_needs_neither_torch_nor_numpy():
    code = "import sys, avid; assert not {'torch', 'numpy'} & {*sys.modules}; print(avid.load.__doc__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert "ready to embed files" in done.stdout


def test_loading_a_checkpoint_needs_neither_matplotlib_nor_sklearn(folder):
    """Importing them takes as long as embedding a short video."""
    code = "import sys, avid; avid.load('last.pt', 'cpu'); print({'matplotlib', 'sklearn'} & {*sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_a_video_has_unit_vectors_features_and_times(model, folder):
    found = model.embed(str(folder / "videos/dogs/0.mp4"))
    d, f, k = model.cfg.model.embedding, 8 * model.cfg.model.width, model.cfg.eval.clips
    for modality in ("video", "audio"):
        vector, features, clips = (getattr(found, modality + what) for what in ("", "_features", "_clips"))
        assert (vector.shape, features.shape, clips.shape) == ((d,), (f,), (k, d))
        assert vector.dtype == features.dtype == clips.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(clips, axis=1), 1, rtol=1e-5)
        mean = clips.mean(0)
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), rtol=1e-4, atol=1e-6)
    assert found.times.shape == (k,) and (np.diff(found.times) > 0).all()
    assert 0 <= found.times[0] and found.times[-1] + 0.5 < 2.4
    assert found.paths == str(folder / "videos/dogs/0.mp4") and not found.failures


def test_a_missing_modality_is_none(model, folder):
    mute, sound = (model.embed(folder / f"videos/cats/{name}") for name in ("mute.mp4", "meow.wav"))
    assert mute.audio is mute.audio_features is mute.audio_clips is None and mute.video is not None
    assert sound.video is sound.video_features is sound.video_clips is None and sound.audio is not None


def test_a_cover_image_is_not_a_video(model, tmp_path):
    """Music files store their cover as a video stream of one frame."""
    import av

    song = write_media(tmp_path / "plain.m4a", wave=chirps((0.3,), 2.0, 48000))
    image = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
    with av.open(str(song)) as source, av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as file:
        sound = file.add_stream_from_template(source.streams.audio[0])
        cover = file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        for packet in [*cover.encode(image), *cover.encode(None)]:
            file.mux(packet)
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = sound
                file.mux(packet)
    assert media.held(tmp_path / "song.m4a") == ("audio",)
    assert model.embed(tmp_path / "song.m4a").video is None


def test_embed_equals_the_features_of_the_evaluations(model, folder):
    """As evaluation.extract computes them, whatever other files are in the batch."""
    table = datasets.of_files([folder / f"videos/{name}.mp4" for name in ("dogs/0", "dogs/1", "cats/2")])
    clips = data.Clips(table, model.cfg, training=False)
    expected = evaluation.extract(model.network, clips, model.device)
    found = model.embed(files_of(folder))
    rows = [found.paths.index(path) for path in table.paths]
    for modality in ("video", "audio"):
        clips, features = (getattr(found, modality + what)[rows] for what in ("_clips", "_features"))
        np.testing.assert_allclose(clips, expected.embeddings[modality], atol=2e-6)
        np.testing.assert_allclose(features, expected.features[modality].mean(1), rtol=1e-4, atol=1e-5)
        video_level = expected.video_level("embeddings", modality)
        np.testing.assert_allclose(getattr(found, modality)[rows], video_level, atol=2e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_many_files_are_stacked_and_failures_are_named(model, folder, capsys, workers):
    paths = [*files_of(folder), "not/there.mp4"]
    found = model.embed(paths, workers=workers)
    there = [str(path) for path in paths[:-1] if path.name != "broken.mp4"]
    assert found.paths == there and len(found.video) == len(found.times) == 6
    assert list(found.failures) == [str(folder / "videos/dogs/broken.mp4"), "not/there.mp4"]
    assert "No such file" in found.failures["not/there.mp4"]
    printed = "".join(capsys.readouterr())
    assert "2 of 8 files cannot be used, e.g. " in printed and "broken.mp4: cannot be opened" in printed
    missing = {
        Path(path).name: (np.isnan(v).all(), np.isnan(a).all())
        for path, v, a in zip(there, found.video, found.audio, strict=True)
    }
    assert missing == {
        "2.mp4": (False, False), "meow.wav": (True, False), "mute.mp4": (False, True),
        "0.mp4": (False, False), "1.mp4": (False, False), "bark.ogg": (True, False),
    }  # fmt: skip
    assert not np.isnan(found.times).any()
    alone = model.embed(there[0])
    np.testing.assert_allclose(found.row(0).audio_clips, alone.audio_clips, atol=2e-6)
    assert found.row(1).video is None


def test_a_single_unusable_file_is_an_error(model, folder):
    for name, reason in (
        ("broken.mp4", "Invalid data"),
        ("none.mp4", "No such file"),
        (".", "Is a directory"),
    ):
        path = folder / "videos/dogs" / name
        with pytest.raises(MediaError, match=rf"^{re.escape(str(path))}: cannot be opened: {reason}"):
            model.embed(path)
    with pytest.raises(MediaError, match="the list is empty"):
        model.embed([])


def test_a_list_of_unusable_files_gives_an_empty_result(model, folder):
    found = model.embed([folder / "videos/dogs/broken.mp4", "none.mp4"])
    assert found.paths == [] and len(found.failures) == 2 and found.video.shape == (0, 16)


def test_embed_works_in_a_thread(model, folder):
    """Some notebooks run their cells in one."""
    found = []
    thread = threading.Thread(target=lambda: found.append(model.embed(folder / "videos/dogs/0.mp4")))
    thread.start()
    thread.join()
    np.testing.assert_array_equal(found[0].video, model.embed(folder / "videos/dogs/0.mp4").video)


def test_embed_changes_neither_the_network_nor_the_random_state(folder):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = avid.load(folder / "last.pt", "cpu")
    weights = {name: x.clone() for name, x in model.network.state_dict().items()}
    model.network.train()
    first = model.embed(folder / "videos/dogs/0.mp4")
    assert model.network.training
    assert all(torch.equal(x, weights[name]) for name, x in model.network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(model.embed(folder / "videos/dogs/0.mp4").video, first.video)


def test_an_untrained_network_calibrates_batch_norm_on_the_first_files(folder):
    """Its statistics are the mean and variance of a layer's input over the clips of the files embedded
    first."""
    model = avid.load("random", "cpu", settings=TINY)
    norm = model.network.audio_model.conv1[1]
    inputs = []
    hook = norm.register_forward_pre_hook(lambda module, x: inputs.append(x[0].detach().clone()))
    model.embed([folder / "videos/dogs/0.mp4", folder / "videos/cats/2.mp4"])
    hook.remove()
    x = inputs[0].transpose(0, 1).flatten(1)  # channels×rest
    torch.testing.assert_close(norm.running_mean, x.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, x.var(1), rtol=1e-3, atol=1e-5)
    assert norm.momentum == 0.1
    again = model.embed([folder / "videos/dogs/1.mp4"])
    torch.testing.assert_close(norm.running_mean, x.mean(1), rtol=1e-4, atol=1e-5)
    assert np.isfinite(again.video).all()
    sound = avid.load("random", "cpu", settings=TINY)  # video stays uncalibrated
    sound.embed(folder / "videos/cats/meow.wav")
    assert not sound.network.video_model.conv1[1].num_batches_tracked
    with pytest.raises(config.ConfigError, match="two clips or more; raise eval"):
        avid.load("random", "cpu", settings=[*TINY, "eval.clips=1"]).embed(folder / "videos/dogs/0.mp4")


def test_a_checkpoint_released_with_avid_cma_can_be_loaded(folder, tmp_path):
    """It holds no settings. The defaults are AVID's; the caller gives those that differ."""
    cfg = config.load("avid", small := [x for x in TINY if x.startswith(("model.", "video.", "eval."))])
    network = models.AudioVisual(cfg.model)
    torch.save(
        {"model": {f"module.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "AVID.pth.tar"
    )
    model = avid.load(tmp_path / "AVID.pth.tar", "cpu", settings=small)
    assert model.cfg.audio == cfg.audio
    with pytest.raises(config.ConfigError, match=r"needs audio\.statistics=FILE"):  # to normalise bands
        model.embed(folder / "videos/dogs/0.mp4")
    model = avid.load(tmp_path / "AVID.pth.tar", "cpu", settings=[*small, "audio.frontend=log"])
    assert model.embed(folder / "videos/dogs/0.mp4").audio.shape == (16,)


def test_a_wrong_checkpoint_is_a_one_line_error(folder, tmp_path):
    (tmp_path / "text.pt").write_text("no checkpoint")
    for path, message in (
        (tmp_path / "none.pt", "no checkpoint"),
        (tmp_path / "text.pt", "cannot read the checkpoint"),
    ):
        with pytest.raises(run.CheckpointError, match=message):
            avid.load(path)
    with pytest.raises(config.ConfigError, match="unknown setting"):
        avid.load(folder / "last.pt", settings=["eval.clip=3"])


def test_the_code_of_the_documentation_runs_from_any_folder(folder, tmp_path):
    text = (ROOT / "docs" / "own-videos.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "runs/toy").mkdir(parents=True)
    for source, name in (
        ("last.pt", "runs/toy/last.pt"),
        ("videos/dogs/0.mp4", "dog.mp4"),
        ("videos/dogs/1.mp4", "a.mp4"),
        ("videos/dogs/bark.ogg", "b.ogg"),
    ):
        (tmp_path / name).symlink_to(folder / source)
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


# -------------------------------------------------------------------------------------------- python -m avid


def run_embed(folder, out, *what, settings=()):
    arguments = [
        "embed",
        "--ckpt",
        str(folder / "last.pt"),
        "--device",
        "cpu",
        "--workers",
        "1",
        *map(str, what),
        "--out",
        str(out),
    ]
    collection.main([*arguments, *settings])
    with np.load(out, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_embed_writes_an_unlabelled_folder_into_one_file(folder, model, tmp_path, capsys):
    for path in files_of(folder):
        (tmp_path / "flat" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "flat" / path.name).symlink_to(path)
    arrays = run_embed(folder, tmp_path / "f.npz", tmp_path / "flat")
    about = json.loads(str(arrays["about"]))
    assert arrays["paths"].tolist() == ["0.mp4", "1.mp4", "2.mp4", "bark.ogg", "meow.wav", "mute.mp4"]
    assert set(arrays["labels"]) == {""}
    assert list(about["failures"]) == ["broken.mp4"] and about["root"] == str(tmp_path / "flat")
    assert "1 of 7 files cannot be used, e.g. broken.mp4" in capsys.readouterr().out
    found = model.embed([tmp_path / "flat" / name for name in arrays["paths"]])
    for name in (*embedding.ARRAYS, "times"):
        assert arrays[name].dtype == getattr(found, name).dtype
        np.testing.assert_allclose(arrays[name], getattr(found, name), atol=2e-6)
    assert not list(tmp_path.glob("*.part*"))


def test_embed_takes_folders_lists_and_files(folder, tmp_path, capsys):
    videos = folder / "videos"
    arrays = run_embed(folder, tmp_path / "classes.npz", videos)
    labels = dict(zip(arrays["paths"].tolist(), arrays["labels"].tolist(), strict=True))
    assert labels["dogs/0.mp4"] == "dogs" and labels["cats/meow.wav"] == "cats" and len(labels) == 6

    (videos / "list.txt").write_text("dogs/1.mp4\n\ncats/mute.mp4\n")
    arrays = run_embed(folder, tmp_path / "lines.npz", videos / "list.txt")
    assert arrays["paths"].tolist() == ["dogs/1.mp4", "cats/mute.mp4"]
    (videos / "list.txt").unlink()

    (videos / "list.csv").write_text("path,start,end\ndogs/1.mp4,1.2,2.2\ndogs/none.mp4,,\n")
    arrays = run_embed(folder, tmp_path / "rows.npz", videos / "list.csv")
    assert (
        arrays["paths"].tolist() == ["dogs/1.mp4"]
        and 1.2 <= arrays["times"].min() <= arrays["times"].max() <= 1.7
    )
    assert json.loads(str(arrays["about"]))["failures"] == {"dogs/none.mp4": "not on disk"}
    assert "1 of 2 files cannot be used, e.g. dogs/none.mp4: not on disk" in capsys.readouterr().out
    parts = "path,start,end\ndogs/1.mp4,1,1.9\ndogs/broken.mp4,0,1\ndogs/broken.mp4,1,2\ndogs/1.mp4,1.2,2\n"
    (videos / "list.csv").write_text(parts)  # several parts of a file
    arrays = run_embed(folder, tmp_path / "parts.npz", videos / "list.csv")
    assert arrays["paths"].tolist() == ["dogs/1.mp4"] * 2 and len(arrays["times"]) == 2
    assert arrays["start_s"].tolist() == [1, 1.2] and arrays["end_s"].tolist() == [1.9, 2]
    failures = json.loads(str(arrays["about"]))["failures"]
    assert [*failures] == ["dogs/broken.mp4 [0.0-1.0 s]", "dogs/broken.mp4 [1.0-2.0 s]"]
    (videos / "list.csv").unlink()

    two = [videos / "dogs/0.mp4", videos / "cats/meow.wav"]
    assert run_embed(folder, tmp_path / "files.npz", *two)["paths"].tolist() == [str(path) for path in two]


def test_a_complete_result_is_kept_and_other_files_are_not_overwritten(folder, tmp_path, capsys, monkeypatch):
    files = [folder / "videos/dogs/0.mp4", folder / "videos/cats/2.mp4"]
    run_embed(folder, out := tmp_path / "f.npz", *files)
    before = out.stat().st_mtime_ns
    monkeypatch.setattr(embedding.Model, "parts", lambda *_: pytest.fail("decoded again"))
    run_embed(folder, out, *files)
    assert out.stat().st_mtime_ns == before
    for more in ([files[0]], [*files, "--set", "eval.clips=3"]):
        with pytest.raises(SystemExit) as stop:
            run_embed(folder, out, *more)
        assert stop.value.code == 2
        assert "f.npz holds something else, and is not overwritten" in capsys.readouterr().err
    (tmp_path / "other.npz").write_text("other")
    with pytest.raises(SystemExit):
        run_embed(folder, tmp_path / "other.npz", *files)
    assert (tmp_path / "other.npz").read_text() == "other"


def test_two_commands_do_not_embed_into_one_file(folder, model, tmp_path):
    (tmp_path / "f.npz.parts").mkdir()
    with (
        another_writes_into(tmp_path / "f.npz.parts"),
        pytest.raises(ConfigError, match="another command is writing"),
    ):
        collection.embed(model, datasets.of_files(["both.mp4"], folder), tmp_path / "f.npz")


def test_what_decides_embeddings_is_in_their_mark(folder, model, monkeypatch):
    table = datasets.of_files(["both.mp4"], folder)
    marks = [collection.mark_of(model, table)]
    for part, change in ("optim", {"amp": "none"}), ("data", {"timeout_s": 1.0}), ("eval", {"clips": 7}):
        changed = dataclasses.replace(getattr(model.cfg, part), **change)
        assert changed != getattr(model.cfg, part)
        monkeypatch.setattr(model, "cfg", dataclasses.replace(model.cfg, **{part: changed}))
        marks.append(collection.mark_of(model, table))
    assert len(set(marks)) == 4


def embed_eight_at_a_time(arguments, folder, note):
    """`python -m avid embed` in parts of eight files. It writes the number of files read to `note`."""
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)  # start decoding processes in the default way
    fill = collection.fill

    def count_and_fill(model, table, todo, workers):
        note.write_text(str(sum(len(rows) for rows, _ in todo)))
        fill(model, table, todo, workers)

    collection.PART_FILES, collection.fill = 8, count_and_fill
    collection.main(arguments)


@pytest.mark.parametrize("checkpoint", ["last.pt", "random"])
def test_a_killed_embed_resumes_to_the_same_bytes(folder, tmp_path, checkpoint):
    """Forty files, which are links to seven. The kill comes as soon as two parts are written."""
    (tmp_path / "many").mkdir()
    for i in range(40):
        source = files_of(folder)[i % 7]
        os.link(source, tmp_path / f"many/{i:02d}{source.suffix}")
    checkpoint = checkpoint if checkpoint == "random" else str(folder / checkpoint)
    command = ["embed", "--ckpt", checkpoint, "--device", "cpu", "--workers", "1", "many"]
    command += ["--set", "eval.batch_size=8"] + [x for setting in TINY for x in ("--set", setting)]

    def start(out):
        forked.serve()
        process = forked.context.Process(
            target=embed_eight_at_a_time, args=([*command, "--out", out], tmp_path, tmp_path / "note")
        )
        process.start()
        return process

    process = start("whole.npz")
    process.join()
    assert process.exitcode == 0
    process = start("killed.npz")
    parts = tmp_path / "killed.npz.parts"
    while process.is_alive() and len(list(parts.glob("*.npz"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
    kept = sorted(parts.glob("*.npz"))
    assert 2 <= len(kept) < 5 and not (tmp_path / "killed.npz").exists()
    content = kept[0].read_bytes()  # damage one part: it must be computed again
    middle = len(content) // 2
    kept[0].write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    process = start("killed.npz")
    process.join()
    assert process.exitcode == 0
    # only the missing parts were computed
    assert int((tmp_path / "note").read_text()) == 40 - 8 * (len(kept) - 1)
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not parts.exists()


def test_parquet_has_one_row_per_file(folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="no pyarrow: parquet was not written")
    expected = run_embed(folder, tmp_path / "f.npz", folder / "videos")
    arguments = [
        "embed",
        "--ckpt",
        str(folder / "last.pt"),
        "--device",
        "cpu",
        "--workers",
        "1",
        str(folder / "videos"),
    ]
    collection.main([*arguments, "--out", str(tmp_path / "f.parquet")])
    table = parquet.read_table(tmp_path / "f.parquet")
    about = json.loads(table.schema.metadata[b"avid"])
    assert about["failures"] == json.loads(str(expected["about"]))["failures"]
    rows = table.to_pylist()
    assert [(row["path"], row["label"]) for row in rows] == [
        *zip(expected["paths"], expected["labels"], strict=True)
    ]
    for i, row in enumerate(rows):
        assert (row["start_s"], row["end_s"]) == (expected["start_s"][i], expected["end_s"][i]) == (0, np.inf)
        for name in (*embedding.ARRAYS, "times"):
            if np.isnan(expected[name][i]).any():
                assert row[name] is None
            else:
                np.testing.assert_array_equal(np.array(row[name], expected[name].dtype), expected[name][i])
    before = (tmp_path / "f.parquet").stat().st_mtime_ns
    collection.main([*arguments, "--out", str(tmp_path / "f.parquet")])
    assert (tmp_path / "f.parquet").stat().st_mtime_ns == before


def test_parquet_takes_a_part_of_which_no_file_can_be_used(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="no pyarrow: parquet was not written")
    shapes, parts = {"video": (4,), "video_clips": (2, 4)}, []
    for n in (0, 2):
        parts.append(tmp_path / f"{n}.npz")
        np.savez(parts[-1], times=np.ones((n, 2)), **{k: np.ones((n, *s)) for k, s in shapes.items()})
    collection.write_parquet(tmp_path / "f.parquet", parts, datasets.of_files(["a", "b"]), shapes, {})
    rows = parquet.read_table(tmp_path / "f.parquet").to_pylist()
    assert [(row["path"], row["video"]) for row in rows] == [("a", [1] * 4), ("b", [1] * 4)]


def error_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        collection.main(command)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_wrong_arguments_are_a_one_line_error(folder, tmp_path, capsys, monkeypatch):
    checkpoint = ["--ckpt", str(folder / "last.pt")]
    videos = str(folder / "videos")
    assert "no file and no folder nowhere" in error_of(
        ["embed", *checkpoint, "nowhere", "--out", "f.npz"], capsys
    )
    assert "ends neither in .npz nor in .parquet" in error_of(
        ["embed", *checkpoint, videos, "--out", "f.csv"], capsys
    )
    assert "is a folder; name one folder, or files" in error_of(
        ["embed", *checkpoint, videos, "a.mp4", "--out", "f.npz"], capsys
    )
    assert "no checkpoint none.pt" in error_of(
        ["embed", "--ckpt", "none.pt", videos, "--out", "f.npz"], capsys
    )
    (tmp_path / "empty").mkdir()
    assert "no list or file in" in error_of(
        ["embed", *checkpoint, str(tmp_path / "empty"), "--out", "f.npz"], capsys
    )
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    out = str(tmp_path / "f.npz")
    bad = ["embed", *checkpoint, "--workers", "1", str(tmp_path / "bad.mp4"), "--out", out]
    assert "none of the 1 files can be used" in error_of(bad, capsys)
    monkeypatch.setattr(collection.importlib.util, "find_spec", lambda name: None)
    parquet = ["embed", *checkpoint, videos, "--out", "f.parquet"]
    assert "parquet needs the package pyarrow: pip install" in error_of(parquet, capsys)


# ---------------------------------------------------------------------------------------------------- search


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("of", "to"), [("video", "video"), ("audio", "audio"), ("video", "audio"), ("audio", "video")]
)
def test_search_is_a_sort_by_similarity(of, to):
    """Against loops. Within a modality by features, across modalities by embeddings. Files without the
    modality are never found."""
    rng = np.random.default_rng(0)
    n, k, d, f = 30, 4, 8, 12
    arrays = {"times": rng.uniform(0, 9, (n, k))}
    for modality in ("video", "audio"):
        clips = unit(rng.standard_normal((n, k, d)))
        arrays |= {
            modality: unit(clips.mean(1)),
            f"{modality}_clips": clips,
            f"{modality}_features": rng.random((n, f)),
        }
        for name in (modality, f"{modality}_clips", f"{modality}_features"):
            arrays[name] = arrays[name].astype(np.float32)
            arrays[name][rng.permutation(n)[:5] if name == modality else np.isnan(arrays[modality][:, 0])] = (
                np.nan
            )
    query = embedding.Embedding(
        *(unit(rng.standard_normal(d)).astype(np.float32) for _ in range(2)),
        *(rng.random(f).astype(np.float32) for _ in range(2)), None, None, None, "query",
    )  # fmt: skip
    skip = [int(np.flatnonzero(~np.isnan(arrays[to][:, 0]))[0])]
    rows, scores, times = collection.ranked(query, arrays, of, to, 7, skip)
    kind = "_features" if of == to else ""
    expected = []
    for i in range(n):
        if i not in skip and not np.isnan(arrays[to][i, 0]):
            a, b = getattr(query, of + kind), arrays[to + kind][i]
            expected.append((-float(a @ b) / float(np.linalg.norm(a) * np.linalg.norm(b)), i))
    expected = sorted(expected)[:7]
    assert rows.tolist() == [i for _, i in expected]
    np.testing.assert_allclose(scores, [-score for score, _ in expected], rtol=1e-5)
    for row, time_s in zip(rows, times, strict=True):
        best = max(range(k), key=lambda c: float(getattr(query, of) @ arrays[f"{to}_clips"][row, c]))
        assert time_s == arrays["times"][row, best]
    every_row, *_ = collection.ranked(query, arrays, of, to, 99)
    assert len(every_row) == 25  # all 25 that have the modality, as no row is excluded


def test_search_ranks_as_eval_retrieval_does():
    rng = np.random.default_rng(3)
    clips = rng.random((40, 3, 6)).astype(np.float32)
    found = evaluation.Features(np.arange(40), features={"audio": clips})
    key = found.video_level("features", "audio")
    nearest = evaluation.nearest(key, key, 5, exclude=np.arange(40))
    some = unit(rng.standard_normal((40, 3, 6))).astype(np.float32)
    arrays = {"audio_features": clips.mean(1), "audio_clips": some, "times": np.zeros((40, 3))}
    for i in range(40):
        query = embedding.Embedding(None, some[i, 0], None, clips[i].mean(0), None, None, None, "")
        assert collection.ranked(query, arrays, "audio", "audio", 5, [i])[0].tolist() == nearest[i].tolist()


def run_search(folder, out, *more):
    collection.main(
        [
            "search",
            "--ckpt",
            str(folder / "last.pt"),
            "--device",
            "cpu",
            "--workers",
            "1",
            "--out",
            str(out),
            *map(str, more),
        ]
    )


def test_search_in_a_folder_reuses_its_embeddings(folder, tmp_path, capsys, monkeypatch):
    videos = folder / "videos"
    run_search(folder, tmp_path, videos, videos / "dogs/0.mp4", "-k", "3")
    first = capsys.readouterr().out
    (kept,) = (tmp_path / "features").glob("*.npz")
    assert f"6 files, their embeddings: {kept}" in first and "1 of 7 files cannot be used" in first
    for heading in ("like its picture", "like its sound", "sounds for its picture", "pictures for its sound"):
        assert f"0.mp4: {heading}\n" in first
    by_picture = first.split("like its picture")[1].split("like its sound")[0]
    lines = [line.split() for line in by_picture.strip().splitlines()[1:]]
    lines = [line for line in lines if line and line[0].isdigit()]
    # neither the query itself nor files without picture
    assert {line[4] for line in lines} == {"dogs/1.mp4", "cats/2.mp4", "cats/mute.mp4"}
    assert all(re.fullmatch(r"0:0\d\.\d", line[2]) and line[3] == line[4].split("/")[0] for line in lines)
    assert "dogs/0.mp4" in first.split("sounds for its picture")[1]  # its own sound may be found

    monkeypatch.setattr(embedding.Model, "calibrate", lambda *_: None)
    monkeypatch.setattr(collection, "fill", lambda *_: pytest.fail("decoded again"))
    run_search(folder, tmp_path, videos, videos / "dogs/0.mp4", "-k", "3")
    assert capsys.readouterr().out == first
    run_search(folder, tmp_path, kept, videos / "cats/meow.wav", "--by", "audio")  # search the .npz itself
    by_sound = capsys.readouterr().out
    assert "like its sound" in by_sound and "pictures for its sound" in by_sound
    assert "for its picture" not in by_sound


def test_search_uses_only_the_modalities_of_the_query(folder, tmp_path, capsys):
    videos = folder / "videos"
    run_embed(folder, tmp_path / "f.npz", videos)
    run_search(folder, tmp_path, tmp_path / "f.npz", videos / "cats/mute.mp4")
    out = capsys.readouterr().out
    assert "like its picture" in out and "sounds for its picture" in out and "its sound" not in out
    arguments = ["search", "--ckpt", str(folder / "last.pt"), "--device", "cpu", str(tmp_path / "f.npz")]
    wrong = error_of([*arguments, str(videos / "cats/meow.wav"), "--by", "video"], capsys)
    assert "meow.wav has no picture; use --by audio" in wrong
    assert "broken.mp4: cannot be opened" in error_of([*arguments, str(videos / "dogs/broken.mp4")], capsys)
    other = error_of([*arguments, str(videos / "dogs/0.mp4"), "--set", "eval.clips=3"], capsys)
    assert "was made by another network or with other settings" in other
    random = ["search", "--ckpt", "random", str(tmp_path / "f.npz"), str(videos / "dogs/0.mp4")]
    assert "name a folder or a list, not a .npz" in error_of(random, capsys)
    (tmp_path / "other.html").write_text("<p>other")
    page = [*arguments, str(videos / "dogs/0.mp4"), "--page", str(tmp_path / "other.html")]
    assert "is no page of avid's; move it away" in error_of(page, capsys)


def test_search_names_the_part_of_a_file_that_was_found(folder, tmp_path, capsys):
    """A list may hold several parts of a file. The table and the page name the part."""
    (tmp_path / "videos").symlink_to(folder / "videos")
    (tmp_path / "list.csv").write_text(
        "path,start,end\nvideos/dogs/1.mp4,0,1.2\nvideos/dogs/1.mp4,1.2,\nvideos/cats/mute.mp4,,\n"
    )
    query = folder / "videos/dogs/0.mp4"
    run_search(folder, tmp_path, tmp_path / "list.csv", query, "--by", "video", "--page", tmp_path / "f.html")
    out, text = capsys.readouterr().out, (tmp_path / "f.html").read_text(encoding="utf-8")
    assert "3 clips of 2 files, their embeddings:" in out and "3 clips of 2 files" in text
    for name in ("videos/dogs/1.mp4 [0.0-1.2 s]", "videos/dogs/1.mp4 [1.2-end]", "videos/cats/mute.mp4"):
        assert len(re.findall(rf"  {re.escape(name)}$", out, re.MULTILINE)) == 1 + (".mp4 [" in name)
        assert f"<bdi>{name}</bdi>" in text
    assert 'href="videos/dogs/1.mp4"' in text  # the link leads to the whole file


def test_search_with_an_untrained_network_is_repeatable(folder, tmp_path, capsys):
    """Batch norm is calibrated on the files of the folder, also when their embeddings are reused."""
    arguments = ["search", "--ckpt", "random", "--device", "cpu", "--workers", "1", "--out", str(tmp_path)]
    arguments += [x for setting in TINY for x in ("--set", setting)]
    arguments += [str(folder / "videos"), str(folder / "videos/dogs/0.mp4")]
    collection.main(arguments)
    first = capsys.readouterr().out
    collection.main(arguments)
    assert capsys.readouterr().out == first


def test_an_unlabelled_folder_from_training_to_search(folder, tmp_path):
    """The command that train.py prints at its end works. Without classes, eval_linear.py names commands that
    need none."""
    root = tmp_path / "my videos"
    root.mkdir()
    for i in range(8):
        os.link(folder / f"videos/{('dogs/0', 'dogs/1', 'cats/2')[i % 3]}.mp4", root / f"{i}.mp4")
    settings = [
        "data.name=folder",
        f"data.root={root}",
        *TINY,
        "optim.batch_size=4",
        "optim.epochs=1",
        "log.check_epochs=0",
    ]

    def python(script, *arguments):
        forked.start(script, arguments, tmp_path, tmp_path / "log").join()
        text = (tmp_path / "log").read_text()
        (tmp_path / "log").unlink()
        return text

    last = python("train.py", *settings, "out=run one").strip().splitlines()[-1]
    assert last.startswith("2 steps done: run one/last.pt; now: python -m avid search --ckpt ")
    command = shlex.split(last.partition("python -m avid ")[2].replace("QUERY", f"'{root}/1.mp4'"))
    text = avid_command(command, tmp_path)
    assert (
        "8 files, their embeddings: run one/features/search-" in text
        and "1.mp4: pictures for its sound" in text
    )
    printed = python("eval_linear.py", "--ckpt", "run one/last.pt").strip().splitlines()
    assert "files have no class" in printed[-1]
    for command in ("python -m avid search", "eval_retrieval.py --task cross"):
        assert command in printed[-1]
    assert "a→v instance" in python("eval_retrieval.py", "--ckpt", "run one/last.pt", "--task", "cross")


def avid_command(arguments, folder):
    done = subprocess.run(
        [sys.executable, "-m", "avid", *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
