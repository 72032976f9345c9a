"""Reads damaged media files for training and for evaluation: a bad file must not cost any other file.

    python tests/long/files.py --mutants 500 --seed 0 [--keep FOLDER]

In: small files of several containers and codecs, written here, and the real files of AVID_TEST_DATA. Out: a
table of what became of every kind of damage, the commonest reasons, the slowest files, and exit code 0 where
every batch has the right shape and finite numbers, every file that was skipped has a reason of one line, and
no process is left.
"""

import argparse
import multiprocessing
import os
import random
import re
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

os.environ.setdefault("SVT_LOG", "0")  # the encoder of AV1 prints a lot

import numpy as np
import torch
from conftest import tone, write_media

from avid import config, data, datasets

ORIGINALS = {  # name: codecs of picture and sound, the container's options
    "a.mp4": (("libx264", "aac"), {"movflags": "faststart"}),
    "end.mp4": (("libx264", "aac"), {}),
    "hevc.mp4": (("libx265", "aac"), {}),
    "av1.mp4": (("libsvtav1", "aac"), {}),
    "b.mov": (("libx264", "pcm_s16le"), {}),
    "c.mkv": (("libx264", "aac"), {}),
    "d.webm": (("libvpx-vp9", "libopus"), {}),
    "e.avi": (("mpeg4", "pcm_s16le"), {}),
    "f.ts": (("libx264", "aac"), {}),
    "g.mpg": (("mpeg2video", "mp2"), {}),
    "h.flv": (("libx264", "aac"), {}),
    "i.wav": (("", "pcm_s16le"), {}),
    "j.flac": (("", "flac"), {}),
    "k.mp3": (("", "libmp3lame"), {}),
    "l.ogg": (("", "libopus"), {}),
    "m.m4a": (("", "aac"), {}),
}
INDICES = b"moov", b"stbl", b"idx1", b"\x1c\x53\xbb\x6b"  # of MP4, AVI, Matroska
ENDINGS = [Path(name).suffix for name in ORIGINALS] + [".jpg", ""]
NAMES = [
    "with space.mp4",
    "quo'te\".mp4",
    "ünïcode 漢字 🎬.mp4",
    "new\nline.mp4",
    "tab\t.mp4",
    "a" * 200 + ".mp4",
]
NAMES += [
    "-rf.mp4",
    "file:x.mp4",
    "%03d.mp4",
    "*?[a].mp4",
    "$(id);|&.mp4",
    os.fsdecode(b"not \xff utf8.mp4"),
    "concat:a|b.mp4",
]
CONFIG = config.Config(
    data=config.Data(timeout_s=15.0),
    video=config.Video(frames=4, fps=8.0, size=32),
    audio=config.Audio(seconds=0.5, rate_hz=16000, frames_per_s=50, n_fft=256, mels=16),
    eval=config.Eval(clips=3),
)
VIDEO, AUDIO = (3, 4, 32, 32), (1, 25, 16)  # of a clip


def originals(folder, names=tuple(ORIGINALS)):
    """Whole files of two seconds, one a container, and those real files that are there."""
    for name in names:
        codecs, options = ORIGINALS[name]
        frame_s = np.arange(50) / 25 if codecs[0] else ()
        quiet = {
            "libx265": {"x265-params": "log-level=none"},
            "libsvtav1": {"svtav1-params": "lp=1", "preset": "12"},
        }
        rate_hz = 48000 if codecs[1] == "libopus" else 44100
        wave = tone(500, 2.0, rate_hz, channels=2)
        write_media(
            folder / name, frame_s, wave, rate_hz, codecs=codecs, encoder=quiet.get(codecs[0]), **options
        )
    real = Path(os.environ.get("AVID_TEST_DATA", TESTS.parents[1] / "shared" / "data"))
    return [
        *(folder / name for name in names),
        *sorted(real.glob("media/*")),
        *sorted(real.glob("esc10/audio/*.ogg"))[:3],
    ]


