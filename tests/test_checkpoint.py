"""Checkpoints are the old one or the new one, never a part; what is none is refused in one line."""

import hashlib
import os
import pickle

import pytest
import torch

from avid import checkpoint
from avid.checkpoint import CheckpointError

STATE = {
    "network": {"weight": torch.arange(6.0).view(2, 3)},
    "step": 7,
    "config": {"seed": 1, "out": "runs/ü"},
    "list": [1.5, None],
}


DAMAGED = "it is damaged, cut off or something else"


def complaint(path):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 250
    return text


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "runs" / "new" / "last.pt"
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["network"]["weight"], STATE["network"]["weight"])
    assert {k: v for k, v in loaded.items() if k != "network"} == {k: v for k, v in STATE.items() if k != "network"}
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]


def test_it_loads_without_running_code(tmp_path):
    checkpoint.save(tmp_path / "last.pt", STATE)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 7


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("No space left on device")])
@pytest.mark.parametrize("at", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch, at, fault):
    path = tmp_path / "last.pt"
    checkpoint.save(path, STATE)
    before = path.read_bytes()

    def crash(*arguments):
        if at == "torch.save":
            arguments[1].write(b"half")
        raise fault

    with monkeypatch.context() as patch:
        patch.setattr(torch if at == "torch.save" else os, at.partition(".")[2], crash)
        with pytest.raises((KeyboardInterrupt, OSError)):
            checkpoint.save(path, {"step": 8})
    assert path.read_bytes() == before
    checkpoint.save(path, {"step": 9})  # the rest of the crash is in nobody's way
    assert checkpoint.load(path) == {"step": 9}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_missing_file(tmp_path):
    assert complaint(tmp_path / "none.pt") == f"no checkpoint {tmp_path / 'none.pt'}"


def test_garbage(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"not a checkpoint\n" * 9,
        "bytes": bytes(range(256)) * 9,
        "zip": b"PK\x03\x04" + bytes(99),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert complaint(tmp_path / name) == f"cannot read the checkpoint {tmp_path / name}: {DAMAGED}"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(tmp_path, share):
    checkpoint.save(tmp_path / "last.pt", STATE)
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: int(len(content) * share)])
    assert complaint(tmp_path / "cut.pt").endswith(DAMAGED)


def test_a_folder(tmp_path):
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


def test_what_is_no_dict_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert (
        complaint(tmp_path / "tensor.pt") == f"cannot read the checkpoint {tmp_path / 'tensor.pt'}: it holds a Tensor, not a dict"
    )


def test_the_hash_names_the_content(tmp_path):
    content = os.urandom(3 << 20)  # more than a block
    (tmp_path / "a").write_bytes(content)
    assert checkpoint.file_hash(tmp_path / "a") == hashlib.sha256(content).hexdigest()[:12]
    (tmp_path / "b").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint.file_hash(tmp_path / "a") != checkpoint.file_hash(tmp_path / "b")


def test_the_same_state_has_the_same_hash(tmp_path):
    for name in ("a.pt", "b.pt"):
        checkpoint.save(tmp_path / name, STATE)
    assert checkpoint.file_hash(tmp_path / "a.pt") == checkpoint.file_hash(tmp_path / "b.pt")
