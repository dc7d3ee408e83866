"""What a case of the fault matrix is, and processes to try it in.

Each row's module lists its cases; the tests of this folder run a selection of them, `scripts/soak.py` all.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tally:
    """How often a fault was tried, and how often what happened then was what should."""

    tried: int
    passed: int
    detail: str = ""


@dataclass(frozen=True)
class Case:
    """`run(folder)` tries a fault in an empty folder: it raises if what happens is wrong, or counts."""

    row: int
    name: str
    run: Callable[[Path], Tally | None]


def fork(work: Callable[[], object], log: Path) -> int:
    """Run `work` in a child with its output in `log`; returns the child's process id. 0 is its exit code if it returns,
    1 if it raises."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """The exit code of a child, negative for a signal; None if it has not ended in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def must(condition: bool, message: str, log: Path | None = None) -> None:
    """Raise with the end of a child's output unless `condition` holds."""
    if not condition:
        tail = "" if log is None or not log.is_file() else "\n" + log.read_text(errors="replace")[-3000:]
        raise AssertionError(message + tail)


def run_in_child(work: Callable[[], None], folder: Path, seconds: float = 300.0) -> None:
    """Run `work` in a child; raise if it fails or does not end."""
    log = folder / "child.log"
    process = fork(work, log)
    code = wait(process, seconds)
    if code is None:
        os.kill(process, 9)
        os.waitpid(process, 0)
    must(code == 0, f"the child ended with {code}", log)


def peak_bytes() -> int:
    """The most memory this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