def damage(kind, content, rng):
    """bytes → bytes with this kind of damage."""
    data, n = bytearray(content), len(content)

    def noise(begin, end, count):
        for _ in range(count):
            data[rng.randrange(begin, end)] = rng.randrange(256)

    if kind == "bytes":
        noise(0, n, rng.choice((1, 10, 100, 1000)))
    elif kind == "header":
        noise(0, min(n, 400), rng.choice((1, 3, 10, 50)))
    elif kind == "sizes":  # extreme numbers where lengths, rates and sizes stand
        for _ in range(rng.choice((1, 3))):
            at = rng.randrange(min(n, 1000) - 8)
            data[at : at + 4] = rng.choice(
                (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\x80\0\0\0")
            )
    elif kind == "index":
        begin = rng.choice([at for at in map(content.find, INDICES) if at >= 0] or [n * 9 // 10])
        noise(begin, min(begin + 2000, n), rng.choice((1, 5, 20)))
    elif kind == "cut":
        del data[rng.randrange(n) :]
    elif kind == "beginning lost":
        del data[: rng.randrange(1, n)]
    elif kind == "zeroed":
        begin = rng.randrange(n)
        end = min(n, begin + rng.choice((16, 1000, n // 3)))
        data[begin:end] = bytes(end - begin)
    elif kind == "noise":
        begin = rng.randrange(n)
        end = min(n, begin + rng.choice((16, 1000, n // 3)))
        data[begin:end] = rng.randbytes(end - begin)
    elif kind == "shifted":
        begin = rng.randrange(n)
        data[begin:begin] = rng.randbytes(rng.randrange(1, 5000))
    elif kind == "two in one":
        data += data[rng.randrange(n) :]
    return bytes(data)


KINDS = [
    "bytes",
    "header",
    "sizes",
    "index",
    "cut",
    "beginning lost",
    "zeroed",
    "noise",
    "shifted",
    "two in one",
    "wrong ending",
]


def write_mutants(folder, sources, count, rng):
    """`count` damaged files and all odd ones: {name: what was done to it}."""
    kinds, contents = {}, {source: source.read_bytes() for source in sources}
    for number in range(count):
        kind, source = KINDS[number % len(KINDS)], rng.choice(sources)
        ending = source.suffix
        if kind == "wrong ending":
            ending = rng.choice([other for other in ENDINGS if other != source.suffix])
        name = f"{number:05d} {source.stem}{ending}"
        (folder / name).write_bytes(damage(kind, contents[source], rng))
        kinds[name] = kind
    whole = contents[sources[0]]
    for name in NAMES:
        (folder / name).write_bytes(whole)
        kinds[name] = "odd name, whole"
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to("absent.mp4")
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "locked.mp4").write_bytes(whole)
    (folder / "locked.mp4").chmod(0)
    os.mkfifo(folder / "pipe.mp4")  # nobody writes to it: opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.mp4"))
    special = ["empty.mp4", "folder.mp4", "dangling.mp4", "loop.mp4", "pipe.mp4", "socket.mp4"]
    if os.geteuid() == 0:
        print("no permission: not tried, root may read everything")
        kinds["locked.mp4"] = "no permission, but root"
    else:
        special.append("locked.mp4")
    return kinds | {name: f"special: {name.partition('.')[0]}" for name in special}


def table_of(folder, names):
    n = len(names)
    return datasets.Table(
        "mutants",
        folder,
        names,
        np.full(n, -1),
        [],
        np.zeros(n),
        np.full(n, np.inf),
        np.zeros(n, int),
        {},
        [],
    )


class Timed(data.Clips):
    """Clips that note how long each file took."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seconds = torch.zeros(len(self)).share_memory_()

    def read(self, index, rng):
        begin = time.perf_counter()
        try:
            return super().read(index, rng)
        finally:
            self.seconds[index] = max(self.seconds[index].item(), time.perf_counter() - begin)


def complaint(batch, modalities, clips):
    """What is wrong with a batch of one file; "" if nothing is."""
    for name, shape in (("video", VIDEO), ("audio", AUDIO)):
        if name in modalities and "index" in batch:
            if batch[name].shape != (1, clips, *shape):
                return f"{name} of shape {tuple(batch[name].shape)}"
            if not data.to_device(batch, torch.device("cpu"), CONFIG.audio)[name].isfinite().all():
                return f"{name} is not finite"
    for _, reason in batch["failures"]:
        if not 0 < len(reason) < 300 or not reason.isprintable():
            return f"no reason of one line: {reason!r}"
        if re.search(r"\[(\d+:|/)", reason):
            return f"a time or a path in a reason: {reason!r}"
    return ""


def read(table, training, modalities, workers, cfg=CONFIG):
    """Read every file of a table: ({index: "used" or a reason}, complaints, seconds of each file)."""
    clips = Timed(table, cfg, training, modalities)
    keys = [[(index, (3, 0, index))] if training else [index] for index in range(len(table))]
    outcomes, wrong = {}, []
    for index, batch in enumerate(data.loader(clips, workers, batch_sampler=keys)):
        if text := complaint(batch, modalities, 1 if training else cfg.eval.clips):
            wrong.append(f"{data.shown(table, index)}: {text}")
        outcomes[index] = dict(batch["failures"]).get(index, "used")
    if len(outcomes) < len(table):
        wrong.append(f"{len(table) - len(outcomes)} files are missing")
    return outcomes, wrong, clips.seconds


def outcome_kind(outcome):
    """used, skipped, died or hung."""
    if outcome.startswith("its decoder died"):
        return "died"
    return (
        "hung"
        if outcome.startswith("its decoder took longer")
        else "used"
        if outcome == "used"
        else "skipped"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mutants", type=int, default=500, help="damaged files, besides those with odd names (default: 500)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: 2)")
    parser.add_argument("--keep", type=Path, help="write the files into this new folder and leave them there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch, "mutants")
        folder.mkdir(parents=True)
        whole = Path(scratch, "whole")
        sources = originals(whole)
        kinds = write_mutants(folder, sources, arguments.mutants, random.Random(arguments.seed))
        counts, reasons, slowest, wrong = defaultdict(Counter), Counter(), [], []
        sounds = [name for name in kinds if Path(name).suffix in (".wav", ".flac", ".mp3", ".ogg", ".m4a")]
        pictures = [name for name in kinds if name not in sounds]
        for names, modalities in (
            (pictures, data.MODALITIES),
            (pictures, ("video",)),
            ([*kinds], ("audio",)),
        ):
            for training in (False, True):
                title = f"{'training' if training else 'evaluation'}, {' and '.join(modalities)}"
                begin = time.perf_counter()
                outcomes, complaints, seconds = read(
                    table_of(folder, names), training, modalities, arguments.workers
                )
                print(f"{title}: {len(names)} files in {time.perf_counter() - begin:.0f} s", flush=True)
                wrong += complaints
                for index, outcome in outcomes.items():
                    counts[kinds[names[index]]][outcome_kind(outcome)] += 1
                    reasons[outcome] += outcome != "used"
                    slowest.append((seconds[index].item(), ascii(names[index])[1:-1], title))
        print(f"\n{'':24}{'used':>9}{'skipped':>9}{'died':>9}{'hung':>9}")
        for kind, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
            print(f"{kind:24}" + "".join(f"{count[name]:>9}" for name in ("used", "skipped", "died", "hung")))
        print(
            "\nthe commonest reasons:",
            *(f"{n:>6}  {reason}" for reason, n in (+reasons).most_common(25)),
            sep="\n",
        )
        print(
            "\nthe slowest:",
            *(f"{s:>6.2f} s  {name}  ({title})" for s, name, title in sorted(slowest)[:-11:-1]),
            sep="\n",
        )
    if multiprocessing.active_children():
        wrong.append(f"processes are left: {multiprocessing.active_children()}")
    print("\n" + ("\n".join(["WRONG:", *wrong]) if wrong else "nothing wrong"))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
