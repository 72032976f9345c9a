"""The tables that all readers give, and the lists and folders of no benchmark; the benchmarks' are in test_benchmarks_lists.py."""

import os
from collections import Counter

import numpy as np
import pytest

from avid import config, datasets
from avid.datasets import DataError

KINETICS = "label,youtube_id,time_start,time_end,split,is_cc"


def load(root, name, split, **settings):
    return datasets.load(config.Data(name=name, root=str(root), **settings), split)


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def write(root, file, *lines, end="\n", encoding="utf-8"):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes("".join(line + end for line in lines).encode(encoding))


def ucf101(root, number, train, test):
    write(root, f"ucfTrainTestlist/trainlist0{number}.txt", *train, end="\r\n")
    write(root, f"ucfTrainTestlist/testlist0{number}.txt", *test, end="\r\n")


def labelled(table):
    """{path: class}, None where unlabelled."""
    labels = table.labels.tolist()
    return {path: table.classes[i] if i >= 0 else None for path, i in zip(table.paths, labels, strict=True)}


def error(root, name, split, **settings):
    with pytest.raises(DataError) as caught:
        load(root, name, split, **settings)
    return str(caught.value)


# every reader


@pytest.mark.parametrize("name", datasets.DATA)
@pytest.mark.parametrize("root", ["", "nowhere", "file.txt"])
def test_an_empty_place_is_an_error_that_shows_the_layout(name, root, tmp_path):
    touch(tmp_path, "file.txt")
    place, *layout = error(tmp_path / root, name, "train").splitlines()
    assert str(tmp_path / root) in place
    assert layout[0] == f"expected, with root = data.root = {tmp_path / root}:"
    assert layout[1].startswith("root/")


def test_files_that_cannot_be_found_are_an_error_that_names_one(tmp_path):
    write(tmp_path, "vggsound.csv", "abc,3,dog,train", "def,3,dog,train")
    touch(tmp_path, "video/xyz_000003.mp4")
    text = error(tmp_path, "vggsound", "train")
    assert text.startswith(f"vggsound train: none of the 2 listed files, e.g. abc_000003, is in {tmp_path}\n")


def test_a_split_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    write(tmp_path, "vggsound.csv", "abc,3,dog,train", "def,3,dog,test")
    touch(tmp_path, "video/abc_000003.mp4")
    assert error(tmp_path, "vggsound", "val").startswith(
        f"vggsound val: no such split in {tmp_path}, only test, train\n"
    )


def test_classes_are_the_same_for_every_split(tmp_path):
    write(tmp_path, "vggsound.csv", "a,1,dog,train", "b,1,ant,test", "c,1,cow,test")
    touch(tmp_path, "a_000001.mp4", "b_000001.mp4", "c_000001.mp4")
    train, test = load(tmp_path, "vggsound", "train"), load(tmp_path, "vggsound", "test")
    assert train.classes == test.classes == ["ant", "cow", "dog"]
    assert train.labels.tolist() == [2] and test.labels.tolist() == [0, 1]
    assert train.labels.dtype == np.int64


def test_all_reads_every_split(tmp_path):
    write(tmp_path, "vggsound.csv", "a,1,dog,train", "b,1,ant,test")
    touch(tmp_path, "a_000001.mp4", "b_000001.mp4")
    assert labelled(load(tmp_path, "vggsound", "all")) == {"a_000001.mp4": "dog", "b_000001.mp4": "ant"}


def test_a_video_goes_before_a_sound_of_the_same_name(tmp_path):
    write(tmp_path, "vggsound.csv", "a,1,dog,train")
    touch(tmp_path, "A/a_000001.wav", "B/a_000001.MKV", "C/a_000001.flac", "a_000001.txt", ".a_000001.mp4")
    assert load(tmp_path, "vggsound", "train").paths == ["B/a_000001.MKV"]


def test_a_folder_that_cannot_be_read_is_an_error_that_names_it(tmp_path, monkeypatch):
    def locked(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", locked)
    assert error(tmp_path, "folder", "train").startswith(f"[Errno 13] Permission denied: '{tmp_path}'\n")


def test_the_root_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "videos/a.mp4")
    assert load("~/videos", "folder", "train").root == tmp_path / "videos"


