"""Pre-train an audio-visual network: Robust-xID (CVPR 2021) and temporal self-supervision (AAAI 2023).

    python train.py                                   the toy world, a few minutes on a laptop
    torchrun --nproc-per-node 8 train.py --cfg robust --root /data/kinetics400

Read from top to bottom: set up, the loop, and what a step minimises. The same command again resumes the run
exactly where its last checkpoint left it.
"""

from avid import cli

if __name__ == "__main__":  # before the heavy imports: --help and a wrong setting answer at once
    cfg = cli.training(__doc__)

import functools
import math
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the cores to the decoding workers

import torch

from avid import avid_cma, data, distributed, evaluation, losses, memory_bank, models, run, temporal_tasks

REMEDY = "the same command goes on with a lower optim.lr, an optim.clip_grad or optim.amp=none"


def main(cfg):
    world = distributed.start()
    distributed.say(world, run.describe(cfg, world))
    models.check(cfg.model)
    train_table, held_out = run.videos(cfg, world)
    n, optim = len(train_table), cfg.optim
    cli.fits(cfg, n, world.size)
    epoch_steps = n // optim.batch_size

    # ------------------------------------------------------------------- network, bank, what a step minimises
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).to(world.device)
    if optim.sync_bn and world.size > 1:
        network = distributed.sync_batch_norm(network)
    if optim.checkpoint_activations:
        models.checkpoint_activations(network)
    if optim.accumulate > 1:
        models.in_parts(network, optim.accumulate)
    Bank = memory_bank.kind(cfg)
    bank = Bank(n, cfg.model.embedding, cfg.bank.momentum, cfg.seed, cfg.bank.dtype).to(world.device)
    objective = Objective(cfg, bank, world, epoch_steps)
    model = torch.compile(network) if optim.compile else network
    model = distributed.data_parallel(model, world, optim.sync_bn, objective.leaves_heads_out)
    adam = {"lr": optim.lr, "weight_decay": optim.weight_decay, "fused": True}
    optimizer = torch.optim.Adam(network.parameters(), **adam)
    guard = run.Guard(network, optimizer, world.device, optim.amp, optim.clip_grad)

    # ------------------------------------------------------------------------------------ resume, data, watch
    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    folder = run.Folder(cfg, world)
    kept = {"optimizer": optimizer, "scaler": guard, "bad_files": bad_files} | objective.kept()
    first_step = folder.resume(train_table, network=network, bank=bank, **kept)
    if not first_step:
        folder.begin_from(cfg.init, network, bank, objective.ancestor)
    last_step = max(first_step, optim.epochs * epoch_steps)
    steps = range(first_step, last_step)
    draws = optim.draws, cfg.seed, first_step, last_step, *world[:2], optim.copies
    together = cfg.data.clips_per_open, data.shards(train_table, cfg)
    sampler = data.BatchSampler(n, optim.batch_size, *draws, *together)
    loader = data.loader(data.training_clips(train_table, cfg), cfg.data.workers, batch_sampler=sampler)
    model.train()
    held_out_check = functools.partial(evaluation.check, network, bank, held_out, cfg, world)
    clips = optim.batch_size * cfg.temporal.moments
    watch = run.Watch(folder, guard, bad_files, steps, epoch_steps, clips, REMEDY, held_out_check)

    # --------------------------------------------------------------------------------------------------- loop
    batches = watch.batches(loader)
    for step in steps:
        batch = data.to_device(next(batches), world.device, cfg.audio)  # uint8: augmented float clips
        set_learning_rate(optimizer, step / epoch_steps, optim)
        with guard.forward():  # autocast; batch norm's statistics are remembered
            output = model(batch["video"], batch["audio"])  # embeddings, features, logits of the tasks
        index = distributed.gather(batch["index"])  # B, the instances of all ranks
        terms, accuracies = objective(output, batch, index, step)  # {"xid": …, …}: docs/method.md 2-7
        loss = sum(getattr(cfg.weights, name) * term for name, term in terms.items())
        finite = guard.step(loss, terms)  # backward, clip, optimiser; not finite: nothing moves
        bank.update(index, output.video, output.audio, where=finite)  # docs/method.md 1
        watch.after(step, accuracies, index)  # log later, save, check, stop
    watch.finish(folder.out / "skipped.csv")
    folder.draw_curves()
    last = folder.path
    distributed.say(world, f"{last_step} steps done: {last}; now: {run.next_command(train_table, last)}")
    distributed.end()


