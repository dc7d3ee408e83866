"""Whole runs: data, foundation, critic, sequential alignment, evaluation, report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import dmc_hub
from dmc_hub import checkpoint, plots
from dmc_hub.agent import Agent
from dmc_hub.conditions import episodes_that_fit
from dmc_hub.critic_diagnostics import diagnose_critic
from dmc_hub.data import Episodes
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
from dmc_hub.hub import load_pipeline
from dmc_hub.output_folder import alone_in
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.presets import Preset, preset_of
from dmc_hub.replay import best_median_worst, replay, save_video
from dmc_hub.report import write_report
from dmc_hub.tasks import Task, describe_task, get_task, make_vector_env, num_side_by_side
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner, StageResult, refuse_several_processes
from dmc_hub.trainers.base import DiffusionTrainer
from dmc_hub.trainers.cascade import CascadeTrainer
from dmc_hub.trainers.denoising import DenoisingTrainer
from dmc_hub.trainers.inverse_dynamics import InverseDynamicsConfig, InverseDynamicsTrainer
from dmc_hub.trainers.iql import IQLTrainer
from dmc_hub.trainers.online import CollectionResult, OnlineConfig

VALIDATION_SEED, EVALUATION_SEED, COLLECTION_SEED = 1_000_000, 2_000_000, 3_000_000
VIDEO_FRAMES = 150
CHECKPOINTS_PER_PART = 20
PARTS = ("foundation", "inverse-dynamics", "critic")


@dataclass(frozen=True)
class OnlineSettings:
    """What a run collects between its stages; see `OnlineConfig`.

    Attributes:
        num_episodes: episodes of each collection; likewise `buffer_size`, `num_candidates` and `action_selection`.
        critic_steps: steps of the critic after each, before `training_scale`.
        num_workers: processes that run the environments; 0 runs them in this one.
        worker_timeout: seconds that a worker has for one step.
    """

    num_episodes: int
    buffer_size: int
    num_candidates: int
    action_selection: str
    critic_steps: int
    num_workers: int
    worker_timeout: float


@dataclass(frozen=True)
class RunSettings:
    """What a run's results depend on; an interrupted run continues only under the same settings.

    Attributes:
        task: id of the task.
        data: sources of its data, see `Task.episodes`; none for data that is made on the spot.
        controller: one of `presets.CONTROLLERS`.
        sampler: one of `presets.SAMPLERS`.
        seed: of data, networks and training.
        methods: alignment methods of one pass.
        max_passes: passes through them at most.
        min_gain: a pass that raises the validated return by a smaller share is the last.
        validations_per_stage: see `AlignmentConfig`; likewise `num_retries`, `max_coherency_drop`, `max_divergence` and
            `min_diversity`.
        num_upsampling_passes: passes through an up-sampler that is trained after alignment; 0 trains none.
        num_candidates: candidates per decision in the evaluation.
        num_validation_episodes: episodes after each stage.
        num_evaluation_episodes: episodes of the reported figures.
        training_scale: factor on all numbers of training steps; below 1 for a quick look.
        foundation: folder or repo of a trained pipeline with its critic to start from; None trains one.
        online: what is collected between stages; None aligns on the task's data alone.
    """

    task: str
    controller: str
    sampler: str
    seed: int
    methods: tuple[str, ...]
    max_passes: int
    min_gain: float
    validations_per_stage: int
    num_retries: int
    max_coherency_drop: float
    num_candidates: int
    num_validation_episodes: int
    num_evaluation_episodes: int
    training_scale: float
    data: tuple[str, ...] = ()
    foundation: str | None = None
    max_divergence: float | None = None
    min_diversity: float | None = None
    num_upsampling_passes: int = 0
    online: OnlineSettings | None = None

    def scaled(self, max_steps: int) -> int:
        """Training steps at this run's scale, at least 1."""
        return max(1, round(max_steps * self.training_scale))


def align_task(settings: RunSettings, output_dir: Path, *, command: str = "") -> dict[str, Any]:
    """Run everything from data to report; returns the report.

    Finished parts are found again in `output_dir`: an interrupted run continues.

    Raises:
        ValueError: unknown task or controller, or `output_dir` holds a run with other settings, or one that another
            process is at work on.
    """
    refuse_several_processes("align")
    preset = preset_of(get_task(settings.task), settings.controller, settings.sampler)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(preset.num_threads)
    output_dir.mkdir(parents=True, exist_ok=True)
    with alone_in(output_dir):
        _claim(output_dir, settings)
        return _run(settings, preset, output_dir, command)


