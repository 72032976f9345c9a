"""A data set in shards that are read without decoding a video: JPEG frames and plain sound, in tars.

In: any data set that datasets.py reads, its instances with their intervals.
Out: a folder that data.name=packed reads: shard-000000.tar …, index.npy, manifest.csv, failures.csv and
pack.json; avid/packed.py says what a shard holds.
"""

import argparse
import contextlib
import csv
import errno
import io
import json
import os
import shutil
import signal
import sys
import tarfile
import zlib
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from avid import cli, config, datasets, files, processes, progress
from avid.datasets import DataError
from avid.processes import Crash

LIMIT_S = 6 * 3600.0  # a file that takes longer hangs
TRIED = 24  # instances, drawn at random, whose sizes tell the whole's
MEMORY = 256e6  # bytes of frames that are decoded at a time
SOUND_S = 60.0  # of sound that is decoded at a time
FULL = os.strerror(errno.ENOSPC)
END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar
AUDIOSET = ("balanced_train", "unbalanced_train", "train", "eval")


class Small(NamedTuple):
    """What is kept of a video."""

    fps: float = 16.0  # frames a second
    keep_rate: bool = False  # every frame of the file instead
    short_side: int = 128  # pixels, at most
    quality: int = 90  # of the JPEGs
    audio_rate: int = 24000  # Hz
    shard_gb: float = 1.0  # 10^9 bytes of a shard, at most


# ---------------------------------------------------------------------------------------------- one record


