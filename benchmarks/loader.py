"""What a training sample costs: bare decoding of its frames and its sound, the loader, and plain ways of
doing the same.

    python benchmarks/loader.py [--settings A B toy] [--samples 200] [--source VIDEO] [--folder DIR]
                                [--json FILE] [key=value …]
    python benchmarks/loader.py --flat 5000 [--workers 2] [--folder DIR] [--json FILE] [key=value …]
    python benchmarks/loader.py --places [--folder DIR] [--json FILE]

Settings: A, files of 10 s as `python -m avid.data prepare` writes them (short side 128, a key frame every
32), 8 frames at 112²; B, the files that those were prepared from (340×256, key frames 250 apart, B frames,
stereo), 8 frames at 224²; both with 2 s of sound, multi-scale crop, jitter and spectrogram; toy, the toy
world as configs/toy.yaml takes it. The files of A and B are synthetic, or made of --source.

    bare         decord opens the file and reads the sample's frames, PyAV opens it and decodes its sound
    loader       the same files, frames and stretches of sound through data.Clips: decode, crop, resize,
                 resample, spectrogram, draws
    whole sound  the loader, but all of a file's sound is decoded and the stretch cut out, as plain loaders do
    in memory    the loader with data.in_memory, after the first time
    collate      into a batch
    jitter       to_device: flip, colour jitter, normalisation, batched, here on the CPU

Milliseconds a sample, medians, one process with one thread (decord adds one of its own). All ways take the
same samples, in turns. The time is the processor's, which a busy machine changes less; in brackets, by the
clock on the wall. kB: what the loader reads of a file, twice where both decoders do.

--flat: the decoding processes over so many samples of small files: when they start, open files and memory,
from first to last.

--places: a clip (8 frames, 0.5 s with its sound) at 10.5 s and at 280.5 s of five minutes of HEVC, 1920×1080,
as phones write them, key frames a second apart; what is learned of a file once is learned anew each time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli, config

SETTINGS = {  # name: (configuration, changes, files)
    "A": ("xid", ["video.size=112"], "prepared"),
    "B": ("xid", ["video.size=224"], "original"),
    "toy": ("toy", [], "toy"),
}


def command_line():
    parser = cli.parser(__doc__)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*SETTINGS], help="default: all")
    parser.add_argument("--samples", type=int, default=200, help="a setting (default: 200)")
    parser.add_argument("--files", type=int, default=4, help="of 10 s that are written (default: 4)")
    parser.add_argument("--source", metavar="VIDEO", help="made into the files, instead of a synthetic one")
    parser.add_argument(
        "--folder", metavar="DIR", help="where the files are, or will be (default: for the time being)"
    )
    parser.add_argument("--flat", type=int, metavar="N", help="N samples through decoding processes instead")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of --flat (default: 2)")
    parser.add_argument("--places", action="store_true", help="a clip early and late in a long HEVC file")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import dataclasses
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager
from unittest import mock

import numpy as np
import report
import torch

from avid import data, datasets, media, temporal_tasks, toy
from avid.media import Media, av, decord, paste, shown
from avid.tools import prepare

SECONDS, WARM_UP, BATCH = 10, 8, 16


# ------------------------------------------------------------------------------------------------------ files


def write(folder, count, source=None):
    """Below folder: original/, `count` files as large collections have them, and prepared/, small copies. →
    {folder: table}
    """
    original = folder / "original"
    original.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        if not (path := original / f"{k}.mp4").exists():
            part = path.with_suffix(".part")
            subprocess.run(
                [ffmpeg(), "-v", "error", "-y", *content(k, source), *ORIGINAL, str(part)], check=True
            )
            os.replace(part, path)
    prepare.prepare(original, folder / "prepared", prepare.Small(), workers=1)
    return {name: table(folder / name) for name in ("original", "prepared")}


def small(folder, count=16):
    """Videos of the toy. → {"toy": table}"""
    world = toy.write(folder / "toy", config.Toy(train=count, test=1), seed=0, workers=1, progress=False)
    return {"toy": table(world / "train")}


ORIGINAL = f"-t {SECONDS} -r 25 -s 340x256 -c:v libx264 -preset fast -threads 1 -g 250".split()
ORIGINAL += "-keyint_min 250 -sc_threshold 0".split()
ORIGINAL += "-crf 24 -pix_fmt yuv420p -c:a aac -ac 2 -ar 44100 -b:a 128k -f mp4 -movflags +faststart".split()


def content(k, source):
    """ffmpeg's input for the k-th file: another part of the source, or a zoom with grain and pink noise."""
    if source:
        return ["-stream_loop", "-1", "-ss", str(3 * k), "-i", source]
    picture = (
        f"mandelbrot=size=340x256:rate=25:maxiter=60:start_scale={3 - 0.2 * k:.1f}:end_scale=0.05:end_pts=400"
    )
    inputs = (f"{picture},noise=alls=2:allf=t:all_seed={k}", f"anoisesrc=color=pink:seed={k}")
    return [word for lavfi in inputs for word in ("-f", "lavfi", "-i", lavfi)]


