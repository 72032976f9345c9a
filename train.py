"""Pre-train an audio-visual network on videos: Robust-xID (CVPR 2021), read from top to bottom.

    python train.py                                   the toy world, a few minutes on a laptop
    torchrun --nproc-per-node 8 train.py --cfg robust data.root=/data/kinetics400

The same command again resumes the run exactly where its last checkpoint left it.
"""

from avid import preflight

if __name__ == "__main__":  # before the heavy imports: --help and a wrong setting answer at once
    cfg = preflight.command_line(__doc__)

import collections
import dataclasses
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

from avid import data, datasets, distributed, evaluation, figures, losses, memory_bank, models, run_folder, temporal_tasks, toy

COLLAPSED = 0.95  # mean cosine within a bank that calls for a warning
LAG = 2  # steps after which a step's numbers are read: the host never waits for the device


def main(cfg):
    place = distributed.start()
    out = Path(cfg.out)
    train_table, held_out = tables(cfg, place)
    preflight.fits(cfg, len(train_table), place.world)

    # ------------------------------------------------------------------------------------------------ network and bank
    torch.manual_seed(cfg.seed)
    torch.backends.cudnn.benchmark = True
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).to(place.device)
    if cfg.optim.sync_bn and place.world > 1:
        network = distributed.sync_batch_norm(network, place.device)
    if cfg.optim.checkpoint_activations:
        models.checkpoint_activations(network)
    model = torch.compile(network) if cfg.optim.compile else network
    if place.world > 1:
        weights = cfg.weights  # a head that no term uses has no gradient
        model = DistributedDataParallel(
            model,
            device_ids=[place.device] if place.device.type == "cuda" else None,
            find_unused_parameters=not (weights.xid or weights.contrast_va or weights.contrast_av),
        )
    Bank = memory_bank.SpreadBank if cfg.bank.spread else memory_bank.MemoryBank
    bank = Bank(len(train_table.paths), cfg.model.embedding, cfg.bank.momentum, cfg.seed, cfg.bank.dtype)
    bank.to(place.device)

    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay, fused=True)
    amp = cfg.optim.amp if place.device.type == "cuda" else "none"
    fp16 = amp == "fp16"
    autocast = torch.autocast(place.device.type, torch.float16 if fp16 else torch.bfloat16, enabled=amp != "none")
    # a step whose gradient is not finite is left out, on the device; what fp16 needs besides is a scale
    scaler = torch.amp.GradScaler(place.device.type, init_scale=2.0**16 if fp16 else 1.0)

    # ---------------------------------------------------------------------------------------------------------- resume
    bad_files = data.BadFiles(train_table, cfg.data.max_bad_share)
    run = run_folder.Run(
        cfg, place, train_table, network=network, bank=bank, optimizer=optimizer, scaler=scaler, bad_files=bad_files
    )
    first_step = run.resume()
    epoch_steps = len(train_table.paths) // cfg.optim.batch_size
    last_step = cfg.optim.epochs * epoch_steps
    draws = data.Draws(
        len(train_table.paths), cfg.optim.batch_size, cfg.optim.draws, cfg.seed, first_step, last_step, place.rank, place.world
    )
    batches = data.loader(data.Clips(train_table, cfg, training=True), cfg.data.workers, batch_sampler=draws)
    stop = distributed.StopSignal()

    # ------------------------------------------------------------------------------------------------------------ loop
    bar = tqdm(total=last_step, initial=first_step, unit="step", disable=place.rank > 0, dynamic_ncols=True)
    model.train()
    trace = tracer(cfg, place)
    later = Later()
    waited, logged, since, saved_at = 0.0, first_step, time.perf_counter(), time.perf_counter()
    batches = iter(batches)
    if checked(first_step, epoch_steps, last_step, cfg):  # stopped or killed within its check, a run makes it again
        with stop.at_once():
            run.log(first_step, first_step / epoch_steps, **check(network, bank, held_out, cfg, place))
    for step in range(first_step, last_step):
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        bad_files.count(batch.pop("failures"), len(batch["index"]))

        batch = data.to_device(batch, place.device)  # uint8 clips become augmented float clips
        lr = learning_rate(step / epoch_steps, cfg.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        statistics = [x.clone() for x in network.buffers()]  # batch norm's, before this batch
        with autocast:
            output = model(batch["video"], batch["audio"])
        everyone = distributed.gather(batch["index"])  # B
        terms, accuracies = objective(output, batch, everyone, bank, cfg, place, step, epoch_steps)  # {"xid": …, …}
        loss = sum(getattr(cfg.weights, name) * term for name, term in terms.items())
        values = distributed.total(torch.stack([loss, *terms.values()])) / place.world  # over the global batch
        finite = values[0].isfinite()  # where it is not, nothing moves: neither weights, nor statistics, nor bank

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        gradients = [x.grad for x in network.parameters() if x.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)  # of finite numbers it may still be too large for one
        gradients[0].mul_(torch.where(finite & total.isfinite(), 1.0, torch.nan))  # which the scaler then leaves out
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.optim.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update(None if fp16 else 1.0)
        for now, kept in zip(network.buffers(), statistics, strict=True):
            now.copy_(torch.where(finite, now, kept))
        per_video = (len(batch["index"]), cfg.temporal.moments, -1)
        video, audio = output.video.view(per_video).mean(1), output.audio.view(per_video).mean(1)  # b×D
        bank.update(everyone, *(distributed.gather(torch.where(finite, x, torch.nan)) for x in (video, audio)))  # NaN: kept

        # ---------------------------------------------------------------------------------------- log, check, save, stop
        bar.update()
        if trace:
            trace.step()
        done = step + 1
        line = None
        if done % cfg.log.every_steps == 0 or done == last_step:
            elapsed = time.perf_counter() - since
            videos = (done - logged) * cfg.optim.batch_size
            line = {"lr": lr, "clips_per_s": videos * cfg.temporal.moments / elapsed, "data_wait": waited / elapsed}
            line["bad_files"] = len(bad_files.reasons)
            waited, logged, since = 0.0, done, time.perf_counter()
        names = ["loss", *terms, *accuracies, "grad_norm"]
        later.put((done, names, line), torch.stack([*values, *accuracies.values(), norm]), everyone)
        epoch_ends = done % epoch_steps == 0
        leave = distributed.any_rank(stop.asked)
        save = epoch_ends or leave or done == last_step
        save = save or distributed.any_rank(time.perf_counter() - saved_at > 60 * cfg.log.checkpoint_minutes)
        for (at, names, line), numbers, index in later.due(everything=save):
            values = dict(zip(names, numbers.tolist(), strict=True))
            if not math.isfinite(values["loss"]) or not (fp16 or math.isfinite(values["grad_norm"])):
                run.not_finite(at, at / epoch_steps, values, sorted({train_table.paths[i] for i in index.tolist()}))
                continue
            run.not_finite_in_a_row = 0
            if line:
                run.log(at, at / epoch_steps, **{k: v for k, v in values.items() if math.isfinite(v)}, **line)
                bar.set_postfix_str(
                    f"epoch {at / epoch_steps:.1f}, loss {values['loss']:.3f}, {line['clips_per_s']:.0f} clips/s, "
                    f"data wait {line['data_wait']:.0%}"
                )
        if save:
            run.save(done)
            saved_at = time.perf_counter()
        if leave:
            bar.close()
            distributed.say(
                place, f"stopped by {stop.asked or 'another rank'} after step {done}, saved; the same command goes on from here"
            )
            distributed.end()
            sys.exit(stop.exit_code)
        if checked(done, epoch_steps, last_step, cfg):  # after the checkpoint: it may take minutes, and a signal does not wait
            with stop.at_once():
                run.log(done, done / epoch_steps, **check(network, bank, held_out, cfg, place))
                run.draw_curves()
            since = time.perf_counter()  # clips/s are those of training
    bar.close()
    if trace:
        trace.stop()
    bad_files.write(out / "skipped.csv")
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


def objective(output, batch, everyone, bank, cfg, place, step, epoch_steps):
    """Every term whose weight is not zero: {name: scalar}, and {task: accuracy} of the temporal tasks.

    batch is this rank's, everyone B the instances of the global one.
    Each rank returns its part, scaled so that the mean over ranks, which DDP takes, is the mean over the global batch.
    """
    terms, accuracies = {}, {}
    moments = len(output.video) // len(batch["index"])
    index = batch["index"].repeat_interleave(moments)  # b·M, as the clips stand
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
        near, far = (bank.read(key, x).repeat_interleave(moments, 0) for x in (near, far))  # b·M×n_pos×D, b·M×n×D
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
    moments = len(index) * place.world // len(everyone)

    def mine(x):  # B → b·M, as this rank's clips stand
        return x.chunk(place.world)[place.rank].repeat_interleave(moments)

    loss = losses.robust_xid(
        output.video,
        output.audio,
        bank.read("video", candidates.index),
        bank.read("audio", candidates.index),
        candidates.valid,
        mine(candidates.column),
        temperature=cfg.loss.temperature,
        soft=cfg.loss.soft if robust else 0.0,
        estimator=cfg.loss.estimator,
        tau_s=cfg.loss.tau_s,
        tau_t=cfg.loss.tau_t,
    )  # b·M
    weight = pair_weights(everyone, bank, cfg.loss, robust)  # B
    return losses.weighted_mean(loss, mine(weight), moments * weight.sum() / place.world)


def pair_weights(index, bank, loss, robust):
    """w_i of these instances' pairs (docs/method.md section 3), 1 during the warm-up: index B, the same on every rank → B."""
    agreement, w_min = bank.read("agreement", index), loss.w_min if robust else 1.0
    return losses.faulty_positive_weights(agreement, *bank.agreement_mean_std(), w_min, loss.delta, loss.kappa)


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


def checked(step, epoch_steps, last_step, cfg):
    """Is there a check after `step` steps?"""
    epoch, rest = divmod(step, epoch_steps)
    return bool(cfg.log.check_epochs and step and not rest and (epoch % cfg.log.check_epochs == 0 or step == last_step))


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


def tracer(cfg, place):
    """profile=true: a torch profiler of a few steps of rank 0, which writes <out>/trace.json and prints what took longest."""
    if not cfg.profile or place.rank > 0:
        return None

    def write(profiler):
        path = Path(cfg.out) / "trace.json"
        profiler.export_chrome_trace(str(path))
        by = "self_device_time_total" if place.device.type == "cuda" else "self_cpu_time_total"
        tqdm.write(profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
        tqdm.write(f"written: {path}, to be opened in chrome://tracing or ui.perfetto.dev")

    steps = torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1)
    profiler = torch.profiler.profile(schedule=steps, on_trace_ready=write)
    profiler.start()
    return profiler


class Later:
    """Tensors that are copied to the host while the device goes on, and read LAG steps later."""

    def __init__(self):
        self.waiting = collections.deque()

    def put(self, facts, *tensors):
        copies = [x.detach().to("cpu", non_blocking=True) for x in tensors]
        copied = torch.cuda.Event() if tensors[0].is_cuda else None
        if copied:
            copied.record()
        self.waiting.append((facts, copies, copied))

    def due(self, everything=False):
        """(facts, *tensors) of the steps that are old enough, or of all."""
        while len(self.waiting) > (0 if everything else LAG):
            facts, copies, copied = self.waiting.popleft()
            if copied:
                copied.synchronize()
            yield facts, *copies


if __name__ == "__main__":
    with evaluation.plain_errors():
        main(cfg)
