"""Where the videos are: one short reader per benchmark layout, all giving the same table.

In: a `config.Data` (name, root, label, subset) and the splits to read. Nothing is decoded. Out: a `Table` of
each split's instances, each a file and the part of it to use, with labels and classes, and of what the lists
name and the disk lacks.

Lists are read a few thousand lines at a time, and column by column: 2 million lines take seconds.
"""

import contextlib
import csv
import functools
import gc
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np

MEDIA = ".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .wmv .flv .3gp .ts .mts .m2ts .ogv".split()
MEDIA += ".wav .flac .ogg .opus .mp3 .m4a .aac .wma".split()
ENDINGS = set(MEDIA)
SPELLED = {
    "training": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
}  # other names of a split
SPELLED |= {"testing": "test", "eval": "test", "evaluation": "test"}
PARTS = sorted({*SPELLED, *SPELLED.values()})
PART = re.compile(rf"({'|'.join(PARTS)})([ _-]?(set|split|\d+\w*))?", re.IGNORECASE)  # name of a folder
PIECE = 1 << 17  # characters of a list, or rows, at a time


class DataError(Exception):
    """Data that cannot be used: which file and why, and the layout expected where that is at fault."""


class Misplaced(DataError):
    """A list or the files are not where the layout has them; `load` adds the layout."""


class NoSplit(Misplaced):
    """The data set is there, but not this split of it."""


class Codes(dict):
    """{word: code}, the next one for a word that is new: a column of which few differ is kept as numbers."""

    def __missing__(self, word):
        return self.setdefault(word, len(self))


class Rows:
    """What lists say about their files: n rows, a column each, filled piece by piece.

    on_disk: {file as rows name it: path relative to root}, where the rows that are added next are looked up.
    """

    def __init__(self, on_disk=None):
        self.on_disk = on_disk or {}
        self.paths, self.missing = [], {}  # n, None where the file is not on disk; {row: file} of those
        self.labels, self.splits = Codes(), Codes()  # split "": belongs to every split
        self.numbers = {"label": [], "split": [], "start_s": [], "end_s": [], "fold": []}  # n each, in pieces
        self.columns = {}  # {name: n texts}
        self.lists = []  # (path of the list, the rows' lines in it), in pieces

    def add(
        self,
        path,
        lines,
        files,
        label="",
        split="",
        start_s=0.0,
        end_s=np.inf,
        fold=0,
        columns=None,
        other=None,
    ):
        """Rows of one list; what all of them share is given once. other: k → other names of the k-th file."""
        n, before = len(files), len(self.paths)
        found = [*map(self.on_disk.get, files)]
        if other and None in found:
            for k in [k for k, file in enumerate(found) if file is None]:
                found[k] = next(filter(None, map(self.on_disk.get, other(k))), None)
        if None in found:
            self.missing |= {before + k: file for k, file in enumerate(files) if found[k] is None}
        self.paths += found
        self.lists.append((path, lines))
        for name, words, codes in (("label", label, self.labels), ("split", split, self.splits)):
            shared = isinstance(words, str)
            numbers = codes[words] if shared else np.fromiter(map(codes.__getitem__, words), np.int32, n)
            self.numbers[name].append(np.broadcast_to(np.int32(numbers), n))
        for name, values in (("start_s", start_s), ("end_s", end_s), ("fold", fold)):
            self.numbers[name].append(np.broadcast_to(values, n))
        for name, values in (columns or {}).items():
            shared = {}  # of equal texts one is kept
            self.columns.setdefault(name, []).extend(map(shared.setdefault, values, values))

    def column(self, name):
        """Codes of label and split, start_s, end_s, fold of all rows (n,)."""
        return np.concatenate(self.numbers[name])

    def at(self, row):
        """(path, line) of a row."""
        for path, lines in self.lists:
            if row < len(lines):
                return path, int(lines[row])
            row -= len(lines)

    def file(self, row):
        """The path of a row's file relative to root; how the row names it where it is not on disk."""
        return self.missing.get(row, self.paths[row])

    def again(self):
        """[(a row whose instance an earlier one has, the first that has it)]."""
        files = np.fromiter(map(id, self.paths), np.int64, len(self.paths))  # a file is one object
        files[list(self.missing)] = -1 - np.array([*map(Codes().__getitem__, self.missing.values())])
        if np.diff(np.sort(files)).all():
            return []
        first, times = {}, (self.column(name).tolist() for name in ("start_s", "end_s"))
        instances = enumerate(zip(files.tolist(), *times, strict=True))
        return [(row, before) for row, key in instances if (before := first.setdefault(key, row)) != row]


@dataclass
class Table:
    """N instances: an instance is a file and the part of it to use."""

    name: str  # data set and split
    root: Path
    paths: list[str]  # N, relative to root, '/'-separated; a file may give several instances
    labels: np.ndarray  # N int64, −1: unlabelled; AudioSet: N×C uint8, 1: the class is present
    classes: list[str]  # C, sorted, the same for every split
    start_s: np.ndarray  # N float64, the part of the file to use
    end_s: np.ndarray  # N float64, inf: to its end
    fold: np.ndarray  # N int64, the official fold from 1 on (ESC-50); 0: none
    columns: dict[str, list[str]]  # the list's other columns, N each
    missing: list[str]  # listed, not on disk
    notes: list[str] = field(default_factory=list)  # what else its report says
    record: np.ndarray | None = None  # N int64 of packed data: where each lies, avid/packed.py; None: files

    def __len__(self):
        return len(self.paths)

    def report(self):
        """One line: how much there is, how much is missing and, for example, what."""
        what = f"{len(self):,} files"
        if np.any(self.start_s > 0) or np.any(self.end_s < np.inf):
            what = f"{len(self):,} clips of {len(set(self.paths)):,} files"
        notes = list(self.notes)
        if self.missing:
            some = ", ".join(self.missing[:3])
            notes.insert(0, f"{len(self.missing):,} more are listed and not on disk, e.g. {some}")
        return "; ".join([f"{self.name}: {what}, {len(self.classes) or 'no'} classes", *notes])

    def name_of(self, row):
        """How reports name an instance."""
        return instance_name(self.paths[row], self.start_s[row], self.end_s[row])


