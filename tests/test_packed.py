"""Packed data: right pictures and sounds at all times, the same bytes after any kill, every damage named."""

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

import numpy as np
import pytest
import torch
from conftest import chirp_time, chirps, numbered, numbers, tone, write_media
from test_train import ENVIRONMENT, ROOT, TINY, final, metrics, run
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg

from avid import config, datasets, packed, spectrogram, toy
from avid import data as avid_data
from avid.datasets import DataError
from avid.media import Media, MediaError
from avid.packed import PackedMedia
from avid.tools import pack

SECONDS, RATE_HZ, FPS = 3.0, 16000, 16.0
CHIRPS_S = (0.4, 1.3, 2.2)
SMALL = pack.Small(fps=FPS, short_side=64, audio_rate=RATE_HZ, shard_gb=4e-4)  # two or three videos a shard


def video(path, fps=25, seconds=SECONDS, **content):
    """A file whose frames show their numbers, with chirps on a quiet tone."""
    frame_s = content.pop("frame_s", np.arange(round(seconds * fps)) / fps)
    sound = chirps(CHIRPS_S, seconds, 48000) + 0.1 * tone(300, seconds, 48000)
    return write_media(path, frame_s=frame_s, wave=content.pop("sound", sound), **content)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of two classes and eight videos of several rates; two more files cannot be used."""
    root = tmp_path_factory.mktemp("world")
    for k, fps in enumerate((25, 30, 12, 50, 25, 25, 16, 24)):
        video(root / "train" / ("cat", "dog")[k % 2] / f"{k}.mp4", fps)
    uneven_s = np.cumsum(np.random.default_rng(0).choice([0.02, 0.04, 0.11, 0.2], size=30))
    video(root / "test" / "cat" / "uneven.mkv", frame_s=uneven_s - uneven_s[0])
    write_media(root / "test" / "dog" / "mute.mp4", frame_s=np.arange(50) / 25)
    (root / "train" / "dog" / "broken.mp4").write_bytes(b"no video")
    return root


def packing(root, dst, small=SMALL, name="folder", **more):
    """pack.pack in this process: the tests of packing itself start others."""
    with mock.patch.object(pack.processes, "outcomes", one_by_one):
        return pack.pack(config.Data(name=name, root=str(root), **more), dst, small, workers=1)


def one_by_one(function, tasks, workers, limit_s):
    yield from ((task, function(*task)) for task in tasks)


@pytest.fixture(scope="module")
def shards(world, tmp_path_factory):
    """The folder, packed."""
    dst = tmp_path_factory.mktemp("packed")
    assert packing(world, dst) == 9
    return dst


def table(root, split="train", name="packed", **more):
    return datasets.load(config.Data(name=name, root=str(root), **more), split)


def opened(root, path, modalities=("video", "audio")):
    found = table(root, "all")
    return PackedMedia(root, found.record[found.paths.index(path)], modalities)


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------ the right content


@pytest.mark.parametrize(
    "path", [f"train/{('cat', 'dog')[k % 2]}/{k}.mp4" for k in range(4)] + ["test/cat/uneven.mkv"]
)
def test_the_frame_on_show_within_half_a_packed_frame(world, shards, path):
    """A frame that the file shows at most 1/32 s earlier or later; amid a packed frame, the file's."""
    file, media = Media(world / path, ("video",)), opened(shards, path, ("video",))
    assert (media.first_s, media.last_s) == (file.first_s, file.last_s)
    rng = np.random.default_rng(0)
    times = rng.uniform(-0.2, media.last_s + 0.2, 300)
    near = np.linspace(-0.501, 0.501, 21)[:, None] / FPS
    within = times.clip(
        media.first_s, media.last_s - 1e-3
    )  # the first frame also before, the last one also after
    allowed = np.array(numbers(file.frames((within + near).ravel()))).reshape(21, -1)  # 21×300
    assert (allowed == numbers(media.frames(times))).any(0).all()
    middle = media.first_s + (np.arange(int((media.last_s - media.first_s) * FPS)) + 0.5) / FPS
    assert numbers(media.frames(middle)) == numbers(file.frames(middle))


