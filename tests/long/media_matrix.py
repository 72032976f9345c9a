"""Does the picture of a clip belong to its sound? Every container, with the codecs that it takes, in ten
conditions.

    python tests/long/media_matrix.py [--only TEXT …] [--clips 20] [--keep FOLDER] [--markdown FILE]

In: nothing; the files are written here by ffmpeg. Their content is known: frame k shows k as 16 black or
white blocks, and the sound is different at every moment. Out: a table of how many clips show a
frame that is more than one frame off its sound, or are more than 10 ms off the sound that ffmpeg gives for
that time, by Media and by MediaInMemory. Exit code 0 where none is.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

os.environ.setdefault("SVT_LOG", "0")  # the encoder of AV1 prints a lot

import numpy as np

from avid.media import Media, MediaError, MediaInMemory

SECONDS, FPS, SIDE, SOURCE_HZ, HZ = 24, 25, 64, 48000, 8000
CUT_S, PAUSE_S, LATE_S, FIRST_S = 8.3, (9.0, 13.0), 3.0, 100.0
CLIP_S, FRAMES = 0.5, 8
SOUND_TOLERANCE_S = 0.01
ALIKE = 0.5  # a sound is the source's if they correlate more than this: at another time it is below 0.2

# ------------------------------------------------------------------------------------------------- the source


def picture(numbers):
    """Frames T×S×S×3 uint8 that show these numbers as 4×4 blocks."""
    bits = np.asarray(numbers)[:, None] >> np.arange(16) & 1  # T×16
    blocks = (30 + 190 * bits).astype(np.uint8).reshape(-1, 4, 4)
    return blocks.repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)[..., None].repeat(3, 3)


def number(image):
    """The number that a frame H×W×3 shows, whatever its size."""
    rows, columns = ((np.arange(4) + 0.5) * size / 4 for size in image.shape[:2])
    at = [(int(row), int(column)) for row in rows for column in columns]
    blocks = [image[row - 2 : row + 3, column - 2 : column + 3].mean() for row, column in at]
    return sum(1 << bit for bit, block in enumerate(blocks) if block > 125)


@functools.cache
def melody(rate_hz):
    """A sine with a new random frequency every 50 ms and no jump in phase: float32 N."""
    hz = np.random.default_rng(0).uniform(400, 2800, SECONDS * 20)
    t = np.arange(SECONDS * rate_hz) / rate_hz
    phase = 2 * np.pi * np.cumsum(np.interp(t * 20, np.arange(len(hz)), hz)) / rate_hz
    return (0.5 * np.sin(phase)).astype(np.float32)


@functools.cache
def spectrum(size):
    return np.conj(np.fft.rfft(melody(HZ), size))


def source_time(wave):
    """The source's time at which this sound of HZ begins, s; None if it is silent, nan if it is not in the
    source.
    """
    if np.abs(wave).max(initial=0.0) < 1e-2:
        return None
    size = 1 << 18
    alike = np.fft.irfft(np.conj(np.fft.rfft(wave, size) * spectrum(size)), size)
    at = int(np.abs(alike).argmax())
    at -= size * (at >= len(melody(HZ)))
    part = melody(HZ)[max(at, 0) : at + len(wave)]
    norm = np.linalg.norm(wave) * max(np.linalg.norm(part), 1e-9)
    return at / HZ if abs(alike[at]) > ALIKE * norm else np.nan


# -------------------------------------------------------------------------------------------------- the files

SOUNDS = {  # container: codecs of sound, the first one goes with most pictures
    "mp4": ("aac", "libmp3lame"),
    "mov": ("aac", "pcm_s16le"),
    "mkv": ("aac", "libmp3lame", "flac"),
    "webm": ("libopus", "libvorbis"),
    "avi": ("libmp3lame", "pcm_s16le"),
    "mpg": ("mp2",),
    "ts": ("aac", "mp2"),
    "flv": ("aac", "libmp3lame"),
    "wmv": ("wmav2",),
    "3gp": ("aac", "libopencore_amrnb -ar 8000"),
    "ogv": ("libvorbis", "libopus"),
}
PICTURES = {
    "mp4": ("libx264", "libx265", "mpeg4", "libvpx-vp9", "libsvtav1"),
    "mov": ("libx264", "libx265", "mpeg4", "prores_ks"),
    "mkv": ("libx264", "libx265", "mpeg4", "mpeg2video", "libvpx-vp9"),
    "webm": ("libvpx", "libvpx-vp9", "libsvtav1"),
    "avi": ("mpeg4", "libx264", "mjpeg", "msmpeg4"),
    "mpg": ("mpeg2video", "mpeg1video"),
    "ts": ("libx264", "libx265", "mpeg2video"),
    "flv": ("libx264", "flv"),
    "wmv": ("wmv2", "msmpeg4"),
    "3gp": ("libx264", "mpeg4", "h263"),
    "ogv": ("libtheora",),
}
ENCODER = {  # options of each encoder, besides the distance of key frames
    "libx264": "-preset veryfast -x264-params scenecut=0",
    "libx265": "-preset ultrafast -x265-params log-level=none:pools=1:frame-threads=1:scenecut=0",
    "libvpx": "-deadline realtime -cpu-used 8 -b:v 1M",
    "libvpx-vp9": "-deadline realtime -cpu-used 8 -b:v 1M",
    "libsvtav1": "-preset 13 -svtav1-params lp=1",
    "libtheora": "-q:v 7",
    # as on DVDs: no two frames in one packet of the container
    "mpeg2video": "-b:v 1M -minrate 1M -maxrate 1M -bufsize 512k",
    "mpeg1video": "-b:v 1M -minrate 1M -maxrate 1M -bufsize 512k",
    "prores_ks": "-profile:v 0",
    "h263": "-s 176x144 -q:v 4",
    "mjpeg": "-pix_fmt yuvj420p -q:v 4",
}
PARAMETERS = {"libx264": "-x264-params", "libx265": "-x265-params"}
B_FRAMES = ("libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video")
OPEN_GROUPS = ("libx264", "libx265", "mpeg2video", "mpeg1video")
KEYS_EVERY = 100  # frames, unless the condition sets another number
CONDITIONS = (
    "whole",
    "cut by copy",
    "pause of 4 s",
    "late picture",
    "late sound",
    "variable rate",
    "B frames",
    "open groups of 30",
    "open groups of 400",
    "first time stamp 100 s",
)
KEPT = {  # which frames n, as an expression of ffmpeg; `kept_frames` is the same in Python
    "pause of 4 s": f"lt(n,{PAUSE_S[0] * FPS})+gte(n,{PAUSE_S[1] * FPS})",
    "late picture": f"gte(n,{LATE_S * FPS})",
    "variable rate": "lt(mod(n*n,11),5)",
}
SOUND_FILES = {  # files of sound alone: codec, options
    "sound.aac": ("aac", ""),
    "fixed rate.mp3": ("libmp3lame", "-b:a 128k"),
    "variable rate.mp3": ("libmp3lame", "-q:a 4"),
    "variable rate without a table.mp3": ("libmp3lame", "-q:a 4 -write_xing 0"),
    "sound.m4a": ("aac", ""),
    "sound.ogg": ("libvorbis", ""),
    "sound.opus": ("libopus", ""),
    "sound.flac": ("flac", ""),
    "sound.wav": ("pcm_s16le", ""),
    "sound.wma": ("wmav2", ""),
    "sound.ac3": ("ac3", ""),
    "sound.amr": ("libopencore_amrnb -ar 8000", ""),
}
SOUND_CONDITIONS = "whole", "cut by copy"


class File(NamedTuple):
    """A file of the matrix. frames: the numbers of its frames, ascending; empty if it has no picture."""

    path: Path
    frames: np.ndarray


def ffmpeg(*words, stdin=None):
    """Run ffmpeg; returns its standard output. Raises ValueError with its error message."""
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-y", "-threads", "1"]
    done = subprocess.run([*command, *map(str, words)], input=stdin, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[0] if lines else f"exit code {done.returncode}")
    return done.stdout


def write_source(folder):
    """Write the source of every file, uncompressed: folder/picture.raw and folder/sound.f32."""
    folder.mkdir(parents=True, exist_ok=True)
    picture(range(SECONDS * FPS)).tofile(folder / "picture.raw")
    melody(SOURCE_HZ).tofile(folder / "sound.f32")


def inputs(folder, has_picture=True):
    raw = [
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-s",
        f"{SIDE}x{SIDE}",
        "-r",
        FPS,
        "-i",
        folder / "picture.raw",
    ]
    return [
        *(raw if has_picture else ()),
        "-f",
        "f32le",
        "-ar",
        SOURCE_HZ,
        "-ac",
        1,
        "-i",
        folder / "sound.f32",
    ]


def kept_frames(condition):
    """Which of the source's frames a file has."""
    n = np.arange(SECONDS * FPS)
    kept = {
        "pause of 4 s": (n < PAUSE_S[0] * FPS) | (n >= PAUSE_S[1] * FPS),
        "late picture": n >= LATE_S * FPS,
        "variable rate": n * n % 11 < 5,
    }
    return n[kept.get(condition, slice(None))]