# -------------------------------------------------------------------------------------- what a step minimises


class Objective:
    """Every term whose weight is not zero. cfg: config.Config; bank: the memories of all N instances."""

    def __init__(self, cfg, bank, world, epoch_steps):
        self.cfg, self.bank, self.world = cfg, bank, world
        self.warmup_steps = cfg.loss.warmup_epochs * epoch_steps
        self.ancestor = avid_cma.Discrimination(cfg, bank, self.warmup_steps, epoch_steps)

    def kept(self):
        """What of it goes into a checkpoint: {name: what has a state_dict}."""
        return {"ancestor": self.ancestor} if self.ancestor.state_dict() else {}

    @property
    def leaves_heads_out(self):
        """Whether a projection head may get no gradient: only these terms reach both modalities' heads."""
        weights = self.cfg.weights
        if self.cfg.data.need == "any":  # a batch may lack a modality
            return True
        return not (weights.xid or weights.contrast_va or weights.contrast_av)

    def __call__(self, output, batch, index, step):
        """output: models.Output of this rank's b·M clips; batch: their instances, labels; index B: of all
        ranks.

        → {term: scalar}, this rank's parts, of which the mean over the ranks, which DDP takes, is that of the
        global batch; {"<task> %": accuracy over all ranks}.
        """
        terms, agreed = {}, self.ancestor.agrees(step)
        if "held" in batch:  # data.need=any: which of the instances have a picture, a sound
            self.bank.mark(index, distributed.gather(batch["held"]))
        if self.cfg.weights.xid:
            terms["xid"] = self.robust_xid(output, index, step, agreed)
        if agreed:
            local = self.of_clips(output, index)
            terms["cma"] = self.ancestor.cma(output.video, output.audio, index, local, step).mean()
        terms |= self.contrasts(output, batch, index, step)
        task_terms, accuracies = self.temporal_tasks(output.temporal, batch)
        return terms | task_terms, accuracies

    def robust_xid(self, output, index, step, agreed):
        """Σ_i w_i·L_soft(i) / Σ_i w_i over the global batch (docs/method.md 5); plain xID in the warm-up."""
        robust, local = step >= self.warmup_steps, self.of_clips(output, index)
        if self.cfg.bank.candidates == "own":  # docs/method.md 12
            per_clip = self.ancestor.xid(output.video, output.audio, index, local, step, agreed)  # b·M
        else:
            per_clip = self.shared_candidates(output, index, local, step, robust)
        weight = pair_weights(index, self.bank, self.cfg.loss, robust)  # B
        if self.cfg.data.need == "any":
            weight = weight * self.bank.held[index].all(1)  # no pair: 0
        moments = len(per_clip) * self.world.size // len(index)
        return losses.weighted_mean(per_clip, local(weight), moments * weight.sum() / self.world.size)

    def of_clips(self, output, index):
        """A function: what belongs to the global batch's instances, B×…, as this rank's clips stand, b·M×…"""
        moments = len(output.video) * self.world.size // len(index)
        return lambda x: x.chunk(self.world.size)[self.world.rank].repeat_interleave(moments, 0)

    def shared_candidates(self, output, index, local, step, robust):
        """L_soft(i) of this rank's clips, b·M, against the batch and negatives that it shares."""
        cfg, loss = self.cfg, self.cfg.loss
        candidates = self.bank.candidates(index, cfg.bank.num_negatives, cfg.seed + step)
        memories = [self.bank.read(modality, candidates.index) for modality in data.MODALITIES]  # C×D each
        settings = {name: getattr(loss, name) for name in ("temperature", "estimator", "tau_s", "tau_t")}
        settings["soft"] = loss.soft if robust else 0.0
        column = local(candidates.column)  # b·M
        return losses.robust_xid(output.video, output.audio, *memories, candidates.valid, column, **settings)

    def contrasts(self, output, batch, index, step):
        """Contrast with positives and negatives from the feature space as it is now (docs/method.md 7)."""
        cfg, local, terms = self.cfg, batch["index"], {}  # b, the instances of this rank
        live = {"video": output.video, "audio": output.audio}  # b·M×D
        moments, first = len(output.video) // len(local), self.world.rank * len(local)
        for key in data.MODALITIES:
            queries = [q for q in data.MODALITIES if getattr(cfg.weights, f"contrast_{q[0]}{key[0]}")]
            if not queries:
                continue
            seeds = [memory_bank.row_seed(cfg.seed, key, step, first + i) for i in range(len(local))]
            draws = batch[f"near_{key}"], batch[f"far_{key}"]  # made by the decoding processes
            of_all = memory_bank.row_seed(cfg.seed, key, step, -1)  # the same on every rank
            sample = memory_bank.draw_sample(self.bank.num_instances, cfg.contrast, of_all, local.device)
            near, far, valid = self.bank.neighbours(key, local, cfg.contrast, seeds, draws, sample)  # b×…×D
            near, far = (x.repeat_interleave(moments, 0) for x in (near, far))  # b·M×…×D
            others = self.others(live[key], key, local, index) if cfg.contrast.batch else None
            for query in queries:
                own = live[key]  # the matched clip of the other modality, or the other moment's of the same
                if query == key:
                    own = own.view(-1, 2, own.shape[1]).flip(1).flatten(0, 1)
                tau = cfg.contrast.temperature
                loss = losses.contrast(live[query], own, near, far, tau, valid, others)  # b·M
                terms[f"contrast_{query[0]}{key[0]}"] = self.mean(loss, batch, query, key)
        return terms

    def others(self, live, modality, local, index):
        """The clips of the global batch, B·M×D, and which are of another instance that has them, b·M×B·M."""
        there, held = index != local[:, None], self.bank.has(modality, index)  # b×B; B or None
        moments = len(live) // len(local)
        there = (there if held is None else there & held).repeat_interleave(moments, 0)  # b·M×B
        return distributed.gather_live(live), there.repeat_interleave(moments, 1)

    def mean(self, per_clip, batch, *modalities):
        """The mean over this rank's clips, b·M; of files that may lack a modality over those that have these:
        the ranks' mean of it is that of the global batch."""
        if "held" not in batch:
            return per_clip.mean()
        have = torch.stack([batch["held"][:, data.MODALITIES.index(m)] for m in modalities]).all(0)  # b
        counts = have.repeat_interleave(len(per_clip) // len(have)).to(per_clip)  # b·M
        return losses.weighted_mean(per_clip, counts, distributed.total(counts.sum()) / self.world.size)

    def temporal_tasks(self, logits, batch):
        """Speed, direction, order (docs/method.md 6): the mean over the known labels, and the accuracy."""
        if not logits:
            return {}, {}
        targets = {task: temporal_tasks.targets(task, batch) for task in logits}
        results = {task: temporal_tasks.task_loss(x, targets[task]) for task, x in logits.items()}
        local = torch.stack([n for _, *counts in results.values() for n in counts])
        counts = distributed.total(local).view(-1, 2)  # right answers, known labels: over all ranks
        terms, accuracies = {}, {}
        for (task, (loss, *_)), (right, known) in zip(results.items(), counts, strict=True):
            terms[task] = loss * self.world.size / known.clamp(min=1)
            accuracies[f"{task} %"] = 100 * right / known
        return terms, accuracies


def pair_weights(index, bank, loss, robust):
    """w_i of these instances' pairs (docs/method.md 3), 1 in the warm-up: index B, of all ranks → B."""
    agreement, w_min = bank.read("agreement", index), loss.w_min if robust else 1.0
    return losses.faulty_positive_weights(
        agreement, *bank.agreement_mean_std(), w_min, loss.delta, loss.kappa
    )


# ------------------------------------------------------------------------------------------ the learning rate


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


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(cfg)