def test_a_folder_is_listed_once_and_no_file_is_looked_at(tmp_path, monkeypatch):
    scanned, looks = Counter(), Counter()
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: scanned.update([str(path)]) or scandir(path))
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looks.update(["stat"]) or stat(*args, **kwargs))
    counts = []
    for n in (3, 30):
        root = tmp_path / str(n)
        rows = [f"dance,v{i},0,10,train" for i in range(n)]
        write(root, "train.csv", "label,youtube_id,time_start,time_end,split", *rows)
        write(root, "manifest.csv", "path", *(f"train/dance/v{i}_000000_000010.mp4" for i in range(n)))
        touch(root, *(f"train/dance/v{i}_000000_000010.mp4" for i in range(n)))
        scanned.clear(), looks.clear()
        assert len(load(root, "kinetics400", "train")) == n
        assert scanned == {str(root / "train"): 1, str(root / "train" / "dance"): 1}
        scanned.clear()
        assert len(load(root, "manifest", "train")) == n
        assert scanned == {str(root / "train" / "dance"): 1}
        counts.append(looks["stat"])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "name, split, official, other",
    [
        ("kinetics400", "train", "train/x/k_000000_000010.mp4", "old/k_000000_000010.mp4"),
        ("kinetics400", "val", "validation/x/k_000000_000010.mp4", "old/k_000000_000010.mp4"),
        ("vggsound", "train", "video/k_000000.mp4", "old/k_000000.mp4"),
        ("audioset", "eval", "eval_segments/k_000000.mp4", "balanced_train_segments/k_000000.mp4"),
        ("ucf101", "train", "UCF-101/x/k.avi", "UCF-100/x/k.avi"),
        ("hmdb51", "train", "hmdb51_org/x/k.avi", "a/x/k.avi"),
        ("esc50", "test", "audio/k.wav", "44100/k.wav"),
    ],
)
def test_where_the_layout_has_its_folder_no_other_is_searched(name, split, official, other, tmp_path):
    write(tmp_path, f"{split}.csv", KINETICS, f"x,k,0,10,{split},0")
    write(tmp_path, "vggsound.csv", "k,0,x,train")
    write(tmp_path, "class_labels_indices.csv", "index,mid,display_name", "0,/m/x,x")
    write(tmp_path, "eval_segments.csv", 'k, 0.000, 10.000, "/m/x"')
    ucf101(tmp_path, 1, ["x/k.avi 1"], ["x/l.avi"])
    write(tmp_path, "testTrainMulti_7030_splits/x_test_split1.txt", "k.avi 1")
    write(tmp_path, "meta/esc50.csv", "filename,fold,category,esc10", "k.wav,1,x,True")
    touch(tmp_path, other)
    assert load(tmp_path, name, split).paths == [other]
    touch(tmp_path, official)
    assert load(tmp_path, name, split).paths == [official]


def test_the_report_counts_and_names_what_is_missing(tmp_path):
    write(tmp_path, "manifest.csv", "path,label", "a.mp4,dog", *(f"{i}.mp4,cat" for i in range(1200)))
    touch(tmp_path, "a.mp4")
    table = load(tmp_path, "manifest", "train")
    assert table.missing == [f"{i}.mp4" for i in range(1200)]
    assert table.report() == (
        f"{tmp_path.name}/manifest.csv train: 1 files, 2 classes; 1,200 more are listed and not on disk, e.g. 0.mp4, 1.mp4, 2.mp4"
    )
    assert datasets.take(table, [0]).report() == f"{tmp_path.name}/manifest.csv train: 1 files, 2 classes"


def test_take_keeps_rows_together_and_classes_as_they_are(tmp_path):
    write(
        tmp_path,
        "manifest.csv",
        "path,label,start,end,loud",
        "a.mp4,x,1,2,no",
        "b.mp4,y,,,yes",
        "c.mp4,z,0.5,9,no",
    )
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    table = load(tmp_path, "manifest", "train")
    few = datasets.take(table, [2, 0])
    assert labelled(few) == {"c.mp4": "z", "a.mp4": "x"} and few.paths == ["c.mp4", "a.mp4"]
    assert few.start_s.tolist() == [0.5, 1] and few.end_s.tolist() == [9, 2] and few.fold.tolist() == [0, 0]
    assert few.columns["loud"] == ["no", "no"] and few.classes == ["x", "y", "z"]
    assert datasets.take(table, table.labels == 1).paths == ["b.mp4"]
    assert len(datasets.take(table, [])) == 0 and len(table) == 3


