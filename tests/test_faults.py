"""Kills, signals, full disks, damaged checkpoints, other data and other ranks: no file is left half written,
and the same command goes on.

The scripts run in processes forked from one that has already imported everything. tests/long/kill.py kills
more often.
"""

import contextlib
import ctypes
import dataclasses
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "long"))
import forked
import kill

from avid import config, distributed, losses
from avid import run as running

SETTINGS = [setting for setting in kill.SETTINGS if not setting.startswith("log.checkpoint_minutes")]
LONG = ["optim.epochs=100000", "log.check_epochs=0"]


def until(holds, process, seconds=300):
    """Wait until `holds()`. The process must stay alive meanwhile."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_end(process, folder, seconds=300):
    """Wait for a process to end: (exit code, output). No process of its group may be left."""
    process.join(seconds)
    text = (folder / "log").read_text()
    assert process.exitcode is not None, text[-3000:]
    assert forked.left(process.pid, seconds=120) == []
    return process.exitcode, text


def run(folder, *overrides, script="train.py", code=0, before=None):
    (folder / "log").write_text("")
    process = forked.start(script, [*SETTINGS, *overrides], folder, folder / "log", before=before)
    exitcode, text = wait_for_end(process, folder)
    assert exitcode == code, text[-3000:]
    return text


def error(text):
    """The one line in which a script names its error."""
    assert "Traceback" not in text, text[-3000:]
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


FOUR = ["optim.epochs=4", "optim.schedule=constant", "log.check_epochs=0", "data.workers=0"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of an undisturbed run of four epochs."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *FOUR)
    return folder


@pytest.fixture
def folder(undisturbed, tmp_path):
    """A folder for a run, with a link to the files of the toy."""
    (tmp_path / "world").symlink_to(undisturbed / "world")
    return tmp_path


# ------------------------------------------------------------------------------------------------------ kills


def test_a_run_killed_three_times_ends_as_an_undisturbed_one(tmp_path):
    """Killed while the toy is written, while a checkpoint is written, and while features are computed."""
    phases = ["the toy being written", "a checkpoint being written", "features being computed"]
    assert kill.main(3, 0, tmp_path / "kills", phases).total() == 3


# ---------------------------------------------------------------------------------------------------- signals


def test_sigterm_while_the_toy_is_written_leaves_no_process(tmp_path):
    process = forked.start("train.py", [*SETTINGS, "toy.train=5000"], tmp_path, tmp_path / "log")
    until(lambda: any(tmp_path.glob("world/*/train/*.mp4")), process)
    os.kill(process.pid, signal.SIGTERM)
    assert wait_for_end(process, tmp_path)[0] == -signal.SIGTERM  # a shell reports 143


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_decoding_process_outlives_the_training(folder, number):
    process = forked.start("train.py", [*SETTINGS, *LONG, "data.workers=2"], folder, folder / "log")
    metrics = folder / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, process)
    assert len(forked.group(process.pid)) >= 3
    if number == signal.SIGINT:  # a terminal sends it to all of them
        os.killpg(process.pid, number)
    else:
        os.kill(process.pid, number)
    code, text = wait_for_end(process, folder)
    assert code == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in text
    assert ("saved; the same command goes on from here" in text) == (number != signal.SIGKILL)


UNDER_SIGNALS = """
import signal, sys, time, torch
from avid import config, distributed, models
torch.set_num_threads(1)
distributed.start()
torch.manual_seed(0)
network = models.AudioVisual(config.Model(width=4, depth=1, embedding=16, head_norm="batch")).train()
clips = torch.randn(8, 3, 4, 32, 32), torch.randn(8, 1, 50, 32)
def gradients():
    network.zero_grad()
    output = network(*clips)
    (output.video @ output.audio.T).logsumexp(1).sum().backward()
    return [x.grad.clone() for x in network.parameters()]
expected, received = gradients(), []
signal.signal(signal.SIGALRM, lambda *_: received.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
end = time.monotonic() + 8
while time.monotonic() < end:
    assert all(map(torch.equal, gradients(), expected))
signal.setitimer(signal.ITIMER_REAL, 0)
assert len(received) > 100, len(received)
"""


def test_signals_change_no_number():
    """They come while oneDNN computes, whose kernels may point the stack's register at the heap."""
    program = [sys.executable, "-c", UNDER_SIGNALS]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=forked.ROOT)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


