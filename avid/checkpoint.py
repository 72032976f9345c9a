"""Checkpoints: written whole or not at all, read without running code from the file.

In: a dict of state dicts, tensors, numbers and strings.
Out: the same, after any interruption.
"""

import hashlib
import os
import re
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line that names the file."""


def save(path, state):
    """Write `state` to `path` atomically: a reader finds the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path, device="cpu"):
    """The dict saved at `path`. Raises CheckpointError where the file is missing or is no checkpoint."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except Exception as error:  # torch.load has no exception of its own, and its advice is to trust the file
        asked = re.search(r"GLOBAL (\S+)", str(error))
        fault = f"it asks for {asked[1]}, and no code is run from a file" if asked else "it is damaged, cut off or something else"
        raise CheckpointError(f"cannot read the checkpoint {path}: {fault}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read the checkpoint {path}: it holds a {type(state).__name__}, not a dict")
    return state


def file_hash(path):
    """The first 12 hex digits of the file's SHA-256: names a checkpoint in results."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]
