"""A check finds known faults, and prepared files have the same frames and sound at the same times."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import another_writes_into, chirp_time, chirps, numbers, tone
from test_checkpoint import children

from avid import config, data, datasets
from avid.files import ConfigError
from avid.media import Media, held
from avid.tools import prepare
from avid.tools.prepare import Small

ROOT = Path(__file__).parents[1]
FRAMES_S = np.arange(40) / 20


@pytest.fixture
def ffmpeg():
    """The path of ffmpeg."""
    if path := shutil.which("ffmpeg"):
        return path
    return pytest.importorskip(
        "imageio_ffmpeg", reason="no ffmpeg on PATH, no imageio-ffmpeg"
    ).get_ffmpeg_exe()


@pytest.fixture
def folder(media_file, tmp_path):
    """A usable video, a mute one, a silent one and a broken file."""
    media_file("in/a/good.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000, channels=2), rate_hz=24000)
    media_file("in/a/mute.mp4", frame_s=FRAMES_S)
    media_file("in/b/silent.mp4", frame_s=FRAMES_S, wave=np.zeros((1, 48000), np.float32))
    (tmp_path / "in/b/broken.mp4").write_bytes(b"no video at all" * 100)
    return tmp_path / "in"


def run(*arguments):
    with pytest.raises(SystemExit) as caught:
        prepare.main([str(argument) for argument in arguments])
    return caught.value.code


def table(root, name="folder", split="all"):
    return datasets.load(config.Data(name=name, root=str(root)), split)


def rows(path):
    with open(path, newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def partial_files(root):
    return [path for path in root.rglob("*") if path.name.endswith(prepare.PART)]


# check


def test_a_check_writes_one_row_per_file(folder, tmp_path, capsys):
    assert (
        run("check", "--data", "folder", "--root", folder, "--workers", 2, "--out", tmp_path / "out.csv") == 0
    )
    found = rows(tmp_path / "out.csv")
    assert {path: (row["usable"], row["reason"].partition(":")[0]) for path, row in found.items()} == {
        "a/good.mp4": ("yes", ""),
        "a/mute.mp4": ("no", "no sound"),
        "b/silent.mp4": ("yes", "silent"),
        "b/broken.mp4": ("no", "cannot be opened"),
    }
    good = found["a/good.mp4"]
    assert abs(float(good["seconds"]) - 2.0) < 0.05 and float(good["fps"]) == pytest.approx(20, abs=0.01)
    assert [good[key] for key in ("width", "height", "audio_rate_hz", "channels")] == [
        "64",
        "64",
        "24000",
        "2",
    ]
    assert found["a/mute.mp4"]["width"] == "64" and found["a/mute.mp4"]["audio_rate_hz"] == ""
    text = capsys.readouterr().out
    assert "usable, but silent   e.g. b/silent.mp4" in text and "no sound   e.g. a/mute.mp4" in text


def test_a_check_of_one_modality_ignores_the_other(folder, tmp_path):
    assert (
        run(
            "check",
            "--data",
            "folder",
            "--root",
            folder,
            "--modality",
            "video",
            "--out",
            tmp_path / "v.csv",
            "data.workers=1",
        )
        == 0
    )
    assert [path for path, row in rows(tmp_path / "v.csv").items() if row["usable"] == "no"] == [
        "b/broken.mp4"
    ]


def test_a_check_reads_the_part_that_the_list_names(media_file, tmp_path):
    media_file("x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000)
    (tmp_path / "manifest.csv").write_text("path,start,end\nx.mp4,0.5,1.25\n")
    assert run("check", "--data", "manifest", "--root", tmp_path, "--out", tmp_path / "out.csv") == 0
    assert rows(tmp_path / "out.csv")["x.mp4 [0.5-1.25 s]"]["seconds"] == "0.750"


def test_a_damaged_end_is_found(media_file, tmp_path):
    path = media_file(
        "whole/x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000, movflags="faststart"
    )
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/x.mp4").write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.7)])
    assert run("check", "--data", "folder", "--root", tmp_path / "whole", "--out", tmp_path / "1.csv") == 0
    assert run("check", "--data", "folder", "--root", tmp_path / "cut", "--out", tmp_path / "2.csv") == 1
    assert "cannot be decoded: " in rows(tmp_path / "2.csv")["x.mp4"]["reason"]


@pytest.mark.parametrize("cut", [1, 30])
def test_an_interrupted_check_goes_on_from_its_rows(folder, tmp_path, cut):
    arguments = "check", "--data", "folder", "--root", folder, "--workers", 1, "--out", tmp_path / "out.csv"
    assert run(*arguments) == 0
    whole = (tmp_path / "out.csv").read_text()
    last = whole.splitlines()[-1].partition(",")[0]
    (tmp_path / "out.csv").write_text(whole[:-cut])
    for path in table(folder).paths:
        if path != last:
            (folder / path).write_bytes(b"")  # a file that is read again would be found empty
    assert run(*arguments) == 0
    assert (tmp_path / "out.csv").read_text() == whole


def test_a_file_that_crashes_its_reader_is_named_and_the_rest_is_read(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "examine", crash_on_mute)
    assert prepare.check(table(folder), ("video", "audio"), tmp_path / "out.csv", 1) == 3
    found = rows(tmp_path / "out.csv")
    assert (
        len(found) == 4
        and found["a/mute.mp4"]["usable"] == "no"
        and "SIGSEGV" in found["a/mute.mp4"]["reason"]
    )
    assert "crashes the decoder   e.g. a/mute.mp4" in capsys.readouterr().out


def crash_on_mute(root, path, *_):
    if path == "a/mute.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"usable": "yes", "reason": "", "seconds": "1.0"}


def test_a_check_does_not_overwrite_other_files(folder, tmp_path, capsys):
    out = tmp_path / "out.csv"
    for content in (
        "path,label\na/good.mp4,dog",
        ",".join(prepare.COLUMNS) + "\nother.mp4,yes,,1,1,1,1,1,1,video+audio\n",
    ):
        out.write_text(content)
        assert run("check", "--data", "folder", "--root", folder, "--out", out) == 2
        assert out.read_text() == content and "--out" in capsys.readouterr().err


def test_wrong_arguments_end_with_exit_code_2_and_one_line(folder, tmp_path, capsys):
    assert run("check", "--data", "nothing", "--root", folder) == 2
    assert run("check", "--data", "folder", "--root", folder, "data.wrokers=2") == 2
    assert capsys.readouterr().err.endswith("unknown setting data.wrokers; did you mean data.workers?\n")
    assert run("check", "--data", "folder", "--root", tmp_path / "nowhere") == 2
    assert run("prepare", folder, tmp_path / "small", "--workers", 0) == 2


# prepare


CONSTANT = {"x.avi": ("mpeg4", "mp3"), "x.mpg": ("mpeg1video", "mp2")}  # containers of constant frame rates
OFFSETS_S = [(0.0, 0.0), (0.0, 0.7), (0.4, 0.0)]  # when picture and sound begin


@pytest.mark.parametrize(
    "name, from_s",
    [
        *((name, at) for name in ("x.mp4", "x.mkv") for at in OFFSETS_S),
        *((name, OFFSETS_S[0]) for name in CONSTANT),
    ],
)
def test_prepared_files_have_the_same_frames_and_sound_at_the_same_times(
    name, from_s, media_file, ffmpeg, tmp_path
):
    picture_from_s, sound_from_s = from_s
    steps = [0.04] * 49 if name in CONSTANT else [0.05, 0.02, 0.08] * 13  # time between frames, s
    codecs = CONSTANT.get(name, ("libx264", "aac"))
    frame_s = picture_from_s + np.cumsum([0, *steps])
    wave = chirps([1.3 - sound_from_s], 2.5 - sound_from_s, 48000, channels=2)
    path = media_file(f"in/{name}", frame_s=frame_s, wave=wave, sound_from_s=sound_from_s, codecs=codecs)
    assert prepare.prepare(path.parent, tmp_path / "out", Small(), 1) == 1
    before, after = Media(path), Media(tmp_path / "out/x.mp4")
    np.testing.assert_allclose(after.reader.whole()[0], before.reader.whole()[0], atol=1e-3)
    ends = np.array([(media.first_s, media.last_s) for media in (before, after)])
    np.testing.assert_allclose(*ends, atol=0.1)  # AAC begins with some silence
    assert numbers(after.frames(before.reader.whole()[0] + 0.01)) == numbers(
        before.frames(before.reader.whole()[0] + 0.01)
    )
    heard = [chirp_time(media.sound(1.0, 24000, 24000), 24000) for media in (before, after)]
    assert heard[0] == pytest.approx(0.3, abs=0.03)
    assert heard[1] == pytest.approx(heard[0], abs=1e-3)  # Matroska rounds times to 1 ms


def test_sound_after_a_gap_keeps_its_time(media_file, ffmpeg, tmp_path):
    path, rate_hz = tmp_path / "in/gap.mkv", 48000
    path.parent.mkdir()
    with av.open(str(path), "w") as file:
        stream, wave = (
            file.add_stream("pcm_s16le", rate=rate_hz, layout="mono"),
            chirps([0.2, 1.6], 2.0, rate_hz),
        )
        for begin in range(0, 2 * rate_hz, 960):
            if not 0.5 <= begin / rate_hz < 1.3:
                frame = av.AudioFrame.from_ndarray(
                    (wave[:, begin : begin + 960] * 32767).astype(np.int16), "s16", "mono"
                )
                frame.sample_rate, frame.time_base, frame.pts = rate_hz, Fraction(1, rate_hz), begin
                file.mux(stream.encode(frame))
    prepare.prepare(path.parent, tmp_path / "out", Small(), 1)
    after = Media(tmp_path / "out/gap.mp4", ("audio",))
    assert chirp_time(after.sound(0.0, 12000, 24000), 24000) == pytest.approx(0.2, abs=0.002)
    assert chirp_time(after.sound(1.0, 24000, 24000), 24000) == pytest.approx(0.6, abs=0.002)
    assert np.abs(after.sound(0.6, 12000, 24000)).max() < 1e-3


def test_prepared_files_have_the_requested_size_rate_and_key_frames(media_file, ffmpeg, tmp_path):
    path = media_file("in/x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 44100, channels=2), rate_hz=44100)
    arguments = "--short-side", 33, "--keyint", 6, "--audio-rate", 16000, "--workers", 1
    assert run("prepare", path.parent, tmp_path / "out", *arguments) == 0
    with av.open(str(tmp_path / "out/x.mp4")) as file:
        video, sound = file.streams.video[0], file.streams.audio[0]
        assert (video.codec_context.name, video.width, video.height) == ("h264", 32, 32)
        assert (sound.codec_context.name, sound.rate, sound.codec_context.channels) == ("aac", 16000, 1)
        keys = [i for i, packet in enumerate(p for p in file.demux(video) if p.size) if packet.is_keyframe]
    assert keys[0] == 0 and max(np.diff([*keys, len(FRAMES_S)])) <= 6


def test_real_videos_keep_their_shape_their_times_and_their_sound(real_media, ffmpeg, tmp_path, capsys):
    count = sum(path.suffix in datasets.MEDIA for path in real_media.iterdir())
    assert prepare.prepare(real_media, tmp_path, Small(), 2) == count >= 5
    assert f"prepared {count} files (3 without sound)" in capsys.readouterr().out
    shapes = {"flipping_a_pancake.mkv": (128, 228), "nasa_13013.mp4": (128, 228), "video_90.mov": (228, 128)}
    for name, shape in shapes.items():
        modalities = ("video",) if name == "video_90.mov" else ("video", "audio")
        before, after = (
            Media(real_media / name, modalities),
            Media((tmp_path / name).with_suffix(".mp4"), modalities),
        )
        assert after.frames([0.0]).shape[1:3] == shape
        np.testing.assert_allclose(after.reader.whole()[0], before.reader.whole()[0], atol=1e-3)
        if "audio" in modalities:
            a, b = (media.sound(0.0, 10 * 24000, 24000) for media in (before, after))
            assert np.corrcoef(a, b)[0, 1] > 0.99  # shifted by a sample it is below 0.97


def test_an_interrupted_preparation_goes_on(folder, ffmpeg, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / f"long gone.mp4{prepare.PART}").write_bytes(b"half")
    (out / "a" / "mute.mp4").write_bytes(b"there")
    (out / "prepare.json").write_text(json.dumps(Small()._asdict()))
    assert run("prepare", folder, out, "--workers", 2) == 0
    assert not partial_files(out) and (out / "a/mute.mp4").read_bytes() == b"there"
    assert [path for path, row in rows(out / "failures.csv").items() if "Invalid data" in row["reason"]] == [
        "b/broken.mp4"
    ]
    assert "prepared 2 files (0 without sound)" in capsys.readouterr().out
    shutil.copy(folder / "a/mute.mp4", folder / "b/broken.mp4")
    assert run("prepare", folder, out, "--workers", 2) == 0
    assert (
        sorted(os.listdir(out / "b")) == ["broken.mp4", "silent.mp4"] and not (out / "failures.csv").exists()
    )
    text = capsys.readouterr().out
    assert "prepared 1 files (1 without sound)" in text and "3 were there before" in text


def test_a_process_whose_command_was_killed_does_not_write_into_its_successors_file(
    media_file, tmp_path, monkeypatch
):
    source, target, first = str(media_file("a.mp4", frame_s=FRAMES_S)), str(tmp_path / "b.mp4"), os.getpid()

    def ffmpeg(command):
        Path(command[-1]).write_text(str(os.getpid()))
        if os.getpid() == first:
            (second,) = children(1, encode)
            assert os.waitpid(second, 0)[1] == 0
        return ""

    def encode(_=None):
        assert prepare.encode("ffmpeg", source, target, Small()) == ("", False)

    monkeypatch.setattr(prepare, "_run", ffmpeg)
    monkeypatch.setattr(prepare, "read_clips", lambda *_: None)
    encode()
    assert Path(target).read_text() == str(first) and not partial_files(tmp_path)


def test_no_usable_file_ends_with_exit_code_1(tmp_path, ffmpeg):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/broken.mp4").write_bytes(b"no video at all")
    assert run("prepare", tmp_path / "in", tmp_path / "out") == 1


def test_data_sets_are_read_from_their_prepared_copies(media_file, ffmpeg, tmp_path):
    for name in ("in/v/a.mkv", "in/v/b.mp4"):
        media_file(name, frame_s=FRAMES_S[:10], wave=tone(440, 0.5, 24000), rate_hz=24000)
    media_file("in/v/c.wav", wave=chirps([0.3], 1.0, 24000), rate_hz=24000, codecs=("", "pcm_s16le"))
    (tmp_path / "in/manifest.csv").write_text(
        'path,label,split\nv/a.mkv,"dog, old",train\nv\\b.mp4,cat,train\nv/c.wav,cat,test\nv/gone.avi,x,\n'
    )
    (tmp_path / "in/notes.txt").write_bytes(b"a.mkv\r\n\xff")
    assert prepare.prepare(tmp_path / "in", tmp_path / "out", Small(), 2) == 3
    before, after = table(tmp_path / "in", "manifest"), table(tmp_path / "out", "manifest")
    assert after.paths == ["v/a.mp4", "v/b.mp4", "v/c.m4a"] and after.missing == ["v/gone.avi"]
    assert after.labels.tolist() == before.labels.tolist() and after.classes == before.classes
    assert (tmp_path / "out/notes.txt").read_bytes() == b"a.mkv\r\n\xff"
    sound = Media(tmp_path / "out/v/c.m4a", ("audio",)).sound(0.0, 24000, 24000)
    assert chirp_time(sound, 24000) == pytest.approx(0.3, abs=0.002)


def test_two_files_that_would_become_one_are_not_mixed_up(media_file, ffmpeg, tmp_path):
    media_file("in/a.avi", frame_s=FRAMES_S[:10], codecs=("mpeg4", "mp3"))
    media_file("in/a.mp4", frame_s=FRAMES_S)
    assert prepare.prepare(tmp_path / "in", tmp_path / "out", Small(), 1) == 1
    assert len(Media(tmp_path / "out/a.mp4", ("video",)).reader.whole()[0]) == 10
    assert rows(tmp_path / "out/failures.csv")["a.mp4"]["reason"].startswith(
        "would become a.mp4, as a.avi does"
    )


def test_only_one_command_may_prepare_into_a_folder(folder, ffmpeg, tmp_path):
    (tmp_path / "small").mkdir()
    with (
        another_writes_into(tmp_path / "small"),
        pytest.raises(ConfigError, match="another command is writing"),
    ):
        prepare.prepare(folder, tmp_path / "small", Small(), workers=1)


def test_a_clock_that_begins_with_a_stream_that_is_not_kept_is_a_reason(media_file, ffmpeg, tmp_path):
    late = media_file("late.mp4", frame_s=np.arange(50) / 25, wave=tone(440, 2.0, 48000))
    early = media_file("early.wav", wave=tone(330, 5.0, 48000), codecs=("", "pcm_s16le"))
    source, folder = tmp_path / "in" / "two.mkv", tmp_path / "in"
    folder.mkdir()
    inputs = ["-itsoffset", "3", "-i", late, "-i", early, "-map", "0:v", "-map", "0:a", "-map", "1:a"]
    subprocess.run(
        [ffmpeg, "-v", "error", *inputs, "-disposition:a:1", "0", "-c:v", "copy", source], check=True
    )
    assert prepare.prepare(folder, tmp_path / "small", Small(), workers=1) == 0
    assert "its clock begins 3.0" in (tmp_path / "small" / "failures.csv").read_text()


def test_a_sound_with_a_cover_is_prepared(media_file, ffmpeg, tmp_path):
    sound = media_file("a.wav", wave=tone(440, 2.0, 48000), codecs=("", "pcm_s16le"))
    covered = tmp_path / "in" / "a.mp4"
    covered.parent.mkdir()
    picture = ["-f", "lavfi", "-i", "testsrc=s=96x96:d=0.1:r=10"]
    more = ["-map", "0", "-map", "1", "-c:v", "png", "-frames:v", "1", "-disposition:v", "attached_pic"]
    subprocess.run([ffmpeg, "-v", "error", "-i", sound, *picture, *more, covered], check=True)
    assert held(covered) == ("audio",)
    assert prepare.prepare(covered.parent, tmp_path / "small", Small(), workers=1) == 1
    assert held(tmp_path / "small" / "a.mp4") == ("audio",)


def test_a_prepared_folder_keeps_its_settings(folder, ffmpeg, tmp_path, capsys):
    assert run("prepare", folder, tmp_path / "out") == 0
    assert run("prepare", folder, tmp_path / "out", "--short-side", 64) == 2
    assert '"short_side": 128' in capsys.readouterr().err


def test_source_and_destination_must_not_overlap(folder, tmp_path):
    for src, dst in ((folder, folder), (folder, folder / "small"), (folder / "a", folder)):
        assert run("prepare", src, dst) == 2
    assert sorted(os.listdir(folder)) == ["a", "b"]


# with a script in place of ffmpeg


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """A function that installs a shell script in place of ffmpeg. $out is the file that it has to write. The
    trial run before the first file succeeds.
    """
    (tmp_path / "bin").mkdir()

    def install(script):
        path = tmp_path / "bin/ffmpeg"
        path.write_text(f'#!/bin/sh\ncase "$*" in *lavfi*) exit 0;; esac\nfor out; do :; done\n{script}\n')
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    return install


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_every_process_and_leaves_no_partial_file(signum, folder, fake_ffmpeg, tmp_path):
    fake_ffmpeg(f'echo half > "$out"\necho $$ >> {tmp_path}/pids\nexec sleep 600')
    command = [sys.executable, "-m", "avid", "prepare", str(folder), str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pids, give_up = [], time.monotonic() + 60
    while len(pids) < 2 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.05)
        pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
    assert len(pids) == 2 and len(partial_files(tmp_path / "out")) == 2
    process.send_signal(signum)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == (130 if signum == signal.SIGINT else 143)
    assert signum != signal.SIGINT or message.endswith("interrupted; the same command goes on\n")
    for pid in map(int, pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not partial_files(tmp_path / "out") and not list((tmp_path / "out").rglob("*.mp4"))


def test_a_full_disk_ends_the_preparation_with_one_line(folder, fake_ffmpeg, tmp_path, capsys):
    fake_ffmpeg(
        'echo "[mp4] something" >&2; '
        'echo "av_interleaved_write_frame(): No space left on device" >&2; exit 228'
    )
    assert run("prepare", folder, tmp_path / "out", "--workers", 1) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").rglob("*.mp4"))


def test_an_ffmpeg_that_cannot_encode_is_found_before_the_first_file(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "ffmpeg").write_text('#!/bin/sh\necho "Unknown encoder libx264" >&2\nexit 8\n')
    (tmp_path / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert run("prepare", folder, tmp_path / "out") == 2
    assert "Unknown encoder libx264" in capsys.readouterr().err and not partial_files(tmp_path / "out")


def test_without_ffmpeg_one_line_says_how_to_get_it(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert run("prepare", folder, tmp_path / "out") == 2
    assert (
        capsys.readouterr().err
        == "error: no ffmpeg on PATH. Install ffmpeg 5.1 or newer, with libx264 and aac, "
        "or: pip install imageio-ffmpeg\n"
    )


def test_help_needs_no_heavy_imports():
    code = (
        "import sys, avid.tools.prepare as p\ntry: p.main(['check', '--help'])\n"
        "finally: assert not {'torch', 'decord', 'av'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--modality" in done.stdout, done.stderr


def test_two_parts_of_one_file_have_two_rows_and_are_resumed(media_file, tmp_path, capsys):
    media_file("x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000)
    (tmp_path / "manifest.csv").write_text("path,start,end\nx.mp4,0,0.75\nx.mp4,1,1.5\n")
    command = ("check", "--data", "manifest", "--root", tmp_path, "--out", tmp_path / "out.csv")
    assert run(*command) == 0
    found = rows(tmp_path / "out.csv")
    assert {name: row["seconds"] for name, row in found.items()} == {
        "x.mp4 [0.0-0.75 s]": "0.750",
        "x.mp4 [1.0-1.5 s]": "0.500",
    }
    assert run(*command) == 0 and "2 of them were read before" in capsys.readouterr().out


def test_a_check_names_the_reader_of_the_frames_and_the_reason(media_file, tmp_path):
    for name in ("x.mp4", "x.mkv"):
        media_file(f"in/{name}", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000)
    assert run("check", "--data", "folder", "--root", tmp_path / "in", "--out", tmp_path / "out.csv") == 0
    found = {path: row["frames_by"] for path, row in rows(tmp_path / "out.csv").items()}
    assert found == {"x.mp4": "decord", "x.mkv": "PyAV: h264 in matroska,webm"}


def test_each_folder_has_its_own_csv(media_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/videos", "b/videos"):
        media_file(f"{folder}/x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000)
        assert run("check", "--data", "folder", "--root", folder) == 0
    assert len(list(tmp_path.glob("check-folder-videos-*-all-both.csv"))) == 2


def test_a_check_reads_a_file_as_training_does(media_file, tmp_path, monkeypatch):
    """It reads one clip at the beginning and one at the end, within data.timeout_s."""
    media_file("x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000)
    file = str(tmp_path), "x.mp4", 0.0, np.inf, ("video", "audio")
    assert prepare.examine(*file, config.load("toy"))["usable"] == "yes"
    found = prepare.examine(*file, config.load("toy", ["data.timeout_s=1e-9"]))
    assert found["usable"] == "no" and "takes longer than data.timeout_s = 1e-09 s" in found["reason"]
    read = []
    monkeypatch.setattr(
        data.Clips,
        "picture",
        lambda clips, media, clip, rng: read.append(clip.start_s) or torch.zeros(3, 1, 1, 1),
    )
    prepare.examine(*file, config.load("toy", ["audio.seconds=0.5"]))
    assert len(read) == 2 and read[0] < 0.1 and read[1] > 1.2


def test_a_check_takes_its_limits_from_the_settings(media_file, tmp_path):
    media_file("in/x.mp4", frame_s=FRAMES_S, wave=tone(440, 2, 24000), rate_hz=24000)
    command = "check", "--data", "folder", "--root", tmp_path / "in", "--out", tmp_path / "out.csv"
    assert run(*command, "data.timeout_s=1e-9") == 1
    assert "data.timeout_s" in rows(tmp_path / "out.csv")["x.mp4"]["reason"]
