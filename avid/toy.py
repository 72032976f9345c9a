"""The embedded data set: things of ten kinds, each with a look and a sound, in four motions whose events set
off the sound.

In: the toy's settings and a seed.
Out: a folder of mp4 files (H.264, AAC) with manifest.csv, the same bits for the same seed; or one video as
arrays.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from fractions import Fraction
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from . import datasets
from .config import ConfigError
from .progress import bar as progress_bar

WORLD = 5  # counts the changes of what this file draws: each makes a new folder
TEMPO = {"slide": 0.95, "bounce": 1.35, "spin": 1.9, "pulse": 2.7}  # events a second, a factor √2 apart
TEMPO_JITTER = 0.1
PITCH_HZ = 220.0  # lowest pitch; the highest is an octave above
TONE_DB, ROOM_DB, ROOM = 14, 10, (0.1, 0.9)
AFTERIMAGE = 0.5  # opacity that a thing leaves behind
WEAR = 0.5  # share of its contrast that a texture loses over the video
WHISTLE, WHISTLE_HZ = 0.25, 6000.0  # the room's: loudness, first pitch
WHISTLE_OCTAVES = 1.5  # by which it falls over the video
LEAD_S = 1.0  # the world runs this long before the first frame, so that trails and sounds have a past
AAC_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
PART = ".part"
COLUMNS = "path label split motion tempo faulty sound pitch_hz x y radius".split()  # x, y, radius: of `place`
RADIUS = 0.34, 0.42  # of a thing of scale 1, share of the picture's side
MARGIN = 0.95  # radii that stay between the middle of a thing of scale 1 and the picture's edge


# ------------------------------------------------------------------------------------------------------ looks
# (u, v): coordinates of the thing, whose radius is 1. A shape is positive inside, near the edge a distance; a
# texture is positive in one colour and negative in the other.


def _polygon(u, v, corners):
    sector, shift = 2 * np.pi / corners, (corners + 1) % 2 * np.pi / corners
    angle = (np.arctan2(v, u) + np.pi / 2 + shift) % sector - np.pi / corners
    return 1.1 * np.cos(np.pi / corners) - np.hypot(u, v) * np.cos(angle)


def _star(u, v, points, depth):
    return 1 - depth + depth * np.cos(points * (np.arctan2(v, u) + np.pi / 2)) - np.hypot(u, v)


def _disc(u, v):
    return 1 - np.hypot(u, v)


def _ring(u, v):
    return 0.29 - np.abs(np.hypot(u, v) - 0.7)


def _bar(u, v):
    return np.minimum(0.95 - np.abs(u), 0.5 - np.abs(v))


def _cross(u, v):
    a, b = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(0.95 - a, 0.36 - b), np.minimum(0.95 - b, 0.36 - a))


def _half(u, v):
    return np.minimum(1 - np.hypot(u, v), v + 0.45)


def _stripes(u, v, along=0, across=0):
    return np.cos(np.pi * along * u) * np.cos(np.pi * across * v)


def _rings(u, v, count):
    return np.cos(np.pi * count * np.hypot(u, v))


def _sectors(u, v, count):
    return np.cos(count * np.arctan2(v, u))


def _plain(u, v):
    return np.ones_like(u)


# ----------------------------------------------------------------------------------------------------- sounds
# φ: phase of the pitch in turns, t: seconds, f: pitch in Hz, all per sample. A timbre gives the sound at
# constant loudness.


def _harmonics(amplitudes):
    """Timbre with these amplitudes of the harmonics 1, 2, …; those above the Nyquist frequency are left
    out."""

    def timbre(phase, t, pitch_hz, rate_hz, rng):
        h = np.arange(1, len(amplitudes) + 1)
        a = np.where(h * pitch_hz < 0.42 * rate_hz, amplitudes, 0.0)
        period = (
            np.sin(2 * np.pi * np.outer(np.arange(1024) / 1024, h) + rng.uniform(0, 2 * np.pi, len(h))) @ a
        )
        return period.astype(np.float32)[(phase * 1024).astype(np.int64) & 1023]

    return timbre


def _partials(ratios, amplitudes):
    def timbre(phase, t, pitch_hz, rate_hz, rng):
        wave = np.zeros_like(phase)
        for ratio, a in zip(ratios, amplitudes, strict=True):
            if ratio * pitch_hz < 0.42 * rate_hz:
                wave += a * np.sin(2 * np.pi * ((ratio * phase) % 1).astype(np.float32))
        return wave

    return timbre


def _voice(phase, t, pitch_hz, rate_hz, rng):
    f = pitch_hz * np.arange(1, 20)
    formants = sum(np.exp(-(((f - c) / w) ** 2)) for c, w in ((700, 200), (1900, 300), (3000, 300)))
    return _harmonics(formants + 0.02)(phase, t, pitch_hz, rate_hz, rng)


def _modulated(ratio, index):
    def timbre(phase, t, pitch_hz, rate_hz, rng):
        inner = index * np.sin(2 * np.pi * ((ratio * phase) % 1).astype(np.float32))
        return np.sin(2 * np.pi * (phase % 1).astype(np.float32) + inner)

    return timbre


def _hiss(width):
    """Noise in a band around three times the pitch."""

    def timbre(phase, t, pitch_hz, rate_hz, rng):
        smooth = int(rate_hz / (width * pitch_hz))
        noise = rng.standard_normal((2, len(t) + smooth), dtype=np.float32).cumsum(1)
        i, q = (noise[:, smooth:] - noise[:, :-smooth]) / np.sqrt(smooth)
        angle = 2 * np.pi * ((3 * phase) % 1).astype(np.float32)
        return i * np.cos(angle) + q * np.sin(angle)

    return timbre


def _chirps(phase, t, pitch_hz, rate_hz, rng):
    s = (t * 9 + rng.uniform()) % 1  # nine a second, each an octave up
    turns = (2 * phase) % 1 + 2 * pitch_hz / 9 * s * s / 2 * 2
    return np.sin(2 * np.pi * turns.astype(np.float32)) * np.sqrt(1 - s)


def _tremolo(timbre, per_s):
    def trembling(phase, t, pitch_hz, rate_hz, rng):
        return timbre(phase, t, pitch_hz, rate_hz, rng) * np.cos(np.pi * per_s * t) ** 2

    return trembling


class Kind(NamedTuple):
    shape: Callable  # (u, v) → positive inside
    texture: Callable  # (u, v) → sign picks one of two colours
    timbre: Callable  # (phase, t, pitch_hz, rate_hz, rng) → samples


KINDS = {
    "drum": Kind(_disc, partial(_rings, count=4), _partials([0.5, 0.8, 1.07, 1.33], [1, 0.8, 0.6, 0.5])),
    "bell": Kind(
        partial(_polygon, corners=3), partial(_stripes, across=2.2), _partials([1, 2.76, 5.4], [1, 0.7, 0.5])
    ),
    "flute": Kind(_bar, partial(_stripes, along=2.2), _harmonics([1, 0.1])),
    "clarinet": Kind(_disc, partial(_stripes, along=5), _harmonics([1, 0, 0.8, 0, 0.6, 0, 0.5, 0, 0.4])),
    "violin": Kind(
        partial(_polygon, corners=4), partial(_stripes, across=5), _harmonics(1 / np.arange(1, 16))
    ),
    "organ": Kind(
        partial(_polygon, corners=4),
        partial(_stripes, along=2.2, across=2.2),
        _harmonics([1, 1, 0, 1, 0, 0, 0, 1]),
    ),
    "voice": Kind(partial(_star, points=5, depth=0.25), partial(_sectors, count=5), _voice),
    "rattle": Kind(_cross, partial(_stripes, along=5, across=5), _hiss(2.0)),
    "bird": Kind(partial(_star, points=3, depth=0.3), _plain, _chirps),
    "horn": Kind(_ring, partial(_sectors, count=2), _modulated(1.41, 2.5)),
}


# ---------------------------------------------------------------------------------------------------- motions


class Track(NamedTuple):
    """One course of a motion: its events, and where the thing is at given times."""

    event_s: np.ndarray  # K+1 times, from before −LEAD_S to after the end
    strength: np.ndarray  # K+1 of (0, 1]
    at: Callable  # times (T,) s → x, y (shares of the free range, 0 to 1), scale, angle (T,)


def course(motion, tempo, seconds, rng):
    """A `Track` of `motion` with `tempo` events a second over −LEAD_S … `seconds`; never the same
    backwards."""
    count = int((seconds + LEAD_S) * tempo * 1.3) + 4
    height = np.resize([1.0, 0.75, 0.5], count + 1) if motion == "bounce" else np.ones(count + 1)
    height = np.roll(height, rng.integers(3))
    gap = np.sqrt(height / 0.74) / tempo if motion == "bounce" else np.full(count + 1, 1 / tempo)
    event_s = np.cumsum(gap) - gap[0] - LEAD_S - gap.max() * (1 + rng.uniform())  # gap[k] follows event k
    x0, y0, turn, tilt = rng.uniform(size=4)
    sense = rng.choice([-1, 1])
    angle0 = 0.4 * (turn - 0.5)

    def at(t):
        k = np.searchsorted(event_s, t, side="right") - 1
        s = np.clip((t - event_s[k]) / gap[k], 0, 1)  # 0 at the event, 1 at the next
        kick = 1 - (1 - s) ** 1.6  # fast after the event, slow before the next
        zero = np.zeros_like(t)
        if motion == "bounce":
            return x0 + zero, 1 - height[k] * 4 * s * (1 - s), 1 + zero, angle0 + zero
        if motion == "slide":
            along = (k % 2) + (1 - 2 * (k % 2)) * kick
            return along, y0 + (tilt - 0.5) * (along - 0.5), 1 + zero, angle0 + zero
        if motion == "spin":
            angle = sense * np.pi * (k + kick)
            x, y = 0.5 + 0.5 * np.sin(angle), 0.5 - 0.5 * np.cos(angle)
            return x, y, 1 + zero, angle0 + 0.2 * np.sin(angle)
        return x0 + zero, y0 + zero, 0.78 + 0.37 * np.exp(-3 * s), angle0 + zero  # pulse

    return Track(event_s, 0.4 + 0.6 * np.sqrt(height), at)


def _decay(track, t, tau_s):
    """strength · exp(−age / τ) of the last event."""
    k = np.searchsorted(track.event_s, t, side="right") - 1
    return track.strength[k] * np.exp(-(t - track.event_s[k]) / tau_s)


# -------------------------------------------------------------------------------------------------- rendering


def _colour(rng, light):
    """A colour (3,) of any hue with lightness `light` in 0 … 1."""
    hue, saturation = rng.uniform(), rng.uniform(0.05, 0.4)
    pure = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colour = 1 + saturation * (pure - 1)
    colour = colour * (light / (colour @ [0.3, 0.59, 0.11]))
    return np.clip(colour, 0, 1).astype(np.float32)


def _background(size, rng):
    """A still background: two near colours in a coarse pattern that says nothing of the kind."""  # S×S×3
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    a, b = rng.uniform(0, 2 * np.pi, 2)
    f, g = rng.uniform(0.5, 2.0, 2)
    first = np.sin(2 * np.pi * f * (np.cos(a) * x + np.sin(a) * y) + b)
    second = np.sin(2 * np.pi * g * (np.cos(b) * x + np.sin(b) * y) + a)
    pattern = (first * second if rng.uniform() < 0.5 else first)[..., None]
    light = rng.uniform(0.4, 0.6)
    near = light + rng.uniform(-0.05, 0.05)
    return (_colour(rng, light) * (1 + pattern) + _colour(rng, near) * (1 - pattern)) / 2


def picture(kind, track, toy, rng):
    """Frames (T, S, S, 3) uint8 of a thing of `kind` on `track`."""
    size, lead = toy.size, int(LEAD_S * toy.fps)
    t = np.arange(-lead, round(toy.seconds * toy.fps)) / toy.fps
    radius = rng.uniform(*RADIUS) * size
    background = _background(size, rng)
    lights = rng.permutation([rng.uniform(0.02, 0.2), rng.uniform(0.8, 0.98)])
    one, other = (_colour(rng, light) for light in lights)

    # the thing, drawn once on a fine grid: texture and opacity
    fine = 192
    v, u = np.mgrid[:fine, :fine] / (fine / 2.4) - 1.2
    soft = 1 / radius  # edges fade over about a pixel
    opacity = np.clip(0.5 + KINDS[kind].shape(u, v) / soft, 0, 1).astype(np.float32)
    ink = np.clip(KINDS[kind].texture(u, v) / (4 * soft), -0.5, 0.5).astype(np.float32)  # ±½: either colour
    sprite = np.stack([ink, opacity], axis=2).reshape(-1, 2)

    # every pixel of every frame in the coordinates of the thing
    x, y, scale, angle = (np.asarray(a, np.float32)[:, None, None] for a in track.at(t))
    low, high = radius * MARGIN, size - radius * MARGIN
    pixel = np.arange(size, dtype=np.float32) + 0.5
    dx, dy = pixel - (low + (high - low) * x), pixel[:, None] - (low + (high - low) * y)
    step = fine / 2.4 / (radius * scale)
    cos, sin = np.cos(angle) * step, np.sin(angle) * step
    column = np.clip(cos * dx + sin * dy + fine / 2, 0, fine - 1).astype(np.int32)  # T×S×S
    row = np.clip(cos * dy - sin * dx + fine / 2, 0, fine - 1).astype(np.int32)
    thing = sprite[row * fine + column]  # T×S×S×2
    # textures wear off: order can be told
    fresh = np.minimum(1 - WEAR * t / toy.seconds, 1).astype(np.float32)
    flash = 0.3 * _decay(track, t, 0.09).astype(np.float32)

    frames = np.empty((len(t), size, size, 3), np.uint8)
    keep = np.float32(np.exp(-1 / (toy.fps * 0.22)))
    canvas = background
    for k in range(len(t)):
        canvas = background + keep * (canvas - background)  # the afterimage fades
        ink, opacity = thing[k, ..., :1], thing[k, ..., 1:]
        colour = (one + other) / 2 + fresh[k] * ink * (one - other)
        thing_lit = opacity * (colour + flash[k] * (1 - colour) - canvas)
        frames[k] = (canvas + thing_lit) * 255 + 0.5
        canvas = canvas + AFTERIMAGE * thing_lit
    return frames[lead:]


def sound(kind, track, pitch_hz, toy, rng):
    """Samples (N,) float32 of a thing of `kind` on `track`: a sharp attack at every event, a quieter body
    between them."""
    t = np.arange(round(toy.seconds * toy.rate_hz)) / toy.rate_hz
    coarse = np.arange(0, toy.seconds + 0.01, 0.01)
    glide = np.interp(t, coarse, 2 ** (0.3 * _decay(track, coarse, 0.12)))  # pitch falls after each event
    phase = np.cumsum(pitch_hz * glide) / toy.rate_hz
    wave = KINDS[kind].timbre(phase, t, pitch_hz, toy.rate_hz, rng).astype(np.float32)
    x, y, scale, _ = track.at(coarse)
    speed = np.hypot(np.gradient(x), np.gradient(y)) + np.abs(np.gradient(scale))
    body = np.interp(t, coarse, 0.12 + 0.13 * speed / speed.max())
    wave *= (_decay(track, t, 0.16) + body).astype(np.float32)
    return _record(wave, rng, toy)


def _record(wave, rng, toy):
    """Loudness, tone of the microphone, noise and a falling whistle of the room: nothing of the kind."""
    spectrum = np.fft.rfft(wave / np.sqrt(np.mean(wave**2) + 1e-12))
    hiss = np.fft.rfft(rng.standard_normal(len(wave), dtype=np.float32))
    octave = np.log2(np.maximum(np.fft.rfftfreq(len(wave), 1 / toy.rate_hz), 1))
    knots = np.arange(6.5, 14)  # 90 Hz, 180 Hz, …
    curves = (np.interp(octave, knots, rng.uniform(-db, db, len(knots))) for db in (TONE_DB, ROOM_DB))
    tone, room = (10 ** (curve / 20) for curve in curves)
    spectrum = spectrum * tone + rng.uniform(*ROOM) * hiss * room
    whistle = np.sin(2 * np.pi * np.cumsum(_whistle_hz(len(wave), toy)) / toy.rate_hz)
    wave = np.fft.irfft(spectrum, len(wave)) + WHISTLE * whistle
    return (wave / np.abs(wave).max() * rng.uniform(0.3, 0.95)).astype(np.float32)


def _whistle_hz(samples, toy):
    """The whistle's pitch, the same in every video: order can be told by ear."""
    return min(WHISTLE_HZ, 0.4 * toy.rate_hz) * 2 ** (-WHISTLE_OCTAVES * np.arange(samples) / samples)


