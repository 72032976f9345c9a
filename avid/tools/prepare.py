"""Whole folders of media: what of them is usable, and small copies of them that decode fast.

In: a data set, or any folder.
Out: `check`, a CSV with a row a file; `prepare`, a folder of the same structure with small H.264 and AAC
files.
"""

import argparse
import csv
import errno
import hashlib
import io
import json
import os
import posixpath
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

from avid import cli, config, datasets, processes, progress
from avid.datasets import MEDIA, DataError
from avid.files import alone, check_folder, replacing
from avid.processes import Crash

SOUND = MEDIA[MEDIA.index(".wav") :]  # endings of files without picture
MODALITIES = {
    "both": ("video", "audio"),
    "video": ("video",),
    "audio": ("audio",),
}  # as the command line has them
PART = ".avid-part"  # ending of a file that is being written
COLUMNS = "path usable reason seconds fps width height audio_rate_hz channels modality frames_by".split()
PIECE_S = 60.0  # sound decoded at a time
CLOCK_S = 0.1  # by how much a copy's clock may begin later than its original's
FULL = os.strerror(errno.ENOSPC)
# of ffmpeg. Every frame keeps its own time, on a clock of 90 kHz instead of the frame rate's; without B
# frames nothing is reordered
ENCODE_PICTURE = "-fps_mode vfr -enc_time_base 1:90000 -c:v libx264 -threads 1 -bf 0 -crf 20 -pix_fmt yuv420p"
ENCODE_SOUND = "-c:a aac -b:a 64k -ac 1"
WRITE = "-map_metadata -1 -map_chapters -1 -abort_on empty_output -f mp4 -movflags +faststart"
CHECK_LIMIT_S, PREPARE_LIMIT_S = 600.0, 6 * 3600.0  # a file that takes longer hangs


# ------------------------------------------------------------------------------------------------------ check


