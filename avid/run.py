"""What a run keeps and how it goes on, and what surrounds a step: checkpoints, the run folder, the guard, the
watch.

In: what has a state_dict (network, bank, optimizer, …), a step's loss and its numbers by name. Out:
config.yaml, metrics.jsonl, last.pt, curves.png; after any interruption the same command goes on. A step that
is not finite moves nothing. Every rank calls; rank 0 writes.
"""

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import config, datasets, distributed, files, models, progress, toy
from .files import ConfigError

LAG = 2  # steps after which a step's numbers are read: the host never waits for the device
LOSS_SCALE = 2.0**16  # of fp16 at the beginning, as torch.amp.GradScaler's
GROWTH_STEPS = 2000  # finite steps after which the loss scale is doubled, as torch.amp.GradScaler's

# ------------------------------------------------------------------------------------------------ checkpoints
# Written whole or not at all, the one before kept, checked bit by bit, read without running code from the
# file.


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line that names the file."""


class Damaged(CheckpointError):
    """A file whose content is not what was written."""


def previous(path):
    """Where `save_checkpoint` keeps the checkpoint that stood at `path` before: last.pt, last.previous.pt."""
    return Path(path).with_suffix(".previous.pt")


@contextlib.contextmanager
def writing(path):
    """Within, what keeps `path` from being written becomes a CheckpointError of one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        fault = error
        while fault and not isinstance(fault, OSError):  # torch.save hides the disk's error behind its own
            fault = fault.__context__
        if not fault:
            raise
        remedy = (
            "make room on the disk"
            if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            else "make it writable"
        )
        raise CheckpointError(
            f"cannot write {path}: {fault.strerror or fault}; {remedy} and start the same command again, "
            "which goes on from the last checkpoint"
        ) from error


def save_checkpoint(path, state):
    """Write `state` to `path`; what stood there becomes `previous(path)`. At any moment one of the two is
    there and whole.

    Raises CheckpointError where it cannot be written; then both stay as they were.
    """
    path = Path(path)
    with writing(path), files.replacing(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous(path))


def load_checkpoint(path, device="cpu"):
    """The dict saved at `path`. Raises CheckpointError where the file is missing or is no checkpoint, Damaged
    where it was one."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    try:
        _check_sums(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load has no exception of its own, and its advice is to trust the file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        fault = (
            f"it asks for {asked[1]}, and no code is run from a file"
            if asked
            else "it is damaged, cut off or something else"
        )
        raise Damaged(f"cannot read the checkpoint {path}: {fault}") from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"cannot read the checkpoint {path}: it holds a {type(state).__name__}, not a dict"
        )
    return state


def _check_sums(path):
    """Compare every record with the CRC-32 that torch.save stores beside it: torch.load does not, and would
    read flipped bits."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's format before 1.6, without checksums: AVID-CMA's
            return
        with zipfile.ZipFile(file) as archive:
            if record := archive.testzip():
                raise zipfile.BadZipFile(f"{record} is damaged")


def newest(path, owner=True, fault_of=lambda state: ""):
    """What a run at `path` goes on from: (state, remark), or (None, "") where nothing was saved yet.

    That is `path`, or `previous(path)` where the last one is damaged or missing; the remark then says so.
    owner: this process is the one that writes the run, and renames a damaged file, so that the next
    `save_checkpoint` does not put it in place of the whole one. fault_of(state): what is wrong with the files
    that a checkpoint names, empty where nothing is. Raises CheckpointError where there is something, but
    nothing whole: a run never begins anew by itself.
    """

    def load(path):
        state = load_checkpoint(path)
        if fault := fault_of(state):
            raise Damaged(f"cannot read the checkpoint {path}: {fault}")
        return state

    path = Path(path)
    before = previous(path)
    if not path.exists() and not before.exists():
        return None, ""
    try:
        return load(path), ""
    except CheckpointError as error:
        if path.exists() and not isinstance(error, Damaged):
            raise
        fault = str(error)
    try:
        state = load(before)
    except CheckpointError as error:
        raise CheckpointError(
            f"{fault}; {error}; restore one of them, or choose another --out to begin anew"
        ) from None
    aside = path.with_suffix(".damaged.pt")
    if owner and path.exists():
        with writing(path):
            os.replace(path, aside)
        fault += f", it is now {aside}"
    return state, f"{fault}; going on from {before}"


