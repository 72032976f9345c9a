"""Evaluation protocols of other public code, step by step, so that numbers can be put side by side with
theirs.

In: a network under evaluation and the tables of labelled files. Out: accuracies, in percent.
docs/reproduce.md says what each published number was measured with, and what still differs.
"""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import config, data, distributed, evaluation, finetune, progress, run
from .config import ConfigError

# ------------------------------------------------------------------- AVID: Kinetics, a classifier a stage [A]

LAYERS = {"conv2x": 12, "conv3x": 8, "conv4x": 6, "conv5x": 4}  # side to which a stage's maps are max-pooled
EPOCHS, BATCH, LR = 12, 128, 1e-4
MILESTONES = (0.5, 0.75)  # shares of the epochs at which the learning rate is divided by 10
CROP_AREA, CROP_RATIO = (
    (224 / 256) ** 2,
    (1.0, 4 / 3),
)  # of the frame; theirs cuts 224² out of frames squeezed to 256²


class StageClassifiers(nn.Module):
    """Batch norm and a linear layer on each stage of a frozen models.R2Plus1D, its maps max-pooled to 8,000
    to 9,000 numbers.
    """

    def __init__(self, encoder, width, classes):
        super().__init__()
        self.encoder, self.stages = encoder, nn.ModuleDict()
        for stage, (name, side) in enumerate(LAYERS.items()):
            numbers = width * 2**stage * side**2
            self.stages[name] = nn.Sequential(nn.BatchNorm1d(numbers), nn.Linear(numbers, classes))

    def forward(self, clips):  # B×3×T×S×S → {stage: B×C}
        with torch.no_grad():  # of the encoder only batch norm's statistics follow the data, while it trains
            x, pooled = self.encoder.conv1(clips.contiguous(memory_format=torch.channels_last_3d)), {}
            for name, side in LAYERS.items():
                x = getattr(self.encoder, name)(x)
                pooled[name] = F.adaptive_max_pool3d(x, (1, side, side)).flatten(1).float()
        return {name: stage(pooled[name]) for name, stage in self.stages.items()}


def linear_layers(subject, train_table, test_table, modality, out):
    """AVID's linear protocol on Kinetics [A]: the classifiers of all stages trained together by Adam on
    random crops, 12 epochs.

    Arguments, resuming and errors as finetune.finetune's; by picture, in one process. → {"conv2x top1", … of
    videos, the softmax averaged over eval.clips clips; "conv2x clip_top1", … of clips; "best top1": the best
    stage's}; videos, train_videos, skipped.
    """
    world, n = distributed.start(), len(train_table)
    if world.size > 1:
        raise ConfigError("--mode linear_layers works in one process: leave torchrun out")
    if modality != "video" or subject.cfg.model.video != "avid":
        raise ConfigError(
            "--mode linear_layers needs --modality video and model.video=avid: it reads that network's stages"
        )
    video = dataclasses.replace(subject.cfg.video, crop_area=[CROP_AREA] * 2, crop_ratio=list(CROP_RATIO))
    cfg = dataclasses.replace(subject.cfg, video=video, temporal=config.Temporal(), profile=False)
    labels = torch.from_numpy(evaluation.labels_of(train_table)).to(world.device)  # n
    evaluation.labels_of(test_table)

    torch.manual_seed(cfg.seed)
    encoder = copy.deepcopy(subject.network.video_model).to(world.device).requires_grad_(False)
    classifier = StageClassifiers(encoder, cfg.model.width, len(train_table.classes)).to(world.device)
    optimizer = torch.optim.Adam(classifier.stages.parameters(), lr=LR, fused=True)
    guard = run.Guard(classifier, optimizer, world.device, cfg.optim.amp)

    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    split = train_table.name.removesuffix(" (train)").rpartition(" ")[2]
    path = Path(out) / f"linear_layers-{cfg.data.name}-{split}.pt"
    kept = run.Checkpoint(path, path.with_suffix(".jsonl"), path, cfg, world)
    settings = finetune.decisive(subject, cfg, train_table) | {"epochs": EPOCHS, "batch": BATCH, "lr": LR}
    parts = {"classifier": classifier, "optimizer": optimizer, "scaler": guard, "bad_files": bad_files}
    first_step = kept.resume(
        {"settings": settings}, lambda saved: finetune.same_run(path, saved, settings), parts
    )
    batch_size = min(BATCH, n)
    epoch_steps = n // batch_size
    steps = range(first_step, EPOCHS * epoch_steps)
    draws = data.BatchSampler(n, batch_size, "epoch", cfg.seed, steps.start, steps.stop)
    clips = data.Clips(train_table, cfg, training=True, modalities=("video",))
    loader = data.loader(clips, cfg.data.workers, batch_sampler=draws)
    about = {"remedy": "try optim.amp=none, with another --out", "title": "classifiers of all stages"}
    watch = run.Watch(kept, guard, bad_files, steps, epoch_steps, batch_size, **about)

    batches = watch.batches(loader)
    classifier.train()
    for step in steps:
        batch = data.to_device(next(batches), world.device, cfg.audio)
        for group in optimizer.param_groups:
            group["lr"] = LR * 0.1 ** sum(step >= share * steps.stop for share in MILESTONES)
        with guard.forward():
            logits = classifier(batch["video"])  # {stage: B×C}
        guard.step(sum(F.cross_entropy(x.float(), labels[batch["index"]]) for x in logits.values()))
        watch.after(step, {}, batch["index"])
    watch.finish(path.with_suffix(".skipped.csv"))

    result, videos, failed = test_stages(classifier.eval(), test_table, cfg, world.device)
    bad = len(bad_files.reasons)
    return {**result, "videos": videos, "train_videos": n - bad, "skipped": failed + bad}


