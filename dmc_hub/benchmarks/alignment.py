"""How many evaluations of the denoiser each method of reinforcement learning needs for its gain in reward."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from dmc_hub.data import Episodes
from dmc_hub.hub import load_pipeline
from dmc_hub.presets import PRESETS, Preset
from dmc_hub.run_settings import VALIDATION_SEED
from dmc_hub.task_evaluation import evaluate_on_task
from dmc_hub.tasks import get_task
from dmc_hub.trainers.alignment import METHODS

SHARE = 0.9
PLAIN_DDPO: dict[str, Any] = {
    "group_size": 1,
    "advantage_baseline": "batch",
    "advantage_scale": "global",
    "num_train_denoising_steps": None,
    "credit": "uniform",
    "kl_coefficient": 0.0,
}
"""DDPO as published (arXiv:2305.13301): every denoising step is trained with the same weight, PPO's clip, advantages
normalised over the batch, no KL."""
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain DDPO": ("ddpo", PLAIN_DDPO),
    "REINFORCE": ("ddpo", {"loss_type": "reinforce"}),
    "PPO": ("ddpo", {}),
    "QV-PG": ("reward_gradient", {}),
    "NFT": ("nft", {}),
}
"""Name, method, and what differs from the preset."""


class ForwardCounter:
    """Counts the samples that a network is evaluated on, while it is not paused."""

    def __init__(self, network: nn.Module) -> None:
        self.count = 0
        self._counts = True
        network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._counts:
            sample = args[0] if args else kwargs["sample"]
            self.count += len(sample)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens in the block does not count."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True


class Curve(TrainerCallback):
    """Validates every `interval` steps and notes the evaluations of the denoiser until then."""

    def __init__(self, pipeline: Any, task: str, controller: str, interval: int, num_episodes: int) -> None:
        self.pipeline = pipeline
        self.task, self.controller = get_task(task), controller
        self.interval, self.num_episodes = interval, num_episodes
        self.counter = ForwardCounter(pipeline.denoiser)
        self.points: list[dict[str, float]] = []

    def measure(self, step: int) -> None:
        """Add a point to the curve."""
        with self.counter.paused():
            result = evaluate_on_task(
                self.task,
                self.pipeline,
                self.controller,
                first_seed=VALIDATION_SEED,
                num_episodes=self.num_episodes,
                num_candidates=1,
                action_selection="greedy",
            )
        row = {"step": step, "forwards": self.counter.count, "return_mean": result.statistics.mean}
        self.points.append({**row, "coherency": np.nan if result.coherency is None else result.coherency})

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.interval == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)


@dataclass(frozen=True)
class RewardPerForward:
    """Trains every one of `SETTINGS` from one foundation and counts the evaluations of the denoiser.

    A sample that the network is evaluated on counts once, be it to sample, to train or as the reference; backward
    passes do not count.

    Attributes:
        foundation: folder of a pipeline with its critic.
        task: id of the task whose data and environment serve.
        controller: "planner" or "policy", what the foundation is.
        seed: of data and training.
        num_validations: of each curve.
        num_episodes: of a validation, with one candidate.
    """

    foundation: Path
    task: str = "nav1d-full"
    controller: str = "planner"
    seed: int = 0
    num_validations: int = 20
    num_episodes: int = 64

    def run(self, max_steps: Mapping[str, int]) -> dict[str, Any]:
        """Measure with so many optimizer steps at most, by name of the setting.

        The mark is the foundation's return plus `SHARE` of the most that any setting has gained; a curve is read off by
        linear interpolation between validations.

        Returns:
            `curves`, `forwards_to_mark` (None where the mark was not reached), `ratios` (the evaluations of plain DDPO,
            all of them if it has not reached the mark, over those of the setting), the preset's `default`,
            `best_return`, `mark`.
        """
        curves, seconds = {}, {}
        for name in SETTINGS:
            start = time.perf_counter()
            curves[name] = self._curve(name, max_steps[name])
            seconds[name] = time.perf_counter() - start
        best = max(point["return_mean"] for curve in curves.values() for point in curve)
        start_return = curves["NFT"][0]["return_mean"]
        mark = start_return + SHARE * (best - start_return)
        forwards = {name: forwards_to(mark, curve) for name, curve in curves.items()}
        plain = forwards["plain DDPO"] or curves["plain DDPO"][-1]["forwards"]
        default = self._preset.methods[0]
        return {
            **vars(self),
            "foundation": str(self.foundation),
            "best_return": best,
            "mark": mark,
            "forwards_to_mark": forwards,
            "ratios": {name: None if count is None else plain / count for name, count in forwards.items()},
            "default": next(name for name, (method, changes) in SETTINGS.items() if method == default and not changes),
            "seconds": seconds,
            "curves": curves,
        }

    @property
    def _preset(self) -> Preset:
        return PRESETS[self.task](self.controller, "ddpm")

    def _curve(self, name: str, max_steps: int) -> list[dict[str, float]]:
        method, changes = SETTINGS[name]
        pipeline = load_pipeline(self.foundation)
        pipeline.add_lora(LoraConfig(r=16, lora_alpha=16), seed=self.seed)
        curve = Curve(
            pipeline, self.task, self.controller, max(1, max_steps // self.num_validations), self.num_episodes
        )
        preset: Any = self._preset.stage_configs()[method]
        changes = {**changes, "max_steps": max_steps, "seed": self.seed, "lr_scheduler_type": "constant"}
        config = dataclasses.replace(preset, **changes)
        episodes = Episodes.from_dataset(get_task(self.task).dataset(self.seed))
        trainer = METHODS[method][0](pipeline, config, train_dataset=episodes, callbacks=[curve])
        curve.measure(0)
        trainer.train()
        return curve.points


def forwards_to(mark: float, curve: list[dict[str, float]]) -> float | None:
    """Evaluations of the denoiser at which the curve first reaches the mark; None if it does not."""
    for before, after in itertools.pairwise(curve):
        if after["return_mean"] >= mark > before["return_mean"]:
            share = (mark - before["return_mean"]) / (after["return_mean"] - before["return_mean"])
            return before["forwards"] + share * (after["forwards"] - before["forwards"])
    return None
