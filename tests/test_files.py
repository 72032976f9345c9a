"""Unchecked files: decoders that die or hang, damaged files, silence. A bad file costs no other file."""

import csv
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tone, write_media
from test_data import folder_table, good, same

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "long")]
import files
from test_train import TINY

import train
from avid import config, data, evaluation, models, processes
from avid.config import ConfigError
from avid.data import BatchSampler, Clips
from avid.media import Media, MediaError
from avid.tools import prepare

TIMEOUT_S = 4.0
DIED, HUNG = "its decoder died with SIGSEGV", f"its decoder took longer than data.timeout_s = {TIMEOUT_S:g} s"
CFG = dataclasses.replace(files.CONFIG, data=config.Data(timeout_s=TIMEOUT_S))


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch):
    """torch checks its processes every 5 s; here ten times a second."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Iterator

    monkeypatch.setattr(Iterator._try_get_data, "__defaults__", (0.1,))


@pytest.fixture(autouse=True)
def no_process_left():
    yield
    assert not multiprocessing.active_children()


class Deadly(Media):
    """Kills its process when it opens `dies.mp4`, and `once.mp4` only the first time."""

    def __init__(self, path, *arguments):
        once = Path(path).with_suffix(".died")
        if Path(path).name == "dies.mp4" or (Path(path).name == "once.mp4" and not once.exists()):
            once.touch()
            time.sleep(0.5)  # the batch before has arrived
            os.kill(os.getpid(), signal.SIGSEGV)
        super().__init__(path, *arguments)


class Refusing(Media):
    """Raises an error for `dies.mp4` and `hangs.mp4` instead."""

    def __init__(self, path, *arguments):
        if reason := {"dies.mp4": DIED, "hangs.mp4": HUNG}.get(Path(path).name):
            raise MediaError(reason)
        super().__init__(path, *arguments)


@pytest.fixture(scope="module")
def deadly(tmp_path_factory):
    """Six usable files, and `dies.mp4` and `hangs.mp4` (a pipe that nobody writes to)."""
    root = tmp_path_factory.mktemp("deadly")
    for k in range(6):
        good(root / f"{k}.mp4", seconds=1.0, wave=tone(300 + 100 * k, 1.0, 16000))
    shutil.copy(root / "0.mp4", root / "dies.mp4")
    os.mkfifo(root / "hangs.mp4")
    return folder_table(root)


def batches(table, training, workers):
    clips = Clips(table, CFG, training)
    if not training:
        return data.loader(clips, workers, batch_size=3)
    return data.loader(clips, workers, batch_sampler=BatchSampler(len(table), 4, "epoch", 0, 0, 6))


# ---------------------------------------------------------------------------------- decoders that die or hang


@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_that_dies_and_one_that_hangs_cost_their_files_alone(deadly, training, monkeypatch, capfd):
    """Batches are bit for bit as if both files had raised an error, and no process is left."""
    monkeypatch.setattr(data, "Media", Refusing)
    expected = list(batches(deadly, training, workers=0))
    monkeypatch.setattr(data, "Media", Deadly)
    random_state = torch.random.get_rng_state()
    found = list(batches(deadly, training, workers=2))
    assert len(found) == len(expected) == (6 if training else 3)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    failures = [failure for batch in found for failure in batch["failures"]]
    assert dict(failures) == {6: DIED, 7: HUNG}
    assert not multiprocessing.active_children()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    written = capfd.readouterr().out
    for name, reason in (("dies", DIED), ("hangs", HUNG)):
        assert written.count(f"{name}.mp4: {reason}; trying again") == 1  # a second chance


def test_a_decoder_that_dies_once_costs_nothing(tmp_path, monkeypatch):
    for name in ("a", "b", "once"):
        good(tmp_path / f"{name}.mp4", seconds=1.0)
    table = folder_table(tmp_path)
    expected = list(batches(table, False, workers=0))
    monkeypatch.setattr(data, "Media", Deadly)
    found = list(batches(table, False, workers=1))
    assert (tmp_path / "once.died").exists()
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))


WAYS = {  # how a process dies, without pytest's report of it, and the reason given
    "abort": (lambda: (faulthandler.disable(), os.abort()), "SIGABRT"),
    "bus": (lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGBUS)), "SIGBUS"),
    "exit": (lambda: os._exit(0), "exit code 0"),
    "exit3": (lambda: os._exit(3), "exit code 3"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
}


def test_every_way_to_die_is_named(tmp_path, monkeypatch):
    """All in one batch, twice; the batches after them are whole."""
    for name in ("a", *WAYS):
        good(tmp_path / f"{name}.mp4", seconds=1.0)

    class Dying(Media):
        def __init__(self, path, *arguments):
            way, _ = WAYS.get(Path(path).stem, (int, ""))
            way()
            super().__init__(path, *arguments)

    monkeypatch.setattr(data, "Media", Dying)
    clips = Clips(folder_table(tmp_path), CFG, False)
    found = list(data.loader(clips, 2, batch_sampler=[range(6), range(6), [0], [1]]))
    expected = [(k, f"its decoder died with {how}") for k, (_, how) in enumerate(WAYS.values(), 1)]
    assert [batch["failures"] for batch in found] == [expected, expected, [], expected[:1]]
    assert [batch.get("index", torch.tensor([])).tolist() for batch in found] == [[0], [0], [0], []]


def test_a_loop_that_leaves_early_does_not_wait_for_a_decoder_that_hangs(deadly):
    found = iter(
        data.loader(
            Clips(deadly, dataclasses.replace(CFG, data=config.Data()), False), 1, batch_sampler=[[0], [7]]
        )
    )
    assert next(found)["index"].tolist() == [0]
    (process,) = multiprocessing.active_children()
    time.sleep(0.3)
    found.close()
    process.join(10.0)
    assert process.exitcode is not None


def test_a_dead_process_does_not_interrupt_the_main_process(deadly, monkeypatch):
    """torch would raise an exception at once, in a step or while a checkpoint is written."""
    monkeypatch.setattr(data, "Media", Deadly)
    found = iter(data.loader(Clips(deadly, CFG, False), 1, batch_sampler=[[0], [6], [1]]))
    next(found)
    (process,) = multiprocessing.active_children()
    process.join(20.0)
    assert process.exitcode == -signal.SIGSEGV
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    time.sleep(0.1)
    assert [batch["failures"] for batch in found] == [[(6, DIED)], []]


def test_an_error_in_the_main_process_ends_the_program(deadly):
    """Its decoding processes ignore SIGTERM, which Python would end them with."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import files\n"
        "from avid import data; from pathlib import Path\n"
        "clips = data.Clips(files.table_of(Path(sys.argv[3]), ['0.mp4']), files.CONFIG, False)\n"
        "batches = iter(data.loader(clips, 2, batch_sampler=[[0]] * 50))\n"
        "next(batches); raise ValueError('in a step')"
    )
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, here.parent, here / "long", deadly.root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "in a step" in done.stderr


