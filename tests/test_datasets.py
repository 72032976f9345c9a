"""The tables that all readers give, and the lists and folders of no benchmark; the benchmarks' are in
test_benchmarks_lists.py.
"""

import csv
import hashlib
import json
import os
import time
from collections import Counter
from unittest import mock

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
        f"{tmp_path.name}/manifest.csv train: 1 files, 2 classes; "
        "1,200 more are listed and not on disk, e.g. 0.mp4, 1.mp4, 2.mp4"
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
        f"{tmp_path / 'manifest.csv'}, line 4: v/a.mp4 again, as in manifest.csv, line 2 "
        "(1 more such lines); keep one of them"
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


@pytest.mark.parametrize("ending", ["MTS", "m2ts", "ts", "ogv", "3gp", "webm", "wma", "opus"])
def test_files_of_every_usual_ending_are_found(ending, tmp_path):
    touch(tmp_path, f"a.{ending}", "a.txt")
    assert load(tmp_path, "folder", "train").paths == [f"a.{ending}"]


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


# parts by any name, links, depth


@pytest.mark.parametrize(
    "train, test",
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("train_256", "eval"),
        ("TRAIN", "Evaluation"),
        ("train set", "test-2"),
    ],
)
def test_parts_are_known_by_any_usual_name(train, test, tmp_path):
    touch(tmp_path, f"{train}/dog/a.mp4", f"{train}/cat/b.mp4", f"{test}/dog/c.mp4", "val_256/cat/d.mp4")
    assert set(labelled(load(tmp_path, "folder", "train")).values()) == {"dog", "cat"}
    assert labelled(load(tmp_path, "folder", "test")) == {f"{test}/dog/c.mp4": "dog"}
    assert labelled(load(tmp_path, "folder", "valid")) == {"val_256/cat/d.mp4": "cat"}
    for name in ("kinetics400", "folder"):
        assert load(tmp_path, name, "train").classes == ["cat", "dog"]


def test_names_that_only_begin_like_a_part_are_classes(tmp_path):
    touch(tmp_path, "trainer/a.mp4", "test tube/b.mp4", "evaluate/c.mp4")
    assert load(tmp_path, "folder", "train").classes == ["evaluate", "test tube", "trainer"]


def test_what_lies_beside_the_parts_and_parts_of_several_folders_are_said(tmp_path):
    touch(tmp_path, "train_1/a/a.mp4", "train_2/a/b.mp4", "test/a/c.mp4", "spare/d.mp4", "e.mp4")
    said = load(tmp_path, "folder", "train").report()
    assert "2 files beside its parts were left out, e.g. e.mp4" in said
    assert "train_1 and train_2 are its train part" in said


def test_no_file_is_too_deep(tmp_path):
    deep = "/".join("abcdefghij")
    touch(tmp_path, f"x/{deep}/a.mp4")
    assert labelled(load(tmp_path, "folder", "train")) == {f"x/{deep}/a.mp4": "x"}
    write(tmp_path, "vggsound.csv", "k,0,dog,train")
    touch(tmp_path, f"{deep}/k_000000.mp4")
    assert load(tmp_path, "vggsound", "train").paths == [f"{deep}/k_000000.mp4"]


def test_a_file_that_links_give_again_is_there_once_and_it_is_said(tmp_path):
    touch(tmp_path, "in/x/a.mp4", "in/y/b.mp4", "out/c.mp4")
    (tmp_path / "in/x/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/again").symlink_to(tmp_path / "in/y")
    (tmp_path / "in/y/a too.mp4").symlink_to("../x/a.mp4")
    (tmp_path / "in/z").symlink_to(tmp_path / "out")
    (tmp_path / "in/z too").symlink_to(tmp_path / "out")
    table = load(tmp_path / "in", "folder", "train")
    assert table.paths == ["x/a.mp4", "y/b.mp4", "z/c.mp4"]
    assert "1 links to folders that it has already were left out, e.g. x/loop/" in table.report()
    assert "; 4 files that links give once more were left out" in table.report()