# manifest and toy


@pytest.mark.parametrize("name", ["toy", "manifest"])
def test_a_manifest_gives_labels_times_and_its_other_columns(name, tmp_path):
    write(
        tmp_path,
        "manifest.csv",
        "path,label,split,start,end,motion",
        "videos/a.mp4,dog,train,,,up",
        '"videos/b, or c.mp4","cat, wild",train,1.5,4,down',
        "videos/d.mp4,ape,test,,,up",
        "videos/e.mp4,,train,,7,left",
    )
    touch(tmp_path, "videos/a.mp4", "videos/b, or c.mp4", "videos/d.mp4", "videos/e.mp4")
    table = load(tmp_path, name, "train")
    assert labelled(table) == {"videos/a.mp4": "dog", "videos/b, or c.mp4": "cat, wild", "videos/e.mp4": None}
    assert table.classes == ["ape", "cat, wild", "dog"] and table.labels.tolist() == [2, 1, -1]
    assert table.start_s.tolist() == [0, 1.5, 0] and table.end_s.tolist() == [np.inf, 4, 7]
    assert table.columns["motion"] == ["up", "down", "left"] and "path" not in table.columns
    motions = load(tmp_path, name, "train", label="motion")
    assert labelled(motions) == {"videos/a.mp4": "up", "videos/b, or c.mp4": "down", "videos/e.mp4": "left"}
    assert motions.columns["label"] == ["dog", "cat, wild", ""]


def test_a_manifest_may_be_written_on_windows(tmp_path):
    lines = "path,label,split", r"videos\a dog.mp4,Häher,train", "", "videos/b.mp4,dog,train"
    write(tmp_path, "list.csv", *lines, end="\r\n", encoding="utf-8-sig")
    touch(tmp_path, "videos/a dog.mp4", "videos/b.mp4")
    table = load(tmp_path / "list.csv", "manifest", "train")
    assert labelled(table) == {"videos/a dog.mp4": "Häher", "videos/b.mp4": "dog"}
    assert table.root == tmp_path


def test_rows_without_a_split_belong_to_every_split(tmp_path):
    write(tmp_path, "manifest.csv", "path,split", "a.mp4,train", "b.mp4,", "c.mp4,test")
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    assert load(tmp_path, "manifest", "train").paths == ["a.mp4", "b.mp4"]
    assert load(tmp_path, "manifest", "test").paths == ["b.mp4", "c.mp4"]
    assert load(tmp_path, "manifest", "all").paths == ["a.mp4", "b.mp4", "c.mp4"]
    assert load(tmp_path, "manifest", "train").labels.tolist() == [-1, -1]
    assert "no classes" in load(tmp_path, "manifest", "train").report()


def test_a_label_column_that_is_not_there_is_an_error_that_lists_the_columns(tmp_path):
    write(tmp_path, "manifest.csv", "path,label,motion", "a.mp4,dog,up")
    touch(tmp_path, "a.mp4")
    text = error(tmp_path, "manifest", "train", label="tempo")
    assert text == f"{tmp_path / 'manifest.csv'}, line 1: no column tempo; there are path, label, motion"


@pytest.mark.parametrize(
    "path",
    [
        "../a.mp4",
        "x/../../a.mp4",
        "x/..",
        "/etc/a.mp4",
        r"..\a.mp4",
        r"C:\a.mp4",
        "C:a.mp4",
        r"\\host\a.mp4",
        "",
    ],
)
def test_a_path_must_not_leave_the_data_root(path, tmp_path):
    touch(tmp_path, "a.mp4", "in/a.mp4")
    write(tmp_path, "in/manifest.csv", "path,label", "a.mp4,x", f"{path},x")
    text = error(tmp_path / "in", "manifest", "train")
    assert text.startswith(f"{tmp_path / 'in' / 'manifest.csv'}, line 3: ")
    assert "is not a path below the data root" in text and "\n" not in text