def instance_name(path, start_s=0.0, end_s=np.inf):
    """How reports name an instance, no two alike: a.mp4, or a.mp4 [12.0-22.0 s] where it is a part."""
    if start_s == 0 and end_s == np.inf:
        return path
    return f"{path} [{float(start_s)}-{'end' if end_s == np.inf else f'{float(end_s)} s'}]"


def load(data, split):
    """The table of `split` of the data set that `data`, a `config.Data`, names.

    split: train, val or test as far as the data set has them, or all. UCF101, HMDB51 and ESC-50 number theirs
    (train2; without a number the first). The toy's data.root is the folder that `toy.write` returned. Raises
    DataError.
    """
    return read(data, split)(split)


def read(data, *splits):
    """A function, split → its table as of `load`, for these splits: lists and folders are read once for all.

    Numbered splits are of one division. Raises DataError, and so does the function.
    """
    row, root = DATA[data.name], Path(data.root).expanduser()
    if data.subset not in ("", *row.subsets):
        there = ", ".join(f"{subset} of {name}" for name, other in DATA.items() for subset in other.subsets)
        raise DataError(f"data.subset={data.subset}: {data.name} has none of that name; there is {there}")

    @contextlib.contextmanager
    def reading():
        collecting = gc.isenabled()
        gc.disable()  # rows have no cycles, and to look for some among millions takes a third of the time
        try:
            yield
        except (Misplaced, OSError) as error:
            layout = f"expected, with root = data.root = {root}:\n{inspect.getdoc(row.reader)}"
            raise (NoSplit if isinstance(error, NoSplit) else DataError)(f"{error}\n{layout}") from None
        finally:
            if collecting:
                gc.enable()

    with reading():
        table = row.reader(root, splits, **row.options(data))
    return reading()(table)


def of_files(paths, root="", start_s=0.0, end_s=np.inf):
    """The table of some files, without classes; paths are relative to root ("": the working folder)."""
    paths = [os.fspath(path) for path in paths]
    whole = np.zeros(len(paths), np.int64)
    return Table("files", Path(root), paths, whole - 1, [], whole + start_s, whole + end_s, whole, {}, [])


def take(table, positions):
    """The rows at `positions` (indices or a mask), in that order; the classes keep their numbers."""
    at = np.arange(len(table))[positions]
    arrays = {key: getattr(table, key)[at] for key in ("labels", "start_s", "end_s", "fold")}
    at = at.tolist()
    columns = {key: [values[i] for i in at] for key, values in table.columns.items()}
    paths = [table.paths[i] for i in at]
    record = None if table.record is None else table.record[at]
    return replace(table, paths=paths, columns=columns, missing=[], notes=[], record=record, **arrays)


def table_hash(table):
    """12 hex digits that name the instances and their order: of the JSON of [paths, start_s, end_s]."""
    digest, before = hashlib.sha256(), "[["
    for column in (table.paths, table.start_s, table.end_s):
        for begin in range(0, len(column), PIECE):
            some = column[begin : begin + PIECE]
            text = json.dumps(some if isinstance(some, list) else some.tolist())[1:-1]
            digest.update((before + text).encode())
            before = ", "
        before = "], ["
    digest.update(b"]]")
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------- what is held out


def for_training(data):
    """The table of data.split, and what a training on it can be checked on: instances that it does not see.

    These are of the part that results are reported on, or else of val; of a numbered division, of its own
    test part. None: there are none. Raises DataError.
    """
    split, reported = data.split or "train", row(data).evaluation
    others = dict.fromkeys((reported, "val"))
    if row(data).divisions:  # train2 → test2
        others = [reported + re.search("[0-9]?$", data.split)[0]]
    table = read(data, split, *others)
    train = table(split)
    for other in others:
        with contextlib.suppress(NoSplit):
            held_out = unseen(table(other), train)
            return train, held_out if len(held_out) else None
    return train, None


def unseen(table, train):
    """The instances of a table that `train` does not have: the table itself where it has none of them."""
    shared = set(table.paths).intersection(train.paths)
    if not shared:
        return table

    def instances(of):
        return zip(of.paths, of.start_s.tolist(), of.end_s.tolist(), strict=True)

    seen = {instance for instance in instances(train) if instance[0] in shared}
    new = np.array([instance not in seen for instance in instances(table)])
    return table if new.all() else take(table, new)


