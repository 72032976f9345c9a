"""A checkpoint is the old or the new one, never a part; flipped bits are noticed; any other file is refused
in one line.
"""

import errno
import hashlib
import os
import pickle
import random
import signal
import time
import traceback

import pytest
import torch

from avid import files, run
from avid.run import CheckpointError

STATE = {
    "network": {"weight": torch.arange(6.0).view(2, 3)},
    "step": 7,
    "config": {"seed": 1, "out": "runs/ü"},
    "list": [1.5, None],
}


DAMAGED = "it is damaged, cut off or something else"


def complaint(path):
    with pytest.raises(CheckpointError) as caught:
        run.load_checkpoint(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 250
    return text


def test_a_saved_checkpoint_loads_unchanged(tmp_path):
    path = tmp_path / "runs" / "new" / "last.pt"
    run.save_checkpoint(path, STATE)
    loaded = run.load_checkpoint(path)
    assert torch.equal(loaded["network"]["weight"], STATE["network"]["weight"])
    assert {k: v for k, v in loaded.items() if k != "network"} == {
        k: v for k, v in STATE.items() if k != "network"
    }
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_a_checkpoint_loads_without_running_code(tmp_path):
    run.save_checkpoint(tmp_path / "last.pt", STATE)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 7


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("at", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, at, fault):
    path = tmp_path / "last.pt"
    run.save_checkpoint(path, STATE)
    before = path.read_bytes()

    def crash(*arguments):
        if at == "torch.save":
            arguments[1].write(b"half")
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(torch if at == "torch.save" else os, at.partition(".")[2], crash)
        with pytest.raises((KeyboardInterrupt, CheckpointError)) as caught:
            run.save_checkpoint(path, {"step": 8})
    if caught.type is CheckpointError:
        assert str(caught.value).startswith(
            f"cannot write {path}: No space left on device; make room on the disk"
        )
    assert path.read_bytes() == before
    run.save_checkpoint(path, {"step": 9})  # the partial file of the crash does no harm
    assert run.load_checkpoint(path) == {"step": 9}
    assert run.previous(path).read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.previous.pt", "last.pt"]


def test_a_full_disk_leaves_the_old_file_and_takes_no_room(tmp_path):
    """/dev/full accepts no bytes, and torch.save's own error would hide the disk's."""
    path = tmp_path / "last.pt"
    run.save_checkpoint(path, STATE)
    before = path.read_bytes()
    (tmp_path / "last.pt.part").symlink_to("/dev/full")
    with pytest.raises(
        CheckpointError, match=f"cannot write {path}: No space left on device; make room on the disk"
    ):
        run.save_checkpoint(path, {"weight": torch.zeros(300_000)})
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"] and path.read_bytes() == before


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_at_any_moment_leaves_one_whole_checkpoint(tmp_path, monkeypatch, moment):
    """A kill before the first, second, … rename in the folder, and after the last."""
    path = tmp_path / "last.pt"
    run.save_checkpoint(path, {"step": 1})
    run.save_checkpoint(path, {"step": 2})

    class Killed(BaseException):
        pass

    replace, changes = os.replace, []

    def count(*names):
        if len(changes) == moment:
            raise Killed
        changes.append(names)
        replace(*names)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        try:
            run.save_checkpoint(path, {"step": 3})
        except Killed:
            pass
        else:
            assert moment >= len(changes)
    state, remark = run.newest(path)
    assert state == ({"step": 2}, {"step": 2}, {"step": 3}, {"step": 3})[moment]
    assert remark == (
        f"no checkpoint {path}; going on from {tmp_path / 'last.previous.pt'}" if moment == 1 else ""
    )
    run.save_checkpoint(path, {"step": 4})
    assert run.newest(path) == ({"step": 4}, "")


def children(count, work):
    """Fork `count` processes that call work(number); returns their ids. After an exception the exit code is
    1.
    """
    pids = []
    for number in range(count):
        if not (pid := os.fork()):
            try:
                work(number)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        pids.append(pid)
    return pids


def test_processes_that_write_the_same_file_take_turns(tmp_path):
    """As when several evaluations of one checkpoint run at once: a reader finds a whole file, and no writer
    fails.
    """
    path = tmp_path / "features.npz"

    def write(number):
        for turn in range(40):
            content = bytes([number]) * (50_000 + 1000 * turn)
            with files.replacing(path, "wb") as file:
                file.write(content[:100])
                file.flush()
                file.write(content[100:])

    pids, seen = children(4, write), set()
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            assert status == 0
            pids.remove(pid)
        if path.exists():
            content = path.read_bytes()
            assert len(content) >= 50_000 and len(set(content)) == 1
            seen.add(content[0])
    assert len(seen) > 1 and os.listdir(tmp_path) == ["features.npz"]


def test_the_partial_file_of_an_interrupted_writer_is_overwritten(tmp_path):
    (tmp_path / "a.json.part").write_text("half of something that was longer than what comes now")
    with files.replacing(tmp_path / "a.json") as file:
        file.write("{}")
    assert (tmp_path / "a.json").read_text() == "{}" and os.listdir(tmp_path) == ["a.json"]


def test_a_lock_is_held_by_one_process_and_the_error_names_it(tmp_path):
    held = files.lock(tmp_path / "last.pt", "runs/a")
    codes = []

    def other(number):
        with pytest.raises(
            files.ConfigError, match=rf"^runs/a is in use by process {os.getppid()} on .* since "
        ):
            files.lock(tmp_path / "last.pt", "runs/a")
        files.lock(tmp_path / "another.pt", "runs/a")

    for pid in children(1, other):
        codes.append(os.waitpid(pid, 0)[1])
    held.close()
    for pid in children(1, lambda _: files.lock(tmp_path / "last.pt", "runs/a")):
        codes.append(os.waitpid(pid, 0)[1])
    assert codes == [0, 0]


def test_a_folder_is_free_as_soon_as_its_command_is_killed_whatever_processes_that_has_left(tmp_path):
    reader, writer = os.pipe()

    def command(_):
        with files.alone(tmp_path):
            if not (pid := os.fork()):  # as a data loader's process: it lives on for a while
                time.sleep(60)
            os.write(writer, pid.to_bytes(4, "little"))
            os.kill(os.getpid(), signal.SIGKILL)

    (killed,) = children(1, command)
    orphan = int.from_bytes(os.read(reader, 4), "little")
    assert os.waitpid(killed, 0)[1] == signal.SIGKILL and os.listdir(tmp_path) == [files.LOCK]
    os.kill(orphan, 0)  # it is there
    with files.alone(tmp_path):
        (other,) = children(1, lambda _: refused(tmp_path))
        assert os.waitpid(other, 0)[1] == 0
    os.kill(orphan, signal.SIGKILL)
    assert not os.listdir(tmp_path)


def refused(folder):
    with pytest.raises(files.ConfigError, match="another command is writing"):
        enter(folder)


def enter(folder):
    with files.alone(folder):
        pass


def test_a_file_system_without_locks_is_used_without_a_lock(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", no_locks)
    assert files.lock(tmp_path / "last.pt", "runs/a") is None
    enter(tmp_path)
    with files.replacing(tmp_path / "a.json") as file:
        file.write("{}")
    assert (tmp_path / "a.json").read_text() == "{}"


def test_a_missing_checkpoint_is_named(tmp_path):
    assert complaint(tmp_path / "none.pt") == f"no checkpoint {tmp_path / 'none.pt'}"


def test_garbage_is_refused(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"not a checkpoint\n" * 9,
        "bytes": bytes(range(256)) * 9,
        "zip": b"PK\x03\x04" + bytes(99),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert complaint(tmp_path / name) == f"cannot read the checkpoint {tmp_path / name}: {DAMAGED}"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, share):
    run.save_checkpoint(tmp_path / "last.pt", STATE)
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * share)])
    assert complaint(tmp_path / "cut.pt").endswith(DAMAGED)


