"""How cost grows with what one turns: medians and the slopes between them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dmc_hub.benchmarks.data import synthetic_episodes
from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.rollout import make_envs
from dmc_hub.benchmarks.timing import machine, take_turns

VALUES: dict[str, tuple[int, ...]] = {
    "candidates": (1, 4, 16, 64, 256),
    "horizon": (8, 16, 32, 64, 128),
    "denoising steps": (5, 10, 20, 40, 80),
    "environments": (1, 4, 16, 64),
    "dataset steps": (10_000, 100_000, 1_000_000),
    "processes": (1, 2, 4),
}
CHEAP = 50  # times as many repeats of what takes less than a millisecond


def measure_growth(
    *,
    values: Mapping[str, Sequence[int]] = VALUES,
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Milliseconds of a decision with more candidates, longer plans, more denoising steps or more environments, of a
    batch of 256 windows from more data, and of one step of Nav1D in each of more worker processes.

    One quantity varies at a time; a decision otherwise has one environment, 16 candidates and `sizes`. `exponent` is
    the slope of log time over log value between the last two values: 1 is the growth of the work itself, 0 none.
    """
    torch.manual_seed(seed)
    rows = {}
    for name, each in values.items():
        runs, close = _runs(name, each, sizes, device, seed)
        try:
            count = repeats * (CHEAP if name in ("dataset steps", "processes") else 1)
            report = take_turns(runs, str(each[-1]), repeats=count, device=device, warm_up=1)
        finally:
            close()
        times = [report["milliseconds"][str(value)] for value in each]
        slope = math.log(times[-1] / times[-2]) / math.log(each[-1] / each[-2]) if len(each) > 1 else None
        rows[name] = {"values": list(each), "milliseconds": times, "exponent": slope}
    return {"machine": machine(device), "sizes": vars(sizes), "growth": rows}


def _runs(
    name: str, values: Sequence[int], sizes: PlannerSizes, device: str, seed: int
) -> tuple[dict[str, Callable[[], Any]], Callable[[], Any]]:
    """What to time, by value, and what to call afterwards."""
    if name == "dataset steps":
        return {str(value): _gather(value, seed) for value in values}, lambda: None
    if name == "processes":
        environments = [make_envs(value, in_workers=True) for value in values]
        for env in environments:
            env.reset(seed=seed)
        steps = {str(env.num_envs): _step(env) for env in environments}
        return steps, lambda: [env.close() for env in environments]
    return {str(value): _decision(name, value, sizes, device, seed) for value in values}, lambda: None


def _gather(num_steps: int, seed: int) -> Callable[[], Any]:
    windows, rng = synthetic_episodes(num_steps, seed).windows(32), np.random.default_rng(seed)
    return lambda: windows.gather(rng.integers(len(windows), size=256))


def _step(vector_env: Any) -> Callable[[], Any]:
    actions = np.zeros(vector_env.action_space.shape, np.float32)
    return lambda: vector_env.step(actions)


def _decision(name: str, value: int, sizes: PlannerSizes, device: str, seed: int) -> Callable[[], Any]:
    changes = {"horizon": "horizon", "denoising steps": "num_inference_steps"}
    changed: dict[str, Any] = {changes[name]: value} if name in changes else {}
    planner = dataclasses.replace(sizes, **changed).build(device=device, seed=seed)
    observations = np.repeat(sizes.observation(seed)[None], value if name == "environments" else 1, axis=0)
    candidates = value if name == "candidates" else 1 if name == "environments" else 16
    return lambda: planner(observations, num_candidates=candidates, generator=seed)