def hold_out(table, seed, share=0.2):
    """Two tables of one: the second has this share of each class, drawn by the seed, the first has the rest.

    All instances of a file go the same way. Instances with several classes, or none, count as one class.
    """
    rng = np.random.default_rng(seed)
    codes = Codes()
    file = np.array([codes[path] for path in table.paths])  # N, the number of each row's file
    held = np.zeros(len(codes), bool)  # files
    labels = table.labels if table.labels.ndim == 1 else np.zeros(len(table))
    for label in np.unique(labels):
        files = np.array(list(dict.fromkeys(file[labels == label].tolist())))
        held[rng.permutation(files)[: max(int(len(files) * share + 1e-9), 1)]] = True
    parts = take(table, ~held[file]), take(table, held[file])
    for part, name in zip(parts, ("train", "test"), strict=True):
        part.name = f"{table.name} ({name})"
    return parts


def sources(table):
    """The files that tell whether a table's content is as it was: its own, or what a pack is known by."""
    paths = table.paths if table.record is None else ["pack.json"]
    return [table.root / path for path in paths]


def same_class(query, gallery):
    """`matches` of evaluation.recall: does a query share a class with what it found?

    Labels n and m (−1: none), or n×C and m×C of 0 and 1.
    """
    if query.ndim > 1:
        return lambda q, f: (query[q] & gallery[f]).any(-1)
    return lambda q, f: (query[q] == gallery[f]) & (query[q] >= 0)


# ------------------------------------------------------------------------------------------------ the readers


def manifest(root, splits, label="label"):
    """
    root/manifest.csv     with a header; or root is the CSV itself
        path,label,split,start,end,…
        videos/a.mp4,dog,train,0,10,…
    root/videos/a.mp4     paths are relative to the CSV's folder

    Only path is required. Rows without a split belong to every split. start and end are in s and may be
    empty; a file may have several rows, each with another part of it. `label` names the column of the
    classes. All columns but path, start and end are kept in `columns`.
    """
    path, rows, folders = root if root.suffix.lower() == ".csv" else root / "manifest.csv", Rows(), set()
    for lines, row in _csv(path, ["path"] if label == "label" else ["path", label]):
        files = _below_root(row.pop("path"), lambda k, lines=lines: (path, lines[k]))
        nothing = [""] * len(lines)
        start_s = _numbers(row.pop("start", nothing), path, lines, empty=0.0)
        end_s = _numbers(row.pop("end", nothing), path, lines, empty=np.inf)
        if (wrong := start_s >= end_s).any():
            i = wrong.argmax()
            raise _wrong(path, lines[i], f"start {start_s[i]:g} s is not before end {end_s[i]:g} s")
        for folder in {file.rpartition("/")[0] for file in files} - folders:
            folders.add(folder)
            here = [f"{folder}/{name}" if folder else name for name in _names(path.parent / folder)]
            rows.on_disk.update(zip(here, here, strict=True))
        rows.add(path, lines, files, row.get(label, ""), row.get("split", ""), start_s, end_s, columns=row)
    if not rows.paths:
        raise Misplaced(f"{path} lists no file")
    return _tables(f"{path.parent.name}/{path.name}", path.parent, rows)


def folder(root, splits, name="folder"):
    """
    root/<class>/<file>              or, without classes, root/<file>
    root/train/<class>/<file>        or in parts: train (training), val (valid, validate, validation) and
    root/test/<class>/<file>         test (testing, eval, evaluation); also as Train, val_256

    Without parts every split is the whole folder: nothing is held out. What lies beside the parts is left
    out. A file to which links lead, too, is there once.
    """
    files, linked, notes = [], {}, []
    for folder, names in walk(root, linked):
        files += [folder + name for name in names if name[name.rfind(".") :].lower() in ENDINGS]
    files.sort(key=_by_name)
    tops = dict.fromkeys(file.partition("/")[0] for file in files if "/" in file)
    parts = {top: part for top in tops if (part := part_of(top))}
    if len(parts) < len(tops) and len(parts) < 2:  # a class that is called train
        parts = {}
    if parts:
        whole, files = files, [file for file in files if file.partition("/")[0] in parts]
        if beside := len(whole) - len(files):
            example = next(file for file in whole if file.partition("/")[0] not in parts)
            notes.append(f"{beside:,} files beside its parts were left out, e.g. {example}")
        for part in dict.fromkeys(parts.values()):
            if len(those := [top for top in parts if parts[top] == part]) > 1:
                notes.append(f"{' and '.join(those)} are its {part} part")
    if linked:
        files = _once(files, linked, root, notes)
    rows = Rows(dict(zip(files, files, strict=True)))
    for top, some in itertools.groupby(files, key=lambda file: file.partition("/")[0] if parts else ""):
        some = list(some)
        below = [file.partition("/")[2] for file in some] if parts else some
        labels = [file.partition("/")[0] if "/" in file else "" for file in below]
        rows.add(root, np.zeros(len(some)), some, labels, parts.get(top, ""))
    return _tables(name, root, rows, _spelled(splits), notes=notes)


