"""The commands of `dmc-hub` and of the scripts: each takes dataclasses of arguments and does one thing."""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from dmc_hub import ablation, cards, checkpoint, portable, reproduction, transfer
from dmc_hub.data import Episodes
from dmc_hub.hub import describe, load_pipeline, pull
from dmc_hub.presets import PRESETS, SAMPLERS
from dmc_hub.publish import publish
from dmc_hub.recipes import (
    EVALUATION_SEED,
    OnlineSettings,
    RunSettings,
    align_task,
    evaluate_on_task,
)
from dmc_hub.tasks import describe_task, get_task
from dmc_hub.trainers.alignment import METHODS, AlignmentConfig
from dmc_hub.trainers.base import DiffusionTrainer
from dmc_hub.trainers.cascade import CascadeConfig, CascadeTrainer
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer


@dataclass(kw_only=True)
class AlignArguments:
    """Arguments of `dmc-hub align`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    output_dir: str = field(metadata={"help": "Folder of the run. A run that was interrupted there continues."})
    controller: Literal["planner", "decision_diffuser", "policy"] = field(
        default="planner", metadata={"help": "Kind of controller."}
    )
    sampler: Literal["ddpm", "ddim", "sm", "fm"] = field(
        default="ddpm", metadata={"help": "DDPM, DDIM, score matching or flow matching."}
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": f"Methods of one pass, from {', '.join(METHODS)}; the preset's by default."}
    )
    max_passes: int = field(default=3, metadata={"help": "Passes through the methods at most."})
    min_gain: float = field(
        default=0.01, metadata={"help": "A pass that raises the validated return by less than this share is the last."}
    )
    validations_per_stage: int = field(
        default=4, metadata={"help": "Validations of a stage, evenly over its steps; it ends at the best one."}
    )
    num_retries: int = field(
        default=1, metadata={"help": "Times a collapsed stage is tried again, at a lower learning rate."}
    )
    max_coherency_drop: float | None = field(
        default=None,
        metadata={
            "help": "States below (1 - this) times the foundation's coherency are not kept; the preset's by default."
        },
    )
    max_divergence: float | None = field(
        default=None,
        metadata={"help": "delta of Eq. 6: states of a larger denoising KL to the foundation, in nats, are not kept."},
    )
    min_diversity: float | None = field(
        default=None,
        metadata={"help": "States whose candidates spread less than this share of the foundation's are not kept."},
    )
    num_upsampling_passes: int = field(
        default=0, metadata={"help": "Passes through a cascade that is trained after alignment; 0 trains none."}
    )
    num_candidates: int | None = field(
        default=None, metadata={"help": "Candidates per decision in the evaluation; the preset's by default."}
    )
    num_evaluation_episodes: int = field(default=128, metadata={"help": "Episodes of the reported figures."})
    num_validation_episodes: int = field(default=64, metadata={"help": "Episodes after each stage, on other seeds."})
    training_scale: float = field(
        default=1.0, metadata={"help": "Factor on all numbers of training steps; 0.05 gives a quick look."}
    )
    foundation: str | None = field(
        default=None,
        metadata={"help": "Folder or repo of a trained pipeline with its critic; by default one is trained."},
    )
    num_online_episodes: int = field(
        default=0,
        metadata={"help": "Episodes that the controller collects between stages, for them and the critic; 0: none."},
    )
    online_buffer_size: int = field(
        default=100_000,
        metadata={"help": "Collected transitions kept at most; the oldest collected episodes are dropped first."},
    )
    online_num_candidates: int = field(default=1, metadata={"help": "Candidates per decision while collecting."})
    online_action_selection: Literal["greedy", "expectation", "softmax"] = field(
        default="greedy", metadata={"help": "How one action is chosen among them."}
    )
    online_critic_steps: int = field(default=1000, metadata={"help": "Steps of the critic after each collection."})
    num_online_workers: int = field(
        default=0, metadata={"help": "Processes that run the environments of a collection; 0 runs them in this one."}
    )
    online_worker_timeout: float = field(
        default=60.0, metadata={"help": "Seconds for a step, after which a worker is restarted."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of data, networks and training."})
    push_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "Repo `user/name` that the pipeline goes to in the end, and the adapter to `user/name-lora`; "
            "whether it may be written is found out before training starts."
        },
    )
    private: bool | None = field(
        default=None, metadata={"help": "Whether new repos are private; as the account has it by default."}
    )

    def online(self) -> OnlineSettings | None:
        """What is collected between the stages, or None."""
        for name in ("num_online_episodes", "num_online_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        _require_positive(self, "online_buffer_size", "online_num_candidates", "online_critic_steps")
        if not self.online_worker_timeout > 0:
            raise ValueError(f"`online_worker_timeout` must be positive, got {self.online_worker_timeout}.")
        if self.num_online_episodes == 0:
            return None
        return OnlineSettings(
            num_episodes=self.num_online_episodes,
            buffer_size=self.online_buffer_size,
            num_candidates=self.online_num_candidates,
            action_selection=self.online_action_selection,
            critic_steps=self.online_critic_steps,
            num_workers=self.num_online_workers,
            worker_timeout=self.online_worker_timeout,
        )

    def settings(self) -> RunSettings:
        """The run's settings, with the preset's values where nothing was said."""
        get_task(self.task)
        preset = PRESETS[self.task](self.controller, self.sampler)
        _require_positive(self, "num_evaluation_episodes", "num_validation_episodes", "num_candidates")
        if not 0 < self.training_scale < math.inf:
            raise ValueError(f"`training_scale` must be positive and finite, got {self.training_scale}.")
        if self.seed < 0:
            raise ValueError(f"`seed` must not be negative, got {self.seed}.")
        methods = tuple(self.methods or preset.methods)
        max_coherency_drop = preset.max_coherency_drop if self.max_coherency_drop is None else self.max_coherency_drop
        AlignmentConfig(  # refuses what is wrong before anything is trained
            methods=list(methods),
            max_passes=self.max_passes,
            min_gain=self.min_gain,
            validations_per_stage=self.validations_per_stage,
            num_retries=self.num_retries,
            max_coherency_drop=max_coherency_drop,
            max_divergence=self.max_divergence,
            min_diversity=self.min_diversity,
        )
        if self.num_upsampling_passes < 0:
            raise ValueError(f"`num_upsampling_passes` must be at least 0, got {self.num_upsampling_passes}.")
        if "ddpo" in methods and SAMPLERS[self.sampler][0]["eta"] == 0:
            raise ValueError(
                f"`methods` has ddpo, which needs noise in each step: `sampler` {self.sampler!r} adds none."
            )
        return RunSettings(
            task=self.task,
            controller=self.controller,
            sampler=self.sampler,
            seed=self.seed,
            methods=methods,
            max_passes=self.max_passes,
            min_gain=self.min_gain,
            validations_per_stage=self.validations_per_stage,
            num_retries=self.num_retries,
            max_coherency_drop=max_coherency_drop,
            num_candidates=self.num_candidates or preset.num_candidates,
            num_validation_episodes=self.num_validation_episodes,
            num_evaluation_episodes=self.num_evaluation_episodes,
            training_scale=self.training_scale,
            foundation=self.foundation,
            max_divergence=self.max_divergence,
            min_diversity=self.min_diversity,
            num_upsampling_passes=self.num_upsampling_passes,
            online=self.online(),
        )


@dataclass(kw_only=True)
class FoundationArguments:
    """Arguments of the commands that train a foundation or its critic."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    controller: Literal["planner", "decision_diffuser", "policy"] = field(
        default="planner", metadata={"help": "Kind of controller."}
    )
    sampler: Literal["ddpm", "ddim", "sm", "fm"] = field(
        default="ddpm", metadata={"help": "DDPM, DDIM, score matching or flow matching."}
    )
    pipeline: str | None = field(
        default=None, metadata={"help": "Saved pipeline to start from; by default a new one of the task's preset."}
    )


