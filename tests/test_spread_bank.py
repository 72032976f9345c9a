"""A bank whose rows are spread over ranks against the same bank in one piece: the same bits, in processes
that talk by Gloo."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_memory_bank import batch
from test_train import ENVIRONMENT, ROBUST, command

from avid import config
from avid.memory_bank import MemoryBank, SpreadBank

N, D, STEPS = 11, 6, 5  # of three ranks the last holds three rows and the others four
DTYPES = ("float32", "float16", "bfloat16")


def steps(seeds):
    """Updates of instances, some of them twice in a batch, as float32 embeddings."""
    return [batch(N, 12, D, seed) for seed in seeds]


def one_rank(rank, world, folder):
    """What every rank does: go on from the bank of other ranks where there is one, update, compare, save."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    for dtype in DTYPES:
        bank, whole = (Bank(N, D, 0.5, 3, dtype) for Bank in (SpreadBank, MemoryBank))
        assert len(bank.video) == -(-N // world) + 1 and bank.video.dtype == getattr(torch, dtype)
        before = Path(folder) / f"{dtype}.pt"
        if before.exists():
            bank.load_state_dict(torch.load(before, weights_only=True))
            whole.load_state_dict(torch.load(before, weights_only=True))
        everything = torch.arange(N)
        for index, video, audio in steps(range(10 * world, 10 * world + STEPS)):
            candidates = bank.candidates(index, 20, 7)
            assert torch.equal(candidates.index, whole.candidates(index, 20, 7).index)
            for name in ("video", "audio", "agreement"):
                for asked in (candidates.index, everything):
                    assert torch.equal(bank.read(name, asked), whole.read(name, asked)), (name, rank)
            local = [x.chunk(world)[rank] for x in (video, audio)]
            bank.update(index, *local)
            whole.update(index, *local)
            assert [x.item() for x in bank.agreement_mean_std()] == pytest.approx(
                [x.item() for x in whole.agreement_mean_std()], abs=1e-12
            )
        assert bank.health() == pytest.approx(whole.health(), abs=1e-12)
        state = bank.state_dict()
        if rank == 0:
            torch.save(state, Path(folder) / f"{dtype}.next.pt")
            for name, x in whole.state_dict().items():
                torch.testing.assert_close(state[name], x, atol=1e-12 if not x.dim() else 0, rtol=0)
    dist.barrier()
    for dtype in DTYPES if rank == 0 else ():
        (Path(folder) / f"{dtype}.next.pt").replace(Path(folder) / f"{dtype}.pt")
    dist.destroy_process_group()


def test_two_ranks_then_three_hold_what_one_bank_would_hold(tmp_path):
    for world in (2, 3):
        torch.multiprocessing.spawn(one_rank, (world, str(tmp_path)), nprocs=world)
    for dtype in DTYPES:
        whole, alone = (Bank(N, D, 0.5, 3, dtype) for Bank in (MemoryBank, SpreadBank))
        for world in (2, 3):
            for step in steps(range(10 * world, 10 * world + STEPS)):
                whole.update(*step)
        saved = torch.load(tmp_path / f"{dtype}.pt", weights_only=True)
        for name, x in whole.state_dict().items():
            torch.testing.assert_close(saved[name], x, atol=1e-12 if not x.dim() else 0, rtol=0)
        alone.load_state_dict(saved)  # a single process
        assert torch.equal(alone.read("video", torch.arange(N)), whole.video) and len(alone.video) == N + 1


def test_training_with_a_spread_bank_is_training(tmp_path):
    """Twelve steps, six of them robust, of two processes, against a run that goes on with its bank spread:
    the same bits."""
    text = {}
    runs = {"whole": [], "spread": ["optim.epochs=2"], "spread again": ["bank.spread=true"]}
    for name, more in runs.items():
        out = tmp_path / name.split()[0]
        settings = (*ROBUST, "log.check_epochs=0", "optim.schedule=constant", *more)
        done = subprocess.run(
            command(tmp_path, out, *settings, ranks=2),
            capture_output=True,
            text=True,
            timeout=300,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        text[name] = done.stdout + done.stderr
    assert "resuming" in text["spread again"]
    whole, spread = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "spread")
    )
    for part in ("bank", "network"):
        assert whole[part].keys() == spread[part].keys()
        for name, x in whole[part].items():
            torch.testing.assert_close(
                x, spread[part][name], atol=1e-12 if name.startswith("agreement_sum") else 0, rtol=0
            )
    lines = [
        [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "spread")
    ]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]


@pytest.mark.parametrize(
    "other", ["bank.num_negatives=all", "weights.contrast_va=1", "weights.contrast_vv=1"]
)
def test_what_needs_the_whole_bank_is_refused(other):
    with pytest.raises(config.ConfigError, match=r"bank\.spread"):
        config.load("toy", ["bank.spread=true", "temporal.moments=2", other])