@pytest.mark.parametrize("gap_ms", [0, 3, 30, 200])
def test_a_signal_that_comes_twice_acts_once(folder, gap_ms):
    """As when a cluster signals every process and torchrun passes its own signal on."""
    process = forked.start("train.py", [*SETTINGS, *LONG], folder, folder / "log")
    metrics = folder / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(gap_ms / 1000)
    with contextlib.suppress(ProcessLookupError):  # it may have ended
        os.kill(process.pid, signal.SIGTERM)
    code, text = wait_for_end(process, folder)
    assert code == 128 + signal.SIGTERM and "Traceback" not in text
    assert "stopped by SIGTERM" in text and "saved; the same command goes on from here" in text
    assert running.load_checkpoint(folder / "run" / "last.pt")["step"] >= 1


def test_under_torchrun_repeated_signals_to_all_act_once(folder):
    """torchrun and its two processes get the signal twice, and torchrun passes its own on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).parents[1] / "train.py")
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*torchrun, script, *SETTINGS, *LONG],
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.01)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.03)
    process.wait(300)
    text = (folder / "log").read_text()
    assert "stopped by SIGTERM" in text and "saved; the same command goes on from here" in text, text[-3000:]
    assert running.load_checkpoint(folder / "run" / "last.pt")["step"] >= 1
    assert forked.left(process.pid, seconds=120) == []


def test_a_second_run_in_a_running_folder_is_refused_until_the_first_has_gone(folder):
    """The first run is not disturbed. After it is killed, neither it nor its decoding processes keep the next
    one out."""
    settings = [*SETTINGS, *LONG, "data.workers=2"]
    process = forked.start("train.py", settings, folder, folder / "log-first")
    metrics = folder / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, process)
    line = error(run(folder, *LONG, "data.workers=2", code=2))
    assert f"run is in use by process {process.pid} on " in line and "choose another --out" in line
    before = metrics.stat().st_size
    until(lambda: metrics.stat().st_size > before, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    text = run(folder, *LONG, before=StopAtOnce(), code=128 + signal.SIGTERM)
    assert "in use" not in text and "saved; the same command goes on" in text
    forked.left(process.pid, seconds=120)


@dataclasses.dataclass
class StopAtOnce:
    """Sends a run SIGTERM within its first step."""

    def __call__(self):
        term = losses.robust_xid

        def robust_xid(*arguments, **options):
            signal.raise_signal(signal.SIGTERM)
            return term(*arguments, **options)

        losses.robust_xid = robust_xid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_decoding_process_outlives_an_evaluation(folder, undisturbed, number):
    arguments = [
        *SETTINGS,
        "--ckpt",
        str(undisturbed / "run" / "last.pt"),
        "data.workers=2",
        "eval.clips=200",
        "eval.batch_size=200",
    ]
    process = forked.start("eval_linear.py", arguments, folder, folder / "log")
    until(lambda: len(forked.group(process.pid)) >= 3, process)
    time.sleep(0.2)  # right after a fork Python runs hooks, in which a Ctrl-C is lost
    os.killpg(process.pid, number)
    assert wait_for_end(process, folder)[0] in (-number, 128 + number)
    assert not list(folder.glob("run/features/*"))


def fail_at_the_fourth_step():
    """An unforeseen error, such as one of the device, while decoding processes wait for work."""
    term, calls = losses.robust_xid, []

    def robust_xid(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return term(*arguments, **options)

    losses.robust_xid = robust_xid


def test_an_unforeseen_error_ends_the_program(folder):
    process = forked.start(
        "train.py",
        [*SETTINGS, *LONG, "data.workers=2"],
        folder,
        folder / "log",
        before=fail_at_the_fourth_step,
    )
    code, text = wait_for_end(process, folder)
    assert code == 1 and "RuntimeError: out of memory" in text


# ------------------------------------------------------------------------------- shared memory, descriptors


@dataclasses.dataclass
class SharedMemoryOf:
    """Gives a process its own /dev/shm of this size. Docker gives 64 MB."""

    size: str

    def __call__(self):
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS: no other process sees these mounts
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", "/dev/shm"], check=True)


@pytest.mark.parametrize("size", ["256k", "2m"])
def test_a_small_shared_memory_ends_the_run_with_one_line_that_says_what_to_lower(folder, size):
    """Too small for a batch, or for the batches that wait."""
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    tried = subprocess.run(mount, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"this user may not mount a small /dev/shm: {tried.stderr.strip()}")
    large = ["video.frames=16", "video.size=96", "optim.batch_size=8", "data.workers=2"]
    line = error(run(folder, *LONG, *large, before=SharedMemoryOf(size), code=2))
    assert "/dev/shm" in line and "lower data.workers or optim.batch_size" in line


@dataclasses.dataclass
class FilesOpenAtMost:
    """Limits the open files of a process. It may raise the limit up to `hard`."""

    soft: int
    hard: int

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.soft, self.hard))


def test_few_descriptors_end_the_run_with_one_line_that_says_what_to_lower(folder):
    few = ["data.workers=4", "optim.epochs=1", "log.check_epochs=0"]
    line = error(run(folder, *few, before=FilesOpenAtMost(96, 96), code=2))
    assert "data.workers=4 takes up to " in line and ", 96 are allowed: " in line and "ulimit -n" in line


def test_the_limit_of_descriptors_is_raised_if_possible(folder):
    enough = ["data.workers=4", "optim.epochs=1", "log.check_epochs=0"]
    run(folder, *enough, before=FilesOpenAtMost(96, 1024))


# ------------------------------------------------------------------------------------------------------- disk


@dataclasses.dataclass
class FilesOfAtMost:
    """Limits the size of a file that a process writes, in bytes, as a full disk does."""

    size: int

    def __call__(self):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(folder, undisturbed):
    run(folder, *FOUR, "optim.epochs=2")
    before = (folder / "run" / "last.pt").read_bytes()
    text = run(folder, *FOUR, before=FilesOfAtMost(len(before) // 2), code=2)
    assert error(text).startswith("error: cannot write run/last.pt: File too large; make room on the disk")
    assert (folder / "run" / "last.pt").read_bytes() == before
    assert not list(folder.glob("run/*.part"))
    run(folder, *FOUR)
    assert kill.differences(kill.outcome(undisturbed), kill.outcome(folder)) == []


class InProcess(running.Folder):
    """A run folder with its table and state, ready to be resumed."""

    def __init__(self, cfg, table, state):
        super().__init__(cfg, distributed.World(0, 1, torch.device("cpu")))
        self.table, self.state = table, state
        self.out.mkdir(parents=True, exist_ok=True)

    def resume(self):
        return super().resume(self.table, **self.state)


def in_process(folder, videos=3, **options):
    """A run folder in this process, for a table of so many videos."""
    cfg = config.load("toy", [f"out={folder / 'run'}"])
    names = [f"{i}.mp4" for i in range(videos)]
    table = dataclasses.make_dataclass(
        "Table", ["paths", "start_s", "end_s"], namespace={"__len__": lambda self: len(self.paths)}
    )
    table = table(options.get("names", names), np.zeros(videos), np.full(videos, np.inf))
    network, bank = (torch.nn.Linear(2, 2) for _ in range(2))
    state = {"network": network, "bank": bank, "optimizer": torch.optim.Adam(network.parameters())}
    return InProcess(cfg, table, state)


def test_a_log_that_cannot_be_written_ends_the_run(tmp_path):
    run = in_process(tmp_path)
    run.metrics = Path("/dev/full")
    with pytest.raises(
        running.CheckpointError,
        match="cannot write /dev/full: No space left on device; make room on the disk",
    ):
        run.log(1, 0.5, loss=1.0)


def test_a_curve_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    run = in_process(tmp_path)
    run.resume()
    run.log(1, 0.5, loss=1.0)
    (tmp_path / "run" / "curves.png").mkdir()
    run.draw_curves()
    assert (
        f"warning: cannot write {tmp_path / 'run' / 'curves.png'}: Is a directory; training goes on"
        in capsys.readouterr().out
    )


def test_a_run_folder_that_became_read_only_is_an_error(tmp_path):
    run = in_process(tmp_path)
    run.resume()
    (tmp_path / "run").chmod(0o555)
    try:
        if os.access(tmp_path / "run", os.W_OK):
            pytest.skip("this user (root) may write everywhere, whatever the permissions")
        with pytest.raises(
            running.CheckpointError, match=r"cannot write .*last.pt: Permission denied; make it writable"
        ):
            run.save(1)
    finally:
        (tmp_path / "run").chmod(0o755)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_after_a_damaged_checkpoint_the_previous_one_is_used(folder, undisturbed):
    run(folder, *FOUR)
    last = folder / "run" / "last.pt"
    content = bytearray(last.read_bytes())
    # a thousand flipped bits, because the padding between small records is not read
    for at in range(len(content) // 2, len(content) // 2 + 1000):
        content[at] ^= 1
    last.write_bytes(content)
    text = run(folder, *FOUR)
    assert "run/last.pt: it is damaged" in text and "going on from run/last.previous.pt" in text
    assert "resuming run after step 6" in text  # of 8; one checkpoint an epoch
    assert kill.differences(kill.outcome(undisturbed), kill.outcome(folder)) == []


def test_two_damaged_checkpoints_never_restart_the_run(folder):
    run(folder, *FOUR)
    for name in ("last.pt", "last.previous.pt"):
        (folder / "run" / name).write_bytes(b"")
    log = (folder / "run" / "metrics.jsonl").read_bytes()
    line = error(run(folder, *FOUR, code=2))
    assert (
        "last.pt: it is damaged" in line
        and "last.previous.pt: it is damaged" in line
        and "choose another --out" in line
    )
    assert (folder / "run" / "metrics.jsonl").read_bytes() == log


def test_a_log_that_lost_lines_is_reported_and_continued(tmp_path, capsys):
    first = in_process(tmp_path)
    first.resume()
    for step in (1, 2):
        first.log(step, step / 2, loss=1.0)
    first.save(2)
    first.metrics.write_bytes(first.metrics.read_bytes()[:-5])  # in the middle of the second line
    assert in_process(tmp_path).resume() == 2
    assert "metrics.jsonl has lost lines" in capsys.readouterr().out
    assert first.metrics.read_text().count("\n") == 1


def test_another_data_set_does_not_resume(tmp_path):
    run = in_process(tmp_path)
    run.resume()
    run.save(1)
    for other, message in (
        ({"videos": 2}, "a run on 3 videos, there are now 2"),
        ({"names": ["0.mp4", "1.mp4", "3.mp4"]}, "a run on as many videos under other names"),
    ):
        with pytest.raises(config.ConfigError) as caught:
            in_process(tmp_path, **other).resume()
        assert message in str(caught.value) and "choose another --out" in str(caught.value)


def test_a_checkpoint_of_something_else_does_not_resume(tmp_path):
    running.save_checkpoint(tmp_path / "run" / "last.pt", {"model": {}, "optimizer": {}})
    with pytest.raises(
        config.ConfigError, match=r"last\.pt is no checkpoint of this program, it lacks config"
    ):
        in_process(tmp_path).resume()


# ------------------------------------------------------------------------------------------------------ ranks


def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double


def ranks(folder, *overrides, before=None):
    """Start two ranks as torchrun does. Their output goes to log-0 and log-1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        forked.start(
            "train.py", [*SETTINGS, *overrides], folder, folder / f"log-{rank}",
            {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, before,
        )
        for rank in range(2)
    ]  # fmt: skip