@torch.inference_mode()
def test_stages(classifier, table, cfg, device):
    """Accuracies of each stage's classifier on evenly spaced clips, how many videos were read and how many
    could not be."""
    clips = data.Clips(table, cfg, training=False, modalities=("video",))
    scores, index, failed = {name: [] for name in LAYERS}, [], 0
    videos_a_batch = max(1, cfg.eval.batch_size // clips.clips)
    batches = data.loader(clips, cfg.data.workers, batch_size=videos_a_batch)
    for batch in progress.bar(batches, "testing", unit="batch", leave=False):
        failed += len(batch["failures"])
        if "index" not in batch:
            continue
        index.append(batch["index"].numpy())
        batch = data.to_device(batch, device, cfg.audio)
        with run.autocast(cfg.optim.amp, device):
            logits = classifier(batch["video"])
        for name, x in logits.items():
            softmax = x.float().softmax(1).view(len(index[-1]), clips.clips, -1)  # m×K×C
            scores[name].append(softmax.cpu().numpy())
    if not index:
        raise data.MediaError(f"none of the {len(table):,} files of {table.name} can be used")
    truth, classes, result = table.labels[np.concatenate(index)], np.arange(len(table.classes)), {}
    for name, found in scores.items():
        accuracies = evaluation.accuracies(np.concatenate(found), truth, classes)
        result |= {f"{name} {key}": accuracies[key] for key in ("top1", "clip_top1")}
    result["best top1"] = max(result[f"{name} top1"] for name in LAYERS)
    return result, len(truth), failed


# -------------------------------------------------------------------------- CrissCross: ESC-50, one long clip

CLIP_S = 5.0  # the whole sound
AUGMENTED = 100  # clips of each training sound
VOLUME, MASK_TIME, MASK_FREQUENCY = 0.2, 20 / 500, 10 / 80  # theirs also warps time, and crops and resizes
POOLED = (7, 3)  # time × frequency: 512 channels of it are 10,752 numbers
STRENGTHS = (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 1.0)  # C
USUAL = 1e-4  # that its authors recommend


def crisscross(subject, train_table, test_table, modality, out):
    """CrissCross's protocol on ESC-50: a linear SVM on one clip of 5 s, of 512×7×3 numbers, after 100
    augmented clips of each training sound; the best C ON THE TEST PART. Features of ESC-50 take 7 GB, and the
    SVM's copies several times as much.

    Arguments as finetune.finetune's; by sound. → {top1, top5, C: of the best C; "C=0.0001 top1": of the
    recommended one}, videos, train_videos, skipped.
    """
    cfg = subject.cfg
    if modality != "audio" or cfg.model.audio != "avid":
        raise ConfigError(
            "--mode crisscross needs --modality audio and model.audio=avid: it reads that network's last maps"
        )
    audio = dataclasses.replace(
        cfg.audio, seconds=CLIP_S, volume=VOLUME, mask_time=MASK_TIME, mask_frequency=MASK_FREQUENCY
    )
    cfg = dataclasses.replace(cfg, audio=audio, temporal=config.Temporal())
    for table in (train_table, test_table):
        evaluation.labels_of(table)

    def features(table, batches, training):
        """n×10,752 of the clips of a loader's batches, their rows in the table, and how many could not be
        read.
        """
        clips = data.Clips(table, cfg, training, ("audio",), clips=1)
        rows, index, failed = [], [], {}
        loader = data.loader(clips, cfg.data.workers, **batches)
        for batch in progress.bar(loader, table.name, unit="batch", leave=False):
            failed.update(batch["failures"])  # of each draw anew
            if "index" in batch:
                index.append(batch["index"].numpy())
                batch = data.to_device(batch, subject.device, cfg.audio)
                rows.append(last_maps(subject.network.audio_model, batch["audio"]).cpu().numpy())
        if not rows:
            raise data.MediaError(f"none of the {len(table):,} files of {table.name} can be used")
        return np.concatenate(rows), np.concatenate(index), len(failed)

    keys = [(index, (7, draw, index)) for index in range(len(train_table)) for draw in range(AUGMENTED)]
    size = cfg.eval.batch_size
    augmented = [keys[i : i + size] for i in range(0, len(keys), size)]
    train_x, train_index, bad = features(train_table, {"batch_sampler": augmented}, training=True)
    test_x, test_index, failed = features(test_table, {"batch_size": size}, training=False)
    from sklearn import svm  # here: it takes two seconds

    truth, found = test_table.labels[test_index], {}
    for C in progress.bar(STRENGTHS, "linear SVM", unit="C", leave=False):
        fitted = svm.LinearSVC(C=C, max_iter=1000, random_state=cfg.seed).fit(
            train_x, train_table.labels[train_index]
        )
        scores = fitted.decision_function(test_x)
        scores = np.stack([-scores, scores], 1) if scores.ndim == 1 else scores  # margins of two classes
        found[C] = evaluation.accuracies(scores[:, None], truth, fitted.classes_)
    best = max(found, key=lambda C: found[C]["top1"])
    result = {"top1": found[best]["top1"], "top5": found[best]["top5"], "C": best}
    counts = {"videos": len(truth), "train_videos": len(np.unique(train_index)), "skipped": failed + bad}
    return {**result, f"C={USUAL} top1": found[USUAL]["top1"], **counts}


@torch.inference_mode()
def last_maps(encoder, sound):
    """The last maps of a models.AudioNet, max-pooled to 7×3 and of unit length along time: B×1×F×bins →
    B×(8·width·21).
    """
    x = encoder.conv1(sound.contiguous(memory_format=torch.channels_last))
    for block in (encoder.block1, encoder.block2, encoder.block3, encoder.block4):
        x = block(x)  # B×8·width×frames×bins
    return F.normalize(F.adaptive_max_pool2d(x, POOLED).float(), dim=2).flatten(1)


PROTOCOLS = {"linear_layers": linear_layers, "crisscross": crisscross}
MODALITY = {"linear_layers": "video", "crisscross": "audio"}  # that a protocol is of