def kinetics(root, splits, name="kinetics400"):
    """
    root/annotations/train.csv                             or root/train.csv, root/kinetics400_train.csv;
        label,youtube_id,time_start,time_end,split         val may be called validate or validation
    root/train/<class>/<youtube_id>_000010_000020.mp4      or root/train/<file>, or below root

    Kinetics-600 and -700 likewise. Without any CSV: root/train/<class>/<file>.
    """
    parts, rows = _spelled(splits), Rows()
    folders = {
        part: [name for name in PARTS if SPELLED.get(name, name) == part] for (part,) in parts.values()
    }
    on_disk = functools.cache(functools.partial(_by_stem, root))
    found = {part: on_disk(_folders(root, names)) for part, names in folders.items()}
    for one, other in itertools.combinations(found.values(), 2):
        other |= {stem: one[stem] for stem in one.keys() & other.keys()}  # one clip: lists may not share it
    for part in ("test", "train", "val", "validate", "validation"):
        names = (
            f"annotations/{part}.csv",
            f"annotations/{name}_{part}.csv",
            f"{part}.csv",
            f"{name}_{part}.csv",
        )
        path, official = next(filter(Path.is_file, map(root.joinpath, names)), None), SPELLED.get(part, part)
        rows.on_disk = found.get(official, next(iter(found.values())))
        for lines, row in _csv(path, ["youtube_id", "time_start", "time_end"]) if path else ():
            start, end = (_padded(row[key], path, lines) for key in ("time_start", "time_end"))
            files = [f"{i}_{a}_{b}" for i, a, b in zip(row["youtube_id"], start, end, strict=True)]
            label = row.get("label", "")  # tests may have none
            rows.add(path, lines, files, label, official)
    if not rows.paths and root.is_dir() and any(part_of(it.name) for it in root.iterdir() if it.is_dir()):
        return folder(root, splits, name)
    return _tables(name, root, rows, parts, official=True)


def vggsound(root, splits):
    """
    root/vggsound.csv                         without a header; splits train and test
        <youtube_id>,30,"label, of the clip",train
    root/video/<youtube_id>_000030.mp4        or below root
    """
    path, rows = root / "vggsound.csv", Rows(_by_stem(root, ["video"]))
    for lines, row in _csv(path, columns=["youtube_id", "start", "label", "split"]):
        start = _padded(row["start"], path, lines)
        files = [f"{i}_{a}" for i, a in zip(row["youtube_id"], start, strict=True)]
        rows.add(path, lines, files, row["label"], row["split"])
    return _tables("vggsound", root, rows, official=True)


def audioset(root, splits):
    """
    root/class_labels_indices.csv             index,mid,display_name
    root/balanced_train_segments.csv          as published; unbalanced_train_…, eval_segments.csv likewise
        # three lines of comment
        <youtube_id>, 30.000, 40.000, "/m/09x0r,/m/05zppz"
    root/balanced_train_segments/<file>       or below root; the 10 s cut out: <youtube_id>_000030.mp4
                                              (start in s), <youtube_id>_30000_40000.mp4 (start, end in ms)
                                              or <youtube_id>.mp4

    Splits: balanced_train, unbalanced_train, train (what there is of the two), eval or test, all.
    """
    train, names = ("balanced_train", "unbalanced_train"), {}
    parts = {"train": train, "test": ("eval",), "all": (*train, "eval")}
    parts = {split: parts.get(split, (split,)) for split in splits}
    for _, row in _csv(root / "class_labels_indices.csv", ["mid", "display_name"]):
        names |= zip(row["mid"], row["display_name"], strict=True)

    @functools.cache
    def classes_of(labels):
        return [names.get(mid.strip()) for mid in labels.split(",")]

    rows, on_disk, read = Rows(), functools.cache(functools.partial(_by_stem, root)), set()
    for own in parts.values():
        lists = {part: path for part in own if (path := root / f"{part}_segments.csv").is_file()}
        rows.on_disk = on_disk(_folders(root, [path.stem for path in lists.values()])) if lists else {}
        for part in [part for part in lists if part not in read]:
            _audioset_list(lists[part], rows, part, classes_of)
        read |= lists.keys()
    classes = sorted(set(names.values()))
    return _tables("audioset", root, rows, parts, classes, classes_of, official=True)


def _audioset_list(path, rows, part, classes_of):
    for lines, row in _csv(path, columns=["youtube_id", "start", "end", "labels"], comment="#"):
        for labels in dict.fromkeys(row["labels"]):
            if None in classes_of(labels):
                line = lines[row["labels"].index(labels)]
                raise _wrong(path, line, f"a label of {labels} is not in class_labels_indices.csv")
        start, videos = _padded(row["start"], path, lines), row["youtube_id"]
        end_s = _numbers(row["end"], path, lines)
        files = [f"{video}_{a}" for video, a in zip(videos, start, strict=True)]

        def other(k, videos=videos, row=row, end_s=end_s):
            return f"{videos[k]}_{float(row['start'][k]) * 1000:.0f}_{end_s[k] * 1000:.0f}", videos[k]

        rows.add(path, lines, files, row["labels"], part, other=other)


def ucf101(root, splits):
    """
    root/ucfTrainTestlist/trainlist01.txt                      ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
    root/ucfTrainTestlist/testlist01.txt                       ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi
    root/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi   or root/ApplyEyeMakeup/…; other endings will do

    Splits: train1, test1, … test3; all.
    """
    number, parts = _division(splits, 3)
    rows = Rows(_by_stem(root, ["UCF-101"], with_class=True))
    for part in ("train", "test"):
        path = root / "ucfTrainTestlist" / f"{part}list{number:02d}.txt"
        for lines, texts in _lines(path):
            files = [os.path.splitext(text.split()[0])[0] for text in texts]
            for line, text, stem in zip(lines, texts, files, strict=True):
                if stem.count("/") != 1:
                    raise _wrong(path, line, f"{text!r} where <class>/<file> belongs")
            rows.add(path, lines, files, [stem.partition("/")[0] for stem in files], f"{part}{number}")
    return _tables("ucf101", root, rows, parts, official=True)


