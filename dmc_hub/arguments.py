"""What the commands of `dmc-hub` and of the scripts take: dataclasses whose help is the command line's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmc_hub import ablation, reproduction
from dmc_hub.collect import CollectionSettings
from dmc_hub.presets import SAMPLERS, preset_of
from dmc_hub.run_settings import (
    EVALUATION_SEED,
    OnlineSettings,
    RunSettings,
)
from dmc_hub.tasks import get_task
from dmc_hub.trainers.alignment import METHODS, AlignmentConfig


@dataclass(kw_only=True)
class TaskArguments:
    """What all commands that train take."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Its data: files of any format that `dmc-hub data info` knows, converted folders or repos on the "
            "Hub, one after the other; FILE[:N] takes the first N steps. By default what the task makes by itself."
        },
    )
    allow_defects: list[str] = field(
        default_factory=list,
        metadata={"help": "Kinds of defects, as `dmc-hub data validate` names them, to train on all the same."},
    )
    profile: str | None = field(
        default=None,
        metadata={"help": "New folder for a trace of a few steps of each part, and a table of the dearest operations."},
    )


@dataclass(kw_only=True)
class AlignArguments(TaskArguments):
    """Arguments of `dmc-hub align`."""

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
    num_evaluation_episodes: int | None = field(
        default=None, metadata={"help": "Episodes of the reported figures; the preset's by default."}
    )
    num_validation_episodes: int | None = field(
        default=None, metadata={"help": "Episodes after each stage, on other seeds; the preset's by default."}
    )
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
    on_save_error: Literal["raise", "warn"] = field(
        default="raise",
        metadata={"help": "What to do when a checkpoint or a stage cannot be written: end, or go on without."},
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
        require_positive(self, "online_buffer_size", "online_num_candidates", "online_critic_steps")
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
        preset = preset_of(get_task(self.task), self.controller, self.sampler)
        require_positive(self, "num_evaluation_episodes", "num_validation_episodes", "num_candidates")
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
            num_validation_episodes=self.num_validation_episodes or preset.num_validation_episodes,
            num_evaluation_episodes=self.num_evaluation_episodes or preset.num_evaluation_episodes,
            training_scale=self.training_scale,
            data=tuple(self.data),
            foundation=self.foundation,
            max_divergence=self.max_divergence,
            min_diversity=self.min_diversity,
            num_upsampling_passes=self.num_upsampling_passes,
            online=self.online(),
        )


