"""Packed data: the right frames and sound at every time, the same bytes after an interruption, damage
reported."""

import csv
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import wave
from collections import Counter
from itertools import chain
from pathlib import Path
from unittest import mock

import av
import forked
import numpy as np
import pytest
import torch
from conftest import another_writes_into, chirp_time, chirps, numbered, numbers, tone, write_media
from test_train import ENVIRONMENT, ROOT, TINY, final, metrics, run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg

from avid import config, datasets, packed, spectrogram, toy
from avid import data as avid_data
from avid.datasets import DataError
from avid.files import ConfigError
from avid.media import Media, MediaError, Timed
from avid.packed import PackedMedia
from avid.tools import pack

SECONDS, RATE_HZ, FPS = 3.0, 16000, 16.0
CHIRPS_S = (0.4, 1.3, 2.2)
SMALL = pack.Small(fps=FPS, short_side=64, audio_rate=RATE_HZ, shard_gb=4e-4)  # two or three videos a shard


def video(path, fps=25, seconds=SECONDS, **content):
    """A file whose frames show their numbers and whose sound is chirps over a quiet tone."""
    frame_s = content.pop("frame_s", np.arange(round(seconds * fps)) / fps)
    sound = chirps(CHIRPS_S, seconds, 48000) + 0.1 * tone(300, seconds, 48000)
    return write_media(path, frame_s=frame_s, wave=content.pop("sound", sound), **content)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of two classes and nine videos with several frame rates; two more files cannot be used."""
    root = tmp_path_factory.mktemp("world")
    for k, fps in enumerate((25, 30, 12, 50, 25, 25, 16, 24)):
        video(root / "train" / ("cat", "dog")[k % 2] / f"{k}.mp4", fps)
    uneven_s = np.cumsum(np.random.default_rng(0).choice([0.02, 0.04, 0.11, 0.2], size=30))
    video(root / "test" / "cat" / "uneven.mkv", frame_s=uneven_s - uneven_s[0])
    write_media(root / "test" / "dog" / "mute.mp4", frame_s=np.arange(50) / 25)
    (root / "train" / "dog" / "broken.mp4").write_bytes(b"no video")
    return root


def run_pack(root, dst, small=SMALL, name="folder", **more):
    """pack.pack without other processes. Only the tests of packing itself start some."""
    with mock.patch.object(pack.processes, "outcomes", outcomes_in_process):
        return pack.pack(config.Data(name=name, root=str(root), **more), dst, small, workers=1)


def outcomes_in_process(function, tasks, workers, limit_s):
    yield from ((task, function(*task)) for task in tasks)


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    """The packed folder."""
    dst = tmp_path_factory.mktemp("packed")
    assert run_pack(world, dst) == 9
    return dst


def load_table(root, split="train", name="packed", **more):
    return datasets.load(config.Data(name=name, root=str(root), **more), split)


def open_packed(root, path, modalities=("video", "audio")):
    found = load_table(root, "all")
    return PackedMedia(root, found.record[found.paths.index(path)], modalities)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    "path", [f"train/{('cat', 'dog')[k % 2]}/{k}.mp4" for k in range(4)] + ["test/cat/uneven.mkv"]
)
def test_a_packed_frame_is_right_to_within_half_a_frame(world, shards, path):
    """At any time: a frame that the file shows at most 1/32 s earlier or later. In the middle of a packed
    frame: the frame that the file shows then."""
    file, media = Media(world / path, ("video",)), open_packed(shards, path, ("video",))
    assert (media.first_s, media.last_s) == (file.first_s, file.last_s)
    rng = np.random.default_rng(0)
    times = rng.uniform(-0.2, media.last_s + 0.2, 300)
    near = np.linspace(-0.501, 0.501, 21)[:, None] / FPS
    # the first frame is shown before the video, too, and the last one after it
    within = times.clip(media.first_s, media.last_s - 1e-3)
    allowed = np.array(numbers(file.frames((within + near).ravel()))).reshape(21, -1)  # 21×300
    assert (allowed == numbers(media.frames(times))).any(0).all()
    middle = media.first_s + (np.arange(int((media.last_s - media.first_s) * FPS)) + 0.5) / FPS
    assert numbers(media.frames(middle)) == numbers(file.frames(middle))


def test_frames_can_be_read_in_any_order_and_repeatedly(shards):
    media = open_packed(shards, "train/cat/6.mp4")  # 16 frames a second
    asked = [30, 2, 2, 47, 30, 0]
    frames = media.frames((np.array(asked) + 0.5) / FPS)
    assert frames.shape == (6, 64, 64, 3) and frames.dtype == np.uint8
    assert numbers(frames) == asked
    assert numbers(media.frames([-1.0, 2.99, 100.0])) == [0, 47, 47]


def test_packed_frames_equal_those_of_the_file_up_to_jpeg(world, shards):
    times = np.arange(0.1, 2.9, 0.3)
    for path in ("train/cat/0.mp4", "train/dog/1.mp4"):
        media = open_packed(shards, path)
        times = media.first_s + (np.floor((times - media.first_s) * FPS) + 0.5) / FPS
        difference = media.frames(times).astype(int) - Media(world / path).frames(times)
        assert np.abs(difference).mean() < 2 and np.abs(difference).max() < 40


def test_keep_rate_keeps_every_frame_at_its_time(world, tmp_path):
    """With --keep-rate, each time gives the frame that the file shows."""
    run_pack(world, tmp_path / "all", SMALL._replace(keep_rate=True))
    for path in ("train/dog/3.mp4", "train/dog/1.mp4", "test/cat/uneven.mkv"):
        file, media = Media(world / path, ("video",)), open_packed(tmp_path / "all", path, ("video",))
        times = np.random.default_rng(0).uniform(0, media.last_s, 300)
        assert numbers(media.frames(times)) == numbers(file.frames(times))


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 24000, 8000])
def test_packed_sound_keeps_its_time(world, shards, rate_hz):
    file, media = Media(world / "train/cat/0.mp4"), open_packed(shards, "train/cat/0.mp4")
    for time_s in CHIRPS_S:
        begin_s = time_s - 0.2
        found, expected = (m.sound(begin_s, round(0.5 * rate_hz), rate_hz) for m in (media, file))
        assert found.dtype == np.float32
        assert begin_s + chirp_time(found, rate_hz) == pytest.approx(time_s, abs=1e-3)
        # the file has frequencies above 8 kHz, the pack has not
        np.testing.assert_allclose(found, expected, atol=0.02 if rate_hz == 24000 else 2e-3)


def test_there_is_silence_before_and_after_the_sound(shards):
    media = open_packed(shards, "train/cat/0.mp4")
    wave = media.sound(-1.0, 6 * RATE_HZ, RATE_HZ)
    assert not wave[:RATE_HZ].any() and not wave[round(4.1 * RATE_HZ) :].any()
    assert np.abs(wave[RATE_HZ : 4 * RATE_HZ]).max() > 0.5
    assert not media.sound(50.0, 100, RATE_HZ).any()


def test_16_bit_sound_is_kept_exactly_and_loud_sound_is_not_clipped(tmp_path):
    wave = tone(440, 2.0, RATE_HZ)
    write_media(tmp_path / "in/a.wav", wave=wave, rate_hz=RATE_HZ, codecs=("", "pcm_s16le"))
    write_media(tmp_path / "in/loud.wav", wave=3 * wave, rate_hz=RATE_HZ, codecs=("", "pcm_f32le"))
    assert pack_sounds(tmp_path / "in", tmp_path / "out") == 2
    for name, atol in (("a.wav", 0.0), ("loud.wav", 3e-5)):
        expected = Media(tmp_path / "in" / name, ("audio",)).sound(0.0, 2 * RATE_HZ, RATE_HZ)
        found = open_packed(tmp_path / "out", name, ("audio",)).sound(0.0, 2 * RATE_HZ, RATE_HZ)
        np.testing.assert_allclose(found, expected, atol=atol)
    with pytest.raises(MediaError, match="no picture"):
        open_packed(tmp_path / "out", "a.wav")


def pack_sounds(root, dst):
    """Pack a folder of sound files, as a data set that needs no video."""
    row = datasets.DATA["folder"]
    datasets.DATA["folder"] = row._replace(needs=("audio",), modalities=("audio",))
    try:
        return run_pack(root, dst)
    finally:
        datasets.DATA["folder"] = row


def test_an_instance_is_a_part_of_a_file(world, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(world / "train/cat/0.mp4", tmp_path / "in/a.mp4")
    shutil.copy(world / "train/cat/4.mp4", tmp_path / "in/b.mp4")
    (tmp_path / "in/manifest.csv").write_text(
        "path,label,split,start,end\na.mp4,x,train,0.5,1.7\nb.mp4,,train,1,\n"
    )
    run_pack(tmp_path / "in", tmp_path / "out", name="manifest")
    found = load_table(tmp_path / "out")
    assert (found.start_s.tolist(), found.end_s.tolist()) == ([0.5, 1.0], [1.7, np.inf])
    assert found.labels.tolist() == [0, -1]
    media, file = open_packed(tmp_path / "out", "a.mp4"), Media(tmp_path / "in/a.mp4", start_s=0.5, end_s=1.7)
    assert (media.first_s, media.last_s) == (file.first_s, file.last_s) == (0.5, 1.7)
    middle = 0.5 + (np.arange(19) + 0.5) / FPS
    assert numbers(media.frames(middle)) == numbers(file.frames(middle))
    assert 1.2 + chirp_time(media.sound(1.2, 8000, RATE_HZ), RATE_HZ) == pytest.approx(1.3, abs=1e-3)
    assert not media.sound(2.0, 8000, RATE_HZ).any()  # outside the part: not packed


def test_repeated_frames_are_stored_once(tmp_path):
    still = numbered([7] * 75)
    with mock.patch("conftest.numbered", lambda *_: still):
        video(tmp_path / "in/still.mp4", encoder={"crf": "0"})
    run_pack(tmp_path / "in", tmp_path / "out")
    media = open_packed(tmp_path / "out", "still.mp4")
    assert len(media.table) < 10
    assert set(numbers(media.frames(np.arange(0, 3, 0.1)))) == {7}


def test_large_frames_are_shrunk(world, tmp_path):
    video(tmp_path / "in/a.mp4", size=160)
    run_pack(tmp_path / "in", tmp_path / "out", SMALL._replace(short_side=32))
    media = open_packed(tmp_path / "out", "a.mp4")
    assert media.size == (32, 32)
    middle = (np.arange(48) + 0.5) / FPS
    assert numbers(media.frames(middle)) == numbers(Media(tmp_path / "in/a.mp4").frames(middle))


def test_ordinary_tools_read_a_shard(shards):
    """Python's tarfile, json and wave, and numpy and torchvision."""
    keys = Counter()
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, text in members.items():
            key, _, ending = name.partition(".")
            keys[key] += 1
            if ending != "json":
                continue
            facts = json.loads(text)
            assert facts["record"] == int(key)
            frames = np.load(io.BytesIO(members[f"{key}.npy"]), allow_pickle=False)
            jpegs = [members[f"{key}.mjpeg"][row["at"] :][: row["bytes"]] for row in frames]
            assert b"".join(jpegs) == members[f"{key}.mjpeg"]
            image = decode_jpeg(torch.frombuffer(bytearray(jpegs[3]), dtype=torch.uint8)).permute(1, 2, 0)
            media = open_packed(shards, facts["path"])
            assert numbers(image[None]) == numbers(media.frames(frames["start_s"][[3]] + 0.01))
            with wave.open(io.BytesIO(members[f"{key}.wav"])) as sound:
                assert sound.getparams()[:4] == (1, 2, RATE_HZ, facts["sound"]["samples"])
                samples = np.frombuffer(sound.readframes(10**6), "<i2")
            assert np.array_equal(samples, media.pcm(facts["sound"]["first_s"], len(samples)))
    assert len(keys) == 9 and set(keys.values()) == {4}


