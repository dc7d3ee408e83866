"""Whole runs: data, foundation, critic, sequential alignment, evaluation, report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from pathlib import Path
from typing import Any, cast

import torch

from dmc_hub import checkpoint
from dmc_hub.critic_diagnostics import diagnose_critic
from dmc_hub.data import Episodes
from dmc_hub.evaluation import Evaluation
from dmc_hub.foundations import remove_parts, run_foundation, train_part
from dmc_hub.hub import load_pipeline
from dmc_hub.output_folder import alone_in
from dmc_hub.presets import Preset, preset_of
from dmc_hub.report import write_report
from dmc_hub.run_settings import (
    COLLECTION_SEED,
    EVALUATION_SEED,
    VALIDATION_SEED,
    OnlineSettings,
    RunSettings,
    run_environment,
    run_facts,
    say,
)
from dmc_hub.task_evaluation import draw_episodes, evaluate_on_task
from dmc_hub.tasks import Task, get_task, make_vector_env
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner, StageResult, refuse_several_processes
from dmc_hub.trainers.cascade import CascadeTrainer
from dmc_hub.trainers.online import CollectionResult, OnlineConfig


def align_task(
    settings: RunSettings, output_dir: Path, *, command: str = "", on_save_error: str = "raise"
) -> dict[str, Any]:
    """Run everything from data to report; returns the report.

    Finished parts are found again in `output_dir`: an interrupted run continues.

    Args:
        settings: what the results depend on.
        output_dir: folder of the run.
        command: that the report names.
        on_save_error: "raise", or "warn" and go on without, when a checkpoint or a stage cannot be written. Foundation,
            adapter and report are what the run is for: it ends if they cannot.

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
        return _run(settings, preset, output_dir, command, on_save_error)


def _run(settings: RunSettings, preset: Preset, output_dir: Path, command: str, on_save_error: str) -> dict[str, Any]:
    start, task = time.perf_counter(), get_task(settings.task)
    episodes = task.episodes(settings.seed, settings.data)
    pipeline, episodes, seconds_before = run_foundation(
        settings, episodes, output_dir / "pipeline", on_save_error=on_save_error
    )
    before = _evaluations(settings, task, pipeline, "before", output_dir)
    aligner = _aligner(settings, task, preset, pipeline, episodes, output_dir, on_save_error)
    say(f"alignment: at most {settings.max_passes} × ({' → '.join(settings.methods)})")
    stages = aligner.run()
    say(f"alignment is over: {aligner.end_reason}")
    seconds_before += sum(stage.wall_seconds for stage in stages[: aligner.num_resumed])
    collections: list[CollectionResult] = []
    if aligner.collector is not None:
        collections = aligner.collector.results
        seconds_before += sum(collection.wall_seconds for collection in collections[: aligner.collector.num_found])
    if settings.num_upsampling_passes:
        _add_upsampler(settings, preset, pipeline, episodes, output_dir / "upsampler", on_save_error)
    changed = bool(collections or settings.num_upsampling_passes)
    if changed:
        _save_beside_adapter(pipeline, settings, output_dir)
    after = _evaluations(settings, task, pipeline, "after", output_dir)
    acting = _best_acting(settings, task, pipeline, aligner.best_return, output_dir)
    with checkpoint.write_folder_atomically(output_dir / "adapter", run_facts(settings)) as stage:
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
    report["drawn_episodes"] = draw_episodes(task, after[0], output_dir / "episodes.png")
    paths = {"paths_before": before[0].rollouts.paths(), "paths_after": after[0].rollouts.paths()}
    write_report(output_dir, report, **paths, critic=critic)
    return report


def _save_beside_adapter(pipeline: Any, settings: RunSettings, output_dir: Path) -> None:
    """The foundation with what alignment trained beside the adapter: a critic on collected episodes, an up-sampler."""
    foundation = load_pipeline(output_dir / "pipeline")
    foundation.critic.load_state_dict(pipeline.critic.state_dict())
    if pipeline.upsampler is not None:
        foundation.register_modules(upsampler=pipeline.upsampler)
    with checkpoint.write_folder_atomically(output_dir / "pipeline-after", run_facts(settings)) as stage:
        foundation.save_pretrained(stage)


