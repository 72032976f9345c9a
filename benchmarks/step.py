"""A whole training step with data in memory: speed, memory, share of the GPU's peak arithmetic, and the
effect of each optimisation.

    python benchmarks/step.py [--cfg xid] [--sizes 8x112 8x224 16x112] [--batch 32] [--json FILE] [key=value]
    python benchmarks/step.py --loop [--cfg toy] [--json FILE] [key=value …]

A step: uint8 clips in (pinned) memory go to the device, are augmented and normalised; the network, the
objective against the bank, backward, Adam, the update of the bank. The clips are random; shapes and dtypes
are the loader's. Steps are timed in turns.

    plain             channels first, float32 (matmul in full precision, cuDNN's convolutions in TF32, torch's
                      defaults), eager, torch's default Adam
    channels_last     … channels_last_3d: all that train.py does on a CPU, but for the fused Adam
    + bf16 autocast   (CUDA)
    + fused Adam      what train.py does
    + compile         torch.compile (CUDA, or with --compile)
    checkpointed      what train.py does, with optim.checkpoint_activations

FLOPs are those of the plain step's matrix products and convolutions, forward and backward, a multiply-add
counted as two. Model FLOP utilisation: FLOPs / time / peak, the GPU's dense bf16 rate for all rows, from
NVIDIA's data sheets or --peak-tflops. Memory: the peak of state and activations (CUDA: allocated; CPU:
resident, mostly memory that the allocator kept and oneDNN's scratch), and the activations that forward keeps
for backward.

--loop: train.py's own main() on batches in memory, against the bare loop of forward, sum as the loss,
backward and Adam (fused) on clips that are float and augmented already, and against the same loop with the
augmentation of uint8 clips. They take turns, step by step: a step of train.py lasts from handing it a batch
until it asks for the next one. This includes augmentation, objective, bank, logging and the checks on a
finite loss.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli, config


def command_line():
    parser = cli.parser(__doc__)
    parser.add_argument("--loop", action="store_true", help="train.py's loop against the bare one")
    parser.add_argument(
        "--sizes",
        nargs="+",
        metavar="TxS",
        help="frames x side; default: 8x112 8x224 16x112 on CUDA, else of --cfg",
    )
    parser.add_argument("--batch", type=int, help="videos a step; default: 32 on CUDA, else of --cfg")
    parser.add_argument("--repeats", type=int, default=20, help="steps that count, default: 20")
    parser.add_argument("--instances", type=int, default=10_000, help="videos in the bank, default: 10000")
    parser.add_argument("--compile", action="store_true", help="torch.compile without CUDA, too")
    parser.add_argument("--peak-tflops", type=float, metavar="F", help="dense bf16 rate of the device")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import dataclasses
import re
import tempfile
import time

import numpy as np
import report
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from avid import data, datasets, distributed, memory_bank, models, run, spectrogram, temporal_tasks

# dense bf16, from the data sheets at nvidia.com/en-us/data-center/<h100, h200, a100, l40s, l4, a10>
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,  # SXM
    "H200 NVL": 835,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}
VIDEO_S = 10.0  # length of the videos that the random clips pretend to come from


def batches(cfg, n, count, instances, pin=None):
    """`count` batches of n random videos as the loader gives them, pinned for a GPU."""
    rng = np.random.default_rng(cfg.seed)
    clips = data.Clips(range(instances), cfg, training=True)
    columns, bins = spectrogram.columns(cfg.audio), config.bands(cfg.audio)
    picture = (cfg.temporal.moments, 3, cfg.video.frames, cfg.video.size, cfg.video.size)
    pin = torch.cuda.is_available() if pin is None else pin
    for step in range(count):
        items = []
        for place, index in enumerate(rng.permutation(instances)[:n]):
            _, labels = temporal_tasks.plan(0.0, VIDEO_S, clips.length_s, cfg.temporal, rng)
            items.append({"index": int(index), "failures": [], **clips.draws(cfg.temporal.moments, rng)})
            items[-1] |= {name: torch.tensor(label) for name, label in labels.items()}
            items[-1] |= clips.neighbours((data.OF_A_STEP, step, place))
            items[-1]["video"] = torch.from_numpy(rng.integers(0, 256, picture, np.uint8))
            sound = rng.normal(data.DB_MEAN, data.DB_STD, (cfg.temporal.moments, 1, columns, bins))
            items[-1]["audio"] = torch.from_numpy(sound.astype(np.float32))
        batch = data.collate(items)
        yield {name: x.pin_memory() if pin and torch.is_tensor(x) else x for name, x in batch.items()}


class ChannelsFirst(models.AudioVisual):
    """The network without channels_last."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.to(memory_format=torch.contiguous_format)

    def encode_video(self, video):
        features = self.video_model(video).float()
        return self.video_proj(features), features

    def encode_audio(self, audio):
        features = self.audio_model(audio).float()
        return self.audio_proj(features), features


