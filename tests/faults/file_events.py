"""Rows 2 and 6: at every file event of a run's saves the process is killed, or the call fails as on a full disk.

Run as a script, with file_events.so loaded before everything else, this file tries the events; each in a child.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dmc_hub import checkpoint
from dmc_hub.errors import SaveError
from tests.faults import kills
from tests.faults.cases import Case, Tally, fork, must, wait
from tests.trainers.test_base import RotationTrainer, make_trainer, state_of

KILL, TEAR, FAIL = 1, 2, 3
STEPS = 4
SAVING: dict[str, Any] = {"lora": True, "ema_decay": 0.9, "max_steps": STEPS, "save_steps": 1, "save_total_limit": 1}
ERRORS = {"no space": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT}


def library(folder: Path) -> Path | None:
    """The compiled file_events.c; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return None
    source, target = Path(__file__).with_name("file_events.c"), folder / "file_events.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", target, source, "-ldl"], check=True)
    return target


def under_events(scenario: str, folder: Path, every: int) -> Tally:
    """Run a scenario of this script; `every`-th event is tried."""
    compiled = library(folder)
    if compiled is None:
        return Tally(0, 0, "no C compiler")
    environment = {**os.environ, "LD_PRELOAD": str(compiled), "OMP_NUM_THREADS": "1", "CHAOS": str(compiled)}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "tests.faults.file_events", scenario, str(folder / "work"), str(every)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    must(done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return Tally(**json.loads(done.stdout.splitlines()[-1]))


# ---- In the process that has the library ----------------------------------------------------------------------


class Events:
    """The library's functions, in the process that it was loaded into."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(os.environ["CHAOS"])
        self.library.chaos_disarm.restype = ctypes.c_long
        self.library.chaos_kinds.restype = ctypes.c_char_p

    def arm(self, folder: Path, event: int, action: int, code: int = 0) -> None:
        self.library.chaos_arm(os.fsencode(folder), ctypes.c_long(event), action, code)

    def disarm(self) -> str:
        """The kinds of the events so far, a letter each."""
        self.library.chaos_disarm()
        return self.library.chaos_kinds().decode()


def _train(run: Path | None, result: Path, marks: Path | None = None, **options: Any) -> RotationTrainer:
    """Train and save at each step; `marks` gets a byte when a step is done, before its checkpoint is written."""
    trainer = make_trainer(run, **{**SAVING, **options})
    if marks is not None:
        trainer.after_optimizer_step = partial(_mark, marks)  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint="auto")
    checkpoint.save_tensors(result, {**state_of(trainer), "running": trainer.running})
    return trainer


def _mark(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b".")


def _count(work: Callable[[Path], object], folder: Path) -> str:
    """The file events of `work(run)`."""

    def counted() -> None:
        run = folder / "counted"
        events = Events()
        events.arm(run, -1, 0)
        work(run)
        kinds = events.disarm()
        (folder / "kinds").write_text(kinds)

    must(wait(fork(counted, folder / "log"), 300) == 0, "counting failed", folder / "log")
    return (folder / "kinds").read_text()


def kill_at_every_event(
    folder: Path, every: int, work: Callable[[Path, Path], object], done: Callable[[Path], int]
) -> Tally:
    """Kill at each event, and in the middle of each write; then go on: the same end, and no finished save is lost."""
    log, whole = folder / "log", folder / "whole.safetensors"
    kinds = _count(lambda run: work(run, whole), folder)
    tried, kept = 0, 0
    for event in range(0, len(kinds), every):
        for action in (KILL, TEAR) if kinds[event] == "w" else (KILL,):
            run, result = folder / f"{event}-{action}", folder / f"{event}-{action}.safetensors"
            process = fork(partial(_armed, run, event, action, partial(work, run, result)), log)
            code = wait(process, 120)
            must(code == -signal.SIGKILL, f"event {event} ({kinds[event]}) ended with {code}", log)
            before = done(run)
            code = wait(fork(partial(work, run, result), log), 120)
            must(code == 0, f"after event {event} ({kinds[event]}) the run did not go on from {before}", log)
            must(_same(whole, result), f"after event {event} ({kinds[event]}) the end is another")
            leftovers = [path for path in run.rglob(".*") if checkpoint.is_hidden_stage(path)]
            must(not leftovers, f"after event {event} ({kinds[event]}) there is {leftovers}")
            shutil.rmtree(run)
            result.unlink()
            tried += 1
            kept += 1
    return Tally(tried, kept, f"{len(kinds)} file events, {'each' if every == 1 else f'every {every}th'} tried")


def _armed(run: Path, event: int, action: int, work: Callable[[], object], code: int = 0) -> None:
    Events().arm(run, event, action, code)
    work()


def _same(left: Path, right: Path) -> bool:
    ours, theirs = checkpoint.load_tensors(left), checkpoint.load_tensors(right)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _steps_done(run: Path) -> int:
    """The newest checkpoint that verifies; at most one save before what was done, and none older than that."""
    marks = run.with_suffix(".marks")
    done = marks.stat().st_size if marks.is_file() else 0
    newest = checkpoint.latest_checkpoint(run) if run.is_dir() else None
    found = 0 if newest is None else int(newest.name.rpartition("-")[2])
    must(found >= done - 1, f"{done} steps were done, the newest checkpoint is of step {found}")
    return found


def _work(run: Path, result: Path) -> None:
    marks = run.with_suffix(".marks")
    _train(run, result, None if marks.exists() else marks)


def fail_at_every_event(folder: Path, every: int, code: int, on_save_error: str) -> Tally:
    """From each event on nothing can be written: our error, the checkpoint before is whole, the run goes on later."""
    log, whole = folder / "log", folder / "whole.safetensors"
    kinds = _count(lambda run: _train(run, whole), folder)
    places = [event for event, kind in enumerate(kinds) if kind in "owmft"][::every]
    for event in places:
        run, result = folder / f"{event}", folder / f"{event}.safetensors"

        def work(run: Path = run, result: Path = result, event: int = event) -> None:
            Events().arm(run, event, FAIL, code)
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    trainer = make_trainer(run, **SAVING, on_save_error=on_save_error)
                    trainer.train(resume_from_checkpoint="auto")
            except SaveError as error:
                must(on_save_error == "raise" or "did not start" in str(error), str(error))
                must("bytes" in str(error) and str(run) in str(error), str(error))
            else:
                assert on_save_error == "warn", "no error"
                assert any("Training goes on without a checkpoint" in str(each.message) for each in caught)
                checkpoint.save_tensors(result, {**state_of(trainer), "running": trainer.running})

        ended = wait(fork(work, log), 120)
        must(ended == 0, f"event {event} ({kinds[event]}) ended with {ended}", log)
        saves = kinds[:event].count("r")  # a save's files are renamed too, so this is no less than what was saved
        newest = checkpoint.latest_checkpoint(run) if run.is_dir() else None
        must(newest is not None or saves < 12, f"after event {event} no checkpoint is left")
        if not result.is_file():
            ended = wait(fork(partial(_train, run, result), log), 120)
            must(ended == 0, f"after event {event} ({kinds[event]}) the run did not go on", log)
        must(_same(whole, result), f"after event {event} ({kinds[event]}) the end is another")
        shutil.rmtree(run, ignore_errors=True)
    return Tally(len(places), len(places), f"{len(kinds)} file events")


def too_little_room(folder: Path) -> None:
    """The check before a save: bytes and path are named, and nothing is touched."""
    from dmc_hub import output_folder

    trainer = make_trainer(folder / "run", **{**SAVING, "max_steps": 2})
    free = iter([10**12, 1000])
    output_folder.free_bytes = lambda folder: next(free)
    try:
        trainer.train()
    except SaveError as error:
        must("needs" in str(error) and "bytes, and its file system has 1,000 free" in str(error), str(error))
        must("checkpoint-2" in str(error), str(error))
    else:
        must(False, "no error")
    found = [path.name for path in (folder / "run").iterdir()]
    must(found == ["checkpoint-1"], f"there is {found}")


def main(scenario: str, folder: Path, every: int) -> None:
    folder.mkdir(parents=True)
    kind, _, option = scenario.partition(":")
    if kind == "train":
        tally = kill_at_every_event(folder, every, _work, _steps_done)
    elif kind == "align":
        tally = kill_at_every_event(folder, every, kills.align, lambda run: 0)
    else:
        tally = fail_at_every_event(folder, every, ERRORS[option], kind)
    sys.stdout.write(json.dumps(vars(tally)) + "\n")


def cases(quick: bool) -> Iterator[Case]:
    """Of both rows."""
    yield Case(2, "a trainer that keeps one checkpoint", partial(under_events, "train", every=40 if quick else 1))
    yield Case(2, "the sequential aligner", partial(under_events, "align", every=400 if quick else 5))
    for name in ERRORS:
        yield Case(6, name, partial(under_events, f"raise:{name}", every=60 if quick else 1))
    yield Case(6, "no space, going on", partial(under_events, "warn:no space", every=60 if quick else 1))
    yield Case(6, "too little room for the next save", too_little_room)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
