"""Files that are whole or not there at all, whatever interrupts their writing; files kept for one process.

In: a path and what to write. Out: the file under its name, never half of it; one line of reason where that
cannot be.
"""

import contextlib
import fcntl
import hashlib
import os
import socket
import time
import unicodedata
from pathlib import Path

LOCK = ".lock"  # a file in a folder that a command is writing


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one line that says which and what to do."""

    def __init__(self, message):
        super().__init__(str(message).replace("\n", "\\n"))  # what was given may have several


@contextlib.contextmanager
def replacing(path, mode="w", **options):
    """Open `path`.part for writing; at the end it takes the place of `path`, on disk and whole. After an
    error `path` is as it was.

    mode: "w" (UTF-8) or "wb"; options: of `open`. Folders are made as needed. Processes that write the same
    file take turns. Raises OSError.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {} if "b" in mode else {"encoding": "utf-8"}
    with _open_alone(part, mode, **text | options) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            # a full disk needs the room; the error that is raised says what happened
            with contextlib.suppress(OSError):
                part.unlink()
            raise


def _open_alone(part, mode, wait=True, **options):
    """`part`, open and empty, once no other process writes it (where the file system knows no locks: at
    once). BlockingIOError where another does and this one is not to wait."""
    while True:
        file = open(
            part, mode, opener=lambda name, flags: os.open(name, flags & ~os.O_TRUNC, 0o666), **options
        )
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # no locks there
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                break
        file.close()  # what the other process wrote is in its place now
    with contextlib.suppress(OSError):  # of a device, such as /dev/full
        file.truncate(0)
    return file


def lock(path, name):
    """Keep `path`, which need not exist, for this process until it ends: the kernel lets go, however that
    happens.

    The lock is on the file .<path>.lock beside it. It is of the kind (POSIX) that child processes do not
    inherit, so that none of a killed process's keeps it. → the file, to be kept open; None where the file
    system knows no locks, such as NFS without a lock service. ConfigError where another process has it; name:
    what the message calls it.
    """
    path = Path(path)
    file = open(path.with_name(f".{path.name}.lock"), "a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ConfigError(
            f"{name} is in use by {holder}; wait for it, stop it, or choose another --out"
        ) from None
    except OSError:
        return None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    return file


@contextlib.contextmanager
def alone(folder):
    """Within, no other command writes into a folder; its file LOCK tells that. However this one ends, the
    kernel gives the folder free: the lock is of `lock`'s kind.

    ConfigError where another one does. Where the file system knows no locks, at once.
    """
    path = Path(folder) / LOCK
    try:
        file = _open_alone(path, "w", wait=False)
    except BlockingIOError:
        raise ConfigError(
            f"another command is writing into {folder}; wait for it, or name another one"
        ) from None
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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


def state(path):
    """Size and time of a file, in ns; None where it cannot be had, as of a link that leads nowhere."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns


def file_hash(path):
    """The first 12 hex digits of the file's SHA-256: names a checkpoint in results."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:12]


def printable(text):
    """A path, or any text, in one line that every terminal takes."""
    return "".join(c if c.isprintable() or _harmless(c) else ascii(c)[1:-1] for c in str(text))


def _harmless(c):
    """Joiners, which emoji and Persian need, and spaces of other widths, as in the names of screenshots."""
    return c in "\u200c\u200d" or unicodedata.category(c) == "Zs"
