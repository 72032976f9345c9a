"""Files that are whole or not there at all, whatever interrupts their writing.

In: a path and what to write. Out: the file under its name, never half of it; one line of reason where that
cannot be.
"""

import contextlib
import hashlib
import os
from pathlib import Path


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that says which and what to do."""

    def __init__(self, message):
        super().__init__(str(message).replace("\n", "\\n"))  # what was given may have several


@contextlib.contextmanager
def replacing(path, mode="w", **options):
    """Open `path`.part for writing; at the end it takes the place of `path`, on disk and whole. After an
    error `path` is as it was.

    mode: "w" (UTF-8) or "wb"; options: of `open`. Folders are made as needed. Raises OSError.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8"}
    try:
        with open(part, mode, **text | options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(
            OSError
        ):  # a full disk needs the room; the error that is raised says what happened
            part.unlink()
        raise


def check_folder(out):
    """Raise ConfigError where files cannot be written into the folder `out`, which need not exist."""
    out = Path(out)
    try:
        nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
        usable = os.access(nearest, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # too long a name, a NUL
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"cannot write into {str(out)!r}: {reason}; choose another folder") from None
    if not nearest.is_dir():
        raise ConfigError(f"cannot write into {out}: {nearest} is a file; choose another folder")
    if not usable:
        raise ConfigError(
            f"cannot write into {out}: no permission to write into {nearest}; choose another folder"
        )


def file_hash(path):
    """The first 12 hex digits of the file's SHA-256: names a checkpoint in results."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]
