"""The whole network fine-tuned on a labelled data set: docs/method.md section 10.

In: a pre-trained network, and tables of labelled training and test videos.
Out: accuracies on the test videos, and a checkpoint, from which the same command goes on.
"""

import copy
import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from . import config, data, datasets, distributed, evaluation, models, run

REMEDY = "try a lower finetune.lr, with another --out, or optim.amp=none"


class Classifier(nn.Module):
    """An encoder, dropout and a linear layer [A]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(encoder.dim, classes)

    def forward(self, clips, keep):  # B×3×T×S×S or B×1×F×bins; B×8·width, what dropout multiplies by
        channels_last = torch.channels_last_3d if clips.dim() == 5 else torch.channels_last
        features = self.encoder(clips.contiguous(memory_format=channels_last)).float()  # B×8·width
        return self.linear(features * keep)  # B×C


def finetune(subject, train_table, test_table, modality, out):
    """Train encoder and classifier on the videos of one table, then test on those of another. Under torchrun
    every rank calls it.

    subject: evaluation.Subject, which stays as it is; modality: video or audio; out: folder of the
    checkpoint. The settings are `finetune.*`; the clips are plain ones of `video.*` and `audio.*`. A stopped
    run goes on from its checkpoint, on a CPU to the same bits; a finished one is only tested. SIGTERM and
    Ctrl-C end the step, save and leave.
    → {top1, top5: of test videos, the softmax averaged over eval.clips clips; clip_top1: of clips, in
    percent; videos, train_videos: how many were used; skipped: how many of both could not be}. Raises
    DataError, MediaError, ConfigError, CheckpointError, FloatingPointError.
    """
    world = distributed.start()
    # plain clips: one a video, at its own speed, forwards
    cfg = dataclasses.replace(subject.cfg, temporal=config.Temporal(), profile=False)
    fine, n = cfg.finetune, len(train_table)
    known = [evaluation.labels_of(t) for t in (train_table, test_table)]
    labels = torch.from_numpy(known[0]).to(world.device)  # n
    if len(test_table) < world.size:
        raise config.ConfigError(
            f"{len(test_table)} test videos cannot be shared by {world.size} processes; start fewer"
        )
    if fine.batch_size > n or fine.batch_size % world.size:
        ranks = f" and a multiple of {world.size}, the number of processes" if world.size > 1 else ""
        raise config.ConfigError(
            f"wrong value for finetune.batch_size: {fine.batch_size}; expected at most {n}, the training "
            f"videos{ranks}"
        )

    # ------------------------------------------------------------------------------------------------ network
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    network = copy.deepcopy(subject.network).to(world.device)
    if cfg.optim.sync_bn and world.size > 1:
        network = distributed.sync_batch_norm(network)
    if cfg.optim.checkpoint_activations:
        models.checkpoint_activations(network)
    encoder = network.video_model if modality == "video" else network.audio_model
    classifier = Classifier(encoder, len(train_table.classes)).to(world.device)
    adam = {"lr": fine.lr, "weight_decay": fine.weight_decay, "fused": True}
    optimizer = torch.optim.Adam(classifier.parameters(), **adam)
    guard = run.Guard(classifier, optimizer, world.device, cfg.optim.amp)

    # ------------------------------------------------------------------------------------ resume, data, watch
    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    split = train_table.name.removesuffix(" (train)").rpartition(" ")[2]  # train, or a numbered one: train2
    path = Path(out) / f"finetune-{modality}-{cfg.data.name}-{split}.pt"
    kept = run.Checkpoint(path, path.with_suffix(".jsonl"), path, cfg, world)
    settings = decisive(subject, cfg, train_table)
    parts = {"classifier": classifier, "optimizer": optimizer, "scaler": guard, "bad_files": bad_files}
    first_step = kept.resume({"settings": settings}, lambda saved: same_run(path, saved, settings), parts)
    epoch_steps = n // fine.batch_size
    warmup_steps = fine.warmup_epochs * epoch_steps
    last_step = warmup_steps + fine.epochs * epoch_steps
    steps = range(first_step, last_step)
    draws = data.BatchSampler(n, fine.batch_size, "epoch", cfg.seed, first_step, last_step, *world[:2])
    clips = data.Clips(train_table, cfg, True, (modality,))
    loader = data.loader(clips, cfg.data.workers, batch_sampler=draws)
    about = {"remedy": REMEDY, "title": f"fine-tuning {modality}"}
    watch = run.Watch(kept, guard, bad_files, steps, epoch_steps, fine.batch_size, **about)

    # --------------------------------------------------------------------------------------------------- loop
    batches = watch.batches(loader)
    classifier.train()
    for step in steps:
        if step in (first_step, warmup_steps):
            # first the linear layer alone: of the encoder, only the statistics of batch norm follow [A]
            encoder.requires_grad_(step >= warmup_steps)
            model = distributed.data_parallel(classifier, world, cfg.optim.sync_bn)
        batch = data.to_device(next(batches), world.device, cfg.audio)  # uint8: augmented float clips
        epoch = step / epoch_steps - fine.warmup_epochs  # below 0: warm-up
        for group in optimizer.param_groups:
            passed = sum(epoch >= share * fine.epochs for share in fine.milestones)
            group["lr"] = fine.lr * fine.gamma**passed
        keep = dropout(fine.dropout, (fine.batch_size, encoder.dim), cfg.seed, step)[draws.local]
        with guard.forward():
            logits = model(batch[modality], distributed.to_device(keep, world.device))  # b×C
        guard.step(F.cross_entropy(logits.float(), labels[batch["index"]]))
        watch.after(step, {}, distributed.gather(batch["index"]))
    watch.finish(path.with_suffix(".skipped.csv"))

    result = test(network, classifier.linear, test_table, modality, cfg, world)
    bad = len(bad_files.reasons)
    return {**result, "train_videos": n - bad, "skipped": result["skipped"] + bad}


def dropout(p, shape, seed, step):
    """0 with probability p, else 1/(1 − p): float32. A function of (seed, step) for the global batch, as
    everything random."""
    kept = np.random.default_rng((seed, 6, step)).random(shape) >= p
    return torch.from_numpy(kept).float() / (1 - p)


@torch.no_grad()
def test(network, linear, table, modality, cfg, world):
    """Accuracies on evenly spaced clips of a table's videos, of which each rank reads its share."""
    local = datasets.take(table, slice(world.rank, None, world.size))
    title = f"testing {modality}" if world.rank == 0 else None
    clips = data.Clips(local, cfg, training=False, modalities=(modality,))
    found = evaluation.extract(network, clips, world.device, title)
    for row, reason in found.failures.items():
        tqdm.write(f"skipped {data.shown(local, row)}: {reason}")
    features = torch.from_numpy(found.features[modality]).to(world.device)  # m×K×8·width
    scores = linear(features).softmax(2).cpu().numpy()  # m×K×C
    shares = distributed.gather_objects((scores, local.labels[found.index], len(found.failures)))
    scores, labels, failed = zip(*shares, strict=True)
    accuracies = evaluation.accuracies(
        np.concatenate(scores), np.concatenate(labels), np.arange(len(table.classes))
    )
    return {**accuracies, "videos": sum(map(len, labels)), "skipped": sum(failed)}


def decisive(subject, cfg, table):
    """{name: value} of all that decides the course of a run."""
    videos = json.dumps([table.paths, table.labels.tolist(), table.start_s.tolist(), table.end_s.tolist()])
    videos = hashlib.sha256(videos.encode()).hexdigest()[:12]
    groups = {
        name: dataclasses.asdict(getattr(cfg, name)) for name in ("model", "video", "audio", "finetune")
    }
    return {"seed": cfg.seed, "checkpoint": subject.hash, "videos": videos, **config.flat(groups)}


def same_run(path, saved, settings):
    """Raise ConfigError where a checkpoint is of a run with other settings, those of `decisive`."""
    before = saved["settings"]
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        differences = ", ".join(f"{key} was {before.get(key)} and is {settings[key]}" for key in changed)
        raise config.ConfigError(
            f"{path} holds a run with other settings ({differences}); choose another --out"
        )
