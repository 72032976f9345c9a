"""Ranking and linear classifiers against independent references; held-out files; saved features; the files
that are evaluated."""

import dataclasses
import itertools
import json
import re
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tone, write_media

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval_linear
import eval_retrieval
import train
from avid import config, data, datasets, distributed, evaluation, memory_bank, models
from avid.media import MediaError
from avid.tools import page


def unit(rows, dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("q", "g", "k", "rows", "columns"),
    [(7, 30, 5, 3, 4), (1, 1, 3, 10, 10), (20, 50, 50, 6, 7), (5, 9, 20, 2, 100)],
)
def test_nearest_is_a_sort_by_similarity(q, g, k, rows, columns):
    queries, gallery = unit(q, 8), unit(g, 8, seed=1)
    expected = np.argsort(-(queries @ gallery.T), axis=1)[:, : min(k, g)]
    np.testing.assert_array_equal(
        evaluation.nearest(queries, gallery, k, rows=rows, columns=columns), expected
    )


def test_an_excluded_query_is_not_found():
    x = unit(25, 6)
    found = evaluation.nearest(x, x, 4, exclude=np.arange(25), rows=4, columns=6)
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    np.testing.assert_array_equal(found, np.argsort(-similarity, axis=1)[:, :4])


def test_recall_counts_queries_with_a_match_among_the_first_k():
    query_y, key_y = np.array([0, 1, 2]), np.array([1, 0, 2, 1])
    found = np.array([[0, 1, 2], [0, 1, 2], [1, 3, 0]])
    result = evaluation.recall(found, lambda q, f: query_y[q] == key_y[f], (1, 2, 3, 5))
    assert result == pytest.approx({"R@1": 100 / 3, "R@2": 200 / 3, "R@3": 200 / 3})


def test_recall_equals_a_plain_count():
    queries, gallery = unit(40, 5), unit(60, 5, seed=1)
    rng = np.random.default_rng(2)
    query_y, key_y = rng.integers(4, size=40), rng.integers(4, size=60)
    result = evaluation.recall(
        evaluation.nearest(queries, gallery, 20), lambda q, f: query_y[q] == key_y[f], (1, 5, 20)
    )
    for k in (1, 5, 20):
        hits = 0
        for i in range(40):
            ranked = sorted(range(60), key=lambda j: -float(queries[i] @ gallery[j]))[:k]
            hits += any(key_y[j] == query_y[i] for j in ranked)
        assert result[f"R@{k}"] == pytest.approx(100 * hits / 40)