def folders_of(state):
    """The folders beside a checkpoint with what was spread over the ranks: {name: {file: its CRC-32}}."""
    parts = [part for part in state.values() if isinstance(part, dict) and "folder" in part]
    return {part["folder"]: part["crc32"] for part in parts}


def fault_of_rows(beside, state):
    """What is wrong with these folders, which lie in the folder `beside`; empty where nothing is.

    Every rank calls, reads a share of the files, and hears of all faults.
    """
    checks = [
        (Path(beside) / name / file, crc32)
        for name, files_of in folders_of(state).items()
        for file, crc32 in sorted(files_of.items())
    ]
    faults = []
    for path, crc32 in checks[distributed.rank() :: distributed.world_size()]:
        try:
            if distributed.file_crc32(path) != crc32:
                faults.append(f"{path} is damaged")
        except OSError as error:
            faults.append(f"{path}: {error.strerror}")
    return "; ".join(fault for share in distributed.gather_objects(faults) for fault in share)


def load_part(part, saved, beside):
    """Load into what has a state_dict what a checkpoint in the folder `beside` keeps of it."""
    if "folder" in saved:
        part.load_rows(Path(beside) / saved["folder"], saved)
    else:
        part.load_state_dict(saved)


# ------------------------------------------------------------------------------------------------- the folder