def test_webdataset_reads_a_shard(shards):
    webdataset = pytest.importorskip("webdataset")
    found = [
        sample
        for path in sorted(shards.glob("*.tar"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert len(found) == 9
    assert {*found[0]} >= {"json", "npy", "mjpeg", "wav"}


# ------------------------------------------------------------------------------------------- lists and labels


def test_classes_splits_and_names_are_those_of_the_list(world, shards):
    for split in ("train", "test", "all"):
        file, found = load_table(world, split, "folder"), load_table(shards, split)
        usable = [
            i
            for i, path in enumerate(file.paths)
            if path not in ("test/dog/mute.mp4", "train/dog/broken.mp4")
        ]
        assert found.paths == [file.paths[i] for i in usable]
        assert found.classes == file.classes
        assert found.labels.tolist() == file.labels[usable].tolist()
        assert len(set(found.record.tolist())) == len(found)
    assert load_table(shards).missing == ["train/dog/broken.mp4"]
    with pytest.raises(DataError, match=r"no such split in .*, only test, train\n"):
        load_table(shards, "validation1")


def test_failures_are_listed_with_their_reasons(shards):
    rows = list(csv.DictReader((shards / "failures.csv").open()))
    assert {row["path"]: row["reason"] for row in rows} == {
        "test/dog/mute.mp4": "no sound",
        "train/dog/broken.mp4": "cannot be opened: Invalid data found when processing input",
    }


def test_a_name_that_is_not_utf_8_is_packed(world, tmp_path):
    name = b"bad\xff.mp4".decode(errors="surrogateescape")
    (tmp_path / "in").mkdir()
    shutil.copy(world / "train" / "cat" / "0.mp4", tmp_path / "in" / name)
    assert run_pack(tmp_path / "in", tmp_path / "out") == 1
    assert load_table(tmp_path / "out").paths == [name]


@pytest.mark.parametrize("broken", ["starts_s", "frames"])
def test_whatever_a_decoder_says_costs_one_file(world, tmp_path, broken, monkeypatch):
    def fail(*_):
        raise av.error.InvalidDataError(1, "damaged")

    (tmp_path / "in").mkdir()
    for name in ("0.mp4", "2.mp4"):
        shutil.copy(world / "train" / "cat" / name, tmp_path / "in" / name)
    shutil.copy(world / "test" / "cat" / "uneven.mkv", tmp_path / "in")
    monkeypatch.setattr(Timed, broken, property(fail) if broken == "starts_s" else fail)
    assert run_pack(tmp_path / "in", tmp_path / "out", SMALL._replace(keep_rate=True)) == 2
    assert "uneven.mkv" in (tmp_path / "out" / "failures.csv").read_text()


def test_any_column_can_be_the_class(world, tmp_path):
    shutil.copytree(world / "train/cat", tmp_path / "in")
    lines = [
        "path,label,split,colour,fold",
        "0.mp4,x,train,red,7",
        "2.mp4,y,test,blue,8",
        "4.mp4,x,dev,red,9",
    ]
    (tmp_path / "in/manifest.csv").write_text("\n".join(lines))
    run_pack(tmp_path / "in", tmp_path / "out", name="manifest")
    for label, split in (
        ("label", "all"),
        ("colour", "all"),
        ("fold", "all"),
        ("colour", "dev"),
        ("label", "test"),
    ):
        file = load_table(tmp_path / "in", split, "manifest", label=label)
        found = load_table(tmp_path / "out", split, label=label)
        assert (found.paths, found.classes, found.columns) == (file.paths, file.classes, file.columns)
        assert found.labels.tolist() == file.labels.tolist()
    with pytest.raises(DataError, match="no column size"):
        load_table(tmp_path / "out", label="size")


def write_benchmarks(root, world):
    """Small folders in the layouts of UCF101, AudioSet and ESC-50: {name: root}."""
    lists = root / "ucf101/ucfTrainTestlist"
    lists.mkdir(parents=True)
    for k in range(3):
        path = root / f"ucf101/UCF-101/{'AB'[k % 2]}/v_{k}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "train/cat/0.mp4", path)
    for n in (1, 2, 3):
        for part in ("train", "test"):
            inside = [k for k in range(3) if (k == n - 1) == (part == "test")]
            text = "".join(f"{'AB'[k % 2]}/v_{k}.avi {k % 2 + 1}\n" for k in inside)
            (lists / f"{part}list{n:02d}.txt").write_text(text)
    audio = root / "audioset"
    audio.mkdir()
    (audio / "class_labels_indices.csv").write_text(
        'index,mid,display_name\n0,/m/0,Speech\n1,/m/1,"Music, sad"\n'
    )
    (audio / "balanced_train_segments.csv").write_text(
        '# a\n# b\naa, 0.0, 2.0, "/m/0,/m/1"\nbb, 0.5, 2.5, "/m/1"\n'
    )
    (audio / "eval_segments.csv").write_text('# a\ncc, 0.0, 2.0, "/m/0"\n')
    for name in ("aa", "bb", "cc"):
        shutil.copy(world / "train/cat/2.mp4", audio / f"{name}.mp4")
    (root / "esc50/meta").mkdir(parents=True)
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for k in range(5):
        lines.append(f"{k}.wav,{k + 1},0,{'dog' if k % 2 else 'rain'},True,x,A")
        write_media(
            root / f"esc50/audio/{k}.wav", wave=tone(300, 1.0, 16000), rate_hz=16000, codecs=("", "pcm_s16le")
        )
    (root / "esc50/meta/esc50.csv").write_text("\n".join(lines))
    return {name: root / name for name in ("ucf101", "audioset", "esc50")}


def test_official_splits_folds_and_multiple_classes_are_kept(world, tmp_path):
    for name, root in write_benchmarks(tmp_path, world).items():
        dst = tmp_path / f"{name}-packed"
        run_pack(root, dst, name=name)
        splits = {
            "ucf101": ["train1", "test1", "train2", "test3", "train", "all"],
            "audioset": ["balanced_train", "train", "eval", "all"],
            "esc50": ["train1", "test1", "test5", "all"],
        }[name]
        for split in splits:
            file, found = load_table(root, split, name), load_table(dst, split)
            order = [found.paths.index(path) for path in file.paths]  # packed rows keep the order of "all"
            assert len(found) == len(file) and found.classes == file.classes, (name, split)
            found = datasets.take(found, order)
            assert found.paths == file.paths and found.columns == file.columns
            assert np.array_equal(found.labels, file.labels) and np.array_equal(found.fold, file.fold)
        row, asked = datasets.DATA[name], datasets.row(config.Data(name="packed", root=str(dst)))
        assert (asked.modalities, asked.needs, asked.evaluation, asked.divisions) == row[1:5]


# ---------------------------------------------------------------------------------------------------- packing


def test_any_number_of_processes_packs_the_same_bytes(world, shards, tmp_path):
    pack.pack(config.Data(name="folder", root=str(world)), tmp_path / "again", SMALL, workers=2)
    assert content(tmp_path / "again") == content(shards)
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert run_pack(world, shards) == 9  # nothing left to do
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_shards_have_the_requested_size_and_random_instances(shards):
    tars = sorted(shards.glob("*.tar"))
    assert [path.name for path in tars] == [f"shard-{k:06d}.tar" for k in range(len(tars))]
    assert len(tars) > 2 and all(path.stat().st_size <= 4e5 + 1024 for path in tars)
    assert load_table(shards, "all").record.tolist() != sorted(load_table(shards, "all").record.tolist())


PACK_SCRIPT = """
import sys
from avid.tools import pack
if __name__ == "__main__":
    pack.main(["pack", *sys.argv[1:]])
"""


def killed(root, dst, kills, rng, longest_s):
    """Pack with so many kills at random moments, then without one. Returns how many kills met a running
    command."""
    script = dst.with_suffix(".py")
    script.write_text(PACK_SCRIPT)
    arguments = [
        str(root),
        str(dst),
        "--workers=2",
        "--short-side=64",
        "--audio-rate=16000",
        "--shard-gb=4e-4",
    ]
    met = 0
    for kill in range(kills + 1):
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        begun = time.monotonic()
        while kill < kills and not (dst / "parts").exists() and process.poll() is None:
            time.sleep(0.01)  # wait until the imports are done
        try:
            process.wait(rng.uniform(0, longest_s) if kill < kills else 120)
        except subprocess.TimeoutExpired:
            met += 1
            if rng.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)  # all processes at once, as when the machine goes down
            else:
                process.kill()  # its workers notice by themselves
            process.wait()
        assert time.monotonic() - begun < 120
    assert process.returncode == 0
    return met


def test_a_killed_pack_resumes_to_the_same_bytes(world, shards, tmp_path):
    assert killed(world, tmp_path / "out", 3, random.Random(0), 2.5) >= 1
    time.sleep(0.5)
    assert content(tmp_path / "out") == content(shards)


def test_a_stop_between_any_two_renames_leaves_no_half_written_file(world, tmp_path, monkeypatch):
    """Stop once before each rename to a final name: no file is half written, and the next run completes the
    pack."""
    root, left, real = world / "train" / "cat", [-1], os.replace

    def replace(source, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    run_pack(root, tmp_path / "whole")
    whole, writes = content(tmp_path / "whole"), -1 - left[0]
    assert writes > 10
    for done in range(writes):
        dst, left[0] = tmp_path / str(done), done
        with pytest.raises(KeyboardInterrupt):
            run_pack(root, dst)
        assert all(whole[name] == x for name, x in content(dst).items() if name in whole)
        left[0] = -1
        run_pack(root, dst)
        assert content(dst) == whole, done


def test_only_one_command_may_pack_into_a_folder(world, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        another_writes_into(tmp_path / "out"),
        pytest.raises(ConfigError, match="another command is writing"),
    ):
        run_pack(world, tmp_path / "out")


def test_a_folder_that_cannot_be_resumed_is_refused(world, shards, tmp_path):
    with pytest.raises(DataError, match="quality was 90 and is 80"):
        run_pack(world, shards, SMALL._replace(quality=80))
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DataError, match=r"holds files that were not packed, e\.g\. notes\.txt"):
        run_pack(world, tmp_path)
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / "pack.json").unlink()
    with pytest.raises(
        DataError, match=r"pack\.json: No such file or directory; a pack has it once it is finished"
    ):
        load_table(tmp_path / "copy")


def test_the_size_is_estimated_before_packing(world, tmp_path, capsys, monkeypatch):
    asked = config.Data(name="folder", root=str(world))
    monkeypatch.setattr(pack, "TRIED", 5)
    assert pack.pack(asked, tmp_path / "out", SMALL, 1, only_estimate=True) == 0
    printed = capsys.readouterr()
    estimate = (printed.out + printed.err).split("about ")[1]
    assert "by 5 of 11 instances, drawn at random" in estimate
    assert not (tmp_path / "out/pack.json").exists()
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"packing needs .* GB more, and 0\.0 GB are free"):
        run_pack(world, tmp_path / "out")
    monkeypatch.undo()
    run_pack(world, tmp_path / "out")  # the instances packed for the estimate are kept
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert float(estimate.split()[0]) * 1e9 == pytest.approx(size, rel=0.5, abs=1e7)