def test_a_large_ranking_needs_no_matrix_of_all_similarities():
    """10,000 queries, 100,000 videos, 512 dimensions: the matrix would be 4 GB."""
    torch.manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(100_000, 512), dim=1)
    rows = torch.randperm(100_000)[:10_000]
    queries = torch.nn.functional.normalize(gallery[rows] + 0.01 * torch.randn(10_000, 512), dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = evaluation.nearest(queries, gallery, 20)
    assert found.shape == (10_000, 20)
    assert (found[:, 0] == rows.numpy()).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


def clouds(n, clips, seed):
    """Three classes of Gaussian clouds, in which clips of a video are close: features n×K×F, labels n."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    centre = np.eye(3, 6)[y] * 3
    return (centre[:, None] + rng.standard_normal((n, 1, 6)) + rng.standard_normal((n, clips, 6))).astype(
        np.float32
    ), y


@pytest.mark.parametrize("classifier", ["linear", "svm"])
def test_a_linear_classifier_learns_clouds_and_not_noise(classifier):
    (train_x, train_y), (test_x, test_y) = clouds(90, 4, 0), clouds(60, 4, 1)
    result = evaluation.linear_probe(train_x, train_y, test_x, test_y, 0, classifier)
    assert result["top1"] > 85 and result["top5"] == 100
    assert result["top1"] >= result["clip_top1"]  # the average over clips is better than one clip
    noise = np.random.default_rng(0).standard_normal(train_x.shape).astype(np.float32)
    assert evaluation.linear_probe(noise, train_y, test_x, test_y, 0, classifier)["top1"] < 70


def test_an_svm_handles_two_classes():
    (train_x, train_y), (test_x, test_y) = clouds(90, 2, 0), clouds(60, 2, 1)
    few, test_few = train_y < 2, test_y < 2
    result = evaluation.linear_probe(train_x[few], train_y[few], test_x[test_few], test_y[test_few], 0, "svm")
    assert result["top1"] > 85


def test_accuracies_average_scores_over_clips():
    # 2 videos, 2 clips
    scores = np.array([[[0.6, 0.4, 0.0], [0.0, 0.9, 0.1]], [[0.2, 0.2, 0.6], [0.5, 0.3, 0.2]]])
    result = evaluation.accuracies(scores, np.array([10, 30]), np.array([10, 20, 30]))
    assert result == {"top1": 50.0, "top5": 100.0, "clip_top1": 50.0}


def test_few_shot_accuracy_grows_with_the_number_of_shots():
    (train_x, train_y), (test_x, test_y) = clouds(90, 2, 0), clouds(60, 2, 1)
    result = evaluation.few_shot(train_x, train_y, test_x, test_y, 0, shots=(1, 20), draws=5)
    assert result["20-shot top1"] > result["1-shot top1"] and result["1-shot std"] > 0


def test_a_folder_without_splits_is_split_within_each_class(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(10):
            (tmp_path / label / f"{i}.mp4").touch()
    cfg = config.load("toy", ["data.name=folder", f"data.root={tmp_path}"])
    ((train, test),) = evaluation.tables(cfg)
    assert not set(train.paths) & set(test.paths) and len(train) == 16
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert next(evaluation.tables(cfg))[1].paths == test.paths


def test_all_numbered_divisions_or_one_of_them(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "audio").mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    for i in range(10):
        rows.append(f"{i}.wav,{i % 5 + 1},0,dog,True,x,A")
        (tmp_path / "audio" / f"{i}.wav").touch()
    (tmp_path / "meta" / "esc50.csv").write_text("\n".join(rows))
    settings = ["data.name=esc50", f"data.root={tmp_path}"]
    assert len(list(evaluation.tables(config.load("toy", [*settings, "data.split=all"])))) == 5
    ((_, test),) = evaluation.tables(config.load("toy", [*settings, "data.split=2"]))
    assert test.paths == ["audio/1.wav", "audio/6.wav"]


def test_files_without_a_class_are_an_error_that_counts_them():
    whole = np.zeros(3), np.full(3, np.inf), np.zeros(3)  # start_s, end_s, fold
    paths, labels = ["a.mp4", "b.mp4", "c.mp4"], np.array([0, -1, 1])
    table = datasets.Table("x", Path("."), paths, labels, ["p", "q"], *whole, {}, [])
    with pytest.raises(
        datasets.DataError, match=r"x: 1 of 3 files have no class, e\.g\. b\.mp4; give them one"
    ):
        evaluation.labels_of(table)
    table.labels = np.array([[0, 1], [1, 1], [0, 0]], np.uint8)
    with pytest.raises(datasets.DataError, match="x has several classes a file"):
        evaluation.labels_of(table)
    with pytest.raises(datasets.DataError, match=r"1 of 3 files have no class, e\.g\. c\.mp4"):
        evaluation.labels_of(table, several=True)


def test_with_several_classes_a_match_shares_one():
    """Every picture finds the sound of the next video. Videos 0, 1 and videos 1, 2 share a class."""
    eye = np.eye(3, dtype=np.float32)[:, None]  # 3×1×D
    found = evaluation.Features(np.arange(3), embeddings={"video": eye, "audio": eye[[2, 0, 1]]})
    labels = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]], np.uint8)
    result = evaluation.cross_modal(found, labels, ks=(1,))
    assert (result["v→a instance R@1"], result["v→a class R@1"], result["a→v class R@1"]) == pytest.approx(
        (0, 200 / 3, 200 / 3)
    )
    labels[2] = 0  # without any class
    assert not any("class" in name for name in evaluation.cross_modal(found, labels, ks=(1,)))


def test_saved_features_are_loaded_unchanged(tmp_path):
    found = evaluation.Features(
        np.array([0, 2]),
        {"video": unit(4, 3).reshape(2, 2, 3)},
        {"video": unit(4, 5).reshape(2, 2, 5)},
        {1: "no sound"},
    )
    found.save(tmp_path / "f.npz", labels=np.array([3, 4]))
    kept = evaluation.Features.load(tmp_path / "f.npz")
    assert kept.failures == {1: "no sound"} and kept.index.tolist() == [0, 2]
    np.testing.assert_array_equal(kept.features["video"], found.features["video"])
    np.testing.assert_array_equal(kept.embeddings["video"], found.embeddings["video"])
    with np.load(tmp_path / "f.npz") as arrays:
        assert arrays["labels"].tolist() == [3, 4] and json.loads(str(arrays["failures"])) == {
            "1": "no sound"
        }
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


def test_video_level_embeddings_have_unit_length():
    found = evaluation.Features(
        np.arange(3), {}, {"audio": np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)}
    )
    np.testing.assert_allclose(np.linalg.norm(found.video_level("embeddings", "audio"), axis=1), 1, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- chance


def test_chance_is_the_mean_over_all_orders():
    """In a gallery of six: the share of orders with a match among the first k, for 0, 1, 2, 6 matches."""
    matching, ks = [0, 1, 2, 6], (1, 2, 5, 6)
    result = evaluation.chance(matching, 6, (*ks, 7))
    assert list(result) == [f"R@{k}" for k in ks]
    for k in ks:
        firsts = list(itertools.combinations(range(6), k))  # the m videos 0 … m − 1 match
        shares = [np.mean([min(first) < m for first in firsts]) for m in matching]
        assert result[f"R@{k}"] == pytest.approx(100 * np.mean(shares))


def test_random_features_reach_chance():
    rng, n = np.random.default_rng(0), 400
    labels = rng.integers(7, size=n)
    found = evaluation.nearest(unit(n, 8), unit(n, 8, seed=1), 20)
    by_class = evaluation.recall(found, datasets.same_class(labels, labels), (1, 5, 20))
    expected = evaluation.chance(evaluation.matching(labels, labels), n, (1, 5, 20))
    assert by_class == pytest.approx(expected, abs=7)


def test_matching_counts_videos_that_share_a_class():
    query, gallery = np.array([0, 3, 1, -1]), np.array([1, 1, 0, -1, 2])
    assert evaluation.matching(query, gallery).tolist() == [1, 0, 2, 0]
    rng = np.random.default_rng(0)
    for q, g in (
        (rng.integers(-1, 4, 30), rng.integers(-1, 4, 40)),
        (rng.random((9, 5)) < 0.3, rng.random((8, 5)) < 0.3),
    ):
        q, g = (
            q.astype(np.int64 if q.ndim == 1 else np.uint8),
            g.astype(np.int64 if g.ndim == 1 else np.uint8),
        )
        match = datasets.same_class(q, g)
        counts = [match(i, np.arange(len(g))).sum() for i in range(len(q))]
        assert evaluation.matching(q, g).tolist() == counts


# ------------------------------------------------------------------------------------ several classes a video


def average_precision(truth, score):
    """The mean over the videos of the class: the share of the class among those ranked as high or higher."""
    ranked = sorted(range(len(score)), key=lambda i: -score[i])
    places = [place for place, i in enumerate(ranked, 1) if truth[i]]
    return np.mean([n / place for n, place in enumerate(places, 1)])


def area_under_roc(truth, score):
    """How often a video of the class has a higher score than a video without it."""
    pairs = [
        (score[i], score[j])
        for i in range(len(score))
        for j in range(len(score))
        if truth[i] and not truth[j]
    ]
    return np.mean([(a > b) + (a == b) / 2 for a, b in pairs])


def test_precisions_agree_with_the_definition():
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((25, 3, 4)), (rng.random((25, 6)) < 0.4).astype(np.uint8)
    labels[:, 2], labels[:, 5] = 0, 1  # no video has class 2, all have class 5: neither can be ranked
    classes = np.array([0, 2, 4, 5])
    result = evaluation.precisions(scores, labels, classes)
    video = scores.mean(1)
    pairs = [(labels[:, 0], video[:, 0]), (labels[:, 4], video[:, 2])]
    assert result["mAP"] == pytest.approx(100 * np.mean([average_precision(*pair) for pair in pairs]))
    assert result["AUC"] == pytest.approx(100 * np.mean([area_under_roc(*pair) for pair in pairs]))
    assert result["chance mAP"] == pytest.approx(100 * labels[:, [0, 4]].mean())
    assert result["classes"] == 2
    with pytest.raises(datasets.DataError, match="no class that some of the evaluated videos have"):
        evaluation.precisions(scores[:, :, 1:2], labels, classes[1:2])


@pytest.mark.parametrize("classifier", ["linear", "svm"])
def test_a_linear_classifier_learns_several_classes_a_video(classifier):
    """Each video has two of four classes. A fifth is in every video, a sixth in no training video."""

    def videos(n, seed):
        rng = np.random.default_rng(seed)
        y = np.zeros((n, 6), np.uint8)
        for row in y:
            row[rng.permutation(4)[:2]] = 1
        y[:, 4] = 1
        noise = rng.standard_normal((n, 2, 4)) + rng.standard_normal((n, 1, 4))
        return (3 * y[:, None, :4] + noise).astype(np.float32), y

    (train_x, train_y), (test_x, test_y) = videos(80, 0), videos(40, 1)
    test_y[0, 5] = 1
    result = evaluation.linear_probe(train_x, train_y, test_x, test_y, 0, classifier)
    assert result["mAP"] > 90 and result["AUC"] > 90 and result["classes"] == 4
    assert result["chance mAP"] == pytest.approx(50)
    noise = np.random.default_rng(0).standard_normal(test_x.shape).astype(np.float32)
    assert 30 < evaluation.linear_probe(train_x, train_y, noise, test_y, 0, classifier)["AUC"] < 70


# ------------------------------------------------------------------------------- the files that are evaluated

TINY = (
    "video.size=32 video.frames=2 audio.seconds=0.5 audio.rate_hz=16000 audio.mels=16 model.width=4 "
    "model.depth=1 model.embedding=8 eval.clips=1 eval.calibration_batches=1 optim.batch_size=4 "
    "data.workers=0"
).split()


@pytest.mark.parametrize("classifier", ["linear", "svm"])
def test_a_single_class_is_ranked_by_its_own_score(classifier):
    rng = np.random.default_rng(0)
    y = (np.arange(60) % 3 == 0).astype(np.uint8)[:, None]
    x = (rng.standard_normal((60, 2, 4)) + 3 * y[:, None]).astype(np.float32)
    assert evaluation.linear_probe(x[:40], y[:40], x[40:], y[40:], 0, classifier)["mAP"] > 95


def test_one_class_is_too_few_to_classify():
    x, y = np.zeros((10, 1, 4), np.float32), np.zeros(10, int)
    with pytest.raises(datasets.DataError, match="of two classes or more"):
        evaluation.few_shot(x, y, x, y, 0)


@pytest.fixture(scope="module")
def half_mute(tmp_path_factory):
    """train/ and test/ with 4 and 2 videos of each of two classes. Every other video has no sound."""
    root = tmp_path_factory.mktemp("half")
    for part, n in (("train", 4), ("test", 2)):
        for label, hz in (("low", 300), ("high", 3000)):
            for i in range(n):
                wave = tone(hz, 1, 16000) if i % 2 else None
                write_media(root / part / label / f"{i}.mp4", np.arange(25) / 25, wave, 16000, size=32)
    return root


def test_a_class_with_one_file_leaves_nothing_to_train_on(half_mute, tmp_path):
    for label in ("low", "high"):
        (tmp_path / "few" / label).mkdir(parents=True)
        shutil.copy(half_mute / "test" / label / "1.mp4", tmp_path / "few" / label)
    with pytest.raises(datasets.DataError, match="holds no files: the only one of a class is held out"):
        evaluate(eval_linear, tmp_path / "few", tmp_path / "out")


def test_a_single_video_is_enough_where_nothing_is_trained(half_mute, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    shutil.copy(half_mute / "test" / "low" / "1.mp4", tmp_path / "in")
    subject = evaluation.subject
    monkeypatch.setattr(evaluation, "subject", lambda given: dataclasses.replace(subject(given), name="x.pt"))
    result = evaluate(eval_retrieval, tmp_path / "in", tmp_path / "out", "--task", "cross")
    assert result["retrieval-cross"]["videos"] == 1
    with pytest.raises(datasets.DataError, match="holds no files"):
        evaluate(eval_retrieval, tmp_path / "in", tmp_path / "out", "--task", "video")


def test_only_pre_training_draws_neighbours(half_mute):
    table = datasets.load(config.Data("folder", str(half_mute)), "train")
    cfg = config.load("toy_temporal", ["video.size=32", "contrast.k_pos=2"])
    drawn = [
        {
            name
            for name in data.Clips(table, cfg, True, modalities)[1, (data.OF_A_STEP, 0, 0)]
            if "near" in name
        }
        for modalities in (("video",), data.MODALITIES)
    ]
    assert drawn == [set(), {"near_video", "near_audio"}]


def test_a_checkpoint_is_not_tested_on_the_part_that_it_was_trained_on(half_mute, tmp_path):
    argv = ["data.name=folder", f"data.root={half_mute}", "data.split=train", "data.max_bad_share=1"]
    argv += [*TINY, "optim.epochs=1", "optim.batch_size=2", "log.check_epochs=0", f"out={tmp_path}"]
    train.main(config.load("toy", argv))
    arguments = eval_linear.command_line(["--ckpt", str(tmp_path / "last.pt")])
    subject = evaluation.subject(arguments)
    (tables,) = evaluation.tables(subject.cfg)
    assert [len(table) for table in tables] == [8, 4]


def test_another_data_set_has_its_own_classes_and_files(tmp_path, monkeypatch):
    of_training = (
        "data.name=packed data.root=x data.label=motion data.decode=device data.shuffle=shards".split()
    )
    trained = dataclasses.asdict(config.load("toy", [*TINY, *of_training]))
    monkeypatch.setattr(evaluation.run, "load_checkpoint", lambda _: {"config": trained})
    monkeypatch.setattr(evaluation.models, "load", lambda *_: None)
    (tmp_path / "last.pt").touch()
    found = []
    for other in ([], ["--data", "esc50"]):
        arguments = eval_linear.command_line(["--ckpt", str(tmp_path / "last.pt"), "--root", "y", *other])
        source = evaluation.subject(arguments).cfg.data
        found.append((source.name, source.root, source.label, source.decode, source.shuffle))
    assert found == [("packed", "y", "motion", "device", "shards"), ("esc50", "y", "label", "cpu", "full")]


@pytest.mark.parametrize(("key", "values"), [("optim.amp", ("bf16", "none")), ("data.timeout_s", (1, 60))])
def test_kept_features_are_of_the_same_settings(half_mute, tmp_path, monkeypatch, key, values):
    table = datasets.load(config.Data("folder", str(half_mute)), "test")
    extractions, found = [], evaluation.Features(np.array([0]), {"video": np.ones((1, 1, 3), np.float32)})
    monkeypatch.setattr(evaluation, "extract", lambda *_: extractions.append(1) or found)
    for value in (*values, values[0]):
        cfg = config.load("toy", [f"{key}={value}"])
        subject = evaluation.Subject(None, cfg, torch.device("cpu"), "x.pt", "hash", tmp_path)
        evaluation.features_of(subject, table, "video")
    assert len(extractions) == 2


def test_kept_features_of_an_untrained_network_are_of_the_same_clips_of_calibration(half_mute, tmp_path):
    (pair,) = evaluation.tables(config.load("toy", ["data.name=folder", f"data.root={half_mute}"]))
    found = []
    for speeds in ("[1]", "[4]", "[1]"):
        argv = ["--ckpt", "random", "--out", str(tmp_path), *TINY, f"temporal.speeds={speeds}"]
        subject = evaluation.subject(eval_linear.command_line(argv))
        evaluation.calibrate_batch_norm(subject, pair[0], ("video",))
        found.append(evaluation.features_of(subject, pair[1], "video").features["video"])
    assert np.array_equal(found[0], found[2]) and not np.array_equal(found[0], found[1])


def test_held_out_files_that_cannot_be_used_do_not_end_training(half_mute, tmp_path, capsys):
    cfg = config.load("toy", TINY + [f"out={tmp_path}"])
    table = datasets.load(config.Data("folder", str(half_mute)), "test")
    mute = datasets.take(table, np.array([name.endswith("0.mp4") for name in table.paths]))
    network, bank = models.AudioVisual(cfg.model), memory_bank.MemoryBank(4, cfg.model.embedding, 0.5, 0)
    results = evaluation.check(network, bank, mute, cfg, distributed.World(0, 1, torch.device("cpu")))
    assert results == bank.health() and "nothing was held out" in capsys.readouterr().out


def evaluate(script, root, out, *more, name="folder"):
    """The JSON files of an evaluation of an untrained network: {name: content}."""
    argv = ["--ckpt", "random", "--data", name, "--root", str(root), "--out", str(out), *TINY, *more]
    script.main(script.command_line(argv))
    return {path.stem.rpartition(f"-{name}")[0]: json.loads(path.read_text()) for path in out.glob("*.json")}


def test_a_mute_video_is_evaluated_by_its_picture(half_mute, tmp_path, capsys):
    results = evaluate(
        eval_linear, half_mute, tmp_path, "--mode", "fewshot", "--save", str(tmp_path / "f.npz")
    )
    counts = ("train_videos", "train_files", "videos", "files", "skipped")
    assert [results["fewshot-video"][key] for key in counts] == [8, 8, 4, 4, 0]
    assert [results["fewshot-audio"][key] for key in counts] == [4, 8, 2, 4, 6]
    shown = [line.split() for line in capsys.readouterr().out.splitlines() if " of " in line]
    assert [line[:8] for line in shown] == [
        "video label 8 of 8 4 of 4".split(), "audio label 4 of 8 2 of 4".split()
    ]  # fmt: skip
    with np.load(tmp_path / "f.npz") as saved:  # all videos; a missing modality is NaN
        assert saved["index"].tolist() == [0, 1, 2, 3] and len(saved["labels"]) == len(saved["paths"]) == 4
        assert np.isfinite(saved["features_video"]).all()
        heard = np.isfinite(saved["embeddings_audio"]).all((1, 2))
        assert heard.tolist() == [path.endswith("1.mp4") for path in saved["paths"]]


def write_official_lists(name, root):
    """Write UCF101 or HMDB51 with two classes, 4 training and 2 test videos each, and the published lists of
    the first division.

    Every other video is mute. HMDB51 has one more video of each class, which the division leaves out.
    """
    folder = root / {"ucf101": "UCF-101", "hmdb51": "hmdb51_org"}[name]
    train, test = [], []
    for number, (label, hz) in enumerate((("Archery", 300), ("Bowling", 3000)), 1):
        uses = [1, 1, 1, 1, 2, 2] + [0] * (name == "hmdb51")
        videos = [f"v_{label}_g{k:02d}_c01.avi" for k in range(len(uses))]
        for k, video in enumerate(videos):
            wave = tone(hz, 1, 16000) if k % 2 else None
            write_media(folder / label / video, np.arange(25) / 25, wave, 16000, size=32)
        train += [f"{label}/{video} {number}" for video in videos[:4]]
        test += [f"{label}/{video}" for video in videos[4:6]]
        if name == "hmdb51":
            path = root / f"testTrainMulti_7030_splits/{label}_test_split1.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(f"{video} {use} \n" for video, use in zip(videos, uses, strict=True)))
    if name == "ucf101":
        (root / "ucfTrainTestlist").mkdir()
        for part, lines in ("train", train), ("test", test):
            (root / f"ucfTrainTestlist/{part}list01.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
def test_official_lists_use_every_picture_and_every_sound_that_there_is(name, tmp_path, capsys):
    write_official_lists(name, tmp_path / "in")
    results = evaluate(eval_linear, tmp_path / "in", tmp_path / "a", "--mode", "fewshot", name=name)
    counts = ("train_videos", "train_files", "videos", "files", "skipped")
    assert [results["fewshot-video"][key] for key in counts] == [8, 8, 4, 4, 0]
    assert [results["fewshot-audio"][key] for key in counts] == [4, 8, 2, 4, 6]
    shown = [line.split()[:8] for line in capsys.readouterr().out.splitlines() if " of " in line]
    assert "video label 8 of 8 4 of 4".split() in shown and "audio label 4 of 8 2 of 4".split() in shown
    results = evaluate(eval_retrieval, tmp_path / "in", tmp_path / "b", name=name)
    counts = ("videos", "files", "gallery_videos", "gallery_files", "skipped")
    assert [results["retrieval-video"][key] for key in counts] == [4, 4, 8, 8, 0]
    assert [results["retrieval-audio"][key] for key in counts] == [2, 4, 4, 8, 2]
    assert "audio: 2 of 4 files, 4 videos to find" in capsys.readouterr().out


def test_retrieval_of_divisions_of_different_sizes_has_what_all_of_them_have(tmp_path):
    lines = ["filename,fold,category,esc10"]
    for k, fold in enumerate([1, 2, 3, 4, 5, 5, 5, 5]):  # of the fifth division, 4 can be found
        wave = {"wave": tone(300 + 100 * k, 1, 16000), "rate_hz": 16000}
        write_media(tmp_path / f"in/audio/{k}.wav", codecs=(None, "pcm_s16le"), **wave)
        lines.append(f"{k}.wav,{fold},{'low' if k % 2 else 'high'},True")
    (tmp_path / "in/meta").mkdir()
    (tmp_path / "in/meta/esc50.csv").write_text("\n".join(lines))
    results = evaluate(eval_retrieval, tmp_path / "in", tmp_path / "out", "--split", "all", name="esc50")
    found = results["retrieval-audio"]
    assert [name for name in found if "R@" in name] == ["R@1", "chance R@1"]
    assert ["R@5" in division for division in found["divisions"]] == [True] * 4 + [False]


def test_saved_features_and_pages_name_the_part_of_a_file(tmp_path, capsys):
    rows = ["path,label,split,start,end"]
    for label, hz in (("low", 300), ("high", 3000)):
        write_media(tmp_path / f"in/{label}.mp4", np.arange(150) / 25, tone(hz, 6, 16000), 16000, size=32)
        rows += [f"{label}.mp4,{label},{'test' if k == 5 else 'train'},{k},{k + 1}" for k in range(6)]
    (tmp_path / "in/manifest.csv").write_text("\n".join(rows) + "\n")
    more = "--data", "manifest", "--save", str(tmp_path / "f.npz")
    evaluate(eval_linear, tmp_path / "in", tmp_path / "out", *more)
    with np.load(tmp_path / "f.npz") as saved:
        assert saved["paths"].tolist() == ["low.mp4", "high.mp4"]
        assert saved["start_s"].tolist() == [5, 5] and saved["end_s"].tolist() == [6, 6]
    data = config.Data(name="manifest", root=str(tmp_path / "in"))
    shown = page.of_table(datasets.load(data, "train"), 1, 0, config.load("toy", TINY), ("video",))
    assert shown.name == "low.mp4 [1.0-2.0 s]" and 1 <= shown.time_s < 2


def test_a_page_shows_the_moment_of_a_sound_that_is_longer_than_its_picture(tmp_path):
    wave = {"wave": tone(300, 10, 16000), "rate_hz": 16000}
    write_media(tmp_path / "a.mp4", np.arange(50) / 25, size=32, **wave)  # a picture of 2 s
    table = datasets.of_files(["a.mp4"], tmp_path)
    cfg = config.load("toy", [*TINY, "eval.clips=3"])
    clips = np.eye(3, dtype=np.float32)[None]  # of the sound: the last one is like the picture
    embeddings = {"video": clips[:, [2, 2, 2]], "audio": clips}
    found = evaluation.Features(np.array([0]), embeddings, embeddings)
    subject = evaluation.Subject(None, cfg, None, "x.pt", "hash", tmp_path)
    page.write_retrieval(tmp_path / "p.html", subject, "cross", (found, table), (found, table), {0: [0]})
    query_s, found_s = map(float, re.findall(r"#t=([0-9.]+)", (tmp_path / "p.html").read_text()))
    assert query_s < 0.1 and 9.4 < found_s < 9.6


def test_each_retrieval_task_uses_all_files_that_it_can(half_mute, tmp_path, capsys):
    results = evaluate(eval_retrieval, half_mute, tmp_path)
    counts = ("videos", "files", "gallery_videos", "gallery_files", "skipped")
    assert [results["retrieval-video"][key] for key in counts] == [4, 4, 8, 8, 0]
    assert [results["retrieval-audio"][key] for key in counts] == [2, 4, 4, 8, 2]
    assert [results["retrieval-cross"][key] for key in counts] == [2, 4, 2, 4, 2]
    assert results["retrieval-video"]["chance R@1"] == results["retrieval-audio"]["chance R@1"] == 50
    assert results["retrieval-video"]["chance R@5"] == 100
    assert (
        results["retrieval-cross"]["chance instance R@1"]
        == results["retrieval-cross"]["chance class R@1"]
        == 50
    )
    output = capsys.readouterr().out
    assert "audio: 2 of 4 files, 4 videos to find" in output and output.count("chance") == 4


def test_without_any_sound_only_the_picture_is_evaluated(half_mute, tmp_path, capsys):
    for path in half_mute.rglob("[02].mp4"):
        link = tmp_path / "mute" / path.relative_to(half_mute)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    results = evaluate(eval_linear, tmp_path / "mute", tmp_path / "out", "--mode", "fewshot")
    assert results.keys() == {"fewshot-video"} and results["fewshot-video"]["videos"] == 2
    assert "not judged by audio: " in capsys.readouterr().out
    results = evaluate(eval_retrieval, tmp_path / "mute", tmp_path / "out")
    assert results.keys() == {"fewshot-video", "retrieval-video"}
    with pytest.raises(MediaError, match="no sound"):  # an explicit --modality audio is an error
        evaluate(eval_linear, tmp_path / "mute", tmp_path / "out", "--modality", "audio")


def test_several_classes_a_file_are_scored_by_precision(half_mute, tmp_path, capsys):
    """In the layout of AudioSet. Each file has the class of its pitch, and some have another one."""
    root = tmp_path / "audioset"
    (root / "balanced_train_segments").mkdir(parents=True)
    names = {"/m/1": "low", "/m/2": "high", "/m/3": "third"}
    rows = ["index,mid,display_name", *(f"{n},{mid},{name}" for n, (mid, name) in enumerate(names.items()))]
    (root / "class_labels_indices.csv").write_text("\n".join(rows))
    for part, name in (("train", "balanced_train"), ("test", "eval")):
        lines = ["# Segments", "# num", "# YTID, start_seconds, end_seconds, positive_labels"]
        for label, mid in (("low", "/m/1"), ("high", "/m/2")):
            for n, path in enumerate(sorted((half_mute / part / label).glob("[13].mp4")) * 3):
                stem = f"{part}_{label}_{n}"
                (root / "balanced_train_segments" / f"{stem}.mp4").symlink_to(path)
                lines.append(
                    f'{stem}, 0.000, 1.000, "{mid},/m/3"' if n % 2 else f'{stem}, 0.000, 1.000, "{mid}"'
                )
        (root / f"{name}_segments.csv").write_text("\n".join(lines))
    (root / "eval_segments").symlink_to(root / "balanced_train_segments")
    argv = [
        "--ckpt",
        "random",
        "--data",
        "audioset",
        "--root",
        str(root),
        "--out",
        str(tmp_path / "out"),
        *TINY,
    ]
    eval_linear.main(eval_linear.command_line([*argv, "--modality", "audio"]))
    result = json.loads((tmp_path / "out" / "linear-audio-audioset-test.json").read_text())
    assert result["videos"] == 6 and result["classes"] == 3
    assert 0 < result["chance mAP"] < 100 and 0 <= result["AUC"] <= 100 and 0 < result["mAP"] <= 100
    assert "chance mAP" in capsys.readouterr().out
    for mode in ("fewshot", "finetune"):
        with pytest.raises(datasets.DataError, match=r"several classes a file; .* use --mode linear or svm"):
            eval_linear.main(eval_linear.command_line([*argv, "--mode", mode]))


def test_a_subset_of_a_data_set_has_a_result_of_its_own(tmp_path):
    """ESC-10's would otherwise take the place of ESC-50's."""
    written = []
    for more in [], ["data.subset=esc10"]:
        cfg = config.load("toy", ["data.name=esc50", "data.split=fold1", *more])
        one = evaluation.Subject(None, cfg, torch.device("cpu"), "random", "seed 0", tmp_path)
        written.append(evaluation.write_result(one, "svm-audio", {"top1": 1.0}))
    assert written[0] == {key: value for key, value in written[1].items() if key != "subset"}
    assert written[1]["subset"] == "esc10"
    assert {path.name for path in tmp_path.iterdir()} == {
        "svm-audio-esc50-fold1.json",
        "svm-audio-esc50-esc10-fold1.json",
    }