class Checkpoint:
    """A checkpoint, and a log beside it, from which the same command goes on. Every rank calls; rank 0
    writes.

    path: of the checkpoint; metrics: of the log, a JSON object a line; name: what messages call the run.
    """

    def __init__(self, path, metrics, name, cfg, world):
        self.path, self.metrics, self.name = Path(path), Path(metrics), name
        self.cfg, self.world, self.out = cfg, world, self.path.parent
        self.folders = {}  # that the last checkpoint refers to

    def resume(self, facts, same, state):
        """Load the checkpoint, or the one before where it is damaged, into `state`; returns the number of
        steps done.

        facts: what tells this run from others, kept with it; same(saved): raises ConfigError where a
        checkpoint is of another run; state: {name: what has a state_dict}. ConfigError where another process
        is at work on it.
        """
        self.facts, self.state = facts, state
        self.lock()
        check = functools.partial(fault_of_rows, self.out)
        saved, remark = newest(self.path, self.world.rank == 0, check)
        self.resumed_at = 0 if saved is None else saved.get("step", 0)
        if saved is None:
            self.cut_log(0)
            return 0
        if remark:
            distributed.say(self.world, remark)
        if lacking := [name for name in (*facts, "step", *state) if name not in saved]:
            raise ConfigError(
                f"{self.path} is no checkpoint of this program, it lacks {', '.join(lacking)}; "
                "choose another --out"
            )
        same(saved)
        for name, part in state.items():
            load_part(part, saved[name], self.out)
        self.folders = folders_of(saved)
        self.cut_log(saved.get("metrics_bytes", 0))
        distributed.say(self.world, f"resuming {self.name} after step {saved['step']}")
        return saved["step"]

    def lock(self):
        """Keep other processes off this checkpoint until this one ends."""
        fault = ""
        if self.world.rank == 0:
            with writing(self.metrics):
                self.out.mkdir(parents=True, exist_ok=True)
                self.metrics.touch()
            try:
                self.held = files.lock(self.path, self.name)  # held as long as it is open
                if not self.held:
                    tqdm.write(
                        f"warning: {self.out} cannot be locked: see to it that no second run writes there"
                    )
            except ConfigError as error:
                fault = str(error)
        if fault := distributed.gather_objects(fault)[0]:  # every rank ends with the cause
            raise ConfigError(fault)

    def save(self, step):
        state = {  # by all ranks: each may hold a part
            name: self.save_rows(name, part, step) if hasattr(part, "save_rows") else part.state_dict()
            for name, part in self.state.items()
        }
        if self.world.rank == 0:
            with writing(self.metrics), open(self.metrics, "ab") as file:
                # a checkpoint never knows of lines that a crash of the machine could take
                os.fsync(file.fileno())
                state |= {"metrics_bytes": file.tell()}
            save_checkpoint(self.path, {**state, "step": step, **self.facts})
            keep = self.folders | folders_of(state)  # those of this checkpoint and of the one before
            for folder in self.out.glob(f"{self.path.stem}.*-[0-9]*"):
                if folder.is_dir() and folder.name not in keep:
                    shutil.rmtree(folder, ignore_errors=True)
        self.folders = folders_of(state)

    def save_rows(self, name, part, step):
        """What is spread over the ranks goes into a folder beside the checkpoint, each rank its rows.

        → what the checkpoint itself keeps of it.
        """
        folder = self.path.with_suffix(f".{name}-{step:09d}")
        new = folder.with_name(folder.name + ".part")
        if self.world.rank == 0:
            for old in (folder, new):  # left by an interrupted run
                shutil.rmtree(old, ignore_errors=True)
        distributed.wait()
        with writing(new):
            rest = part.save_rows(new)
            if self.world.rank == 0:
                os.replace(new, folder)
        return {"folder": folder.name, **rest}

    def cut_log(self, size):
        """Leave the first `size` bytes of the log: what was logged after the checkpoint comes again."""
        if self.world.rank == 0:
            with writing(self.metrics), open(self.metrics, "rb+") as file:
                kept = file.read(size)
                kept = kept[: kept.rfind(b"\n") + 1]  # whole lines
                file.truncate(len(kept))
            if len(kept) < size:
                tqdm.write(
                    f"warning: {self.metrics} has lost lines that the checkpoint knows of; the training "
                    "itself has lost nothing"
                )

    def log(self, step, epoch, **values):
        if self.world.rank == 0 and values:
            with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "epoch": round(epoch, 4), **values}) + "\n")
            if self.cfg.log.tensorboard:
                with writing(self.out):
                    for name, value in {"epoch": epoch, **values}.items():
                        if isinstance(value, (int, float)):
                            self.tensorboard.add_scalar(name, value, step)
                    self.tensorboard.flush()

    @functools.cached_property
    def tensorboard(self):
        """A writer of TensorBoard's files, on which the steps that come again after a resume replace the old
        ones."""
        from torch.utils.tensorboard import SummaryWriter  # here: an extra, which takes seconds to import

        return SummaryWriter(self.out, purge_step=self.resumed_at + 1)


