"""Where the videos are: one short reader per benchmark layout, all giving the same table.

In: a `config.Data` (name, root, label, subset) and the split to read. Nothing is decoded.
Out: a `Table` of paths, labels and classes, and of what the lists name and the disk lacks.
"""

import csv
import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

MEDIA = ".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .wmv .flv .3gp .wav .flac .ogg .opus .mp3 .m4a .aac .wma".split()
SPELLED = {"validate": "val", "validation": "val"}  # other names of a split
PARTS = {"train", "val", "test", *SPELLED}


class DataError(Exception):
    """Data that cannot be used: which file and why, and the layout expected where that is at fault."""


class Misplaced(DataError):
    """A list or the files are not where the layout has them; `load` adds the layout."""


class Row(NamedTuple):  # what one line of a list says about one file
    at: tuple  # the list's path and the line
    file: str  # as `on_disk` names it, see _table
    label: str | tuple = ""  # empty: unlabelled; a tuple where a file has several (AudioSet)
    split: str = ""  # empty: belongs to every split
    fold: int = 0
    start_s: float = 0.0
    end_s: float = np.inf
    columns: dict = {}  # noqa: RUF012 (nobody writes to it)


@dataclass
class Table:
    name: str  # data set and split
    root: Path
    paths: list[str]  # N, relative to root, '/'-separated, no two alike
    labels: np.ndarray  # N int64, −1: unlabelled; AudioSet: N×C uint8, 1: the class is present
    classes: list[str]  # C, sorted, the same for every split
    start_s: np.ndarray  # N float64, the part of the file to use
    end_s: np.ndarray  # N float64, inf: to its end
    fold: np.ndarray  # N int64, the official fold from 1 on (ESC-50); 0: none
    columns: dict[str, list[str]]  # the list's other columns, N each
    missing: list[str]  # listed, not on disk

    def __len__(self):
        return len(self.paths)

    def report(self):
        """One line: how much there is, how much is missing and, for example, what."""
        text = f"{self.name}: {len(self):,} files, {len(self.classes) or 'no'} classes"
        lacking = (
            f"; {len(self.missing):,} more are listed and not on disk, e.g. {', '.join(self.missing[:3])}"
        )
        return text + lacking if self.missing else text


def load(data, split):
    """The table of `split` of the data set that `data`, a `config.Data`, names.

    split: train, val or test as far as the data set has them, or all. UCF101, HMDB51 and ESC-50 number theirs (train2;
    without a number the first). The toy's data.root is the folder that `toy.write` returned. Raises DataError.
    """
    row, root = DATA[data.name], Path(data.root).expanduser()
    if data.subset not in ("", "esc10") or (data.subset and row.reader is not esc50):
        raise DataError(
            f"data.subset={data.subset}: {data.name} has none of that name; esc10 of esc50 is the only one"
        )
    try:
        return row.reader(root, split, **row.options(data))
    except (Misplaced, OSError) as error:
        raise DataError(
            f"{error}\nexpected, with root = data.root = {root}:\n{inspect.getdoc(row.reader)}"
        ) from None


def take(table, positions):
    """The rows at `positions` (indices or a mask), in that order; the classes keep their numbers."""
    at = np.arange(len(table))[positions]
    arrays = {key: getattr(table, key)[at] for key in ("labels", "start_s", "end_s", "fold")}
    columns = {key: [values[i] for i in at] for key, values in table.columns.items()}
    return replace(table, paths=[table.paths[i] for i in at], columns=columns, missing=[], **arrays)


def same_class(query, gallery):
    """`matches` of evaluation.recall: does a query share a class with what it found? Labels n and m (−1: none), or n×C and m×C of 0 and 1."""
    if query.ndim > 1:
        return lambda q, f: (query[q] & gallery[f]).any(-1)
    return lambda q, f: (query[q] == gallery[f]) & (query[q] >= 0)


