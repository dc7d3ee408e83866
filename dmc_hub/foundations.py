"""What alignment starts from: a pipeline with its critic, trained, found again, or given."""

from __future__ import annotations

import dataclasses
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from dmc_hub import checkpoint
from dmc_hub.conditions import episodes_that_fit
from dmc_hub.data import Episodes
from dmc_hub.hub import load_pipeline
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.presets import preset_of
from dmc_hub.run_settings import RunSettings, run_facts, say
from dmc_hub.tasks import describe_task, get_task
from dmc_hub.trainers.base import DiffusionTrainer
from dmc_hub.trainers.denoising import DenoisingTrainer
from dmc_hub.trainers.inverse_dynamics import InverseDynamicsConfig, InverseDynamicsTrainer
from dmc_hub.trainers.iql import IQLTrainer

CHECKPOINTS_PER_PART = 20
PARTS = ("foundation", "inverse-dynamics", "critic")


def train_foundation(
    settings: RunSettings,
    episodes: Episodes,
    folder: Path,
    *,
    critic: nn.Module | None = None,
    denoiser: nn.Module | None = None,
    on_save_error: str = "raise",
) -> tuple[Any, Episodes]:
    """Train the preset's pipeline: denoiser, inverse dynamics where it has them, critic.

    Args:
        settings: task, controller, sampler, seed and scale count.
        episodes: the data.
        folder: for the checkpoints of what is not finished; training goes on from those that are there.
        critic: a trained critic of the same data, to be copied instead of trained; likewise `denoiser`.
        on_save_error: "raise" or "warn" when a checkpoint cannot be written.

    Returns:
        The pipeline, and the data as it acts on them: an image policy's images are features.
    """
    preset = preset_of(get_task(settings.task), settings.controller, settings.sampler)
    saving: dict[str, Any] = {"on_save_error": on_save_error}
    pipeline = preset.build_pipeline(episodes, settings.seed)
    if denoiser is not None:
        pipeline.denoiser.load_state_dict(denoiser.state_dict())
    else:
        say(f"foundation: {settings.controller} on {episodes.num_episodes} episodes")
        steps = settings.scaled(preset.foundation_config().max_steps)
        config = preset.foundation_config(seed=settings.seed, max_steps=steps, **saving)
        train_part(DenoisingTrainer, pipeline, config, episodes, folder / "foundation")
    if settings.controller == "decision_diffuser":
        say("inverse dynamics")
        dynamics = InverseDynamicsConfig(output_dir=None, seed=settings.seed, **saving)
        dynamics = dataclasses.replace(dynamics, max_steps=settings.scaled(dynamics.max_steps))
        train_part(InverseDynamicsTrainer, pipeline, dynamics, episodes, folder / "inverse-dynamics")
    episodes = episodes_that_fit(pipeline, episodes)
    if critic is not None:
        pipeline.critic.load_state_dict(critic.state_dict())
        return pipeline, episodes
    say("critic: IQL")
    steps = settings.scaled(preset.critic_config().max_steps)
    config = preset.critic_config(seed=settings.seed, max_steps=steps, **saving)
    train_part(IQLTrainer, pipeline, config, episodes, folder / "critic")
    return pipeline, episodes


def train_part(
    trainer_type: type[DiffusionTrainer], pipeline: Any, config: Any, episodes: Episodes, folder: Path
) -> None:
    """Train to the end, from the last checkpoint of an interrupted run."""
    saving: dict[str, Any] = {"output_dir": str(folder), "save_strategy": "steps", "save_total_limit": 1}
    saving["save_steps"] = math.ceil(config.max_steps / CHECKPOINTS_PER_PART)
    trainer = trainer_type(pipeline, dataclasses.replace(config, **saving), train_dataset=episodes)
    trainer.train(resume_from_checkpoint="auto")


def remove_parts(folder: Path, *names: str) -> None:
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
    remove_parts(output_dir / "unfinished" / name, *PARTS)
    return folder


def run_foundation(
    settings: RunSettings, episodes: Episodes, folder: Path, *, on_save_error: str = "raise"
) -> tuple[Any, Episodes, float]:
    """The pipeline, the data as it acts on them, and the seconds that an earlier process took if it has left it."""
    if folder.is_dir():
        manifest = checkpoint.verify(folder)
        say(f"foundation and critic: found in {folder}")
        pipeline = load_pipeline(folder)
        return pipeline, episodes_that_fit(pipeline, episodes), manifest.metadata.get("wall_seconds", 0.0)
    start, unfinished = time.perf_counter(), folder.parent / "unfinished"
    if settings.foundation:
        pipeline = _given_foundation(settings)
        episodes = episodes_that_fit(pipeline, episodes)
    else:
        pipeline, episodes = train_foundation(settings, episodes, unfinished, on_save_error=on_save_error)
    acting = {"action_selection": "greedy", "num_candidates": settings.num_candidates}
    pipeline.describe_task(**describe_task(get_task(settings.task)), **acting)
    facts = {**run_facts(settings), "wall_seconds": time.perf_counter() - start}
    with checkpoint.write_folder_atomically(folder, facts) as stage:
        pipeline.save_pretrained(stage)
    remove_parts(unfinished, *PARTS)
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
