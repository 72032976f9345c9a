"""Your own videos and sounds: their embeddings in one file, and which of them are like a query.

    python -m avid embed  --ckpt runs/toy/last.pt videos --out features.npz
    python -m avid search --ckpt runs/toy/last.pt videos dog.mp4 --page found.html
    python -m avid search --ckpt runs/toy/last.pt features.npz bark.wav --by audio

FILES are a folder; a list, .csv with a column path or .txt with a path a line, relative to the list; or
files. A folder with a manifest.csv is read by it. Nothing needs a label, and a file may have a picture
alone or a sound alone.

In: a checkpoint, files, a query. Out: features.npz or features.parquet; a table, a page.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np

from avid import cli, config, datasets, files, progress
from avid.files import ConfigError

from . import page

FORMATS = {".npz": "npz", ".parquet": "parquet"}  # ending → format
PART_FILES = 256  # at most, in a part of an unfinished file
VERSION = 2  # of what the file holds


# ------------------------------------------------------------------------------------------ the command line


def command_line(argv=None):
    """The arguments, of which `table` has the files, unless they are those of a .npz. Ends the program
    where they cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m avid", description=__doc__, formatter_class=cli.Help)
    commands = parser.add_subparsers(dest="command", required=True, metavar="embed|search")

    what = "embeddings of files, in one file; the same command goes on where an interrupted one stopped"
    add = commands.add_parser("embed", help=what, description=what, formatter_class=cli.Help).add_argument
    _common(add)
    add("files", nargs="+", metavar="FILES", help="a folder, a list, or files")
    add("--out", required=True, type=Path, metavar="FILE", help="file to write, .npz or .parquet")
    add("--format", choices=FORMATS.values(), help="default: by the ending of --out")

    what = "files that are like a query: by picture, by sound, and from one to the other"
    add = commands.add_parser("search", help=what, description=what, formatter_class=cli.Help).add_argument
    _common(add)
    add("files", metavar="FILES", help="a folder, a list, or what `embed` wrote as .npz")
    add("query", nargs="+", metavar="QUERY", help="a file with a picture, a sound, or both")
    add("-k", type=cli.positive, default=12, help="files to find (default: 12)")
    what = "what of the query counts: video, audio, or auto: all that it has (default)"
    add("--by", choices=("video", "audio", "auto"), default="auto", help=what)
    add("--page", type=Path, metavar="FILE.html", help="also write a page that plays what was found")
    what = "folder that keeps the embeddings of FILES (default: beside the checkpoint)"
    add("--out", type=Path, metavar="DIR", help=what)

    arguments = cli.evaluation(parser, argv)
    try:
        if arguments.command == "embed":
            arguments.table = listing(arguments.files)
            arguments.format = file_format(arguments.out, arguments.format)
            files.check_folder(arguments.out.parent)
        else:
            written = arguments.files.lower().endswith(".npz")
            arguments.table = None if written else listing([arguments.files])
            if arguments.page:
                page.check_page(arguments.page)
    except (ConfigError, datasets.DataError) as error:
        config.stop(error)
    return arguments


