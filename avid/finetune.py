"""The whole network fine-tuned on a labelled data set: docs/method.md section 10.

In: a pre-trained network, and tables of labelled training and test videos.
Out: accuracies on the test videos, and a checkpoint, from which the same command goes on.
"""

import copy
import dataclasses
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint, config, data, datasets, distributed, evaluation


class Classifier(nn.Module):
    """An encoder, dropout and a linear layer [A]."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder, self.linear = encoder, nn.Linear(encoder.dim, classes)

    def forward(self, clips, keep):  # B×3×T×S×S or B×1×F×bins; B×8·width, of dropout
        channels_last = torch.channels_last_3d if clips.dim() == 5 else torch.channels_last
        features = self.encoder(clips.contiguous(memory_format=channels_last)).float()  # B×8·width
        return self.linear(features * keep)  # B×C


def finetune(subject, train_table, test_table, modality, out):
    """Train encoder and classifier on the videos of one table, and test on those of another. Under torchrun, called by every rank.

    subject: evaluation.Subject, which stays as it is; modality: video or audio; out: folder of the checkpoint. The settings are
    `finetune.*`; the clips are plain ones of `video.*` and `audio.*`. A stopped run goes on from its checkpoint, bit for bit on a CPU;
    a finished one is only tested. SIGTERM and Ctrl-C end the step, save and leave.
    → {top1, top5: of test videos, the softmax averaged over eval.clips clips; clip_top1: of clips, in percent; videos, train_videos:
    how many were used; skipped: how many could not be}. Raises DataError, MediaError, ConfigError, CheckpointError.
    """
    place = distributed.start()
    cfg = dataclasses.replace(subject.cfg, temporal=config.Temporal())  # one clip a video, at its own speed, forwards
    fine, n, classes = cfg.finetune, len(train_table), len(train_table.classes)
    labels, _ = (evaluation.labels_of(t, evaluation.Features(np.arange(len(t)))) for t in (train_table, test_table))
    labels = torch.from_numpy(labels).to(place.device)  # n
    if fine.batch_size > n or fine.batch_size % place.world:
        raise config.ConfigError(
            f"wrong value for finetune.batch_size: {fine.batch_size}; expected at most {n}, the videos of {train_table.name}"
            + (f", and a multiple of {place.world}, the processes" if place.world > 1 else "")
        )

    # --------------------------------------------------------------------------------------------------------- network
    network = copy.deepcopy(subject.network).to(place.device)
    if cfg.optim.sync_bn and place.world > 1:
        network = distributed.sync_batch_norm(network, place.device)
    torch.manual_seed(cfg.seed)
    classifier = Classifier(getattr(network, f"{modality}_model"), classes).to(place.device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=fine.lr, weight_decay=fine.weight_decay, fused=True)
    cuda = place.device.type == "cuda"
    autocast = torch.autocast(
        place.device.type, torch.float16 if cfg.optim.amp == "fp16" else torch.bfloat16, enabled=cuda and cfg.optim.amp != "none"
    )
    scaler = torch.amp.GradScaler(place.device.type, enabled=cuda and cfg.optim.amp == "fp16")

    # ---------------------------------------------------------------------------------------------------------- resume
    split = test_table.name.removesuffix(" (held out)").rpartition(" ")[2]
    path = Path(out) / f"finetune-{modality}-{cfg.data.name}-{split}.pt"
    parts = {"classifier": classifier, "optimizer": optimizer, "scaler": scaler}
    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    first_step = resume(path, parts, bad_files, decisive(subject, cfg, train_table))
    epoch_steps = n // fine.batch_size
    warmup_steps = fine.warmup_epochs * epoch_steps
    last_step = warmup_steps + fine.epochs * epoch_steps
    draws = data.Draws(n, fine.batch_size, "epoch", cfg.seed, first_step, last_step, place.rank, place.world)
    batches = iter(data.loader(data.Clips(train_table, cfg, True, (modality,)), cfg.data.workers, batch_sampler=draws))

    # ------------------------------------------------------------------------------------------------------------ loop
    bar = tqdm(
        total=last_step,
        initial=first_step,
        desc=f"fine-tuning {modality}",
        unit="step",
        disable=place.rank > 0,
        dynamic_ncols=True,
    )
    stop = distributed.StopSignal()
    classifier.train()
    waited, since, saved_at = 0.0, time.perf_counter(), time.perf_counter()
    for step in range(first_step, last_step):
        if step in (first_step, warmup_steps):  # the linear layer first, then everything [A]
            classifier.encoder.requires_grad_(step >= warmup_steps)  # its batch norms follow the new data from the start [A]
            model = classifier
            if place.world > 1:
                model = DistributedDataParallel(classifier, device_ids=[place.device] if cuda else None)
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        bad_files.count(batch.pop("failures"), len(batch["index"]))

        batch = data.to_device(batch, place.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / epoch_steps - fine.warmup_epochs, fine)
        keep = dropout(cfg.seed, step, draws.mine, classifier.encoder.dim, fine).to(place.device)  # b×8·width
        with autocast:
            logits = model(batch[modality], keep)  # b×C
        loss = F.cross_entropy(logits.float(), labels[batch["index"]])
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

        # --------------------------------------------------------------------------------------------- say, save, stop
        bar.update()
        done = step + 1
        if done % cfg.log.every_steps == 0 or done == last_step:
            elapsed, since = time.perf_counter() - since, time.perf_counter()
            mean = distributed.total(loss).item() / place.world
            if not math.isfinite(mean):
                raise config.ConfigError(f"the loss is {mean} at step {done}; try a lower finetune.lr or optim.amp=none")
            bar.set_postfix_str(
                f"epoch {done / epoch_steps - fine.warmup_epochs:.1f}, loss {mean:.3f}, data wait {waited / elapsed:.0%}"
            )
            waited = 0.0
        if distributed.any_rank(
            stop.asked or done == last_step or time.perf_counter() - saved_at > 60 * cfg.log.checkpoint_minutes
        ):
            save(path, parts, bad_files, decisive(subject, cfg, train_table), done, place)
            saved_at = time.perf_counter()
            if distributed.any_rank(stop.asked):
                bar.close()
                distributed.say(
                    place,
                    f"stopped by {stop.asked or 'another rank'} after step {done}, saved; the same command goes on from here",
                )
                sys.exit(stop.exit_code)
    stop.release()
    bar.close()
    bad = set().union(*distributed.gather_objects(set(bad_files.reasons)))
    result = test(network, classifier.linear, test_table, cfg, place, modality)
    return {**result, "train_videos": n - len(bad), "skipped": result["skipped"] + len(bad)}


def learning_rate(epoch, fine):
    """lr in the warm-up (epoch < 0) and then, times gamma after each milestone [A]."""
    return fine.lr * fine.gamma ** sum(epoch >= share * fine.epochs for share in fine.milestones)


def dropout(seed, step, mine, features, fine):
    """What the features of this rank's places `mine` of the global batch are multiplied by: b×features float32.

    A function of the seed and the step, as everything random, so that neither interruptions nor the number of ranks matter.
    """
    kept = np.random.default_rng((seed, 6, step)).random((fine.batch_size, features), np.float32) >= fine.dropout
    return torch.from_numpy(kept[mine.start : mine.stop]).float() / (1 - fine.dropout)


@torch.no_grad()
def test(network, linear, table, cfg, place, modality):
    """Accuracies of the fine-tuned network on evenly spaced clips of a table's videos, each rank reading its share of them."""
    mine = np.arange(place.rank, len(table), place.world)
    title = f"testing {modality}" if place.rank == 0 else None
    found = evaluation.extract(network, datasets.take(table, mine), cfg, place.device, (modality,), progress=title)
    scores = linear(torch.from_numpy(found.features[modality]).to(place.device)).softmax(2).cpu().numpy()  # m×K×C
    for row, reason in found.failures.items():
        tqdm.write(f"skipped {table.root / table.paths[mine[row]]}: {reason}")
    shares = distributed.gather_objects((scores, table.labels[mine[found.index]], len(found.failures)))
    scores, labels, failed = zip(*shares, strict=True)
    scores, labels = np.concatenate(scores), np.concatenate(labels)
    accuracies = evaluation.accuracies(scores, labels, np.arange(scores.shape[2]))
    return {**accuracies, "videos": len(labels), "skipped": sum(failed)}