def _run(settings: RunSettings, preset: Preset, output_dir: Path, command: str) -> dict[str, Any]:
    start, task = time.perf_counter(), get_task(settings.task)
    episodes = task.episodes(settings.seed, settings.data)
    pipeline, episodes, seconds_before = _foundation(settings, episodes, output_dir / "pipeline")
    before = _evaluations(settings, task, pipeline, "before", output_dir)
    aligner = _aligner(settings, task, preset, pipeline, episodes, output_dir)
    _say(f"alignment: at most {settings.max_passes} × ({' → '.join(settings.methods)})")
    stages = aligner.run()
    _say(f"alignment is over: {aligner.end_reason}")
    seconds_before += sum(stage.wall_seconds for stage in stages[: aligner.num_resumed])
    collections: list[CollectionResult] = []
    if aligner.collector is not None:
        collections = aligner.collector.results
        seconds_before += sum(collection.wall_seconds for collection in collections[: aligner.collector.num_found])
    if settings.num_upsampling_passes:
        _add_upsampler(settings, preset, pipeline, episodes, output_dir / "upsampler")
    changed = bool(collections or settings.num_upsampling_passes)
    if changed:
        _save_beside_adapter(pipeline, settings, output_dir)
    after = _evaluations(settings, task, pipeline, "after", output_dir)
    acting = _best_acting(settings, task, pipeline, output_dir)
    with checkpoint.write_folder_atomically(output_dir / "adapter", _facts(settings)) as stage:
        pipeline.save_lora_weights(stage)
    fitted = preset.critic_config()
    critic = diagnose_critic(pipeline, episodes, discount=fitted.discount, expectile=fitted.expectile)
    report = _report(settings, task, episodes, before, after, stages)
    report.update(
        acting=acting,
        critic=critic.to_dict(),
        collections=[vars(collection) for collection in collections],
        pipeline_class=type(pipeline).__name__,
        pipeline_folder="pipeline-after" if changed else "pipeline",
        base_fingerprint=pipeline.base_fingerprint(),
        command=command,
        machine=run_environment()["machine"],
        wall_seconds=time.perf_counter() - start + seconds_before,
    )
    report["drawn_episodes"] = _draw_episodes(task, after[0], output_dir / "episodes.png")
    paths = {"paths_before": before[0].rollouts.paths(), "paths_after": after[0].rollouts.paths()}
    write_report(output_dir, report, **paths, critic=critic)
    return report


def _draw_episodes(task: Task, evaluation: Evaluation, path: Path) -> dict[str, dict[str, float]] | None:
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
        _say(f"episodes are not drawn: {type(error).__name__}: {error}")
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
    num_envs = num_side_by_side(task, count, options.get("num_workers", 0))
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


def run_environment() -> dict[str, str]:
    """What figures were measured with: `machine`, and the `version` of this library."""
    return {
        "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.machine()}",
        "version": dmc_hub.__version__,
    }


def _save_beside_adapter(pipeline: Any, settings: RunSettings, output_dir: Path) -> None:
    """The foundation with what alignment trained beside the adapter: a critic on collected episodes, an up-sampler."""
    foundation = load_pipeline(output_dir / "pipeline")
    foundation.critic.load_state_dict(pipeline.critic.state_dict())
    if pipeline.upsampler is not None:
        foundation.register_modules(upsampler=pipeline.upsampler)
    with checkpoint.write_folder_atomically(output_dir / "pipeline-after", _facts(settings)) as stage:
        foundation.save_pretrained(stage)


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
    generator_seed: int = 0,
    num_workers: int = 0,
    worker_timeout: float = 60.0,
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
        generator_seed: see `dmc_hub.evaluation.evaluate`.
        num_workers: processes that run one environment each, side by side; 0 runs as many as the task allows here.
        worker_timeout: seconds that a worker has for one step.
        cache_dir: folder for the results of every batch of episodes: what is there is not run again.
        progress: whether to show a bar.
        num_envs: environments side by side; by default what `num_side_by_side` says.
    """
    seeds = range(first_seed, first_seed + num_episodes)
    num_envs = num_envs or num_side_by_side(task, num_episodes, num_workers)
    options: dict[str, Any] = {
        "num_candidates": num_candidates,
        "action_selection": action_selection,
        "num_inference_steps": num_inference_steps,
        "num_upsampling_passes": num_upsampling_passes,
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
    vector_env = make_vector_env(task, num_envs, num_workers=num_workers, worker_timeout=worker_timeout)
    try:
        return evaluate(
            Agent(pipeline, num_action_steps=task.num_action_steps),
            vector_env,
            seeds=seeds,
            cache=cache,
            coherency=coherency_of(task, controller),
            success=task.success,
            score=task.score,
            progress=progress,
            **options,
        )
    finally:
        vector_env.close()


def _cache_settings(
    task: Task, pipeline: Any, controller: str, num_envs: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a batch of episodes depends on besides its seeds."""
    decisions = {name: options[name] for name in ("num_candidates", "action_selection", "num_upsampling_passes")}
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