def test_another_number_of_processes_workers_and_epochs_gives_the_same_result(folder):
    """In float64, because ranks add in another order."""
    run(folder, *FOUR, "out=one", before=in_float64)
    run(folder, *FOUR, "out=two", "optim.epochs=2", before=in_float64)
    processes = ranks(folder, *FOUR, "out=two", "data.workers=1", before=in_float64)
    for rank, process in enumerate(processes):
        process.join(300)
        assert process.exitcode == 0, (folder / f"log-{rank}").read_text()[-3000:]
    assert "resuming two after step 4" in (folder / "log-0").read_text()
    one, two = (running.load_checkpoint(folder / name / "last.pt") for name in ("one", "two"))
    for part in ("bank", "network"):
        for name, value in one[part].items():
            torch.testing.assert_close(
                value, two[part][name], atol=1e-7, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(folder, killed):
    processes = ranks(folder, *LONG)
    metrics = folder / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, processes[0])
    os.kill(processes[killed].pid, signal.SIGKILL)
    other = processes[1 - killed]
    other.join(300)
    text = (folder / f"log-{1 - killed}").read_text()
    assert other.exitcode == 1, text[-3000:]
    assert error(text).startswith(f"error: rank {1 - killed} ends, as another one has gone")
    for process in processes:
        assert forked.left(process.pid, seconds=120) == []
