"""A bank whose rows are spread over ranks equals the same bank in one piece, bit for bit; the ranks are
processes that use Gloo.
"""

import json
import math
import os
import pickle
import subprocess
from pathlib import Path
from unittest import mock

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_memory_bank import batch
from test_train import ENVIRONMENT, ROBUST, command
from test_train import run as trained

from avid import config, distributed, memory_bank, run
from avid.memory_bank import MemoryBank, SpreadBank, draw_sample

N, D, STEPS = 11, 6, 5  # with three ranks the last one holds three rows and the others four
DTYPES = ("float32", "float16", "bfloat16")


def steps(seeds):
    """Updates of instances, some of them twice in a batch, as float32 embeddings."""
    return [batch(N, 12, D, seed) for seed in seeds]


def check_rank(rank, world, folder):
    """Runs in every rank: load the bank that fewer ranks saved, if there is one; update, compare, save."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    for dtype in DTYPES:
        bank, whole = (Bank(N, D, 0.5, 3, dtype) for Bank in (SpreadBank, MemoryBank))
        assert len(bank.video) == -(-N // world) + 1 and bank.video.dtype == getattr(torch, dtype)
        before, after = (Path(folder) / f"{dtype}-{world - back}" for back in (1, 0))
        if before.exists():
            state = torch.load(f"{before}.pt", weights_only=True)
            bank.load_rows(before, state)
            whole.load_rows(before, state)
        everything = torch.arange(N)
        for index, video, audio in steps(range(10 * world, 10 * world + STEPS)):
            candidates = bank.candidates(index, 20, 7)
            assert torch.equal(candidates.index, whole.candidates(index, 20, 7).index)
            for name in ("video", "audio", "agreement"):
                for asked in (candidates.index, everything):
                    assert torch.equal(bank.read(name, asked), whole.read(name, asked)), (name, rank)
            local = [x.chunk(world)[rank] for x in (video, audio)]
            assert_same_neighbours(bank, whole, index.chunk(world)[rank])
            bank.update(index, *local)
            whole.update(index, *local)
            assert [x.item() for x in bank.agreement_mean_std()] == pytest.approx(
                [x.item() for x in whole.agreement_mean_std()], abs=1e-12
            )
        assert bank.health() == pytest.approx(whole.health(), abs=1e-12)
        state = bank.save_rows(after)
        assert set(state["crc32"]) == {path.name for path in after.iterdir()}
        again = MemoryBank(N, D, 0.5, 4, dtype)
        again.load_rows(after, state)
        for name, x in whole.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], x, atol=1e-12 if not x.dim() else 0, rtol=0)
        if rank == 0:
            torch.save(state, f"{after}.pt")
    dist.barrier()
    dist.destroy_process_group()


def assert_same_neighbours(bank, whole, index):
    """From the same sample, a spread bank finds the same neighbours as the bank in one piece."""
    for tau_n in (math.inf, 0.5):
        contrast = config.Contrast(n_pos=2, k_pos=3, negatives=4, tau_n=tau_n, sample=8)
        sample = draw_sample(N, contrast, 5)
        given, right = (
            x.neighbours("audio", index, contrast, range(len(index)), None, sample)[:2] for x in (bank, whole)
        )
        assert all(torch.equal(one, other) for one, other in zip(given, right, strict=True))


def test_two_then_three_then_four_ranks_equal_one_bank(tmp_path):
    """Each number of ranks continues from what the previous one saved; the last of four ranks holds
    two rows.
    """
    for world in (2, 3, 4):
        forked.ranks(check_rank, world, str(tmp_path))
    for dtype in DTYPES:
        whole, alone = (Bank(N, D, 0.5, 3, dtype) for Bank in (MemoryBank, SpreadBank))
        for world in (2, 3, 4):
            for step in steps(range(10 * world, 10 * world + STEPS)):
                whole.update(*step)
        folder = tmp_path / f"{dtype}-4"
        alone.load_rows(folder, torch.load(f"{folder}.pt", weights_only=True))  # a single process
        for name in ("video", "audio", "agreement"):
            assert torch.equal(alone.read(name, torch.arange(N)), getattr(whole, name))
        assert len(alone.video) == N + 1
        again = alone.save_rows(tmp_path / f"{dtype}-1")
        whole.load_rows(tmp_path / f"{dtype}-1", again)
        assert torch.equal(alone.read("video", torch.arange(N)), whole.video)


def check_first_memories(rank, world, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/begin-{world}", rank=rank, world_size=world)
    drawn, draw = [], memory_bank._on_the_sphere

    def counted(rows, *more):
        drawn.append(rows)
        return draw(rows, *more)

    with (
        mock.patch.object(memory_bank, "PIECE", 8),
        mock.patch.object(memory_bank, "_on_the_sphere", counted),
    ):
        bank = SpreadBank(30, D, 0.5, 3)
        # its own rows, and the other rows of the first and the last piece
        assert sum(drawn) // 2 <= bank._held() + 2 * 7
        rows = bank.read("video", torch.arange(30)), bank.read("audio", torch.arange(30))
    if rank == 0:
        torch.save(rows, Path(folder) / f"begin-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_each_rank_draws_its_own_first_memories_alone(tmp_path):
    """Any number of ranks begins with the same memories, different from each other and of unit length;
    MemoryBank has the same ones.
    """
    for world in (1, 3):
        forked.ranks(check_first_memories, world, str(tmp_path))
    one, three = (torch.load(tmp_path / f"begin-{world}.pt", weights_only=True) for world in (1, 3))
    assert all(torch.equal(x, y) for x, y in zip(one, three, strict=True))
    memories = torch.cat(one)
    torch.testing.assert_close(memories.norm(dim=1), torch.ones(60))
    assert (memories @ memories.T - torch.eye(60)).abs().max() < 0.999
    assert torch.equal(
        SpreadBank(30, D, 0.5, 3).read("audio", torch.arange(30)), MemoryBank(30, D, 0.5, 3).audio
    )


def test_a_damaged_part_sends_the_run_back_to_the_previous_checkpoint(tmp_path, capsys):
    """Every byte of a folder is checked. If both checkpoints are damaged, the run does not start over by
    itself.
    """
    world = distributed.World(0, 1, torch.device("cpu"))

    def checkpoint():
        kept = run.Checkpoint(tmp_path / "last.pt", tmp_path / "log", "a run", None, world)
        bank = SpreadBank(N, D, 0.5, 3)
        return kept, bank, kept.resume({}, lambda saved: None, {"bank": bank})

    kept, bank, _ = checkpoint()
    memories = {}
    for step, one in enumerate(steps(range(4)), 1):
        bank.update(*one)
        kept.save(step)
        memories[step] = bank.read("video", torch.arange(N))
        assert len(list(tmp_path.glob("last.bank-*"))) == min(step, 2)  # those of two checkpoints are kept
    kept.held.close()
    kept, bank, step = checkpoint()
    assert step == 4 and torch.equal(bank.read("video", torch.arange(N)), memories[4])
    kept.held.close()

    def fault():
        return run.fault_of_rows(tmp_path, run.load_checkpoint(tmp_path / "last.pt"))

    rng = np.random.default_rng(0)
    parts = sorted((tmp_path / "last.bank-000000004").iterdir())
    assert [path.name for path in parts] == [".metadata", "__0_0.distcp"]
    for path in parts:
        clean = path.read_bytes()
        for _ in range(10):
            at = rng.integers(len(clean))
            path.write_bytes(clean[:at] + bytes([clean[at] ^ 1 << rng.integers(8)]) + clean[at + 1 :])
            assert f"{path} is damaged" in fault()
        path.write_bytes(clean)
    assert not fault()
    parts[1].unlink()
    kept, bank, step = checkpoint()
    assert step == 3 and torch.equal(bank.read("video", torch.arange(N)), memories[3])
    assert "No such file" in capsys.readouterr().out
    kept.held.close()
    next((tmp_path / "last.bank-000000003").glob("__0_0*")).write_bytes(b"")
    with pytest.raises(run.CheckpointError, match="restore one of them"):
        checkpoint()


def test_training_with_a_spread_bank_equals_training_with_one_bank(tmp_path):
    """Two processes, twelve steps, six of them robust: a run that is resumed with its bank spread ends in the
    same bits.
    """
    text = {}
    runs = {"whole": [], "spread": ["optim.epochs=2"], "spread again": ["bank.spread=true"]}
    for name, more in runs.items():
        out = tmp_path / name.split()[0]
        settings = (*ROBUST, "log.check_epochs=0", "optim.schedule=constant", *more)
        if name != "whole":
            text[name] = trained(tmp_path, out, *settings, ranks=2)
            continue
        words = command(tmp_path, out, *settings, ranks=2)  # by torchrun
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in text["spread again"]
    whole, spread = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "spread")
    )
    files = sorted(path.name for path in (tmp_path / "spread" / spread["bank"]["folder"]).iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp"]  # each rank writes its own
    bank = MemoryBank(*whole["bank"]["video"].shape, 0.5, 0)
    bank.load_rows(tmp_path / "spread" / spread["bank"]["folder"], spread["bank"])
    spread["bank"] = bank.state_dict()
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


def test_contrast_with_a_spread_bank_equals_contrast_with_one_bank(tmp_path):
    """With neighbours from a sample, six steps of two processes give the same losses for both banks. Another
    run can begin with the spread bank.
    """
    losses = []
    settings = ["weights.contrast_va=1", "weights.contrast_av=1", "contrast.sample=16", "contrast.k_pos=4"]
    settings += ["contrast.n_pos=2", "contrast.negatives=8", "log.check_epochs=0"]
    for name, more in {"whole": [], "spread": ["bank.spread=true"]}.items():
        settings_of = [*settings, "optim.epochs=2", *more]
        trained(tmp_path, tmp_path / name, *settings_of, ranks=2)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([(line["loss"], line["contrast_va"]) for line in map(json.loads, lines)])
    assert losses[0] == losses[1] and len(losses[0]) == 6
    before = torch.load(tmp_path / "spread" / "last.pt", weights_only=True)["bank"]["folder"]
    init = [f"init={tmp_path / 'spread' / 'last.pt'}", "optim.lr=1e-12", "bank.momentum=1", "optim.epochs=1"]
    text = trained(tmp_path, tmp_path / "next", *settings, *init)
    assert "with its bank" in text
    memories = torch.load(tmp_path / "next" / "last.pt", weights_only=True)["bank"]
    bank = MemoryBank(*memories["video"].shape, 1.0, 0)
    distributed.load_rows(tmp_path / "spread" / before, bank._local(), bank.num_instances)
    torch.testing.assert_close(bank.video, memories["video"])


class Calls:
    def __reduce__(self):
        return os.getpid, ()


def test_no_code_is_run_from_the_index_of_a_folder(tmp_path):
    bank = SpreadBank(N, D, 0.5, 3)
    state = bank.save_rows(tmp_path / "bank")
    for asked in (Calls(), torch.nn.Linear(1, 1)):
        (tmp_path / "bank" / ".metadata").write_bytes(pickle.dumps(asked))
        with pytest.raises(OSError, match="no code is run from a file"):
            bank.load_rows(tmp_path / "bank", state)


@pytest.mark.parametrize(
    "other", ["bank.num_negatives=all", "weights.contrast_va=1", "weights.contrast_vv=1"]
)
def test_terms_that_need_the_whole_bank_are_refused(other):
    with pytest.raises(config.ConfigError, match=r"bank\.spread"):
        config.load("toy", ["bank.spread=true", "temporal.moments=2", other])