def hmdb51(root, splits):
    """
    root/testTrainMulti_7030_splits/brush_hair_test_split1.txt     <name>.avi 1     (2: test, 0: neither)
    root/brush_hair/<name>.avi                                     or root/hmdb51_org/…; other endings do

    Splits: train1, test1, … test3; all, with what the split leaves out.
    """
    number, parts = _division(splits, 3)
    rows = Rows(_by_stem(root, ["hmdb51_org"], with_class=True))
    part, tail = {"0": "neither", "1": f"train{number}", "2": f"test{number}"}, f"_test_split{number}.txt"
    for path in sorted((root / "testTrainMulti_7030_splits").glob(f"*{tail}")):
        label = path.name.removesuffix(tail)
        for lines, texts in _lines(path):
            found = [text.rpartition(" ")[::2] for text in texts]
            for line, text, (file, use) in zip(lines, texts, found, strict=True):
                if not file or use not in part:
                    raise _wrong(path, line, f"{text!r} where a file and 0, 1 or 2 belong")
            stems = [f"{label}/{os.path.splitext(file.strip())[0]}" for file, _ in found]
            rows.add(path, lines, stems, label, [part[use] for _, use in found])
    return _tables("hmdb51", root, rows, parts, official=True)


def esc50(root, splits, subset=""):
    """
    root/meta/esc50.csv                filename,fold,target,category,esc10,src_file,take
    root/audio/1-100032-A-0.wav        other endings will do

    Splits: test1 is fold 1 and train1 the other four, … test5; all. data.subset=esc10: the 10 classes of
    ESC-10.
    """
    (number, parts), path = _division(splits, 5), root / "meta" / "esc50.csv"
    rows = Rows(_by_stem(root, ["audio"]))
    for lines, row in _csv(path, ["filename", "fold", "category", "esc10"]):
        for line, fold in zip(lines, row["fold"], strict=True):
            if fold not in list("12345"):
                raise _wrong(path, line, f"fold {fold!r} where 1 to 5 belongs")
        if subset:
            ten = [value == "True" for value in row["esc10"]]
            lines, row = lines[ten], {key: [*itertools.compress(row[key], ten)] for key in row}
        fold = np.array(row["fold"], dtype=np.int64)
        part = [f"{'test' if one == number else 'train'}{number}" for one in fold]
        files = [os.path.splitext(name)[0] for name in row["filename"]]
        rows.add(path, lines, files, row["category"], part, fold=fold, columns=row)
    return _tables(subset or "esc50", root, rows, parts, official=True)


def packed(root, splits, label="label"):
    """
    root/pack.json, manifest.csv, failures.csv         as `python -m avid pack DATA root` writes them
    root/index.npy, shard-000000.tar, …

    Splits, divisions and classes are those of the data set that was packed; `label` as of a manifest.
    """
    facts = checked_json(root / "pack.json")
    rows, lost = (
        _checked_csv(root / name, facts["crc32"][name]) for name in ("manifest.csv", "failures.csv")
    )
    known = {name for names in {*rows["splits"], *lost["splits"]} for name in names.split()}
    # a column of the list that has the name of one of ours stands as list.NAME
    theirs = {name.removeprefix("list."): name for name in rows if name not in PACKED_COLUMNS}
    if label not in ("label", *theirs):
        raise Misplaced(f"packed {facts['data']}: no column {label}; there are {', '.join(sorted(theirs))}")
    words = rows["label" if label == "label" else theirs[label]]
    classes = facts["classes"] if label == "label" else sorted({*words} - {""})

    def table(split):
        if split not in known:
            split = SPELLED.get(split, split)
        if DATA[facts["data"]].divisions and split in ("train", "test"):
            split += "1"  # as those data sets do
        if split not in known | {"all"}:
            there = ", ".join(sorted(known))
            raise NoSplit(f"packed {facts['data']}: no such split in {root}, only {there}")

        def belonging(columns):
            belongs = {names: split == "all" or split in names.split() for names in set(columns["splits"])}
            return [*map(belongs.__getitem__, columns["splits"])]

        here, lacking, codes = belonging(rows), belonging(lost), Codes()
        numbers = np.array([*map(codes.__getitem__, itertools.compress(words, here))])
        picked = {name: [*itertools.compress(values, here)] for name, values in rows.items()}
        return Table(
            f"packed {facts['data']} {split}",
            root,
            picked["path"],
            _labels(codes, numbers, classes, json.loads if facts["several_classes"] else None),
            classes,
            np.array([*map(float, picked["start"])]),
            np.array([float(end or "inf") for end in picked["end"]]),
            np.array([*map(int, picked["fold"])], np.int64),
            {name: picked[column] for name, column in theirs.items()},
            [*itertools.compress(lost["path"], lacking)],
            record=np.array([*map(int, picked["record"])], np.int64),
        )

    return table


# of a pack's manifest, before the list's own
PACKED_COLUMNS = ("record", "path", "start", "end", "label", "splits", "fold")


def checked_json(path):
    """What tools.pack.write_json wrote, a dict. Misplaced where it is not there, DataError: damaged."""
    try:
        facts = json.loads(path.read_bytes())
        check = facts.pop("check")
    except OSError as error:
        raise Misplaced(f"cannot read {path}: {error.strerror}; a pack has it once it is finished") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        check = facts = None
    if facts is None or zlib.crc32(json.dumps(facts).encode()) != check:
        raise DataError(f"{path} is damaged; restore it, or pack again into another folder")
    return facts