def _common(add):
    add("--ckpt", required=True, metavar="PATH|random", help="a checkpoint; random: an untrained network")
    add("--cfg", metavar="FILE", help="a configuration that changes the checkpoint's settings")
    what = "a setting to change, such as eval.clips=20; may be given several times"
    add("--set", action="append", default=[], metavar="key=value", help=what)
    workers = min(8, os.cpu_count())
    what = "decoding processes (default: the processors, at most 8)"
    add("--workers", type=cli.positive, default=workers, metavar="N", help=what)
    add("--device", metavar="D", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")


def file_format(out, asked=None):
    """npz or parquet. Raises ConfigError where the ending does not say, or the package for it is not
    there."""
    found = asked or FORMATS.get(out.suffix.lower())
    if not found:
        raise ConfigError(f"--out {out} ends neither in .npz nor in .parquet; name --format")
    if found == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("parquet needs the package pyarrow: pip install pyarrow, or write .npz")
    return found


def listing(places):
    """The datasets.Table of a folder, a list, packed data, or files. Raises DataError where there is none."""
    place = Path(places[0])
    if len(places) > 1:
        if folders := [name for name in places if os.path.isdir(name)]:
            raise datasets.DataError(f"{folders[0]} is a folder; name one folder, or files")
        return datasets.of_files(places)

    def whole(reader):
        return reader(place, ("all",))("all")

    if (place / "pack.json").is_file():
        return whole(datasets.packed)
    if place.is_dir():
        return whole(datasets.manifest if (place / "manifest.csv").is_file() else datasets.folder)
    if not place.exists():
        raise datasets.DataError(f"no file and no folder {place}")
    if place.suffix.lower() == ".csv":
        return whole(datasets.manifest)
    if place.suffix.lower() == ".txt":
        try:
            lines = place.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise datasets.DataError(f"{place}: not UTF-8; save the list as text in UTF-8") from None
        table = datasets.of_files([line.strip() for line in lines if line.strip()])
        if not len(table):
            raise datasets.DataError(f"{place} lists no file")
        return dataclasses.replace(table, name=place.name, root=place.parent)
    return datasets.of_files(places)


def labels_of(table):
    """The class of each of a table's files, N texts, empty where it has none; of several, all of them."""
    if table.labels.ndim == 1:
        return [table.classes[label] if label >= 0 else "" for label in table.labels]
    return [", ".join(table.classes[i] for i in np.flatnonzero(row)) for row in table.labels]


# ------------------------------------------------------------------------------------------------ embeddings


def settings_of(model):
    """The settings that decide what a model makes of a file."""
    return {
        part: dataclasses.asdict(getattr(model.cfg, part)) for part in ("video", "audio", "model", "eval")
    }


def mark_of(model, table, *more):
    """32 hex digits of all that decides the embeddings of a table: network, settings, and the files' names
    and state."""
    states = [files.state(path) for path in datasets.sources(table)]
    content = [VERSION, model.hash, settings_of(model), os.path.abspath(table.root), table.paths, states]
    content += [table.start_s.tolist(), table.end_s.tolist(), *more]
    content += [model.cfg.optim.amp, model.cfg.data.timeout_s]  # a file that took too long is a failure
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def embed(model, table, out, workers=0, file_format="npz"):
    """Write what an embedding.Model makes of a table's files to `out`, whole or not at all. → {path: why it
    cannot be used}

    Parts of at most PART_FILES files lie in the folder `out`.parts until all is done. After an interruption
    the same call goes on behind them, and the file has the same bytes as if nothing had happened. No more
    than a part is held in memory. An `out` that holds just this is left as it is. Raises ConfigError where
    it holds something else, MediaError where no file can be used.
    """
    about = {
        "version": VERSION,
        "mark": mark_of(model, table),
        "checkpoint_hash": model.hash,
        "root": os.path.abspath(table.root),
        "settings": settings_of(model),
    }
    if out.exists():
        return failures_of(out, file_format, about["mark"])
    folder = out.with_name(out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    with files.alone(folder):
        if out.exists():  # another command has written it meanwhile
            return failures_of(out, file_format, about["mark"])
        return embed_all(model, table, out, folder, about, workers, file_format)


def failures_of(out, file_format, mark):
    """The failures of a file that `embed` wrote; ConfigError where it holds something else."""
    there = ABOUT[file_format](out)
    if there.get("mark") != mark:
        raise ConfigError(
            f"{out} holds something else, and is not overwritten; delete it, or name another file"
        )
    return there["failures"]


def embed_all(model, table, out, folder, about, workers, file_format):
    """`embed`, once it is known that it has to be done; folder: of the parts."""
    model.calibrate(table, workers)
    size = max(PART_FILES // model.batch_size, 1) * model.batch_size
    chunks = [range(i, min(i + size, len(table))) for i in range(0, len(table), size)]
    first = mark_of(model, datasets.take(table, model.calibrates(table))) if model.untrained else ""
    parts = [folder / f"{mark_of(model, datasets.take(table, chunk), first)}.npz" for chunk in chunks]
    todo = [(chunk, path) for chunk, path in zip(chunks, parts, strict=True) if not whole(path)]
    fill(model, table, todo, workers)
    failures, listed = {path: "not on disk" for path in table.missing}, len(table) + len(set(table.missing))
    rows = []
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            rows += part["rows"].tolist()
            failures |= json.loads(str(part["failures"]))
    if not rows:
        from avid.media import MediaError

        path, reason = next(iter(failures.items()))
        raise MediaError(f"none of the {listed:,} files can be used, e.g. {files.printable(path)}: {reason}")
    WRITE[file_format](out, parts, datasets.take(table, rows), model.shapes(), about | {"failures": failures})
    shutil.rmtree(folder)
    return failures


def say(failures, table):
    """Print how many of a table's files could not be used, if any."""
    if failures:
        from avid import embedding

        print(embedding.report(failures, len(table) + len(set(table.missing))))


def whole(path):
    """Whether a part is there and as it was written: it is read, against its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def fill(model, table, todo, workers):
    """Write the parts that are missing: todo, [(rows of the table, path)]."""

    from avid import embedding

    left = [row for chunk, _ in todo for row in chunk]
    todo, seen, rows, found = iter(todo), 0, [], []
    chunk, path = next(todo, (None, None))
    with progress.bar(None, "embedding", len(table), len(table) - len(left), unit="file") as bar:
        for count, usable, part in model.parts(table, workers, left):
            seen, rows, found = seen + count, rows + usable, [*found, part]
            bar.update(count)
            if seen == len(chunk):
                part = embedding.stack(found)
                arrays = {name: getattr(part, name) for name in (*embedding.ARRAYS, "times")}
                with files.replacing(path, "wb") as file:
                    np.savez(file, rows=rows, failures=np.array(json.dumps(part.failures)), **arrays)
                seen, rows, found = 0, [], []
                chunk, path = next(todo, (None, None))


def arrays_of(parts, name):
    """The array `name` of each part in turn."""
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            yield part[name]


def parts_of(table):
    """The part of its file that each row is, s: {"start_s": n float64, "end_s": n, inf: to the end}."""
    return {"start_s": table.start_s, "end_s": table.end_s}


# one file of all parts: an array, or a part, at a time


def write_npz(out, parts, table, shapes, about):
    """video n×D, audio, video_features n×F, …, times n×K, start_s and end_s n, paths and labels n as texts;
    about: JSON. Rows are those of `table`."""
    texts = {"paths": table.paths, "labels": labels_of(table), "about": json.dumps(about)}
    with files.replacing(out, "wb") as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name in (*shapes, "times"):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                for i, array in enumerate(arrays_of(parts, name)):
                    if i == 0:
                        shape = (len(table), *array.shape[1:])
                        header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(entry, header)
                    entry.write(array.tobytes())
        for name, values in (parts_of(table) | texts).items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.array(values), allow_pickle=False)


def about_npz(path):
    """What `write_npz` wrote as `about`; empty of another file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["about"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}


def write_parquet(out, parts, table, shapes, about):
    """A row a file, or a part of one: path, label, start_s, end_s, and lists of numbers, null where the file
    lacks the modality; about: JSON, in the metadata."""
    import pyarrow as pa
    from pyarrow import parquet

    def nested(array):
        """n×…, float → fixed lists of lists; null where a row is NaN."""
        null = np.isnan(array).any(tuple(range(1, array.ndim)))
        column = pa.array(array.ravel())
        for size in array.shape[:1:-1]:
            column = pa.FixedSizeListArray.from_arrays(column, size)
        return pa.FixedSizeListArray.from_arrays(column, array.shape[1], mask=pa.array(null))

    paths = [os.fsencode(path).decode("utf-8", "replace") for path in table.paths]  # Arrow takes UTF-8 only
    texts = {"path": pa.array(paths, pa.string()), "label": pa.array(labels_of(table), pa.string())}
    named, at, writer = texts | {name: pa.array(x) for name, x in parts_of(table).items()}, 0, None
    with files.replacing(out, "wb") as file:
        for path in parts:
            with np.load(path, allow_pickle=False) as part:
                columns = {name: nested(part[name]) for name in (*shapes, "times")}
            rows = slice(at, at := at + len(columns["times"]))
            lines = pa.table({name: x[rows] for name, x in named.items()} | columns)
            lines = lines.replace_schema_metadata({"avid": json.dumps(about)})
            writer = writer or parquet.ParquetWriter(file, lines.schema)
            writer.write_table(lines)
        writer.close()


def about_parquet(path):
    """What `write_parquet` wrote as `about`; empty of another file."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return json.loads((parquet.read_schema(path).metadata or {}).get(b"avid", b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}


WRITE = {"npz": write_npz, "parquet": write_parquet}
ABOUT = {"npz": about_npz, "parquet": about_parquet}


# ---------------------------------------------------------------------------------------------------- search


def unit(x):
    """Rows of unit length, float32; NaN rows stay NaN."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ranked(query, collection, of, to, k, skip=()):
    """The files whose modality `to` is most like the query's modality `of`, best first.

    query: the embedding.Embedding of one file; collection: arrays as `write_npz` has them; skip: rows that
    do not count. Within a modality features are compared, across them embeddings, as in eval_retrieval.py;
    of each file found, the clip is told that is most like the query. → rows, cosines, and when their clips
    begin, s: three arrays of at most k
    """
    what = "_features" if of == to else ""
    # n, NaN where a file has no `to`
    similarity = unit(collection[to + what]) @ unit(getattr(query, of + what))
    similarity[list(skip)] = np.nan
    rows = np.argsort(-similarity, kind="stable")[:k]  # NaN comes last
    rows = rows[~np.isnan(similarity[rows])]
    clip = (collection[f"{to}_clips"][rows] @ getattr(query, of)).argmax(1)
    return rows, similarity[rows], collection["times"][rows, clip]


def read(path, model):
    """What `embed` wrote for this embedding.Model: ({name: array}, about). Raises ConfigError where it is
    something else."""
    about = about_npz(path)
    if about.get("version") != VERSION:
        raise ConfigError(f"{path} is no file that this version's `python -m avid embed` wrote as .npz")
    if about["checkpoint_hash"] != model.hash or about["settings"] != settings_of(model):
        raise ConfigError(
            f"{path} was made by another network or with other settings ({about['checkpoint_hash']}; "
            f"this one is {model.hash}); name that checkpoint, or the folder of the files instead"
        )
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}, about


def search(arguments, model):
    """Embed the files, unless that was done before, and the queries; print what was found, and write the
    page."""
    path, table = Path(arguments.files), arguments.table
    if arguments.page and table is not None:
        page.check_files(table)
    if table is None and model.untrained:
        raise ConfigError(
            "an untrained network takes its statistics from files: name a folder or a list, not a .npz"
        )
    if table is not None:
        folder = arguments.out or (Path("runs/random") if model.untrained else Path(arguments.ckpt).parent)
        files.check_folder(folder)
        path = folder / "features" / f"search-{mark_of(model, table)[:16]}.npz"
        failures = embed(model, table, path, arguments.workers)
        say(failures, table)
        model.calibrate(table, arguments.workers)
    collection, about = read(path, model)
    root = Path(about["root"])
    print(f"{counted(collection)}, their embeddings: {path}")
    places = [os.path.realpath(root / name) for name in collection["paths"]]
    sections = []
    for name in arguments.query:
        query, lists = model.embed(name), []
        own = np.flatnonzero([place == os.path.realpath(name) for place in places])
        pairs = [
            (of, to)
            for of, to in page.FOUND
            if getattr(query, of) is not None and arguments.by in (of, "auto")
        ]
        if not pairs:
            lacks, other = ("picture", "audio") if arguments.by == "video" else ("sound", "video")
            raise ConfigError(f"{name} has no {lacks}; use --by {other}")
        for of, to in pairs:
            found = ranked(query, collection, of, to, arguments.k, own if of == to else ())
            lists.append((of, to, [*zip(*found, strict=True)]))
            print(f"\n{files.printable(name)}: {page.FOUND[of, to].lower()}")
            show(collection, lists[-1][2])
        sections.append((name, own, lists))
    if arguments.page:
        subtitle = f"{counted(collection)}, below {root}; checkpoint {arguments.ckpt}"
        page.write_found(
            arguments.page, "What was found", subtitle, on_page(sections, collection, root, model.cfg)
        )
        print(f"\nwritten: {arguments.page}")


def counted(collection):
    """How many files a collection has, in words."""
    rows, paths = len(collection["paths"]), len(set(collection["paths"].tolist()))
    return f"{paths:,} files" if rows == paths else f"{rows:,} clips of {paths:,} files"


def name_of(collection, row):
    """How a row of a collection is named: its path and, where it is a part of a file, which part."""
    return datasets.instance_name(*(collection[name][row].item() for name in ("paths", "start_s", "end_s")))


def on_page(sections, collection, root, cfg):
    """What `search` found as page.write_found takes it."""
    for name, own, lists in sections:
        label = str(collection["labels"][own[0]]) if len(own) else ""
        query = page.look(name, 0.0, cfg, whole=True, name=Path(name).name, label=label)
        found = []
        for of, to, finds in lists:
            shown = []
            for rank, (row, score, time_s) in enumerate(finds, 1):
                path, theirs = str(collection["paths"][row]), str(collection["labels"][row])
                same = theirs == label if label and theirs else None
                more = {"label": theirs, "score": score, "same": same, "rank": rank}
                shown.append(page.look(root / path, time_s, cfg, name=name_of(collection, row), **more))
            found.append((page.FOUND[of, to], shown))
        yield query, found


def show(collection, found):
    """Print what was found, a line a file."""
    labels = [str(collection["labels"][row]) for row, _, _ in found]
    width = max(map(len, [*labels, "class"])) if any(labels) else 0
    print(f"{'rank':>4}  {'score':>6}  {'at':>8}  " + f"{'class':{width}}  " * bool(width) + "file")
    for rank, ((row, score, time_s), label) in enumerate(zip(found, labels, strict=True), 1):
        of_class = f"{label:{width}}  " if width else ""
        name = files.printable(name_of(collection, row))
        print(f"{rank:>4}  {score:6.3f}  {page.clock(time_s):>8}  {of_class}{name}")
    if not found:
        print("   no file has one")


def main(argv=None):
    arguments = command_line(argv)
    from avid import embedding, evaluation

    with evaluation.plain_errors():
        model = embedding.load(arguments.ckpt, arguments.device, arguments.cfg, arguments.set)
        if arguments.command == "search":
            search(arguments, model)
            return
        failures = embed(model, arguments.table, arguments.out, arguments.workers, arguments.format)
        say(failures, arguments.table)
        print(f"written: {arguments.out}")
