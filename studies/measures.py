"""The measures of a trained run: probes and retrieval on its features, weights and soft targets of its bank.

In: a run's configuration and checkpoint; the ground truth in the toy's manifest, which training never sees.
Out: columns of the study's CSV, numbers and lists of numbers.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from avid import (
    data,
    datasets,
    distributed,
    evaluation,
    files,
    losses,
    memory_bank,
    models,
    run,
    temporal_tasks,
    toy,
)

ESTIMATORS = ("bootstrap", "swapped", "neighbor", "cycle")
SOUNDS = [*toy.KINDS, "music", "noise"]  # the classes of a toy's sound
BINS = np.linspace(0, 1, 21)  # of the histograms of weights
W_MIN = 0.25  # used to measure the weights of a run that trained without them


def trained(cfg):
    """The network of a run's checkpoint, in evaluation mode, and the checkpoint."""
    path = Path(cfg.out) / "last.pt"
    saved = run.load_checkpoint(path)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg))
    models.load(network, saved, path)
    return network.to(distributed.start().device).eval(), saved


def untrained(cfg, modalities=data.MODALITIES):
    """An untrained network with batch-norm statistics calibrated on the training videos: the baseline."""
    torch.manual_seed(cfg.seed)
    network = models.AudioVisual(cfg.model).to(distributed.start().device).eval()
    evaluation.calibrate_batch_norm(subject(network, cfg, trained=False), tables(cfg)[0], modalities)
    return network


def subject(network, cfg, trained=True):
    """A network, trained or not, as the evaluation functions take it."""
    path = Path(cfg.out) / "last.pt"
    name, mark = (str(path), files.file_hash(path)) if trained else ("random", f"untrained, seed {cfg.seed}")
    return evaluation.Subject(network, cfg, distributed.start().device, name, mark, path.parent)


def tables(cfg):
    """The (training, evaluation) tables of the run's world."""
    return next(iter(evaluation.tables(cfg)))


def clean(cfg):
    """The settings of the same world without faulty pairs. All methods are evaluated on it, so that only the
    features differ."""
    return dataclasses.replace(cfg, toy=dataclasses.replace(cfg.toy, faulty=0.0))


def features(network, cfg):
    """Features of the (training, evaluation) videos without faulty pairs, and their tables."""
    device = distributed.start().device
    both = tables(clean(cfg))
    clips = [data.Clips(table, cfg, training=False) for table in both]
    return [evaluation.extract(network, part, device) for part in clips], both


def feature_quality(network, cfg, labels=("label",)):
    """In percent: linear probes and nearest neighbours in each modality for each of these columns of the
    manifest; cross-modal retrieval by kind and by instance."""
    (train, test), both = features(network, cfg)
    result = {}
    for label in labels:
        train_y, test_y = numbered(*(table.columns[label] for table in both))
        name = "kind" if label == "label" else label
        for modality in ("video", "audio"):
            probe = evaluation.linear_probe(
                train.features[modality], train_y, test.features[modality], test_y, cfg.seed
            )
            result[f"{name} probe {modality}"] = probe["top1"]
            query, key = (part.video_level("features", modality) for part in (test, train))
            found = evaluation.nearest(query, key, 1)
            hits = evaluation.recall(found, datasets.same_class(test_y, train_y), (1,))
            result[f"{name} {modality} R@1"] = hits["R@1"]
    return result | evaluation.cross_modal(test, both[1].labels[test.index], ks=(1,))


def numbered(*columns):
    """Words as numbers, in all columns alike, also where one of them lacks a word."""
    words = np.unique(np.concatenate(columns))
    return [np.searchsorted(words, column) for column in columns]


def bank_of(saved, cfg):
    """The memory bank of a checkpoint."""
    sizes = saved["videos"]["count"], cfg.model.embedding
    bank = memory_bank.MemoryBank(*sizes, cfg.bank.momentum, cfg.seed, cfg.bank.dtype)
    bank.load_state_dict(saved["bank"])
    return bank