def make(folder, name, codec, sound, condition):
    """Write one file; returns its File, or None if codec or container cannot have the condition. Raises
    ValueError with ffmpeg's error message.
    """
    groups = {"open groups of 30": 30, "open groups of 400": 400}
    if name.endswith(".avi") and condition in ("late sound", "first time stamp 100 s"):
        return None  # AVI's sound begins with the file
    if (condition == "B frames" and codec not in B_FRAMES) or (
        condition in groups and codec not in OPEN_GROUPS
    ):
        return None
    out, frames = folder / name, kept_frames(condition)
    b_frames = 3 if condition == "B frames" or condition in groups else 0
    options = ["-c:v", codec, "-pix_fmt", "yuv420p", *ENCODER.get(codec, "").split()]
    options += ["-g", groups.get(condition, KEYS_EVERY)]
    if codec in B_FRAMES:
        options += ["-bf", min(b_frames, 2) if codec.startswith("mpeg") else b_frames]
    if codec in PARAMETERS:
        at = options.index(PARAMETERS[codec]) + 1
        options[at] += f":keyint={groups.get(condition, KEYS_EVERY)}:open-gop={int(condition in groups)}"
    elif codec in OPEN_GROUPS and condition not in groups and b_frames:
        options += ["-flags", "+cgop", "-sc_threshold", 1_000_000_000]
    if codec == "prores_ks":
        options[options.index("yuv420p")] = "yuv422p10le"
    if condition in KEPT:
        options += ["-vf", f"select='{KEPT[condition]}'", "-fps_mode", "vfr"]
    if condition == "late sound":
        options += ["-af", f"atrim=start={LATE_S}"]
    if condition == "first time stamp 100 s":
        options += ["-output_ts_offset", FIRST_S]
    container = {"mpg": ["-f", "vob"], "3gp": ["-f", "3gp"], "wmv": ["-f", "asf"]}.get(out.suffix[1:], [])
    whole = out.with_stem("uncut") if condition == "cut by copy" else out
    if out.exists():  # left by an earlier run into this folder
        return File(out, frames)
    ffmpeg(*inputs(folder), *options, "-c:a", *sound.split(), *container, whole)
    if whole != out:
        ffmpeg("-ss", CUT_S, "-i", whole, "-t", 12, "-map", 0, "-c", "copy", *container, out)
    return File(out, frames)