def test_a_folder_of_links_is_as_it_looks(tmp_path):
    touch(tmp_path, "store/1.mp4", "store/2.mp4")
    (tmp_path / "in/train").mkdir(parents=True)
    (tmp_path / "in/test").mkdir()
    (tmp_path / "in/train/a.mp4").symlink_to(tmp_path / "store/1.mp4")
    (tmp_path / "in/test/b.mp4").symlink_to("../../store/2.mp4")
    assert load(tmp_path / "in", "folder", "train").paths == ["train/a.mp4"]
    assert load(tmp_path / "in", "folder", "test").paths == ["test/b.mp4"]
    assert ";" not in load(tmp_path / "in", "folder", "train").report()


# instances


def test_a_file_may_give_several_instances(tmp_path):
    write(
        tmp_path,
        "manifest.csv",
        "path,label,start,end",
        "a.mp4,x,0,10",
        "a.mp4,y,12,22",
        "b.mp4,x,,",
        "a.mp4,x,40,",
    )
    touch(tmp_path, "a.mp4", "b.mp4")
    table = load(tmp_path, "manifest", "train")
    assert table.paths == ["a.mp4", "a.mp4", "b.mp4", "a.mp4"]
    names = ["a.mp4 [0.0-10.0 s]", "a.mp4 [12.0-22.0 s]", "b.mp4", "a.mp4 [40.0-end]"]
    assert [table.name_of(i) for i in range(4)] == names
    assert table.report().endswith("train: 4 clips of 2 files, 2 classes")


def test_the_same_part_twice_is_an_error_that_names_it(tmp_path):
    write(tmp_path, "manifest.csv", "path,start,end", "a.mp4,0,10", "a.mp4,12,22", "a.mp4,12.0,22")
    touch(tmp_path, "a.mp4")
    assert error(tmp_path, "manifest", "train") == (
        f"{tmp_path / 'manifest.csv'}, line 4: a.mp4 [12.0-22.0 s] again, "
        "as in manifest.csv, line 3; keep one of them"
    )


@pytest.mark.parametrize("name", ["kinetics400", "vggsound", "audioset", "ucf101", "hmdb51", "esc50"])
@pytest.mark.parametrize("there", [True, False])
def test_a_row_that_an_official_list_has_twice_is_left_out_and_said(name, there, tmp_path):
    write(tmp_path, "train.csv", KINETICS, *["x,k,0,10,train,0", "x,l,0,10,train,0"] * 2)
    write(tmp_path, "vggsound.csv", *["k,0,x,train", "l,0,x,train"] * 2)
    write(tmp_path, "class_labels_indices.csv", "index,mid,display_name", "0,/m/x,x")
    write(
        tmp_path, "balanced_train_segments.csv", *['k, 0.000, 10.000, "/m/x"', 'l, 0.000, 10.000, "/m/x"'] * 2
    )
    ucf101(tmp_path, 1, ["x/k.avi 1", "x/l.avi 1"] * 2, ["x/m.avi"])
    write(tmp_path, "testTrainMulti_7030_splits/x_test_split1.txt", *["k.avi 1", "l.avi 1"] * 2)
    write(
        tmp_path, "meta/esc50.csv", "filename,fold,category,esc10", *["k.wav,2,x,True", "l.wav,2,x,True"] * 2
    )
    stem = {"kinetics400": "{}_000000_000010", "vggsound": "{}_000000", "audioset": "{}_000000"}.get(
        name, "x/{}"
    )
    touch(tmp_path, stem.format("l") + ".mp4", *[stem.format("k") + ".mp4"] * there)
    table = load(tmp_path, name, "train")
    assert len(table) == 1 + there and len(table.missing) == 1 - there
    assert "; warning: 2 lines name a file again and were left out, e.g. " in table.report()


