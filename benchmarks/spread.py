"""A memory bank spread over processes, by the number of videos: beginning, a step, saving, loading, memory.

    python benchmarks/spread.py [--instances 1000000 10000000] [--ranks 4] [--folder DIR] [--json FILE]

Processes of one machine that talk by Gloo stand for the ranks; D = 128, float16. Only the bank's
part of a step is computed: B = 256 instances, 1,024 negatives; neighbours of 64 instances a rank out of
contrast.sample = 65,536. Times are those of the slowest rank: processor time and, in brackets,
wall-clock time, which a busy machine changes more. Memory is that of the rank that needs most.

    begin       drawing the first memories, each rank its own
    step        candidates read by all ranks together, and the update: the median of 20
    neighbours  of both modalities: the median of 5
    save, load  torch.distributed.checkpoint, each rank its rows, with the checksums
    state       what a rank holds of the bank, by its sizes; resident: by the operating system
    peak        the most that saving, or loading, takes besides
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli


def command_line():
    parser = cli.CommandLine(description=__doc__, formatter_class=cli.Help)
    what = "numbers of videos (default: 1000000 10000000)"
    parser.add_argument("--instances", type=int, nargs="+", default=[10**6, 10**7], metavar="N", help=what)
    parser.add_argument("--ranks", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--folder", metavar="DIR", help="where the bank is saved (default: a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import shutil
import tempfile
import time

import numpy as np
import report
import torch
import torch.distributed as dist

from avid import config, distributed, memory_bank

D, B, K, OF_A_RANK, SAMPLE = 128, 256, 1024, 64, 65536


def one_rank(rank, world, instances, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet-{instances}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    found, rng = {}, np.random.default_rng(0)

    def clock(name, work, times=1, scale=1.0):
        spent = []
        for _ in range(times):
            distributed.wait()
            begun = time.process_time(), time.perf_counter()
            result = work()
            spent.append((time.process_time() - begun[0], time.perf_counter() - begun[1]))
        found[name], found[f"({name})"] = (scale * np.median(spent, axis=0)).tolist()
        return result

    held = report.memory_gb()
    bank = clock("begin, s", lambda: memory_bank.SpreadBank(instances, D, 0.5, 0, "float16"))
    found["state, GB"] = sum(x.numel() * x.element_size() for x in bank.buffers()) / 1e9
    found["resident, GB"] = report.memory_gb() - held

    def step():
        index = torch.from_numpy(rng.integers(instances, size=B))
        candidates = bank.candidates(index, K, int(index[0]))
        for name in ("video", "audio"):
            bank.read(name, candidates.index)
        bank.update(index, *torch.nn.functional.normalize(torch.randn(2, B // world, D), dim=2))

    def neighbours():
        index = torch.from_numpy(rng.integers(instances, size=(world, OF_A_RANK))[rank])
        contrast = config.Contrast(sample=SAMPLE)
        for modality in ("video", "audio"):
            sample = memory_bank.draw_sample(instances, contrast, int(rng.integers(2**31)))
            bank.neighbours(modality, index, contrast, range(OF_A_RANK), None, sample)

    clock("step, ms", step, 20, 1e3)
    clock("neighbours, ms", neighbours, 5, 1e3)
    held = report.memory_gb()
    state = clock("save, s", lambda: bank.save_rows(folder / "bank"))
    found["peak of saving, GB"] = report.peak_gb() - held
    some = torch.arange(0, instances, max(instances // 1000, 1))
    before = bank.read("video", some)
    for x in (bank.video, bank.audio):
        x.zero_()
    held = report.memory_gb()
    clock("load, s", lambda: bank.load_rows(folder / "bank", state))
    found["peak of loading, GB"] = report.peak_gb() - held
    assert torch.equal(before, bank.read("video", some))
    everyone = distributed.gather_objects(found)
    if rank == 0:
        torch.save({name: max(one[name] for one in everyone) for name in found}, folder / "found.pt")
    distributed.wait()
    dist.destroy_process_group()


def main(arguments):
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for instances in arguments.instances:
            task = arguments.ranks, instances, folder
            torch.multiprocessing.spawn(one_rank, task, nprocs=arguments.ranks)
            row = torch.load(folder / "found.pt", weights_only=True)
            size = sum(path.stat().st_size for path in (folder / "bank").iterdir())
            rows.append({"N": f"{instances:,}", **row, "on disk, GB": size / 1e9})
            shutil.rmtree(folder / "bank")
            (folder / f"meet-{instances}").unlink(missing_ok=True)
    title = f"A bank spread over {arguments.ranks} processes"
    report.show(title, rows, arguments.json, ranks=arguments.ranks)


if __name__ == "__main__":
    main(arguments)