def make_sound(folder, name, condition):
    """Write a file of sound alone."""
    codec, options = SOUND_FILES[name]
    out = folder / name
    whole = out.with_stem("uncut") if condition == "cut by copy" else out
    ffmpeg(*inputs(folder, False), "-c:a", *codec.split(), *options.split(), whole)
    if whole != out:
        ffmpeg("-ss", CUT_S, "-i", whole, "-t", 12, "-c", "copy", *options.split()[2:], out)
    return File(out, np.array([], int))


# -------------------------------------------------------------------------------------------- the measurement


def reference(path):
    """A file's whole sound as ffmpeg decodes it, from the file's first moment on, with silence in its gaps:
    float32 at HZ.
    """
    words = [
        "-i",
        path,
        "-map",
        "0:a",
        "-ac",
        1,
        "-ar",
        HZ,
        "-af",
        "aresample=async=1:first_pts=0",
        "-f",
        "f32le",
        "-",
    ]
    clock = ["-map", "0:v?", "-c", "copy", "-f", "null", os.devnull]  # otherwise it may begin with the sound
    return np.frombuffer(ffmpeg(*words, *clock), np.float32)


class Clip(NamedTuple):
    images: np.ndarray  # T×H×W×3
    wave: np.ndarray


def clip(media, at_s, has_picture):
    times = at_s + np.arange(FRAMES) * CLIP_S / FRAMES
    return Clip(
        media.frames(times) if has_picture else np.empty((0, 1, 1, 3)),
        media.sound(at_s, round(CLIP_S * HZ), HZ),
    )


