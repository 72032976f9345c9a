"""The toy run end to end, as a user starts it (`python train.py --cfg toy`), and the time of each phase.

    python benchmarks/toy.py [--cfg toy] [--json FILE] [--keep DIR] [key=value …]

Phases: start (imports, the toy's files written), training, checks (held-out videos, curves, checkpoints),
end. They are computed from the run's metrics.jsonl. A line has the number of steps, clips/s, and the share of
time spent waiting for data. Memory: the largest sum of the resident memory of train.py and all of its
processes, sampled every half second; shared pages count once (proportional set size). CPU:
user and system time of all processes.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avid import cli, config


def command_line():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="a folder for the toy's files and the run, which stays; default: a temporary one",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import json
import re
import resource
import subprocess
import tempfile
import time

import numpy as np
import report


def family(pid):
    """Process ids of a process and all its descendants."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, new = [], [pid]
    while new:
        found.append(new.pop())
        new += parents.get(found[-1], [])
    return found


def held_gb(pids):
    """Resident memory of processes together, 10⁹ bytes."""
    total = 0
    for pid in pids:
        try:
            total += int(
                re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]
            )
        except (OSError, TypeError):  # it has ended, or is about to
            continue
    return total * 1024 / 1e9


def main(arguments):
    try:
        cfg = config.load(arguments.cfg or "toy", arguments.overrides)
    except config.ConfigError as error:
        config.stop(error)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.keep or temporary)
        out = folder / "run"
        if (out / "metrics.jsonl").exists():
            config.stop(f"{out} holds a run already; give --keep another folder")
        given = [f"data.root={folder}", *arguments.overrides, f"out={out}"]
        begin, peak, first_metrics = time.time(), 0.0, None
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--cfg", arguments.cfg or "toy", *given]
        )
        try:
            while process.poll() is None:
                peak = max(peak, held_gb(family(process.pid)))
                if first_metrics is None and (out / "metrics.jsonl").exists():
                    first_metrics = time.time()
                time.sleep(0.5)
        finally:
            if process.poll() is None:  # Ctrl-C reached it, too: it saves and leaves
                process.wait()
        total_s = time.time() - begin
        if process.returncode:
            raise SystemExit(process.returncode)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "clips_per_s" in line]
    numbers = np.diff([0, *(line["step"] for line in steps)])  # steps of each line
    seconds = numbers * cfg.optim.batch_size * cfg.temporal.moments / [line["clips_per_s"] for line in steps]
    training_s, start_s = seconds.sum().item(), first_metrics - begin
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    phases = {
        "start, toy written": start_s,
        "training": training_s,
        "checks, checkpoints, end": total_s - start_s - training_s,
    }
    figures = {
        "seconds": total_s,
        "steps": steps[-1]["step"],
        "clips_per_s": numbers.sum().item() * cfg.optim.batch_size * cfg.temporal.moments / training_s,
        "clips_per_s_median": np.median([line["clips_per_s"] for line in steps]).item(),
        "data_wait_percent": 100 * (seconds @ [line["data_wait"] for line in steps]).item() / training_s,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_memory_gb": peak,
    }
    rows = [{"phase": name, "s": s, "%": 100 * s / total_s} for name, s in phases.items()]
    report.show(
        f"The run of {arguments.cfg or 'toy'}, end to end",
        rows,
        arguments.json,
        overrides=arguments.overrides,
        **figures,
    )
    print("\n" + "\n".join(f"{name:18s} {report.written(value)}" for name, value in figures.items()))


if __name__ == "__main__":
    main(arguments)