def train_foundation(
    settings: RunSettings,
    episodes: Episodes,
    folder: Path,
    *,
    critic: nn.Module | None = None,
    denoiser: nn.Module | None = None,
) -> tuple[Any, Episodes]:
    """Train the preset's pipeline: denoiser, inverse dynamics where it has them, critic.

    Args:
        settings: task, controller, sampler, seed and scale count.
        episodes: the data.
        folder: for the checkpoints of what is not finished; training goes on from those that are there.
        critic: a trained critic of the same data, to be copied instead of trained; likewise `denoiser`.

    Returns:
        The pipeline, and the data as it acts on them: an image policy's images are features.
    """
    preset = preset_of(get_task(settings.task), settings.controller, settings.sampler)
    pipeline = preset.build_pipeline(episodes, settings.seed)
    if denoiser is not None:
        pipeline.denoiser.load_state_dict(denoiser.state_dict())
    else:
        _say(f"foundation: {settings.controller} on {episodes.num_episodes} episodes")
        steps = settings.scaled(preset.foundation_config().max_steps)
        config = preset.foundation_config(seed=settings.seed, max_steps=steps)
        _train_part(DenoisingTrainer, pipeline, config, episodes, folder / "foundation")
    if settings.controller == "decision_diffuser":
        _say("inverse dynamics")
        dynamics = InverseDynamicsConfig(output_dir=None, seed=settings.seed)
        dynamics = dataclasses.replace(dynamics, max_steps=settings.scaled(dynamics.max_steps))
        _train_part(InverseDynamicsTrainer, pipeline, dynamics, episodes, folder / "inverse-dynamics")
    episodes = episodes_that_fit(pipeline, episodes)
    if critic is not None:
        pipeline.critic.load_state_dict(critic.state_dict())
        return pipeline, episodes
    _say("critic: IQL")
    steps = settings.scaled(preset.critic_config().max_steps)
    config = preset.critic_config(seed=settings.seed, max_steps=steps)
    _train_part(IQLTrainer, pipeline, config, episodes, folder / "critic")
    return pipeline, episodes


def _train_part(
    trainer_type: type[DiffusionTrainer], pipeline: Any, config: Any, episodes: Episodes, folder: Path
) -> None:
    """Train to the end, from the last checkpoint of an interrupted run."""
    saving: dict[str, Any] = {"output_dir": str(folder), "save_strategy": "steps", "save_total_limit": 1}
    saving["save_steps"] = math.ceil(config.max_steps / CHECKPOINTS_PER_PART)
    trainer = trainer_type(pipeline, dataclasses.replace(config, **saving), train_dataset=episodes)
    trainer.train(resume_from_checkpoint="auto")


def _remove_parts(folder: Path, *names: str) -> None:
    """Remove the checkpoints of parts that are finished and saved."""
    for name in names:
        checkpoint.remove_folder(folder / name)
    with suppress(OSError):  # another part is not finished
        folder.rmdir()


