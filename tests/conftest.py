"""Small media files of known content: each frame shows its number, and a chirp sounds at known times."""

import contextlib
import importlib
import os
import signal
from fractions import Fraction
from pathlib import Path

import av
import forked
import numpy as np
import pytest

from avid import files

# set before torch is imported: the tests are small, and several threads would slow them down
os.environ.setdefault("OMP_NUM_THREADS", "1")

# a shell that runs the tests in the background makes them ignore Ctrl-C, and the processes that they start
# inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)

# the files that take longest, in order: they come first, so that no process waits for another's last file
LONGEST = "faults studies train packed gpu_path real_studies prepare own_videos spread_bank bad_input".split()


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def imported():
    """A process that imports everything, in the background: the tests' own are forked from it."""
    forked.serve()


SIDE = 64  # pixels: eight bars of eight, the bits of the frame's number
CHIRP_S = 0.06


def chirp(rate_hz):
    """A sweep from 500 to 3000 Hz, (n,) float32. Its start in a recording can be found to within a sample."""
    t = np.arange(round(CHIRP_S * rate_hz)) / rate_hz
    sweep = np.sin(2 * np.pi * (500 * t + 2500 / CHIRP_S * t**2 / 2)) * np.sin(np.pi * t / CHIRP_S) ** 2
    return (0.8 * sweep).astype(np.float32)


def chirps(at_s, seconds, rate_hz, channels=1):
    """Silence with a chirp at each of the times at_s: channels×n float32."""
    wave = np.zeros(round(seconds * rate_hz), np.float32)
    for time_s in at_s:
        begin = round(time_s * rate_hz)
        wave[begin : begin + round(CHIRP_S * rate_hz)] += chirp(rate_hz)[: len(wave) - begin]
    return np.tile(wave, (channels, 1))


def tone(hz, seconds, rate_hz, channels=1):
    return np.tile(
        0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate_hz)) / rate_hz), (channels, 1)
    ).astype(np.float32)


def chirp_time(wave, rate_hz):
    """When the loudest chirp of a recording begins, s."""
    return np.abs(np.correlate(wave, chirp(rate_hz))).argmax() / rate_hz


def numbered(numbers, size=SIDE):
    """Frames T×S×S×3 uint8 that show these numbers (below 256) as bars."""
    bits = np.asarray(numbers)[:, None] >> np.arange(8) & 1  # T×8
    bars = (bits * 200 + 28).astype(np.uint8).repeat(size // 8, axis=1)  # T×S
    return np.ascontiguousarray(np.broadcast_to(bars[:, None, :, None], (len(bits), size, size, 3)))


def numbers(frames):
    """The numbers that frames T×S×S×3 show."""
    frames = np.asarray(frames)
    bars = frames[..., 0].reshape(*frames.shape[:2], 8, -1).mean((1, 3))  # T×8
    return ((bars > 128) << np.arange(8)).sum(1).tolist()


def write_media(
    path,
    frame_s=(),
    wave=None,
    rate_hz=48000,
    sound_from_s=0.0,
    gap_s=(0.0, 0.0),
    codecs=("libx264", "aac"),
    encoder=None,
    size=SIDE,
    **muxer,
):
    """Write the frames 0, 1, … shown at times frame_s, and a sound, channels×n, that begins at sound_from_s.

    Frames and sound keep the times given here; the container begins with the earlier of the two. The file has
    no packets of sound between the two times gap_s. encoder: options of the video codec; muxer: options of
    the container.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=muxer) as file:
        packets = []
        if len(frame_s):
            fps = Fraction((len(frame_s) - 1) / float(frame_s[-1] - frame_s[0])).limit_denominator(1001)
            # H.264 takes any time stamps if the container does; the other codecs need a constant rate
            base = Fraction(1, 30000) if codecs[0] == "libx264" and path.suffix != ".avi" else 1 / fps
            video = file.add_stream(codecs[0], rate=fps, options={"threads": "1", **(encoder or {})})
            video.width, video.height, video.pix_fmt = size, size, "yuv420p"
            video.codec_context.gop_size, video.codec_context.time_base = 24, base
        if wave is not None:
            sound = file.add_stream(
                codecs[1], rate=rate_hz, layout={1: "mono", 2: "stereo", 6: "5.1"}[len(wave)]
            )
        if len(frame_s):
            for time_s, image in zip(frame_s, numbered(range(len(frame_s)), size), strict=True):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = round(time_s / base), base
                packets += video.encode(frame)
            packets += video.encode(None)
        if wave is not None:
            resampler = av.AudioResampler(
                sound.codec_context.format, sound.codec_context.layout, rate_hz, sound.frame_size or 1024
            )
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(wave), format="fltp", layout=sound.codec_context.layout
            )
            frame.sample_rate, frame.time_base, frame.pts = (
                rate_hz,
                Fraction(1, rate_hz),
                round(sound_from_s * rate_hz),
            )
            for part in resampler.resample(frame) + resampler.resample(None):
                packets += sound.encode(part)
            packets += sound.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            if packet.stream.type == "video" or not gap_s[0] <= packet.pts * packet.time_base < gap_s[1]:
                file.mux(packet)
    return path


@contextlib.contextmanager
def another_writes_into(folder):
    """Meanwhile another process has the folder for itself."""
    here, there = forked.context.Pipe()
    process = forked.context.Process(target=write_until_told, args=(folder, there))
    process.start()
    there.close()
    try:
        assert here.recv() == "writing"
        yield
    finally:
        here.close()
        process.join()


def write_until_told(folder, pipe):
    with files.alone(folder):
        pipe.send("writing")
        with contextlib.suppress(EOFError):
            pipe.recv()


@pytest.fixture
def media_file(tmp_path):
    """A function that takes a file name and the arguments of `write_media`. It writes the file and returns
    its path."""
    return lambda name, **content: write_media(tmp_path / name, **content)


@pytest.fixture
def real_data():
    """The folder of real files (see AVID_TEST_DATA)."""
    folder = Path(os.environ.get("AVID_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "media").is_dir():
        pytest.skip(
            f"no real videos in {folder / 'media'}: set AVID_TEST_DATA to the folder that holds media/"
        )
    return folder


@pytest.fixture
def real_media(real_data):
    """The folder of real videos."""
    return real_data / "media"


@pytest.fixture
def perform(folder, monkeypatch):
    """A function that runs a study with --quick in the module's `folder` and returns its rows. draws=False:
    without its figures."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def command(name, *more, draws=True):
        from studies import runs

        study = importlib.import_module(f"studies.{name}").STUDY
        if not draws:
            study = study._replace(figures=lambda *_: ())
        where = {"root": "data", "runs": "runs", "results": "results"}
        options = [word for option, part in where.items() for word in (f"--{option}", folder / part)]
        words = [str(word) for word in ("--quick", "--jobs", "1", *options, *more)]
        runs.main(study, runs.command_line("", words, videos="a folder"))
        return runs.read(folder / "results" / f"{name}.csv")

    yield command
    signal.signal(signal.SIGTERM, before)
