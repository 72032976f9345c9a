"""A training step on a GPU: clips/s, MFU and memory, in half an hour, most important measurements first.

    python benchmarks/gpu.py [--cfg robust] [--batch 32] [--minutes 30] [--json FILE] [key=value …]
    python benchmarks/gpu.py --dry-run        small steps of each kind on any device: does the script work?

The step is train.py's (benchmarks/step.py), with the guard, data in pinned memory, the bank on the GPU. In
this order, each line printed and written as soon as it is known, until the time is spent:

    1  waits       the host's waits for the device in a step, as CUDA sees them, and the kernels launched
    2  sizes       8×112², 8×224², 16×112², each in bf16, bf16 compiled, fp16, float32 (torch's default: its
                   convolutions in TF32)
    3  batches     8×112² in bf16 with 64, 128, 256 clips: which batch saturates the GPU
    4  checkpoint  8×224² in bf16 with optim.checkpoint_activations, and the batch in 4 parts: memory for time
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli, config

SIZES = ["8x112", "8x224", "16x112"]


def command_line():
    parser = cli.parser(__doc__)
    parser.add_argument("--batch", type=int, default=32, help="videos a step, default: 32")
    parser.add_argument("--minutes", type=float, default=30.0, help="start no measurement after this time")
    parser.add_argument("--repeats", type=int, default=30, help="steps that count, default: 30")
    parser.add_argument(
        "--instances", type=int, default=232_067, help="videos in the bank, default: Kinetics-400's"
    )
    parser.add_argument("--peak-tflops", type=float, metavar="F", help="dense bf16 rate of the device")
    parser.add_argument(
        "--json", metavar="FILE", default="gpu.json", help="where the figures go, default: gpu.json"
    )
    parser.add_argument("--dry-run", action="store_true", help="small steps on any device")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import dataclasses
import functools
import json
import time
import warnings

import numpy as np
import report
import step
import torch
from torch.utils.flop_counter import FlopCounterMode

from avid import distributed, models

KINDS = {  # name: arguments of step.Step
    "bf16": {"amp": "bf16"},
    "bf16, compiled": {"amp": "bf16", "compiled": True},
    "fp16": {"amp": "fp16"},
    "float32": {"amp": "none"},
}


class Bench:
    """Measurements one after the other, each written at once."""

    def __init__(self, cfg, world, arguments):
        self.cfg, self.world, self.arguments = cfg, world, arguments
        self.begun, self.rows, self.left_out, self.tflop = time.monotonic(), [], [], {}
        self.peak = step.peak_tflops(arguments.peak_tflops)

    def of_size(self, size):
        frames, side = map(int, size.split("x"))
        return dataclasses.replace(
            self.cfg, video=dataclasses.replace(self.cfg.video, frames=frames, size=side)
        )

    def add(self, name, measure, *given, **more):
        """Make a measurement, unless the time is spent. Running out of memory, or an error, is written into
        its row; the next measurement goes on."""
        if time.monotonic() - self.begun > 60 * self.arguments.minutes:
            self.left_out.append(name)
            return
        row = {"what": name}
        try:
            row |= measure(*given, **more)
        except torch.OutOfMemoryError:
            row |= {"ms": "out of memory"}
        except Exception as error:  # the next one may work, and GPU time is limited
            row |= {"ms": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.rows.append(row)
        print(", ".join(f"{key} {report.written(value)}" for key, value in row.items()), flush=True)
        done = {"machine": report.machine(), "rows": self.rows, "left_out": self.left_out}
        Path(self.arguments.json).write_text(json.dumps(done, indent=2, ensure_ascii=False) + "\n")

    def step(self, size, batch=None, parts=1, **kind):
        """A step.Step that has been made twice (compiled: once for its graph), and the seconds of the
        first."""
        cfg, batch = self.of_size(size), batch or self.arguments.batch
        some = list(step.batches(cfg, batch, 2, self.arguments.instances))
        made = step.Step(cfg, self.world, some, self.arguments.instances, guarded=True, **kind)
        if parts > 1:
            models.in_parts(made.network, parts)
        report.synchronise()
        before = time.perf_counter()
        made()
        report.synchronise()
        first_s = time.perf_counter() - before
        made()
        return made, first_s

    def speed(self, size, batch=None, **kind):
        """Milliseconds, clips/s, memory, and the share of the device's dense bf16 arithmetic (of float32,
        too)."""
        batch, before_gb = batch or self.arguments.batch, report.memory_gb()
        made, first_s = self.step(size, batch, **kind)
        ms = []
        for _ in range(self.arguments.repeats):
            report.synchronise()
            before = time.perf_counter()
            made()
            report.synchronise()
            ms.append(1e3 * (time.perf_counter() - before))
        before = time.perf_counter()
        for _ in range(self.arguments.repeats):  # as in train.py, where the host runs ahead
            made()
        report.synchronise()
        flowing_ms = 1e3 * (time.perf_counter() - before) / self.arguments.repeats
        peak_gb = report.peak_gb() - before_gb
        if (size, batch) not in self.tflop and not kind.get("compiled"):
            with FlopCounterMode(display=False) as counter:
                made()
            self.tflop[size, batch] = counter.get_total_flops() / 1e12
        clips = batch * self.cfg.temporal.moments
        row = {
            "batch": batch,
            "ms": np.median(ms).item(),
            "ms flowing": flowing_ms,
            "clips/s": 1e3 * clips / flowing_ms,
        }
        row |= {"peak GB": peak_gb, "first step s": first_s}
        if tflop := self.tflop.get((size, batch)):
            row |= {"TFLOP": tflop, "TFLOP/s": 1e3 * tflop / flowing_ms}
            row |= {"MFU %": 1e5 * tflop / flowing_ms / self.peak} if self.peak else {}
        return row | {"scale": made.guard.scale.item()}

    def waits(self, size):
        """How often the host waits for the device in a step (CUDA's count), and the kernels launched."""
        made, _ = self.step(size)
        cuda = torch.cuda.is_available()
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                made()
            finally:
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
        waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
        with torch.profiler.profile(activities=activities) as profile:
            made()
            report.synchronise()
        events = profile.key_averages()
        launched = sum(e.count for e in events if "LaunchKernel" in e.key)
        copies = sum(e.count for e in events if "cudaMemcpyAsync" in e.key)
        return {
            "ms": "",
            "waits": len(waits),
            "kernels": launched,
            "copies": copies,
            "first": "; ".join(waits[:3]),
        }


def main(arguments):
    world = distributed.start()
    if world.device.type != "cuda" and not arguments.dry_run:
        config.stop("no GPU that torch can use; --dry-run shows whether the script works")
    torch.backends.cudnn.benchmark = True
    try:
        cfg = config.load(arguments.cfg or ("toy" if arguments.dry_run else "robust"), arguments.overrides)
    except config.ConfigError as error:
        config.stop(error)
    sizes, batches = SIZES, (64, 128, 256)
    if arguments.dry_run:
        torch.compile = functools.partial(torch.compile, backend="eager")  # no C++ compiler is at work
        arguments.batch, arguments.repeats, arguments.instances, sizes, batches = (
            4,
            2,
            1000,
            ["4x32", "2x32"],
            (8,),
        )
    bench = Bench(cfg, world, arguments)
    print(", ".join(f"{name} {value}" for name, value in report.machine().items()), flush=True)
    bench.add(f"waits of {sizes[0]}", bench.waits, sizes[0])
    for size in sizes:
        for name, kind in KINDS.items():
            bench.add(f"{size} {name}", bench.speed, size, **kind)
    for batch in batches:
        bench.add(f"{sizes[0]} bf16", bench.speed, sizes[0], batch, amp="bf16")
    bench.add(
        f"{sizes[1]} bf16, activations computed again", bench.speed, sizes[1], amp="bf16", checkpointed=True
    )
    bench.add(f"{sizes[1]} bf16, in 4 parts", bench.speed, sizes[1], amp="bf16", parts=4)
    if bench.left_out:
        print(f"no time was left for: {'; '.join(bench.left_out)}; raise --minutes")
    columns = {name: "" for row in bench.rows for name in row if name not in ("first", "scale")}
    rows = [{name: report.written(row.get(name, "")) for name in columns} for row in bench.rows]
    print()
    report.print_table(rows, list(columns))
    print(f"written: {arguments.json}")


if __name__ == "__main__":
    main(arguments)