def test_lines_are_named_rightly_wherever_a_list_is_cut_into_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "PIECE", 100)
    rows = [f"v/{i}.mp4,ä{i % 3},{i % 7},\n" for i in range(300)]
    touch(tmp_path, *(row.partition(",")[0] for row in rows))
    head = "path,label,start,end\n"
    (tmp_path / "manifest.csv").write_text(head + "".join(rows))
    table = load(tmp_path, "manifest", "train")
    assert table.paths == [f"v/{i}.mp4" for i in range(300)] and table.start_s.tolist() == [
        i % 7 for i in range(300)
    ]
    assert [table.classes[i] for i in table.labels[:4]] == ["ä0", "ä1", "ä2", "ä0"]
    for fault, said in (
        ('"v/x.mp4,a,,\n', "not CSV: unexpected end of data"),
        ("v/x.mp4,a,now,\n", "'now' where a number"),
        ("v/x.mp4,a\n", "2 fields where 4 belong"),
        ("v/x\0.mp4,a,,\n", "a zero byte"),
        ("v/\udcff.mp4,a,,\n", "not UTF-8"),
        ("v/17.mp4,a,3,\n", "v/17.mp4 [3.0-end] again, as in manifest.csv, line 19; keep"),
    ):
        text = head + "".join(rows[:200]) + "\n" + fault + "".join(rows[200:])
        (tmp_path / "manifest.csv").write_bytes(text.encode(errors="surrogateescape"))
        assert error(tmp_path, "manifest", "train").startswith(
            f"{tmp_path / 'manifest.csv'}, line 203: {said}"
        )


def test_the_hash_is_that_of_the_whole_json(tmp_path, monkeypatch):
    """Run folders of before hold it."""
    write(
        tmp_path, "manifest.csv", "path,start,end", 'ä"b.mp4,0.1,', "c.mp4,,7.25", "d.mp4,,", "c.mp4,7.25,8"
    )
    (tmp_path / "manifest.csv").write_text(
        'path,start,end\n"ä ""b.mp4",0.1,\nc.mp4,,7.25\nd.mp4,,\nc.mp4,7.25,8\n'
    )
    touch(tmp_path, 'ä "b.mp4', "c.mp4", "d.mp4")
    table = load(tmp_path, "manifest", "train")
    assert len(table) == 4
    whole = json.dumps([table.paths, table.start_s.tolist(), table.end_s.tolist()])
    expected = hashlib.sha256(whole.encode()).hexdigest()[:12]
    for piece in (1, 2, 3, 100):
        monkeypatch.setattr(datasets, "PIECE", piece)
        assert datasets.table_hash(table) == expected


def test_to_read_a_list_costs_little_more_than_to_split_it(tmp_path):
    """Seconds of processor time, the least of three: 200,000 lines are read while a run starts."""
    n = 20_000
    paths = [f"v/{i % 50}/{i}.mp4" for i in range(n)]
    touch(tmp_path, *paths)
    write(tmp_path, "manifest.csv", "path,label,start,end", *(f"{p},{p[2:4]},{len(p)},20" for p in paths))

    def split():
        list(csv.reader(open(tmp_path / "manifest.csv", newline="")))

    spent = {}
    for name, function in (("split", split), ("load", lambda: load(tmp_path, "manifest", "train"))):
        seconds = []
        for _ in range(3):
            begun = time.process_time()
            function()
            seconds.append(time.process_time() - begun)
        spent[name] = min(seconds)
    assert spent["load"] < 15 * spent["split"]


# what is held out


