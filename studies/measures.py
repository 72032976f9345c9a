"""What a study measures of a trained run: what its features know and find, how its bank judges pairs and
kinds.

In: a run's configuration and its checkpoint; the toy's manifest, which training never sees.
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
SOUNDS = [*toy.KINDS, "music", "noise"]  # what a toy's sound can be
BINS = np.linspace(0, 1, 21)  # of the histograms of weights
W_MIN = 0.25  # of the weights that a run without weights would have had


def trained(cfg):
    """The network of a run's checkpoint, in evaluation mode, and the checkpoint."""
    path = Path(cfg.out) / "last.pt"
    saved = run.load_checkpoint(path)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg))
    models.load(network, saved, path)
    return network.to(distributed.start().device).eval(), saved


def untrained(cfg, modalities=data.MODALITIES):
    """An untrained network, its batch-norm statistics set from the training videos: the floor."""
    torch.manual_seed(cfg.seed)
    network = models.AudioVisual(cfg.model).to(distributed.start().device).eval()
    evaluation.calibrate_batch_norm(subject(network, cfg, trained=False), tables(cfg)[0], modalities)
    return network


def subject(network, cfg, trained=True):
    """The network of a run, of its checkpoint or untrained, as the tools of the evaluations take it."""
    path = Path(cfg.out) / "last.pt"
    name, mark = (str(path), files.file_hash(path)) if trained else ("random", f"untrained, seed {cfg.seed}")
    return evaluation.Subject(network, cfg, distributed.start().device, name, mark, path.parent)


def tables(cfg):
    """The (training, evaluation) tables of the run's world."""
    return next(iter(evaluation.tables(cfg)))


def clean(cfg):
    """The same world without faulty pairs: probes and galleries are made of it, so that only the features
    differ."""
    return dataclasses.replace(cfg, toy=dataclasses.replace(cfg.toy, faulty=0.0))


def features(network, cfg):
    """Features of the clean world's (training, evaluation) videos, and their tables."""
    device = distributed.start().device
    both = tables(clean(cfg))
    clips = [data.Clips(table, cfg, training=False) for table in both]
    return [evaluation.extract(network, part, device) for part in clips], both


def knowledge(network, cfg, labels=("label",)):
    """Linear probes and nearest neighbours by each of these columns of the manifest, in both modalities;
    retrieval across, by kind and of the very same video: percent."""
    (train, test), both = features(network, cfg)
    result = {}
    for label in labels:
        train_y, test_y = (np.unique(table.columns[label], return_inverse=True)[1] for table in both)
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


def bank_of(saved, cfg):
    """The memory bank of a checkpoint."""
    sizes = saved["videos"]["count"], cfg.model.embedding
    bank = memory_bank.MemoryBank(*sizes, cfg.bank.momentum, cfg.seed, cfg.bank.dtype)
    bank.load_state_dict(saved["bank"])
    return bank


def pair_judgement(bank, table, loss):
    """How the weights tell true pairs from faulty ones: AUROC, histograms over BINS. Weights as the run's;
    where it had none, as W_MIN would give them. loss: config.Loss. No columns where no pair is faulty."""
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
    """What is seen and what is heard in each video by the manifest, places in SOUNDS: N, N."""
    return [np.array([SOUNDS.index(kind) for kind in table.columns[column]]) for column in ("label", "sound")]


def soft_targets(bank, table, loss, estimator):
    """Where an estimator's soft targets put their mass, over the whole bank, an instance's own place left out
    (percent).

    S_v asks from a picture for sounds, S_a from a sound for pictures; right is a candidate whose sound, or
    picture, is of the kind that the query shows, or sounds like. → {their mean; what falls to faulty pairs;
    what an instance gives itself}, and S_v by kind (10×12, row by row: kind of the picture, kind of the
    sound, music and noise last).
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
    """What the checks of a run found on the way: lists `epochs` and one for each of these names of
    metrics.jsonl."""
    lines = map(json.loads, (Path(cfg.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    checks = [line for line in lines if names[0] in line]
    return {"curve epoch": [line["epoch"] for line in checks]} | {
        f"curve {name}": [float(f"{line[name]:.4g}") for line in checks] for name in names
    }


def task_accuracies(network, cfg):
    """Percent of right answers to the temporal tasks on held-out videos; four draws a video."""
    counts = evaluation.confusions(network, tables(cfg)[1], cfg, distributed.start().device, draws=4)
    return {task: 100 * n.trace().item() / max(n.sum().item(), 1) for task, n in counts.items()}