def test_the_command_line(world, shards, tmp_path, capsys):
    dst = str(tmp_path / "out")
    with pytest.raises(SystemExit) as end:
        pack.main(
            [
                "pack",
                str(world),
                dst,
                "--workers=1",
                "--short-side=64",
                "--audio-rate=16000",
                "--shard-gb=4e-4",
            ]
        )
    assert end.value.code == 0
    assert f"now: data.name=packed data.root={dst}" in capsys.readouterr().out
    assert content(tmp_path / "out") == content(shards)
    for wrong in (["--fps=0"], ["--quality=101"], ["--data=packed"], ["--short-side=x"]):
        with pytest.raises(SystemExit) as end:
            pack.main(["pack", str(world), dst, *wrong])
        assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        pack.main(["pack", str(tmp_path / "nowhere"), dst])
    assert end.value.code == 2
    assert "error: folder: no list or file in" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("no video")
    with pytest.raises(SystemExit) as end:
        pack.main(["pack", str(tmp_path / "bad"), str(tmp_path / "none"), "--workers=1"])
    assert end.value.code == 1


# ---------------------------------------------------------------------------------------------------- damages


def read_all(root, names):
    """({path: (numbers of the frames, sound)}, {path: why it cannot be read}) of all records named."""
    packed.opened.cache_clear()
    found = load_table(root, "all")
    given, lost = {}, {}
    for path, record in zip(found.paths, found.record, strict=True):
        if path not in names:
            continue
        try:
            media = PackedMedia(root, record)
            times = np.arange(media.first_s, media.last_s, 0.1)
            given[path] = numbers(media.frames(times)), media.sound(0.0, 3 * RATE_HZ, RATE_HZ)
        except MediaError as error:
            lost[path] = str(error)
    return given, lost


