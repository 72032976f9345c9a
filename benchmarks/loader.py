"""What a training sample costs: from videos, from packed data, decoded on the device; and bare decoding.

    python benchmarks/loader.py [--settings A B toy] [--samples 200] [--source VIDEO] [--folder DIR]
    python benchmarks/loader.py --settings A --scale 2000 16000 [--json FILE] [key=value …]
    python benchmarks/loader.py --flat 5000 [--packed] [--workers 2] [--folder DIR] [--json FILE]
    python benchmarks/loader.py --places [--folder DIR] [--json FILE]

Settings: A, files of 10 s as `python -m avid prepare` writes them (short side 128, a key frame every 32),
8 frames at 112²; B, the files that those were prepared from (340×256, key frames 250 apart, B frames,
stereo), 8 frames at 224²; both with 2 s of sound, multi-scale crop, jitter and spectrogram; toy, the toy
world as configs/toy.yaml takes it. The files of A and B are synthetic, or made of --source. Each in three
forms:

    mp4                the files
    packed             packed by `python -m avid pack`; B with a short side of 256, the toy as large as it is
    packed, on device  the same with data.decode=device: the decoding process's part, which only reads bytes

    bare         mp4: decord opens the file and reads the sample's frames, PyAV opens it and decodes the
                 stretch of sound; packed: JPEGs are decoded, samples made float32; on device: bytes copied
    loader       the same files, frames and stretches through data.Clips: decode, crop, resize, resample,
                 spectrogram, draws
    whole sound  the loader, but all of a file's sound is decoded and the stretch cut out, as plain loaders do
    in memory    the loader with data.in_memory, after the first time
    2, 4 a file  the loader with data.clips_per_open=2 and 4: 2 and 4 clips each time that a file is opened
    collate      into a batch
    to device    to_device, here on the CPU: decoding (data.decode=device); flip, jitter, normalisation

Milliseconds a sample, medians, one process with one thread (decord adds one of its own). All ways take the
same samples, in turns of eight: a decoding process takes one after the other, too. The time is the
processor's, which a busy machine changes less; in brackets, by the clock. kB: what the loader reads of a
file, twice where both decoders do; of packed data the sample's.

--scale X …: clips/s of a core, loader and collate, and how many cores a GPU of X clips/s needs.
--flat N: open files and memory of the decoding processes, at their start and over N samples of small files.
--places: a clip (8 frames, 0.5 s with its sound) early and late in five minutes of HEVC, 1920×1080, as phones
write them, key frames a second apart; nothing is kept of a file from one clip to the next. Four clips a
place, a quarter of a second apart: what lies between a key frame and the clip has to be decoded, too.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli, config

SETTINGS = {  # name: (configuration, changes, files, short side and sample rate of the packed ones)
    "A": ("xid", ["video.size=112"], "prepared", (128, 24000)),
    "B": ("xid", ["video.size=224"], "original", (256, 24000)),
    "toy": ("toy", [], "toy", (64, 16000)),
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
    what = "clips/s of a GPU: how many cores feed it"
    parser.add_argument("--scale", type=float, nargs="+", default=[], metavar="X", help=what)
    parser.add_argument("--packed", action="store_true", help="--flat on packed data")
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
from collections import defaultdict
from contextlib import contextmanager
from unittest import mock

import numpy as np
import report
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from avid import data, datasets, media, temporal_tasks, toy
from avid.media import Media, av, decord, paste, shown
from avid.packed import PackedMedia
from avid.tools import pack, prepare

SECONDS = 10
WARM_UP, TURN, BATCH = 8, 8, 16  # samples: before the first that counts; of a turn; of a batch
WAYS = ("bare", "loader", "whole sound", "in memory", "2 a file", "4 a file", "collate", "to device")


# ------------------------------------------------------------------------------------------------------ files


def write(folder, count, source=None):
    """Below folder: original/, `count` files as collections have them, and prepared/. → {folder: table}"""
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


ORIGINAL = (
    f"-t {SECONDS} -r 25 -s 340x256 -c:v libx264 -preset fast -threads 1 -g 250 -keyint_min 250 "
    "-sc_threshold 0 -crf 24 -pix_fmt yuv420p -c:a aac -ac 2 -ar 44100 -b:a 128k -f mp4 "
    "-movflags +faststart"
).split()


def content(k, source):
    """ffmpeg's input for the k-th file: a part of the source, or a zoom with grain and pink noise."""
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


