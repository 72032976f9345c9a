"""Frames and sound at given times, from files of known content and from faulty files."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from conftest import chirp_time, chirps, numbers, tone

from avid.media import Media, MediaError, Timed

MS = 1e-3
TWO_SECONDS = np.arange(50) / 25  # 25 frames a second
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:keyint=24:min-keyint=24:scenecut=0"}


# ---------------------------------------------------------------------------------------------------- picture


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("fps", [8, 15, 25, 30000 / 1001, 60])
def test_each_time_gives_the_frame_shown_then(media_file, fps, container):
    frame_s = np.arange(round(1.6 * fps)) / fps
    media = Media(media_file(f"a.{container}", frame_s=frame_s), ("video",))
    order = np.random.default_rng(0).permutation(len(frame_s))
    for share in (0.05, 0.5, 0.9):  # of the time that a frame is on show; mkv rounds times to milliseconds
        assert numbers(media.frames((order + share) / fps)) == order.tolist()
    for k in order[:8]:  # one by one
        assert numbers(media.frames([(k + 0.5) / fps])) == [k]
    assert media.first_s == 0.0
    assert media.last_s == pytest.approx(len(frame_s) / fps, abs=2 * MS)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_of_a_variable_frame_rate(media_file, container):
    rng = np.random.default_rng(0)
    frame_s = np.cumsum(rng.choice([0.017, 0.033, 0.1, 0.25], size=40))
    media = Media(media_file(f"a.{container}", frame_s=frame_s - frame_s[0]), ("video",))
    times = rng.uniform(0, frame_s[-1] - frame_s[0], 200)
    times = times[np.abs(times[:, None] - (frame_s - frame_s[0])).min(1) > MS]
    shown = np.searchsorted(frame_s - frame_s[0], times, side="right") - 1
    assert numbers(media.frames(times)) == shown.tolist()


def test_frames_can_be_read_in_any_order_and_repeatedly(media_file):
    media = Media(media_file("a.mp4", frame_s=TWO_SECONDS), ("video",))
    asked = [30, 2, 2, 49, 30, 0]
    frames = media.frames((np.array(asked) + 0.5) / 25)
    assert frames.shape == (6, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == asked


def test_times_outside_the_video_give_its_first_or_last_frame(media_file):
    media = Media(media_file("a.mp4", frame_s=TWO_SECONDS), ("video",))
    assert numbers(media.frames([-1.0, 1.99, 2.5, 100.0])) == [0, 49, 49, 49]


@pytest.mark.parametrize(
    ("name", "codec", "encoder"),
    [
        ("open.mp4", "libx264", OPEN_GROUPS),
        ("open.mkv", "libx264", OPEN_GROUPS),
        ("hevc.mp4", "libx265", {"x265-params": "log-level=none"}),
        ("b.mp4", "mpeg4", {"bf": "2"}),
        ("b.avi", "mpeg4", {"bf": "2"}),
        ("h264.avi", "libx264", {}),
        ("plain.avi", "mpeg4", {}),
        ("a.ts", "libx264", {}),
        ("a.mpg", "mpeg2video", {"bf": "2"}),
        ("a.flv", "libx264", {}),
        ("a.webm", "libvpx", {}),
    ],
)
def test_frames_are_right_in_difficult_containers(media_file, name, codec, encoder):
    """Open groups of pictures, no time stamps or no index: decord alone gives wrong frames."""
    media = Media(media_file(name, frame_s=TWO_SECONDS, codecs=(codec,), encoder=encoder), ("video",))
    order = np.random.default_rng(0).permutation(50)
    assert numbers(media.frames((order + 0.5) / 25)) == order.tolist()
    for k in order[:10]:
        assert numbers(media.frames([(k + 0.5) / 25])) == [k]


@pytest.mark.parametrize("size", [16, 24, 32, 48, 80, 96, 112, 144, 160])
def test_small_frames(media_file, size):
    media = Media(media_file("a.mp4", frame_s=TWO_SECONDS, size=size), ("video",))
    frames = media.frames([0.1, 1.0])
    assert frames.shape == (2, size, size, 3)
    assert numbers(frames) == [2, 25]


# ------------------------------------------------------------------------------------------------------ sound


def heard_at(media, time_s, rate_hz):
    """When the chirp near time_s is heard, s, from 0.5 s of sound around it."""
    return time_s - 0.23 + chirp_time(media.sound(time_s - 0.23, round(0.5 * rate_hz), rate_hz), rate_hz)


@pytest.mark.parametrize("rate_hz", [16000, 24000])
@pytest.mark.parametrize("file_hz", [44100, 48000])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_chirp_is_heard_at_its_time(media_file, container, file_hz, rate_hz):
    wave = chirps([0.4, 1.3, 2.2], 2.8, file_hz)
    media = Media(media_file(f"a.{container}", wave=wave, rate_hz=file_hz), ("audio",))
    for time_s in (1.3, 2.2, 0.4):
        assert heard_at(media, time_s, rate_hz) == pytest.approx(time_s, abs=MS)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.wav", "pcm_s16le"),
        ("a.flac", "flac"),
        ("a.mp3", "libmp3lame"),
        ("a.ogg", "libopus"),
        ("a.m4a", "aac"),
    ],
)
def test_files_with_sound_only(media_file, name, codec):
    media = Media(media_file(name, wave=chirps([0.4, 1.3], 2.0, 48000), codecs=("", codec)), ("audio",))
    assert media.first_s == pytest.approx(0.0, abs=30 * MS)  # an encoder may add a lead-in
    assert media.last_s == pytest.approx(2.0, abs=80 * MS)
    for time_s in (1.3, 0.4):
        assert heard_at(media, time_s, 16000) == pytest.approx(time_s, abs=5 * MS)
    if name.endswith("mp3"):
        return  # its last packet is padded
    assert media.sound(1.9, 16000, 16000)[8000:].max() == 0.0


def test_resampling_keeps_the_waveform(media_file):
    media = Media(media_file("a.wav", wave=tone(440, 2.0, 48000), codecs=("", "pcm_s16le")), ("audio",))
    t = 0.5 + np.arange(8000) / 16000
    assert np.abs(media.sound(0.5, 8000, 16000) - 0.5 * np.sin(2 * np.pi * 440 * t)).max() < 2e-3


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_channels_are_averaged(media_file, channels):
    """A tone in all channels is as loud as in one. A tone in one of two channels is half as loud."""
    wave = tone(440, 1.0, 48000, channels)
    media = Media(media_file("a.wav", wave=wave, codecs=("", "pcm_s16le")), ("audio",))
    assert np.abs(media.sound(0.2, 8000, 16000)).max() == pytest.approx(0.5, abs=0.01)
    wave[1:] = 0.0
    media = Media(media_file("b.wav", wave=wave, codecs=("", "pcm_s16le")), ("audio",))
    assert np.abs(media.sound(0.2, 8000, 16000)).max() == pytest.approx(0.5 / channels, abs=0.01)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mpg"])
def test_a_read_does_not_depend_on_earlier_reads(media_file, name):
    """Clips of a file can be read in any order, also after its end was reached."""
    codecs = {"a.avi": ("mpeg4", "pcm_s16le"), "a.mpg": ("mpeg2video", "mp2")}.get(name, ("libx264", "aac"))
    wave = chirps([0.05, 0.9, 1.8], 2.0, 48000) + 0.2 * tone(600, 2.0, 48000)
    path = media_file(name, frame_s=TWO_SECONDS, wave=wave, codecs=codecs)
    alone = {start_s: Media(path).sound(start_s, 4800, 16000) for start_s in (0.0, 0.1, 0.8, 1.7)}
    media = Media(path)
    for start_s in (1.7, 0.0, 0.8, 0.1, 1.7, 0.1, 0.0):
        media.frames([start_s])
        again = media.sound(start_s, 4800, 16000)
        if name == "a.mkv":  # its time stamps are rounded to milliseconds
            assert (
                chirp_time(again, 16000) == pytest.approx(chirp_time(alone[start_s], 16000), abs=MS)
                or start_s == 0.1
            )
        else:
            np.testing.assert_allclose(again, alone[start_s], atol=1e-3)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_part_of_the_sound_equals_that_part_of_the_whole(media_file, name):
    at_s = [0.2, 0.75, 1.5, 2.1, 2.9]
    wave = chirps(at_s, 3.0, 48000) + 0.2 * tone(220, 3.0, 48000)  # no noise: AAC makes up other noise
    media = Media(
        media_file(name, wave=wave, codecs=("", "libopus" if name == "a.webm" else "aac")), ("audio",)
    )
    whole = media.sound(0.0, 48000, 16000)
    for time_s in at_s:
        begin = round((time_s - 0.1) * 16000)
        part, same = media.sound(begin / 16000, 4000, 16000), whole[begin : begin + 4000]
        if name == "a.mp4":
            np.testing.assert_allclose(part[: len(same)], same, atol=1e-3)
        else:  # its time stamps are rounded to milliseconds
            assert chirp_time(part, 16000) == pytest.approx(chirp_time(same, 16000), abs=1.1 * MS)


# -------------------------------------------------------------------------------------- picture against sound

STARTS = {  # (first frame at, sound from) s
    "together": (0.0, 0.0),
    "sound 0.7 s late": (0.0, 0.7),
    "picture 0.7 s late": (0.7, 0.0),
    "both from 2.5 s on": (2.5, 2.5),
    "from 2.5 s on, sound late": (2.5, 3.2),
}


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("picture_s, sound_s", STARTS.values(), ids=STARTS)
def test_picture_and_sound_share_a_clock_that_begins_with_the_file(media_file, picture_s, sound_s, name):
    path = media_file(
        name, frame_s=TWO_SECONDS + picture_s, wave=chirps([0.5, 1.2], 2.0, 48000), sound_from_s=sound_s
    )
    media = Media(path)
    picture_s, sound_s = picture_s - min(picture_s, sound_s), sound_s - min(picture_s, sound_s)
    shift_s = heard_at(media, sound_s + 1.2, 16000) - (sound_s + 1.2)
    # where the sound comes first, some files begin with the lead-in of its encoder
    assert -MS <= shift_s <= 22 * MS
    assert heard_at(media, sound_s + 0.5, 16000) == pytest.approx(sound_s + 0.5 + shift_s, abs=MS)
    for k in (40, 0, 13):
        assert numbers(media.frames(picture_s + shift_s + (k + np.array([0.1, 0.9])) / 25)) == [k, k]
    assert media.first_s == pytest.approx(max(picture_s, sound_s), abs=25 * MS)
    assert media.last_s == pytest.approx(min(picture_s, sound_s) + 2.0, abs=45 * MS)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_clock_does_not_depend_on_the_modalities_read(media_file, name):
    path = media_file(name, frame_s=TWO_SECONDS + 0.7, wave=chirps([0.5], 2.0, 48000))
    times = [0.8, 1.5, 2.3]
    assert numbers(Media(path, ("video",)).frames(times)) == numbers(Media(path).frames(times)) == [2, 20, 40]
    assert Media(path, ("video",)).first_s == pytest.approx(0.7, abs=MS)
    assert heard_at(Media(path, ("audio",)), 0.5, 16000) == pytest.approx(0.5, abs=MS)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_there_is_silence_before_and_after_the_sound(media_file, name):
    path = media_file(name, frame_s=np.arange(75) / 25, wave=tone(600, 1.0, 48000), sound_from_s=0.7)
    wave = Media(path).sound(0.0, 48000, 16000)
    assert wave.dtype == np.float32
    assert len(wave) == 48000
    loud = np.abs(wave).reshape(-1, 160).max(1) > 0.2  # each 10 ms
    assert not loud[:69].any()
    assert loud[71:169].all()
    assert not loud[175:].any()
    assert np.abs(wave[28000:]).max() == 0.0


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_sound_after_a_gap_keeps_its_time(media_file, name):
    wave = 0.3 * tone(400, 3.0, 48000) + chirps([0.5, 2.2], 3.0, 48000)
    media = Media(media_file(name, wave=wave, gap_s=(1.0, 1.6)), ("audio",))
    whole = media.sound(0.0, 48000, 16000)
    assert chirp_time(whole[:12000], 16000) == pytest.approx(0.5, abs=MS)
    assert 2.0 + chirp_time(whole[32000:], 16000) == pytest.approx(2.2, abs=MS)
    assert np.abs(whole[17000:24500]).max() == 0.0  # silence from 1.06 s to 1.53 s
    assert heard_at(media, 2.2, 16000) == pytest.approx(2.2, abs=MS)


def test_sound_that_ends_early_ends_the_usable_part(media_file):
    media = Media(media_file("a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 1.2, 48000)))
    assert media.last_s == pytest.approx(1.2, abs=25 * MS)


def test_a_requested_part_narrows_the_usable_part(media_file):
    path = media_file("a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000))
    media = Media(path, start_s=0.5, end_s=1.5)
    assert (media.first_s, media.last_s) == (0.5, 1.5)
    assert numbers(media.frames([0.5 + MS])) == [12]  # its clock stays the file's
    with pytest.raises(MediaError, match="do not overlap"):
        Media(path, start_s=3.0, end_s=5.0)


@pytest.mark.parametrize("seek", [False, True])
def test_without_time_stamps_sound_is_counted_from_the_beginning(media_file, seek):
    path = media_file(
        "a.avi", frame_s=TWO_SECONDS, wave=chirps([0.1, 1.3], 2.0, 48000), codecs=("mpeg4", "pcm_s16le")
    )
    media = Media(path)
    container = media.container

    def decode(stream):
        for frame in container.decode(stream):
            frame.pts = None
            yield frame

    same = {name: getattr(container, name) for name in ("seek", "close", "format")}
    media.container = SimpleNamespace(**same, decode=decode)
    time_s = 1.3 if seek else 0.1
    assert time_s - 0.1 + chirp_time(media.sound(time_s - 0.1, 8000, 16000), 16000) == pytest.approx(
        time_s, abs=MS
    )


# ----------------------------------------------------------------------------------------------------- faults


def error_of(path, modalities=("video", "audio"), then=lambda media: None):
    with pytest.raises(MediaError) as caught:
        then(Media(path, modalities))
    text = str(caught.value)
    assert text.strip()
    assert "\n" not in text
    assert str(path) not in text  # the caller names the file
    assert len(text) < 250
    return text


@pytest.mark.parametrize("modalities", [("video", "audio"), ("video",), ("audio",)])
@pytest.mark.parametrize(
    "name", ["empty.mp4", "text.mp4", "noise.mp4", "headless.mp4", "absent.mp4", "folder.mp4"]
)
def test_a_file_that_is_no_media_file_is_an_error(media_file, tmp_path, capfd, name, modalities):
    whole = media_file("whole.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000)).read_bytes()
    content = {
        "empty.mp4": b"",
        "text.mp4": b"Sorry, this video is not available.\n" * 50,
        "noise.mp4": np.random.default_rng(0).bytes(5000),
        "headless.mp4": whole[: len(whole) // 2],  # the index is at the end
    }
    if name in content:
        (tmp_path / name).write_bytes(content[name])
    elif name == "folder.mp4":
        (tmp_path / name).mkdir()
    reasons = {"absent.mp4": "No such file or directory", "folder.mp4": "Is a directory"}
    assert (
        error_of(tmp_path / name, modalities)
        == f"cannot be opened: {reasons.get(name, 'Invalid data found when processing input')}"
    )
    assert capfd.readouterr().err == ""  # the decoders print nothing themselves


def test_a_missing_modality_is_named(media_file):
    without_sound = media_file("mute.mp4", frame_s=TWO_SECONDS)
    without_picture = media_file("blind.mp4", wave=tone(600, 2.0, 48000))
    assert error_of(without_sound) == error_of(without_sound, ("audio",)) == "no sound"
    assert error_of(without_picture) == error_of(without_picture, ("video",)) == "no picture"
    assert Media(without_sound, ("video",)).last_s == pytest.approx(2.0, abs=MS)
    assert Media(without_picture, ("audio",)).last_s == pytest.approx(2.0, abs=25 * MS)


def test_picture_and_sound_that_do_not_overlap_are_an_error(media_file):
    path = media_file("a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 1.0, 48000), sound_from_s=2.5)
    assert "do not overlap" in error_of(path)


def test_a_recording_without_a_length_is_measured(media_file):
    path = media_file("live.mkv", wave=tone(600, 2.0, 48000), live="1")
    assert Media(path, ("audio",)).last_s == pytest.approx(2.0, abs=45 * MS)  # its packets were counted


def test_a_cut_off_file_is_used_up_to_the_cut(media_file, tmp_path):
    whole = media_file(
        "a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000), movflags="faststart"
    ).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    media = Media(cut)
    assert 0.5 < media.last_s < 1.5  # what is there can be used
    assert np.abs(media.sound(0.2, 4000, 16000)).max() > 0.4
    assert numbers(media.frames([0.5])) == [12]
    assert error_of(cut, ("audio",), lambda media: media.sound(1.6, 4000, 16000)) == "the file is cut off"


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_damaged_files_are_used_or_refused(media_file, tmp_path, name):
    """Cut off anywhere, or with wrong bytes anywhere: a result of the right shape, or a MediaError."""
    codecs = ("mpeg4", "pcm_s16le") if name == "a.avi" else ("libx264", "aac")
    options = {"movflags": "faststart"} if name == "a.mp4" else {}
    path = media_file(name, frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000), codecs=codecs, **options)
    whole, rng, refused, used = path.read_bytes(), np.random.default_rng(0), 0, 0
    damaged = [whole[: len(whole) * tenth // 10] for tenth in range(10)]
    for _ in range(15):
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(len(content), size=30)] = rng.integers(256, size=30)
        damaged.append(content.tobytes())
    for k, content in enumerate(damaged):
        bad = tmp_path / f"bad{k}{path.suffix}"
        bad.write_bytes(content)
        try:
            media = Media(bad)
            assert media.frames([media.first_s, 1.0, media.last_s]).shape[0] == 3
            assert media.sound(media.first_s, 8000, 16000).shape == (8000,)
            used += 1
        except MediaError as error:
            assert "\n" not in str(error)
            refused += 1
    assert used
    assert refused


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by way of /proc")
def test_files_are_closed(media_file, tmp_path):
    good = media_file("a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000))
    without_sound = media_file("mute.mp4", frame_s=TWO_SECONDS)

    def use():
        media = Media(good)
        media.frames([0.5])
        media.close()
        error_of(without_sound)

    use()
    gc.collect()  # what other tests left open
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        use()
    assert len(os.listdir("/proc/self/fd")) == before


def test_torch_works_after_avid_media_is_imported():
    """By itself, decord exposes NVIDIA's BLAS to libraries loaded later, and torch crashes with it."""
    code = "import avid.media, torch; print(avid.media.resampler(44100, 16000)(torch.ones(5760)).shape)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "2090" in done.stdout