def test_times_in_any_order_and_again(shards):
    media = opened(shards, "train/cat/6.mp4")  # 16 frames a second
    asked = [30, 2, 2, 47, 30, 0]
    frames = media.frames((np.array(asked) + 0.5) / FPS)
    assert frames.shape == (6, 64, 64, 3) and frames.dtype == np.uint8
    assert numbers(frames) == asked
    assert numbers(media.frames([-1.0, 2.99, 100.0])) == [0, 47, 47]


def test_pictures_are_the_files_but_for_jpeg(world, shards):
    times = np.arange(0.1, 2.9, 0.3)
    for path in ("train/cat/0.mp4", "train/dog/1.mp4"):
        media = opened(shards, path)
        times = media.first_s + (np.floor((times - media.first_s) * FPS) + 0.5) / FPS
        difference = media.frames(times).astype(int) - Media(world / path).frames(times)
        assert np.abs(difference).mean() < 2 and np.abs(difference).max() < 40


def test_every_frame_at_its_own_time(world, tmp_path):
    """--keep-rate: at all times the frame that the file shows."""
    packing(world, tmp_path / "all", SMALL._replace(keep_rate=True))
    for path in ("train/dog/3.mp4", "train/dog/1.mp4", "test/cat/uneven.mkv"):
        file, media = Media(world / path, ("video",)), opened(tmp_path / "all", path, ("video",))
        times = np.random.default_rng(0).uniform(0, media.last_s, 300)
        assert numbers(media.frames(times)) == numbers(file.frames(times))


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 24000, 8000])
def test_sounds_keep_their_time(world, shards, rate_hz):
    file, media = Media(world / "train/cat/0.mp4"), opened(shards, "train/cat/0.mp4")
    for time_s in CHIRPS_S:
        begin_s = time_s - 0.2
        heard, there = (m.sound(begin_s, round(0.5 * rate_hz), rate_hz) for m in (media, file))
        assert heard.dtype == np.float32
        assert begin_s + chirp_time(heard, rate_hz) == pytest.approx(time_s, abs=1e-3)
        np.testing.assert_allclose(
            heard, there, atol=0.02 if rate_hz == 24000 else 2e-3
        )  # at 24 kHz the file has more


def test_before_and_after_the_sound_is_silence(shards):
    media = opened(shards, "train/cat/0.mp4")
    wave = media.sound(-1.0, 6 * RATE_HZ, RATE_HZ)
    assert not wave[:RATE_HZ].any() and not wave[round(4.1 * RATE_HZ) :].any()
    assert np.abs(wave[RATE_HZ : 4 * RATE_HZ]).max() > 0.5
    assert not media.sound(50.0, 100, RATE_HZ).any()


def test_sound_of_16_bits_is_kept_as_it_is_and_louder_sound_is_not_cut(tmp_path):
    wave = tone(440, 2.0, RATE_HZ)
    write_media(tmp_path / "in/a.wav", wave=wave, rate_hz=RATE_HZ, codecs=("", "pcm_s16le"))
    write_media(tmp_path / "in/loud.wav", wave=3 * wave, rate_hz=RATE_HZ, codecs=("", "pcm_f32le"))
    assert packing_sound(tmp_path / "in", tmp_path / "out") == 2
    for name, atol in (("a.wav", 0.0), ("loud.wav", 3e-5)):
        there = Media(tmp_path / "in" / name, ("audio",)).sound(0.0, 2 * RATE_HZ, RATE_HZ)
        heard = opened(tmp_path / "out", name, ("audio",)).sound(0.0, 2 * RATE_HZ, RATE_HZ)
        np.testing.assert_allclose(heard, there, atol=atol)
    with pytest.raises(MediaError, match="no picture"):
        opened(tmp_path / "out", "a.wav")


def packing_sound(root, dst):
    """A folder of sounds as a data set that needs no pictures."""
    row = datasets.DATA["folder"]
    datasets.DATA["folder"] = row._replace(needs=("audio",), modalities=("audio",))
    try:
        return packing(root, dst)
    finally:
        datasets.DATA["folder"] = row


