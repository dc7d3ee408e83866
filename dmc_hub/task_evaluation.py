"""Controllers on tasks: figures, pictures and videos of their episodes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dmc_hub import plots
from dmc_hub.agent import Agent
from dmc_hub.evaluation import (
    Evaluation,
    batches_of,
    cached_records,
    evaluate,
    planner_coherency_scores,
    policy_coherency_scores,
    summarize_records,
)
from dmc_hub.evaluation_cache import EvaluationCache, controller_fingerprint
from dmc_hub.replay import best_median_worst, replay, save_video
from dmc_hub.run_settings import say
from dmc_hub.tasks import Task, make_vector_env, num_side_by_side

VIDEO_FRAMES = 150


def evaluate_on_task(
    task: Task,
    pipeline: Any,
    controller: str,
    *,
    first_seed: int,
    num_episodes: int,
    num_candidates: int,
    action_selection: str,
    num_inference_steps: int | None = None,
    num_upsampling_passes: int = 0,
    early_ranking: tuple[float, float] | None = None,
    generator_seed: int = 0,
    num_workers: int = 0,
    worker_timeout: float = 60.0,
    overlap: bool = False,
    cache_dir: Path | None = None,
    progress: bool = False,
    num_envs: int | None = None,
) -> Evaluation:
    """Evaluate on `num_episodes` seeds from `first_seed` on.

    Args:
        task: the task.
        pipeline: the controller.
        controller: one of `presets.CONTROLLERS`.
        first_seed: of the first episode.
        num_episodes: how many.
        num_candidates: candidates per decision.
        action_selection: "greedy", "expectation" or "softmax".
        num_inference_steps: denoising steps; None for the pipeline's own number.
        num_upsampling_passes: passes through the pipeline's up-sampler.
        early_ranking: see the pipelines' call.
        generator_seed: see `dmc_hub.evaluation.evaluate`.
        num_workers: processes that run one environment each, side by side; 0 runs as many as the task allows here.
        worker_timeout: seconds that a worker has for one step.
        overlap: the workers are two halves that take turns: while one steps, the controller decides for the other. The
            figures are those of half as many workers without.
        cache_dir: folder for the results of every batch of episodes: what is there is not run again.
        progress: whether to show a bar.
        num_envs: environments side by side; by default what `num_side_by_side` says.

    Raises:
        ValueError: `overlap` without an even number of workers.
    """
    seeds = range(first_seed, first_seed + num_episodes)
    num_workers = _workers_at_once(num_workers, overlap)
    num_envs = num_envs or num_side_by_side(task, num_episodes, num_workers)
    options: dict[str, Any] = {
        "num_candidates": num_candidates,
        "action_selection": action_selection,
        "num_inference_steps": num_inference_steps,
        "num_upsampling_passes": num_upsampling_passes,
        "early_ranking": early_ranking,
        "generator_seed": generator_seed,
        "optimal_return": None if task.optimal_return is None else task.optimal_return(),
        "objective": task.objective,
    }
    cache = None
    if cache_dir is not None:
        cache = EvaluationCache(cache_dir, _cache_settings(task, pipeline, controller, num_envs, options))
        found = cached_records(cache, batches_of(seeds, num_envs))
        if found.keys() >= set(seeds):
            records = [found[seed] for seed in seeds]
            return summarize_records(records, failed_seeds=(), wall_seconds=0.0, steps=None, **options)
    with ExitStack() as opened:
        vector_envs = []
        for _ in range(2 if overlap and num_episodes > num_envs else 1):
            vector_envs.append(make_vector_env(task, num_envs, num_workers=num_workers, worker_timeout=worker_timeout))
            opened.callback(vector_envs[-1].close)
        return evaluate(
            Agent(pipeline, num_action_steps=task.num_action_steps),
            vector_envs,
            seeds=seeds,
            cache=cache,
            coherency=coherency_of(task, controller),
            success=task.success,
            score=task.score,
            progress=progress,
            **options,
        )


def _workers_at_once(num_workers: int, overlap: bool) -> int:
    """Of those that step at the same time."""
    if overlap and (num_workers < 2 or num_workers % 2):
        raise ValueError(f"`overlap` makes two halves of the workers: `num_workers` must be even, got {num_workers}.")
    return num_workers // 2 if overlap else num_workers


def coherency_of(task: Task, controller: str) -> Any:
    """The coherency score of Eq. 15 (planner) or 16 (policy) for `evaluate`; None where the task does not define it."""
    if controller != "policy" and task.dynamics is not None:
        dynamics = task.dynamics
        return lambda observations, output: planner_coherency_scores(
            output.trajectories, dynamics, observations.shape[-1]
        )
    if controller == "policy" and task.behavior_log_prob is not None:
        log_prob = task.behavior_log_prob
        return lambda observations, output: policy_coherency_scores(observations, output.candidates, log_prob)
    return None


def _cache_settings(
    task: Task, pipeline: Any, controller: str, num_envs: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a batch of episodes depends on besides its seeds."""
    decisions = {name: options[name] for name in ("num_candidates", "action_selection", "num_upsampling_passes")}
    if options["early_ranking"] is not None:
        decisions["early_ranking"] = list(options["early_ranking"])
    return {
        **decisions,
        "num_inference_steps": options["num_inference_steps"] or pipeline.config.num_inference_steps,
        "generator_seed": options["generator_seed"],
        "num_envs": num_envs,
        "num_action_steps": task.num_action_steps,
        "task": task.name,
        "env_id": task.env_id,
        "max_episode_steps": task.max_episode_steps,
        "success": task.success,
        "score": task.score_name,
        "controller": controller,
        "fingerprint": controller_fingerprint(pipeline),
        "device": pipeline.device.type,
    }


