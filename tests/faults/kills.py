"""Rows 1, 5 and 7: kill -9 at any moment, stops at every step, and only one checkpoint kept."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from dmc_hub import checkpoint
from dmc_hub.data import Episodes
from dmc_hub.trainers.alignment import METHODS, AlignmentConfig, SequentialAligner
from tests.faults.cases import Case, Tally, fork, must, run_in_child, wait
from tests.trainers.test_two_processes import CASES, make_episodes, make_trainer, reward

STEPS = 24
TRAINERS = [name for name in CASES if name not in ("ddpo_global", "ddpo_batch", "awm", "dpo_data")]
STAGES = ("ddpo", "reward_gradient", "nft", "dpo", "sft")


@cache
def episodes() -> Episodes:
    return make_episodes()


def trainer_of(name: str, output_dir: Path | None, **options: Any) -> Any:
    """A trainer with everything that a checkpoint has to keep: Adam's moments, the average, buffers, the LoRA."""
    saving: dict[str, Any] = {}
    if output_dir is not None:
        saving = {"output_dir": str(output_dir), "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    defaults = {"max_steps": STEPS, "optim": "adamw_torch", "learning_rate": 1e-3, "ema_decay": 0.9}
    return make_trainer(name, episodes(), **{**defaults, **saving, **options})


def train(name: str, output_dir: Path | None, result: Path, **options: Any) -> None:
    """Train to the end, from the last checkpoint if there is one, and write weights and losses."""
    trainer = trainer_of(name, output_dir, **options)
    trainer.train(resume_from_checkpoint="auto")
    checkpoint.save_tensors(result, trainer.trainable_module().state_dict())


def align(output_dir: Path | None, result: Path) -> None:
    """All methods one after the other; writes the adapter and what the stages said."""
    pipeline = make_trainer("iql", episodes()).pipeline
    observations = episodes().observations[:64]

    def validate(controller: Any) -> dict[str, float]:
        actions = controller(observations, generator=0).action
        rewards = 2 - np.abs(actions - 0.8)
        return {"return_mean": float(rewards.mean()), "return_std": float(rewards.std())}

    small: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "max_steps": 4, "per_device_train_batch_size": 8}
    counts = {"num_conditions": 8}
    own: dict[str, dict[str, Any]] = {
        "ddpo": {"group_size": 4},
        "nft": {**counts, "group_size": 4},
        "dpo": counts,
        "sft": {**counts, "num_candidates": 4},
    }
    aligner = SequentialAligner(
        pipeline,
        AlignmentConfig(
            output_dir=None if output_dir is None else str(output_dir),
            methods=list(STAGES),
            max_passes=1,
            validations_per_stage=2,
            max_return_drop=1.0,
            collapse_drop=10.0,
        ),
        train_dataset=episodes(),
        validate=validate,
        stage_configs={name: METHODS[name][1](**small, **own.get(name, {})) for name in STAGES},
        reward_function=reward,
    )
    results = aligner.run()
    rows = [{**dataclasses.asdict(row), "wall_seconds": 0.0, "train_metrics": {}} for row in results]
    result.with_suffix(".json").write_text(json.dumps(rows))
    checkpoint.save_tensors(result, pipeline.denoiser.state_dict())


def steps_saved(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in checkpoint.checkpoints(folder)), default=0)


def progress_of_alignment(folder: Path) -> int:
    """Grows with every checkpoint and every finished stage."""
    stages = list((folder / "stages").glob("[0-9]*"))
    return 100 * len(stages) + max((steps_saved(path) for path in (folder / "unfinished").glob("*")), default=0)


def kill_again_and_again(
    folder: Path,
    work: Callable[[Path | None, Path], None],
    progress: Callable[[Path], int],
    *,
    kills: int,
    seed: int,
) -> Tally:
    """Kill `work(output_dir, result)` so often, then let it end: its result must be that of a run without a kill."""
    chance, log = random.Random(seed), folder / "log"
    start = time.monotonic()
    run_in_child(partial(work, None, folder / "whole.safetensors"), folder)
    usual, done, runs = time.monotonic() - start, 0, 0
    while done < kills:
        runs += 1
        run, result = folder / f"run-{runs}", folder / f"killed-{runs}.safetensors"
        while done < kills:
            process = fork(partial(work, run, result), log)
            code = _kill_somewhere(process, run, progress, chance, usual)
            if code == 0:
                break
            must(code == -signal.SIGKILL, f"the child ended with {code} by itself", log)
            done += 1
            for found in run.rglob("checkpoint-*"):
                if not any(part.startswith(".") for part in found.relative_to(run).parts):
                    checkpoint.verify(found)
        if not result.is_file():
            must(wait(fork(partial(work, run, result), log), 300) == 0, "the resumed run did not end", log)
        _must_be_same(folder / "whole.safetensors", result)
    return Tally(done, done, f"{runs} runs, bit-identical")