def test_an_instance_is_a_file_and_its_interval(world, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(world / "train/cat/0.mp4", tmp_path / "in/a.mp4")
    shutil.copy(world / "train/cat/4.mp4", tmp_path / "in/b.mp4")
    (tmp_path / "in/manifest.csv").write_text(
        "path,label,split,start,end\na.mp4,x,train,0.5,1.7\nb.mp4,,train,1,\n"
    )
    packing(tmp_path / "in", tmp_path / "out", name="manifest")
    found = table(tmp_path / "out")
    assert (found.start_s.tolist(), found.end_s.tolist()) == ([0.5, 1.0], [1.7, np.inf])
    assert found.labels.tolist() == [0, -1]
    media, file = opened(tmp_path / "out", "a.mp4"), Media(tmp_path / "in/a.mp4", start_s=0.5, end_s=1.7)
    assert (media.first_s, media.last_s) == (file.first_s, file.last_s) == (0.5, 1.7)
    middle = 0.5 + (np.arange(19) + 0.5) / FPS
    assert numbers(media.frames(middle)) == numbers(file.frames(middle))
    assert 1.2 + chirp_time(media.sound(1.2, 8000, RATE_HZ), RATE_HZ) == pytest.approx(1.3, abs=1e-3)
    assert not media.sound(2.0, 8000, RATE_HZ).any()  # it is not there any more


def test_what_does_not_change_is_kept_once(tmp_path):
    still = numbered([7] * 75)
    with mock.patch("conftest.numbered", lambda *_: still):
        video(tmp_path / "in/still.mp4", encoder={"crf": "0"})
    packing(tmp_path / "in", tmp_path / "out")
    media = opened(tmp_path / "out", "still.mp4")
    assert len(media.table) < 10
    assert set(numbers(media.frames(np.arange(0, 3, 0.1)))) == {7}


def test_large_pictures_become_small_ones(world, tmp_path):
    video(tmp_path / "in/a.mp4", size=160)
    packing(tmp_path / "in", tmp_path / "out", SMALL._replace(short_side=32))
    media = opened(tmp_path / "out", "a.mp4")
    assert media.size == (32, 32)
    middle = (np.arange(48) + 0.5) / FPS
    assert numbers(media.frames(middle)) == numbers(Media(tmp_path / "in/a.mp4").frames(middle))


def test_ordinary_tools_read_a_shard(shards):
    """Python's tar, JSON, numpy and wave; a JPEG ends with its marker."""
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
            media = opened(shards, facts["path"])
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
        file, found = table(world, split, "folder"), table(shards, split)
        usable = [
            i
            for i, path in enumerate(file.paths)
            if path not in ("test/dog/mute.mp4", "train/dog/broken.mp4")
        ]
        assert found.paths == [file.paths[i] for i in usable]
        assert found.classes == file.classes
        assert found.labels.tolist() == file.labels[usable].tolist()
        assert len(set(found.record.tolist())) == len(found)
    assert table(shards).missing == ["train/dog/broken.mp4"]
    with pytest.raises(DataError, match=r"no such split in .*, only test, train\n"):
        table(shards, "validation1")


def test_failures_are_listed_with_their_reasons(shards):
    rows = list(csv.DictReader((shards / "failures.csv").open()))
    assert {row["path"]: row["reason"] for row in rows} == {
        "test/dog/mute.mp4": "no sound",
        "train/dog/broken.mp4": "cannot be opened: Invalid data found when processing input",
    }


def test_any_column_can_be_the_class(world, tmp_path):
    shutil.copytree(world / "train/cat", tmp_path / "in")
    lines = [
        "path,label,split,colour,fold",
        "0.mp4,x,train,red,7",
        "2.mp4,y,test,blue,8",
        "4.mp4,x,dev,red,9",
    ]
    (tmp_path / "in/manifest.csv").write_text("\n".join(lines))
    packing(tmp_path / "in", tmp_path / "out", name="manifest")
    for label, split in (
        ("label", "all"),
        ("colour", "all"),
        ("fold", "all"),
        ("colour", "dev"),
        ("label", "test"),
    ):
        file = table(tmp_path / "in", split, "manifest", label=label)
        found = table(tmp_path / "out", split, label=label)
        assert (found.paths, found.classes, found.columns) == (file.paths, file.classes, file.columns)
        assert found.labels.tolist() == file.labels.tolist()
    with pytest.raises(DataError, match="no column size"):
        table(tmp_path / "out", label="size")


def official(root, world):
    """Small trees as UCF101, AudioSet and ESC-50 are laid out. → {name: root}"""
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


def test_official_splits_folds_and_several_classes(world, tmp_path):
    for name, root in official(tmp_path, world).items():
        dst = tmp_path / f"{name}-packed"
        packing(root, dst, name=name)
        splits = {
            "ucf101": ["train1", "test1", "train2", "test3", "train", "all"],
            "audioset": ["balanced_train", "train", "eval", "all"],
            "esc50": ["train1", "test1", "test5", "all"],
        }[name]
        for split in splits:
            file, found = table(root, split, name), table(dst, split)
            order = [found.paths.index(path) for path in file.paths]  # that of all, whatever the split's own
            assert len(found) == len(file) and found.classes == file.classes, (name, split)
            found = datasets.take(found, order)
            assert found.paths == file.paths and found.columns == file.columns
            assert np.array_equal(found.labels, file.labels) and np.array_equal(found.fold, file.fold)
        row, asked = datasets.DATA[name], datasets.row(config.Data(name="packed", root=str(dst)))
        assert (asked.modalities, asked.needs, asked.evaluation, asked.divisions) == row[1:5]


# ---------------------------------------------------------------------------------------------------- packing


def test_the_same_bytes_again_however_many_processes(world, shards, tmp_path):
    pack.pack(config.Data(name="folder", root=str(world)), tmp_path / "again", SMALL, workers=2)
    assert content(tmp_path / "again") == content(shards)
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert packing(world, shards) == 9  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_shards_are_of_the_asked_size_and_drawn_at_random(shards):
    tars = sorted(shards.glob("*.tar"))
    assert [path.name for path in tars] == [f"shard-{k:06d}.tar" for k in range(len(tars))]
    assert len(tars) > 2 and all(path.stat().st_size <= 4e5 + 1024 for path in tars)
    assert table(shards, "all").record.tolist() != sorted(table(shards, "all").record.tolist())


KILLED = """
import sys
from avid.tools import pack
if __name__ == "__main__":
    pack.main(["pack", *sys.argv[1:]])
"""


def killed(root, dst, kills, rng, longest_s):
    """Pack, killed so many times at random, then whole: how many kills found it at work."""
    script = dst.with_suffix(".py")
    script.write_text(KILLED)
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
            time.sleep(0.01)  # imports are of no interest
        try:
            process.wait(rng.uniform(0, longest_s) if kill < kills else 120)
        except subprocess.TimeoutExpired:
            met += 1
            if rng.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)  # all at once, as where the machine goes down
            else:
                process.kill()  # its processes find out by themselves
            process.wait()
        assert time.monotonic() - begun < 120
    assert process.returncode == 0
    return met


