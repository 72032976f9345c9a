"""Checkpoints: written whole or not at all, the one before kept, checked bit by bit, read without running code from the file.

In: a dict of state dicts, tensors, numbers and strings.
Out: the same, after any interruption.
"""

import contextlib
import errno
import hashlib
import os
import re
import zipfile
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line that names the file."""


class Damaged(CheckpointError):
    """A file whose content is not what was written."""


def previous(path):
    """Where `save` keeps the checkpoint that stood at `path` before: last.pt, last.previous.pt."""
    return Path(path).with_suffix(".previous.pt")


@contextlib.contextmanager
def writing(path):
    """Within, what keeps `path` from being written becomes a CheckpointError of one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        fault = error
        while fault and not isinstance(fault, OSError):  # torch.save hides the disk's error behind its own
            fault = fault.__context__
        if not fault:
            raise
        remedy = "make room on the disk" if fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "make it writable"
        raise CheckpointError(
            f"cannot write {path}: {fault.strerror or fault}; {remedy} and start the same command again, which goes on from the last checkpoint"
        ) from error


def save(path, state):
    """Write `state` to `path`; what stood there becomes `previous(path)`. At any moment one of the two is there and whole.

    Raises CheckpointError where it cannot be written; then both stay as they were.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk needs the room; the error that is on its way says what happened
                partial.unlink()
            raise
        if path.exists():
            os.replace(path, previous(path))
        os.replace(partial, path)


def load(path, device="cpu"):
    """The dict saved at `path`. Raises CheckpointError where the file is missing or is no checkpoint, Damaged where it was one."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    try:
        _check(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load has no exception of its own, and its advice is to trust the file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"it asks for {asked[1]}, and no code is run from a file" if asked else "it is damaged, cut off or something else"
        raise Damaged(f"cannot read the checkpoint {path}: {fault}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read the checkpoint {path}: it holds a {type(state).__name__}, not a dict")
    return state


def _check(path):
    """Compare every record with the CRC-32 that torch.save stores beside it: torch.load does not, and would read flipped bits."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's format before 1.6, without checksums: AVID-CMA's
            return
        with zipfile.ZipFile(file) as archive:
            if record := archive.testzip():
                raise zipfile.BadZipFile(f"{record} is damaged")


def newest(path, owner=True):
    """What a run at `path` goes on from: (state, remark), or (None, "") where nothing was saved yet.

    That is `path`, or `previous(path)` where the last one is damaged or missing; the remark then says so. owner: this process
    is the one that writes the run, and renames a damaged file, so that the next `save` does not put it in place of the whole
    one. Raises CheckpointError where there is something, but nothing whole: a run never begins anew by itself.
    """
    path = Path(path)
    before = previous(path)
    if not path.exists() and not before.exists():
        return None, ""
    try:
        return load(path), ""
    except CheckpointError as error:
        if path.exists() and not isinstance(error, Damaged):
            raise
        fault = str(error)
    try:
        state = load(before)
    except CheckpointError as error:
        raise CheckpointError(f"{fault}; {error}; restore one of them, or choose another --out to begin anew") from None
    aside = path.with_suffix(".damaged.pt")
    if owner and path.exists():
        with writing(path):
            os.replace(path, aside)
        fault += f", it is now {aside}"
    return state, f"{fault}; going on from {before}"


def file_hash(path):
    """The first 12 hex digits of the file's SHA-256: names a checkpoint in results."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]