def test_flipped_bits_are_noticed_wherever_they_are(tmp_path):
    """Except between the records, where nothing is stored. torch.load alone would read most of them as other
    numbers.
    """
    state = {**STATE, "bank": torch.linspace(-1, 1, 5000)}
    path, bad = tmp_path / "last.pt", tmp_path / "bad.pt"
    run.save_checkpoint(path, state)
    content, rng, unnoticed = path.read_bytes(), random.Random(0), 0
    for at in [rng.randrange(len(content)) for _ in range(150)] + list(range(0, 100)) + list(range(-100, 0)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.randrange(8)
        bad.write_bytes(flipped)
        try:
            loaded = run.load_checkpoint(bad)
        except CheckpointError as error:
            assert isinstance(error, run.Damaged) and DAMAGED in str(error)
            continue
        unnoticed += 1
        assert torch.equal(loaded.pop("bank"), state["bank"]), at
        assert torch.equal(loaded.pop("network")["weight"], STATE["network"]["weight"]), at
        assert loaded == {k: v for k, v in STATE.items() if k != "network"}, at
    assert unnoticed < 100


def test_torch_does_not_notice_flipped_bits_in_numbers(tmp_path):
    """If it did, the check in load_checkpoint would not be needed."""
    torch.save({"bank": torch.zeros(5000)}, tmp_path / "last.pt")
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[len(content) // 2] ^= 64
    (tmp_path / "last.pt").write_bytes(content)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["bank"].abs().max() > 0
    assert complaint(tmp_path / "last.pt").endswith(DAMAGED)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else b"" if how == "empty" else content)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_replaced_by_the_previous_one(tmp_path, how):
    path, before = tmp_path / "last.pt", tmp_path / "last.previous.pt"
    for step in (1, 2):
        run.save_checkpoint(path, {"step": step, "bank": torch.zeros(1000)})
    damage(path, how)
    state, remark = run.newest(path, owner=False)  # without ownership it only reads
    assert state["step"] == 1 and path.exists()
    state, remark = run.newest(path)
    assert state["step"] == 1
    assert remark == (
        f"cannot read the checkpoint {path}: {DAMAGED}, it is now {tmp_path / 'last.damaged.pt'}; "
        f"going on from {before}"
    )
    run.save_checkpoint(path, {"step": 2})  # the damaged one does not replace the whole one
    assert run.load_checkpoint(before)["step"] == 1 and run.newest(path) == ({"step": 2}, "")


def test_a_run_without_a_whole_checkpoint_does_not_start_over(tmp_path):
    path = tmp_path / "last.pt"
    assert run.newest(path) == (None, "")
    run.save_checkpoint(path, STATE)
    damage(path, "flipped")
    with pytest.raises(
        CheckpointError, match=rf"^cannot read .*; no checkpoint {run.previous(path)}; restore one"
    ):
        run.newest(path)
    damage(path, "cut")
    run.previous(path).write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"last.pt: it is damaged.*previous.pt: it is damaged.*or choose another --out"
    ):
        run.newest(path)
    # both files are still there
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.previous.pt", "last.pt"]


