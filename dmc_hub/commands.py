"""The commands of `dmc-hub` and of the scripts: each takes dataclasses of arguments and does one thing."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from dmc_hub import ablation, cards, checkpoint, portable, reproduction, transfer
from dmc_hub.aggregation import aggregate_summaries
from dmc_hub.arguments import (
    AblateAlignmentArguments,
    AggregateArguments,
    AlignArguments,
    CardArguments,
    CascadeArguments,
    CheckTaskArguments,
    CollectArguments,
    DemoArguments,
    DoctorArguments,
    EvaluateArguments,
    FoundationArguments,
    InfoArguments,
    PullArguments,
    PushArguments,
    ReproduceNav1DArguments,
    StageArguments,
    SummarizeArguments,
    TaskArguments,
    require_positive,
)
from dmc_hub.data import refuse_defects, validate_dataset
from dmc_hub.doctor import diagnose
from dmc_hub.errors import RunError
from dmc_hub.hub import describe, load_pipeline, pull
from dmc_hub.presets import preset_of
from dmc_hub.profiling import profile_steps
from dmc_hub.publish import publish
from dmc_hub.recipes import align_task
from dmc_hub.summary import summarize_runs
from dmc_hub.task_evaluation import evaluate_on_task, save_videos
from dmc_hub.tasks import Task, action_bounds, describe_task, get_task
from dmc_hub.trainers.base import DiffusionTrainer
from dmc_hub.trainers.cascade import CascadeConfig, CascadeTrainer
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

Command = TypeVar("Command", bound=Callable[..., None])


def _profilable(command: Command) -> Command:
    """A command whose first arguments may ask for a `profile`."""

    @functools.wraps(command)
    def run(arguments: Any, *configs: Any) -> None:
        with profile_steps(arguments.profile):
            command(arguments, *configs)

    return cast(Command, run)


@_profilable
def align(arguments: AlignArguments) -> None:
    """Data, foundation, critic, alignment, evaluation, report."""
    settings = arguments.settings()
    _check_data(arguments)
    if arguments.push_to_hub is not None:
        for repo_id in (arguments.push_to_hub, f"{arguments.push_to_hub}-lora"):
            transfer.check_access(repo_id)
    report = align_task(
        settings,
        Path(arguments.output_dir),
        command=_command(arguments),
        on_save_error=arguments.on_save_error,
    )
    print(
        f"{report['task']} {report['controller']}: return {report['return_before']:.2f} ± {report['std_before']:.2f} → "
        f"{report['return_after']:.2f} ± {report['std_after']:.2f}; see {Path(arguments.output_dir) / 'report.md'}"
    )
    if arguments.push_to_hub is not None:
        _publish(arguments.output_dir, arguments.push_to_hub, private=arguments.private)


def push(arguments: PushArguments) -> None:
    """Push a run, a pipeline or an adapter."""
    options = vars(arguments).copy()
    _publish(options.pop("folder"), options.pop("repo_id"), **options)


def pull_repo(arguments: PullArguments) -> None:
    """Copy a repo into a folder."""
    snapshot = pull(arguments.repo_id, arguments.output_dir, revision=arguments.revision)
    print(f"{arguments.repo_id} at {snapshot.revision[:12]}: {len(snapshot.manifest.files)} files, all as listed")


def card(arguments: CardArguments) -> None:
    """Write the card of a run's adapter or pipeline."""
    run = Path(arguments.run)
    if not (run / cards.REPORT_NAME).is_file():
        raise FileNotFoundError(f"`run` {run} has no {cards.REPORT_NAME}.")
    report = cards.read_report(run / cards.REPORT_NAME)
    pictures = list(cards.pictures_in(run))
    if arguments.kind == "adapter":
        text = cards.adapter_card(report, repo_id=arguments.repo_id, base_model=arguments.base_model, pictures=pictures)
    else:
        index = portable.read_index(run / "pipeline")
        text = cards.pipeline_card(
            report,
            class_name=portable.installed_class(index),
            facts=portable.task_of(index) or {},
            repo_id=arguments.repo_id,
            pictures=pictures,
        )
    if arguments.output is None:
        print(text, end="")
    else:
        checkpoint.write_text(Path(arguments.output), text)


def info(arguments: InfoArguments) -> None:
    """Say what a repo or folder is, and whether it is safe to load."""
    found = describe(arguments.source, revision=arguments.revision)
    lines = {"kind": found.kind, **found.facts, **found.results}
    lines["safe to load"] = "no" if found.doubts else "yes: no code of it runs, and no file is unpickled"
    print(cards.one_line(found.source))
    for name, value in lines.items():
        text = value if isinstance(value, str) else json.dumps(value)
        print(f"  {cards.one_line(name)}: {cards.one_line(text)}")
    if found.doubts:
        raise ValueError(" ".join(found.doubts))