def damages(size, rng, count):
    """Functions that damage a file's bytes."""
    for k in range(count):
        kind = k % 6
        at, length = rng.integers(size), int(rng.choice([1, 2, 16, 600, 5000]))
        if kind == 0:
            yield lambda x, at=at: x[:at] + bytes([x[at] ^ 1 << int(rng.integers(8))]) + x[at + 1 :]
        elif kind == 1:
            yield lambda x, at=at, n=length: x[:at] + rng.bytes(n) + x[at + n :]
        elif kind == 2:
            yield lambda x, at=at: x[:at]
        elif kind == 3:
            yield lambda x, at=at, n=length: x[:at] + x[at + n :]
        elif kind == 4:
            yield lambda x, at=at, n=length: x[:at] + bytes(n) + x[at + n :]
        else:
            yield lambda x, at=at, n=length: x[:at] + rng.bytes(n) + x[at:]


@pytest.mark.parametrize(
    "name", ["shard-000001.tar", "index.npy", "pack.json", "manifest.csv", "failures.csv"]
)
def test_damages_affect_only_damaged_records_and_are_reported(shards, tmp_path, name):
    """300 damaged folders: each record gives the right frames and sound, or an error that names it."""
    found = load_table(shards, "all")
    inside = packed.Pack(shards).index["shard"][found.record] == 1  # a damaged shard: only its own records
    names = {
        path
        for path, in_shard in zip(found.paths, inside, strict=True)
        if in_shard or not name.endswith(".tar")
    }
    whole, lost = read_all(shards, names)
    assert not lost and len(names) > 1
    root = tmp_path / "damaged"
    shutil.copytree(shards, root)
    (root / name).chmod(0o644)
    clean, noticed = (root / name).read_bytes(), 0
    count = {"shard-000001.tar": 140, "index.npy": 100}.get(name, 20)
    for damage in damages(len(clean), np.random.default_rng(0), count):
        (root / name).unlink()  # the mapped file stays as it was
        (root / name).write_bytes(damage(clean))
        try:
            given, lost = read_all(root, names)
        except (DataError, MediaError) as error:  # a list is damaged
            assert name in str(error) and name != "shard-000001.tar"
            noticed += 1
            continue
        assert given.keys() | lost.keys() == names
        for path, (shown, sound) in given.items():
            assert shown == whole[path][0] and np.array_equal(sound, whole[path][1])
        for reason in lost.values():
            assert "record " in reason or "index.npy" in reason
        noticed += bool(lost)
    # headers and padding of a tar file are not read
    assert noticed > count * (0.9 if name != "shard-000001.tar" else 0.75)