def manifest(root, split, label="label"):
    """
    root/manifest.csv     with a header; or root is the CSV itself
        path,label,split,start,end,…
        videos/a.mp4,dog,train,0,10,…
    root/videos/a.mp4     paths are relative to the CSV's folder

    Only path is required. Rows without a split belong to every split, start and end are in s and may be empty.
    `label` names the column of the classes. All columns but path, start and end are kept in `columns`.
    """
    path, rows = root if root.suffix.lower() == ".csv" else root / "manifest.csv", []
    for at, row in _csv(path, ["path"] if label == "label" else ["path", label]):
        file, class_name = (
            PureWindowsPath(row["path"]).as_posix(),
            row.get(label, ""),
        )  # either separator, none doubled
        start_s, end_s = (
            _number(row[key], at) if row.get(key) else none for key, none in (("start", 0.0), ("end", np.inf))
        )
        if start_s >= end_s:
            raise _wrong(at, f"start {start_s:g} s is not before end {end_s:g} s")
        columns = {key: value for key, value in row.items() if key not in ("path", "start", "end")}
        rows.append(_below_root(Row(at, file, class_name, row.get("split", ""), 0, start_s, end_s, columns)))
    if not rows:
        raise Misplaced(f"{path} lists no file")
    folders = {row.file.rpartition("/")[0] for row in rows}
    files = [
        f"{folder}/{name}".lstrip("/")
        for folder in folders
        for name in _listing(path.parent / folder, depth=0)
    ]
    return _table(
        f"{path.parent.name}/{path.name} {split}", path.parent, split, rows, {file: file for file in files}
    )


def folder(root, split, name="folder"):
    """
    root/<class>/<file>              or, without classes, root/<file>
    root/train/<class>/<file>        or in parts: train, val (also validate, validation), test
    root/test/<class>/<file>

    Without parts every split is the whole folder: nothing is held out. Folders beside the parts are left out.
    """
    rows, split = [], SPELLED.get(split, split)
    files = [file for file in _listing(root) if os.path.splitext(file)[1].lower() in MEDIA]
    tops = {file.partition("/")[0] for file in files if "/" in file}
    parts = (
        tops & PARTS if tops <= PARTS or len(tops & PARTS) > 1 else set()
    )  # else a class that is called train
    for file in files:
        part, _, below = file.partition("/") if parts else ("", "", file)
        if part in parts or not parts:
            rows.append(
                Row((root, 0), file, below.rpartition("/")[0].partition("/")[0], SPELLED.get(part, part))
            )
    return _table(f"{name} {split}", root, split, rows, {row.file: row.file for row in rows})


def kinetics(root, split, name="kinetics400"):
    """
    root/annotations/train.csv                             or root/train.csv, root/kinetics400_train.csv;
        label,youtube_id,time_start,time_end,split         val may be called validate or validation
    root/train/<class>/<youtube_id>_000010_000020.mp4      or root/train/<file>, or below root

    Kinetics-600 and -700 likewise. Without any CSV: root/train/<class>/<file>.
    """
    rows, split = [], SPELLED.get(split, split)
    for part in sorted(PARTS):
        paths = (
            root / place / f"{prefix}{part}.csv"
            for place in ("annotations", ".")
            for prefix in ("", f"{name}_")
        )
        path = next(filter(Path.is_file, paths), None)
        for at, row in _csv(path, ["youtube_id", "time_start", "time_end"]) if path else ():
            start_s, end_s = _number(row["time_start"], at), _number(row["time_end"], at)
            file = f"{row['youtube_id']}_{start_s:06.0f}_{end_s:06.0f}"
            rows.append(
                Row(at, file, row.get("label", ""), SPELLED.get(part, part))
            )  # test lists may have no label
    if not rows and any((root / part).is_dir() for part in PARTS):
        return folder(root, split, name)
    on_disk = _by_stem(root, [part for part in sorted(PARTS) if SPELLED.get(part, part) == split])
    return _table(f"{name} {split}", root, split, rows, on_disk)


def vggsound(root, split):
    """
    root/vggsound.csv                         without a header; splits train and test
        <youtube_id>,30,"label, of the clip",train
    root/video/<youtube_id>_000030.mp4        or below root
    """
    rows = []
    for at, row in _csv(root / "vggsound.csv", columns=["youtube_id", "start", "label", "split"]):
        file = f"{row['youtube_id']}_{_number(row['start'], at):06.0f}"
        rows.append(Row(at, file, row["label"], row["split"]))
    return _table(f"vggsound {split}", root, split, rows, _by_stem(root, ["video"]))