class Folder(Checkpoint):
    """The run folder cfg.out: settings, log, checkpoint, curves."""

    def __init__(self, cfg, world):
        out = Path(cfg.out)
        super().__init__(out / "last.pt", out / "metrics.jsonl", out, cfg, world)

    def resume(self, table, **state):
        """Load last.pt, or the one before where it is damaged, into `state`; returns the number of steps
        done.

        table: the training videos; state: {name: what has a state_dict}. ConfigError where the folder belongs
        to another program or process, to a run of other settings, or to one of other videos.
        """
        videos = self.videos = {"count": len(table), "hash": datasets.table_hash(table)}

        def same(saved):
            for text in config.same_run(saved["config"], self.cfg):
                distributed.say(self.world, text)
            if saved["videos"] != videos:
                before, now = saved["videos"]["count"], len(table)
                counts = f"{before} videos, there are now {now}"
                differ = counts if before != now else "as many videos under other names"
                raise ConfigError(
                    f"{self.out} holds a run on {differ}; bring back data.root as it was, or choose "
                    "another --out"
                )

        step = super().resume({"config": dataclasses.asdict(self.cfg), "videos": videos}, same, state)
        if not step:
            self.save_settings()  # they mark the folder as this run's
        return step

    def begin_from(self, path, network, bank, ancestor):
        """A new run begins with the weights of another one's checkpoint, and with its bank where that is of
        the same videos.

        path: empty, or a checkpoint of train.py or one released with AVID-CMA, of which only the weights can
        be had; ancestor: avid_cma.Discrimination. Raises CheckpointError, ModelError; ConfigError where
        agreement would be found in a bank at random.
        """
        saved = load_checkpoint(path) if path else {}
        if path:
            models.load(network, saved, path)
        same = saved.get("videos") == self.videos and saved["config"]["data"]["need"] == self.cfg.data.need
        if same:
            beside = Path(path).parent
            if fault := fault_of_rows(beside, saved):
                raise CheckpointError(f"cannot begin with {path}: {fault}")
            load_part(bank, saved["bank"], beside)
            ancestor.take_partition(saved.get("ancestor", {}).get("partition"))
        elif self.cfg.weights.cma and not self.cfg.loss.warmup_epochs:
            raise ConfigError(
                "weights.cma needs a bank that has learned: init=CHECKPOINT of a run on the same videos, "
                "or loss.warmup_epochs"
            )
        if path:
            other = "its bank is of other videos or another data.need, or none: this one's begins at random"
            text = f"beginning with the weights of {path}; {'with its bank' if same else other}"
            distributed.say(self.world, text)

    def save(self, step):
        super().save(step)
        self.save_settings()

    def save_settings(self):
        if self.world.rank == 0:
            with writing(self.out / "config.yaml"):
                config.save(self.cfg, self.out / "config.yaml")

    def draw_curves(self):
        """Curves can be drawn again at any time: where they cannot be written, training goes on."""
        if self.world.rank == 0:
            from .tools import figures  # here: who only loads a checkpoint needs no matplotlib

            path = self.out / "curves.png"
            try:
                figures.curves(self.metrics, path)
            except OSError as error:
                tqdm.write(f"warning: cannot write {path}: {error.strerror}; training goes on")


def describe(cfg, world):
    """One line: on what, by how many processes and in which precision a run computes. Warns of a GPU that is
    not used."""
    device, precision = f"CPU with {torch.get_num_threads()} threads", "float32"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
        precision = {"none": "float32"}.get(cfg.optim.amp, f"{cfg.optim.amp} autocast")
    elif Path("/proc/driver/nvidia/version").exists():
        tqdm.write(
            f"WARNING: this machine has a GPU driver, but torch {torch.__version__} cannot use it "
            "(torch.cuda.is_available() is False): training goes on ON THE CPU, many times slower. Mostly "
            f"the driver is older than torch's CUDA {torch.version.cuda} needs (docs/performance.md), or "
            "CUDA_VISIBLE_DEVICES hides the GPU"
        )
    return f"{device}, {world.size} process{'es' * (world.size > 1)}, {precision}"


def videos(cfg, world):
    """The training videos and some held-out ones; the toy is written first where it is not there yet."""
    if world.rank > 0:
        distributed.wait()
    source = toy.source(cfg)
    if world.rank == 0:
        distributed.wait()  # the others go on and find the toy written
    if cfg.log.check_epochs:
        train_table, held_out = datasets.for_training(source)
    else:
        train_table, held_out = datasets.load(source, source.split or "train"), None
    distributed.say(world, train_table.report())
    if held_out is None:
        text = "nothing is held out: checks tell of the bank alone; a folder may have train/ and test/"
        if cfg.log.check_epochs:
            distributed.say(world, text)
        return train_table, None
    distributed.say(world, f"{held_out.report()}, for the checks (log.check_epochs=0: none)")
    few = np.linspace(0, len(held_out) - 1, min(len(held_out), cfg.log.check_videos)).astype(int)
    return train_table, datasets.take(held_out, few)


