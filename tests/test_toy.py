"""The toy world: the same seed gives the same bits, no file is half written, and sound and picture show the
same events.
"""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from avid import config, toy
from avid.media import Media

TINY = config.Toy(train=6, test=2, seconds=2.0, size=32)
KINDS, MOTIONS = list(toy.KINDS), list(toy.TEMPO)


def content(folder):
    """{path: hash} of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return toy.write(tmp_path_factory.mktemp("world"), TINY, seed=3, workers=1, progress=False)


# ---------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_seed_gives_the_same_bytes_by_any_number_of_processes(world, tmp_path, workers):
    again = toy.write(tmp_path, TINY, seed=3, workers=workers, progress=False)
    assert again.name == world.name
    assert len(content(world)) == 9  # eight videos and the manifest
    assert content(again) == content(world)


def test_another_seed_gives_other_bytes_and_another_folder(world, tmp_path):
    other = toy.write(tmp_path, TINY, seed=4, workers=1, progress=False)
    assert other.name != world.name
    assert not set(content(other).values()) & set(content(world).values())


@pytest.mark.parametrize("change", [field.name for field in dataclasses.fields(config.Toy)])
def test_a_changed_setting_makes_a_new_folder(world, tmp_path, monkeypatch, change):
    def nothing(path, frames, wave, settings):
        path.write_bytes(b"")

    monkeypatch.setattr(toy, "render", lambda settings, seed, row: (None, None))
    monkeypatch.setattr(toy, "encode", nothing)
    new = {"train": 7, "test": 3, "seconds": 2.1, "size": 34, "fps": 15, "rate_hz": 24000, "faulty": 0.5}[
        change
    ]
    assert (
        toy.write(tmp_path, dataclasses.replace(TINY, **{change: new}), 3, 1, progress=False).name
        != world.name
    )
    assert toy.write(tmp_path, TINY, 3, 1, progress=False).name == world.name


@pytest.mark.parametrize("file", ["a.mp4", "dogs/a.MOV", "train/dogs/a.wav"])
def test_a_folder_of_the_users_own_videos_is_left_alone(tmp_path, file):
    """data.root was given, data.name forgotten."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(config.ConfigError, match=f"holds videos or sounds of yours, such as {file}"):
        toy.write(tmp_path, TINY, seed=3, workers=1, progress=False)
    assert [path for path in content(tmp_path)] == [file]


@pytest.mark.parametrize("size", [32, 64])
def test_an_encoding_does_not_depend_on_what_lies_in_memory(tmp_path, size):
    """An earlier version gave other bytes in three of a hundred encodings of frames 32 pixels wide."""
    world, path, found = config.Toy(train=6, test=2, seconds=2.0, size=size), tmp_path / "a.mp4", set()
    frames, wave = toy.render(world, 3, toy.table(world, 3)[2])
    for k in range(200):
        rng = np.random.default_rng(k)
        garbage = [rng.random(n) for n in rng.integers(1, 200_000, 3)]
        toy.encode(path, frames, wave[:1024], world)
        found.add(path.read_bytes())
        del garbage
    assert len(found) == 1


def test_an_existing_world_is_not_written_again(world, monkeypatch):
    monkeypatch.setattr(toy, "render", lambda *_: pytest.fail("rendered again"))
    assert toy.write(world.parent, TINY, 3, 1, progress=False) == world


def test_an_interrupted_world_is_completed(world, tmp_path):
    """As a killed writer leaves it: files are missing, some are half written under other names, and there is
    no manifest.
    """
    folder = toy.write(tmp_path, TINY, 3, 1, progress=False)
    (folder / "manifest.csv").unlink()
    for path in ("train/00001.mp4", "train/00004.mp4", "test/00000.mp4"):
        (folder / path).unlink()
    kept = (folder / "train/00002.mp4").stat().st_mtime_ns
    for orphan in ("train/00001.mp4.0123abcd.part", "test/00000.part4711.part", "manifest.csv.0123abcd.part"):
        (folder / orphan).write_bytes(b"half a file")
    assert toy.write(tmp_path, TINY, 3, 1, progress=False) == folder
    assert content(folder) == content(world)
    assert (folder / "train/00002.mp4").stat().st_mtime_ns == kept


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("No space left on device")])
def test_no_half_file_has_its_final_name(world, tmp_path, monkeypatch, fault):
    whole, written = toy.encode, []

    def encode(path, *rest):
        whole(path, *rest)
        written.append(path)
        if len(written) == 3:
            path.write_bytes(path.read_bytes()[:500])
            raise fault

    monkeypatch.setattr(toy, "encode", encode)
    with pytest.raises((KeyboardInterrupt, OSError)):
        toy.write(tmp_path, TINY, 3, 1, progress=False)
    folder = tmp_path / world.name
    assert len(content(folder)) == 2
    assert content(folder).items() <= content(world).items()
    monkeypatch.setattr(toy, "encode", whole)
    assert content(toy.write(tmp_path, TINY, 3, 1, progress=False)) == content(world)