def _publish(folder: str, repo_id: str, **options: Any) -> None:
    for published in publish(folder, repo_id, **options):
        print(f"pushed {published.repo_id} at {published.revision[:12]}")


def demo(arguments: DemoArguments) -> None:
    """Serve the page, or write it as a Space."""
    from dmc_hub.demo import app

    if not 0 <= arguments.port < 65536:
        raise ValueError(f"`port` must lie in 0..65535, got {arguments.port}.")
    pipelines, adapters = ([Path(folder) for folder in part] for part in (arguments.pipelines, arguments.adapters))
    if arguments.space is not None:
        app.save_space(pipelines, adapters, arguments.space)
        _say(f"saved {arguments.space}; `python app.py` in it serves the page")
        return
    app.serve(app.Demo(pipelines, adapters), port=arguments.port)


def collect_data(arguments: CollectArguments) -> None:
    """Collect episodes of a task and write them."""
    from dmc_hub import collect

    task, settings, folder = get_task(arguments.task), arguments.settings(), Path(arguments.output_dir)
    if folder.exists():
        raise ValueError(f"`output_dir` {folder} exists already: choose another folder.")
    collected = collect.collect(task, settings)
    facts = collect.save_collected(task, settings, collected, folder)
    success = "" if facts["success_rate"] is None else f", {100 * facts['success_rate']:.0f} % successes"
    print(
        f"{facts['num_episodes']} episodes, {facts['num_steps']} steps of behaviour {facts['behavior']}: return "
        f"{facts['return_mean']:.2f} ± {facts['return_std']:.2f}{success}; see {folder}"
    )


def check_task(arguments: CheckTaskArguments) -> None:
    """Try a task from environment to evaluation."""
    from dmc_hub.task_check import check_task

    task, start = get_task(arguments.task), time.perf_counter()
    for part in check_task(task, seed=arguments.seed):
        print(f"{task.name}  {part.name:28} {part.seconds:8.2f} s  {part.result}", flush=True)
    print(f"{task.name}  ok in {time.perf_counter() - start:.1f} s")


def doctor(arguments: DoctorArguments) -> None:
    """Say whether everything is in order."""
    findings = []
    for finding in diagnose(arguments.output_dir):
        findings.append(finding)
        print(cards.one_line(f"{finding.state:8} {finding.subject:18} {finding.detail}"), flush=True)
    problems = [finding.subject for finding in findings if finding.state == "problem"]
    if problems:
        raise RunError(f"{len(problems)} problems: {', '.join(problems)}.")


def reproduce_nav1d(arguments: ReproduceNav1DArguments) -> None:
    """Run the Nav1D rows of the paper's tables."""
    require_positive(arguments, "num_episodes")
    rows = reproduction.reproduce_nav1d(
        Path(arguments.output_dir),
        datasets=arguments.datasets,
        seeds=arguments.seeds[:1] if arguments.quick else arguments.seeds,
        training_scale=0.02 if arguments.quick else 1.0,
        num_episodes=arguments.num_episodes,
    )
    reached = sum(row["return_after"] >= row["paper_after"] for row in rows)
    card = Path(arguments.output_dir) / "nav1d-table.md"
    print(f"{reached} of {len(rows)} cells at the paper's figure or above; see {card}")


def ablate_alignment(arguments: AblateAlignmentArguments) -> None:
    """Align one foundation in every way and compare."""
    require_positive(arguments, "num_episodes")
    ablation.ablate_alignment(
        Path(arguments.output_dir),
        controllers=arguments.controllers,
        variants=arguments.variants,
        seeds=arguments.seeds[:1] if arguments.quick else arguments.seeds,
        training_scale=0.02 if arguments.quick else 1.0,
        num_episodes=arguments.num_episodes,
    )
    print((Path(arguments.output_dir) / "nav1d-ablation.md").read_text())


def summarize(arguments: SummarizeArguments) -> None:
    """Pool runs of several training seeds."""
    summary = summarize_runs([Path(run) for run in arguments.runs], Path(arguments.output_dir))
    (low, high), (after_low, after_high) = summary["return_before_ci"], summary["return_after_ci"]
    print(
        f"{summary['task']} {summary['controller']}: {summary['metric']} {summary['return_before']:.2f} "
        f"[{low:.2f}, {high:.2f}] → {summary['return_after']:.2f} [{after_low:.2f}, {after_high:.2f}]"
    )