def test_an_unreadable_checkpoint_is_not_treated_as_damaged(tmp_path):
    """Such as a folder, or a file without read permission: it may hold the newest steps."""
    run.save_checkpoint(tmp_path / "last.previous.pt", STATE)
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        run.newest(tmp_path / "last.pt")


def test_an_input_output_error_counts_as_damage(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    for step in (1, 2):
        run.save_checkpoint(path, {"step": step})
    read = torch.load

    def broken(name, **options):
        if name == path:
            raise OSError(errno.EIO, "Input/output error")
        return read(name, **options)

    monkeypatch.setattr(torch, "load", broken)
    state, remark = run.newest(path)
    assert state == {"step": 1} and f"last.pt: {DAMAGED}" in remark


def test_a_folder_is_refused(tmp_path):
    assert complaint(tmp_path).endswith(": Is a directory")


class Dangerous:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("write", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"network": Dangerous()}, tmp_path / "bad.pt")
    assert "it asks for posix.mkdir, and no code is run from a file" in complaint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_must_be_a_dict(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert (
        complaint(tmp_path / "tensor.pt")
        == f"cannot read the checkpoint {tmp_path / 'tensor.pt'}: it holds a Tensor, not a dict"
    )


def test_the_hash_depends_on_the_content(tmp_path):
    content = os.urandom(3 << 20)  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert files.file_hash(tmp_path / "a") == hashlib.sha256(content).hexdigest()[:12]
    (tmp_path / "b").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files.file_hash(tmp_path / "a") != files.file_hash(tmp_path / "b")


def test_the_same_state_has_the_same_hash(tmp_path):
    for name in ("a.pt", "b.pt"):
        run.save_checkpoint(tmp_path / name, STATE)
    assert files.file_hash(tmp_path / "a.pt") == files.file_hash(tmp_path / "b.pt")
