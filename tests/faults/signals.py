"""Rows 22 and 23: Ctrl-C and SIGTERM on the command line, and two runs in one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dmc_hub import checkpoint
from tests.faults.cases import Case, must
from tests.faults.small import planner

ROOT = Path(__file__).resolve().parents[2]
ALIGN = ["align", "--task", "nav1d-full", "--controller", "policy", "--training-scale", "0.05", "--max-passes", "1"]
ALIGN += ["--num-evaluation-episodes", "4", "--num-validation-episodes", "4"]


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """A command of `dmc-hub` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dmc_hub.cli", *argv]
    log = (folder / "log").open("a")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)


def train_command(folder: Path) -> list[str]:
    """Training of a single method that would take long."""
    pipeline = folder / "pipeline"
    if not pipeline.is_dir():
        planner().save_pretrained(pipeline)
    command = ["train-sft", "--task", "nav1d-full", "--pipeline", str(pipeline), "--output-dir", str(folder / "run")]
    command += ["--max-steps", "100000", "--save-strategy", "steps", "--save-steps", "20", "--save-total-limit", "2"]
    return [
        *command,
        "--resume-from-checkpoint",
        "auto",
        "--per-device-train-batch-size",
        "16",
        "--num-conditions",
        "16",
    ]


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not list(folder.glob(pattern)):
        must(process.poll() is None, f"it ended with {process.poll()}", folder / "log")
        must(time.monotonic() < end, f"there is no {pattern}", folder / "log")
        time.sleep(0.02)


def one_signal(number: int, what: str, folder: Path) -> None:
    """The step is finished, a checkpoint written, the exit code says which signal; and the run goes on from there."""
    command, run = (
        (train_command(folder), "run")
        if what == "train"
        else ([*ALIGN, "--output-dir", str(folder / "run")], "run/unfinished/foundation")
    )
    process = start(folder, *command)
    wait_for(folder, f"{run}/checkpoint-*", process)
    before = max(int(path.name.rpartition("-")[2]) for path in checkpoint.checkpoints(folder / run))
    time.sleep(0.1)
    process.send_signal(number)
    begin = time.monotonic()
    code = process.wait(30)
    must(time.monotonic() - begin <= 10, "it took more than 10 s")
    must(code == 128 + number, f"it ended with {code}", folder / "log")
    text = (folder / "log").read_text()
    must("Traceback" not in text and "Stopped at step" in text, "no one line", folder / "log")
    newest = checkpoint.latest_checkpoint(folder / run)
    if newest is None:  # the stage was over in that moment
        must(what == "align", "no checkpoint is left")
        return
    must(int(newest.name.rpartition("-")[2]) >= before, "work was lost")


def two_signals(folder: Path) -> None:
    """A second Ctrl-C ends it at once."""
    process = start(folder, *train_command(folder))
    wait_for(folder, "run/checkpoint-*", process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    code = process.wait(30)
    must(code in (130, -signal.SIGINT) and time.monotonic() - begin < 10, f"it ended with {code}")
    must(checkpoint.latest_checkpoint(folder / "run") is not None, "no checkpoint is left")


def two_runs(what: str, folder: Path) -> None:
    """The second is refused while the first is at work, with its process id, and the first is left alone."""
    command = train_command(folder) if what == "train" else [*ALIGN, "--output-dir", str(folder / "run")]
    first = start(folder, *command)
    try:
        wait_for(folder, "run/.lock", first)
        time.sleep(0.2)
        (folder / "second").mkdir()
        second = start(folder / "second", *command)
        must(second.wait(120) == 2, f"the second ended with {second.returncode}", folder / "second" / "log")
        text = (folder / "second" / "log").read_text()
        must(f"is in use by process {first.pid} on" in text and "Traceback" not in text, text)
        must(first.poll() is None, f"the first ended with {first.poll()}", folder / "log")
    finally:
        first.kill()
        first.wait()
    third = start(folder, *command)  # the lock of a dead process holds nobody up
    try:
        time.sleep(0.5)
        wait_for(folder, "run/.lock", third)
        time.sleep(3.0)
        must(third.poll() is None, f"the third ended with {third.poll()}", folder / "log")
    finally:
        third.kill()
        third.wait()


def without_resuming(folder: Path) -> None:
    """A folder with checkpoints is not begun anew."""
    process = start(folder, *train_command(folder))
    wait_for(folder, "run/checkpoint-*", process)
    process.kill()
    process.wait()
    command = [word for word in train_command(folder) if word not in ("--resume-from-checkpoint", "auto")]
    again = start(folder, *command)
    must(again.wait(120) == 2, f"it ended with {again.returncode}")
    must("already holds checkpoint-" in (folder / "log").read_text(), "another message", folder / "log")


def cases(quick: bool) -> Iterator[Case]:
    """Of both rows."""
    for number in (signal.SIGINT, signal.SIGTERM):
        for what in ("train", "align"):
            yield Case(22, f"{number.name}, {what}", partial(one_signal, int(number), what))
    yield Case(22, "SIGINT twice", two_signals)
    for what in ("train", "align"):
        yield Case(23, f"two runs, {what}", partial(two_runs, what))
    yield Case(23, "without --resume", without_resuming)
