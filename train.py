"""Pre-train an audio-visual network on videos: Robust-xID (CVPR 2021) and temporal self-supervision (AAAI 2023).

    python train.py                                   the toy world, a few minutes on a laptop
    torchrun --nproc-per-node 8 train.py --cfg robust --root /data/kinetics400

Read from top to bottom: set up, the loop, and what a step minimises. The same command again resumes the run exactly
where its last checkpoint left it.
"""

from avid import cli

if __name__ == "__main__":  # before the heavy imports: --help and a wrong setting answer at once
    cfg = cli.training(__doc__)

import dataclasses
import functools
import math
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the cores to the decoding workers

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from avid import (
    data,
    datasets,
    distributed,
    evaluation,
    losses,
    memory_bank,
    models,
    run,
    temporal_tasks,
    toy,
)
from avid.tools import figures

COLLAPSED = 0.95  # mean cosine within a bank that calls for a warning


def main(cfg):
    world = distributed.start()
    distributed.say(world, run.describe(cfg, world))
    models.check(cfg.model)
    train_table, held_out = videos(cfg, world)
    cli.fits(cfg, len(train_table), world.size)
    epoch_steps = len(train_table) // cfg.optim.batch_size
    last_step = cfg.optim.epochs * epoch_steps

    # ------------------------------------------------------------------------------- network, bank, what a step minimises
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).to(world.device)
    if cfg.optim.sync_bn and world.size > 1:
        network = distributed.sync_batch_norm(network, world.device)
    if cfg.optim.checkpoint_activations:
        models.checkpoint_activations(network)
    Bank = memory_bank.SpreadBank if cfg.bank.spread else memory_bank.MemoryBank
    bank = Bank(len(train_table), cfg.model.embedding, cfg.bank.momentum, cfg.seed, cfg.bank.dtype).to(
        world.device
    )
    objective = Objective(cfg, bank, world, epoch_steps)
    model = torch.compile(network) if cfg.optim.compile else network
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        model = DistributedDataParallel(
            model,
            devices,
            find_unused_parameters=objective.leaves_heads_out,
            broadcast_buffers=not cfg.optim.sync_bn,
        )
    optimizer = torch.optim.Adam(
        network.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay, fused=True
    )
    guard = run.Guard(network, optimizer, cfg.optim, world.device)

    # ------------------------------------------------------------------------------------------------ resume, data, watch
    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    folder = run.Folder(cfg, world)
    state = {
        "network": network,
        "bank": bank,
        "optimizer": optimizer,
        "scaler": guard,
        "bad_files": bad_files,
    }
    first_step = folder.resume(train_table, **state)
    sampler = data.BatchSampler(
        len(train_table),
        cfg.optim.batch_size,
        cfg.optim.draws,
        cfg.seed,
        first_step,
        last_step,
        world.rank,
        world.size,
    )
    loader = data.loader(data.Clips(train_table, cfg, training=True), cfg.data.workers, batch_sampler=sampler)
    model.train()
    held_out_check = functools.partial(check, network, bank, held_out, cfg, world)
    watch = run.Watch(folder, guard, bad_files, held_out_check, first_step, last_step, epoch_steps)

    # --------------------------------------------------------------------------------------------------------------- loop
    batches = watch.batches(loader)
    for step in range(first_step, last_step):
        batch = data.to_device(next(batches), world.device)  # uint8 clips become augmented float clips
        set_learning_rate(optimizer, step / epoch_steps, cfg.optim)
        with guard.forward():  # autocast; batch norm's statistics are remembered
            output = model(
                batch["video"], batch["audio"]
            )  # embeddings, features, logits of the temporal tasks
        index = distributed.gather(batch["index"])  # B, the instances of all ranks
        terms, accuracies = objective(
            output, batch, index, step
        )  # {"xid": …, "speed_video": …}: docs/method.md 2-7
        loss = sum(getattr(cfg.weights, name) * term for name, term in terms.items())
        finite = guard.step(loss)  # backward, clip, optimiser; where it is not finite, nothing moves
        bank.update(index, output.video, output.audio, where=finite)  # docs/method.md 1
        watch.after(step, terms, accuracies, index)  # log later, save, check, stop
    watch.finish()
    last = Path(cfg.out) / "last.pt"
    distributed.say(world, f"{last_step} steps done: {last}; now: python eval_linear.py --ckpt {last}")
    distributed.end()