def music(toy, rng):
    """Samples (N,) float32: a sequence of chords."""
    t = np.arange(round(toy.seconds * toy.rate_hz)) / toy.rate_hz
    beat = rng.uniform(0.35, 0.7)
    k, age = np.divmod(t, beat)
    root = PITCH_HZ * 2 ** (rng.choice([0, 2, 4, 5, 7, 9], int(k[-1]) + 1) / 12)[k.astype(int)]
    phase = np.cumsum(root) / toy.rate_hz
    chord = sum(np.sin(2 * np.pi * ((r * phase) % 1).astype(np.float32)) for r in (1, 1.25, 1.5, 2))
    return _record((chord * np.exp(-2 * age)).astype(np.float32), rng, toy)


def noise(toy, rng):
    """Samples (N,) float32: a rumble that swells and ebbs."""
    count = round(toy.seconds * toy.rate_hz)
    spectrum = np.fft.rfft(rng.standard_normal(count, dtype=np.float32))
    hz = np.fft.rfftfreq(count, 1 / toy.rate_hz)
    wave = np.fft.irfft(spectrum / (1 + hz / rng.uniform(50, 200)), count)
    turns = rng.uniform(0.1, 0.6) * np.arange(count) / toy.rate_hz + rng.uniform()
    swell = 1 + 0.8 * np.sin(2 * np.pi * turns)
    return _record((wave * swell).astype(np.float32), rng, toy)


