"""Files written by other tools: a clip's picture belongs to its sound, streamed and in memory.

A small part of tests/long/media_matrix.py, whose table is in docs/reliability.md, and real files with known
content.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "long"))
pytest.importorskip("imageio_ffmpeg", reason="no ffmpeg to write the files with: pip install imageio-ffmpeg")
import media_matrix

from avid.media import Media, MediaError, MediaInMemory
from avid.tools import prepare

CASES = [  # container, video codec, audio codec, condition, expected reader of the frames
    ("mp4", "libx264", "aac", "whole", "decord"),
    ("mp4", "libx264", "aac", "cut by copy", "PyAV"),
    ("mp4", "libx264", "aac", "open groups of 400", "PyAV"),
    ("mov", "libx265", "pcm_s16le", "late picture", "PyAV"),
    ("avi", "mpeg4", "libmp3lame", "pause of 4 s", "PyAV"),
    ("wmv", "wmv2", "wmav2", "whole", "PyAV"),
    ("mkv", "libx264", "aac", "first time stamp 100 s", "PyAV"),
    ("webm", "libvpx", "libopus", "late sound", "PyAV"),
    ("mpg", "mpeg2video", "mp2", "B frames", "PyAV"),
    ("ts", "libx264", "aac", "open groups of 30", "PyAV"),
    ("flv", "flv", "libmp3lame", "cut by copy", "PyAV"),
    ("ogv", "libtheora", "libvorbis", "variable rate", "PyAV"),
    ("", "", "", "variable rate without a table.mp3", "PyAV"),
    ("", "", "", "sound.aac", "PyAV"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the source that all files are encoded from."""
    folder = tmp_path_factory.mktemp("matrix")
    media_matrix.write_source(folder)
    return folder


@pytest.mark.parametrize("ending, codec, sound, condition, reader", CASES)
def test_pictures_belong_to_their_sound(folder, ending, codec, sound, condition, reader):
    if ending:
        file = media_matrix.make(folder, f"{condition} {codec}.{ending}", codec, sound, condition)
    else:
        file = media_matrix.make_sound(folder, condition, "whole")
    if file is None or isinstance(file, str):
        pytest.skip(f"this ffmpeg cannot make {codec} in {ending}: {file}")
    verdict = media_matrix.measure_file(file, clips=4)
    assert not verdict.reason and verdict.right and verdict.reader == reader, verdict


def test_impossible_time_stamps_are_refused_with_a_reason(folder):
    """A cut by copy writes wrong numbers into Ogg, and the picture's times are computed from them."""
    name = "cut by copy libtheora.ogv"
    file = media_matrix.make(folder, name, "libtheora", "libvorbis", "cut by copy")
    with pytest.raises(MediaError, match="time stamps are impossible"):
        Media(file.path)


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "ts"])
def test_prepared_files_that_were_cut_by_copy_keep_their_sound(folder, tmp_path, ending):
    file = media_matrix.make(folder, f"cut by copy.{ending}", "libx264", "aac", "cut by copy")
    (tmp_path / "in").mkdir()
    shutil.copy(file.path, tmp_path / "in")
    assert prepare.prepare(tmp_path / "in", tmp_path / "out", prepare.Small(), 1) == 1
    prepared = media_matrix.File(tmp_path / "out/cut by copy.mp4", file.frames)
    before, after = (media_matrix.measure_file(one, clips=6) for one in (file, prepared))
    assert before.right and not before.reason and after.right and not after.reason, (before, after)
    assert after.reader == "decord"


def test_frames_of_a_real_wmv_with_close_key_frames_are_right(real_media):
    """Its frames show their numbers; decord alone reads wrong ones for every second clip."""
    with Media(real_media / "keys_every_12.wmv", ("video",)) as media:
        for at_s in np.random.default_rng(0).uniform(0, media.last_s - 1, 8):
            times = media.reader.first_s + at_s + np.arange(4) / 8
            found = [media_matrix.number(image) for image in media.frames(times)]
            np.testing.assert_allclose(np.array(found) / 25, times - media.reader.first_s, atol=0.06)


def test_pictures_belong_to_their_sound_in_a_real_cut_by_copy(real_media):
    """Frames show their number in 16 blocks, and the sound is a sine of 500 + 400·t Hz: both tell the same
    time, also in memory.
    """
    path = real_media / "cut_by_copy.mp4"
    whole = MediaInMemory(path)
    for at_s in np.random.default_rng(0).uniform(0.1, 9.0, 12):
        times = at_s + np.arange(4) / 16
        with Media(path) as media:
            images, wave = media.frames(times), media.sound(at_s, 1200, 24000)
        np.testing.assert_array_equal(whole.frames(times), images)
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 1 << 17))
        source_s = (spectrum.argmax() * 24000 / (1 << 17) - 500) / 400 - 0.025
        numbers = np.array([media_matrix.number(image) for image in images])
        np.testing.assert_allclose(numbers / 25, source_s + np.arange(4) / 16, atol=0.06)


def test_a_real_pause_of_the_picture_does_not_shift_what_follows(real_media):
    with Media(real_media / "gap.avi") as media:
        assert media.last_s == pytest.approx(20.0, abs=0.1)
        still, moving = media.frames([6.5, 9.5]), media.frames([10.5, 12.0])
    assert (
        np.abs(still[0].astype(int) - still[1]).mean() < 2 < np.abs(moving[0].astype(int) - moving[1]).mean()
    )