def aggregate(arguments: AggregateArguments) -> None:
    """Aggregate the summaries of several tasks."""
    results = aggregate_summaries([Path(path) for path in arguments.results], Path(arguments.output_dir))
    iqm = results["aggregates"]["IQM"]
    print(
        f"{results['num_tasks']} tasks, IQM of the score: {iqm['before']['value']:.3f} → {iqm['after']['value']:.3f}, "
        f"control {iqm['control']['value']:.3f}; see {Path(arguments.output_dir) / 'aggregate.md'}"
    )


def _command(arguments: AlignArguments) -> str:
    """The command that repeats a run; the folder is left out, because it says nothing to anyone else."""
    options = {**vars(arguments), "output_dir": f"runs/{get_task(arguments.task).name}-{arguments.controller}"}
    options |= {"push_to_hub": None, "private": None, "on_save_error": "raise", "profile": None}
    for name in ("foundation", "task"):
        if options[name] is not None and Path(options[name]).is_absolute():
            options[name] = Path(options[name]).name
    options["data"] = [Path(source).name if Path(source).is_absolute() else source for source in arguments.data]
    defaults = {option.name: option.default for option in fields(AlignArguments)}
    words = ["dmc-hub align"]
    for name, value in options.items():
        if value not in (None, [], defaults[name]):
            text = " ".join(value) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)


@_profilable
def train_denoising(arguments: FoundationArguments, config: DenoisingConfig) -> None:
    """Train a foundation controller."""
    _train_foundation(DenoisingTrainer, arguments, config)


@_profilable
def train_critic(arguments: FoundationArguments, config: IQLConfig) -> None:
    """Train the critic of a pipeline."""
    _train_foundation(IQLTrainer, arguments, config)


@_profilable
def train_ddpo(arguments: StageArguments, config: DDPOConfig) -> None:
    """Align by policy gradients over the denoising steps."""
    _train_stage(DDPOTrainer, arguments, config)


@_profilable
def train_reward_gradient(arguments: StageArguments, config: RewardGradientConfig) -> None:
    """Align by the reward's own gradient."""
    _train_stage(RewardGradientTrainer, arguments, config)


@_profilable
def train_nft(arguments: StageArguments, config: NFTConfig) -> None:
    """Align by policy optimisation on the forward process."""
    _train_stage(NFTTrainer, arguments, config)


@_profilable
def train_dpo(arguments: StageArguments, config: DiffusionDPOConfig) -> None:
    """Align by preferences."""
    _train_stage(DiffusionDPOTrainer, arguments, config)


@_profilable
def train_sft(arguments: StageArguments, config: SFTConfig) -> None:
    """Align by fine-tuning on the best samples."""
    _train_stage(SFTTrainer, arguments, config)


@_profilable
def train_cascade(arguments: CascadeArguments, config: CascadeConfig) -> None:
    """Train an up-sampler; the pipeline is saved with it and without the adapter, which fits it as before."""
    task, output_dir = get_task(arguments.task), _output_dir(config)
    _check_data(arguments)
    pipeline = _load(arguments)
    resume = _prepare(output_dir / "pipeline", config)
    trainer = CascadeTrainer(pipeline, config, train_dataset=task.episodes(config.seed, arguments.data))
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        pipeline.unload_lora()
        _save_pipeline(pipeline, output_dir / "pipeline", task, _facts(task.name, trainer))


@_profilable
def evaluate(arguments: EvaluateArguments) -> None:
    """Roll a controller out and print what it earned."""
    task = get_task(arguments.task)
    require_positive(arguments, "num_episodes", "num_candidates")
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"`output` {arguments.output} lies in a folder that does not exist.")
    if arguments.videos is not None and task.make_render_env is None:
        raise ValueError(f"`videos` cannot be made: `task` {task.name!r} has no environment that draws.")
    pipeline = _load(arguments)
    controller = "planner" if type(pipeline).__name__ == "DiffuserPlannerPipeline" else "policy"
    options: dict[str, Any] = {
        "first_seed": arguments.first_seed,
        "num_episodes": arguments.num_episodes,
        "num_candidates": arguments.num_candidates,
        "action_selection": arguments.action_selection,
        "num_inference_steps": arguments.num_inference_steps,
        "num_upsampling_passes": arguments.num_upsampling_passes,
        "early_ranking": None if arguments.early_ranking is None else tuple(arguments.early_ranking),
        "num_workers": arguments.num_workers,
        "worker_timeout": arguments.worker_timeout,
        "overlap": arguments.overlap,
        "cache_dir": None if arguments.cache_dir is None else Path(arguments.cache_dir),
        "progress": True,
    }
    result = evaluate_on_task(task, pipeline, controller, **options)
    summary = result.to_dict()
    if arguments.output is not None:
        checkpoint.save_json(Path(arguments.output), summary)
    long = ("seeds", "returns", "episodes")
    print(json.dumps({name: value for name, value in summary.items() if name not in long}, indent=2))
    if arguments.videos is not None:
        files = save_videos(task, pipeline, controller, result, Path(arguments.videos), **options)
        _say(f"videos: {', '.join(str(file) for file in files.values())}")