class Step:
    """A training step, on the batches in turn.

    amp: as optim.amp, on CUDA; guarded: with run.Guard, so that a step that is not finite changes
    nothing.
    """

    def __init__(
        self, cfg, world, some, instances, channels_last=True, amp="bf16", fused=True, compiled=False,
        checkpointed=False, guarded=False,
    ):  # fmt: skip
        torch.manual_seed(cfg.seed)
        network = models.AudioVisual if channels_last else ChannelsFirst
        self.network = network(cfg.model, temporal_tasks.classes(cfg)).to(world.device).train()
        if checkpointed:
            models.checkpoint_activations(self.network)
        self.model = torch.compile(self.network) if compiled else self.network
        bank = memory_bank.MemoryBank(instances, cfg.model.embedding, cfg.bank.momentum, cfg.seed)
        self.bank = bank.to(world.device)
        self.objective = train.Objective(cfg, self.bank, world, epoch_steps=1)
        adam = {"lr": 1e-4, "weight_decay": 1e-5, "fused": fused or None}
        self.optimizer = torch.optim.Adam(self.network.parameters(), **adam)
        self.guard = run.Guard(self.network, self.optimizer, world.device, amp) if guarded else None
        self.autocast = run.autocast(amp, world.device)
        self.cfg, self.world, self.some, self.compiled, self.done = cfg, world, some, compiled, 0

    def __call__(self, lap=lambda name: None):
        """lap(name) is called when a part is done."""
        cfg = self.cfg
        batch = data.to_device(self.some[self.done % len(self.some)], self.world.device, cfg.audio)
        lap("augmentation")
        with self.guard.forward() if self.guard else self.autocast:
            output = self.model(batch["video"], batch["audio"])
        lap("forward")
        terms, _ = self.objective(output, batch, batch["index"], self.done)
        loss = sum(getattr(cfg.weights, name) * term for name, term in terms.items())
        lap("objective")
        finite = None
        if self.guard:
            finite = self.guard.step(loss, terms)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            lap("backward")
            self.optimizer.step()
        lap("optimiser")
        self.bank.update(batch["index"], output.video, output.audio, where=finite)
        lap("bank update")
        self.done += 1

    def kept_gb(self):
        """What a step's forward keeps for backward, the parameters aside: 10⁹ bytes."""
        own, kept = {x.untyped_storage().data_ptr() for x in self.network.parameters()}, {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            self()
        return sum(size for pointer, size in kept.items() if pointer not in own) / 1e9


# ------------------------------------------------------------------------------------------------- arithmetic


def peak_tflops(given):
    """The device's dense bf16 rate, or None where it is not known."""
    if given or not torch.cuda.is_available():
        return given
    name = torch.cuda.get_device_name()
    return next((rate for gpu, rate in PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b", name)), None)


def variants(cuda, compiled):
    """{name: arguments of Step}."""
    names = {
        "plain": {"channels_last": False, "amp": "none", "fused": False},
        "channels_last": {"amp": "none", "fused": False},
        "+ bf16 autocast": {"fused": False},
        "+ fused Adam": {},
        "+ compile": {"compiled": True},
        "checkpointed": {"checkpointed": True},
    }
    left_out = ([] if cuda else ["+ bf16 autocast"]) + ([] if cuda or compiled else ["+ compile"])
    return {name: given for name, given in names.items() if name not in left_out}


def measure(cfg, world, arguments):
    """The rows of one size."""
    moments, some = cfg.temporal.moments, list(batches(cfg, arguments.batch, 2, arguments.instances))
    size = f"{cfg.video.frames}×{cfg.video.size}²"
    steps, memory = {}, {}
    for name, given in variants(world.device.type == "cuda", arguments.compile).items():
        before = report.memory_gb()
        try:
            step = Step(cfg, world, some, arguments.instances, **given)
            for _ in range(2):
                step()
            memory[name] = {
                "peak GB": report.peak_gb() - before,
                "kept GB": "" if step.compiled else step.kept_gb(),
            }
            steps[name] = step
        except torch.OutOfMemoryError:
            step = None
            torch.cuda.empty_cache()
    if not steps:
        return [{"size": size, "step": name, "ms": "out of memory"} for name in variants(True, True)]
    with FlopCounterMode(display=False) as counter:
        next(step for name, step in steps.items() if name != "+ compile")()
    tflop = counter.get_total_flops() / 1e12  # a step
    peak = peak_tflops(arguments.peak_tflops)
    ms = report.in_turns(steps, arguments.repeats)
    rows = []
    for name in variants(world.device.type == "cuda", arguments.compile):
        row = {"size": size, "batch": arguments.batch, "step": name}
        if name not in ms:
            rows.append(row | {"ms": "out of memory"})
            continue
        median = np.median(ms[name]).item()
        row |= {"ms": median, "n": arguments.repeats, "clips/s": 1e3 * arguments.batch * moments / median}
        row |= {"× plain": np.median(ms["plain"] / ms[name]).item()} if "plain" in ms else {}
        row |= memory[name] | {"TFLOP": tflop, "TFLOP/s": 1e3 * tflop / median}
        rows.append(row | ({"MFU %": 1e5 * tflop / median / peak} if peak else {}))
    return rows


def parts(cfg, world, arguments):
    """Where the time of train.py's step goes: rows."""
    step = Step(cfg, world, list(batches(cfg, arguments.batch, 2, arguments.instances)), arguments.instances)
    spent = {}
    for turn in range(2 + arguments.repeats):
        report.synchronise()
        before = time.perf_counter()

        def lap(name, turn=turn):
            nonlocal before
            report.synchronise()
            now = time.perf_counter()
            if turn >= 2:
                spent.setdefault(name, []).append(1e3 * (now - before))
            before = now

        step(lap)
    medians = {name: np.median(ms).item() for name, ms in spent.items()}
    whole = sum(medians.values())
    return [
        {"part": name, "ms": ms, "n": arguments.repeats, "%": 100 * ms / whole}
        for name, ms in medians.items()
    ]


# ---------------------------------------------------------------------------------------- train.py's own loop


def loop(cfg, world, arguments):
    """train.main() against the bare loop, step by step in turns: milliseconds of both (repeats,)."""
    warm_up = 3
    count = warm_up + arguments.repeats + 1  # when train.py has done the last step it does not come back
    instances = count * arguments.batch  # one epoch
    some = list(batches(cfg, arguments.batch, 2, instances))
    torch.manual_seed(cfg.seed)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg)).to(world.device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)
    ready = [data.to_device(batch, world.device, cfg.audio) for batch in some]
    ms = {"bare loop": [], "bare loop, augmented": [], "train.py": []}

    def bare(batch):
        output = network(batch["video"], batch["audio"])
        loss = sum(x.sum() for x in (output.video, output.audio, *output.temporal.values()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def handed_out(*_, **__):
        for turn in range(count):
            for name in ms:
                report.synchronise()
                before = time.perf_counter()
                if name == "bare loop":
                    bare(ready[turn % 2])
                elif name == "bare loop, augmented":
                    bare(data.to_device(some[turn % 2], world.device, cfg.audio))
                else:
                    yield dict(some[turn % 2])
                report.synchronise()
                if turn >= warm_up:
                    ms[name].append(1e3 * (time.perf_counter() - before))

    none, zeros = np.full(instances, -1), np.zeros(instances)
    paths = [f"{i}.mp4" for i in range(instances)]
    table = datasets.Table(
        "random clips", Path("memory"), paths, none, [], zeros, zeros + VIDEO_S, none + 1, {}, []
    )
    with tempfile.TemporaryDirectory() as out:
        optim = dataclasses.replace(cfg.optim, batch_size=arguments.batch, epochs=1, warmup_epochs=0.0)
        log = dataclasses.replace(cfg.log, check_epochs=0)
        cfg = dataclasses.replace(cfg, optim=optim, log=log, out=out)
        # this process ends with the measurement
        train.videos, train.data.loader = (lambda *_: (table, None)), handed_out
        train.main(cfg)
    return {name: np.array(values[: arguments.repeats]) for name, values in ms.items()}


def main(arguments):
    world = distributed.start()
    cuda = world.device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    try:
        cfg = config.load(
            arguments.cfg or ("xid" if cuda and not arguments.loop else "toy"), arguments.overrides
        )
    except config.ConfigError as error:
        config.stop(error)
    arguments.batch = arguments.batch or (32 if cuda else cfg.optim.batch_size)
    if arguments.loop:
        ms = loop(cfg, world, arguments)
        rows = []
        for name, values in ms.items():
            median, videos = np.median(values).item(), arguments.batch * cfg.temporal.moments
            row = {"loop": name, "ms a step": median, "n": len(values), "clips/s": 1e3 * videos / median}
            rows.append(row | {"train.py reaches, %": 100 * np.median(values / ms["train.py"]).item()})
        report.show(
            "train.py's loop and the bare one, data in memory", rows, arguments.json, batch=arguments.batch
        )
        return
    sizes = arguments.sizes or (
        ["8x112", "8x224", "16x112"] if cuda else [f"{cfg.video.frames}x{cfg.video.size}"]
    )
    rows = []
    for size in sizes:
        if not re.fullmatch(r"\d+x\d+", size):
            config.stop(f"--sizes {size}: expected frames x side, such as 8x112")
        frames, side = map(int, size.split("x"))
        video = dataclasses.replace(cfg.video, frames=frames, size=side)
        rows += measure(dataclasses.replace(cfg, video=video), world, arguments)
    columns = {name: "" for row in rows for name in row}
    shares = parts(cfg, world, arguments)
    report.show(
        "A training step, data in memory", [columns | row for row in rows], arguments.json, parts=shares
    )
    print(f"\nparts of a step of {cfg.video.frames}×{cfg.video.size}²")
    report.print_table([{k: report.written(v) for k, v in row.items()} for row in shares], list(shares[0]))


if __name__ == "__main__":
    main(arguments)
