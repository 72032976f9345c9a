"""Each benchmark's layout, built small out of empty files, with the quirks of its lists."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from avid import config, datasets
from avid.datasets import DataError

MEDIA = Path(os.environ.get("AVID_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def load(root, name, split, **settings):
    return datasets.load(config.Data(name=name, root=str(root), **settings), split)


def touch(root, *files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def write(root, file, *lines, end="\n", encoding="utf-8"):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_bytes("".join(line + end for line in lines).encode(encoding))


def labelled(table):
    """{path: class}, None where unlabelled."""
    labels = table.labels.tolist()
    return {path: table.classes[i] if i >= 0 else None for path, i in zip(table.paths, labels, strict=True)}


def error(root, name, split, **settings):
    with pytest.raises(DataError) as caught:
        load(root, name, split, **settings)
    return str(caught.value)


# every reader


def test_every_data_set_of_the_configuration_has_a_reader():
    assert sorted(config.DATA_SETS) == sorted(datasets.READERS) == sorted(datasets.EVALUATION_SPLIT)


@pytest.mark.parametrize("name", config.DATA_SETS)
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
    assert error(tmp_path, "vggsound", "val").startswith(f"vggsound val: no such split in {tmp_path}, only test, train\n")


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
    write(tmp_path, "manifest.csv", "path,label,start,end,loud", "a.mp4,x,1,2,no", "b.mp4,y,,,yes", "c.mp4,z,0.5,9,no")
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
    "path", ["../a.mp4", "x/../../a.mp4", "x/..", "/etc/a.mp4", r"..\a.mp4", r"C:\a.mp4", "C:a.mp4", r"\\host\a.mp4", ""]
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
    write(tmp_path, "manifest.csv", "path,label,start,end", "a.mp4,dog,,", "", line, "c.mp4,dog,,", end="\r\n")
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    text = error(tmp_path, "manifest", "train")
    assert text.startswith(f"{tmp_path / 'manifest.csv'}, line 4: {cause}") and "\n" not in text


def test_a_list_that_is_not_utf8_is_an_error_that_names_it(tmp_path):
    write(tmp_path, "manifest.csv", "path,label", "a.mp4,Häher", encoding="latin-1")
    assert error(tmp_path, "manifest", "train").startswith(f"cannot read {tmp_path / 'manifest.csv'}: 'utf-8' codec")


# folder


def test_a_folder_of_classes_is_read_whole_for_every_split(tmp_path):
    touch(tmp_path, "big dog/b.mp4", "big dog/a.MOV", "cat/deep/c.webm", "cat/notes.txt", ".cache/d.mp4", "cat/.e.mp4")
    table = load(tmp_path, "folder", "train")
    assert labelled(table) == {"big dog/a.MOV": "big dog", "big dog/b.mp4": "big dog", "cat/deep/c.webm": "cat"}
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
    assert error(tmp_path, "folder", "test").startswith(f"folder test: no such split in {tmp_path}, only train, val\n")


def test_one_part_alone_is_a_part_and_a_class_called_train_is_a_class(tmp_path):
    touch(tmp_path / "part", "train/dog/a.mp4")
    touch(tmp_path / "class", "train/a.mp4", "bus/b.mp4")
    assert labelled(load(tmp_path / "part", "folder", "train")) == {"train/dog/a.mp4": "dog"}
    assert labelled(load(tmp_path / "class", "folder", "train")) == {"bus/b.mp4": "bus", "train/a.mp4": "train"}


# Kinetics

KINETICS = "label,youtube_id,time_start,time_end,split,is_cc"


@pytest.mark.parametrize("list_of", ["annotations/{}.csv", "{}.csv", "kinetics600_{}.csv", "annotations/kinetics600_{}.csv"])
@pytest.mark.parametrize("val", ["val", "validate"])
@pytest.mark.parametrize("folder", ["{}/air drumming/", "{}/", "clips/", ""])
def test_kinetics_finds_what_its_lists_name(list_of, val, folder, tmp_path):
    write(tmp_path, list_of.format("train"), KINETICS, '"air drumming",-_a,5,15,train,0', "zumba,b,100,110,train,1")
    write(tmp_path, list_of.format(val), KINETICS, '"opening, a door",c,7,17,val,0', "zumba,d,0,10,val,0")
    train, held_out = folder.format("train"), folder.format(val)
    touch(tmp_path, f"{train}-_a_000005_000015.mp4", f"{train}b_000100_000110.mkv", f"{held_out}c_000007_000017.webm")
    table = load(tmp_path, "kinetics600", "train")
    assert labelled(table) == {f"{train}-_a_000005_000015.mp4": "air drumming", f"{train}b_000100_000110.mkv": "zumba"}
    table = load(tmp_path, "kinetics600", "val")
    assert labelled(table) == {f"{held_out}c_000007_000017.webm": "opening, a door"}
    assert table.classes == ["air drumming", "opening, a door", "zumba"]
    assert table.missing == ["d_000000_000010"] and table.name == "kinetics600 val"
    assert table.paths == load(tmp_path, "kinetics600", "validate").paths


def test_kinetics_test_list_may_have_no_labels(tmp_path):
    write(tmp_path, "train.csv", KINETICS, "zumba,a,0,10,train,0")
    write(tmp_path, "test.csv", "youtube_id,time_start,time_end,split", "b,0,10,test")
    touch(tmp_path, "test/b_000000_000010.mp4")
    table = load(tmp_path, "kinetics400", "test")
    assert labelled(table) == {"test/b_000000_000010.mp4": None} and table.classes == ["zumba"]


def test_kinetics_reads_class_folders_without_any_list(tmp_path):
    touch(tmp_path, "train/air drumming/a.mp4", "validate/zumba/b.mp4")
    assert labelled(load(tmp_path, "kinetics400", "val")) == {"validate/zumba/b.mp4": "zumba"}
    assert load(tmp_path, "kinetics400", "train").classes == ["air drumming", "zumba"]


def test_kinetics_without_lists_and_splits_is_refused(tmp_path):
    touch(tmp_path, "zumba/b.mp4")  # would be the training and the validation set at once
    assert error(tmp_path, "kinetics400", "val").startswith(f"kinetics400 val: no list or file in {tmp_path}\n")


def test_a_clip_in_two_lists_of_kinetics_is_an_error(tmp_path):
    write(tmp_path, "train.csv", KINETICS, "zumba,a,0,10,train,0")
    write(tmp_path, "val.csv", KINETICS, "zumba,b,0,10,val,0", "zumba,a,0,10,val,0")
    text = error(tmp_path, "kinetics400", "train")
    assert text == f"{tmp_path / 'val.csv'}, line 3: a_000000_000010 again, as in train.csv, line 2; keep one of them"


# VGG-Sound and AudioSet


@pytest.mark.parametrize("folder", ["video/", "part 1/", ""])
def test_vggsound_has_a_list_without_header_and_commas_in_labels(folder, tmp_path):
    write(tmp_path, "vggsound.csv", '-_A,1,"playing violin, fiddle",train', "B,130,people marching,test", end="\r\n")
    touch(tmp_path, f"{folder}-_A_000001.mp4", f"{folder}B_000130.mp4")
    assert labelled(load(tmp_path, "vggsound", "train")) == {f"{folder}-_A_000001.mp4": "playing violin, fiddle"}
    assert labelled(load(tmp_path, "vggsound", "test")) == {f"{folder}B_000130.mp4": "people marching"}


def audioset(root):
    write(
        root,
        "class_labels_indices.csv",
        "index,mid,display_name",
        "0,/m/09x0r,Speech",
        '1,/m/05zppz,"Male speech, man speaking"',
        "2,/t/dd00135,Children shouting",
    )
    comments = ("# Segments csv created Sun Mar  5", '# num_ytids=3, "num_segs', "# YTID, start_seconds, end_seconds, labels")
    write(
        root,
        "balanced_train_segments.csv",
        *comments,
        '--aA, 30.000, 40.000, "/m/09x0r,/t/dd00135"',
        'b_B, 1.000, 10.500, "/m/05zppz"',
        'c-C, 21.000, 31.000, "/m/09x0r,/m/05zppz"',
        'd-D, 2.000, 12.000, "/m/09x0r"',
    )
    write(root, "unbalanced_train_segments.csv", *comments, 'u, 0.000, 10.000, "/m/09x0r"')
    write(root, "eval_segments.csv", *comments, 'e, 0.000, 10.000, "/t/dd00135"')


@pytest.mark.parametrize("folder", ["balanced_train_segments/", "balanced_train_segments/video/", "all/", ""])
def test_audioset_has_several_labels_a_file_and_three_ways_to_name_it(folder, tmp_path):
    audioset(tmp_path)
    touch(tmp_path, *(folder + file for file in ("--aA_000030.mp4", "b_B_1000_10500.mp4", "c-C.mkv")))
    table = load(tmp_path, "audioset", "balanced_train")
    assert table.paths == [folder + file for file in ("--aA_000030.mp4", "b_B_1000_10500.mp4", "c-C.mkv")]
    assert table.classes == ["Children shouting", "Male speech, man speaking", "Speech"]
    assert table.labels.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 1]] and table.labels.dtype == np.uint8
    assert table.missing == ["d-D_000002"]
    assert datasets.take(table, [2]).labels.tolist() == [[0, 1, 1]]


def test_audioset_train_is_both_training_lists_and_test_is_eval(tmp_path):
    audioset(tmp_path)
    touch(tmp_path, "--aA_000030.mp4", "u_000000.mp4", "e_000000.mp4")
    assert load(tmp_path, "audioset", "train").paths == ["--aA_000030.mp4", "u_000000.mp4"]
    assert load(tmp_path, "audioset", "test").paths == load(tmp_path, "audioset", "eval").paths == ["e_000000.mp4"]
    (tmp_path / "unbalanced_train_segments.csv").unlink()
    assert load(tmp_path, "audioset", "train").paths == ["--aA_000030.mp4"]


def test_audioset_all_is_every_list(tmp_path):
    audioset(tmp_path)
    touch(tmp_path, "--aA_000030.mp4", "u_000000.mp4", "e_000000.mp4")
    assert load(tmp_path, "audioset", "all").paths == ["--aA_000030.mp4", "u_000000.mp4", "e_000000.mp4"]


def test_an_unknown_label_of_audioset_is_an_error_that_names_the_line(tmp_path):
    audioset(tmp_path)
    write(tmp_path, "eval_segments.csv", "# YTID", 'e, 0.000, 10.000, "/m/09x0r,/m/none"')
    touch(tmp_path, "e_000000.mp4")
    text = error(tmp_path, "audioset", "eval")
    assert text.startswith(f"{tmp_path / 'eval_segments.csv'}, line 2: a label of /m/09x0r,/m/none is not in")


# UCF101, HMDB51, ESC-50


def ucf101(root, number, train, test):
    write(root, f"ucfTrainTestlist/trainlist0{number}.txt", *train, end="\r\n")
    write(root, f"ucfTrainTestlist/testlist0{number}.txt", *test, end="\r\n")


@pytest.mark.parametrize("folder, ending", [("UCF-101/", ".avi"), ("UCF-101/", ".mp4"), ("", ".avi")])
def test_ucf101_has_three_splits_and_labels_by_folder(folder, ending, tmp_path):
    bow, push = "Archery/v_Archery_g0{}_c01", "HandstandPushups/v_HandStandPushups_g0{}_c01"
    ucf101(tmp_path, 1, [bow.format(1) + ".avi 1", push.format(1) + ".avi 2"], [bow.format(2) + ".avi"])
    ucf101(tmp_path, 2, [bow.format(2) + ".avi 1", push.format(1) + ".avi 2"], [bow.format(1) + ".avi"])
    touch(tmp_path, *(folder + file + ending for file in (bow.format(1), bow.format(2), push.format(1))))
    first = {folder + bow.format(1) + ending: "Archery", folder + push.format(1) + ending: "HandstandPushups"}
    second = {folder + bow.format(2) + ending: "Archery", folder + push.format(1) + ending: "HandstandPushups"}
    assert labelled(load(tmp_path, "ucf101", "train")) == labelled(load(tmp_path, "ucf101", "train1")) == first
    assert labelled(load(tmp_path, "ucf101", "train2")) == second
    assert labelled(load(tmp_path, "ucf101", "test2")) == {folder + bow.format(1) + ending: "Archery"}
    assert load(tmp_path, "ucf101", "test2").classes == ["Archery", "HandstandPushups"]
    assert load(tmp_path, "ucf101", "train").name == "ucf101 train1"
    assert len(load(tmp_path, "ucf101", "all")) == 3


@pytest.mark.parametrize(
    "line, cause",
    [
        ("v_Archery_g02_c01.avi", "'v_Archery_g02_c01.avi' where <class>/<file> belongs"),
        ("../v_Archery_g02_c01.avi", "'../v_Archery_g02_c01' is not a path below the data root"),
        ("Archery/v.avi", "Archery/v again, as in trainlist01.txt, line 1; keep one of them"),
    ],
)
def test_a_wrong_line_of_ucf101_is_an_error_that_names_it(line, cause, tmp_path):
    ucf101(tmp_path, 1, ["Archery/v.avi 1"], ["Archery/w.avi", line])
    touch(tmp_path, "UCF-101/Archery/v.avi", "UCF-101/Archery/w.avi", "v_Archery_g02_c01.avi")
    text = error(tmp_path, "ucf101", "test")
    assert text.startswith(f"{tmp_path / 'ucfTrainTestlist' / 'testlist01.txt'}, line 2: {cause}")


@pytest.mark.parametrize("split", ["train4", "train11", "val", "train0", ""])
@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_a_split_number_that_does_not_exist_is_an_error(split, name, tmp_path):
    assert error(tmp_path, name, split) == f"no split {split}; there are train1, test1 and so on up to 3, and all"


def hmdb51(root):
    lists = "testTrainMulti_7030_splits/"
    write(root, f"{lists}brush_hair_test_split1.txt", "April (1)!_np1.avi 1 ", "b.avi  2 ", "c.d.avi 0 ", "", end="\r\n")
    write(root, f"{lists}climb_test_split1.txt", "b.avi 2 ", "e.avi 1 ")
    write(root, f"{lists}climb_stairs_test_split1.txt", "f.avi 2 ")
    write(root, f"{lists}climb_test_split2.txt", "b.avi 1 ", "e.avi 2 ")


@pytest.mark.parametrize("folder", ["hmdb51_org/", ""])
def test_hmdb51_lists_say_1_for_train_2_for_test_and_0_for_neither(folder, tmp_path):
    hmdb51(tmp_path)
    files = "April (1)!_np1.avi", "b.avi", "c.d.avi"
    touch(tmp_path, *(f"{folder}brush_hair/{file}" for file in files))
    touch(tmp_path, f"{folder}climb/b.avi", f"{folder}climb_stairs/f.avi")
    train = load(tmp_path, "hmdb51", "train")
    assert labelled(train) == {f"{folder}brush_hair/April (1)!_np1.avi": "brush_hair"}
    assert train.classes == ["brush_hair", "climb", "climb_stairs"] and train.missing == ["climb/e"]
    assert labelled(load(tmp_path, "hmdb51", "test1")) == {
        f"{folder}brush_hair/b.avi": "brush_hair",
        f"{folder}climb/b.avi": "climb",
        f"{folder}climb_stairs/f.avi": "climb_stairs",
    }
    assert f"{folder}brush_hair/c.d.avi" in load(tmp_path, "hmdb51", "all").paths
    assert labelled(load(tmp_path, "hmdb51", "train2")) == {f"{folder}climb/b.avi": "climb"}


@pytest.mark.parametrize("line", ["b.avi 3", "b.avi", "b.avi one"])
def test_a_wrong_line_of_hmdb51_is_an_error_that_names_it(line, tmp_path):
    write(tmp_path, "testTrainMulti_7030_splits/wave_test_split1.txt", "a.avi 1", line)
    touch(tmp_path, "wave/a.avi", "wave/b.avi")
    path = tmp_path / "testTrainMulti_7030_splits" / "wave_test_split1.txt"
    assert error(tmp_path, "hmdb51", "train") == f"{path}, line 2: {line!r} where a file and 0, 1 or 2 belong"


@pytest.mark.parametrize("ending", [".wav", ".ogg"])
def test_esc50_has_five_folds_and_a_subset(ending, tmp_path):
    rows = [f"{fold}-{take}-A-{take}.wav,{fold},{take},{category},{ten},{take},A"
            for fold in range(1, 6) for take, category, ten in ((0, "dog", "True"), (7, "crow", "False"))]  # fmt: skip
    write(tmp_path, "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take", *rows, end="\r\n")
    touch(tmp_path, *(f"audio/{row.split('.')[0]}{ending}" for row in rows))
    train, test = load(tmp_path, "esc50", "train2"), load(tmp_path, "esc50", "test2")
    assert labelled(test) == {f"audio/2-0-A-0{ending}": "dog", f"audio/2-7-A-7{ending}": "crow"}
    assert test.fold.tolist() == [2, 2] and sorted(set(train.fold.tolist())) == [1, 3, 4, 5]
    assert load(tmp_path, "esc50", "all").fold.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    ten = load(tmp_path, "esc50", "all", subset="esc10")
    assert set(labelled(ten).values()) == {"dog"} and ten.classes == ["dog"] and ten.name == "esc10 all"
    assert test.columns["src_file"] == ["0", "7"]


def test_a_subset_that_a_data_set_does_not_have_is_an_error(tmp_path):
    for name, subset in ("esc50", "esc11"), ("ucf101", "esc10"):
        assert error(tmp_path, name, "train", subset=subset).startswith(f"data.subset={subset}: {name} has none of that")


@pytest.mark.skipif(not (MEDIA / "esc10").is_dir(), reason="no real data: AVID_TEST_DATA names no folder with esc10/")
def test_esc10_as_published_has_five_folds_of_eighty():
    table = load(MEDIA / "esc10", "esc50", "all", subset="esc10")
    assert len(table) == 400 and len(table.classes) == 10 and table.missing == []
    assert np.bincount(table.fold).tolist() == [0, 80, 80, 80, 80, 80]
    assert np.bincount(table.labels).tolist() == [40] * 10
    for path, fold, label in zip(table.paths, table.fold, table.labels, strict=True):  # 1-100032-A-0.ogg: fold, …, target
        parts = Path(path).stem.split("-")
        assert int(parts[0]) == fold and (table.classes[label] == "dog") == (parts[3] == "0")
        assert (table.root / path).is_file()
    train, test = (load(MEDIA / "esc10", "esc50", split) for split in ("train3", "test3"))
    assert len(train) == 320 and len(test) == 80 and not set(train.paths) & set(test.paths)