def test_training_skips_damaged_records(shards, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(shards, root)
    found = load_table(root)
    entry = packed.Pack(root).index[found.record[2]]
    path = root / packed.shard_name(entry["shard"])
    damaged = bytearray(path.read_bytes())
    damaged[entry["at"] + 5] ^= 1
    path.write_bytes(damaged)
    cfg = settings(root)
    clips = avid_data.Clips(found, cfg, training=True)
    item = clips[2, (3, 0, 0)]
    assert item["index"] != 2 and [index for index, _ in item["failures"]] == [2]
    assert (
        item["failures"][0][1].startswith(f"record {found.record[2]}, ")
        and "is damaged" in item["failures"][0][1]
    )
    assert avid_data.Clips(found, cfg, training=False)[2].keys() == {"index", "failures"}


def test_a_missing_shard_is_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "out")
    (tmp_path / "out/shard-000000.tar").unlink()
    names = set(load_table(shards, "all").paths)
    given, lost = read_all(tmp_path / "out", names)
    assert len(given) + len(lost) == 9 and lost
    assert all("shard-000000.tar" in reason and "No such file" in reason for reason in lost.values())


# ------------------------------------------------------------------------------------------------------ clips


def settings(root, more=(), **audio):
    changes = [
        "data.name=packed", f"data.root={root}", "data.workers=0", "video.size=32", "video.frames=4",
        "video.fps=8", "audio.seconds=0.5", f"audio.rate_hz={RATE_HZ}", "audio.frames_per_s=50",
        "audio.n_fft=256", "audio.mels=16", "eval.clips=3",
    ]  # fmt: skip
    return config.load("", [*changes, *more], base={})


