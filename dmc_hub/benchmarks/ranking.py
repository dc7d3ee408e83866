"""What early ranking saves, and what it costs: time, the critic's value of what is chosen, and the return."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmc_hub.benchmarks.plan import PlannerSizes
from dmc_hub.benchmarks.timing import machine, take_turns
from dmc_hub.hub import load_pipeline
from dmc_hub.run_settings import VALIDATION_SEED
from dmc_hub.task_evaluation import evaluate_on_task
from dmc_hub.tasks import Task, get_task

Shares = tuple[float, float]
SHARES: tuple[Shares, ...] = ((0.25, 0.25), (0.5, 0.25), (0.75, 0.25), (0.5, 0.125), (0.5, 0.5))
"""Of the denoising steps before the ranking, and of the candidates after it."""
ALL = "all to the end"


def measure_ranking(
    foundation: Path,
    *,
    task: str,
    controller: str,
    shares: Sequence[Shares] = SHARES,
    num_candidates: int = 64,
    num_states: int = 256,
    num_episodes: int = 128,
    sizes: PlannerSizes = PlannerSizes(),  # noqa: B008 (frozen)
    repeats: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Early ranking beside denoising all candidates to the end.

    `time` is of a decision of a planner of `sizes`, `quality` of a trained controller on its task.

    Args:
        foundation: folder of a trained pipeline with its critic.
        task: that it was trained on.
        controller: its kind.
        shares: see `SHARES`.
        num_candidates: of each decision.
        num_states: of the task's data, at which the values are compared.
        num_episodes: of each return.
        sizes: of the planner that is timed.
        repeats: of each time.
        device: of the planner that is timed.
        seed: of states and noise.
    """
    planner, observation = sizes.build(device=device, seed=seed), sizes.observation(seed)
    runs = {
        name: functools.partial(planner, observation, num_candidates=num_candidates, early_ranking=each, generator=seed)
        for name, each in _named(shares).items()
    }
    common: dict[str, Any] = {"num_candidates": num_candidates, "seed": seed}
    return {
        "machine": machine(device),
        "sizes": vars(sizes),
        "num_candidates": num_candidates,
        "time": take_turns(runs, ALL, repeats=repeats, device=device, warm_up=1),
        "quality": _quality(
            load_pipeline(foundation), get_task(task), controller, shares, num_states, num_episodes, **common
        ),
    }


def _named(shares: Sequence[Shares]) -> dict[str, Shares | None]:
    return {ALL: None, **{f"{steps:g} of the steps, {kept:g} go on": (steps, kept) for steps, kept in shares}}


def _quality(
    pipeline: Any,
    task: Task,
    controller: str,
    shares: Sequence[Shares],
    num_states: int,
    num_episodes: int,
    *,
    num_candidates: int,
    seed: int,
) -> dict[str, Any]:
    episodes, rng = task.episodes(seed, []), np.random.default_rng(seed)
    states = episodes.observations[rng.integers(len(episodes.observations), size=num_states)]
    values = {
        name: pipeline(states, num_candidates=num_candidates, early_ranking=each, generator=seed).values
        for name, each in _named(shares).items()
    }
    one, best = float(values[ALL].mean()), float(values[ALL].max(axis=1).mean())
    options: dict[str, Any] = {"action_selection": "greedy", "first_seed": VALIDATION_SEED}
    evaluated = functools.partial(
        evaluate_on_task, task, pipeline, controller, num_episodes=num_episodes, generator_seed=seed, **options
    )
    rows = {
        name: {
            "value": float(values[name].max(axis=1).mean()),
            "share_of_gain": round((float(values[name].max(axis=1).mean()) - one) / (best - one), 4),
            "return": _return(evaluated(num_candidates=num_candidates, early_ranking=each)),
        }
        for name, each in _named(shares).items()
    }
    return {
        "task": task.name,
        "controller": controller,
        "num_inference_steps": pipeline.config.num_inference_steps,
        "num_states": num_states,
        "num_episodes": num_episodes,
        "one candidate": {"value": one, "share_of_gain": 0.0, "return": _return(evaluated(num_candidates=1))},
        **rows,
    }


def _return(evaluation: Any) -> dict[str, float]:
    statistics = evaluation.statistics
    return {"mean": statistics.mean, "low": statistics.mean_ci_low, "high": statistics.mean_ci_high}