def test_a_fifth_of_each_class_is_held_out_by_the_seed(tmp_path):
    touch(tmp_path, *(f"{label}/{i}.mp4" for label, n in (("a", 10), ("b", 4), ("c", 17)) for i in range(n)))
    table = load(tmp_path, "folder", "train")
    rng, held = np.random.default_rng(7), set()
    for label in range(3):  # as evaluations have done from the beginning
        alike = np.flatnonzero(table.labels == label)
        held |= {table.paths[i] for i in rng.permutation(alike)[: max(len(alike) // 5, 1)]}
    train, test = datasets.hold_out(table, 7)
    assert set(test.paths) == held and len(test) == 2 + 1 + 3
    assert sorted(train.paths + test.paths) == sorted(table.paths)
    assert (train.name, test.name) == ("folder train (train)", "folder train (test)")


def test_all_instances_of_a_file_are_held_out_together(tmp_path):
    rows = [f"{i}.mp4,{k},{k + 1}" for i in range(10) for k in range(20)]
    write(tmp_path, "manifest.csv", "path,start,end", *rows)
    touch(tmp_path, *(f"{i}.mp4" for i in range(10)))
    train, test = datasets.hold_out(load(tmp_path, "manifest", "train"), 0)
    assert len(test) == 40 and len(set(test.paths)) == 2 and not set(train.paths) & set(test.paths)


def test_what_training_sees_is_not_held_out(tmp_path):
    touch(tmp_path / "whole", "a/1.mp4", "b/2.mp4")
    touch(tmp_path / "parts", "train/1.mp4", "val/2.mp4")
    touch(tmp_path / "list", "1.mp4", "2.mp4")
    write(
        tmp_path / "list",
        "manifest.csv",
        "path,split,start,end",
        "1.mp4,train,,",
        "2.mp4,,0,5",
        "2.mp4,test,5,9",
    )

    def held_out(name, folder):
        source = config.Data(name=name, root=str(tmp_path / folder))
        return datasets.for_training(source)[1]

    assert held_out("folder", "whole") is None
    assert held_out("folder", "parts").paths == ["val/2.mp4"]
    only = held_out("manifest", "list")
    assert [only.name_of(i) for i in range(len(only))] == ["2.mp4 [5.0-9.0 s]"]


def test_a_training_on_a_numbered_division_is_checked_on_its_test_part(tmp_path):
    ucf101(tmp_path, 1, ["A/a.avi 1"], ["A/b.avi"])
    ucf101(tmp_path, 2, ["A/b.avi 1"], ["A/a.avi"])
    touch(tmp_path, "A/a.avi", "A/b.avi")
    for split, expected in (("", "A/b.avi"), ("train2", "A/a.avi")):
        source = config.Data(name="ucf101", root=str(tmp_path), split=split)
        assert datasets.for_training(source)[1].paths == [expected]


@pytest.mark.parametrize("name", ["kinetics400", "audioset", "folder"])
def test_training_reads_every_list_and_folder_once(name, tmp_path):
    for part in ("train", "val"):
        write(tmp_path, f"annotations/{part}.csv", KINETICS, f"zumba,{part},0,10,{part},0")
    write(tmp_path, "class_labels_indices.csv", "index,mid,display_name", "0,/m/a,A")
    for part in ("unbalanced_train", "eval"):
        write(tmp_path, f"{part}_segments.csv", f'{part}, 0.000, 10.000, "/m/a"')
    files = ["train/a/train_000000_000010.mp4", "val/a/val_000000_000010.mp4"]
    touch(tmp_path, *files, "train/a/unbalanced_train_000000.mp4", "val/a/eval_000000.mp4")
    read, walked = Counter(), Counter()

    def lines(path, *arguments, original=datasets._lines):
        read[path.name] += 1
        return original(path, *arguments)

    def walk(root, *arguments, original=datasets.walk):
        walked[root] += 1
        return original(root, *arguments)

    with mock.patch.object(datasets, "_lines", lines), mock.patch.object(datasets, "walk", walk):
        train, held_out = datasets.for_training(config.Data(name=name, root=str(tmp_path)))
    assert {*read.values(), *walked.values()} == {1}
    assert [len(train), len(held_out)] == ([2, 2] if name == "folder" else [1, 1])
    for table, split in ((train, "train"), (held_out, {"audioset": "eval"}.get(name, "val"))):
        alone = load(tmp_path, name, split)
        assert (table.paths, table.missing) == (alone.paths, alone.missing)
        assert table.labels.tolist() == alone.labels.tolist() and table.classes == alone.classes


def test_a_training_part_alone_can_be_trained_on(tmp_path):
    for part in ("train", "val"):
        write(tmp_path, f"{part}.csv", KINETICS, f"zumba,{part},0,10,{part},0")
    touch(tmp_path, "train/train_000000_000010.mp4")
    train, held_out = datasets.for_training(config.Data(name="kinetics400", root=str(tmp_path)))
    assert labelled(train) == {"train/train_000000_000010.mp4": "zumba"} and held_out is None


def test_a_clip_in_the_folders_of_two_parts_belongs_to_one_list(tmp_path):
    for part in ("train", "val"):
        write(tmp_path, f"{part}.csv", KINETICS, f"zumba,a,0,10,{part},0")
        touch(tmp_path, f"{part}/a_000000_000010.mp4")
    with pytest.raises(DataError, match=r"a_000000_000010\.mp4 again, as in train\.csv, line 2"):
        datasets.for_training(config.Data(name="kinetics400", root=str(tmp_path)))