# ------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize("name", ["flipping_a_pancake.mkv", "nasa_13013.mp4"])
def test_real_files_against_a_plain_decoding(real_media, name):
    """Frames and sound at some times equal those of PyAV, which reads the file from beginning to end."""
    path = real_media / name
    media, frames, sound = Media(path), {}, []
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.best("video")):
            frames[frame.time] = frame.to_ndarray(format="rgb24") if len(frames) % 40 == 7 else None
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")
        for frame in container.decode(stream):
            sound.append(frame.to_ndarray().mean(0))
            rate_hz = frame.sample_rate
    for time_s in [time_s for time_s, image in frames.items() if image is not None][::-1]:
        assert np.abs(media.frames([time_s + 5 * MS])[0].astype(int) - frames[time_s]).mean() < 1.0
    sound = np.concatenate(sound)
    for begin_s in (6.0, 0.5, 9.0):
        part, begin = media.sound(begin_s, rate_hz, rate_hz), round(begin_s * rate_hz)
        shift = np.correlate(sound[begin - 2000 : begin + 6000], part[:4000], "valid").argmax() - 2000
        assert abs(shift) <= 30 * MS * rate_hz  # plain decoding keeps the encoder's lead-in


def test_a_rotated_video_stands_upright(real_media):
    assert Media(real_media / "video_90.mov", ("video",)).frames([0.0]).shape == (1, 568, 320, 3)