@pytest.mark.parametrize("training", [True, False])
def test_packed_clips_equal_the_clips_of_the_files(world, shards, training):
    """The same draws give the same clips: frames up to JPEG, sound up to rounding to 16 bits."""
    cfg = settings(shards, ["video.fps=16", "audio.volume=0.1"])
    files = dataclasses.replace(cfg, data=config.Data(name="folder", root=str(world)))
    found, file = load_table(shards), load_table(world, "train", "folder")
    for i, path in enumerate(found.paths):
        key, same = (i, (3, 0, i)), (file.paths.index(path), (3, 0, i))
        item = avid_data.Clips(found, cfg, training)[key if training else i]
        other = avid_data.Clips(file, files, training)[same if training else same[0]]
        assert item.keys() == other.keys() and item["failures"] == []
        assert item["video"].shape == other["video"].shape
        if path == "train/cat/6.mp4":  # the only file with 16 frames a second
            assert (item["video"].int() - other["video"].int()).abs().float().mean() < 3
        loud = other["audio"] > -60  # the noise of 16 bits lies below
        assert (item["audio"] - other["audio"])[loud].abs().max() < 0.3


DEVICE_SETTINGS = {
    "plain": [],
    "two moments, fast and backward": [
        "temporal.moments=2",
        "temporal.speeds=[1,2,4]",
        "temporal.reverse=true",
    ],
    "linear, loud": ["audio.mels=0", "audio.volume=0.5", "video.size=100"],  # enlarges the frames
}


@pytest.mark.parametrize("more", DEVICE_SETTINGS.values(), ids=DEVICE_SETTINGS)
@pytest.mark.parametrize("training", [True, False])
def test_clips_decoded_on_the_device_equal_those_decoded_on_the_cpu(shards, more, training):
    """Both run on this CPU here. Frames differ by at most 1 of 255, sound by at most 0.01 dB."""
    batches = []
    for decode in ("cpu", "device"):
        cfg = settings(shards, [*more, f"data.decode={decode}"])
        clips = avid_data.Clips(load_table(shards), cfg, training)
        keys = [[(k % 8, (3, 0, k)) for k in range(40)] if training else list(range(8))]
        batches.append(next(iter(avid_data.loader(clips, 0, batch_sampler=keys))))
    plain, raw = batches
    assert "video" not in raw and raw["undecoded"].jpegs.dtype == torch.uint8
    given = raw["undecoded"].decode(torch.device("cpu"))
    for name, atol in (("video", 1), ("audio", 0.01)):
        assert given[name].shape == plain[name].shape and given[name].dtype == plain[name].dtype
        far = (given[name].double() - plain[name].double()).abs()
        assert far[plain["audio"] > -80 if name == "audio" else ...].max() <= atol
    assert {*plain} - {"video", "audio"} == {*raw} - {"undecoded"}
    for name in {*plain} - {"video", "audio", "failures"}:
        assert torch.equal(plain[name], raw[name])
    plain, raw = (avid_data.to_device(batch, torch.device("cpu"), cfg.audio) for batch in batches)
    assert plain["video"].shape == raw["video"].shape
    assert (plain["video"] - raw["video"]).abs().mean() < 0.01


def test_one_modality_alone_can_be_decoded_on_the_device(shards):
    for modality, other in (("video", "audio"), ("audio", "video")):
        cfg = settings(shards, ["data.decode=device"])
        clips = avid_data.Clips(load_table(shards), cfg, False, (modality,))
        batch = next(iter(avid_data.loader(clips, 0, batch_size=2)))
        given = avid_data.to_device(batch, torch.device("cpu"), cfg.audio)
        assert modality in given and other not in given


def test_decoding_processes_give_the_same_bytes(shards):
    cfg = settings(shards, ["data.decode=device"])
    keys = [[(k, (3, s, k)) for k in range(4)] for s in range(3)]
    without_workers, with_workers = (
        list(avid_data.loader(avid_data.Clips(load_table(shards), cfg, True), workers, batch_sampler=keys))
        for workers in (0, 1)
    )
    assert len(without_workers) == len(with_workers) == 3
    for one, other in zip(without_workers, with_workers, strict=True):
        for name, x in vars(one["undecoded"]).items():
            y = getattr(other["undecoded"], name)
            assert x == y if name in ("shape", "size", "audio") else np.array_equal(x, y)


def test_settings_that_the_device_cannot_decode_are_refused(shards):
    clips = avid_data.Clips(
        load_table(shards), settings(shards, ["data.decode=device", "audio.rate_hz=8000"]), True
    )
    with pytest.raises(config.ConfigError, match=r"pack with --audio-rate 8000, or set data\.decode=cpu"):
        clips.for_device()[0, (3, 0, 0)]
    for key in ("decode=device", "shuffle=shards"):
        with pytest.raises(config.ConfigError, match=r"data\.name=folder is not packed"):
            config.load("toy", ["data.name=folder", f"data.{key}"])