def _train_foundation(
    trainer_type: type[DiffusionTrainer], arguments: FoundationArguments, config: DenoisingConfig | IQLConfig
) -> None:
    task, output_dir = get_task(arguments.task), _output_dir(config)
    _check_data(arguments)
    episodes = task.episodes(config.seed, arguments.data)
    if arguments.pipeline is None:
        preset = preset_of(task, arguments.controller, arguments.sampler)
        pipeline: Any = preset.build_pipeline(episodes, config.seed)
    else:
        pipeline = load_pipeline(arguments.pipeline)
    resume = _prepare(output_dir / "pipeline", config)
    trainer = trainer_type(pipeline, config, train_dataset=episodes)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        _save_pipeline(pipeline, output_dir / "pipeline", task, _facts(task.name, trainer))


def _train_stage(trainer_type: type[DiffusionTrainer], arguments: StageArguments, config: Any) -> None:
    from peft import LoraConfig

    task, output_dir = get_task(arguments.task), _output_dir(config)
    _check_data(arguments)
    pipeline = _load(arguments)
    resume = _prepare(output_dir / "adapter", config)
    trainer = trainer_type(
        pipeline,
        config,
        train_dataset=task.episodes(config.seed, arguments.data),
        peft_config=LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_rank),
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        with checkpoint.write_folder_atomically(output_dir / "adapter", _facts(task.name, trainer)) as stage:
            pipeline.save_lora_weights(stage)
        _say(f"saved {output_dir / 'adapter'}")


def _check_data(arguments: TaskArguments) -> None:
    """Refuse data with defects, before anything is trained on them."""
    if not arguments.data:
        refuse_defects("", (), arguments.allow_defects)  # refuses kinds that there are not
        return
    task = get_task(arguments.task)
    try:
        bounds = action_bounds(task)
    except ImportError:  # training alone needs no environment
        bounds = None
    defects = validate_dataset(task.episodes(0, arguments.data), action_bounds=bounds)
    name = ", ".join(arguments.data)
    for defect in refuse_defects(name, defects, [*task.allowed_defects, *arguments.allow_defects]):
        _say(f"data: {defect}")


def _save_pipeline(pipeline: Any, folder: Path, task: Task, facts: dict[str, Any]) -> None:
    pipeline.describe_task(**describe_task(task))
    with checkpoint.write_folder_atomically(folder, facts) as stage:
        pipeline.save_pretrained(stage)
    _say(f"saved {folder}")


def _load(arguments: StageArguments | CascadeArguments | EvaluateArguments) -> Any:
    """The pipeline, with the adapter if there is one."""
    loaded = load_pipeline(arguments.pipeline)
    if arguments.adapter is not None:
        loaded.load_lora_weights(arguments.adapter, allow_mismatch=arguments.allow_mismatch)
    return loaded


def _prepare(result: Path, config: Any) -> str | bool | None:
    """Make sure, before anything is trained, that `result` can be written and replaces nothing but its own run.

    Returns:
        What to resume from: on the command line True is a word.
    """
    resume = config.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    if resume is None and result.exists():
        raise ValueError(
            f"`output_dir` {result.parent} already holds {result.name}/: choose another folder, or continue that run "
            "with `resume_from_checkpoint`."
        )
    result.parent.mkdir(parents=True, exist_ok=True)
    return cast("str | bool | None", resume)


def _facts(task: str, trainer: DiffusionTrainer) -> dict[str, Any]:
    return {
        "task": task,
        "trainer": type(trainer).__name__,
        "step": trainer.state.global_step,
        "world_size": trainer.args.world_size,
    }


def _output_dir(config: Any) -> Path:
    if config.output_dir is None:
        raise ValueError("`output_dir` is missing: give the folder that the result goes to.")
    return Path(config.output_dir)


def _say(message: str) -> None:
    print(f"· {message}", file=sys.stderr, flush=True)
