"""One folder, one writer: its lock, and the room for what is about to be written."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from dmc_hub.errors import FolderInUseError, SaveError

LOCK_NAME = ".lock"
_held: dict[Path, int] = {}  # POSIX locks do not hold against the process that has them


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make this process the only writer of a folder, which is created; the system ends the lock with the process.

    The lock is a POSIX one on `.lock`, which names the process and its host, and is removed at the end. Children of the
    process do not inherit it.

    Raises:
        FolderInUseError: another process has it.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # which has no POSIX locks
        yield
        return
    path = folder / LOCK_NAME
    if _held.get(path) == os.getpid():
        raise FolderInUseError(f"`output_dir` {folder} is in use by another run of this process: wait for it.")
    descriptor = _lock(path)
    _held[path] = os.getpid()
    try:
        yield
    finally:
        del _held[path]
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FolderInUseError(
                f"`output_dir` {path.parent} is in use by {holder}: wait for it, stop it, or choose another folder."
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the holder before has removed it in between
    os.ftruncate(descriptor, 0)
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        facts = json.loads(os.read(descriptor, 1000))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def require_space(folder: str | os.PathLike[str], num_bytes: int) -> None:
    """Find out before something is written whether there is room for it.

    Args:
        folder: where it goes; need not exist.
        num_bytes: of all files together.

    Raises:
        SaveError: naming the folder, what is needed and what is free.
    """
    free = free_bytes(folder)
    if free < num_bytes:
        raise SaveError(
            f"`{folder}` needs {num_bytes:,} bytes, and its file system has {free:,} free: make room there. "
            "Nothing was written, and what was saved before is as it was."
        )


def save_error(folder: str | os.PathLike[str], error: Exception) -> SaveError:
    """What went wrong while something was written to a folder, with what is free there."""
    if isinstance(error, SaveError):
        return error
    return SaveError(
        f"`{folder}` cannot be written ({error}); its file system has {free_bytes(folder):,} bytes free. What was "
        "saved before is as it was."
    )


def free_bytes(folder: str | os.PathLike[str]) -> int:
    """Bytes that an ordinary user can still write to the file system of a folder, which need not exist."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
