"""Rows 3, 11 and 14: two processes of which one is killed, stopped, raises or computes NaN.

Run as a script by torchrun, this file trains, and one process dies in the first attempt.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dmc_hub import checkpoint
from dmc_hub.trainers.base import NonFiniteLossError, SkippedStepWarning
from tests.faults.cases import Case, Tally, fork, must, wait
from tests.trainers.test_base import make_trainer, state_of

STEPS = 12
SAVING: dict[str, Any] = {"lora": True, "ema_decay": 0.9, "max_steps": STEPS, "gradient_accumulation_steps": 2}
HANG_SECONDS = 15


def start_two(work: Callable[[], None], folder: Path) -> list[int]:
    """Start two processes of one group, each of which runs `work`; returns their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def enter(rank: int) -> None:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in facts.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
        work()
        assert torch.distributed.get_world_size() == 2

    return [fork(partial(enter, rank), folder / f"rank-{rank}.log") for rank in (0, 1)]


def end_of(processes: list[int], seconds: float) -> list[int | None]:
    """Their exit codes; those that have not ended in time are killed and None."""
    end, codes = time.monotonic() + seconds, []
    for process in processes:
        code = wait(process, max(0.0, end - time.monotonic()))
        if code is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        codes.append(code)
    return codes


def rank() -> int:
    return int(os.environ["RANK"])


def train(run: Path | None, folder: Path, result: str, **options: Any) -> None:
    """Train to the end, from the last checkpoint if there is one, and write this process's weights."""
    trainer = make_trainer(run, **{**SAVING, **options})
    trainer.args.save_steps = 1
    trainer.train(resume_from_checkpoint="auto")
    checkpoint.save_tensors(folder / f"{result}-{rank()}.safetensors", {**state_of(trainer), "own": trainer.running})


def must_end_well(work: Callable[[], None], folder: Path) -> None:
    codes = end_of(start_two(work, folder), 120)
    must(codes == [0, 0], f"the processes ended with {codes}", folder / "rank-0.log")


def kill_one_or_both(folder: Path, kills: int) -> Tally:
    """Kill at random moments; the end of both processes is that of an uninterrupted run."""
    must_end_well(partial(train, None, folder, "whole"), folder)
    chance, done, runs = random.Random(5), 0, 0
    while done < kills:
        runs += 1
        run, result = folder / f"run-{runs}", f"killed-{runs}"
        while done < kills and not (folder / f"{result}-1.safetensors").is_file():
            processes = start_two(partial(train, run, folder, result), folder)
            _wait_for_a_save(run, processes)
            time.sleep(chance.uniform(0.0, 0.1))
            doomed = chance.choice([processes[:1], processes[1:], processes])
            for process in doomed:
                os.kill(process, signal.SIGKILL)
            codes = end_of(processes, 30)
            must(None not in codes, "the other process did not end within 30 s", folder / "rank-0.log")
            done += -signal.SIGKILL in codes
            for found in checkpoint.checkpoints(run):
                files = checkpoint.verify(found).files
                must({"rng-0.safetensors", "rng-1.safetensors"} <= set(files), f"{found} lacks a process's files")
        if not (folder / f"{result}-1.safetensors").is_file():
            must_end_well(partial(train, run, folder, result), folder)
        for index in (0, 1):
            whole, killed = (checkpoint.load_tensors(folder / f"{n}-{index}.safetensors") for n in ("whole", result))
            must(all(torch.equal(whole[name], killed[name]) for name in whole), "the weights differ")
    return Tally(done, done, f"{runs} runs, bit-identical")


def _wait_for_a_save(run: Path, processes: list[int]) -> None:
    before, end = _saved(run), time.monotonic() + 60
    while _saved(run) <= before and time.monotonic() < end:
        if os.waitid(os.P_PID, processes[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)


def _saved(run: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in checkpoint.checkpoints(run)), default=0)


class At(TrainerCallback):
    """Does something at one step."""

    def __init__(self, step: int, what: Callable[[], None]) -> None:
        self.step, self.what = step, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