def test_killed_at_any_moment_the_end_is_the_same(world, shards, tmp_path):
    assert killed(world, tmp_path / "out", 3, random.Random(0), 2.5) >= 1
    time.sleep(0.5)
    assert content(tmp_path / "out") == content(shards)


def test_a_kill_between_any_two_writes(world, tmp_path, monkeypatch):
    """Before each rename of a file to its final name, once: never half a file, and the same end."""
    root, left, real = world / "train" / "cat", [-1], os.replace

    def replace(source, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    packing(root, tmp_path / "whole")
    whole, writes = content(tmp_path / "whole"), -1 - left[0]
    assert writes > 10
    for done in range(writes):
        dst, left[0] = tmp_path / str(done), done
        with pytest.raises(KeyboardInterrupt):
            packing(root, dst)
        assert all(whole[name] == x for name, x in content(dst).items() if name in whole)
        left[0] = -1
        packing(root, dst)
        assert content(dst) == whole, done


def test_one_command_at_a_time(world, tmp_path):
    (tmp_path / "out").mkdir()
    with pack.alone(tmp_path / "out"), pytest.raises(DataError, match="another command is packing"):
        packing(world, tmp_path / "out")


def test_what_cannot_be_gone_on_with_is_refused(world, shards, tmp_path):
    with pytest.raises(DataError, match="quality was 90 and is 80"):
        packing(world, shards, SMALL._replace(quality=80))
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds files that were not packed, e\.g\. mine\.txt"):
        packing(world, tmp_path)
    shutil.copytree(shards, tmp_path / "copy")
    (tmp_path / "copy" / "pack.json").unlink()
    with pytest.raises(
        DataError, match=r"pack\.json: No such file or directory; a pack has it once it is finished"
    ):
        table(tmp_path / "copy")


def test_the_size_is_told_beforehand(world, tmp_path, capsys, monkeypatch):
    asked = config.Data(name="folder", root=str(world))
    monkeypatch.setattr(pack, "TRIED", 5)
    assert pack.pack(asked, tmp_path / "out", SMALL, 1, only_estimate=True) == 0
    told = capsys.readouterr()
    told = (told.out + told.err).split("about ")[1]
    assert "by 5 of 11 instances, drawn at random" in told
    assert not (tmp_path / "out/pack.json").exists()
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(DataError, match=r"packing needs .* GB more, and 0\.0 GB are free"):
        packing(world, tmp_path / "out")
    monkeypatch.undo()
    packing(world, tmp_path / "out")  # what was tried is kept
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    assert float(told.split()[0]) * 1e9 == pytest.approx(size, rel=0.5, abs=1e7)


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


def everything(root, names):
    """What each record gives, by name: the numbers of its frames and its sound; or why it cannot be read."""
    packed.opened.cache_clear()
    found = table(root, "all")
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
def test_damages_cost_what_they_damage_and_are_named(shards, tmp_path, name):
    """300 damaged folders: right pictures and sounds, or a word that they cannot be read; no crash."""
    found = table(shards, "all")
    inside = packed.Pack(shards).index["shard"][found.record] == 1  # of a damaged shard, those that lie in it
    names = {
        path for path, of_it in zip(found.paths, inside, strict=True) if of_it or not name.endswith(".tar")
    }
    whole, lost = everything(shards, names)
    assert not lost and len(names) > 1
    root = tmp_path / "damaged"
    shutil.copytree(shards, root)
    (root / name).chmod(0o644)
    clean, noticed = (root / name).read_bytes(), 0
    count = {"shard-000001.tar": 140, "index.npy": 100}.get(name, 20)
    for damage in damages(len(clean), np.random.default_rng(0), count):
        (root / name).unlink()  # what is mapped stays as it was
        (root / name).write_bytes(damage(clean))
        try:
            given, lost = everything(root, names)
        except (DataError, MediaError) as error:  # the lists themselves
            assert name in str(error) and name != "shard-000001.tar"
            noticed += 1
            continue
        assert given.keys() | lost.keys() == names
        for path, (shown, sound) in given.items():
            assert shown == whole[path][0] and np.array_equal(sound, whole[path][1])
        for reason in lost.values():
            assert "record " in reason or "index.npy" in reason
        noticed += bool(lost)
    assert noticed > count * (
        0.9 if name != "shard-000001.tar" else 0.75
    )  # of a tar, headers and padding are not read


def test_training_goes_on_without_damaged_records(shards, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(shards, root)
    found = table(root)
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


def test_a_shard_that_is_missing_is_named(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "out")
    (tmp_path / "out/shard-000000.tar").unlink()
    names = set(table(shards, "all").paths)
    given, lost = everything(tmp_path / "out", names)
    assert len(given) + len(lost) == 9 and lost
    assert all("shard-000000.tar" in reason and "No such file" in reason for reason in lost.values())


# ------------------------------------------------------------------------------------------------ clips of it


def settings(root, more=(), **audio):
    changes = [
        "data.name=packed", f"data.root={root}", "data.workers=0", "video.size=32", "video.frames=4",
        "video.fps=8", "audio.seconds=0.5", f"audio.rate_hz={RATE_HZ}", "audio.frames_per_s=50",
        "audio.n_fft=256", "audio.mels=16", "eval.clips=3",
    ]  # fmt: skip
    return config.load("", [*changes, *more], base={})


@pytest.mark.parametrize("training", [True, False])
def test_clips_are_those_of_the_files(world, shards, training):
    """The same draws give the same stretches: pictures but for JPEG, sounds but for 16 bits."""
    cfg = settings(shards, ["video.fps=16", "audio.volume=0.1"])
    files = dataclasses.replace(cfg, data=config.Data(name="folder", root=str(world)))
    found, file = table(shards), table(world, "train", "folder")
    for i, path in enumerate(found.paths):
        key, same = (i, (3, 0, i)), (file.paths.index(path), (3, 0, i))
        item = avid_data.Clips(found, cfg, training)[key if training else i]
        other = avid_data.Clips(file, files, training)[same if training else same[0]]
        assert item.keys() == other.keys() and item["failures"] == []
        assert item["video"].shape == other["video"].shape
        if path == "train/cat/6.mp4":  # the others have frames in between
            assert (item["video"].int() - other["video"].int()).abs().float().mean() < 3
        loud = other["audio"] > -60  # what 16 bits add is below
        assert (item["audio"] - other["audio"])[loud].abs().max() < 0.3


DEVICE = {
    "plain": [],
    "two moments, fast and backward": [
        "temporal.moments=2",
        "temporal.speeds=[1,2,4]",
        "temporal.reverse=true",
    ],
    "linear, loud": ["audio.mels=0", "audio.volume=0.5", "video.size=100"],  # enlarged, too
}


@pytest.mark.parametrize("more", DEVICE.values(), ids=DEVICE)
@pytest.mark.parametrize("training", [True, False])
def test_decoded_on_the_device_the_clips_are_the_same(shards, more, training):
    """Against the processes' way, both on this CPU: pictures within 1 of 255, sounds within 0.01 dB."""
    batches = []
    for decode in ("cpu", "device"):
        cfg = settings(shards, [*more, f"data.decode={decode}"])
        clips = avid_data.Clips(table(shards), cfg, training)
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


def test_one_modality_on_the_device(shards):
    for modality, other in (("video", "audio"), ("audio", "video")):
        cfg = settings(shards, ["data.decode=device"])
        clips = avid_data.Clips(table(shards), cfg, False, (modality,))
        batch = next(iter(avid_data.loader(clips, 0, batch_size=2)))
        given = avid_data.to_device(batch, torch.device("cpu"), cfg.audio)
        assert modality in given and other not in given


def test_decoding_processes_give_the_same_bytes(shards):
    cfg = settings(shards, ["data.decode=device"])
    keys = [[(k, (3, s, k)) for k in range(4)] for s in range(3)]
    alone, helped = (
        list(avid_data.loader(avid_data.Clips(table(shards), cfg, True), workers, batch_sampler=keys))
        for workers in (0, 1)
    )
    assert len(alone) == len(helped) == 3
    for one, other in zip(alone, helped, strict=True):
        for name, x in vars(one["undecoded"]).items():
            y = getattr(other["undecoded"], name)
            assert x == y if name in ("shape", "size", "audio") else np.array_equal(x, y)


def test_what_the_device_cannot_take_is_refused(shards):
    clips = avid_data.Clips(
        table(shards), settings(shards, ["data.decode=device", "audio.rate_hz=8000"]), True
    )
    with pytest.raises(config.ConfigError, match=r"pack with --audio-rate 8000, or set data\.decode=cpu"):
        clips.for_device()[0, (3, 0, 0)]
    for key in ("decode=device", "shuffle=shards"):
        with pytest.raises(config.ConfigError, match=r"data\.name=folder is not packed"):
            config.load("toy", ["data.name=folder", f"data.{key}"])


@pytest.mark.parametrize("height, width, size", [(64, 90, 32), (20, 33, 48), (128, 128, 112)])
def test_resizing_is_torchs(height, width, size):
    """The two matrix products against torch's antialiased interpolation in float64, crop by crop."""
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


def test_on_a_gpu_nothing_is_of_another_device_and_nothing_is_waited_for():
    """On tensors that have CUDA's device and no data: a value that the host would wait for raises."""
    cuda, audio = torch.device("cuda", 0), settings(".").audio
    clip = {"jpegs": [np.zeros(9, np.uint8)] * 4, "crop": (0, 0, 64, 90), "gain": np.float32(1)}
    clip |= {"louder_db": np.float32(0), "backward": False}
    clips = [
        clip | {"pcm": np.zeros((spectrogram.columns(audio) - 1) * hop + audio.n_fft, np.int16), "hop": hop}
        for hop in (320, 640)  # two speeds
    ]
    batch = packed.Undecoded.of([clips] * 3, 32, audio)

    def decoded(jpegs, mode, device):
        assert all(x.device.type == "cpu" for x in jpegs)
        return [torch.empty(3, 64, 90, dtype=torch.uint8, device=device) for _ in jpegs]

    filters = spectrogram.mel_filters(RATE_HZ, audio.n_fft, audio.mels, torch.device("cpu"))
    spectrogram.hann.cache_clear()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(packed, "decode_jpeg", decoded),
        mock.patch.object(spectrogram, "mel_filters", lambda *_: filters.to(cuda)),  # copied once a process
    ):
        given = batch.decode(cuda)
        with pytest.raises(DataDependentOutputException):  # what the test would notice
            given["audio"].max().item()
    spectrogram.hann.cache_clear()
    assert (given["video"].shape, given["video"].dtype) == ((3, 2, 3, 4, 32, 32), torch.uint8)
    assert (given["audio"].shape, given["audio"].dtype) == ((3, 2, 1, 25, 16), torch.float32)
    assert {x.device for x in given.values()} == {cuda}


# ----------------------------------------------------------------------------------- which, and in what order


def batches(how, steps, shards=None, clips=1, **more):
    sampler = avid_data.BatchSampler(
        len(SHARD), 12, how, 0, 0, steps, clips_per_open=clips, shards=shards, **more
    )
    return [[index for index, _ in batch] for batch in sampler]


SHARD = np.repeat([2, 0, 1, 3], [40, 25, 31, 24])[
    np.random.default_rng(3).permutation(120)
]  # of 120 instances


def test_by_shards_an_epoch_takes_every_instance_once_one_shard_after_the_other():
    steps = batches("epoch", 30, SHARD)
    orders = [list(chain(*steps[e * 10 : e * 10 + 10])) for e in range(3)]
    for order in orders:
        assert sorted(order) == list(range(120))
        assert sum(np.diff(SHARD[order]) != 0) == 3  # a shard begins where one has ended
    assert len({tuple(SHARD[order]) for order in orders}) == 3  # in an order of its own each epoch
    first = [orders[0].index(i) for i in np.flatnonzero(SHARD == 2)]
    assert first != sorted(first) and first != sorted(first, reverse=True)
    assert all(len(set(SHARD[batch])) <= 2 for batch in steps)
    assert (
        np.mean([len(set(SHARD[batch])) for batch in batches("epoch", 10)]) > 3.5
    )  # else a batch meets them all


def test_by_shards_independent_draws_are_uniform_over_instances():
    """Each place of a batch takes each instance with probability 1/N; the places of a batch share a shard."""
    steps = batches("iid", 6000, SHARD)
    assert all(len(set(SHARD[batch])) == 1 for batch in steps)
    of_shard = Counter(int(SHARD[batch[0]]) for batch in steps)
    for shard, count in of_shard.items():
        n = (SHARD == shard).sum()
        expected = 6000 * n / 120
        assert abs(count - expected) < 5 * np.sqrt(expected)
        times = np.bincount(list(chain(*(x for x in steps if SHARD[x[0]] == shard))), minlength=120)
        times = times[
            SHARD == shard
        ]  # given the shard, its instances are alike: χ² with n − 1 degrees of freedom
        chi2 = ((times - times.mean()) ** 2 / times.mean()).sum()
        assert abs(chi2 - (n - 1)) < 5 * np.sqrt(2 * (n - 1))


@pytest.mark.parametrize("how", ["epoch", "iid"])
@pytest.mark.parametrize("clips", [1, 3])
def test_by_shards_ranks_and_resumed_runs_draw_the_same(how, clips):
    whole = batches(how, 25, SHARD, clips)
    ranks = [batches(how, 25, SHARD, clips, rank=rank, world=2) for rank in range(2)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == whole
    resumed = avid_data.BatchSampler(120, 12, how, 0, 13, 25, clips_per_open=clips, shards=SHARD)
    assert [[index for index, _ in batch] for batch in resumed] == whole[13:]


def test_shards_of_a_table(shards):
    found = table(shards)
    cfg = settings(shards, ["data.shuffle=shards"])
    given = avid_data.shards(found, cfg)
    assert given.tolist() == packed.Pack(shards).index["shard"][found.record].tolist() and len(set(given)) > 2
    assert avid_data.shards(found, settings(shards)) is None


def test_clips_per_open_are_places_of_their_own():
    sampler = avid_data.BatchSampler(120, 12, "epoch", 0, 0, 30, clips_per_open=3)
    for batch in sampler:
        indices = [index for index, _ in batch]
        assert indices == [i for i in indices[::3] for _ in range(3)] and len(set(indices)) == 4
        assert len({draw for _, draw in batch}) == 12
    taken = list(chain(*batches("epoch", 30, clips=3)))  # 30 steps of 4 files: each of 120 once
    assert sorted(taken) == sorted(list(range(120)) * 3)
    with pytest.raises(config.ConfigError, match="cannot be shared evenly by 2 processes, 4 clips a file"):
        avid_data.BatchSampler(120, 12, "epoch", 0, 0, 30, 0, 2, clips_per_open=4)
    assert batches("iid", 9) == batches("iid", 9, clips=1)


def test_clips_of_one_file_are_read_from_one_opening(world, monkeypatch):
    """The items are those of single requests, where some files cannot be read, too."""
    opened = []

    class Counted(Media):
        def __init__(self, path, *more):
            opened.append(Path(path).name)
            super().__init__(path, *more)

    monkeypatch.setattr(avid_data, "Media", Counted)
    found = table(world, "all", "folder")
    cfg = settings(".", ["data.name=folder"])
    clips = avid_data.Clips(found, cfg, training=True)
    keys = [(index, (3, 0, place)) for place, index in enumerate(np.repeat([0, 3, 5, 1, 4], 3).tolist())]
    alone = [clips[key] for key in keys]
    assert len(opened) >= 15
    opened.clear()
    several = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, clips_per_open=3))
    clips = avid_data.Clips(found, several, training=True)
    together = [clips[key] for key in keys]
    bad = {found.paths.index(path) for path in ("train/dog/broken.mp4", "test/dog/mute.mp4")}
    for one, other in zip(alone, together, strict=True):
        assert one.keys() == other.keys()
        loud = one["audio"] > -60  # Matroska rounds time stamps, and AAC makes up noise, anew after a seek
        far = (one.pop("audio") - other.pop("audio"))[loud].abs()
        assert far.mean() < 0.1 and far.max() < 2, far.max()
        for name, x in one.items():
            assert torch.equal(x, other[name]) if torch.is_tensor(x) else x == other[name]
    usable = [index for index in (0, 3, 5, 1, 4) if index not in bad]
    assert all(
        opened.count(Path(found.paths[index]).name) <= 2 for index in usable
    )  # another may be replaced by it
    assert len(opened) <= len(usable) + 2 * 3 * len(bad)


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """The tiny toy's files, packed, and a run on them."""
    root = tmp_path_factory.mktemp("toy")
    cfg = config.load("toy", TINY)
    files = toy.write(root, cfg.toy, cfg.seed, 1, progress=False)
    packing(files, root / "packed", SMALL, "toy")
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
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *checkpoint, *more, "data.workers=0"],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads((root / "run" / name).read_text())
        assert result["data"] == "packed" and result["videos"] == 8
    assert (root / "run/retrieval-cross-packed.png").exists()


def test_a_run_decoded_on_the_device_is_the_run(toy_run):
    """Its losses differ by rounding; and a run may go on the other way."""
    root, _ = toy_run
    more = ["data.name=packed", "data.shuffle=shards", "optim.epochs=4"]
    run(root / "packed", root / "device", *more, "data.decode=device", "data.workers=1")
    one, other = (
        [line["loss"] for line in metrics(root / name) if "loss" in line] for name in ("run", "device")
    )
    np.testing.assert_allclose(one[:2], other[:2], rtol=0.03)  # later steps are of other weights
    assert len(one) == len(other) == 12 and np.isfinite(other).all()
    text = run(root / "packed", root / "device", *more, "data.decode=cpu", "optim.epochs=5")
    assert "resuming" in text and final(root / "device")["step"] == 15