def _checked_csv(path, check):
    """The columns of a list of a pack: {name: n texts}. DataError where it is not what was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if zlib.crc32(content) != check:
        raise DataError(f"{path} is damaged, or was changed; restore it, or pack again into another folder")
    lines = csv.reader(io.StringIO(content.decode(errors="surrogateescape"), newline=""))
    columns = {name: [] for name in next(lines)}
    while some := [*itertools.islice(lines, PIECE)]:
        for column, values in zip(columns.values(), zip(*some, strict=True), strict=True):
            shared = {}  # of equal texts one is kept
            column.extend(map(shared.setdefault, values, values))
    return columns


class DataSet(NamedTuple):
    """One row of the table of data sets: all that the rest of the project asks about one."""

    reader: Callable  # (root, splits, …) → the function split → Table; its docstring shows the layout
    modalities: tuple = ("video", "audio")  # what its files hold
    needs: tuple = ("video", "audio")  # what a file must have to be usable
    evaluation: str = "test"  # the split that results are reported on
    divisions: int = 0  # official divisions into train1, test1, …; 0: one division, without a number
    options: Callable = lambda data: {}  # config.Data → what the reader is told besides root and splits
    subsets: tuple = ()  # what data.subset may be
    written: bool = False  # by this program, below data.root: toy.write
    splits: tuple = ()  # what data.split may be; (): the lists or folders tell
    labels: tuple = ()  # what data.label may be; (): the list tells


_LABEL = {"options": lambda data: {"label": data.label}}
_KINETICS = DataSet(kinetics, evaluation="val", options=lambda data: {"name": data.name})
_ESC = {"options": lambda data: {"subset": data.subset}, "subsets": ("esc10",)}
# columns of the toy's manifest that can be the class
TOY_LABELS = ("label", "motion", "tempo", "faulty", "sound", "pitch_hz")
DATA = {
    "toy": DataSet(manifest, **_LABEL, written=True, splits=("train", "test", "all"), labels=TOY_LABELS),
    "folder": DataSet(folder),
    "manifest": DataSet(manifest, **_LABEL),
    "kinetics400": _KINETICS,
    "kinetics600": _KINETICS,
    "kinetics700": _KINETICS,
    "vggsound": DataSet(vggsound),
    "audioset": DataSet(audioset),
    "ucf101": DataSet(ucf101, needs=("video",), divisions=3),  # half of its videos have sound
    "hmdb51": DataSet(hmdb51, needs=("video",), divisions=3),
    "esc50": DataSet(esc50, ("audio",), ("audio",), divisions=5, **_ESC),
    "packed": DataSet(packed, **_LABEL),  # see `row`
}
UNPACKED = [name for name in DATA if name != "packed"]


def row(data):
    """The DataSet that a config.Data names; of packed data what was packed, as its folder says."""
    if data.name != "packed":
        return DATA[data.name]
    of = DATA[checked_json(Path(data.root).expanduser() / "pack.json")["data"]]
    return DATA["packed"]._replace(
        modalities=of.modalities, needs=of.needs, evaluation=of.evaluation, divisions=of.divisions
    )


# -------------------------------------------------------------------------------------------- rows to a table


def _tables(name, root, rows, parts=(), classes=None, classes_of=None, official=False, notes=()):
    """A function, split → the table of those rows of it whose file is on disk.

    parts: {split: what rows call it, one word or several}; a split that is not there is called as it is.
    classes_of: label → its classes, where it has several. official: the list is nobody's to mend, so that a
    row which comes again in a split is left out, with a warning; elsewhere it is an error.
    """
    if not rows.paths:
        nowhere = "" if root.exists() else ", which does not exist"
        raise Misplaced(f"{name}: no list or file in {root}{nowhere}")
    there = np.ones(len(rows.paths), bool)
    there[list(rows.missing)] = False
    _below_root(list(rows.missing.values()), lambda k: rows.at(list(rows.missing)[k]))
    labels, splits, notes = rows.column("label"), rows.column("split"), list(notes)
    once = np.ones(len(rows.paths), bool)
    if again := rows.again():
        if wrong := [pair for pair in again if not official or splits[pair[0]] != splits[pair[1]]]:
            row, first = wrong[0]
            file = instance_name(rows.file(row), rows.column("start_s")[row], rows.column("end_s")[row])
            others = f" ({len(wrong) - 1:,} more such lines)" if wrong[1:] else ""
            path, line = rows.at(first)
            cause = f"{file} again, as in {path.name}, line {line}{others}; keep one of them"
            raise _wrong(*rows.at(row), cause)
        path, line = rows.at(again[0][0])
        other = sum(labels[row] != labels[first] for row, first in again)
        notes.append(
            f"warning: {len(again):,} lines name a file again and were left out, "
            f"e.g. {path.name}, line {line}" + f"; {other:,} of them with another class" * bool(other)
        )
        once[[row for row, _ in again]] = False
    if classes is None:  # of all rows, so that every split numbers them alike
        classes = sorted(rows.labels.keys() - {""})

    def table(split):
        words = dict(parts).get(split, (split,))
        title = f"{name} {words[0] if len(words) == 1 else split}"
        belongs = np.array(["all" in words or word in ("", *words) for word in rows.splits])[splits] & once
        if not belongs.any():
            raise NoSplit(f"{title}: no such split in {root}, only {', '.join(sorted(rows.splits))}")
        here = belongs & there
        missing = [file for row, file in rows.missing.items() if belongs[row]]
        if not here.any():
            listed = f"none of the {len(missing):,} listed files, e.g. {missing[0]}, is in {root}"
            raise NoSplit(f"{title}: {listed}")
        picked = here.tolist()
        return Table(
            title,
            root,
            [*itertools.compress(rows.paths, picked)],
            _labels(rows.labels, labels[here], classes, classes_of),
            classes,
            rows.column("start_s")[here],
            rows.column("end_s")[here],
            rows.column("fold")[here],
            {column: [*itertools.compress(values, picked)] for column, values in rows.columns.items()},
            missing,
            notes.copy(),
        )

    return table


def _labels(words, codes, classes, classes_of):
    """Labels as Table has them, of rows whose label is that of `words` with this code (n,)."""
    index = {name: k for k, name in enumerate(classes)} | {"": -1}
    if classes_of is None:
        return np.array([index[word] for word in words], np.int64)[codes]  # n
    several = [[index[name] for name in classes_of(word)] for word in words]
    labels = np.zeros((len(codes), len(classes)), np.uint8)  # n×C
    for place in itertools.zip_longest(*several, fillvalue=-1):  # the first class of each word, the second, …
        label = np.array(place)[codes]
        known = np.flatnonzero(label >= 0)
        labels[known, label[known]] = 1
    return labels


# ------------------------------------------------------------------------------------------ files on the disk


def part_of(name):
    """The split that a folder of this name holds: Train, val_256, testing. Empty: it means none."""
    found = PART.fullmatch(name)
    return SPELLED.get(found[1].lower(), found[1].lower()) if found else ""


def _names(folder):
    """The files right in a folder; hidden ones are left out."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if entry.name[0] != "." and not entry.is_dir()]