def weight_statistics(bank, table, loss):
    """How well the weights separate true from faulty pairs: AUROC, means, and histograms over BINS.

    The weights are the run's, with w_min = W_MIN where the run trained without weights. loss: config.Loss.
    Returns no columns if no pair is faulty."""
    faulty = np.array(table.columns["faulty"]) == "1"
    if not faulty.any():
        return {}
    w_min = loss.w_min if loss.w_min < 1 else W_MIN
    weight = losses.faulty_positive_weights(
        bank.agreement, *bank.agreement_mean_std(), w_min, loss.delta, loss.kappa
    ).numpy()
    return {
        "AUROC": float(roc_auc_score(~faulty, weight)),
        "weight true": float(weight[~faulty].mean()),
        "weight faulty": float(weight[faulty].mean()),
        "weights true": np.histogram(weight[~faulty], BINS)[0].tolist(),
        "weights faulty": np.histogram(weight[faulty], BINS)[0].tolist(),
    }


def kinds(table):
    """The kinds of each video's picture and sound by the manifest, as indices into SOUNDS: N, N."""
    return [np.array([SOUNDS.index(kind) for kind in table.columns[column]]) for column in ("label", "sound")]


def soft_targets(bank, table, loss, estimator):
    """Where an estimator's soft targets put their mass, over the whole bank, without the target of an
    instance for itself; percent.

    S_v are the targets of pictures over sounds, S_a those of sounds over pictures. A candidate is right if
    its sound (S_v) or its picture (S_a) is of the query's kind. Returns the masses (mean of S_v and S_a): on
    candidates of the same kind, on faulty pairs, and on the instance itself; and S_v by kind, 10×12 numbers
    row by row (rows: kind of the picture; columns: kind of the sound, music and noise last).
    """
    seen, heard = kinds(table)  # N
    v, a = bank.video.double(), bank.audio.double()  # N×D
    both = losses.soft_target_matrices(estimator, v, a, v, a, loss.tau_s, loss.tau_t)
    S_v, S_a = (S.numpy() for S in both)  # N×N
    own = (S_v.diagonal().mean() + S_a.diagonal().mean()) / 2
    for S in (S_v, S_a):
        np.fill_diagonal(S, 0)
        S /= S.sum(1, keepdims=True)
    by_sound, by_picture = S_v @ np.eye(len(SOUNDS))[heard], S_a @ np.eye(len(SOUNDS))[seen]  # N×12
    rows = np.arange(len(seen))
    has_kind = heard < len(toy.KINDS)
    same = (by_sound[rows, seen].mean() + by_picture[rows, heard][has_kind].mean()) / 2
    matrix = np.stack([by_sound[seen == kind].mean(0) for kind in range(len(toy.KINDS))])  # 10×12
    faulty = np.array(table.columns["faulty"]) == "1"
    on_faulty = (S_v + S_a)[:, faulty].sum(1).mean() / 2
    masses = {f"{estimator} same kind": 100 * float(same), f"{estimator} on faulty": 100 * float(on_faulty)}
    masses[f"{estimator} itself"] = 100 * float(own)
    return masses, [float(f"{x:.3g}") for x in matrix.flatten()]


def curve(cfg, names):
    """The results of a run's checks during training, as lists: the epochs, and the values of each of these
    names of metrics.jsonl."""
    lines = map(json.loads, (Path(cfg.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    checks = [line for line in lines if names[0] in line]
    return {"curve epoch": [line["epoch"] for line in checks]} | {
        f"curve {name}": [float(f"{line[name]:.4g}") for line in checks] for name in names
    }


def task_accuracies(network, cfg):
    """Accuracy of each temporal task on held-out videos, percent; four draws of clips per video."""
    counts = evaluation.confusions(network, tables(cfg)[1], cfg, distributed.start().device, draws=4)
    return {task: 100 * n.trace().item() / max(n.sum().item(), 1) for task, n in counts.items()}