# ------------------------------------------------------------------------------------------------- what a step minimises


class Objective:
    """Every term whose weight is not zero. cfg: config.Config; bank: the memories of all N instances; epoch_steps: steps an epoch."""

    def __init__(self, cfg, bank, world, epoch_steps):
        self.cfg, self.bank, self.world = cfg, bank, world
        self.warmup_steps = cfg.loss.warmup_epochs * epoch_steps

    @property
    def leaves_heads_out(self):
        """Whether a projection head may get no gradient: only these terms reach the heads of both modalities."""
        weights = self.cfg.weights
        return not (weights.xid or weights.contrast_va or weights.contrast_av)

    def __call__(self, output, batch, index, step):
        """output: models.Output of this rank's b·M clips; batch: their labels and instances; index B: those of all ranks.

        → {term: scalar}, this rank's parts, scaled so that the mean over the ranks, which DDP takes, is the mean over
        the global batch; {"<task> %": accuracy over all ranks}.
        """
        terms = {}
        if self.cfg.weights.xid:
            terms["xid"] = self.robust_xid(output, index, step)
        terms |= self.contrasts(output, batch["index"], step)
        task_terms, accuracies = self.temporal_tasks(output.temporal, batch)
        return terms | task_terms, accuracies

    def robust_xid(self, output, index, step):
        """Σ_i w_i·L_soft(i) / Σ_i w_i over the global batch (docs/method.md 5); plain xID during the warm-up."""
        cfg, loss, robust = self.cfg, self.cfg.loss, step >= self.warmup_steps
        candidates = self.bank.candidates(index, cfg.bank.num_negatives, cfg.seed + step)
        moments = len(output.video) * self.world.size // len(index)

        def local(x):  # B → b·M, as this rank's clips stand
            return x.chunk(self.world.size)[self.world.rank].repeat_interleave(moments)

        per_clip = losses.robust_xid(
            output.video,
            output.audio,
            self.bank.read("video", candidates.index),
            self.bank.read("audio", candidates.index),
            candidates.valid,
            local(candidates.column),
            temperature=loss.temperature,
            soft=loss.soft if robust else 0.0,
            estimator=loss.estimator,
            tau_s=loss.tau_s,
            tau_t=loss.tau_t,
        )  # b·M
        weight = pair_weights(index, self.bank, loss, robust)  # B
        return losses.weighted_mean(per_clip, local(weight), moments * weight.sum() / self.world.size)

    def contrasts(self, output, local, step):
        """Contrast with positives and negatives from the feature space as it is now (docs/method.md 7): query, key."""
        cfg, terms = self.cfg, {}
        live = {"video": output.video, "audio": output.audio}  # b·M×D
        moments = len(output.video) // len(local)
        first = self.world.rank * len(local)  # of this rank's instances in the global batch
        for key in data.MODALITIES:
            queries = [q for q in data.MODALITIES if getattr(cfg.weights, f"contrast_{q[0]}{key[0]}")]
            if not queries:
                continue
            seeds = [hash((cfg.seed, step, key == "audio", first + i)) % 2**63 for i in range(len(local))]
            near, far = self.bank.neighbourhood(key, local, cfg.contrast, seeds)  # b×n_pos, b×n
            near, far = (self.bank.read(key, x).repeat_interleave(moments, 0) for x in (near, far))  # b·M×…×D
            for query in queries:
                own = live[key]  # the matched clip of the other modality, or the other moment's of the same
                if query == key:
                    own = own.view(-1, 2, own.shape[1]).flip(1).flatten(0, 1)
                name = f"contrast_{query[0]}{key[0]}"
                terms[name] = losses.contrast(live[query], own, near, far, cfg.contrast.temperature).mean()
        return terms

    def temporal_tasks(self, logits, batch):
        """Speed, direction, order (docs/method.md 6): the mean over the labels that are known, and the accuracy."""
        results = {
            task: temporal_tasks.task_loss(x, temporal_tasks.TASKS[task].targets(batch))
            for task, x in logits.items()
        }
        if not results:
            return {}, {}
        counts = distributed.total(torch.stack([n for _, *counts in results.values() for n in counts]))
        counts = dict(
            zip(results, counts.view(-1, 2), strict=True)
        )  # right answers, known labels: over all ranks
        terms = {
            task: loss * self.world.size / counts[task][1].clamp(min=1)
            for task, (loss, *_) in results.items()
        }
        return terms, {f"{task} %": 100 * right / known for task, (right, known) in counts.items()}