# --------------------------------------------------------------------------------------------------- data set


def table(toy, seed):
    """The rows of manifest.csv, dicts of COLUMNS: kinds × motions equally often, `toy.faulty` of the training
    videos wrong."""
    rows = []
    for split_id, (split, count) in enumerate((("train", toy.train), ("test", toy.test))):
        for i in range(count):
            rng = np.random.default_rng([seed, split_id, i])
            kind, motion = list(KINDS)[i % len(KINDS)], list(TEMPO)[i // len(KINDS) % len(TEMPO)]
            tempo = TEMPO[motion] * (1 + TEMPO_JITTER * rng.uniform(-1, 1))
            values = f"{split}/{i:05d}.mp4", kind, split, motion, round(tempo, 4), 0, kind
            values += (round(PITCH_HZ * 2 ** rng.uniform(), 2), "", "", "")
            row = dict(zip(COLUMNS, values, strict=True))
            rows.append(row | place(toy, seed, row))
    rng = np.random.default_rng([seed, 2])
    wrong = rng.permutation(toy.train)[: round(toy.faulty * toy.train)]
    for n, i in enumerate(wrong):
        others = [kind for kind in KINDS if kind != rows[i]["label"]]
        rows[i].update(faulty=1, sound=(rng.choice(others), "music", rng.choice(others), "noise")[n % 4])
    return rows


def place(toy, seed, row):
    """Where the thing of a row of `table` is in the middle of its video: {"x", "y": its centre, from the
    upper left corner; "radius"}, shares of the picture's side."""
    seen, _ = _draws(seed, row)
    track = course(row["motion"], row["tempo"], toy.seconds, seen)
    radius = seen.uniform(*RADIUS)  # as `picture` draws it
    x, y, scale, _ = (float(a[0]) for a in track.at(np.array([toy.seconds / 2])))
    low, high = radius * MARGIN, 1 - radius * MARGIN
    values = low + (high - low) * x, low + (high - low) * y, radius * scale
    return {name: round(value, 4) for name, value in zip(("x", "y", "radius"), values, strict=True)}


def _draws(seed, row):
    """The generators of what is seen and of what is heard in a row's video."""
    split_id, i = ("train", "test").index(row["split"]), int(Path(row["path"]).stem)
    return np.random.default_rng([seed, split_id, i]).spawn(2)


def render(toy, seed, row):
    """Frames (T, S, S, 3) uint8 and samples (N,) float32 in −1 … 1 of one row of `table`."""
    seen, heard = _draws(seed, row)
    track = course(row["motion"], row["tempo"], toy.seconds, seen)
    frames = picture(row["label"], track, toy, seen)
    if row["sound"] == "music":
        return frames, music(toy, heard)
    if row["sound"] == "noise":
        return frames, noise(toy, heard)
    if row["faulty"]:  # the events of some other thing
        motion = heard.choice(list(TEMPO))
        track = course(motion, TEMPO[motion], toy.seconds, heard)
    return frames, sound(row["sound"], track, row["pitch_hz"], toy, heard)


def encode(path, frames, wave, toy):
    """Write frames (T, S, S, 3) uint8 and samples (N,) float32 as an mp4 of the same bits every time."""
    with av.open(str(path), "w", format="mp4", options={"fflags": "+bitexact"}) as file:
        options = {"preset": "veryfast", "crf": "20", "threads": "1"}
        if toy.size % 64:  # x264's mbtree would read what lies beyond the picture: other bits now and then
            options["x264-params"] = "mbtree=0"
        video = file.add_stream("libx264", rate=toy.fps, options=options)
        video.width, video.height, video.pix_fmt = toy.size, toy.size, "yuv420p"
        video.codec_context.gop_size, video.codec_context.max_b_frames = max(toy.fps // 2, 1), 0
        audio = file.add_stream("aac", rate=toy.rate_hz, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 64000
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, toy.fps)
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for start in range(0, len(wave), 1024):
            frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = toy.rate_hz, start, Fraction(1, toy.rate_hz)
            file.mux(audio.encode(frame))
        file.mux(audio.encode(None))


def _write_one(folder, toy, seed, row):
    path = folder / row["path"]
    if not path.exists():
        with _whole(path) as part:
            encode(part, *render(toy, seed, row), toy)


@contextlib.contextmanager
def _whole(path):
    """A name to write to, which becomes `path` once all is written.

    Several processes may write the same at once.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        yield part
        os.replace(part, path)
    except FileNotFoundError:
        if not path.exists():  # else another run has finished this world and cleaned up
            raise
    finally:
        part.unlink(missing_ok=True)


def write(root, toy, seed, workers, progress=True):
    """Write the toy world below `root` unless it is there; returns its folder, which holds manifest.csv.

    The folder's name holds a hash of everything that decides its content. An interrupted writing goes on
    where it stopped. `workers`: processes; 0 or 1: this one alone. Raises ConfigError for settings that the
    files cannot hold.
    """
    if toy.size % 2:
        raise ConfigError(f"toy.size is {toy.size}, but H.264 needs an even number: use {toy.size + 1}")
    if toy.rate_hz not in AAC_RATES_HZ:
        raise ConfigError(
            f"toy.rate_hz is {toy.rate_hz}, but AAC needs one of {', '.join(map(str, AAC_RATES_HZ))}"
        )
    content = json.dumps([WORLD, seed, dataclasses.asdict(toy)], sort_keys=True)
    name = f"toy-{toy.train}+{toy.test}-{toy.seconds:g}s-{toy.size}px-faulty{toy.faulty:g}-seed{seed}"
    folder = Path(root) / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    if not (folder / "manifest.csv").exists():
        _refuse_a_collection(Path(root))
        _write_all(folder, toy, seed, workers, progress)
    for part in folder.rglob(f"*{PART}"):  # of writers that were killed: the world is complete without
        part.unlink(missing_ok=True)
    return folder


def source(cfg, workers=None):
    """cfg.data as datasets.load takes it; the toy is written first where it is not there, and its folder
    named."""
    if not datasets.DATA[cfg.data.name].written:
        return cfg.data
    root = write(cfg.data.root, cfg.toy, cfg.seed, workers or os.cpu_count())
    return dataclasses.replace(cfg.data, root=str(root))


def _refuse_a_collection(root):
    """Raise ConfigError where `root` is a folder of videos, flat or by class: data.name was forgotten.

    Other data sets may be in folders below it, as data/kinetics400 beside the toy in data/.
    """

    def below(folder):
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "toy-")))

    classes = below(root) if root.is_dir() else []
    parts = [folder for folder in classes if datasets.part_of(folder.name)]
    for folder in [*[root] * root.is_dir(), *classes, *(inner for part in parts for inner in below(part))]:
        files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in datasets.ENDINGS)
        if found := next(files, None):
            raise ConfigError(
                f"data.root={root} holds videos or sounds of yours, such as {found.relative_to(root)}, and "
                "the toy would be written there; to train on them say data.name=folder, else choose another "
                "data.root"
            )


def _end_with_parent():
    """How a worker begins: it leaves Ctrl-C to its parent, and ends with it, even where that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


def _write_all(folder, toy, seed, workers, progress):
    rows = table(toy, seed)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    todo = [row for row in rows if not (folder / row["path"]).exists()]
    there = len(rows) - len(todo)
    bar = progress_bar(None, f"writing {folder}", len(rows), there, unit="video", disable=not progress)
    with bar:
        if workers <= 1:
            for row in todo:
                _write_one(folder, toy, seed, row)
                bar.update()
        elif todo:
            # the platform's own way, as DataLoader's workers: to spawn would import the calling script's
            # torch in every process
            pool = ProcessPoolExecutor(
                min(workers, len(todo)), multiprocessing.get_context(), initializer=_end_with_parent
            )
            try:
                for future in as_completed([pool.submit(_write_one, folder, toy, seed, row) for row in todo]):
                    future.result()
                    bar.update()
            finally:
                pool.shutdown(cancel_futures=True)
    with _whole(folder / "manifest.csv") as part, open(part, "w", newline="", encoding="utf-8") as file:
        lines = csv.DictWriter(file, COLUMNS)
        lines.writeheader()
        lines.writerows(rows)
