"""Pre-train an audio-visual network on videos: Robust-xID (CVPR 2021), read from top to bottom.

    python train.py                                   the toy world, a few minutes on a laptop
    torchrun --nproc-per-node 8 train.py --cfg robust data.root=/data/kinetics400

The same command again resumes the run exactly where its last checkpoint left it.
"""

from avid import config

if __name__ == "__main__":  # before the heavy imports: --help and a wrong setting answer at once
    cfg = config.command_line(__doc__)

import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the cores to the decoding workers

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from avid import checkpoint, data, datasets, distributed, evaluation, figures, losses, memory_bank, models, temporal_tasks, toy

COLLAPSED = 0.95  # mean cosine within a bank that calls for a warning
MAY_CHANGE = (
    "out",
    "data.root",
    "data.workers",
    "data.max_bad_share",
    "log",
    "eval",
    "finetune",
    "optim.epochs",
)  # when resuming


def main(cfg):
    place = distributed.start()
    out = Path(cfg.out)
    train_table, held_out = tables(cfg, place)

    # ------------------------------------------------------------------------------------------------ network and bank
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).to(place.device)
    if cfg.optim.sync_bn and place.world > 1:
        network = distributed.sync_batch_norm(network, place.device)
    model = torch.compile(network) if cfg.optim.compile else network
    if place.world > 1:
        weights = cfg.weights  # a head that no term uses has no gradient
        model = DistributedDataParallel(
            model,
            device_ids=[place.device] if place.device.type == "cuda" else None,
            find_unused_parameters=not (weights.xid or weights.contrast_va or weights.contrast_av),
        )
    bank = memory_bank.MemoryBank(len(train_table.paths), cfg.model.embedding, cfg.bank.momentum, cfg.seed)
    bank.to(place.device)

    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay, fused=True)
    cuda = place.device.type == "cuda"
    autocast = torch.autocast(
        place.device.type, torch.float16 if cfg.optim.amp == "fp16" else torch.bfloat16, enabled=cuda and cfg.optim.amp != "none"
    )
    scaler = torch.amp.GradScaler(place.device.type, enabled=cuda and cfg.optim.amp == "fp16")

    # ---------------------------------------------------------------------------------------------------------- resume
    run = Run(cfg, place, network, bank, optimizer, scaler)
    first_step = run.resume()
    epoch_steps = len(train_table.paths) // cfg.optim.batch_size
    last_step = cfg.optim.epochs * epoch_steps
    draws = data.Draws(
        len(train_table.paths), cfg.optim.batch_size, cfg.optim.draws, cfg.seed, first_step, last_step, place.rank, place.world
    )
    batches = data.loader(data.Clips(train_table, cfg, training=True), cfg.data.workers, batch_sampler=draws)
    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    stop = distributed.StopSignal()

    # ------------------------------------------------------------------------------------------------------------ loop
    bar = tqdm(total=last_step, initial=first_step, unit="step", disable=place.rank > 0, dynamic_ncols=True)
    model.train()
    waited, logged, since, saved_at = 0.0, first_step, time.perf_counter(), time.perf_counter()
    batches = iter(batches)
    for step in range(first_step, last_step):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        bad_files.count(batch.pop("failures"), len(batch["index"]))

        batch = data.to_device(batch, place.device)  # uint8 clips become augmented float clips
        lr = learning_rate(step / epoch_steps, cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with autocast:
            output = model(batch["video"], batch["audio"])
        terms, accuracies = objective(output, batch, bank, cfg, place, step, epoch_steps)  # {"xid": …, "speed_video": …}
        loss = sum(getattr(cfg.weights, name) * term for name, term in terms.items())

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if cfg.optim.clip_grad:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.optim.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        per_video = (len(batch["index"]), cfg.temporal.moments, -1)
        video, audio = output.video.view(per_video).mean(1), output.audio.view(per_video).mean(1)  # b×D
        bank.update(*(distributed.gather(x) for x in (batch["index"], video, audio)))

        # ---------------------------------------------------------------------------------------- log, check, save, stop
        bar.update()
        done = step + 1
        if done % cfg.log.every_steps == 0 or done == last_step:
            elapsed = time.perf_counter() - since
            line = {name: distributed.total(term).item() / place.world for name, term in {"loss": loss, **terms}.items()}
            if not math.isfinite(line["loss"]):
                raise FloatingPointError(f"the loss is {line['loss']} at step {done}; try a lower optim.lr or optim.amp=none")
            line |= {name: value.item() for name, value in accuracies.items()}
            videos = (done - logged) * cfg.optim.batch_size
            line |= {"lr": lr, "clips_per_s": videos * cfg.temporal.moments / elapsed, "data_wait": waited / elapsed}
            run.log(done, done / epoch_steps, bad_files=len(bad_files.reasons), **line)
            bar.set_postfix_str(
                f"epoch {done / epoch_steps:.1f}, loss {line['loss']:.3f}, {line['clips_per_s']:.0f} clips/s, "
                f"data wait {line['data_wait']:.0%}"
            )
            waited, logged, since = 0.0, done, time.perf_counter()
        epoch_ends = done % epoch_steps == 0
        if cfg.log.check_epochs and epoch_ends and (done // epoch_steps % cfg.log.check_epochs == 0 or done == last_step):
            run.log(done, done / epoch_steps, **check(network, bank, held_out, cfg, place))
            run.draw_curves()
            since = time.perf_counter()  # clips/s are those of training
        leave = distributed.any_rank(stop.asked)
        if epoch_ends or leave or done == last_step or time.perf_counter() - saved_at > 60 * cfg.log.checkpoint_minutes:
            run.save(done)
            saved_at = time.perf_counter()
        if leave:
            bar.close()
            distributed.say(
                place, f"stopped by {stop.asked or 'another rank'} after step {done}, saved; the same command goes on from here"
            )
            distributed.end()
            sys.exit(stop.exit_code)
    bar.close()
    bad_files.report()
    run.draw_curves()
    distributed.say(place, f"{last_step} steps done: {out / 'last.pt'}; now: python eval_linear.py --ckpt {out / 'last.pt'}")
    distributed.end()


# -------------------------------------------------------------------------------------------------------- the pieces


def tables(cfg, place):
    """The training videos and some held-out ones; the toy is written first where it is not there yet."""
    if cfg.data.name == "toy":
        if place.rank > 0:
            distributed.wait()
        folder = toy.write(cfg.data.root, cfg.toy, cfg.seed, os.cpu_count())
        if place.rank == 0:
            distributed.wait()  # the others go on and find it written
    source = dataclasses.replace(cfg.data, root=str(folder)) if cfg.data.name == "toy" else cfg.data
    train_table = datasets.load(source, cfg.data.split or "train")
    distributed.say(place, train_table.report())
    if not cfg.log.check_epochs:
        return train_table, None
    held_out = datasets.load(source, datasets.EVALUATION_SPLIT[source.name])
    distributed.say(place, f"{held_out.report()}, for the checks (log.check_epochs=0: none)")
    few = np.linspace(0, len(held_out) - 1, min(len(held_out), cfg.log.check_videos)).astype(int)
    return train_table, datasets.take(held_out, few)


def objective(output, batch, bank, cfg, place, step, epoch_steps):
    """Every term whose weight is not zero: {name: scalar}, and {task: accuracy} of the temporal tasks.

    Each rank returns its part, scaled so that the mean over ranks, which DDP takes, is the mean over the global batch.
    """
    terms, accuracies = {}, {}
    moments = len(output.video) // len(batch["index"])
    index = batch["index"].repeat_interleave(moments)  # b·M, as the clips stand
    everyone = distributed.gather(batch["index"])  # B
    if cfg.weights.xid:
        terms["xid"] = robust_xid(
            output, index, everyone, bank, cfg, place, robust=step >= cfg.loss.warmup_epochs * epoch_steps, seed=cfg.seed + step
        )

    # contrast with positives and negatives from the feature space (docs/method.md section 7): query, key
    live = {"video": output.video, "audio": output.audio}
    first = place.rank * len(batch["index"])  # of this rank's instances in the global batch
    for key in data.MODALITIES:
        queries = [query for query in data.MODALITIES if getattr(cfg.weights, f"contrast_{query[0]}{key[0]}")]
        if not queries:
            continue
        seeds = [hash((cfg.seed, step, key == "audio", first + i)) % 2**63 for i in range(len(batch["index"]))]
        near, far = bank.neighbourhood(key, batch["index"], cfg.contrast, seeds)  # b×n_pos, b×n
        near, far = (getattr(bank, key)[x].repeat_interleave(moments, 0) for x in (near, far))  # b·M×n_pos×D, b·M×n×D
        for query in queries:
            usual = live[key]  # the matched clip of the other modality, or the other moment's of the same
            if query == key:
                usual = usual.view(-1, 2, usual.shape[1]).flip(1).flatten(0, 1)
            name = f"contrast_{query[0]}{key[0]}"
            terms[name] = losses.contrast(live[query], usual, near, far, cfg.contrast.temperature).mean()

    # the temporal tasks (section 6): the mean over the labels that are known
    for task, logits in output.temporal.items():
        loss, right, known = temporal_tasks.judge(logits, temporal_tasks.targets(task, batch))
        right, known = distributed.total(torch.stack([right, known])).clamp(min=1)
        terms[task] = loss * place.world / known
        accuracies[f"{task} %"] = 100 * right / known
    return terms, accuracies


def robust_xid(output, index, everyone, bank, cfg, place, robust, seed):
    """Robust-xID (docs/method.md section 5): Σ_i w_i·L_soft(i) / Σ_i w_i over the global batch; plain xID during the warm-up."""
    candidates = bank.candidates(everyone, cfg.bank.num_negatives, seed)
    column = candidates.column.chunk(place.world)[place.rank]  # b, of this rank's instances
    column = column.repeat_interleave(len(index) // len(column))  # b·M
    loss = losses.robust_xid(
        output.video,
        output.audio,
        bank.video[index],
        bank.audio[index],
        bank.video[candidates.index],
        bank.audio[candidates.index],
        candidates.valid,
        column,
        temperature=cfg.loss.temperature,
        soft=cfg.loss.soft if robust else 0.0,
        estimator=cfg.loss.estimator,
        tau_s=cfg.loss.tau_s,
        tau_t=cfg.loss.tau_t,
        rows=16 if cfg.bank.num_negatives == "all" else None,
    )  # b·M
    weight = losses.faulty_positive_weights(
        bank.agreement[index],
        *bank.agreement_mean_std(),
        w_min=cfg.loss.w_min if robust else 1.0,
        delta=cfg.loss.delta,
        kappa=cfg.loss.kappa,
    )  # b·M
    return losses.weighted_mean(loss, weight, distributed.total(weight.sum()) / place.world)


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


def check(network, bank, held_out, cfg, place):
    """Every few epochs: what the network finds among held-out videos, and how the bank is."""
    health = bank.health()
    if place.rank > 0:
        return {}
    for modality in data.MODALITIES:
        if health[f"cosine_{modality}"] > COLLAPSED:
            tqdm.write(
                f"warning: the {modality} bank has collapsed to one direction (mean cosine {health[f'cosine_{modality}']:.3f}); "
                "try model.head_norm=batch optim.draws=iid, or a lower optim.lr"
            )
    found = evaluation.extract(network, held_out, cfg, place.device, clips=1)
    results = evaluation.cross_modal(found, held_out.labels[found.index])
    tqdm.write("held out: " + ", ".join(f"{name} {value:.1f}" for name, value in results.items()))
    tqdm.write("bank: " + ", ".join(f"{name} {value:.3f}" for name, value in health.items()))
    if network.temporal.heads:
        confusion = evaluation.confusions(network, held_out, cfg, place.device)
        tasks = {f"held-out {task} %": 100 * n.trace().item() / max(n.sum().item(), 1) for task, n in confusion.items()}
        tqdm.write(", ".join(f"{name} {value:.1f}" for name, value in tasks.items()))
        figures.confusions(confusion, cfg.temporal.speeds, Path(cfg.out) / "temporal.png")
        results |= tasks
    return {**health, **results}


class Run:
    """The run folder: configuration, metrics, checkpoint, curves. Only rank 0 writes."""

    def __init__(self, cfg, place, network, bank, optimizer, scaler):
        self.cfg, self.place, self.out = cfg, place, Path(cfg.out)
        self.state = {"network": network, "bank": bank, "optimizer": optimizer, "scaler": scaler}
        self.metrics = self.out / "metrics.jsonl"
        if place.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)

    def resume(self):
        """Load last.pt where there is one; returns the number of steps done."""
        if not (self.out / "last.pt").exists():
            if self.place.rank == 0:
                self.metrics.write_text("")
            return 0
        saved = checkpoint.load(self.out / "last.pt")
        before, now = (config.flat(c) for c in (saved["config"], dataclasses.asdict(self.cfg)))
        changed = [k for k in now if before.get(k) != now[k] and not k.startswith(MAY_CHANGE)]
        if changed:
            differences = ", ".join(f"{k} was {before.get(k)} and is {now[k]}" for k in changed)
            config.stop(f"{self.out} holds a run with other settings ({differences}); choose another --out")
        for name, part in self.state.items():
            part.load_state_dict(saved[name])
        if self.place.rank == 0:
            os.truncate(self.metrics, saved["metrics_bytes"])  # what was logged after the checkpoint comes again
        distributed.say(self.place, f"resuming {self.out} after step {saved['step']}")
        return saved["step"]

    def save(self, step):
        if self.place.rank == 0:
            state = {name: part.state_dict() for name, part in self.state.items()}
            state |= {"step": step, "metrics_bytes": self.metrics.stat().st_size, "config": dataclasses.asdict(self.cfg)}
            checkpoint.save(self.out / "last.pt", state)
            config.save(self.cfg, self.out / "config.yaml")

    def log(self, step, epoch, **values):
        if self.place.rank == 0 and values:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}, ensure_ascii=False) + "\n")

    def draw_curves(self):
        if self.place.rank == 0:
            figures.curves(self.metrics, self.out / "curves.png")


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(cfg)