def next_command(table, checkpoint):
    """What to do with a checkpoint that was trained on a table: evaluate or, without classes, search."""
    if table.classes:
        return f"python eval_linear.py --ckpt {checkpoint}"
    return f"python -m avid search --ckpt {shlex.quote(str(checkpoint))} {shlex.quote(str(table.root))} QUERY"


# -------------------------------------------------------------------------------------------------- the guard


def autocast(amp, device):
    """The precision of a forward pass: optim.amp on CUDA, float32 on a CPU."""
    half = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=device.type == "cuda" and amp != "none")


class Guard:
    """One optimisation step, of which nothing is left where its loss or gradient is not finite. The host
    waits for nothing.

    network: its parameters and buffers (batch norm's statistics) are what a step moves; optimizer: fused
    Adam, which leaves a step out on the device where `found_inf` says so; amp, clip_grad: settings of
    config.Optim. What fp16 needs besides autocast is a scale of the loss, doubled every GROWTH_STEPS steps
    and halved, down to 1, after a gradient that is not finite.
    """

    def __init__(self, network, optimizer, device, amp, clip_grad=0.0):
        self.network, self.optimizer, self.clip_grad = network, optimizer, clip_grad or math.inf
        self.autocast, self.fp16 = autocast(amp, device), amp == "fp16" and device.type == "cuda"
        self.scale = torch.tensor(LOSS_SCALE if self.fp16 else 1.0, device=device)
        self.finite_steps = torch.tensor(0.0, device=device)  # since the scale last changed
        kinds = {x.dtype for x in network.buffers()}
        self.buffers = [[x for x in network.buffers() if x.dtype == kind] for kind in kinds]
        self.before = []  # the buffers before the step, all of one kind in one tensor
        self.loss = self.norm = self.terms = None  # of the last step, over all ranks: 0-dim tensors

    @contextlib.contextmanager
    def forward(self):
        """Within, the network may be called: its buffers are remembered."""
        self.before = [torch.cat([x.flatten() for x in buffers]) for buffers in self.buffers]
        with self.autocast:
            yield

    def step(self, loss, terms=None):
        """Backward, clip, and move the weights. → whether the step is finite (0-dim bool).

        loss, terms {name: scalar}: this rank's parts, of which those of all ranks are the mean.
        """
        self.optimizer.zero_grad(set_to_none=True)
        (loss * self.scale).backward()
        if self.fp16:
            gradients = [x.grad for x in self.network.parameters() if x.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.scale)
        self.norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_grad)
        names, parts = ["loss", *(terms or {})], torch.stack([loss, *(terms or {}).values()])
        over_ranks = distributed.total(parts) / distributed.world_size()
        self.terms = dict(zip(names, over_ranks, strict=True))
        self.loss = self.terms.pop("loss")
        finite = self.loss.isfinite() & self.norm.isfinite()
        self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).to(torch.float32)
        self.optimizer.step()
        for buffers, before in zip(self.buffers, self.before, strict=True):
            kept = torch.where(finite, torch.cat([x.flatten() for x in buffers]), before)
            parts = kept.split([x.numel() for x in buffers])
            torch._foreach_copy_(buffers, [part.view_as(x) for part, x in zip(parts, buffers, strict=True)])
        if self.fp16:
            self.rescale(finite)
        return finite

    def rescale(self, finite):
        """The loss scale of the next step."""
        self.finite_steps = torch.where(finite, self.finite_steps + 1, 0.0)
        grow = self.finite_steps == GROWTH_STEPS
        grown = torch.where(grow, 2 * self.scale, self.scale)
        self.scale = torch.where(finite, grown, (self.scale / 2).clamp(min=1.0))
        self.finite_steps = torch.where(grow, 0.0, self.finite_steps)

    def state_dict(self):
        """The loss scale of an fp16 run; nothing otherwise."""
        return {"scale": self.scale.item(), "finite_steps": self.finite_steps.item()} if self.fp16 else {}

    def load_state_dict(self, state):
        """Go on with the loss scale of an fp16 run. Earlier versions kept a scale of 1 of other runs, which
        says nothing."""
        if self.fp16 and ("finite_steps" in state or state.get("scale", 1.0) != 1.0):
            self.scale.fill_(state["scale"])
            self.finite_steps.fill_(state.get("finite_steps", state.get("_growth_tracker", 0)))