@pytest.mark.parametrize("height, width, size", [(64, 90, 32), (20, 33, 48), (128, 128, 112)])
def test_resizing_equals_torchs_antialiased_interpolation(height, width, size):
    """Two matrix products against interpolation in float64, crop by crop."""
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (12, 2, 3, height, width), dtype=np.uint8))
    crops = [avid_data.random_crop(height, width, (0.08, 1.0), (0.75, 1.33), rng) for _ in range(11)]
    crops = torch.tensor([*crops, (0, 0, height, width)])
    given = packed.resize(frames, crops, size)
    assert given.shape == (12, 3, 2, size, size) and given.dtype == torch.uint8
    for k, (top, left, h, w) in enumerate(crops.tolist()):
        part = frames[k, :, :, top : top + h, left : left + w].double()
        right = interpolate(part, [size, size], mode="bilinear", antialias=True).transpose(0, 1)
        assert (given[k] - right).abs().max() <= 0.501
    across = packed.resize_matrix(crops[:, 1], crops[:, 3], width, size)
    torch.testing.assert_close(across.sum(2), torch.ones(12, size))
    outside = (torch.arange(width) < crops[:, 1:2]) | (
        torch.arange(width) >= (crops[:, 1] + crops[:, 3])[:, None]
    )
    assert not across[outside[:, None].expand_as(across)].any()


def test_frames_of_several_sizes_share_a_batch():
    rng = np.random.default_rng(0)
    images = [
        torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
        for h, w in ((40, 60), (64, 50))
        for _ in range(2)
    ]
    together = packed.stacked(images, 2)
    assert together.shape == (2, 2, 3, 64, 60)
    crops = torch.tensor([[3, 5, 30, 40], [0, 2, 64, 48]])
    given = packed.resize(together, crops, 32)
    for k in range(2):
        alone = packed.resize(torch.stack(images[2 * k : 2 * k + 2])[None], crops[k : k + 1], 32)[0]
        assert torch.equal(given[k], alone)


def test_gpu_decoding_stays_on_the_gpu_and_never_waits():
    """On fake tensors, which have a CUDA device and no data: reading a value on the host raises."""
    cuda, audio = torch.device("cuda", 0), settings(".").audio
    clip = {"jpegs": [np.zeros(9, np.uint8)] * 4, "crop": (0, 0, 64, 90), "gain": np.float32(1)}
    clip |= {"louder_db": np.float32(0), "backward": False}
    clips = [
        clip | {"pcm": np.zeros((spectrogram.columns(audio) - 1) * hop + audio.n_fft, np.int16), "hop": hop}
        for hop in (320, 640)  # two speeds
    ]
    batch = packed.Undecoded.of([clips] * 3, 32, audio)

    def decoded(jpegs, device):
        assert all(x.device.type == "cpu" for x in jpegs)
        return [torch.empty(3, 64, 90, dtype=torch.uint8, device=device) for _ in jpegs]

    filters = spectrogram.mel_filters(RATE_HZ, audio.n_fft, audio.mels, torch.device("cpu"))
    spectrogram.hann.cache_clear()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(packed, "decode_jpegs", decoded),
        # the filters are copied to the device once a process
        mock.patch.object(spectrogram, "mel_filters", lambda *_: filters.to(cuda)),
    ):
        given = batch.decode(cuda)
        with pytest.raises(DataDependentOutputException):  # this is how a wait would show
            given["audio"].max().item()
    spectrogram.hann.cache_clear()
    assert (given["video"].shape, given["video"].dtype) == ((3, 2, 3, 4, 32, 32), torch.uint8)
    assert (given["audio"].shape, given["audio"].dtype) == ((3, 2, 1, 25, 16), torch.float32)
    assert {x.device for x in given.values()} == {cuda}


# ----------------------------------------------------------------------------------------- order of the draws


def batches(how, steps, shards=None, clips=1, **more):
    sampler = avid_data.BatchSampler(
        len(SHARD_OF), 12, how, 0, 0, steps, clips_per_open=clips, shards=shards, **more
    )
    return [[index for index, _ in batch] for batch in sampler]


# the shard of each of 120 instances
SHARD_OF = np.repeat([2, 0, 1, 3], [40, 25, 31, 24])[np.random.default_rng(3).permutation(120)]


def test_a_shard_epoch_takes_every_instance_once_shard_by_shard():
    steps = batches("epoch", 30, SHARD_OF)
    orders = [list(chain(*steps[e * 10 : e * 10 + 10])) for e in range(3)]
    for order in orders:
        assert sorted(order) == list(range(120))
        assert sum(np.diff(SHARD_OF[order]) != 0) == 3  # four shards, one after the other
    assert len({tuple(SHARD_OF[order]) for order in orders}) == 3  # another order each epoch
    first = [orders[0].index(i) for i in np.flatnonzero(SHARD_OF == 2)]
    assert first != sorted(first) and first != sorted(first, reverse=True)
    assert all(len(set(SHARD_OF[batch])) <= 2 for batch in steps)
    # without shards, a batch comes from nearly all of them
    assert np.mean([len(set(SHARD_OF[batch])) for batch in batches("epoch", 10)]) > 3.5


def test_iid_draws_by_shards_are_uniform_over_instances():
    """Each row of a batch holds each instance with probability 1/N, and all rows of a batch share a shard."""
    steps = batches("iid", 6000, SHARD_OF)
    assert all(len(set(SHARD_OF[batch])) == 1 for batch in steps)
    of_shard = Counter(int(SHARD_OF[batch[0]]) for batch in steps)
    for shard, count in of_shard.items():
        n = (SHARD_OF == shard).sum()
        expected = 6000 * n / 120
        assert abs(count - expected) < 5 * np.sqrt(expected)
        times = np.bincount(list(chain(*(x for x in steps if SHARD_OF[x[0]] == shard))), minlength=120)
        # given the shard, its instances are equally likely: χ² with n − 1 degrees of freedom
        times = times[SHARD_OF == shard]
        chi2 = ((times - times.mean()) ** 2 / times.mean()).sum()
        assert abs(chi2 - (n - 1)) < 5 * np.sqrt(2 * (n - 1))