def table(folder, name="folder"):
    return datasets.load(config.Data(name=name, root=str(folder)), "train")


def packed(files, short_side, audio_rate):
    """The same table, packed beside it."""
    folder = files.root.with_name(f"{files.root.name}-packed-{short_side}")
    small = pack.Small(short_side=short_side, audio_rate=audio_rate)
    pack.pack(config.Data(name="folder", root=str(files.root)), folder, small, workers=1)
    return table(folder, "packed")


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


def bare_packed(jpegs, pcm):
    """Decode the frames, and do nothing with them."""
    for jpeg in jpegs:
        decode_jpeg(torch.from_numpy(jpeg), ImageReadMode.RGB)
    pcm.astype(np.float32)


def bare_bytes(jpegs, pcm):
    return np.concatenate(jpegs), pcm.copy()


def costs(cfg, files, packed_files, samples):
    """Of each form and each way the cost of a sample: {form: {way: 3×samples}}, see `timed`."""

    def clips(table, **changes):
        settings = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **changes))
        return data.Clips(table, settings, training=True).for_device()

    loaders = {
        "mp4": clips(files, in_memory=False),
        "packed": clips(packed_files, name="packed"),
        "packed, on device": clips(packed_files, name="packed", decode="device"),
    }
    sharing = {k: clips(files, in_memory=False, clips_per_open=k) for k in (2, 4)}
    kept = clips(files, in_memory=True)
    for index in range(len(files)):
        kept[index, (0,)]  # decoded now
    spent = {form: defaultdict(list) for form in loaders}
    items = {form: [] for form in loaders}
    for turn, first in enumerate(range(0, samples + WARM_UP, TURN)):
        keys = [(sample % len(files), (3, 0, sample)) for sample in range(first, first + TURN)]
        sources = {key: drawn(loaders, key) for key in keys}
        ways = {
            ("mp4", "whole sound"): lambda key: plainly(loaders["mp4"], *key),
            ("mp4", "in memory"): lambda key: kept[key],
        }
        for k in sharing:
            ways["mp4", f"{k} a file"] = lambda key, k=k: several(sharing[k], k, *key)
        for form in loaders:
            decoding = {key: of[form] for key, of in sources.items()}
            ways[form, "bare"] = lambda key, of=decoding: of[key][0](*of[key][1:])
            ways[form, "loader"] = lambda key, form=form: items[form].append(loaders[form][key])
        first_way = turn % len(ways)
        for form, way in [*list(ways)[first_way:], *list(ways)[:first_way]]:
            for key in keys:
                with timed(spent[form][way], int(way[0]) if way.endswith("a file") else 1):
                    ways[form, way](key)
        for at, key in enumerate(keys, -TURN):
            for form, (_, jpegs, pcm) in list(sources[key].items())[1:]:  # a map is read without a call
                spent[form]["loader"][at][2] = (sum(map(len, jpegs)) + pcm.nbytes) / 1e3
        for form, some in items.items():
            if len(some) == BATCH:
                with timed(spent[form]["collate"], BATCH):
                    batch = data.collate(some, cfg)
                with timed(spent[form]["to device"], BATCH):
                    data.to_device(batch, torch.device("cpu"), cfg.audio)
                some.clear()
    return {
        form: {name: np.array(x[WARM_UP if len(x) > samples else 0 :]).T for name, x in ways.items()}
        for form, ways in spent.items()
    }


def drawn(loaders, key):
    """What each form decodes of a sample: {form: (its bare way, its arguments …)}."""
    (index, draw), clips = key, loaders["mp4"]
    cfg, files, packed_files = clips.cfg, clips.table, loaders["packed"].table
    path = str(files.root / files.paths[index])
    with Media(path) as file:
        rng = np.random.default_rng((cfg.seed, *draw))
        (clip, *_), _ = temporal_tasks.plan(*clips.usable(file), clips.length_s, cfg.temporal, rng)
        frames = shown(file.reader.starts_s, clips.frame_times(file, clip, rng)).tolist()
    start_s, seconds = clips.start_of(clip, cfg.audio.seconds), cfg.audio.seconds * clip.speed
    record = PackedMedia(packed_files.root, packed_files.record[index])
    jpegs = record.jpegs(record.shown(clips.frame_times(record, clip, rng)))
    pcm = record.pcm(start_s, round(seconds * record.rate_hz))
    return {
        "mp4": (bare, path, frames, start_s, seconds),
        "packed": (bare_packed, jpegs, pcm),
        "packed, on device": (bare_bytes, jpegs, pcm),
    }