def walk(root, linked=None):
    """(a folder below `root` as "" or "x/y/", names of files in it) of all folders; hidden ones are left out.

    Links are followed, each once, but not to a folder that they are in. linked: a dict, which is given {file:
    its real path} of what links lead to, and {folder/: its real path} of links that are not followed. One
    scan a folder, and no look at a single file: Kinetics has 240,000. A folder that does not exist is empty.
    """
    linked = {} if linked is None else linked
    followed = set()  # links to folders
    # folders that are still to come, with the real paths of those above and their own
    waiting = [("", (os.path.realpath(root),))] if root.is_dir() else []
    while waiting:
        prefix, above = waiting.pop()
        by_link = above[-1] != os.path.join(above[0], prefix).rstrip("/")
        names, folders = [], []
        with os.scandir(above[-1]) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                if not entry.is_dir():
                    names.append(name)
                    if by_link or entry.is_symlink():
                        linked[prefix + name] = _target(entry.path) if entry.is_symlink() else entry.path
                    continue
                real = entry.path
                target = os.path.realpath(real) if entry.is_symlink() else real
                if target in above or real in followed:
                    linked[f"{prefix}{name}/"] = target
                    continue
                if entry.is_symlink():
                    followed.add(real)
                folders.append((f"{prefix}{name}/", (*above, target)))
        yield prefix, names
        waiting += sorted(folders, reverse=True)


def _target(link):
    """The real path of the file that a link leads to; links of one folder mostly lead into one other."""
    folder, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
    target = os.path.join(_real_path(folder), name)
    return os.path.realpath(target) if os.path.islink(target) else target


_real_path = functools.lru_cache(maxsize=1024)(os.path.realpath)


def _by_name(path):
    """Sorts paths folder by folder, files and folders by name: a separator comes before every letter."""
    return path.replace("/", "\0")


def _once(files, linked, root, notes):
    """The files without those that links give once more (see walk); says so in `notes`."""
    if links := [link for link in linked if link.endswith("/")]:
        notes.append(f"{len(links):,} links to folders that it has already were left out, e.g. {links[0]}")
    root = os.path.realpath(root)
    seen, once = {os.path.join(root, file) for file in files if file not in linked}, []
    for file in files:
        if file not in linked or linked[file] not in seen:
            once.append(file)
            seen.add(linked.get(file))
    if again := len(files) - len(once):
        notes.append(f"{again:,} files that links give once more were left out")
    return once


def _folders(root, names):
    """Which folders of these names there are below root; without any, root itself: ("",)."""
    return tuple(name for name in names if (root / name).is_dir()) or ("",)


def _by_stem(root, folders, with_class=False):
    """{name without ending: path relative to root} of the media in those `folders` that exist, else in root.

    with_class: the name with the folder that the file is in. Of two endings of a name, the first in MEDIA is
    used.
    """
    found = {ending[1:]: {} for ending in MEDIA}
    for top in _folders(root, folders):
        for folder, names in walk(root / top):
            prefix = f"{top}/{folder}" if top else folder
            label = folder[folder.rfind("/", 0, -1) + 1 :] if with_class else ""
            for name in names:
                stem, dot, ending = name.rpartition(".")
                known = found.get(ending)
                if (known is None and (known := found.get(ending.lower())) is None) or not dot:
                    continue
                path = prefix + name
                first = known.setdefault(label + stem, path)
                if first is not path:  # two of one name
                    known[label + stem] = min(first, path, key=_by_name)
    best = {}
    for known in filter(None, reversed(found.values())):
        best = best | known if best else known
    return best