def audioset(root, split):
    """
    root/class_labels_indices.csv             index,mid,display_name
    root/balanced_train_segments.csv          as published; also unbalanced_train_segments.csv, eval_segments.csv
        # three lines of comment
        <youtube_id>, 30.000, 40.000, "/m/09x0r,/m/05zppz"
    root/balanced_train_segments/<file>       or below root; the 10 s cut out: <youtube_id>_000030.mp4 (start in s),
                                              <youtube_id>_30000_40000.mp4 (start and end in ms) or <youtube_id>.mp4

    Splits: balanced_train, unbalanced_train, train (what there is of the two), eval or test, all.
    """
    train, rows = ("balanced_train", "unbalanced_train"), []
    parts = {"train": train, "test": ("eval",), "all": (*train, "eval")}.get(split, (split,))
    lists = [path for part in parts if (path := root / f"{part}_segments.csv").is_file()]
    names = {
        r["mid"]: r["display_name"]
        for _, r in _csv(root / "class_labels_indices.csv", ["mid", "display_name"])
    }
    on_disk = _by_stem(root, [path.stem for path in lists])
    for path in lists:
        for at, row in _csv(path, columns=["youtube_id", "start", "end", "labels"], comment="#"):
            start_s, end_s, video = _number(row["start"], at), _number(row["end"], at), row["youtube_id"]
            stems = f"{video}_{start_s:06.0f}", f"{video}_{start_s * 1000:.0f}_{end_s * 1000:.0f}", video
            labels = [names.get(mid.strip()) for mid in row["labels"].split(",")]
            if None in labels:
                raise _wrong(at, f"a label of {row['labels']} is not in class_labels_indices.csv")
            rows.append(Row(at, next((stem for stem in stems if stem in on_disk), stems[0]), tuple(labels)))
    return _table(f"audioset {split}", root, split, rows, on_disk, sorted(set(names.values())))


def ucf101(root, split):
    """
    root/ucfTrainTestlist/trainlist01.txt                      ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
    root/ucfTrainTestlist/testlist01.txt                       ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    root/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi   or root/ApplyEyeMakeup/…; other endings will do

    Splits: train1, test1, … test3; all.
    """
    (split, number, title), lists, rows = _numbered(split, 3), root / "ucfTrainTestlist", []
    for part in ("train", "test"):
        for at, line in _lines(lists / f"{part}list{number:02d}.txt"):
            stem = os.path.splitext(line.split()[0])[0]
            if stem.count("/") != 1:
                raise _wrong(at, f"{line!r} where <class>/<file> belongs")
            rows.append(Row(at, stem, stem.partition("/")[0], part))
    return _table(f"ucf101 {title}", root, split, rows, _by_stem(root, ["UCF-101"], parts=2))


def hmdb51(root, split):
    """
    root/testTrainMulti_7030_splits/brush_hair_test_split1.txt     <name>.avi 1      (1: train, 2: test, 0: neither)
    root/brush_hair/<name>.avi                                     or root/hmdb51_org/…; other endings will do

    Splits: train1, test1, … test3; all, with what the split leaves out.
    """
    (split, number, title), lists, rows = _numbered(split, 3), root / "testTrainMulti_7030_splits", []
    part, tail = {"0": "neither", "1": "train", "2": "test"}, f"_test_split{number}.txt"
    for path in sorted(lists.glob(f"*{tail}")):
        label = path.name.removesuffix(tail)
        for at, line in _lines(path):
            file, _, use = line.rpartition(" ")
            if not file or use not in part:
                raise _wrong(at, f"{line!r} where a file and 0, 1 or 2 belong")
            rows.append(Row(at, f"{label}/{os.path.splitext(file.strip())[0]}", label, part[use]))
    return _table(f"hmdb51 {title}", root, split, rows, _by_stem(root, ["hmdb51_org"], parts=2))