def one_fails(how: str, folder: Path) -> None:
    """The other one ends too, with an exit code: within 10 s, or the time limit of the group if one hangs."""

    def fail() -> None:
        if rank() == 1:
            (folder / "failed").write_text(str(time.time()))
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                os.kill(os.getpid(), signal.SIGSTOP)
            raise RuntimeError("one process raises")

    def work() -> None:
        trainer = make_trainer(callbacks=[At(3, fail)], **{**SAVING, "ddp_timeout": HANG_SECONDS})
        trainer.train()

    processes = start_two(work, folder)
    limit = HANG_SECONDS + 10 if how == "hangs" else 10
    while not (folder / "failed").is_file():
        time.sleep(0.02)
    code = wait(processes[0], limit + 20)
    seconds = time.time() - float((folder / "failed").read_text())
    must(code not in (0, None), f"the other process ended with {code}", folder / "rank-0.log")
    must(seconds <= limit, f"the other process took {seconds:.1f} s")
    if how == "hangs":
        os.kill(processes[1], signal.SIGKILL)
    must(wait(processes[1], 10) not in (0, None), "the failing process ended with 0")


def nan_once(folder: Path) -> None:
    """Both skip the step, and end with the same finite weights."""

    def work() -> None:
        trainer = make_trainer(**SAVING, logging_steps=1)
        trainer.nan_at = 5 if rank() == 1 else -1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert [w.category for w in caught if w.category is SkippedStepWarning] == [SkippedStepWarning]
        losses = [row["loss"] for row in trainer.history if "loss" in row]
        assert [loss != loss for loss in losses] == [step == 2 for step in range(STEPS)]
        assert all(torch.isfinite(value).all() for value in state_of(trainer).values())
        checkpoint.save_tensors(folder / f"nan-{rank()}.safetensors", state_of(trainer))

    must_end_well(work, folder)
    first, second = (checkpoint.load_tensors(folder / f"nan-{index}.safetensors") for index in (0, 1))
    must(all(torch.equal(first[name], second[name]) for name in first), "the weights differ")


def nan_for_good(folder: Path) -> None:
    """Both end after three steps in a row, each with its batch written down, and finite weights."""

    def work() -> None:
        trainer = make_trainer(folder / "run", **SAVING)
        trainer.nan_from = 4 if rank() == 1 else 10**9
        warnings.simplefilter("ignore")
        try:
            trainer.train()
        except NonFiniteLossError as error:
            must("Step 5: " in str(error) and "3 such steps in a row" in str(error), str(error))
        else:
            must(False, "no error")
        must(all(bool(torch.isfinite(value).all()) for value in state_of(trainer).values()), "NaN in the weights")
        dump = checkpoint.load_tensors(folder / "run" / "non-finite" / f"step-5-process-{rank()}.safetensors")
        must(torch.equal(dump["x"], trainer.seen[9]), "another batch was written")

    must_end_well(work, folder)


def restarted_by_torchrun(folder: Path) -> None:
    """`torchrun --max-restarts` takes a run up that lost a process."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += [
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "-m",
        "tests.faults.ranks",
        str(folder),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280, cwd=root)
    must(done.returncode == 0, done.stderr[-3000:])
    must((folder / "died").is_file(), "no process died")
    must_end_well(partial(train, None, folder, "whole"), folder)
    for index in (0, 1):
        whole, other = (checkpoint.load_tensors(folder / f"{n}-{index}.safetensors") for n in ("whole", "restarted"))
        must(all(torch.equal(whole[name], other[name]) for name in whole), "the weights differ")


def main(folder: Path) -> None:
    def die_once() -> None:
        if rank() == 1 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = make_trainer(folder / "run", callbacks=[At(5, die_once)], **SAVING)
    trainer.args.save_steps = 1
    trainer.train(resume_from_checkpoint="auto")
    assert torch.distributed.get_world_size() == 2
    checkpoint.save_tensors(folder / f"restarted-{rank()}.safetensors", {**state_of(trainer), "own": trainer.running})


def cases(quick: bool) -> Iterator[Case]:
    """Of the three rows."""
    yield Case(3, "one or both killed", partial(kill_one_or_both, kills=2 if quick else 12))
    yield Case(11, "NaN once", nan_once)
    yield Case(11, "NaN for good", nan_for_good)
    for how in ("dies", "raises", "hangs"):
        yield Case(14, f"one process {how}", partial(one_fails, how))
    yield Case(14, "torchrun --max-restarts", restarted_by_torchrun)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
