"""Each benchmark's layout, built small out of empty files, with the quirks of its lists."""

import os
from pathlib import Path

import numpy as np
import pytest
from test_datasets import KINETICS, error, labelled, load, touch, ucf101, write

from avid import datasets

MEDIA = Path(os.environ.get("AVID_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


# Kinetics


@pytest.mark.parametrize(
    "list_of", ["annotations/{}.csv", "{}.csv", "kinetics600_{}.csv", "annotations/kinetics600_{}.csv"]
)
@pytest.mark.parametrize("val", ["val", "validate"])
@pytest.mark.parametrize("folder", ["{}/air drumming/", "{}/", "clips/", ""])
def test_kinetics_finds_what_its_lists_name(list_of, val, folder, tmp_path):
    write(
        tmp_path,
        list_of.format("train"),
        KINETICS,
        '"air drumming",-_a,5,15,train,0',
        "zumba,b,100,110,train,1",
    )
    write(tmp_path, list_of.format(val), KINETICS, '"opening, a door",c,7,17,val,0', "zumba,d,0,10,val,0")
    train, held_out = folder.format("train"), folder.format(val)
    touch(
        tmp_path,
        f"{train}-_a_000005_000015.mp4",
        f"{train}b_000100_000110.mkv",
        f"{held_out}c_000007_000017.webm",
    )
    table = load(tmp_path, "kinetics600", "train")
    assert labelled(table) == {
        f"{train}-_a_000005_000015.mp4": "air drumming",
        f"{train}b_000100_000110.mkv": "zumba",
    }
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
    assert error(tmp_path, "kinetics400", "val").startswith(f"kinetics400: no list or file in {tmp_path}\n")


def test_a_clip_in_two_lists_of_kinetics_is_an_error(tmp_path):
    write(tmp_path, "train.csv", KINETICS, "zumba,a,0,10,train,0")
    write(tmp_path, "val.csv", KINETICS, "zumba,b,0,10,val,0", "zumba,a,0,10,val,0")
    text = error(tmp_path, "kinetics400", "train")
    assert (
        text
        == f"{tmp_path / 'val.csv'}, line 3: a_000000_000010 again, as in train.csv, line 2; keep one of them"
    )


# VGG-Sound and AudioSet


@pytest.mark.parametrize("folder", ["video/", "part 1/", ""])
def test_vggsound_has_a_list_without_header_and_commas_in_labels(folder, tmp_path):
    write(
        tmp_path,
        "vggsound.csv",
        '-_A,1,"playing violin, fiddle",train',
        "B,130,people marching,test",
        end="\r\n",
    )
    touch(tmp_path, f"{folder}-_A_000001.mp4", f"{folder}B_000130.mp4")
    assert labelled(load(tmp_path, "vggsound", "train")) == {
        f"{folder}-_A_000001.mp4": "playing violin, fiddle"
    }
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
    comments = (
        "# Segments csv created Sun Mar  5",
        '# num_ytids=3, "num_segs',
        "# YTID, start_seconds, end_seconds, labels",
    )
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
    assert (
        load(tmp_path, "audioset", "test").paths
        == load(tmp_path, "audioset", "eval").paths
        == ["e_000000.mp4"]
    )
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


@pytest.mark.parametrize("folder, ending", [("UCF-101/", ".avi"), ("UCF-101/", ".mp4"), ("", ".avi")])
def test_ucf101_has_three_splits_and_labels_by_folder(folder, ending, tmp_path):
    bow, push = "Archery/v_Archery_g0{}_c01", "HandstandPushups/v_HandStandPushups_g0{}_c01"
    ucf101(tmp_path, 1, [bow.format(1) + ".avi 1", push.format(1) + ".avi 2"], [bow.format(2) + ".avi"])
    ucf101(tmp_path, 2, [bow.format(2) + ".avi 1", push.format(1) + ".avi 2"], [bow.format(1) + ".avi"])
    touch(tmp_path, *(folder + file + ending for file in (bow.format(1), bow.format(2), push.format(1))))
    first = {folder + bow.format(1) + ending: "Archery", folder + push.format(1) + ending: "HandstandPushups"}
    second = {
        folder + bow.format(2) + ending: "Archery",
        folder + push.format(1) + ending: "HandstandPushups",
    }
    assert (
        labelled(load(tmp_path, "ucf101", "train")) == labelled(load(tmp_path, "ucf101", "train1")) == first
    )
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
        ("Archery/v.avi", "UCF-101/Archery/v.avi again, as in trainlist01.txt, line 1; keep one of them"),
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
    assert (
        error(tmp_path, name, split)
        == f"no split {split}; there are train1, test1 and so on up to 3, and all"
    )


def hmdb51(root):
    lists = "testTrainMulti_7030_splits/"
    write(
        root,
        f"{lists}brush_hair_test_split1.txt",
        "April (1)!_np1.avi 1 ",
        "b.avi  2 ",
        "c.d.avi 0 ",
        "",
        end="\r\n",
    )
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
    takes = (0, "dog", "True"), (7, "crow", "False")
    rows = [
        f"{fold}-{take}-A-{take}.wav,{fold},{take},{category},{ten},{take},A"
        for fold in range(1, 6)
        for take, category, ten in takes
    ]
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
        assert error(tmp_path, name, "train", subset=subset).startswith(
            f"data.subset={subset}: {name} has none of that"
        )


@pytest.mark.skipif(
    not (MEDIA / "esc10").is_dir(), reason="no real data: AVID_TEST_DATA names no folder with esc10/"
)
def test_esc10_as_published_has_five_folds_of_eighty():
    table = load(MEDIA / "esc10", "esc50", "all", subset="esc10")
    assert len(table) == 400 and len(table.classes) == 10 and table.missing == []
    assert np.bincount(table.fold).tolist() == [0, 80, 80, 80, 80, 80]
    assert np.bincount(table.labels).tolist() == [40] * 10
    for path, fold, label in zip(
        table.paths, table.fold, table.labels, strict=True
    ):  # 1-100032-A-0.ogg: fold, …, target
        parts = Path(path).stem.split("-")
        assert int(parts[0]) == fold and (table.classes[label] == "dog") == (parts[3] == "0")
        assert (table.root / path).is_file()
    train, test = (load(MEDIA / "esc10", "esc50", split) for split in ("train3", "test3"))
    assert len(train) == 320 and len(test) == 80 and not set(train.paths) & set(test.paths)