def esc50(root, split, subset=""):
    """
    root/meta/esc50.csv                filename,fold,target,category,esc10,src_file,take
    root/audio/1-100032-A-0.wav        other endings will do

    Splits: test1 is fold 1 and train1 the other four, … test5; all. data.subset=esc10: the 10 classes of ESC-10.
    """
    (split, number, title), rows = _numbered(split, 5), []
    for at, row in _csv(root / "meta" / "esc50.csv", ["filename", "fold", "category", "esc10"]):
        if row["fold"] not in list("12345"):
            raise _wrong(at, f"fold {row['fold']!r} where 1 to 5 belongs")
        fold, stem = int(row["fold"]), os.path.splitext(row["filename"])[0]
        if not subset or row["esc10"] == "True":
            rows.append(
                Row(at, stem, row["category"], "test" if fold == number else "train", fold, columns=row)
            )
    return _table(f"{subset or 'esc50'} {title}", root, split, rows, _by_stem(root, ["audio"]))


class DataSet(NamedTuple):
    """One row of the table of data sets: all that the rest of the project asks about one."""

    reader: Callable  # (root, split, …) → Table; its docstring shows the layout
    modalities: tuple = ("video", "audio")  # what its files hold
    needs: tuple = ("video", "audio")  # what a file must have to be usable
    evaluation: str = "test"  # the split that results are reported on
    divisions: int = 0  # official divisions into train1, test1, …; 0: one division, without a number
    options: Callable = lambda data: {}  # config.Data → what the reader is told besides root and split


_KINETICS = DataSet(kinetics, evaluation="val", options=lambda data: {"name": data.name})
DATA = {
    "toy": DataSet(manifest, options=lambda data: {"label": data.label}),
    "folder": DataSet(folder),
    "manifest": DataSet(manifest, options=lambda data: {"label": data.label}),
    "kinetics400": _KINETICS,
    "kinetics600": _KINETICS,
    "kinetics700": _KINETICS,
    "vggsound": DataSet(vggsound),
    "audioset": DataSet(audioset),
    "ucf101": DataSet(ucf101, needs=("video",), divisions=3),  # half of its videos have sound
    "hmdb51": DataSet(hmdb51, needs=("video",), divisions=3),
    "esc50": DataSet(
        esc50, ("audio",), ("audio",), divisions=5, options=lambda data: {"subset": data.subset}
    ),
}


def _table(name, root, split, rows, on_disk, classes=None):
    """The table of those rows of `split` whose file is in `on_disk`: {file as rows name it: path relative to root}."""
    first = {}
    for row in rows:
        if row.file not in on_disk:
            _below_root(row)
    if again := [row for row in rows if first.setdefault(row.file, row) is not row]:
        (path, line), others = (
            first[again[0].file].at,
            f" ({len(again) - 1:,} more such lines)" if again[1:] else "",
        )
        raise _wrong(
            again[0].at, f"{again[0].file} again, as in {path.name}, line {line}{others}; keep one of them"
        )
    if classes is None:  # of all rows, so that every split numbers them alike
        classes = sorted({row.label for row in rows} - {""})
    chosen = [row for row in rows if split == "all" or row.split in ("", split)]
    here = [row for row in chosen if row.file in on_disk]
    if rows and not chosen:
        raise Misplaced(
            f"{name}: no such split in {root}, only {', '.join(sorted({row.split for row in rows}))}"
        )
    if not here:
        none = (
            f"none of the {len(chosen):,} listed files, e.g. {chosen[0].file}, is"
            if chosen
            else "no list or file"
        )
        raise Misplaced(f"{name}: {none} in {root}" + ("" if root.exists() else ", which does not exist"))
    index = {label: i for i, label in enumerate(classes)} | {"": -1}
    if isinstance(here[0].label, tuple):
        labels = np.zeros((len(here), len(classes)), np.uint8)  # N×C
        for i, row in enumerate(here):
            labels[i, [index[label] for label in row.label]] = 1
    else:
        labels = np.array([index[row.label] for row in here], np.int64)  # N
    paths, missing = (
        [on_disk[row.file] for row in here],
        [row.file for row in chosen if row.file not in on_disk],
    )
    start_s, end_s = np.array([(row.start_s, row.end_s) for row in here]).T  # N each
    fold = np.array([row.fold for row in here], np.int64)  # N
    columns = {key: [row.columns[key] for row in here] for key in here[0].columns}
    return Table(name, root, paths, labels, classes, start_s, end_s, fold, columns, missing)