def encode(source, start_s, end_s, needs, facts, small, target):
    """Write an instance's record to `target`, whole or not at all; returns why that failed, or nothing.

    source: a media file; needs: modalities without which it is of no use; facts: what the .json says besides
    those of picture and sound.
    """
    from avid.media import Media, MediaError, faults  # here: a worker needs them, the command line does not

    parts, missing = {"video": None, "audio": None}, {}
    for modality, read in (("video", picture), ("audio", sound)):
        try:
            with Media(source, (modality,), start_s, end_s) as media, faults(f"{modality} cannot be packed"):
                parts[modality] = read(media, small)
        except MediaError as error:
            missing[modality] = str(error)
    if reasons := [missing[modality] for modality in needs if modality in missing]:
        return reasons[0]
    (seen, frames), (heard, wav) = (part or (None, {}) for part in parts.values())
    if seen and heard and len(needs) == 2:
        if min(seen["last_s"], heard["last_s"]) <= max(seen["first_s"], heard["first_s"]):
            return "picture and sound, or the asked part, do not overlap in time"
    facts |= {"picture": seen, "sound": heard}
    members = {"json": json.dumps(facts).encode(), **frames, **wav}
    part = f"{target}.{os.getpid()}"  # an orphan of a killed command may be writing the same bytes
    try:
        with open(part, "wb") as file:
            for ending, content in members.items():
                header = tarfile.TarInfo(f"{facts['record']:09d}.{ending}")
                header.size = len(content)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
                file.write(content)
                file.write(bytes(-len(content) % tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except (OSError, ValueError) as error:  # of a tar's header: more than 8 GiB
        return f"cannot be written: {getattr(error, 'strerror', error)}"
    finally:
        Path(part).unlink(missing_ok=True)
    return ""


def picture(media, small):
    """What is kept of the picture: its facts, and {"npy": the table of frames, "mjpeg": the frames}."""
    import torch
    from torch.nn.functional import interpolate
    from torchvision.io import encode_jpeg

    from avid.packed import FRAME

    torch.set_num_threads(1)
    first_s, last_s = media.first_s, media.last_s
    if small.keep_rate:
        later_s = media.reader.starts_s[(media.reader.starts_s > first_s) & (media.reader.starts_s < last_s)]
        starts_s = times_s = np.concatenate([[first_s], later_s])
    else:
        starts_s = first_s + np.arange(max(np.ceil((last_s - first_s) * small.fps - 0.01), 1)) / small.fps
        times_s = np.minimum(starts_s + 0.5 / small.fps, (starts_s + last_s) / 2)
    height, width = media.frames(times_s[:1]).shape[1:3]
    scale = min(small.short_side / min(height, width), 1.0)
    kept = max(round(scale * height), 1), max(round(scale * width), 1)
    at_once = max(int(MEMORY / (3 * height * width)), 1)
    jpegs, rows, at = [], [], 0
    for k in range(0, len(times_s), at_once):
        frames = torch.from_numpy(media.frames(times_s[k : k + at_once])).permute(0, 3, 1, 2)
        for begin_s, frame in zip(starts_s[k : k + at_once], frames, strict=True):
            if scale < 1:
                frame = interpolate(frame[None], kept, mode="bilinear", antialias=True)[0]
            jpeg = encode_jpeg(frame.contiguous(), small.quality).numpy().tobytes()
            if not jpegs or jpeg != jpegs[-1]:  # what does not change is kept once
                rows.append((begin_s, at, len(jpeg), zlib.crc32(jpeg)))
                jpegs.append(jpeg)
                at += len(jpeg)
    table = io.BytesIO()
    np.lib.format.write_array(table, np.array(rows, FRAME), version=(1, 0))
    facts = {"first_s": first_s, "last_s": last_s, "fps": None if small.keep_rate else small.fps}
    facts |= {"height": kept[0], "width": kept[1], "frames": len(rows), "bytes": at}
    return facts, {"npy": table.getvalue(), "mjpeg": b"".join(jpegs)}


def sound(media, small):
    """What is kept of the sound: its facts, and {"wav": the file}."""
    import wave

    from avid.packed import FULL_SCALE, SAMPLES

    rate_hz, first_s, last_s = small.audio_rate, media.first_s, media.last_s
    samples, piece = round((last_s - first_s) * rate_hz), round(SOUND_S * rate_hz)
    pieces = [(first_s + k / rate_hz, min(piece, samples - k)) for k in range(0, max(samples, 1), piece)]
    heard = np.concatenate([media.sound(*where, rate_hz) for where in pieces])
    # a file of 16 bits is kept as it is; decoders of others pass full scale at times
    lowest, highest = heard.min(initial=0.0).item(), heard.max(initial=0.0).item()
    gain = max(1.0, -lowest, highest * FULL_SCALE / (FULL_SCALE - 1))
    pcm = np.round(heard * (FULL_SCALE / gain)).clip(-FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1), out.setsampwidth(2), out.setframerate(rate_hz)
        out.writeframes(pcm.tobytes())
    checks = [zlib.crc32(pcm[k : k + SAMPLES].tobytes()) for k in range(0, len(pcm), SAMPLES)]
    facts = {"first_s": first_s, "last_s": last_s, "rate_hz": rate_hz, "samples": len(pcm), "gain": gain}
    return facts | {"crc32": checks}, {"wav": file.getvalue()}


# ------------------------------------------------------------------------------------------------- listing


def listing(data):
    """The datasets.Table of a config.Data's instances, of all splits, and a dict for each of them.

    Its keys: path, start_s, end_s (None: to the end), label (a list where there are several), splits, fold
    and columns.
    """
    table = datasets.load(data, "all")
    row, splits = datasets.DATA[data.name], [[] for _ in table.paths]
    names = [f"{part}{n}" for n in range(1, row.divisions + 1) for part in ("train", "test")]
    names = names or (AUDIOSET if data.name == "audioset" else ("train", "val", "test"))
    names = sorted({*names, *filter(None, table.columns.get("split", ()))})
    at = {key: i for i, key in enumerate(keys(table))}
    for name in names:
        with suppress(DataError):  # not every data set has every split, or files of it
            for key in keys(datasets.load(data, name)):
                splits[at[key]].append(name)
    several = table.labels.ndim > 1
    found = []
    for i, path in enumerate(table.paths):
        label = table.labels[i]
        if several:
            label = [table.classes[c] for c in np.flatnonzero(label)]
        else:
            label = table.classes[label] if label >= 0 else ""
        end_s = float(table.end_s[i]) if np.isfinite(table.end_s[i]) else None
        one = {"path": path, "start_s": float(table.start_s[i]), "end_s": end_s, "label": label}
        one |= {"splits": splits[i], "fold": int(table.fold[i])}
        found.append(one | {"columns": {name: values[i] for name, values in table.columns.items()}})
    return table, found


def keys(table):
    return zip(table.paths, table.start_s.tolist(), table.end_s.tolist(), strict=True)


# ------------------------------------------------------------------------------------------------- packing


def pack(data, dst, small, workers, only_estimate=False):
    """Pack a config.Data's instances into the folder `dst`; returns how many of them are there in the end.

    Records stand in the shards in an order drawn at random, always the same, so that a shard is a sample of
    the whole. The same command goes on after an interruption, and ends with the same bytes. Raises DataError
    where dst holds something else or the disk is too small, OSError where it is full.
    """
    dst = Path(dst).expanduser().resolve()
    files.check_folder(dst)
    table, found = listing(data)
    print(table.report())
    asked = {"data": data.name, **small._asdict(), "instances": len(found)}
    asked["list_crc32"] = zlib.crc32(json.dumps([table.name, found]).encode())
    dst.mkdir(parents=True, exist_ok=True)
    with files.alone(dst):
        if there := begin(dst, asked):
            print(f"{there:,} instances were packed before: {dst}")
            return there
        order = np.random.default_rng(0).permutation(len(found)).tolist()  # the instance of each record
        shards, tasks = Shards(dst, len(found), small.shard_gb * 1e9), []
        for record in range(shards.next, len(found)):
            if part_of(dst, record).exists():
                shards.put(record, "")
            else:
                tasks.append(task(data, table, found[order[record]], record, small, dst))
        run(tasks[:TRIED] if only_estimate else tasks, shards, small, workers)
        if only_estimate:
            return 0
        shards.close()
        return finish(dst, asked, table, found, order, shards)


def begin(dst, asked):
    """The number of records where `dst` is finished, else 0. DataError where it holds something else."""
    begun = next((path for name in ("pack.json", "packing.json") if (path := dst / name).exists()), None)
    if begun is None:
        if foreign := [path.name for path in dst.iterdir() if not path.name.endswith((".part", files.LOCK))]:
            raise DataError(
                f"{dst} holds files that were not packed, e.g. {min(foreign)}; name an empty folder, or a "
                "new one"
            )
        write_json(dst / "packing.json", asked)
    else:
        there = datasets.checked_json(begun)
        if differ := [
            f"{key} was {there.get(key)} and is {asked[key]}" for key in asked if there.get(key) != asked[key]
        ]:
            raise DataError(
                f"{dst} was packed from another list or with other settings ({', '.join(differ)}); name "
                "another folder"
            )
        if begun.name == "pack.json":
            clear(dst)
            return there["packed"]
    (dst / "parts").mkdir(exist_ok=True)
    return 0


def clear(dst):
    """Remove what only packing needs."""
    shutil.rmtree(dst / "parts", ignore_errors=True)
    (dst / "packing.json").unlink(missing_ok=True)


def task(data, table, instance, record, small, dst):
    """What `encode` is told of an instance."""
    facts = {key: instance[key] for key in ("path", "label", "splits", "start_s", "end_s")}
    end_s = np.inf if facts["end_s"] is None else facts["end_s"]
    place = str(table.root / facts["path"]), facts["start_s"], end_s
    facts = {"record": record, **facts}
    return *place, datasets.DATA[data.name].needs, facts, small, str(part_of(dst, record))


def part_of(dst, record):
    return dst / "parts" / f"{record:09d}"


class Shards:
    """Records, as they are done, put into shards in their order: a shard has its name when it is whole."""

    def __init__(self, dst, count, limit):
        from avid.packed import ENTRY

        self.dst, self.limit = dst, limit
        self.index = np.zeros(count, ENTRY)
        self.failures = {}  # record → reason
        self.number, self.next = 0, 0  # of the shard that is being filled; of its first record
        self.ready, self.parts, self.size = {}, [], 0  # record → reason; the shard's reasons, its bytes
        self.done, self.bytes = 0, 0  # records that are done, and what they take
        while self.list_of(self.number).exists() and self.tar_of(self.number).exists():
            for place in json.loads(self.list_of(self.number).read_text()):
                self.settle(place)
            self.bytes += self.tar_of(self.number).stat().st_size - len(END)
            self.number, self.done = self.number + 1, self.next

    def list_of(self, number):
        return self.dst / "parts" / f"shard-{number:06d}.json"

    def tar_of(self, number):
        from avid.packed import shard_name

        return self.dst / shard_name(number)

    def settle(self, place):
        """The next record lies at `place`, as in ENTRY, or else `place` is why it could not be packed."""
        if isinstance(place, str):
            self.failures[self.next] = place
        else:
            self.index[self.next] = tuple(place)
        self.next += 1

    def put(self, record, reason):
        """A record is done: its part is there, or the reason why not."""
        self.ready[record] = reason
        self.done += 1
        self.bytes += 0 if reason else part_of(self.dst, record).stat().st_size
        while (record := self.next + len(self.parts)) in self.ready:
            size = 0 if self.ready[record] else part_of(self.dst, record).stat().st_size
            if self.size and self.size + size > self.limit:
                self.close()
            self.parts.append(self.ready.pop(record))
            self.size += size

    def close(self):
        """Write the shard that is being filled."""
        places, at = [], 0
        with (
            files.replacing(self.tar_of(self.number), "wb") if self.size else contextlib.nullcontext() as tar
        ):
            for record, reason in enumerate(self.parts, self.next):
                if reason:
                    places.append(reason)
                    continue
                content = part_of(self.dst, record).read_bytes()
                tar.write(content)
                places.append([self.number, *head(content), at + tarfile.BLOCKSIZE])
                at += len(content)
            if self.size:
                tar.write(END)
                with files.replacing(self.list_of(self.number)) as file:  # before the shard has its name
                    json.dump(places, file)
        for place in places:
            self.settle(place)
        for record in range(self.next - len(places), self.next):
            part_of(self.dst, record).unlink(missing_ok=True)
        self.number, self.parts, self.size = self.number + bool(self.size), [], 0


def head(content):
    """Of a record's bytes: the size of its .json, of its .npy (0: none), and the CRC-32 of the two."""
    from avid.packed import BLOCK, padded

    sizes, check, at = [], 0, 0
    for ending in (b".json", b".npy"):
        # a tar's header: the name, and in octal the size
        size = int(content[at + 124 : at + 135], 8) if ending in content[at : at + 100] else 0
        check = zlib.crc32(content[at + BLOCK : at + BLOCK + size], check)
        at += BLOCK + padded(size)
        sizes.append(size)
    return *sizes, check


def run(tasks, shards, small, workers):
    """Encode instances in processes and put them into shards; after some, say how large the whole becomes."""
    bar = progress.bar(None, "packing", len(shards.index), shards.done, unit="file")
    with bar, closing(processes.outcomes(encode, tasks, workers, LIMIT_S)) as results:
        for count, ((*_, facts, _, _), result) in enumerate(results, 1):
            reason = result.reason if isinstance(result, Crash) else result
            if FULL in reason:
                raise OSError(errno.ENOSPC, FULL, str(shards.dst))
            shards.put(facts["record"], reason)
            bar.update()
            if count == min(TRIED, len(tasks)):
                estimate(shards, small)


def estimate(shards, small):
    """Say how large the whole becomes, by the records that are done. DataError where that does not fit."""
    count, free = len(shards.index), shutil.disk_usage(shards.dst).free
    each = shards.bytes / max(shards.done, 1)
    left = each * (count - shards.done)
    whole, number = each * count / 1e9, -(-each * count // (small.shard_gb * 1e9))
    of = f"by {shards.done:,} of {count:,} instances, drawn at random, {each / 1e6:.2f} MB each"
    tqdm.write(f"about {whole:,.2f} GB in {number:,.0f} shards ({of}); {free / 1e9:,.0f} GB are free")
    if left > free:
        raise DataError(
            f"packing needs {left / 1e9:,.1f} GB more, and {free / 1e9:,.1f} GB are free in {shards.dst}; "
            "make room, or lower --fps, --short-side or --quality"
        )


# ------------------------------------------------------------------------------------------------- the end


def finish(dst, asked, table, found, order, shards):
    """Write the lists beside the shards; with pack.json the folder is a data set. → the number of records."""
    failures = {order[record]: reason for record, reason in shards.failures.items()}
    record = np.argsort(order)  # of each instance
    others = [f"list.{name}" if name in datasets.PACKED_COLUMNS else name for name in table.columns]
    rows, failed = [(*datasets.PACKED_COLUMNS, *others)], [("path", "start", "end", "splits", "reason")]
    for i, one in enumerate(found):
        end_s = "" if one["end_s"] is None else one["end_s"]
        place, splits = (one["path"], one["start_s"], end_s), " ".join(one["splits"])
        if i in failures:
            failed.append((*place, splits, failures[i]))
            continue
        label = one["label"] if isinstance(one["label"], str) else json.dumps(one["label"])
        rows.append((record[i], *place, label, splits, one["fold"], *one["columns"].values()))
    packed, log = len(rows) - 1, dst / "failures.csv"
    if failures:
        first = next(iter(sorted(failures)))
        print(
            f"{len(failures):,} could not be packed, e.g. {found[first]['path']}: {failures[first]}; all of "
            f"them: {log}"
        )
    write_csv(log, failed)
    if not packed:
        return 0
    write_csv(dst / "manifest.csv", rows)
    with files.replacing(dst / "index.npy", "wb") as file:
        np.lib.format.write_array(file, shards.index)
    facts = asked | {"packed": packed, "shards": shards.number, "bytes": shards.bytes}
    facts |= {"classes": table.classes, "several_classes": table.labels.ndim > 1}
    facts["crc32"] = {path.name: zlib.crc32(path.read_bytes()) for path in (dst / "manifest.csv", log)}
    write_json(dst / "pack.json", facts)
    clear(dst)
    print(
        f"packed {packed:,} instances, {shards.bytes / 1e9:,.2f} GB in {shards.number:,} shards; now: "
        f"data.name=packed data.root={dst}"
    )
    return packed


def write_csv(path, rows):
    with files.replacing(path, newline="", errors="surrogateescape") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def write_json(path, facts):
    """Facts that datasets.checked_json reads: with a checksum of their own."""
    with files.replacing(path) as file:
        json.dump(facts | {"check": zlib.crc32(json.dumps(facts).encode())}, file, indent=1)
        file.write("\n")


# -------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """`python -m avid pack …`. Exit code 0: packed, 1: nothing could be, 2: wrong arguments or data."""
    arguments = parser().parse_args((sys.argv[1:] if argv is None else argv)[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, as Ctrl-C is: processes end
    source = Path(arguments.src).expanduser()
    listed = source.suffix.lower() == ".csv" or (source / "manifest.csv").exists()
    name = arguments.data or ("manifest" if listed else "folder")
    try:
        cfg = config.load("", arguments.overrides, base={"data": {"name": name, "root": str(source)}})
        small = Small(*(getattr(arguments, field) for field in Small._fields))
        there = pack(cfg.data, arguments.dst, small, arguments.workers, arguments.estimate)
    except (config.ConfigError, DataError, OSError) as error:
        config.stop(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if there or arguments.estimate else 1)


def parser():
    what, small = "pack a data set into shards that training reads without decoding a video", Small()
    arguments = cli.CommandLine(prog="python -m avid pack", description=what, formatter_class=cli.Help)
    add = arguments.add_argument
    add("src", metavar="DATA", help="folder of the data set, or a manifest")
    what = "folder to write; the same command goes on where an interrupted one stopped"
    add("dst", metavar="DST", help=what)
    what = "how the data set is laid out (default: manifest where there is a manifest.csv, else folder)"
    add("--data", choices=datasets.UNPACKED, metavar="NAME", help=f"{what}: {', '.join(datasets.UNPACKED)}")
    what = "frames a second (default: %(default)g)"
    add("--fps", type=more_than_zero, default=small.fps, metavar="F", help=what)
    add("--keep-rate", action="store_true", help="every frame of a file instead, at its own time")
    what = "of the frames, at most (default: %(default)s)"
    add("--short-side", type=cli.positive, default=small.short_side, metavar="PIXELS", help=what)
    what = "of the JPEGs, 1 to 100 (default: %(default)s)"
    add("--quality", type=int, choices=range(1, 101), default=small.quality, metavar="Q", help=what)
    what = "sample rate of the sound; best audio.rate_hz of the training (default: %(default)s)"
    add("--audio-rate", type=cli.positive, default=small.audio_rate, metavar="HZ", help=what)
    what = "size of a shard, 10^9 bytes at most (default: %(default)g)"
    add("--shard-gb", type=more_than_zero, default=small.shard_gb, metavar="GB", help=what)
    what = f"pack {TRIED} instances, say how large the whole becomes, and stop; without it packing goes on"
    add("--estimate", action="store_true", help=what)
    what = "processes (default: the processors)"
    add("--workers", type=cli.positive, default=os.cpu_count(), metavar="N", help=what)
    what = "settings of train.py, for example data.subset=esc10"
    add("overrides", nargs="*", metavar="key=value", help=what)
    return arguments


def more_than_zero(text):
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not more than 0")
    return float(text)