def ffmpeg():
    if path := shutil.which("ffmpeg"):
        return path
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def table(folder):
    return datasets.load(config.Data(name="folder", root=str(folder)), "train")


# ------------------------------------------------------------------------------------------------------- ways


def bare(path, frames, start_s, seconds):
    """Decode frames (their numbers) and the sound of an interval, and do nothing with them."""
    decord.VideoReader(path, num_threads=1).get_batch(frames).asnumpy()
    with av.open(path) as file:
        stream = file.streams.audio[0]
        file.seek(int(max(start_s, 0) / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            frame.to_ndarray()
            if frame.time > start_s + seconds:
                break


class WholeSound(Media):
    def _decode(self, start_s, seconds):
        whole, placed = (
            super()._decode(0.0, self.promised_s),
            np.zeros(round(seconds * self.source_hz), np.float32),
        )
        paste(whole, placed, -round(start_s * self.source_hz))
        return placed


def costs(cfg, files, samples):
    """Of each way the cost of a sample: {way: 3×samples}, see `timed`."""
    in_memory = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, in_memory=True))
    clips, kept = (data.Clips(files, settings, training=True) for settings in (cfg, in_memory))
    for index in range(len(files)):
        kept[index, (0,)]  # decoded now
    spent = {name: [] for name in ("bare", "loader", "whole sound", "in memory", "collate", "jitter")}
    items = []
    for sample in range(samples + WARM_UP):
        index, draw = sample % len(files), (3, 0, sample)
        path = str(files.root / files.paths[index])
        with Media(path) as file:  # what the loader will draw
            rng = np.random.default_rng((cfg.seed, *draw))
            (clip, *_), _ = temporal_tasks.plan(*clips.usable(file), clips.length_s, cfg.temporal, rng)
            start_s = clips.start_of(clip, cfg.video.frames / cfg.video.fps)
            times = start_s + (np.arange(cfg.video.frames) + 0.5) * clip.speed / cfg.video.fps
            frames = shown(file.reader.starts_s, times).tolist()
        sound = (clips.start_of(clip, cfg.audio.seconds), cfg.audio.seconds * clip.speed)
        ways = {
            "bare": lambda a=(path, frames, *sound): bare(*a),
            "loader": lambda i=index, d=draw: items.append(clips[i, d]),
            "whole sound": lambda i=index, d=draw: plainly(clips, i, d),
            "in memory": lambda i=index, d=draw: kept[i, d],
        }
        for name in list(ways)[sample % 4 :] + list(ways)[: sample % 4]:
            with timed(spent[name]):
                ways[name]()
        if len(items) == BATCH:
            with timed(spent["collate"], BATCH):
                batch = data.collate(items)
            with timed(spent["jitter"], BATCH):
                data.to_device(batch, torch.device("cpu"), cfg.audio)
            items.clear()
    return {
        name: np.array(values[WARM_UP if len(values) > samples else 0 :]).T for name, values in spent.items()
    }


def plainly(clips, index, draw):
    with mock.patch.object(data, "Media", WholeSound):
        return clips[index, draw]