def _below_root(row):
    """The row, whose file a list may not place outside of the data root. Links within it lead where its owner has them lead."""
    if row.file in ("", ".") or row.file.startswith("/") or row.file[1:2] == ":" or "/../" in f"/{row.file}/":
        raise _wrong(
            row.at, f"{row.file!r} is not a path below the data root; give a relative one without .."
        )
    return row


def _listing(folder, depth=4):
    """The files below `folder`, '/'-separated and sorted, at most `depth` folders down; hidden ones are left out.
    One scan a folder instead of a look at every file: Kinetics has 240,000. A folder that does not exist is empty."""
    files = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else ():
        if not entry.name.startswith(".") and not entry.is_dir():
            files.append(entry.name)
        elif not entry.name.startswith(".") and depth:
            files += [f"{entry.name}/{file}" for file in _listing(folder / entry.name, depth - 1)]
    return files


def _by_stem(root, folders, parts=1):
    """{last `parts` parts of the path, without ending: path relative to root} of the media files in those of `folders`
    that exist, or else in root. Of two endings of one stem, the one that comes first in MEDIA is used."""
    found, rank = {}, {ending: rank for rank, ending in enumerate(MEDIA)}
    for folder in [folder for folder in folders if (root / folder).is_dir()] or ["."]:
        for file in _listing(root / folder):
            path = file if folder == "." else f"{folder}/{file}"
            stem, ending = os.path.splitext("/".join(file.split("/")[-parts:]))
            if (ending := ending.lower()) in rank and (stem not in found or rank[ending] < found[stem][0]):
                found[stem] = rank[ending], path
    return {stem: path for stem, (_, path) in found.items()}


def _lines(path):
    """((path, line number), text) of every line that is not empty."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise Misplaced(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _wrong(
            (path, content.count(b"\n", 0, error.start) + 1), "not UTF-8; save the list as text in UTF-8"
        ) from None
    if "\0" in text:
        raise _wrong(
            (path, text.count("\n", 0, text.index("\0")) + 1), "a zero byte; save the list as text in UTF-8"
        )
    return [((path, i), line.strip()) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _csv(path, needs=(), columns=None, comment=None):
    """((path, line number), {column: value}) of every row. `needs`: columns the header must have; `columns`: no header.
    A field cannot hold a line break, so that an open quote is an error of its own line."""
    for at, line in _lines(path):
        if comment and line.startswith(comment):
            continue
        try:
            row = [value.strip() for value in next(csv.reader([line], strict=True, skipinitialspace=True))]
        except csv.Error as error:
            raise _wrong(
                at,
                f"not CSV: {error}; put a field with a comma or a quote in quotes, and double quotes within",
            ) from None
        if columns is None:
            columns = row
            if lacking := [need for need in needs if need not in columns]:
                raise _wrong(at, f"no column {lacking[0]}; there are {', '.join(columns)}")
            if twice := [name for name in columns if columns.count(name) > 1]:
                raise _wrong(at, f"two columns {twice[0]!r}; rename one")
        elif len(row) != len(columns):
            raise _wrong(at, f"{len(row)} fields where {len(columns)} belong: {', '.join(columns)}")
        else:
            yield at, dict(zip(columns, row, strict=True))


def _number(text, at):
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text) or math.isinf(float(text)):
        raise _wrong(at, f"{text!r} where a number from 0 on belongs")
    return float(text)


def _numbered(split, most):
    """("train", 2, "train2") of train2: the split, its number, 1 where none is given, and the two as a title."""
    part = split.rstrip("12345"[:most])
    number = split[len(part) :] or "1"
    if part not in ("train", "test", "all") or len(number) > 1:
        raise DataError(f"no split {split}; there are train1, test1 and so on up to {most}, and all")
    return part, int(number), "all" if part == "all" else part + number


def _wrong(at, cause):
    cause = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cause)
    return DataError(
        f"{at[0]}, line {at[1]}: {cause if len(cause) < 400 else f'{cause[:200]} … {cause[-100:]}'}"
    )