def draw_episodes(task: Task, evaluation: Evaluation, path: Path) -> dict[str, dict[str, float]] | None:
    """Draw the best, the median and the worst episode; seed and outcome of each, or None where nothing can be drawn.

    Nav1D has a plot of its own.
    """
    if task.name.startswith("nav1d-"):
        return None
    drawn = {
        which: {"seed": evaluation.records[place].seed, "outcome": float(evaluation.outcomes[place])}
        for which, place in best_median_worst(evaluation.outcomes).items()
    }
    try:
        replays = replay(task, evaluation.rollouts, [int(row["seed"]) for row in drawn.values()], max_frames=6)
    except Exception as error:  # graphics libraries fail in ways of their own, and a picture is worth no run
        say(f"episodes are not drawn: {type(error).__name__}: {error}")
        return None
    labels = [f"{which}: {row['outcome']:.2f}, seed {row['seed']}" for which, row in drawn.items()]
    plots.plot_frames({label: seen.frames for label, seen in zip(labels, replays, strict=True)}, path)
    return drawn


def save_videos(
    task: Task, pipeline: Any, controller: str, evaluation: Evaluation, folder: Path, **options: Any
) -> dict[str, Path]:
    """Write videos of the best, the median and the worst episode of an evaluation.

    Episodes that the evaluation has found in a cache are run again with their batch.

    Args:
        task: the task; likewise `pipeline` and `controller`.
        evaluation: of consecutive seeds.
        folder: where the videos go.
        options: that the evaluation was made with, see `evaluate_on_task`.

    Returns:
        By "best", "median" and "worst" the file.

    Raises:
        ImportError: the environment's extra is not installed.
        ValueError: see `dmc_hub.replay.replay`.
    """
    first, count = options["first_seed"], options["num_episodes"]
    num_workers = _workers_at_once(options.get("num_workers", 0), options.get("overlap", False))
    num_envs = num_side_by_side(task, count, num_workers)
    files = {}
    for which, place in best_median_worst(evaluation.outcomes).items():
        seed, steps = evaluation.records[place].seed, evaluation.steps
        if steps is None or seed not in steps.seeds:
            [batch] = [batch for batch in batches_of(range(first, first + count), num_envs) if seed in batch]
            alone = {"first_seed": batch[0], "num_episodes": len(batch), "num_envs": num_envs, "cache_dir": None}
            steps = evaluate_on_task(task, pipeline, controller, **{**options, **alone}).rollouts
        [seen] = replay(task, steps, [seed], max_frames=VIDEO_FRAMES)
        files[which] = save_video(seen, folder / f"{which}-{seed}")
    return files