def pair_weights(index, bank, loss, robust):
    """w_i of these instances' pairs (docs/method.md 3), 1 during the warm-up: index B, the same on every rank → B."""
    agreement, w_min = bank.read("agreement", index), loss.w_min if robust else 1.0
    return losses.faulty_positive_weights(
        agreement, *bank.agreement_mean_std(), w_min, loss.delta, loss.kappa
    )


# ------------------------------------------------------------------------------------------------------------ the pieces


def videos(cfg, world):
    """The training videos and some held-out ones; the toy is written first where it is not there yet."""
    source = cfg.data
    if source.name == "toy":
        if world.rank > 0:
            distributed.wait()
        source = dataclasses.replace(
            source, root=str(toy.write(source.root, cfg.toy, cfg.seed, os.cpu_count()))
        )
        if world.rank == 0:
            distributed.wait()  # the others go on and find it written
    train_table = datasets.load(source, source.split or "train")
    distributed.say(world, train_table.report())
    if not cfg.log.check_epochs:
        return train_table, None
    held_out = datasets.load(source, datasets.DATA[source.name].evaluation)
    distributed.say(world, f"{held_out.report()}, for the checks (log.check_epochs=0: none)")
    few = np.linspace(0, len(held_out) - 1, min(len(held_out), cfg.log.check_videos)).astype(int)
    return train_table, datasets.take(held_out, few)


def set_learning_rate(optimizer, epoch, optim):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(epoch, optim)


def learning_rate(epoch, optim):
    """The learning rate at a (fractional) epoch: linear warm-up, then cosine, steps or constant."""
    if epoch < optim.warmup_epochs:
        return optim.lr * (epoch + 1e-3) / optim.warmup_epochs
    if optim.schedule == "cosine":
        share = (epoch - optim.warmup_epochs) / max(optim.epochs - optim.warmup_epochs, 1e-9)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    if optim.schedule == "steps":
        return optim.lr * optim.gamma ** sum(epoch >= share * optim.epochs for share in optim.milestones)
    return optim.lr


def check(network, bank, held_out, cfg, world):
    """Every few epochs: what the network finds among held-out videos, and whether the bank is healthy. → numbers by name."""
    health = bank.health()
    if world.rank > 0:
        return {}
    for modality in data.MODALITIES:
        if health[f"cosine_{modality}"] > COLLAPSED:
            tqdm.write(
                f"warning: the {modality} bank has collapsed to one direction (mean cosine "
                f"{health[f'cosine_{modality}']:.3f}); try model.head_norm=batch optim.draws=iid, or a lower optim.lr"
            )
    found = evaluation.extract(network, data.Clips(held_out, cfg, training=False, clips=1), world.device)
    results = evaluation.cross_modal(found, held_out.labels[found.index])
    tqdm.write("held out: " + ", ".join(f"{name} {value:.1f}" for name, value in results.items()))
    tqdm.write("bank: " + ", ".join(f"{name} {value:.3f}" for name, value in health.items()))
    if network.temporal.heads:
        confusion = evaluation.confusions(network, held_out, cfg, world.device)
        tasks = {
            f"held-out {task} %": 100 * n.trace().item() / max(n.sum().item(), 1)
            for task, n in confusion.items()
        }
        tqdm.write(", ".join(f"{name} {value:.1f}" for name, value in tasks.items()))
        figures.confusions(confusion, cfg.temporal, Path(cfg.out) / "temporal.png")
        results |= tasks
    return {**health, **results}


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(cfg)