def several(clips, count, index, draw):
    """So many clips of one file; the one before is another."""
    return [clips[index, (*draw, k)] for k in range(count)]


def plainly(clips, index, draw):
    with mock.patch.object(data, "Media", WholeSound):
        return clips[index, draw]


@contextmanager
def timed(spent, samples=1):
    """Note what a sample costs within: ms of the processor, ms by the clock, and kB read from files."""

    def clocks():
        return np.array([1e3 * time.process_time(), 1e3 * time.perf_counter()])

    def read():  # kB, also those that were in the page cache
        return int(Path("/proc/self/io").read_text().split()[1]) / 1e3

    read_before = read()  # outside of what is timed
    before = clocks()
    yield
    spent_ms = clocks() - before
    spent.append(np.array([*spent_ms, read() - read_before]) / samples)


def row(setting, form, spent, scale):
    """A line of the table: medians; ratios are the medians of the samples' own."""
    found = {"setting": setting, "form": form}
    for name in [way for way in WAYS if way in spent]:
        found[name] = float(np.median(spent[name][0]))
        if name == "loader":
            found["loader / bare"] = float(np.median(spent[name][0] / spent["bare"][0]))
    found |= {
        "kB read": float(np.median(spent["loader"][2])),
        "(loader)": float(np.median(spent["loader"][1])),
    }
    if scale:
        found["clips/s a core"] = 1000 / (found["loader"] + found["collate"])
    return found | {f"cores for {x:,.0f} clips/s": x / found["clips/s a core"] for x in scale}


# ------------------------------------------------------------------------------------------------------- flat


def flat(cfg, files, samples, workers):
    """Rows: memory and open files of the processes, at ten stages of `samples` samples."""
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
    """Rows: milliseconds of a clip at places of a long file, of each of four clips and on average."""
    path, short = folder / "hevc.mp4", folder / "short.mp4"
    if not path.exists():
        inputs = "-f lavfi -i testsrc2=s=1920x1080:r=25 -f lavfi -i anoisesrc=color=pink -t 2".split()
        codec = "-c:v libx265 -preset ultrafast -x265-params keyint=25:log-level=none -c:a aac"
        command = [ffmpeg(), "-v", "error", "-y"]
        subprocess.run([*command, *inputs, *codec.split(), short], check=True)
        subprocess.run([*command, "-stream_loop", "149", "-i", short, "-c", "copy", path], check=True)
    rows = []
    for place_s in (10, 60, 150, 280):
        clips = {}
        for later_s in (0.0, 0.25, 0.5, 0.75):
            spent, at_s = [], place_s + later_s
            for _ in range(repeats):
                media._known.clear()
                with timed(spent), Media(path) as file:
                    file.frames(at_s + np.arange(8) / 16)
                    file.sound(at_s, 8000, 16000)
            clips[f"+{later_s} s"] = float(np.median(np.array(spent)[:, 0]))
        rows.append({"at, s": place_s, **clips, "mean": float(np.mean([*clips.values()]))})
    return rows


def main(arguments):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(arguments.folder or folder).resolve()
        if arguments.flat:
            files, cfg = small(folder)["toy"], config.load("toy", arguments.overrides)
            files = packed(files, *SETTINGS["toy"][3]) if arguments.packed else files
            rows = flat(cfg, files, arguments.flat, arguments.workers)
            return report.show("The loader's processes", rows, arguments.json)
        if arguments.places:
            folder.mkdir(parents=True, exist_ok=True)
            return report.show("A clip by its place, ms of processor time", places(folder), arguments.json)
        tables = small(folder) | write(folder, arguments.files, arguments.source)
        rows = []
        for name in arguments.settings:
            packaged, changes, files, small_as = SETTINGS[name]
            cfg = config.load(packaged, changes + arguments.overrides)
            spent = costs(cfg, tables[files], packed(tables[files], *small_as), arguments.samples)
            rows += [row(name, form, ways, arguments.scale) for form, ways in spent.items()]
        report.show(
            "A sample of training, ms", rows, arguments.json, samples=arguments.samples, files=arguments.files
        )


if __name__ == "__main__":
    main(arguments)