@dataclass(kw_only=True)
class StageArguments:
    """Arguments of the commands that run one alignment method."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    pipeline: str = field(metadata={"help": "Folder or repo of the foundation pipeline, with its critic."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter to continue; a new one by default."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of a new adapter."})


@dataclass(kw_only=True)
class CascadeArguments:
    """Arguments of `dmc-hub train-cascade`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    pipeline: str = field(metadata={"help": "Folder or repo of the pipeline, with its critic."})
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter of the controller whose samples are up-sampled; none by default."}
    )


@dataclass(kw_only=True)
class EvaluateArguments:
    """Arguments of `dmc-hub evaluate`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    pipeline: str = field(metadata={"help": "Folder or repo of the pipeline."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or repo of an adapter."})
    num_candidates: int = field(default=16, metadata={"help": "Candidates per decision."})
    action_selection: Literal["greedy", "expectation", "softmax"] = field(
        default="greedy", metadata={"help": "How one action is chosen among the candidates."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Denoising steps."})
    num_upsampling_passes: int = field(default=0, metadata={"help": "Passes through the pipeline's up-sampler."})
    num_episodes: int = field(default=128, metadata={"help": "Number of episodes."})
    first_seed: int = field(default=EVALUATION_SEED, metadata={"help": "Seed of the first episode."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the result."})


@dataclass(kw_only=True)
class PushArguments:
    """Arguments of `dmc-hub push`."""

    folder: str = field(metadata={"help": "A run, a saved pipeline or an adapter."})
    repo_id: str = field(metadata={"help": "Repo `user/name`; of a run it is the pipeline's."})
    adapter_repo_id: str | None = field(
        default=None, metadata={"help": "Repo of a run's adapter; that of the pipeline and `-lora` by default."}
    )
    base_model: str | None = field(default=None, metadata={"help": "Repo of the pipeline that an adapter fits."})
    base_revision: str | None = field(default=None, metadata={"help": "Commit of that repo."})
    private: bool | None = field(
        default=None, metadata={"help": "Whether new repos are private; as the account has it by default."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; main by default."})


@dataclass(kw_only=True)
class PullArguments:
    """Arguments of `dmc-hub pull`."""

    repo_id: str = field(metadata={"help": "Repo `user/name` of a pipeline or an adapter."})
    output_dir: str = field(metadata={"help": "New folder for its files."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit; main by default."})


@dataclass(kw_only=True)
class CardArguments:
    """Arguments of `dmc-hub card`."""

    run: str = field(metadata={"help": "Folder of the run whose report.json the card is computed from."})
    kind: Literal["adapter", "pipeline"] = field(default="adapter", metadata={"help": "Whose card."})
    repo_id: str | None = field(default=None, metadata={"help": "Repo that it is for; the run's folders by default."})
    base_model: str | None = field(default=None, metadata={"help": "Repo of the pipeline that the adapter fits."})
    output: str | None = field(default=None, metadata={"help": "File to write; by default the card is printed."})


@dataclass(kw_only=True)
class InfoArguments:
    """Arguments of `dmc-hub info`."""

    source: str = field(metadata={"help": "Repo `user/name`, or folder, of a pipeline or an adapter."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit; main by default."})


@dataclass(kw_only=True)
class DemoArguments:
    """Arguments of `dmc-hub demo`."""

    pipelines: list[str] = field(metadata={"help": "Folders of pipelines of Nav1D."})
    adapters: list[str] = field(
        default_factory=list, metadata={"help": "Folders of adapters, each trained on one of the pipelines."}
    )
    port: int = field(default=7860, metadata={"help": "Port on this machine; 0 takes a free one."})
    space: str | None = field(
        default=None, metadata={"help": "Instead of serving, write a folder that can be pushed as a Gradio Space."}
    )


@dataclass(kw_only=True)
class ExportDataArguments:
    """Arguments of `dmc-hub export-data`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    output_dir: str = field(metadata={"help": "The folder to write; for minari, the one its datasets lie in."})
    format: Literal["datasets", "lerobot", "minari"] = field(
        default="datasets", metadata={"help": "Parquet with a card for `datasets`, a LeRobotDataset v3.0, or Minari."}
    )
    repo_id: str = field(
        default="user/dataset", metadata={"help": "The repository that the card's examples load, as owner/name."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the data."})


@dataclass(kw_only=True)
class ReproduceNav1DArguments:
    """Arguments of `dmc-hub reproduce-nav1d`."""

    output_dir: str = field(metadata={"help": "Folder of the runs and the table; finished runs are found again."})
    datasets: list[str] = field(
        default_factory=lambda: list(reproduction.DATASETS),
        metadata={"help": "Which of partial, full and expert; several processes can share the work, one dataset each."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    num_episodes: int = field(default=64, metadata={"help": "Evaluation episodes of each run."})
    quick: bool = field(default=False, metadata={"help": "A fiftieth of the training, one seed: to see it work."})


@dataclass(kw_only=True)
class AblateAlignmentArguments:
    """Arguments of `dmc-hub ablate-alignment`."""

    output_dir: str = field(metadata={"help": "Folder of the runs and the results; finished runs are found again."})
    controllers: list[str] = field(
        default_factory=lambda: list(ablation.CONTROLLERS), metadata={"help": "Which of planner and policy."}
    )
    variants: list[str] = field(
        default_factory=lambda: list(ablation.VARIANTS), metadata={"help": "Ways to align; all by default."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Training seeds."})
    num_episodes: int = field(default=64, metadata={"help": "Evaluation episodes of each run."})
    quick: bool = field(default=False, metadata={"help": "A fiftieth of the training, one seed: to see it work."})


def align(arguments: AlignArguments) -> None:
    """Data, foundation, critic, alignment, evaluation, report."""
    settings = arguments.settings()
    if arguments.push_to_hub is not None:
        for repo_id in (arguments.push_to_hub, f"{arguments.push_to_hub}-lora"):
            transfer.check_access(repo_id)
    report = align_task(settings, Path(arguments.output_dir), command=_command(arguments))
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
    pictures = [name for name in cards.PICTURES if (run / name).is_file()]
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


def export_data(arguments: ExportDataArguments) -> None:
    """Write a task's data in a format of others."""
    from dmc_hub.data import DatasetCardText, DatasetConfig, save_dataset, split_episodes
    from dmc_hub.interop import save_lerobot_dataset, save_minari_dataset

    task, folder = get_task(arguments.task), Path(arguments.output_dir)
    data = task.make_dataset(arguments.seed)
    scores = {} if task.optimal_return is None else {"optimum": task.optimal_return()}
    if arguments.format == "datasets":
        text = DatasetCardText(
            title=task.name,
            description=f"Offline data of {task.summary}.",
            repo_id=arguments.repo_id,
            command=f"dmc-hub export-data --task {task.name} --seed {arguments.seed} --output-dir {task.name}",
            scores=scores,
        )
        splits = split_episodes(data, seed=arguments.seed)
        save_dataset(folder, [DatasetConfig(task.name, task.summary, splits)], text)
    elif arguments.format == "lerobot":
        save_lerobot_dataset(data, folder, task=task.summary, fps=1, state_dim=1, reference_scores=scores)
    else:
        os.environ["MINARI_DATASETS_PATH"] = str(folder)
        save_minari_dataset(data, f"{task.name}-v0", env_id=task.env_id, description=task.summary)
    _say(f"saved {folder}")


def reproduce_nav1d(arguments: ReproduceNav1DArguments) -> None:
    """Run the Nav1D rows of the paper's tables."""
    _require_positive(arguments, "num_episodes")
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
    _require_positive(arguments, "num_episodes")
    ablation.ablate_alignment(
        Path(arguments.output_dir),
        controllers=arguments.controllers,
        variants=arguments.variants,
        seeds=arguments.seeds[:1] if arguments.quick else arguments.seeds,
        training_scale=0.02 if arguments.quick else 1.0,
        num_episodes=arguments.num_episodes,
    )
    print((Path(arguments.output_dir) / "nav1d-ablation.md").read_text())


def _command(arguments: AlignArguments) -> str:
    """The command that repeats a run; the folder is left out, because it says nothing to anyone else."""
    options = {**vars(arguments), "output_dir": f"runs/{arguments.task}-{arguments.controller}"}
    options |= {"push_to_hub": None, "private": None}
    if arguments.foundation is not None and Path(arguments.foundation).is_absolute():
        options["foundation"] = Path(arguments.foundation).name
    defaults = {option.name: option.default for option in fields(AlignArguments)}
    words = ["dmc-hub align"]
    for name, value in options.items():
        if value not in (None, defaults[name]):
            text = " ".join(value) if isinstance(value, list) else str(value)
            words.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(words)


def train_denoising(arguments: FoundationArguments, config: DenoisingConfig) -> None:
    """Train a foundation controller."""
    _train_foundation(DenoisingTrainer, arguments, config)


def train_critic(arguments: FoundationArguments, config: IQLConfig) -> None:
    """Train the critic of a pipeline."""
    _train_foundation(IQLTrainer, arguments, config)


def train_ddpo(arguments: StageArguments, config: DDPOConfig) -> None:
    """Align by policy gradients over the denoising steps."""
    _train_stage(DDPOTrainer, arguments, config)


def train_reward_gradient(arguments: StageArguments, config: RewardGradientConfig) -> None:
    """Align by the reward's own gradient."""
    _train_stage(RewardGradientTrainer, arguments, config)


def train_nft(arguments: StageArguments, config: NFTConfig) -> None:
    """Align by policy optimisation on the forward process."""
    _train_stage(NFTTrainer, arguments, config)


def train_dpo(arguments: StageArguments, config: DiffusionDPOConfig) -> None:
    """Align by preferences."""
    _train_stage(DiffusionDPOTrainer, arguments, config)


def train_sft(arguments: StageArguments, config: SFTConfig) -> None:
    """Align by fine-tuning on the best samples."""
    _train_stage(SFTTrainer, arguments, config)


def train_cascade(arguments: CascadeArguments, config: CascadeConfig) -> None:
    """Train an up-sampler; the pipeline is saved with it and without the adapter, which fits it as before."""
    task, output_dir = get_task(arguments.task), _output_dir(config)
    pipeline = _load(arguments.pipeline, arguments.adapter)
    resume = _prepare(output_dir / "pipeline", config)
    trainer = CascadeTrainer(pipeline, config, train_dataset=task.make_dataset(config.seed))
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        pipeline.unload_lora()
        _save_pipeline(pipeline, output_dir / "pipeline", _facts(task.name, trainer))


def evaluate(arguments: EvaluateArguments) -> None:
    """Roll a controller out and print what it earned."""
    task = get_task(arguments.task)
    _require_positive(arguments, "num_episodes", "num_candidates")
    if arguments.output is not None and not Path(arguments.output).absolute().parent.is_dir():
        raise ValueError(f"`output` {arguments.output} lies in a folder that does not exist.")
    pipeline = _load(arguments.pipeline, arguments.adapter)
    result = evaluate_on_task(
        task,
        pipeline,
        "planner" if type(pipeline).__name__ == "DiffuserPlannerPipeline" else "policy",
        first_seed=arguments.first_seed,
        num_episodes=arguments.num_episodes,
        num_candidates=arguments.num_candidates,
        action_selection=arguments.action_selection,
        num_inference_steps=arguments.num_inference_steps,
        num_upsampling_passes=arguments.num_upsampling_passes,
    )
    summary = result.to_dict()
    if arguments.output is not None:
        checkpoint.save_json(Path(arguments.output), summary)
    print(json.dumps({name: value for name, value in summary.items() if name not in ("seeds", "returns")}, indent=2))


def _train_foundation(
    trainer_type: type[DiffusionTrainer], arguments: FoundationArguments, config: DenoisingConfig | IQLConfig
) -> None:
    task, output_dir = get_task(arguments.task), _output_dir(config)
    episodes = Episodes.from_dataset(task.make_dataset(config.seed))
    if arguments.pipeline is None:
        pipeline: Any = PRESETS[task.name](arguments.controller, arguments.sampler).build_pipeline(
            episodes, config.seed
        )
    else:
        pipeline = load_pipeline(arguments.pipeline)
    resume = _prepare(output_dir / "pipeline", config)
    trainer = trainer_type(pipeline, config, train_dataset=episodes)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        _save_pipeline(pipeline, output_dir / "pipeline", _facts(task.name, trainer))


def _train_stage(trainer_type: type[DiffusionTrainer], arguments: StageArguments, config: Any) -> None:
    from peft import LoraConfig

    task, output_dir = get_task(arguments.task), _output_dir(config)
    pipeline = _load(arguments.pipeline, arguments.adapter)
    resume = _prepare(output_dir / "adapter", config)
    trainer = trainer_type(
        pipeline,
        config,
        train_dataset=task.make_dataset(config.seed),
        peft_config=LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_rank),
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        with checkpoint.write_folder_atomically(output_dir / "adapter", _facts(task.name, trainer)) as stage:
            pipeline.save_lora_weights(stage)
        _say(f"saved {output_dir / 'adapter'}")


def _save_pipeline(pipeline: Any, folder: Path, facts: dict[str, Any]) -> None:
    pipeline.describe_task(**describe_task(get_task(facts["task"])))
    with checkpoint.write_folder_atomically(folder, facts) as stage:
        pipeline.save_pretrained(stage)
    _say(f"saved {folder}")


def _load(pipeline: str, adapter: str | None) -> Any:
    """The pipeline, with the adapter if there is one."""
    loaded = load_pipeline(pipeline)
    if adapter is not None:
        loaded.load_lora_weights(adapter)
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
    return resume


def _require_positive(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


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