def alive(pid):
    """Whether a process still runs; a zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a process's children by way of /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_writer_leaves_no_process_and_no_half_video(tmp_path, how):
    settings = dataclasses.replace(TINY, train=400)
    arguments = f"{str(tmp_path)!r}, config.{settings!r}, 3, 2, progress=False"
    code = f"from avid import config, toy; toy.write({arguments})"
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )
    while writer.poll() is None and len(list(tmp_path.glob("*/train/*.mp4"))) < 3:
        time.sleep(0.01)
    children = [
        int(pid) for pid in Path(f"/proc/{writer.pid}/task/{writer.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    for pid in [writer.pid] + (children if how == signal.SIGINT else []):  # Ctrl-C reaches all of them
        os.kill(pid, how)
    error = writer.communicate(timeout=50)[1]
    assert writer.returncode == -how
    assert error.count("Traceback") <= 1  # the workers do not add theirs
    give_up = time.monotonic() + 60
    while any(map(alive, children)) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert not any(map(alive, children))
    (folder,) = tmp_path.iterdir()
    assert not (folder / "manifest.csv").exists()
    if how == signal.SIGINT:
        assert not list(folder.rglob("*.part"))
    for path in folder.glob("train/*.mp4"):  # each one is whole
        assert Media(path).last_s == pytest.approx(2.0, abs=0.05)


def test_two_runs_may_write_the_same_world_at_once(world, tmp_path, monkeypatch):
    """While one run writes its third video, another one writes the whole world and cleans up."""
    whole, calls = toy.encode, []

    def encode(path, *rest):
        whole(path, *rest)
        calls.append(path)
        if len(calls) == 3:
            assert content(toy.write(tmp_path, TINY, 3, 1, progress=False)) == content(world)
            assert not path.exists()  # removed by the other run

    monkeypatch.setattr(toy, "encode", encode)
    assert content(toy.write(tmp_path, TINY, 3, 1, progress=False)) == content(world)


def test_settings_that_no_file_can_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"toy.size is 33, .*: use 34"):
        toy.write(tmp_path, dataclasses.replace(TINY, size=33), 0, 1)
    with pytest.raises(ValueError, match=r"toy.rate_hz is 16001, .* one of .*16000"):
        toy.write(tmp_path, dataclasses.replace(TINY, rate_hz=16001), 0, 1)
    assert not list(tmp_path.iterdir())


def test_files_hold_what_was_rendered(world):
    for row in toy.table(TINY, 3)[:4]:
        frames, wave = toy.render(TINY, 3, row)
        assert frames.shape == (32, 32, 32, 3)
        assert wave.shape == (32000,)
        media = Media(world / row["path"])
        assert media.last_s - media.first_s == pytest.approx(2.0, abs=0.03)
        seen = media.frames((np.arange(32) + 0.5) / 16).astype(float)
        grey = np.array([0.299, 0.587, 0.114])  # H.264 halves the resolution of colour
        assert np.abs(seen @ grey - frames @ grey).mean() < 8
        heard = media.sound(0.0, 32000, 16000)
        assert np.corrcoef(heard, wave)[0, 1] > 0.9


@pytest.mark.parametrize("rate_hz", [8000, 44100])
def test_other_sample_rates_are_written(tmp_path, rate_hz):
    settings = config.Toy(train=1, test=1, seconds=1.5, size=16, fps=10, rate_hz=rate_hz)
    media = Media(toy.write(tmp_path, settings, 0, 1, progress=False) / "train/00000.mp4")
    assert media.stream.rate == rate_hz
    assert media.last_s - media.first_s == pytest.approx(1.5, abs=0.1)


# ------------------------------------------------------------------------------------------------------ table


def test_kinds_and_motions_are_equally_frequent():
    rows = toy.table(config.Toy(train=120, test=80, faulty=0.3), 0)
    for split, count in (("train", 120), ("test", 80)):
        pairs = Counter((row["label"], row["motion"]) for row in rows if row["split"] == split)
        assert set(pairs) == {(kind, motion) for kind in KINDS for motion in MOTIONS}
        assert set(pairs.values()) == {count // 40}


@pytest.mark.parametrize("faulty", [0.0, 0.1, 0.3, 1.0])
def test_the_share_of_faulty_rows_is_exact(faulty):
    rows = toy.table(config.Toy(train=50, test=30, faulty=faulty), 0)
    train, test = rows[:50], rows[50:]
    assert sum(row["faulty"] for row in train) == round(faulty * 50)
    assert not any(row["faulty"] for row in test)
    assert {row["split"] for row in test} == {"test"}
    assert all((row["sound"] != row["label"]) == bool(row["faulty"]) for row in rows)


def test_faulty_rows_change_nothing_else():
    clean, faulty = (toy.table(config.Toy(train=50, test=30, faulty=share), 0) for share in (0.0, 0.4))
    assert [row | {"faulty": 0, "sound": row["label"]} for row in faulty] == clean
    assert {row["sound"] for row in faulty if row["faulty"]} >= {"music", "noise"}


def test_tempo_and_pitch_do_not_depend_on_the_kind():
    rows = toy.table(config.Toy(train=400, test=0), 0)
    for kind in KINDS:
        of_kind = [row for row in rows if row["label"] == kind]
        assert np.mean([np.log2(row["pitch_hz"] / toy.PITCH_HZ) for row in of_kind]) == pytest.approx(
            0.5, abs=0.15
        )
    for row in rows:
        assert abs(row["tempo"] / toy.TEMPO[row["motion"]] - 1) <= toy.TEMPO_JITTER + 1e-3


# -------------------------------------------------------------------------------------------------- the world

LONG = config.Toy(train=80, test=0, seconds=4.0, size=32, faulty=0.5)


def loudness(wave, per_s, settings=LONG):
    """Root mean square of every 1/per_s seconds."""
    samples = settings.rate_hz // per_s
    return np.sqrt((wave[: len(wave) // samples * samples].reshape(-1, samples) ** 2).mean(1))


def change(frames):
    """How much the picture changes from each frame to the next one."""
    return np.abs(np.diff(frames.astype(float), axis=0)).mean((1, 2, 3))


def skew(x):
    x = x - x.mean()
    return (x**3).mean() / (x**2).mean() ** 1.5


@pytest.fixture(scope="module")
def rendered():
    """[(row, frames, wave)] of 80 videos, half of them faulty."""
    return [(row, *toy.render(LONG, 0, row)) for row in toy.table(LONG, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sound_starts_at_the_events(kind):
    """The loudness jumps up at events, and not between them."""
    at_events, between = [], []
    for seed, motion in enumerate(MOTIONS):
        rng = np.random.default_rng(seed)
        track = toy.course(motion, toy.TEMPO[motion], LONG.seconds, rng)
        # k: from k/50 s to (k + 1)/50 s
        rise = np.diff(np.log(loudness(toy.sound(kind, track, 300.0, LONG, rng), 50) + 1e-3))
        event = np.zeros(len(rise), bool)
        for time_s in track.event_s:
            k = int(time_s * 50)
            event[max(k - 1, 0) : max(k + 1, 0)] = True
        at_events.append(rise[event].max())
        between.append(rise[~event].mean())
    assert min(at_events) > 0.1
    assert np.mean(between) < 0 < np.mean(at_events)
    assert np.mean(at_events) > 10 * abs(np.mean(between))


def test_sound_and_picture_go_together_except_in_faulty_videos(rendered):
    together = {0: [], 1: []}
    for row, frames, wave in rendered:
        moves = change(frames)
        together[row["faulty"]].append(np.corrcoef(moves, loudness(wave, LONG.fps)[1 : len(moves) + 1])[0, 1])
    assert len(together[0]) == len(together[1]) == 40
    assert np.mean(together[0]) > 0.15
    assert abs(np.mean(together[1])) < 0.1


def test_sound_and_picture_differ_from_their_reverse(rendered):
    """Events begin suddenly and end slowly, so the changes of both are skewed, and the other way round if
    reversed.
    """
    sounds, pictures = {}, {}
    for row, frames, wave in rendered:
        if not row["faulty"]:
            sounds.setdefault(row["label"], []).append(skew(np.diff(loudness(wave, 50))))
            pictures.setdefault(row["motion"], []).append(skew(np.diff(change(frames))))
    assert len(sounds) == len(KINDS)
    assert len(pictures) == len(MOTIONS)
    assert min(np.mean(values) for values in sounds.values()) > 0.4
    assert min(np.mean(values) for values in pictures.values()) > 0.3


def test_frames_and_samples_use_their_range(rendered):
    for _, frames, wave in rendered:
        assert frames.dtype == np.uint8
        assert frames.max() - frames.min().astype(int) > 60  # the thing can be seen
        assert np.isfinite(wave).all()
        assert 0.25 < np.abs(wave).max() <= 1.0


def test_two_videos_of_a_kind_differ(rendered):
    """The background, the colours, the pitch and the room are drawn anew for every video."""
    first, again = (rendered[i] for i in (0, 40))
    assert first[0]["label"] == again[0]["label"]
    assert first[0]["motion"] == again[0]["motion"]
    assert np.abs(first[1].astype(int) - again[1]).mean() > 5
    assert abs(np.corrcoef(first[2], again[2])[0, 1]) < 0.2