@contextmanager
def timed(spent, samples=1):
    """Note what a sample costs of what happens within: milliseconds of the processor's, by the clock, and kB
    read from files.
    """

    def now():
        read = int(
            Path("/proc/self/io").read_text().split()[1]
        )  # bytes, also those that were in the page cache
        return np.array([1e3 * time.process_time(), 1e3 * time.perf_counter(), read / 1e3])

    before = now()
    yield
    spent.append((now() - before) / samples)


def row(setting, spent):
    """A line of the table: medians; ratios are the medians of the samples' own."""
    found = {"setting": setting}
    for name, (processor, *_) in spent.items():
        found[name] = float(np.median(processor))
        if name in ("loader", "whole sound"):
            found[f"{name} / bare"] = float(np.median(processor / spent["bare"][0]))
    return found | {
        "kB read": float(np.median(spent["loader"][2])),
        "(loader)": float(np.median(spent["loader"][1])),
    }


# ------------------------------------------------------------------------------------------------------- flat


def flat(cfg, files, samples, workers):
    """Rows: memory and open files of the processes, of ten stages of `samples` samples."""
    batch_size, begun = 10, time.perf_counter()
    steps = samples // batch_size
    draws = data.BatchSampler(len(files), batch_size, "iid", cfg.seed, 0, steps)
    rows, decoding = [], []
    for step, _ in enumerate(
        data.loader(data.Clips(files, cfg, training=True), workers, batch_sampler=draws)
    ):
        if step == 0:
            decoding = multiprocessing.active_children()
            print(
                f"{len(decoding)} decoding processes, first batch after {time.perf_counter() - begun:.1f} s\n"
            )
        if (step + 1) % (steps // 10) == 0 or step == 0:
            now = {"samples": (step + 1) * batch_size, "s": time.perf_counter() - begun}
            for name, pids in (("main", [os.getpid()]), ("worker", [process.pid for process in decoding])):
                found = np.array([(resident_mib(pid), len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids])
                now |= {f"{name}, MiB": found[:, 0].max(), f"{name}, open files": int(found[:, 1].max())}
            rows.append(now)
    return rows


def resident_mib(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


# ----------------------------------------------------------------------------------------------------- places


def places(folder, repeats=5):
    """Rows: milliseconds of a clip at two places of a long file."""
    path, ten = folder / "hevc.mp4", folder / "ten.mp4"
    if not path.exists():
        inputs = "-f lavfi -i testsrc2=s=1920x1080:r=25 -f lavfi -i anoisesrc=color=pink -t 10".split()
        codec = "-c:v libx265 -preset ultrafast -x265-params keyint=25:log-level=none -c:a aac"
        command = [ffmpeg(), "-v", "error", "-y"]
        subprocess.run([*command, *inputs, *codec.split(), ten], check=True)
        subprocess.run([*command, "-stream_loop", "29", "-i", ten, "-c", "copy", path], check=True)
    rows = []
    for at_s in (10.5, 280.5):
        spent = []
        for _ in range(repeats):
            media._known.clear()
            with timed(spent), Media(path) as file:
                file.frames(at_s + np.arange(8) / 16)
                file.sound(at_s, 8000, 16000)
        rows.append({"at, s": at_s, "clip": float(np.median(np.array(spent)[:, 0]))})
    return rows


def main(arguments):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(arguments.folder or folder).resolve()
        if arguments.flat:
            rows = flat(
                config.load("toy", arguments.overrides),
                small(folder)["toy"],
                arguments.flat,
                arguments.workers,
            )
            return report.show("The loader's processes", rows, arguments.json)
        if arguments.places:
            folder.mkdir(parents=True, exist_ok=True)
            return report.show("A clip by its place, ms of processor time", places(folder), arguments.json)
        tables = small(folder) | write(folder, arguments.files, arguments.source)
        rows = []
        for name in arguments.settings:
            packaged, changes, files = SETTINGS[name]
            spent = costs(
                config.load(packaged, changes + arguments.overrides), tables[files], arguments.samples
            )
            rows.append(row(name, spent))
        report.show(
            "A sample of training, ms", rows, arguments.json, samples=arguments.samples, files=arguments.files
        )


if __name__ == "__main__":
    main(arguments)