# ------------------------------------------------------------------------------------------------------------ checkpoint


def decisive(subject, cfg, table):
    """What decides the course of a run, {name: value}: a checkpoint of another is not gone on with."""
    videos = json.dumps([table.paths, table.labels.tolist(), table.start_s.tolist(), table.end_s.tolist()])
    settings = {key: dataclasses.asdict(getattr(cfg, key)) for key in ("video", "audio", "model", "finetune")}
    digest = hashlib.sha256(videos.encode()).hexdigest()[:12]
    return config.flat({"checkpoint": subject.hash, "seed": cfg.seed, "training videos": digest, **settings})


def resume(path, parts, bad_files, now):
    """Load the checkpoint where there is one; → the number of steps done. Raises ConfigError where it is of other settings."""
    if not path.exists():
        return 0
    saved = checkpoint.load(path)
    if changed := [key for key in now if saved["decisive"].get(key) != now[key]]:
        differences = ", ".join(f"{key} was {saved['decisive'].get(key)} and is {now[key]}" for key in changed)
        raise config.ConfigError(f"{path} holds a run with other settings ({differences}); choose another --out")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    bad_files.reasons.update(saved["bad_files"])
    return saved["step"]


def save(path, parts, bad_files, now, step, place):
    """Write the checkpoint from rank 0; every rank calls, as each knows other bad files."""
    reasons = {index: reason for known in distributed.gather_objects(bad_files.reasons) for index, reason in known.items()}
    if place.rank == 0:
        state = {name: part.state_dict() for name, part in parts.items()}
        checkpoint.save(path, {**state, "bad_files": reasons, "decisive": now, "step": step})