def test_real_files_without_sound(real_media):
    assert error_of(real_media / "part_0.mp4") == error_of(real_media / "corrupted.mp4") == "no sound"


def run_python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_decords_libraries_stay_private(tmp_path):
    """Libraries loaded later find no symbols of decord, and decord loads no libraries of NVIDIA."""
    library = tmp_path / "nvidia" / "made_up" / "lib" / "libmade_up.so"
    library.parent.mkdir(parents=True)
    import _ctypes

    shutil.copy(_ctypes.__file__, library)  # any library will do
    code = """if True:
        import ctypes
        import avid.media
        visible = ctypes.CDLL(None)
        assert not hasattr(visible, "DECORDGetLastError")
        assert not hasattr(visible, "avcodec_version")
        assert "libmade_up" not in open("/proc/self/maps").read()
    """
    run_python(code, PYTHONPATH=str(tmp_path))


def test_faiss_works_after_avid_media_is_imported():
    pytest.importorskip("faiss", reason="faiss is not installed: pip install faiss-cpu")
    code = """if True:
        import avid.media, faiss
        import numpy as np
        rng = np.random.default_rng(0)
        queries, rows = (rng.normal(size=(n, 512)).astype("f4") for n in (2000, 20000))
        index = faiss.IndexFlatIP(512)
        index.add(rows)
        assert (index.search(queries, 1)[1][:, 0] == (queries @ rows.T).argmax(1)).all()
    """
    run_python(code)


@pytest.mark.parametrize("name", ["a.mp4", "a.ts"])
def test_reading_a_clip_costs_the_same_anywhere_in_a_file(media_file, monkeypatch, name):
    """In HEVC, a late clip needs no more decoded frames than an early one, and not all frames before it."""
    encoder = {"x265-params": "log-level=none:keyint=25:min-keyint=25:scenecut=0"}
    path = media_file(name, frame_s=np.arange(250) / 25, codecs=("libx265",), encoder=encoder)
    decoded, plain = [], Timed._decoded
    monkeypatch.setattr(Timed, "_decoded", lambda *a, **k: (decoded.append(1) or f for f in plain(*a, **k)))
    costs = []
    for at_s in (2.4, 9.2):
        media = Media(path, ("video",))
        decoded.clear()
        first = round(at_s * 25)
        assert numbers(media.frames(at_s + 0.02 + np.arange(4) / 25)) == list(range(first, first + 4))
        costs.append(len(decoded))
    assert max(costs) <= 60