def check(table, modalities, out, workers, cfg=None):
    """Read every instance of a datasets.Table once, append a row (COLUMNS) to the CSV `out`, print a summary.

    modalities: what a file needs to be usable, of ("video", "audio"); cfg: config.Config, whose clips and
    timeout judge it. Instances with a row in `out` are not read again. Returns the number of usable ones.
    Raises DataError where `out` is something else.
    """
    needs = "+".join(modalities)
    rows = _earlier(out, needs, table)
    names = [table.name_of(i) for i in range(len(table))]  # an instance is a file and its interval
    todo = [i for i, name in enumerate(names) if name not in rows]
    check_folder(out.parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(table.report())
    if rows:
        print(f"{len(rows):,} of them were read before, see {out}; delete it to read them again")
    root = str(table.root)
    tasks = [(root, table.paths[i], table.start_s[i], table.end_s[i], modalities, cfg) for i in todo]
    bar = progress.bar(desc="reading", total=len(table), initial=len(rows), unit="file")
    with bar, open(out, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if not file.tell():
            lines.writeheader()
        with closing(processes.outcomes(examine, tasks, workers, CHECK_LIMIT_S)) as results:
            for (_, path, start_s, end_s, *_), facts in results:
                if isinstance(facts, Crash):
                    facts = {"usable": "no", "reason": facts.reason}
                name = datasets.instance_name(path, start_s, end_s)
                rows[name] = {"path": name, "modality": needs, **facts}
                lines.writerow(rows[name])
                file.flush()
                bar.update()
    print(summary(rows.values()))
    print(f"a row a file: {out}")
    return sum(row["usable"] == "yes" for row in rows.values())


def examine(root, path, start_s, end_s, modalities, cfg=None):
    """A file's values of COLUMNS: its first and last clip are read as for training, and all of its sound."""
    from avid.media import Media, MediaError  # here: a worker needs it, the command line and its help do not

    media, facts = None, {"usable": "yes", "reason": ""}
    try:
        media = Media(os.path.join(root, path), modalities, start_s, end_s)
        facts["seconds"] = f"{media.last_s - media.first_s:.3f}"
        read_clips(root, path, start_s, end_s, modalities, cfg or config.Config())
        if "video" in modalities:
            height, width = media.frames([media.first_s, media.last_s]).shape[1:3]
            facts |= {"fps": f"{media.reader.fps:.3f}", "width": width, "height": height}
            why = f": {media.why_not_decord}" if media.why_not_decord else ""
            facts["frames_by"] = media.reader.way + why
        if "audio" in modalities:
            rate_hz, loudest = media.stream.rate, 0.0
            facts |= {"audio_rate_hz": rate_hz, "channels": media.stream.codec_context.channels}
            for begin_s in np.arange(media.first_s, media.last_s, PIECE_S):
                samples = round(min(PIECE_S, media.last_s - begin_s) * rate_hz)
                loudest = max(loudest, np.abs(media.sound(begin_s, samples, rate_hz)).max(initial=0.0))
            if loudest == 0.0:
                facts["reason"] = "silent"  # it can be used, but has nothing to hear
    except MediaError as error:
        facts |= {"usable": "no", "reason": str(error)}
        if str(error) == "no sound" and "video" in modalities:  # is it of use for the picture at least?
            picture = examine(root, path, start_s, end_s, ("video",), cfg)
            facts |= picture | {"usable": "no", "reason": picture["reason"] or "no sound"}
    finally:
        if media is not None:
            media.close()
    return facts


def read_clips(root, path, start_s, end_s, modalities, cfg):
    """Read the first and the last clip of a file, as training does. Raises MediaError where that fails."""
    from avid import data

    table, before_s = datasets.of_files([path], root, start_s, end_s), time.monotonic()
    data.Clips(table, cfg, training=False, modalities=modalities, clips=2).read(0, np.random.default_rng(0))
    if time.monotonic() - before_s > 2 * cfg.data.timeout_s:  # training gives a clip no longer
        limit = f"data.timeout_s = {cfg.data.timeout_s:g} s"
        raise data.MediaError(f"its decoder takes longer than {limit} a clip")


def _earlier(out, needs, table):
    """{instance: row} of the CSV of an interrupted check. The half line that a killed one left is cut off."""
    text = out.read_bytes() if out.exists() else b""
    header = (",".join(COLUMNS) + "\n").encode()
    if not (text.startswith(header) or header.startswith(text)):
        raise DataError(f"{out} is not the CSV of a check; name another one with --out")
    whole = text[: text.rfind(b"\n") + 1]
    file = io.StringIO(whole.decode(errors="surrogateescape"), newline="")
    rows = {row["path"]: row for row in csv.DictReader(file)}
    listed = {table.name_of(i) for i in range(len(table))}
    for path, row in rows.items():
        if path not in listed or row["modality"] != needs:
            raise DataError(
                f"{out} is the CSV of another check: {path} was read for {row['modality']}; this one reads "
                f"{table.name} for {needs}; delete it, or name another one with --out"
            )
    if text:
        os.truncate(out, len(whole))
    return rows


def summary(rows):
    """A table in plain text: how many rows are usable, how many are not and why, with examples."""
    kinds = {"usable": [], "usable, but silent": []}
    for row in rows:
        reason = row["reason"].partition(":")[0]
        kind = ("usable, but " if row["usable"] == "yes" else "") + reason if reason else "usable"
        kinds.setdefault(kind, []).append(row)
    total, lines = sum(map(len, kinds.values())), []
    order = sorted(kinds, key=lambda kind: (not kind.startswith("usable"), -len(kinds[kind])))
    for kind in order:
        members = kinds[kind]
        if kind == "usable":
            more = f"{sum(float(row['seconds']) for row in members) / 3600:,.1f} h"
        else:
            more = "e.g. " + ", ".join(row["path"] for row in members[:3])
        if members or kind == "usable":
            lines.append(f"{len(members):>11,} {len(members) / max(total, 1):>7.1%}   {kind}   {more}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------- prepare


class Small(NamedTuple):
    """What prepared files are like."""

    short_side: int = 128  # pixels, at most
    keyint: int = 32  # frames from one key frame to the next: a clip decodes from the key frame before it
    audio_rate: int = 24000  # Hz


def prepare(src, dst, small, workers):
    """Write a small copy of every media file below the folder `src` into `dst`, in the same folders, with the
    same stems.

    Pictures become H.264 and sounds mono AAC, in .mp4; in .m4a where the ending says that there is no picture
    (wav, flac, …). Both keep their times. Of a damaged file, what can be decoded is kept. Files that exist
    are skipped, so that the same command goes on after an interruption; one command at a time writes into a
    `dst`. Lists (csv, txt) are copied; in a CSV with a column `path` the endings follow the prepared files.
    dst/failures.csv lists what could not be prepared, and why. Returns the number of prepared files that are
    there. Raises DataError where src, dst or ffmpeg cannot be used.
    """
    src, dst = Path(src).expanduser().resolve(), Path(dst).expanduser().resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise DataError(f"{src} and {dst} lie within each other; name a folder elsewhere")
    files = _files(src)
    media = [file for file in files if os.path.splitext(file)[1].lower() in MEDIA]
    if not media:
        raise DataError(f"no media files below {src}; they end in {', '.join(MEDIA)}")
    check_folder(dst)
    foreign = [file for file in _files(dst) if not file.endswith(PART)] if dst.exists() else []
    if foreign and not (dst / "prepare.json").exists():
        what = f"{dst} holds files that were not prepared, e.g. {foreign[0]}"
        raise DataError(f"{what}; name an empty folder, or a new one")
    dst.mkdir(parents=True, exist_ok=True)
    with alone(dst):
        _remove_parts(dst)
        ffmpeg = _ffmpeg(dst, small)
        _same_settings(dst / "prepare.json", small)
        try:
            return _prepare_all(src, dst, files, media, ffmpeg, small, workers)
        finally:
            _remove_parts(dst)


def _remove_parts(dst):
    """Delete what processes that were killed had begun to write."""
    for file in _files(dst):
        if file.endswith(PART):
            (dst / file).unlink(missing_ok=True)


def _prepare_all(src, dst, files, media, ffmpeg, small, workers):
    """`prepare`, once it is known that it can be done."""
    renamed, first, failures = {}, {}, []
    for file in media:
        stem, ending = os.path.splitext(file)
        renamed[file] = stem + (".m4a" if ending.lower() in SOUND else ".mp4")
        if first.setdefault(renamed[file], file) is not file:
            other = first[renamed[file]]
            failures.append((file, f"would become {renamed[file]}, as {other} does: rename one of the two"))
    for file in files:
        if file.lower().endswith((".csv", ".txt")) and file != "failures.csv":
            copy_list(src, dst, file, renamed)
    there = {name for name in first if (dst / name).exists()}
    todo = {name: file for name, file in first.items() if name not in there}
    tasks = [(ffmpeg, str(src / file), str(dst / name), small) for name, file in todo.items()]
    for folder in {Path(target).parent for _, _, target, _ in tasks}:
        folder.mkdir(parents=True, exist_ok=True)

    done, mute, before, after, log = 0, 0, 0, 0, dst / "failures.csv"
    bar = progress.bar(desc="preparing", total=len(first), initial=len(there), unit="file")
    with bar, open(log, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows([("path", "reason"), *failures])
        file.flush()
        with closing(processes.outcomes(encode, tasks, workers, PREPARE_LIMIT_S)) as results:
            for (_, source, target, _), result in results:
                reason, has_sound = (result.reason, False) if isinstance(result, Crash) else result
                if FULL in reason:
                    raise OSError(errno.ENOSPC, FULL, str(dst))
                if reason:
                    failures.append((Path(source).relative_to(src).as_posix(), reason))
                    lines.writerow(failures[-1])
                    file.flush()
                else:
                    done, mute = done + 1, mute + (not has_sound)
                    before, after = before + os.path.getsize(source), after + os.path.getsize(target)
                bar.update()
    size = f"{before / 1e6:,.1f} MB to {after / 1e6:,.1f} MB"
    print(f"prepared {done:,} files ({mute:,} without sound): {size}")
    if there:
        print(f"{len(there):,} were there before")
    if failures:
        example = ": ".join(failures[0])
        print(f"{len(failures):,} could not be prepared, e.g. {example}; all of them: {log}")
    else:
        log.unlink()
    return done + len(there)


def encode(ffmpeg, source, target, small):
    """Prepare one file: returns why that failed (empty: it did not) and whether it has sound.

    `target` is whole or not there.
    """
    import av  # here: a worker needs them, the command line does not

    from avid.media import MediaError, picture_of, start_of

    # a process whose command was killed may still write the same file for a while
    part = f"{target}.{os.getpid()}{PART}"
    try:
        with av.open(source, metadata_errors="ignore") as container:  # the streams that media.Media reads
            picture = picture_of(container) if target.endswith(".mp4") else None
            sound = container.streams.best("audio")
            origin_s = (container.start_time or 0) / av.time_base  # where its clock begins
            early_s = min((start_of(stream) for stream in (picture, sound) if stream), default=0.0) - origin_s
            picture, sound = (f"0:{stream.index}" if stream else None for stream in (picture, sound))
        if not picture and not sound:
            return "neither picture nor sound", False
        if early_s > CLOCK_S:
            return (
                f"its clock begins {early_s:.2f} s earlier, with a stream that is not kept: remove it",
                False,
            )
        # times as they are in the file, less this origin: some versions of ffmpeg would begin with a codec's
        # run-in instead
        inputs = ["-copyts", "-i", source, "-output_ts_offset", f"{-origin_s:.6f}"]
        if reason := _run(_command(ffmpeg, inputs, picture, sound, small, part)):
            return reason, False
        held = tuple(name for name, stream in (("video", picture), ("audio", sound)) if stream)
        read_clips("", part, 0.0, np.inf, held, config.Config())
        os.replace(part, target)
        return "", sound is not None
    except (av.FFmpegError, ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}", False
    except MediaError as error:
        return f"cannot be used once prepared: {error}", False
    finally:
        Path(part).unlink(missing_ok=True)


def _command(ffmpeg, inputs, picture, sound, small, out):
    """ffmpeg's arguments; picture, sound: the streams to take, as 0:1, or None."""
    command = [ffmpeg, "-nostdin", "-v", "error", "-y", "-threads", "1", *inputs, "-filter_threads", "1"]
    if picture:
        # the short side of the stored frame, at most its own; even numbers for 4:2:0; -2: keep the shape
        width, height = (f"max(2,trunc(min({side},{small.short_side})/2)*2)" for side in ("iw", "ih"))
        scale = f"scale=w='if(gt(iw,ih),-2,{width})':h='if(gt(iw,ih),{height},-2)'"
        command += ["-map", picture, "-vf", scale, *ENCODE_PICTURE.split(), "-g", str(small.keyint)]
    if sound:
        command += ["-map", sound, *ENCODE_SOUND.split(), "-ar", str(small.audio_rate)]
    return [*command, *WRITE.split(), out]


def _run(command):
    """Run ffmpeg; returns its complaint in one line, empty if it has none."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    lines = lines or [processes.ending(done.returncode)]
    return f"ffmpeg: {next((line for line in lines if FULL in line), lines[0])}"


def _ffmpeg(dst, small):
    """The first of PATH's and imageio-ffmpeg's program that encodes a tenth of a second as asked."""
    paths = [path] if (path := shutil.which("ffmpeg")) else []
    with suppress(ImportError, RuntimeError):  # it is not installed, or holds no program for this machine
        import imageio_ffmpeg

        paths.append(imageio_ffmpeg.get_ffmpeg_exe())
    inputs = ["-f", "lavfi", "-i", "testsrc=duration=0.1", "-f", "lavfi", "-i", "sine=duration=0.1"]
    trial, complaints = dst / f"trial{PART}", []
    for path in paths:
        try:
            reason = _run(_command(path, inputs, "0:0", "1:0", small, str(trial)))
        finally:
            trial.unlink(missing_ok=True)
        if not reason:
            return path
        complaints.append(f"{path} cannot encode this way: {reason}")
    why = "; ".join(complaints) or "no ffmpeg on PATH"
    remedy = "Install ffmpeg 5.1 or newer, with libx264 and aac, or: pip install imageio-ffmpeg"
    raise DataError(f"{why}. {remedy}")


def _same_settings(path, small):
    """A folder holds files of one kind: its prepare.json says which."""
    if not path.exists():
        with replacing(path) as file:
            file.write(json.dumps(small._asdict()) + "\n")
    elif (there := path.read_text(encoding="utf-8").strip()) != json.dumps(small._asdict()):
        what = f"{path.parent} holds files prepared with {there}"
        raise DataError(f"{what}; ask for the same, or name another folder")


def _files(root):
    """The files below root, relative, '/'-separated and sorted; hidden ones are left out."""
    return sorted(folder + name for folder, names in datasets.walk(root) for name in names)


def copy_list(src, dst, file, renamed):
    """Copy a list; where it is a CSV with a column `path`, relative to its folder, prepared files get their
    new endings.

    renamed: {path relative to src: path relative to dst}.
    """
    content = (src / file).read_bytes()
    if file.lower().endswith(".csv"):
        content = _new_endings(content, posixpath.dirname(file), renamed)
    with replacing(dst / file, "wb") as copy:
        copy.write(content)


def _new_endings(content, folder, renamed):
    try:
        text = io.StringIO(content.decode("utf-8-sig"), newline="")
        rows = list(csv.reader(text, skipinitialspace=True, strict=True))
    except (UnicodeDecodeError, csv.Error):
        return content  # as unreadable as it was
    header = [name.strip() for name in rows[0]] if rows else []
    if "path" not in header:
        return content
    at = header.index("path")
    for row in rows[1:]:
        if len(row) > at:
            path = row[at].strip()
            listed = posixpath.join(folder, PureWindowsPath(path).as_posix())
            name = renamed.get(posixpath.normpath(listed))
            if name:
                row[at] = os.path.splitext(path)[0] + os.path.splitext(name)[1]
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


# ----------------------------------------------------------------------------------------------- command line


def main(argv=None):
    """`python -m avid check …` and `… prepare …`.

    Exit code 0: files can be used, 1: none, 2: wrong arguments or data.
    """
    arguments = _parser().parse_args(argv)
    # an exception, as Ctrl-C is: workers end, part files go
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if arguments.command == "check":
            usable = _check(arguments)
        else:
            small = Small(arguments.short_side, arguments.keyint, arguments.audio_rate)
            usable = prepare(arguments.src, arguments.dst, small, arguments.workers)
    except (config.ConfigError, DataError, OSError) as error:
        config.stop(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(0 if usable else 1)


def _check(arguments):
    name, split = arguments.data, arguments.split
    cfg = config.load("", arguments.overrides, base={"data": {"name": name, "root": arguments.root}})
    modalities = MODALITIES[arguments.modality] if arguments.modality else datasets.DATA[name].needs
    modality = next(text for text, wanted in MODALITIES.items() if wanted == modalities)
    folder = Path(arguments.root).expanduser().resolve()  # another folder of this name has another CSV
    place = re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.name)[:40]
    place += f"-{hashlib.sha256(bytes(folder)).hexdigest()[:6]}"
    out = arguments.out or Path(f"check-{name}-{place}-{split}-{modality}.csv")
    workers = arguments.workers or max(cfg.data.workers, 1)
    return check(datasets.load(cfg.data, split), modalities, out, workers, cfg)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m avid", description=__doc__, formatter_class=cli.Help)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|prepare")

    what = "read every file of a data set once: what is usable, what is not and why, as a CSV"
    add = commands.add_parser("check", help=what, description=what, formatter_class=cli.Help).add_argument
    what = f"data set: {', '.join(datasets.UNPACKED)}"
    add("--data", required=True, choices=datasets.UNPACKED, metavar="D", help=what)
    add("--root", required=True, metavar="R", help="folder of the data set")
    add("--split", default="all", metavar="S", help="part to read (default: all)")
    needs = ", ".join(f"{name}: {row.needs[0]}" for name, row in datasets.DATA.items() if len(row.needs) == 1)
    add("--modality", choices=MODALITIES, help=f"what a usable file has (default: both; {needs})")
    add("--workers", type=cli.positive, metavar="N", help="processes (default: data.workers)")
    what = "the CSV; it is continued (default: check-D-<folder>-S-MODALITY.csv, another one a folder)"
    add("--out", type=Path, metavar="FILE.csv", help=what)
    what = "settings of train.py, for example data.subset=esc10"
    add("overrides", nargs="*", metavar="key=value", help=what)

    what = "make small copies of the media below a folder, with many key frames: they decode fast"
    add = commands.add_parser("prepare", help=what, description=what, formatter_class=cli.Help).add_argument
    add("src", metavar="SRC", help="folder of videos or sounds")
    what = "folder to write; the same command goes on where an interrupted one stopped"
    add("dst", metavar="DST", help=what)
    for option, default, metavar, what in (
        ("--short-side", Small().short_side, "PIXELS", "at most"),
        ("--keyint", Small().keyint, "FRAMES", "between key frames"),
        ("--audio-rate", Small().audio_rate, "HZ", "sample rate"),
    ):
        what += " (default: %(default)s)"
        add(option, type=cli.positive, default=default, metavar=metavar, help=what)
    what = "processes (default: the processors)"
    add("--workers", type=cli.positive, default=os.cpu_count(), metavar="N", help=what)
    return parser


if __name__ == "__main__":
    main()