def shared_foundation(settings: RunSettings, output_dir: Path) -> Path:
    """The folder of a foundation that several runs of a table start from, trained if it is not there.

    Samplers that train the same network share it (DDPM and DDIM), and all controllers share one critic per dataset and
    seed, that of the DDPM planner.

    Raises:
        ValueError: the folder holds one of another training scale.
    """
    name = f"{settings.controller}-{settings.sampler}-{settings.task.partition('-')[2]}-{settings.seed}"
    folder = output_dir / "foundations" / name
    if folder.is_dir():
        scale = checkpoint.verify(folder).metadata.get("training_scale")
        if scale != settings.training_scale:
            raise ValueError(
                f"`output_dir` {output_dir} holds foundations of training scale {scale}, not "
                f"{settings.training_scale}: choose another folder."
            )
        return folder
    shared: dict[str, Any] = {}
    if (settings.controller, settings.sampler) != ("planner", "ddpm"):
        source = dataclasses.replace(settings, controller="planner", sampler="ddpm")
        pipeline = load_pipeline(shared_foundation(source, output_dir))
        shared["critic"] = pipeline.critic
        if (settings.controller, settings.sampler) == ("planner", "ddim"):
            shared["denoiser"] = pipeline.denoiser
    episodes = get_task(settings.task).episodes(settings.seed, settings.data)
    trained, _ = train_foundation(settings, episodes, output_dir / "unfinished" / name, **shared)
    with checkpoint.write_folder_atomically(folder, {"training_scale": settings.training_scale}) as stage:
        trained.save_pretrained(stage)
    _remove_parts(output_dir / "unfinished" / name, *PARTS)
    return folder


def finished_report(settings: RunSettings, folder: Path) -> dict[str, Any] | None:
    """The report of a finished run with these settings, wherever its foundation was; None if there is none."""
    if not (folder / "report.json").is_file():
        return None
    theirs = {**checkpoint.load_json(folder / "settings.json"), "foundation": None}  # its folder may have moved
    ours = json.loads(json.dumps(dataclasses.asdict(settings)))
    return checkpoint.load_json(folder / "report.json") if theirs == ours else None


def _foundation(settings: RunSettings, episodes: Episodes, folder: Path) -> tuple[Any, Episodes, float]:
    """The pipeline, the data as it acts on them, and the seconds that an earlier process took if it has left it."""
    if folder.is_dir():
        manifest = checkpoint.verify(folder)
        _say(f"foundation and critic: found in {folder}")
        pipeline = load_pipeline(folder)
        return pipeline, episodes_that_fit(pipeline, episodes), manifest.metadata.get("wall_seconds", 0.0)
    start, unfinished = time.perf_counter(), folder.parent / "unfinished"
    if settings.foundation:
        pipeline = _given_foundation(settings)
        episodes = episodes_that_fit(pipeline, episodes)
    else:
        pipeline, episodes = train_foundation(settings, episodes, unfinished)
    acting = {"action_selection": "greedy", "num_candidates": settings.num_candidates}
    pipeline.describe_task(**describe_task(get_task(settings.task)), **acting)
    facts = {**_facts(settings), "wall_seconds": time.perf_counter() - start}
    with checkpoint.write_folder_atomically(folder, facts) as stage:
        pipeline.save_pretrained(stage)
    _remove_parts(unfinished, *PARTS)
    return pipeline, episodes, 0.0


def _given_foundation(settings: RunSettings) -> Any:
    pipeline = load_pipeline(str(settings.foundation))
    if isinstance(pipeline, DiffusionPolicyPipeline) != (settings.controller == "policy"):
        raise ValueError(
            f"`foundation` {settings.foundation} holds a {type(pipeline).__name__}: not what `controller` "
            f"{settings.controller!r} says."
        )
    if pipeline.critic is None:
        raise ValueError(f"`foundation` {settings.foundation} has no critic: train one with `dmc-hub train-critic`.")
    return pipeline


def _aligner(
    settings: RunSettings, task: Task, preset: Preset, pipeline: Any, episodes: Episodes, output_dir: Path
) -> SequentialAligner:
    def validate(controller: Any) -> dict[str, float]:
        result = evaluate_on_task(
            task,
            controller,
            settings.controller,
            first_seed=VALIDATION_SEED,
            num_episodes=settings.num_validation_episodes,
            num_candidates=1,
            action_selection="greedy",
        )
        measured = {"return_mean": result.statistics.mean, "return_std": result.statistics.std}
        if result.coherency is not None:
            measured["coherency"] = result.coherency
        _say(f"validation: return {result.statistics.mean:.2f} ± {result.statistics.std:.2f} with one candidate")
        return measured

    online: dict[str, Any] = {} if settings.online is None else _online(settings, settings.online, task, preset)
    configs: dict[str, Any] = preset.stage_configs()
    for method, config in configs.items():
        configs[method] = dataclasses.replace(config, max_steps=settings.scaled(config.max_steps))
    return SequentialAligner(
        pipeline,
        AlignmentConfig(
            output_dir=str(output_dir),
            methods=list(settings.methods),
            max_passes=settings.max_passes,
            min_gain=settings.min_gain,
            validations_per_stage=settings.validations_per_stage,
            num_retries=settings.num_retries,
            max_coherency_drop=settings.max_coherency_drop,
            max_divergence=settings.max_divergence,
            min_diversity=settings.min_diversity,
            seed=settings.seed,
        ),
        train_dataset=episodes,
        validate=validate,
        stage_configs=configs,
        **online,
    )