def finished_report(settings: RunSettings, folder: Path) -> dict[str, Any] | None:
    """The report of a finished run with these settings, wherever its foundation was; None if there is none."""
    if not (folder / "report.json").is_file():
        return None
    theirs = {**checkpoint.load_json(folder / "settings.json"), "foundation": None}  # its folder may have moved
    ours = json.loads(json.dumps(dataclasses.asdict(settings)))
    return checkpoint.load_json(folder / "report.json") if theirs == ours else None


def _aligner(
    settings: RunSettings,
    task: Task,
    preset: Preset,
    pipeline: Any,
    episodes: Episodes,
    output_dir: Path,
    on_save_error: str,
) -> SequentialAligner:
    def validate(controller: Any) -> dict[str, float]:
        result = _validated(settings, task, controller, "greedy", 1)
        measured = {"return_mean": result.statistics.mean, "return_std": result.statistics.std}
        if result.coherency is not None:
            measured["coherency"] = result.coherency
        say(f"validation: return {result.statistics.mean:.2f} ± {result.statistics.std:.2f} with one candidate")
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
            on_save_error=on_save_error,
        ),
        train_dataset=episodes,
        validate=validate,
        stage_configs=configs,
        **online,
    )


def _add_upsampler(
    settings: RunSettings, preset: Preset, pipeline: Any, episodes: Episodes, folder: Path, on_save_error: str
) -> None:
    """Give the pipeline an up-sampler trained on the aligned controller's samples, or the one that `folder` holds."""
    if folder.is_dir():
        checkpoint.verify(folder)
        say(f"cascade: found in {folder}")
        pipeline.register_modules(upsampler=type(pipeline.denoiser).from_pretrained(folder).eval())
        return
    say("cascade: training the up-sampler")
    config = preset.cascade_config(seed=settings.seed, on_save_error=on_save_error)
    config = dataclasses.replace(config, max_steps=settings.scaled(config.max_steps))
    unfinished = folder.parent / "unfinished"
    train_part(CascadeTrainer, pipeline, config, episodes, unfinished / "cascade")
    with checkpoint.write_folder_atomically(folder, run_facts(settings)) as stage:
        pipeline.upsampler.save_pretrained(stage)
    remove_parts(unfinished, "cascade")


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
        say(f"{when}, {candidates} candidates, {selection}{cascade}: {statistics.mean:.2f} ± {statistics.std:.2f}")
        results.append(result)
    return results * 2 if settings.num_upsampling_passes and when == "before" else results


def _ways_to_act(settings: RunSettings) -> list[tuple[str, int]]:
    """Action selections and numbers of candidates that are evaluated."""
    ways = [("greedy", 1), ("greedy", settings.num_candidates)]
    return [*ways, ("expectation", settings.num_candidates)] if settings.controller == "policy" else ways


def _validated(
    settings: RunSettings, task: Task, pipeline: Any, selection: str, candidates: int, cache_dir: Path | None = None
) -> Evaluation:
    return evaluate_on_task(
        task,
        pipeline,
        settings.controller,
        first_seed=VALIDATION_SEED,
        num_episodes=settings.num_validation_episodes,
        num_candidates=candidates,
        action_selection=selection,
        cache_dir=cache_dir,
    )


def _best_acting(
    settings: RunSettings, task: Task, pipeline: Any, return_of_one: float, output_dir: Path
) -> dict[str, Any]:
    """How the aligned controller acts best on validation episodes: a critic that it was aligned to may rank worse than
    chance what it now prefers. `return_of_one` is what alignment has validated with one candidate."""
    validated: list[dict[str, Any]] = []
    for selection, candidates in _ways_to_act(settings):
        mean = return_of_one
        if candidates > 1:
            mean = _validated(
                settings, task, pipeline, selection, candidates, output_dir / "evaluations"
            ).statistics.mean
        validated.append({"action_selection": selection, "num_candidates": candidates, "return_mean": mean})
    best = max(validated, key=lambda row: row["return_mean"])
    say(f"on validation episodes it acts best as {best['action_selection']} of {best['num_candidates']}")
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