def picture_is_off(images, frames, source_s):
    """Whether an image is more than one frame off, if the first one belongs to the source's time source_s."""
    wanted = (source_s + np.arange(FRAMES) * CLIP_S / FRAMES) * FPS + 1e-3
    wanted = np.searchsorted(frames, wanted, side="right") - 1
    found = [number(image) for image in images]
    positions = np.searchsorted(frames, found).clip(0, len(frames) - 1)
    return bool((frames[positions] != found).any() or np.abs(positions - wanted.clip(0)).max() > 1)


def sound_is_off(found_s, expected_s):
    if None in (found_s, expected_s):
        return found_s is not expected_s
    return not abs(found_s - expected_s) <= SOUND_TOLERANCE_S


class Verdict(NamedTuple):
    """Shares of wrong clips in one file. reason: why the file is refused, "" if it is not."""

    reason: str = ""
    reader: str = ""  # of the frames: decord or PyAV
    picture: float = 0.0
    sound: float = 0.0
    picture_in_memory: float = 0.0
    sound_in_memory: float = 0.0
    differs: float = 0.0  # frames in memory are other bits, or its sound is elsewhere

    @property
    def right(self):
        return not any(self[2:])


def measure_file(file, clips, seed=0):
    """Read random clips of a file, opened anew for each as in training; returns its Verdict."""
    modalities = ("video", "audio") if len(file.frames) else ("audio",)
    rng, rows, has_picture = np.random.default_rng(seed), [], len(file.frames) > 0
    try:
        with Media(file.path, modalities) as media:
            first_s, last_s = media.first_s, media.last_s
            reader = "PyAV" if getattr(media, "why_not_decord", "") else "decord"
        if last_s - first_s < 8.0:
            return Verdict(f"only {last_s - first_s:.1f} s of it are usable")
        truth, kept = reference(file.path), MediaInMemory(file.path, modalities)
        for at_s in rng.uniform(first_s, last_s - CLIP_S - 0.1, clips):
            with Media(file.path, modalities) as media:
                streamed = clip(media, at_s, has_picture)
            in_memory = clip(kept, at_s, has_picture)
            expected_s = source_time(truth[round(at_s * HZ) :][: round(CLIP_S * HZ)])
            row = []
            for taken in (streamed, in_memory):
                found_s = source_time(taken.wave)
                of_picture = (
                    has_picture and found_s is not None and picture_is_off(taken.images, file.frames, found_s)
                )
                row += [of_picture, sound_is_off(found_s, expected_s)]
            row.append(
                not np.array_equal(streamed.images, in_memory.images)
                or sound_is_off(source_time(streamed.wave), source_time(in_memory.wave))
            )
            rows.append(row)
    except MediaError as error:
        return Verdict(str(error))
    return Verdict("", reader if has_picture else "PyAV", *np.mean(rows, 0).tolist())