def test_a_path_named_twice_is_an_error_that_names_both_lines(tmp_path):
    write(tmp_path, "manifest.csv", "path,label", "v/a.mp4,x", "b.mp4,x", "v//a.mp4,y", "b.mp4,z")
    touch(tmp_path, "v/a.mp4", "b.mp4")
    assert error(tmp_path, "manifest", "train") == (
        f"{tmp_path / 'manifest.csv'}, line 4: v/a.mp4 again, as in manifest.csv, line 2 (1 more such lines); keep one of them"
    )


@pytest.mark.parametrize(
    "line, cause",
    [
        ("b.mp4,dog", "2 fields where 4 belong: path,"),
        ("b.mp4,dog,0,1,2", "5 fields where 4 belong: path,"),
        ('b.mp4,"dog,0,1', "not CSV"),
        ("b.mp4,dog,soon,", "'soon' where a number from 0 on belongs"),
        ("b.mp4,dog,-1,", "'-1' where a number from 0 on belongs"),
        ("b.mp4,dog,nan,", "'nan' where a number from 0 on belongs"),
        ("b.mp4,dog,4,2.5", "start 4 s is not before end 2.5 s"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_file_and_line(line, cause, tmp_path):
    write(
        tmp_path, "manifest.csv", "path,label,start,end", "a.mp4,dog,,", "", line, "c.mp4,dog,,", end="\r\n"
    )
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    text = error(tmp_path, "manifest", "train")
    assert text.startswith(f"{tmp_path / 'manifest.csv'}, line 4: {cause}") and "\n" not in text


def test_a_list_that_is_not_utf8_is_an_error_that_names_it(tmp_path):
    write(tmp_path, "manifest.csv", "path,label", "a.mp4,Häher", encoding="latin-1")
    assert error(tmp_path, "manifest", "train") == (
        f"{tmp_path / 'manifest.csv'}, line 2: not UTF-8; save the list as text in UTF-8"
    )


# folder


def test_a_folder_of_classes_is_read_whole_for_every_split(tmp_path):
    touch(
        tmp_path,
        "big dog/b.mp4",
        "big dog/a.MOV",
        "cat/deep/c.webm",
        "cat/notes.txt",
        ".cache/d.mp4",
        "cat/.e.mp4",
    )
    table = load(tmp_path, "folder", "train")
    assert labelled(table) == {
        "big dog/a.MOV": "big dog",
        "big dog/b.mp4": "big dog",
        "cat/deep/c.webm": "cat",
    }
    assert load(tmp_path, "folder", "test").paths == table.paths


def test_a_flat_folder_has_no_labels(tmp_path):
    touch(tmp_path, "b.mp4", "a.wav")
    table = load(tmp_path, "folder", "train")
    assert table.paths == ["a.wav", "b.mp4"] and table.labels.tolist() == [-1, -1] and table.classes == []


def test_a_folder_in_parts_gives_each_split_its_own(tmp_path):
    touch(tmp_path, "train/dog/a.mp4", "train/cat/b.mp4", "validation/dog/c.mp4", "spare/dog/d.mp4", "e.mp4")
    train, val = load(tmp_path, "folder", "train"), load(tmp_path, "folder", "val")
    assert labelled(train) == {"train/cat/b.mp4": "cat", "train/dog/a.mp4": "dog"}
    assert labelled(val) == {"validation/dog/c.mp4": "dog"} and val.classes == ["cat", "dog"]
    assert error(tmp_path, "folder", "test").startswith(
        f"folder test: no such split in {tmp_path}, only train, val\n"
    )


def test_one_part_alone_is_a_part_and_a_class_called_train_is_a_class(tmp_path):
    touch(tmp_path / "part", "train/dog/a.mp4")
    touch(tmp_path / "class", "train/a.mp4", "bus/b.mp4")
    assert labelled(load(tmp_path / "part", "folder", "train")) == {"train/dog/a.mp4": "dog"}
    assert labelled(load(tmp_path / "class", "folder", "train")) == {
        "bus/b.mp4": "bus",
        "train/a.mp4": "train",
    }
