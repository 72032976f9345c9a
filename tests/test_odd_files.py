"""Odd files, encoded by ffmpeg: picture and sound are those of the requested times, and clips can be made."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import chirp_time, chirps, numbered, numbers, tone, write_media

sys.path.insert(0, str(Path(__file__).parent / "long"))
import files

from avid import data
from avid.data import Clips
from avid.media import Media, MediaError


@pytest.fixture
def encoded(tmp_path):
    """A function that encodes a file: (name, options of ffmpeg, number of frames, options of its input,
    sound).
    """
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")

    def write(name, options, frames=50, before="", wave=None, rate_hz=48000):
        raw, sound, out = tmp_path / "raw", tmp_path / "sound.wav", tmp_path / name
        raw.write_bytes(numbered(range(frames)).tobytes())
        write_media(
            sound,
            wave=chirps([0.5, 1.2], 2.0, rate_hz) if wave is None else wave,
            rate_hz=rate_hz,
            codecs=("", "pcm_s16le"),
        )
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *before.split()]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-r", "25", "-i", raw, "-i", sound]
        done = subprocess.run(
            [*command, *options.split(), "-threads", "1", out], capture_output=True, text=True
        )
        if "Unknown encoder" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        return out

    return write


def assert_usable(path, modalities=data.MODALITIES):
    table = files.table_of(path.parent, [path.name])
    for training in (True, False):
        batch = data.collate(
            [Clips(table, files.CONFIG, training, modalities)[(0, (3, 0, 0)) if training else 0]]
        )
        assert batch["failures"] == []
        assert files.complaint(batch, modalities, 1 if training else 3) == ""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("interlaced.mpg", "-c:v mpeg2video -flags +ilme+ildct -b:v 4M -c:a mp2"),
        ("interlaced.mp4", "-c:v libx264 -x264-params tff=1 -pix_fmt yuv420p"),
        ("ten_bits.mp4", "-c:v libx264 -pix_fmt yuv420p10le"),
        ("ten_bits.mkv", "-c:v libx265 -x265-params log-level=none -pix_fmt yuv420p10le"),
        ("ten_bits.webm", "-c:v libvpx-vp9 -cpu-used 8 -pix_fmt yuv420p10le -c:a libopus"),
        ("hevc.mkv", "-c:v libx265 -x265-params log-level=none"),
        ("vp9.webm", "-c:v libvpx-vp9 -cpu-used 8 -c:a libopus"),
        ("vp9.mp4", "-c:v libvpx-vp9 -cpu-used 8"),
        ("av1.mp4", "-c:v libsvtav1 -preset 12 -svtav1-params lp=1"),
        ("av1.webm", "-c:v libsvtav1 -preset 12 -svtav1-params lp=1 -c:a libopus"),
        ("full_colour.mp4", "-c:v libx264 -pix_fmt yuv444p"),
        ("grey.mp4", "-c:v libx264 -pix_fmt gray"),
        ("whole_frames.mov", "-c:v prores_ks -c:a pcm_s24le"),
        ("whole_frames.avi", "-c:v mjpeg -pix_fmt yuvj420p -c:a pcm_u8"),
        ("fragments.mp4", "-c:v libx264 -movflags frag_keyframe+empty_moov"),
        ("one_second_in.mkv", "-c:v libx264 -output_ts_offset 1"),
        ("b_frames.wmv", "-c:v libx264 -c:a libmp3lame"),
        ("no_b_frames.wmv", "-c:v libx264 -bf 0 -c:a libmp3lame"),
        ("b_frames.asf", "-c:v mpeg2video -bf 2 -b:v 4M -c:a libmp3lame"),
    ],
)
def test_picture_and_sound_of_every_format_are_those_of_the_requested_times(encoded, name, options):
    path = encoded(name, options)
    media = Media(path)
    order = np.random.default_rng(0).permutation(48)[:12]
    offset_s = media.reader.first_s
    assert numbers(media.frames(offset_s + (order + 0.5) / 25)) == order.tolist()
    heard_s = 0.97 + chirp_time(media.sound(0.97, 8000, 16000), 16000)
    assert heard_s == pytest.approx(1.2 + offset_s, abs=0.04)  # some encoders add a delay
    assert_usable(path)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotated_videos_are_read_as_players_show_them(encoded, tmp_path, degrees):
    import imageio_ffmpeg

    flat = encoded("flat.mp4", "-c:v libx264 -vf scale=96:64,pad=96:64")
    path = tmp_path / "turned.mp4"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    subprocess.run([*ffmpeg, "-display_rotation", str(degrees), "-i", flat, "-c", "copy", path], check=True)
    shown = subprocess.run(
        [*ffmpeg, "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True
    ).stdout
    frames = Media(path, ("video",)).frames([0.5, 1.5])
    assert frames.shape == (2, 96, 64, 3) if degrees != 180 else (2, 64, 96, 3)
    expected = np.frombuffer(shown, np.uint8).reshape(-1, *frames.shape[1:])[[12, 37]]
    assert np.abs(frames.astype(int) - expected).mean() < 3
    assert_usable(path)


@pytest.mark.parametrize("how", ["-display_hflip", "-display_vflip", "-display_rotation 90 -display_hflip"])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_mirrored_videos_are_read_as_players_show_them(encoded, tmp_path, how, container):
    import imageio_ffmpeg

    flat = encoded("flat.mp4", "-c:v libx264 -vf scale=96:48,pad=96:64:0:0:white")
    path = tmp_path / f"over.{container}"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    subprocess.run([*ffmpeg, *how.split(), "-i", flat, "-c", "copy", path], check=True)
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    shown = subprocess.run([*ffmpeg, "-i", path, *raw], check=True, capture_output=True).stdout
    frames = Media(path, ("video",)).frames([0.5, 1.5])
    expected = np.frombuffer(shown, np.uint8).reshape(-1, *frames.shape[1:])[[12, 37]]
    assert np.abs(frames.astype(int) - expected).mean() < 3
    assert np.abs(frames[:, ::-1].astype(int) - expected).mean() > 10  # the other way up is another picture


@pytest.mark.parametrize("codec", ["libvorbis", "libopus", "flac"])
def test_many_short_sounds_of_ogg_lie_where_they_lie_in_the_whole(encoded, codec):
    rng = np.random.default_rng(0)
    wave = 0.2 * rng.standard_normal((1, 12 * 48000)).astype(np.float32).clip(-2, 2)
    path = encoded("a.ogg", f"-map 1:a -c:a {codec}", wave=wave)
    whole, media = Media(path, ("audio",)).sound(0.0, 12 * 16000, 16000), Media(path, ("audio",))
    for start in np.concatenate([rng.permutation(185000)[:20], np.linspace(0, 187000, 20).astype(int)]):
        part = media.sound(start / 16000, 4000, 16000)
        around = whole[max(start - 4000, 0) : start + 8000]
        found = np.correlate(around, part).argmax() + max(start - 4000, 0)
        assert found == pytest.approx(start, abs=0.012 * 16000)


def test_mp3_at_a_low_rate_is_right_from_the_first_sample_on(encoded):
    """Its frames are of 24 bytes, and may need the 511 bytes before them."""
    wave = tone(440, 12.0, 16000) * (1 + np.sin(np.arange(12 * 16000) / 3000)).astype(np.float32) / 2
    path = encoded("low.mp3", "-map 1:a -c:a libmp3lame -b:a 8k -ac 1", wave=wave, rate_hz=16000)
    media = Media(path, ("audio",))
    whole = media.sound(0.0, 12 * 16000, 16000)
    for start in range(16000, 11 * 16000, 7001):
        part = media.sound(start / 16000, 4000, 16000)
        np.testing.assert_allclose(part, whole[start : start + 4000], atol=0.02)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_a_file_of_one_frame_is_usable(encoded, name):
    path = encoded(name, "-c:v mpeg4" if name.endswith("avi") else "-c:v libx264", frames=1)
    assert numbers(Media(path).frames([0.0, 0.7])) == [0, 0]
    assert_usable(path)


def test_an_avi_that_lacks_a_part_is_refused(encoded):
    """Its packets are counted: after the part that is lost pictures would be too early."""
    path = encoded("a.avi", "-c:v mpeg4 -g 10 -c:a mp2")
    whole = path.read_bytes()
    at, size = len(whole) * 4 // 10, len(whole) // 5
    path.write_bytes(whole[:at] + bytes(size) + whole[at + size :])
    with pytest.raises(MediaError, match="a part of it is lost"):
        Media(path)


@pytest.mark.parametrize("seconds", [0.3, 5.0])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_sound_may_be_shorter_or_longer_than_the_picture(encoded, name, seconds):
    path = encoded(name, "-c:v libx264", wave=tone(500, seconds, 48000))
    media = Media(path)
    assert media.last_s <= 2.1
    if name != "a.mkv":  # Matroska does not store when its sound ends
        assert media.last_s == pytest.approx(min(seconds, 2.0), abs=0.1)
    assert_usable(path)


@pytest.mark.parametrize("default", [0, 1])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_of_several_streams_the_default_ones_are_read(encoded, name, default):
    """One stream is small, black and soft, the other large, numbered and loud; decord and PyAV choose the
    same one.
    """
    path = encoded(
        name,
        "-filter_complex [0:v]scale=32:32,lutrgb=r=0:g=0:b=0[small];[1:a]volume=0.01[soft] "
        "-map [small] -map 0:v -map [soft] "
        f"-map 1:a -c:v libx264 -c:a aac -disposition:v:{default} default -disposition:v:{1 - default} 0 "
        f"-disposition:a:{default} default -disposition:a:{1 - default} 0",
    )
    media = Media(path)
    frames = media.frames((np.array([3, 40]) + 0.5) / 25)
    assert frames.shape == ((2, 64, 64, 3) if default else (2, 32, 32, 3))
    assert numbers(frames) == ([3, 40] if default else [0, 0])
    assert (np.abs(media.sound(1.0, 8000, 16000)).max() > 0.1) == default
    assert_usable(path)


def test_a_cover_image_is_not_a_video(encoded, tmp_path):
    import imageio_ffmpeg

    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y"]
    cover = tmp_path / "cover.png"
    subprocess.run([*ffmpeg, "-f", "lavfi", "-i", "testsrc=s=96x96", "-frames:v", "1", cover], check=True)
    for path in (encoded("a.m4a", "-map 1:a -c:a aac"), encoded("a.mp4", "-c:v libx264")):
        covered, has_video = path.with_stem("covered"), path.suffix == ".mp4"
        inputs = ["-i", path, "-i", cover, "-map", "0", "-map", "1", "-c", "copy"]
        subprocess.run(
            [*ffmpeg, *inputs, f"-disposition:v:{int(has_video)}", "attached_pic", covered], check=True
        )
        assert_usable(covered, data.MODALITIES if has_video else ("audio",))
        if has_video:
            assert numbers(Media(covered).frames([0.5])) == [12]
        else:
            with pytest.raises(MediaError, match="no picture"):
                Media(covered)


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22255, 44101, 48000, 96000])
def test_sounds_of_every_sample_rate_are_read(tmp_path, rate_hz):
    """The resampling filter of an odd rate does not fill the memory."""
    path = write_media(
        tmp_path / "a.wav", wave=chirps([0.5, 1.2], 2.0, rate_hz), rate_hz=rate_hz, codecs=("", "pcm_s16le")
    )
    media = Media(path, ("audio",))
    for to_hz in (16000, 24000):
        wave = media.sound(0.9, to_hz // 2, to_hz)
        assert len(wave) == to_hz // 2
        assert 0.9 + chirp_time(wave, to_hz) == pytest.approx(1.2, abs=1e-3)
    assert_usable(path, ("audio",))


@pytest.mark.parametrize("ending", ["aac", "ts"])
def test_sound_whose_rate_changes_is_refused_from_there_on(encoded, ending):
    """Its time stamps go on as if the rate were the first one's."""
    before = encoded(f"a.{ending}", "-map 1:a -c:a aac").read_bytes()
    after = encoded(f"b.{ending}", "-map 1:a -c:a aac -ar 44100 -output_ts_offset 2").read_bytes()
    path = encoded(f"c.{ending}", "-map 1:a -c:a aac")
    path.write_bytes(before + after)
    media = Media(path, ("audio",))
    assert 0.97 + chirp_time(media.sound(0.97, 8000, 16000), 16000) == pytest.approx(1.2, abs=0.06)
    with pytest.raises(MediaError, match="changes from 48000 to 44100 Hz"):
        media.sound(2.97, 8000, 16000)


@pytest.mark.parametrize("rate_hz", [1, 999, 768001, 2**31 - 1])
def test_an_impossible_sample_rate_is_refused(tmp_path, rate_hz):
    path = write_media(
        tmp_path / "a.wav", wave=tone(500, 1.0, 16000), rate_hz=16000, codecs=("", "pcm_s16le")
    )
    content = bytearray(path.read_bytes())
    at = content.index(b"fmt ") + 12
    assert int.from_bytes(content[at : at + 4], "little") == 16000
    content[at : at + 4] = rate_hz.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(MediaError, match=f"impossible rate of {rate_hz} Hz"):
        Media(path, ("audio",))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("name", ["a.mp4", "a.flac", "a.wav"])
def test_sounds_of_one_to_eight_channels_are_read(encoded, name, channels):
    path = encoded(name, f"-map 1:a -ac {channels}", wave=tone(440, 2.0, 48000))
    media = Media(path, ("audio",))
    assert media.stream.channels == channels
    loudest = np.abs(media.sound(0.5, 8000, 16000)).max()
    assert 0.5 / channels - 0.02 < loudest < 0.55  # ffmpeg puts a mono sound into some of them
    assert_usable(path, ("audio",))