# -------------------------------------------------------------------------------------------------- the table


def matrix(only=()):
    """(row of the table, container's ending, codec of the picture, codec of the sound) of every row."""
    for ending, pictures in PICTURES.items():
        sounds = SOUNDS[ending]
        for k, codec in enumerate(pictures):
            sound = sounds[k % len(sounds)]
            names = codec.removesuffix("_ks"), sound.split()[0]
            row = ", ".join([ending, *(name.removeprefix("lib") for name in names)])
            if not only or any(text in row for text in only):
                yield row, ending, codec, sound
    for name in SOUND_FILES:
        if not only or any(text in name for text in only):
            yield name, "", "", ""


def cell(verdict):
    """A verdict as the table has it: D or P for decord or PyAV, and percentages where they are not 0."""
    if verdict is None:
        return ""
    if isinstance(verdict, str):
        return "cannot be made"
    if verdict.reason:
        return "refused"
    if verdict.right:
        return f"0 {verdict.reader[0]}"
    names = "picture", "sound", "picture in memory", "sound in memory", "differs"
    return (
        verdict.reader[0]
        + ": "
        + ", ".join(f"{name} {100 * v:.0f}" for name, v in zip(names, verdict[2:], strict=True) if v)
    )


def markdown(table, conditions):
    lines = ["| | " + " | ".join(conditions) + " |", "|---" * (len(conditions) + 1) + "|"]
    for row, verdicts in table.items():
        lines.append(f"| {row} | " + " | ".join(cell(verdicts.get(name)) for name in conditions) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="TEXT", help="rows that hold one of these texts"
    )
    parser.add_argument("--conditions", nargs="*", default=CONDITIONS, choices=CONDITIONS, metavar="NAME")
    parser.add_argument("--clips", type=int, default=20, help="a file (default: 20)")
    parser.add_argument("--keep", type=Path, help="write the files into this folder and leave them there")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    arguments = parser.parse_args()
    pictures, sounds, begin = {}, {}, time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        write_source(folder)
        for row, ending, codec, sound in matrix(arguments.only):
            conditions = arguments.conditions if codec else SOUND_CONDITIONS
            verdicts = (pictures if codec else sounds).setdefault(row, {})
            for condition in conditions:
                try:
                    if codec:
                        name = f"{row} {condition}".replace(",", "").replace(" ", "_") + "." + ending
                        file = make(folder, name, codec, sound, condition)
                    else:
                        file = make_sound(folder, row, condition)
                    verdicts[condition] = file and measure_file(file, arguments.clips)
                    if file and not arguments.keep:
                        file.path.unlink()
                except ValueError as error:
                    verdicts[condition] = str(error)
                verdict = verdicts[condition]
                if verdict is not None:
                    reason = verdict if isinstance(verdict, str) else verdict.reason
                    print(f"{row:32} {condition:24} {cell(verdict)}{reason and ': ' + reason}", flush=True)
    tables = "\n\n".join(
        markdown(table, names)
        for table, names in ((pictures, CONDITIONS), (sounds, SOUND_CONDITIONS))
        if table
    )
    verdicts = [
        v
        for table in (pictures, sounds)
        for row in table.values()
        for v in row.values()
        if isinstance(v, Verdict)
    ]
    read = [verdict for verdict in verdicts if not verdict.reason]
    wrong = [verdict for verdict in read if not verdict.right]
    print(
        f"\n{tables}\n\n{len(verdicts)} files, {len(verdicts) - len(read)} refused, {len(wrong)} wrong, ",
        end="",
    )
    print(f"{time.perf_counter() - begin:.0f} s")
    if arguments.markdown:
        arguments.markdown.write_text(tables + "\n")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