def _kill_somewhere(
    process: int, run: Path, progress: Callable[[Path], int], chance: random.Random, usual: float
) -> int | None:
    """Kill after some progress and a moment, or after a while, whatever happens then; returns the exit code."""
    target, end = progress(run) + 1, time.monotonic() + chance.uniform(0, usual)
    after_progress = chance.random() < 0.7
    while not (progress(run) >= target if after_progress else time.monotonic() > end):
        code = wait(process, 0.004)
        if code is not None:
            return code
    time.sleep(chance.uniform(0.0, 0.06) if after_progress else 0.0)
    os.kill(process, signal.SIGKILL)
    return wait(process, 30)


def _must_be_same(left: Path, right: Path) -> None:
    ours, theirs = checkpoint.load_tensors(left), checkpoint.load_tensors(right)
    must(ours.keys() == theirs.keys(), "other weights")
    for name in ours:
        must(torch.equal(ours[name], theirs[name]), f"{name} differs")
    texts = [path.with_suffix(".json") for path in (left, right)]
    if texts[0].is_file():
        must(texts[0].read_text() == texts[1].read_text(), "the stages' results differ")


class Stop(TrainerCallback):
    """Ends a run at one step, and remembers the losses."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def stop_at_every_step(name: str, folder: Path, steps: int) -> Tally:
    """Stop after each step in turn, be it in the middle of a buffer, and go on: same batches, losses and weights."""

    def work() -> None:
        whole = _watched(name, None, steps)
        whole.train()
        for step in range(1, steps):
            run = folder / f"run-{step}"
            first = _watched(name, run, steps)
            first.add_callback(Stop(step))
            first.train()
            second = _watched(name, run, steps)
            second.train(resume_from_checkpoint=True)
            assert sorted(second.batches) == list(range(step, steps))
            for number, batch in second.batches.items():
                assert all(torch.equal(value, whole.batches[number][key]) for key, value in batch.items()), number
            losses = {row["step"]: row["loss"] for row in whole.history if "loss" in row}
            assert {row["step"]: row["loss"] for row in second.history if "loss" in row} == losses
            theirs = second.trainable_module().state_dict()
            assert all(torch.equal(v, theirs[k]) for k, v in whole.trainable_module().state_dict().items())

    run_in_child(work, folder, 600)
    return Tally(steps - 1, steps - 1, "all remaining batches, losses and weights identical")


def _watched(name: str, run: Path | None, steps: int) -> Any:
    trainer = trainer_of(name, run, max_steps=steps)
    batches: dict[int, dict[str, Tensor]] = {}
    make = trainer.make_batch

    def remember(generator: torch.Generator) -> dict[str, Tensor]:
        batch = make(generator)
        batches[trainer.micro_step] = {key: value.clone() for key, value in batch.items()}
        return batch

    trainer.make_batch, trainer.batches = remember, batches
    return trainer


def keep_last_one(folder: Path, kills: int) -> Tally:
    """With one checkpoint kept, there is one to resume from after every kill that came after the first save."""
    chance, log, run = random.Random(7), folder / "log", folder / "run"
    lost = done = 0
    while done < kills:
        work = partial(train, "denoising", run, folder / f"end-{done}.safetensors", save_total_limit=1, max_steps=10**6)
        before = steps_saved(run)
        process = fork(work, log)
        code = _kill_somewhere(process, run, steps_saved, chance, 1.0)
        must(code == -signal.SIGKILL, f"the child ended with {code}", log)
        done += 1
        newest = checkpoint.latest_checkpoint(run) if run.is_dir() else None
        lost += newest is None and before > 0
        must(newest is None or int(newest.name.rpartition("-")[2]) >= before, "work was lost")
    return Tally(done, done - lost, f"{lost} of {done} lost")


def cases(quick: bool) -> Iterator[Case]:
    """Of the three rows."""
    count = 3 if quick else 30
    for index, name in enumerate(TRAINERS):
        work = partial(train, name)
        yield Case(1, name, partial(kill_again_and_again, work=work, progress=steps_saved, kills=count, seed=index))
    progress = progress_of_alignment
    yield Case(
        1, "sequential aligner", partial(kill_again_and_again, work=align, progress=progress, kills=count, seed=99)
    )
    for name in TRAINERS:
        yield Case(5, name, partial(stop_at_every_step, name, steps=4 if quick else 8))
    yield Case(7, "one checkpoint kept", partial(keep_last_one, kills=5 if quick else 20))