def test_processes_that_die_between_files_end_the_run_in_one_line(deadly, monkeypatch):
    monkeypatch.setattr(data, "collate", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        ConfigError, match=r"decoding processes die between files.*lower data\.workers"
    ) as caught:
        list(data.loader(Clips(deadly, CFG, False), 1, batch_sampler=[[0], [1]]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_code_is_raised_and_not_skipped(deadly, monkeypatch, error, workers):
    def wrong(self, index, rng):
        raise error("a mistake")

    monkeypatch.setattr(Clips, "read", wrong)
    with pytest.raises(error, match="a mistake"):
        list(data.loader(Clips(deadly, CFG, False), workers, batch_sampler=[[0], [1]]))


def test_a_training_and_its_evaluation_survive_a_decoder_that_dies(tmp_path, monkeypatch, capfd):
    for k in range(9):
        good(tmp_path / "videos" / f"{k}.mp4", seconds=1.0)
    shutil.copy(tmp_path / "videos" / "0.mp4", tmp_path / "videos" / "dies.mp4")
    monkeypatch.setattr(data, "Media", Deadly)
    settings = [
        "data.name=folder",
        f"data.root={tmp_path / 'videos'}",
        "data.workers=2",
        "data.in_memory=false",
        "optim.batch_size=5",
    ]
    cfg = config.load("toy", [*TINY, *settings, f"out={tmp_path / 'run'}"])
    train.main(cfg)
    assert capfd.readouterr().out.count(f"dies.mp4: {DIED}\n") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 8
    assert max(line.get("bad_files", 0) for line in lines) == 1
    network = models.AudioVisual(cfg.model)
    clips = data.Clips(folder_table(tmp_path / "videos"), cfg, training=False)
    found = evaluation.extract(network, clips, torch.device("cpu"))
    assert found.failures == {9: DIED}
    assert found.index.tolist() == list(range(9))


def deadly_examine(root, path, *more):
    if path == "hangs.mp4":
        open(os.path.join(root, path)).read()
    if path == "dies.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return prepare.examine(root, path, *more)


def test_a_check_names_the_files_that_its_decoders_die_or_hang_on(deadly, tmp_path, monkeypatch):
    outcomes = processes.outcomes
    monkeypatch.setattr(processes, "outcomes", lambda function, *more: outcomes(deadly_examine, *more))
    monkeypatch.setattr(prepare, "CHECK_LIMIT_S", 20.0)  # includes the imports of a process
    assert prepare.check(deadly, data.MODALITIES, tmp_path / "check.csv", workers=3) == 6
    rows = {row["path"]: row for row in csv.DictReader(open(tmp_path / "check.csv"))}
    assert Counter(row["usable"] for row in rows.values()) == {"yes": 6, "no": 2}
    assert rows["dies.mp4"]["reason"] == "crashes the decoder: its process ended with SIGSEGV"
    assert rows["hangs.mp4"]["reason"] == "takes the decoder too long: more than 20 s"


# ---------------------------------------------------------------------------------- the list of skipped files


def test_every_skipped_file_is_in_the_list_at_the_end(tmp_path, capsys):
    names = ["a.mp4", 'with "quotes", and comma.mp4', "new\nline.mp4", os.fsdecode(b"\xff.mp4")]
    bad = data.BadFiles(files.table_of(tmp_path, names), max_share=0.5)
    bad.count([(1, "no sound"), (2, "no picture"), (3, DIED)], used=5)
    bad.count([(1, "no sound")], used=5)
    bad.write(tmp_path / "skipped.csv")
    written = capsys.readouterr().out
    assert written.isascii() and len(written.splitlines()) == 4  # one for each file, one for the list
    with open(tmp_path / "skipped.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert list(csv.reader(file)) == [
            ["path", "reason"],
            [names[1], "no sound"],
            [names[2], "no picture"],
            [names[3], DIED],
        ]


def test_without_bad_files_there_is_no_list(tmp_path, capsys):
    data.BadFiles(files.table_of(tmp_path, ["a.mp4"]), max_share=0.5).write(tmp_path / "skipped.csv")
    assert not (tmp_path / "skipped.csv").exists()
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------------------------------------------- damaged


def test_damaged_files_are_used_or_refused(tmp_path):
    """A few of the files that tests/long/files.py reads."""
    whole, folder = tmp_path / "whole", tmp_path / "mutants"
    folder.mkdir()
    sources = files.originals(whole, names=("a.mp4", "c.mkv", "e.avi", "f.ts"))
    kinds = files.write_mutants(folder, sources, 33, random.Random(1))
    (folder / "pipe.mp4").unlink()
    names = [name for name in kinds if name != "pipe.mp4"]
    for training in (False, True):
        outcomes, wrong, _ = files.read(files.table_of(folder, names), training, data.MODALITIES, 1)
        assert not wrong
        found = Counter(files.outcome_kind(outcome) for outcome in outcomes.values())
        assert found["used"] > 10
        assert found["skipped"] > 10
        for index, name in enumerate(names):
            if kinds[name].startswith("special"):
                assert outcomes[index].startswith("cannot be opened: "), name
            elif kinds[name].startswith("odd name") and name.isprintable():
                assert outcomes[index] == "used", name


def test_a_file_that_looks_like_an_address_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_media(tmp_path / "http:localhost" / "a.mp4", wave=tone(500, 1.0, 16000), rate_hz=16000)
    assert Media("http:localhost/a.mp4", ("audio",)).last_s == pytest.approx(1.0, abs=0.1)


# --------------------------------------------------------------------------------- constant picture and sound

CONSTANT = {  # ffmpeg sources of constant picture and sound
    "black": ("color=black:s=64x64:r=25", "anullsrc"),
    "white": ("color=white:s=64x64:r=25", "aevalsrc=1"),
    "still": ("testsrc2=s=64x64:r=25,trim=end_frame=1,loop=-1:1,setpts=N/25/TB", "sine=440"),
    "loud": ("color=red:s=64x64:r=25", "aevalsrc=sgn(sin(2000*t))"),
}


@pytest.mark.parametrize("kinds", [("black",), tuple(CONSTANT)])
def test_silence_black_frames_and_constant_sound_give_finite_numbers(tmp_path, kinds):
    """Before and after training on nothing else, in training mode and in evaluation mode."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    root = tmp_path / "videos"
    root.mkdir()
    for kind in kinds:
        picture, sound = CONSTANT[kind]
        inputs = ["-f", "lavfi", "-t", "2", "-i", picture, "-f", "lavfi", "-t", "2", "-i", sound]
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *inputs, "-ac", "1", "-pix_fmt", "yuv420p"]
        subprocess.run([*command, root / f"{kind}0.mp4"], check=True)
        for k in range(1, 8 // len(kinds)):
            shutil.copy(root / f"{kind}0.mp4", root / f"{kind}{k}.mp4")
    settings = [
        "data.name=folder",
        f"data.root={root}",
        "optim.epochs=6",
        "optim.warmup_epochs=0",
        "loss.w_min=0.25",
        "loss.soft=0.5",
    ]
    cfg = config.load("toy", [*TINY, *settings, f"out={tmp_path / 'run'}"])
    table = folder_table(root)
    network = models.AudioVisual(cfg.model)

    def assert_finite_features():
        for training in (True, False):
            network.train(training)
            found = evaluation.extract(network, data.Clips(table, cfg, training=False), torch.device("cpu"))
            assert found.index.tolist() == list(range(8))
            for arrays in (found.features, found.embeddings):
                assert all(np.isfinite(array).all() for array in arrays.values())

    assert_finite_features()
    train.main(cfg)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    models.load(network, saved, "last.pt")
    for part in ("network", "bank"):
        assert all(x.isfinite().all() for x in saved[part].values() if torch.is_tensor(x))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    left_out = [line["step"] for line in lines if "not_finite" in line]
    assert not left_out or kinds == (
        "black",
    )  # if all clips of a batch are equal, batch norm divides by zero
    assert sorted(left_out + [line["step"] for line in lines if "loss" in line]) == list(range(1, 7))
    assert_finite_features()