@dataclass(kw_only=True)
class FoundationArguments(TaskArguments):
    """Arguments of the commands that train a foundation or its critic."""

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
class StageArguments(TaskArguments):
    """Arguments of the commands that run one alignment method."""

    pipeline: str = field(metadata={"help": "Folder or repo of the foundation pipeline, with its critic."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter to continue; a new one by default."})
    allow_mismatch: bool = field(default=False, metadata={"help": "Load an adapter of another base all the same."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of a new adapter."})


@dataclass(kw_only=True)
class CascadeArguments(TaskArguments):
    """Arguments of `dmc-hub train-cascade`."""

    pipeline: str = field(metadata={"help": "Folder or repo of the pipeline, with its critic."})
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter of the controller whose samples are up-sampled; none by default."}
    )
    allow_mismatch: bool = field(default=False, metadata={"help": "Load an adapter of another base all the same."})


@dataclass(kw_only=True)
class EvaluateArguments:
    """Arguments of `dmc-hub evaluate`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    pipeline: str = field(metadata={"help": "Folder or repo of the pipeline."})
    adapter: str | None = field(default=None, metadata={"help": "Folder or repo of an adapter."})
    allow_mismatch: bool = field(default=False, metadata={"help": "Load an adapter of another base all the same."})
    num_candidates: int = field(default=16, metadata={"help": "Candidates per decision."})
    action_selection: Literal["greedy", "expectation", "softmax"] = field(
        default="greedy", metadata={"help": "How one action is chosen among the candidates."}
    )
    num_inference_steps: int | None = field(default=None, metadata={"help": "Denoising steps."})
    num_upsampling_passes: int = field(default=0, metadata={"help": "Passes through the pipeline's up-sampler."})
    early_ranking: list[float] | None = field(
        default=None,
        metadata={
            "help": "Two shares, 0.5 0.25 say: after that share of the denoising steps the critic ranks the "
            "candidates, and that share of them is denoised to the end. All are by default."
        },
    )
    num_episodes: int = field(default=128, metadata={"help": "Number of episodes."})
    first_seed: int = field(default=EVALUATION_SEED, metadata={"help": "Seed of the first episode."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the result."})
    num_workers: int = field(
        default=0,
        metadata={
            "help": "Processes that run one environment each, side by side; 0 runs all in this one. The number of "
            "environments side by side is part of what an evaluation is: it changes the noise."
        },
    )
    worker_timeout: float = field(default=60.0, metadata={"help": "Seconds for a step, then a worker is restarted."})
    overlap: bool = field(
        default=False,
        metadata={
            "help": "Two halves of the workers take turns: while one steps, the controller decides for the other. The "
            "figures are those of half as many workers without."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps every batch of episodes: an interrupted evaluation continues, a repeated one "
            "costs nothing."
        },
    )
    videos: str | None = field(
        default=None, metadata={"help": "Folder for videos of the best, the median and the worst episode."}
    )
    profile: str | None = field(
        default=None,
        metadata={"help": "New folder for a trace of a few steps of each part, and a table of the dearest operations."},
    )


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
class CollectArguments:
    """Arguments of `dmc-hub data collect`."""

    task: str = field(metadata={"help": "The task; `dmc-hub tasks` lists them."})
    output_dir: str = field(metadata={"help": "New folder of the data, which `datasets.load_from_disk` reads."})
    behavior: Literal["random", "scripted", "medium", "medium-replay", "medium-expert", "expert"] | None = field(
        default=None, metadata={"help": "Who acts; what the task's name says by default."}
    )
    num_episodes: int | None = field(default=None, metadata={"help": "Episodes; 200 by default."})
    num_steps: int | None = field(
        default=None, metadata={"help": "Steps instead of episodes; D4RL's sets of locomotion have a million."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of behaviour, environment and training."})
    algorithm: Literal["ppo", "sac"] = field(
        default="ppo", metadata={"help": "What trains medium and expert policies; D4RL's are SAC's."}
    )
    training_steps: int = field(default=1_000_000, metadata={"help": "Steps of that training."})
    training_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of that training, shared by all qualities; beside `output_dir` by default."},
    )

    def settings(self) -> CollectionSettings:
        """The settings, with the task's values where nothing was said."""
        task = get_task(self.task)
        behavior = self.behavior or task.behavior
        sizes = {"num_episodes": self.num_episodes, "num_steps": self.num_steps}
        if behavior != "medium-replay" and sizes == {"num_episodes": None, "num_steps": None}:
            sizes["num_episodes"] = 200
        training = f"{task.env_id}-{self.algorithm}-{self.training_steps}-seed{self.seed}"
        return CollectionSettings(
            behavior=behavior,
            seed=self.seed,
            algorithm=self.algorithm,
            training_steps=self.training_steps,
            training_dir=Path(self.training_dir or Path(self.output_dir).parent / training),
            **sizes,
        )


@dataclass(kw_only=True)
class CheckTaskArguments:
    """Arguments of `dmc-hub task check`."""

    task: str = field(metadata={"help": "The task, or `path/to/file.py:VARIABLE`, a task of your own."})
    seed: int = field(default=0, metadata={"help": "Seed of everything."})


@dataclass(kw_only=True)
class DoctorArguments:
    """Arguments of `dmc-hub doctor`."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder of a run to look at; nothing is changed."})


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
class SummarizeArguments:
    """Arguments of `dmc-hub summarize`."""

    runs: list[str] = field(metadata={"help": "Folders of finished runs that differ in the training seed."})
    output_dir: str = field(metadata={"help": "Folder for <task>-<controller>.json, .md and .png."})


@dataclass(kw_only=True)
class AggregateArguments:
    """Arguments of `dmc-hub aggregate`."""

    results: list[str] = field(metadata={"help": "JSON files that `dmc-hub summarize` wrote, of different tasks."})
    output_dir: str = field(metadata={"help": "Folder for aggregate.json, .md and .png."})


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


def require_positive(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
