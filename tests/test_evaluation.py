"""Ranking and linear classifiers against references made another way; what is held out; what is kept."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from avid import config, datasets, evaluation


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


def test_the_query_itself_does_not_count():
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


def test_recall_of_random_features_is_a_plain_count():
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


def test_many_against_many_need_no_matrix_of_all_similarities():
    """10,000 queries, 100,000 videos, 512 dimensions: the matrix would be 4 GB."""
    torch.manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(100_000, 512), dim=1)
    mine = torch.randperm(100_000)[:10_000]
    queries = torch.nn.functional.normalize(gallery[mine] + 0.01 * torch.randn(10_000, 512), dim=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = evaluation.nearest(queries, gallery, 20)
    assert found.shape == (10_000, 20)
    assert (found[:, 0] == mine.numpy()).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB


def clouds(n, clips, seed):
    """Three classes of Gaussian clouds, clips of a video close together: n×K×F, n."""
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
    assert result["top1"] >= result["clip_top1"]  # clips averaged are better than one
    noise = np.random.default_rng(0).standard_normal(train_x.shape).astype(np.float32)
    assert evaluation.linear_probe(noise, train_y, test_x, test_y, 0, classifier)["top1"] < 70


def test_two_classes_have_margins_too():
    (train_x, train_y), (test_x, test_y) = clouds(90, 2, 0), clouds(60, 2, 1)
    few, others = train_y < 2, test_y < 2
    result = evaluation.linear_probe(train_x[few], train_y[few], test_x[others], test_y[others], 0, "svm")
    assert result["top1"] > 85


def test_accuracies_average_scores_over_clips():
    scores = np.array(
        [[[0.6, 0.4, 0.0], [0.0, 0.9, 0.1]], [[0.2, 0.2, 0.6], [0.5, 0.3, 0.2]]]
    )  # 2 videos, 2 clips
    result = evaluation.accuracies(scores, np.array([10, 30]), np.array([10, 20, 30]))
    assert result == {"top1": 50.0, "top5": 100.0, "clip_top1": 50.0}


def test_more_labelled_videos_are_better():
    (train_x, train_y), (test_x, test_y) = clouds(90, 2, 0), clouds(60, 2, 1)
    result = evaluation.few_shot(train_x, train_y, test_x, test_y, 0, shots=(1, 20), draws=5)
    assert result["20-shot top1"] > result["1-shot top1"] and result["1-shot std"] > 0


def test_a_folder_without_parts_is_held_out_by_class(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(10):
            (tmp_path / label / f"{i}.mp4").touch()
    cfg = config.load("toy", ["data.name=folder", f"data.root={tmp_path}"])
    ((train, test),) = evaluation.tables(cfg)
    assert not set(train.paths) & set(test.paths) and len(train) == 16
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert next(evaluation.tables(cfg))[1].paths == test.paths


def test_numbered_divisions(tmp_path):
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
    nothing = np.zeros(3)
    table = datasets.Table(
        "x", Path("."), ["a.mp4", "b.mp4", "c.mp4"], np.array([0, -1, 1]), ["p", "q"], *[nothing] * 3, {}, []
    )
    with pytest.raises(
        datasets.DataError, match=r"x: 1 of 3 files have no class, e\.g\. b\.mp4; give them one"
    ):
        evaluation.labels_of(table)
    table.labels = np.array([[0, 1], [1, 1], [0, 0]], np.uint8)
    with pytest.raises(datasets.DataError, match="x has several classes a file"):
        evaluation.labels_of(table)
    with pytest.raises(datasets.DataError, match=r"1 of 3 files have no class, e\.g\. c\.mp4"):
        evaluation.labels_of(table, several=True)


def test_where_videos_have_several_classes_a_match_shares_one():
    """Every picture finds the next video's sound; the videos 0, 1 and 1, 2 share a class, 2 and 0 none."""
    eye = np.eye(3, dtype=np.float32)[:, None]  # 3×1×D
    found = evaluation.Features(np.arange(3), embeddings={"video": eye, "audio": eye[[2, 0, 1]]})
    labels = np.array([[1, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]], np.uint8)
    result = evaluation.cross_modal(found, labels, ks=(1,))
    assert (result["v→a instance R@1"], result["v→a class R@1"], result["a→v class R@1"]) == pytest.approx(
        (0, 200 / 3, 200 / 3)
    )
    labels[2] = 0  # without any class
    assert not any("class" in name for name in evaluation.cross_modal(found, labels, ks=(1,)))


def test_features_are_kept_as_they_are(tmp_path):
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


def test_unit_length_at_video_level():
    found = evaluation.Features(
        np.arange(3), {}, {"audio": np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)}
    )
    np.testing.assert_allclose(np.linalg.norm(found.video_level("embeddings", "audio"), axis=1), 1, rtol=1e-6)