def _add_upsampler(settings: RunSettings, preset: Preset, pipeline: Any, episodes: Episodes, folder: Path) -> None:
    """Give the pipeline an up-sampler trained on the aligned controller's samples, or the one that `folder` holds."""
    if folder.is_dir():
        checkpoint.verify(folder)
        _say(f"cascade: found in {folder}")
        pipeline.register_modules(upsampler=type(pipeline.denoiser).from_pretrained(folder).eval())
        return
    _say("cascade: training the up-sampler")
    config = preset.cascade_config(seed=settings.seed)
    config = dataclasses.replace(config, max_steps=settings.scaled(config.max_steps))
    unfinished = folder.parent / "unfinished"
    _train_part(CascadeTrainer, pipeline, config, episodes, unfinished / "cascade")
    with checkpoint.write_folder_atomically(folder, _facts(settings)) as stage:
        pipeline.upsampler.save_pretrained(stage)
    _remove_parts(unfinished, "cascade")


def _online(settings: RunSettings, online: OnlineSettings, task: Task, preset: Preset) -> dict[str, Any]:
    """What the aligner needs to collect episodes."""
    config = OnlineConfig(
        num_episodes=online.num_episodes,
        buffer_size=online.buffer_size,
        num_candidates=online.num_candidates,
        action_selection=cast(Any, online.action_selection),
        first_seed=COLLECTION_SEED + 1_000_000 * settings.seed,
    )
    return {
        "online": config,
        "make_env": functools.partial(
            make_vector_env,
            task,
            online.num_episodes,
            num_workers=online.num_workers,
            worker_timeout=online.worker_timeout,
        ),
        "critic_config": preset.critic_config(max_steps=settings.scaled(online.critic_steps)),
    }


def _evaluations(settings: RunSettings, task: Task, pipeline: Any, when: str, output_dir: Path) -> list[Evaluation]:
    """One candidate, the best of many by the critic, for a policy the mean of many; each again through the cascade,
    beside the foundation without one. All but the first, whose episodes are drawn, are found again after an
    interruption."""
    results: list[Evaluation] = []
    cascades = [0, settings.num_upsampling_passes] if settings.num_upsampling_passes and when == "after" else [0]
    for passes, (selection, candidates) in itertools.product(cascades, _ways_to_act(settings)):
        result = evaluate_on_task(
            task,
            pipeline,
            settings.controller,
            first_seed=EVALUATION_SEED,
            num_episodes=settings.num_evaluation_episodes,
            num_candidates=candidates,
            action_selection=selection,
            num_upsampling_passes=passes,
            cache_dir=output_dir / "evaluations" if results else None,
            progress=True,
        )
        statistics, cascade = result.statistics, f", {passes} passes through the cascade" if passes else ""
        _say(f"{when}, {candidates} candidates, {selection}{cascade}: {statistics.mean:.2f} ± {statistics.std:.2f}")
        results.append(result)
    return results * 2 if settings.num_upsampling_passes and when == "before" else results


def _ways_to_act(settings: RunSettings) -> list[tuple[str, int]]:
    """Action selections and numbers of candidates that are evaluated."""
    ways = [("greedy", 1), ("greedy", settings.num_candidates)]
    return [*ways, ("expectation", settings.num_candidates)] if settings.controller == "policy" else ways