# -------------------------------------------------------------------------------------------------- the watch


class LaggedNumbers:
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


class Watch:
    """What goes on around the steps: progress, the log, checkpoints, checks on held-out videos, signals.

    kept: Checkpoint, resumed; guard: Guard; bad_files: data.BadFiles; steps: range; epoch_steps: steps an
    epoch; clips: a step; remedy: against steps that are not finite; check: () → numbers by name, every
    cfg.log.check_epochs epochs, of which each one's end is then saved.
    """

    def __init__(self, kept, guard, bad_files, steps, epoch_steps, clips, remedy, check=None, title=None):
        self.cfg, self.world, self.kept = kept.cfg, kept.world, kept
        self.guard, self.bad_files, self.check, self.remedy = guard, bad_files, check, remedy
        self.last_step, self.epoch_steps, self.clips = steps.stop, epoch_steps, clips
        self.stop, self.lagged, self.bad_in_a_row = distributed.StopSignal(), LaggedNumbers(), 0
        self.profiler = profiler(kept)
        silent = self.world.rank > 0
        self.bar = progress.bar(None, title, steps.stop, steps.start, disable=silent)
        self.waited_s, self.logged = 0.0, steps.start
        self.logged_at = self.saved_at = time.perf_counter()
        if self.check_is_due(steps.start):  # a run that was stopped during a check repeats the check
            self.run_check(steps.start)

    def batches(self, loader):
        """The loader's batches; the time that they are waited for is measured, and files that failed are
        counted."""
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited_s += time.perf_counter() - before
            self.bad_files.count(batch.pop("failures"), len(batch["index"]))
            yield batch

    def after(self, step, accuracies, index):
        """After each step: its numbers are kept for the log, and what is due is done.

        accuracies: {name: 0-dim tensor}, over all ranks; index B: the instances of all ranks.
        """
        done, log = step + 1, self.cfg.log
        self.bar.update()
        if self.profiler:
            self.profiler.step()
        numbers = {"loss": self.guard.loss, **self.guard.terms, **accuracies, "grad_norm": self.guard.norm}
        due = done % log.every_steps == 0 or done == self.last_step
        line = self.speeds(done) if due else None
        self.lagged.put((done, [*numbers], line), torch.stack([*numbers.values(), self.guard.scale]), index)

        old = time.perf_counter() - self.saved_at > 60 * log.checkpoint_minutes
        leave, old = distributed.any_rank(self.stop.asked, old)
        epoch_ends = self.check and done % self.epoch_steps == 0
        save = epoch_ends or leave or old or done == self.last_step
        self.write_lines(everything=save)
        if save:
            self.kept.save(done)
            self.saved_at = time.perf_counter()
        if leave:
            self.bar.close()
            by = self.stop.asked or "another rank"
            text = f"stopped by {by} after step {done}, saved; the same command goes on from here"
            distributed.say(self.world, text)
            distributed.end()
            sys.exit(self.stop.exit_code)
        if self.check_is_due(done):  # after the checkpoint: it may take minutes, and a signal does not wait
            self.run_check(done)
            self.logged_at = time.perf_counter()  # clips/s are those of training

    def speeds(self, done):
        """What a line of the log says besides the step's own numbers; counted anew from here on."""
        elapsed_s = time.perf_counter() - self.logged_at
        line = {
            "lr": self.guard.optimizer.param_groups[0]["lr"],
            "clips_per_s": (done - self.logged) * self.clips / elapsed_s,
            "data_wait": self.waited_s / elapsed_s,
            "bad_files": len(self.bad_files.reasons),
        }
        self.waited_s, self.logged, self.logged_at = 0.0, done, time.perf_counter()
        return line

    def write_lines(self, everything):
        """Log the steps whose numbers have arrived. FloatingPointError where too many in a row were not
        finite."""
        for (done, names, line), numbers, index in self.lagged.due(everything):
            *numbers, scale = numbers.tolist()
            values = dict(zip(names, numbers, strict=True))
            # a task of which no label is known has no accuracy
            unknown = [name for name in values if name.endswith("%") and math.isnan(values[name])]
            values = {name: value for name, value in values.items() if name not in unknown}
            bad = [f"{name} {value}" for name, value in values.items() if not math.isfinite(value)]
            if math.isfinite(values["loss"]) and bad and scale > 1:
                continue  # an overflow of fp16, after which the scale was halved
            if bad:
                names = sorted({self.bad_files.table.name_of(i) for i in index.tolist()})
                self.not_finite(done, ", ".join(bad), names)
                continue
            self.bad_in_a_row = 0
            if line:
                epoch = done / self.epoch_steps
                self.kept.log(done, epoch, **values, **line)
                self.bar.set_postfix_str(
                    f"epoch {epoch:.1f}, loss {values['loss']:.3f}, {line['clips_per_s']:.0f} clips/s, "
                    f"data wait {line['data_wait']:.0%}"
                )

    def not_finite(self, done, what, files):
        """Log a step that was left out; FloatingPointError where there were too many in a row, the checkpoint
        is from before."""
        self.kept.log(done, done / self.epoch_steps, not_finite=what, files=files)
        text = (
            f"step {done} was left out, it is not finite: {what}; its files are named in {self.kept.metrics}"
        )
        distributed.say(self.world, text)
        self.bad_in_a_row += 1
        if self.bad_in_a_row == self.cfg.optim.max_bad_steps:
            raise FloatingPointError(
                f"{self.bad_in_a_row} steps in a row, up to step {done}, were not finite ({what}); "
                f"the weights did not move since; {self.remedy}"
            )

    def check_is_due(self, step):
        epoch, rest = divmod(step, self.epoch_steps)
        every = self.cfg.log.check_epochs if self.check else 0
        return bool(every and step and not rest and (epoch % every == 0 or step == self.last_step))

    def run_check(self, step):
        with self.stop.at_once():
            self.kept.log(step, step / self.epoch_steps, **self.check())
            if step < self.last_step:  # at the end train.py draws them
                self.kept.draw_curves()

    def finish(self, skipped):
        """After the last step. skipped: where to write the files that could not be used, if there are any."""
        self.stop.release()
        self.bar.close()
        if self.profiler:
            self.profiler.stop()
        self.bad_files.write(skipped)


def profiler(kept):
    """profile=true: a torch profiler of a few steps of rank 0, which writes <out>/trace.json and prints what
    took longest."""
    if not kept.cfg.profile or kept.world.rank > 0:
        return None

    def write(profile):
        path = kept.out / "trace.json"
        profile.export_chrome_trace(str(path))
        by = "self_device_time_total" if kept.world.device.type == "cuda" else "self_cpu_time_total"
        tqdm.write(profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
        tqdm.write(f"written: {path}, to be opened in chrome://tracing or ui.perfetto.dev")

    steps = torch.profiler.schedule(wait=5, warmup=2, active=5, repeat=1)
    profile = torch.profiler.profile(schedule=steps, on_trace_ready=write)
    profile.start()
    return profile