@pytest.mark.parametrize("how", ["epoch", "iid"])
@pytest.mark.parametrize("clips", [1, 3])
def test_draws_by_shards_do_not_depend_on_ranks_or_resuming(how, clips):
    whole = batches(how, 25, SHARD_OF, clips)
    ranks = [batches(how, 25, SHARD_OF, clips, rank=rank, world=2) for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == whole
    resumed = avid_data.BatchSampler(120, 12, how, 0, 13, 25, clips_per_open=clips, shards=SHARD_OF)
    assert [[index for index, _ in batch] for batch in resumed] == whole[13:]


def test_the_sampler_gets_the_shard_of_each_row(shards):
    found = load_table(shards)
    cfg = settings(shards, ["data.shuffle=shards"])
    given = avid_data.shards(found, cfg)
    assert given.tolist() == packed.Pack(shards).index["shard"][found.record].tolist() and len(set(given)) > 2
    assert avid_data.shards(found, settings(shards)) is None


def test_clips_per_open_gives_each_clip_its_own_draw():
    sampler = avid_data.BatchSampler(120, 12, "epoch", 0, 0, 30, clips_per_open=3)
    for batch in sampler:
        indices = [index for index, _ in batch]
        assert indices == [i for i in indices[::3] for _ in range(3)] and len(set(indices)) == 4
        assert len({draw for _, draw in batch}) == 12
    taken = list(chain(*batches("epoch", 30, clips=3)))  # 30 steps of 4 files: each of 120 files once
    assert sorted(taken) == sorted(list(range(120)) * 3)
    with pytest.raises(config.ConfigError, match="cannot be shared evenly by 2 processes, 4 clips a file"):
        avid_data.BatchSampler(120, 12, "epoch", 0, 0, 30, 0, 2, clips_per_open=4)
    assert batches("iid", 9) == batches("iid", 9, clips=1)


def test_clips_of_one_file_share_one_opening(world, monkeypatch):
    """Items equal those of single requests, also when some files cannot be read."""
    openings = []

    class Counted(Media):
        def __init__(self, path, *more):
            openings.append(Path(path).name)
            super().__init__(path, *more)

    monkeypatch.setattr(avid_data, "Media", Counted)
    found = load_table(world, "all", "folder")
    cfg = settings(".", ["data.name=folder"])
    clips = avid_data.Clips(found, cfg, training=True)
    keys = [(index, (3, 0, place)) for place, index in enumerate(np.repeat([0, 3, 5, 1, 4], 3).tolist())]
    alone = [clips[key] for key in keys]
    assert len(openings) >= 15
    openings.clear()
    several = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, clips_per_open=3))
    clips = avid_data.Clips(found, several, training=True)
    together = [clips[key] for key in keys]
    bad = {found.paths.index(path) for path in ("train/dog/broken.mp4", "test/dog/mute.mp4")}
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        loud = one["audio"] > -60  # after a seek, Matroska's rounded time stamps and AAC's noise differ
        far = (one.pop("audio") - other.pop("audio"))[loud].abs()
        assert far.mean() < 0.1 and far.max() < 2, far.max()
        for name, x in one.items():
            assert torch.equal(x, other[name]) if torch.is_tensor(x) else x == other[name]
    usable = [index for index in (0, 3, 5, 1, 4) if index not in bad]
    # a second opening may be as a replacement of an unusable file
    assert all(openings.count(Path(found.paths[index]).name) <= 2 for index in usable)
    assert len(openings) <= len(usable) + 2 * 3 * len(bad)


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """A packed small toy world and a run on it: (root, output)."""
    root = tmp_path_factory.mktemp("toy")
    cfg = config.load("toy", TINY)
    files = toy.write(root, cfg.toy, cfg.seed, 1, progress=False)
    run_pack(files, root / "packed", SMALL, "toy")
    done = run(root / "packed", root / "run", "data.name=packed", "data.shuffle=shards", "data.workers=1")
    return root, done


def test_training_and_evaluations_on_packed_data(toy_run):
    root, text = toy_run
    assert "packed toy train: 24 files, 10 classes" in text and "packed toy test: 8 files" in text
    lines = [line for line in metrics(root / "run") if "loss" in line]
    assert len(lines) == 12 and all(np.isfinite(line["loss"]) for line in lines)
    checkpoint = ["--ckpt", str(root / "run/last.pt")]
    for script, more, name in (
        ("eval_linear.py", ["data.label=motion"], "linear-video-packed-test.json"),
        ("eval_retrieval.py", ["--task", "cross"], "retrieval-cross-packed-test.json"),
    ):
        forked.run(script, [*checkpoint, *more, "data.workers=0"], root)
        result = json.loads((root / "run" / name).read_text())
        assert result["data"] == "packed" and result["videos"] == 8
    assert (root / "run/retrieval-cross-packed.png").exists()


def test_training_with_decoding_on_the_device_gives_the_same_losses(toy_run):
    """The losses differ only by rounding, and a resumed run may decode in the other way."""
    root, _ = toy_run
    more = ["data.name=packed", "data.shuffle=shards", "optim.epochs=4"]
    run(root / "packed", root / "device", *more, "data.decode=device", "data.workers=1")
    one, other = (
        [line["loss"] for line in metrics(root / name) if "loss" in line] for name in ("run", "device")
    )
    np.testing.assert_allclose(one[:2], other[:2], rtol=0.03)  # later steps have other weights
    assert len(one) == len(other) == 12 and np.isfinite(other).all()
    text = run(root / "packed", root / "device", *more, "data.decode=cpu", "optim.epochs=5")
    assert "resuming" in text and final(root / "device")["step"] == 15