def _best_acting(settings: RunSettings, task: Task, pipeline: Any, output_dir: Path) -> dict[str, Any]:
    """How the aligned controller acts best on validation episodes: a critic that it was aligned to may rank worse than
    chance what it now prefers."""
    validated: list[dict[str, Any]] = []
    for selection, candidates in _ways_to_act(settings):
        result = evaluate_on_task(
            task,
            pipeline,
            settings.controller,
            first_seed=VALIDATION_SEED,
            num_episodes=settings.num_validation_episodes,
            num_candidates=candidates,
            action_selection=selection,
            cache_dir=output_dir / "evaluations",
        )
        way = {"action_selection": selection, "num_candidates": candidates}
        validated.append({**way, "return_mean": result.statistics.mean})
    best = max(validated, key=lambda row: row["return_mean"])
    _say(f"on validation episodes it acts best as {best['action_selection']} of {best['num_candidates']}")
    return {**best, "validated": validated}


def _report(
    settings: RunSettings,
    task: Task,
    episodes: Episodes,
    before: list[Evaluation],
    after: list[Evaluation],
    stages: list[StageResult],
) -> dict[str, Any]:
    main = 1  # greedy over all candidates, the paper's setting
    rows = [
        {
            "action_selection": first.action_selection,
            "num_candidates": first.num_candidates,
            "num_upsampling_passes": last.num_upsampling_passes,
            "before": first.statistics.to_dict(),
            "after": last.statistics.to_dict(),
            "coherency_before": first.coherency,
            "coherency_after": last.coherency,
            "diversity_before": first.candidate_diversity,
            "diversity_after": last.candidate_diversity,
            "returns_before": first.outcomes.tolist(),
            "returns_after": last.outcomes.tolist(),
            "scores_before": _normalized(task, first),
            "scores_after": _normalized(task, last),
        }
        for first, last in zip(before, after, strict=True)
    ]
    return {
        "task": task.name,
        "data": [Path(source).name for source in settings.data],
        "metric": "return" if task.objective == "return" else task.score_name,
        "score_name": task.score_name,
        "controller": settings.controller,
        "sampler": settings.sampler,
        "seed": settings.seed,
        "training_scale": settings.training_scale,
        "methods": f"{math.ceil((len(stages) - 1) / len(settings.methods))} × ({' → '.join(settings.methods)})",
        "num_candidates": settings.num_candidates,
        "min_diversity": settings.min_diversity,
        "max_divergence": settings.max_divergence,
        "return_before": before[main].statistics.mean,
        "return_after": after[main].statistics.mean,
        "std_before": before[main].statistics.std,
        "std_after": after[main].statistics.std,
        "return_optimal": None if task.optimal_return is None else task.optimal_return(),
        "return_data": float(episodes.returns().mean()),
        "coherency_before": before[main].coherency,
        "coherency_after": after[main].coherency,
        "best_of_n_control": {
            "num_candidates": settings.num_candidates,
            "return_mean": before[main].statistics.mean,
            "return_std": before[main].statistics.std,
        },
        "evaluations": rows,
        "main_evaluation": main,
        "episodes": settings.num_evaluation_episodes,
        "seeds": list(range(EVALUATION_SEED, EVALUATION_SEED + settings.num_evaluation_episodes)),
        "validation_seeds": list(range(VALIDATION_SEED, VALIDATION_SEED + settings.num_validation_episodes)),
        "stages": [vars(stage) for stage in stages],
    }


def _normalized(task: Task, evaluation: Evaluation) -> list[float] | None:
    scores = task.normalized_scores(evaluation.returns, evaluation.scores)
    return None if scores is None else scores.tolist()


def _claim(output_dir: Path, settings: RunSettings) -> None:
    """Write down the settings of a new run, or compare with those of the run that is there."""
    path, ours = output_dir / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if not path.is_file():
        checkpoint.save_json(path, ours)
        return
    theirs = checkpoint.load_json(path)
    if not isinstance(theirs, dict):
        raise ValueError(f"`{path}` does not hold the settings of a run: choose another folder.")
    changed = [f"{k} was {theirs.get(k)!r}, is now {v!r}" for k, v in ours.items() if theirs.get(k) != v]
    if changed:
        raise ValueError(
            f"`output_dir` {output_dir} holds a run with other settings ({'; '.join(changed)}): choose another folder, "
            "or repeat its settings to continue it."
        )


def _facts(settings: RunSettings) -> dict[str, Any]:
    return {"task": get_task(settings.task).name, "controller": settings.controller, "seed": settings.seed}


def _say(message: str) -> None:
    print(f"· {message}", file=sys.stderr, flush=True)  # noqa: T201
