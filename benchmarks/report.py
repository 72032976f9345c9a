"""What the benchmarks share: timing in turns, memory, a description of the machine, a table and its JSON.

Import it before avid: it lets the scripts find the package of their own checkout.
"""

import ctypes
import gc
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from avid.evaluation import print_table


def machine():
    """Processor, cores, GPU if there is one, versions and threads; a figure means little without them."""
    names = [
        line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")
    ]
    found = {"cpu": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def in_turns(works, repeats, warm_up=2):
    """Time functions against each other: {name: function} → {name: milliseconds (repeats,)}.

    They take turns, so that other load on the machine slows all of them alike. The first `warm_up` rounds do
    not count.
    """
    ms = {name: [] for name in works}
    for turn in range(warm_up + repeats):
        for name, work in works.items():
            synchronise()
            before = time.perf_counter()
            work()
            synchronise()
            if turn >= warm_up:
                ms[name].append(1e3 * (time.perf_counter() - before))
    return {name: np.array(values) for name, values in ms.items()}


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_gb():
    """Memory in use now, in 10⁹ bytes: CUDA's allocations, or this process's resident memory.

    Resets the peak.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e9
    # glibc: return free memory to the system, or the next step would seem to need none
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak
    return resident_gb("VmRSS")


def peak_gb():
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else resident_gb("VmHWM")


def resident_gb(what):
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def show(title, rows, path=None, **more):
    """Print the machine and rows, dicts of the same keys, as a table; with a path write {title, machine,
    rows, more} as JSON."""
    place = machine()
    print(f"{title}\n{', '.join(f'{name} {value}' for name, value in place.items())}\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print_table([{column: written(row.get(column, "")) for column in columns} for row in rows], columns)
    if path:
        result = {"title": title, "machine": place, **more, "rows": rows}
        Path(path).write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def written(value):
    """A float with three significant digits, or as a whole number from 100 on; other values unchanged."""
    return (
        value
        if not isinstance(value, float)
        else f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:#.3g}".rstrip(".")
    )