def _below_root(files, at):
    """Paths of a list, with either separator and perhaps doubled ones → '/'-separated, below the data root.

    A list may not place a file outside; links within the root lead where its owner has them lead. at: index →
    (list, line) of a path.
    """
    text = "\n".join(("", *files, ""))
    odd = ("\\", ":", "//", "..", "\n/", "/\n", "\n./", "/./", "/.\n", "\n.\n", "\n\n")
    if not any(part in text for part in odd):
        return files
    plain = [PureWindowsPath(file).as_posix() for file in files]
    for k, file in enumerate(plain):
        if file in ("", ".") or file.startswith("/") or file[1:2] == ":" or "/../" in f"/{file}/":
            cause = f"{file!r} is not a path below the data root; give a relative one without .."
            raise _wrong(*at(k), cause)
    return plain


# ---------------------------------------------------------------------------------------------- lists as text


def _lines(path, comment=None):
    """(their numbers n, the lines) of all lines that are not empty nor begin with `comment`, by pieces."""
    number = 1
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            while text := file.read(PIECE) + file.readline():
                if "\0" in text:
                    line = number + text.count("\n", 0, text.index("\0"))
                    raise _wrong(path, line, "a zero byte; save the list as text in UTF-8")
                lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
                wanted = np.ones(len(lines), bool)
                if "" in lines or (comment and comment in text):
                    wanted[:] = [line != "" and not (comment and line.startswith(comment)) for line in lines]
                if wanted.any():
                    yield number + np.flatnonzero(wanted), [*itertools.compress(lines, wanted.tolist())]
                number += len(lines)
    except OSError as error:
        raise Misplaced(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        texts = enumerate(path.read_bytes().split(b"\n"), 1)
        line = next(line for line, text in texts if text.decode(errors="ignore").encode() != text)
        raise _wrong(path, line, "not UTF-8; save the list as text in UTF-8") from None


def _csv(path, needs=(), columns=None, comment=None):
    """(the lines' numbers n, {column: list of n}) of all rows, a piece at a time.

    `needs`: columns the header must have; `columns`: there is no header. A field cannot hold a line break, so
    that an open quote is an error of its own line.
    """
    for lines, texts in _lines(path, comment):
        try:
            rows = list(csv.reader(texts, strict=True, skipinitialspace=True))
        except csv.Error:
            rows = []
        if len(rows) != len(texts):  # which line is it?
            rows = [_fields(text, path, line) for line, text in zip(lines, texts, strict=True)]
        if columns is None:
            columns = [name.strip() for name in rows[0]]
            if lacking := [need for need in needs if need not in columns]:
                raise _wrong(path, lines[0], f"no column {lacking[0]}; there are {', '.join(columns)}")
            if twice := [name for name in columns if columns.count(name) > 1]:
                raise _wrong(path, lines[0], f"two columns {twice[0]!r}; rename one")
            lines, rows = lines[1:], rows[1:]
        if set(map(len, rows)) - {len(columns)}:
            line, row = next(pair for pair in zip(lines, rows, strict=True) if len(pair[1]) != len(columns))
            raise _wrong(path, line, f"{len(row)} fields where {len(columns)} belong: {', '.join(columns)}")
        if rows:
            fields = zip(columns, zip(*rows, strict=True), strict=True)
            yield lines, {name: [*map(str.strip, column)] for name, column in fields}


def _fields(text, path, line):
    """The fields of one line."""
    try:
        return next(csv.reader([text], strict=True, skipinitialspace=True))
    except csv.Error as error:
        remedy = "put a field with a comma or a quote in quotes, and double quotes within"
        raise _wrong(path, line, f"not CSV: {error}; {remedy}") from None


def _numbers(texts, path, lines, empty=math.nan):
    """The numbers that a column holds (n,) float64; empty: what an empty field stands for, nan: an error."""
    numbers = np.fromiter(map(_number, texts), np.float64, len(texts))
    if "" in texts:
        numbers[[text == "" for text in texts]] = empty
    if (wrong := np.isnan(numbers)).any():
        k = wrong.argmax()
        raise _wrong(path, lines[k], f"{texts[k]!r} where a number from 0 on belongs")
    return numbers


def _padded(texts, path, lines):
    """A column of numbers as names of files have them, 000030."""
    _numbers(texts, path, lines)  # they are numbers
    return [*map(_six_digits, texts)]


@functools.lru_cache(PIECE)
def _six_digits(text):
    return f"{float(text):06.0f}"


@functools.lru_cache(PIECE)
def _number(text):
    """The number from 0 on that a text is, nan if it is none."""
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text) or math.isinf(float(text)):
        return math.nan
    return float(text)


def _spelled(splits):
    """{split: the usual name of it}, as `parts` of _tables: val of validation."""
    return {split: (SPELLED.get(split, split),) for split in splits}


def _division(splits, most):
    """The number of the official division that `splits` are of (1 if none is given), and `parts` of _tables:
    {train: train1}."""
    parts = {}
    for split in splits:
        part = split.rstrip("12345"[:most])
        number = split[len(part) :] or "1"
        if part not in ("train", "test", "all") or len(number) > 1:
            raise DataError(f"no split {split}; there are train1, test1 and so on up to {most}, and all")
        parts[split] = ("all" if part == "all" else part + number,)
    return int(number), parts


def _wrong(path, line, cause):
    cause = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cause)
    short = cause if len(cause) < 400 else f"{cause[:200]} … {cause[-100:]}"
    return DataError(f"{path}, line {line}: {short}")
