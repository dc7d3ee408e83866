"""Many tasks on one foundation: one alignment, one adapter and one folder for each."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from dmc_hub import checkpoint
from dmc_hub.rewards import RewardFunction
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner, StageResult, Validation
from dmc_hub.trainers.online import EnvironmentMaker

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class AlignmentTask:
    """What one adapter is for.

    Attributes:
        validate: see `Validation`; on this task's environment.
        reward_function: by default the critic's advantage of the first action.
        critic: stands in for the pipeline's while this task is aligned; it is copied, not trained.
        train_dataset: data whose observations are the conditions of this task; those of all tasks by default.
        make_env: makes this task's environments, if episodes are collected (option `online`).
    """

    validate: Validation
    reward_function: RewardFunction | None = None
    critic: nn.Module | None = None
    train_dataset: Any = None
    make_env: EnvironmentMaker | None = None


@dataclass(frozen=True)
class TaskResult:
    """How the alignment to one task went.

    Attributes:
        stages: see `SequentialAligner.run`.
        critic: the task's critic, which has gone on learning if episodes were collected; None without one.
    """

    stages: list[StageResult]
    critic: nn.Module | None


def align_tasks(
    pipeline: Any,
    tasks: Mapping[str, AlignmentTask],
    config: AlignmentConfig,
    *,
    train_dataset: Any,
    **options: Any,
) -> dict[str, TaskResult]:
    """Align one foundation to several tasks, one after the other, each from the foundation and with its own LoRA.

    At the end the pipeline carries all adapters under the names of their tasks, the first of them active:
    `set_adapters` switches and blends. Each task has a folder of its name in `config.output_dir` with the stages of its
    alignment and, once it is done, its `adapter`. An interrupted run continues where it was.

    Args:
        pipeline: a foundation without adapters.
        tasks: by the names of their adapters, of letters, digits, `-` and `_`.
        config: of every alignment; what a task draws does not depend on which others there are.
        train_dataset: for the tasks that have none of their own.
        options: `peft_config`, `stage_configs` and whatever else `SequentialAligner` takes, for all tasks.

    Raises:
        ValueError: there is no task, a name that cannot be one, or a pipeline that has adapters.
    """
    wrong = [name for name in tasks if not _ADAPTER_NAME.fullmatch(name)]
    if wrong or not tasks:
        raise ValueError(f"`tasks` must have names of letters, digits, - and _, at least one; got {list(tasks)}.")
    if pipeline.lora_names:
        raise ValueError(
            f"`pipeline` must be a foundation without adapters, it has {pipeline.lora_names}: unload them."
        )
    adapters: dict[str, tuple[Any, dict[str, Tensor]]] = {}
    results: dict[str, TaskResult] = {}
    shared_critic = pipeline.critic
    for name, task in tasks.items():
        folder = None if config.output_dir is None else Path(config.output_dir) / name
        pipeline.register_modules(critic=copy.deepcopy(task.critic or shared_critic))
        try:
            aligner = SequentialAligner(
                pipeline,
                dataclasses.replace(config, output_dir=None if folder is None else str(folder)),
                train_dataset=train_dataset if task.train_dataset is None else task.train_dataset,
                validate=task.validate,
                reward_function=task.reward_function,
                make_env=task.make_env,
                **options,
            )
            results[name] = TaskResult(aligner.run(), pipeline.critic)
            if folder is not None:
                with checkpoint.write_folder_atomically(
                    folder / "adapter", {"task": name, "seed": config.seed}
                ) as part:
                    pipeline.save_lora_weights(part)
            adapters[name] = _taken_off(pipeline)
        finally:
            pipeline.unload_lora()
            pipeline.register_modules(critic=shared_critic)
    for name, (settings, state) in adapters.items():
        pipeline.add_lora(settings, adapter_name=name)
        set_peft_model_state_dict(pipeline.denoiser, state, adapter_name=name)
    pipeline.set_adapters(next(iter(tasks)))
    return results


def _taken_off(pipeline: Any) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the one adapter."""
    [name] = pipeline.lora_names
    state = get_peft_model_state_dict(pipeline.denoiser, adapter_name=name)
    return pipeline.denoiser.peft_config[name], {key: tensor.detach().clone() for key, tensor in state.items()}
