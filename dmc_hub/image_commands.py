"""The commands of `dmc-hub images`: text-to-image pipelines aligned from the command line."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from dmc_hub import checkpoint
from dmc_hub.joint_reward import JointReward
from dmc_hub.prompt_files import stream_of_rows
from dmc_hub.remote_rewards import HTTPReward
from dmc_hub.text_to_image import TextToImagePolicy, transition_scheduler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer


@dataclass(kw_only=True)
class ImageArguments:
    """Arguments of the commands that align a text-to-image pipeline."""

    model: str = field(metadata={"help": "Folder or repo of a Stable Diffusion, SDXL or Stable Diffusion 3 pipeline."})
    prompts: str = field(
        metadata={
            "help": "File of prompts, one a line (.txt) or as rows with a column `prompt` (.jsonl, .parquet), or a "
            "dataset on the Hub; streamed, each process its part."
        }
    )
    rewards: list[str] = field(
        metadata={
            "help": "Reward functions, normalised and summed: `path/to/file.py:NAME`, whose code is run, or the URL of "
            "a reward server."
        }
    )
    pairs: str | None = field(
        default=None, metadata={"help": "Likewise rows with `prompt` and `image`, for `pretraining_coefficient`."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter; 0 trains the whole network."})
    guidance_scale: float = field(default=1.0, metadata={"help": "Classifier-free guidance while sampling; 1: none."})
    training_guidance_scale: float | None = field(
        default=None, metadata={"help": "Likewise in the loss; as while sampling by default."}
    )
    resolution: int | None = field(default=None, metadata={"help": "Of images; the network's own by default."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the frozen weights; what is trained is float32."}
    )


def train_nft(arguments: ImageArguments, config: NFTConfig) -> None:
    """Align a text-to-image pipeline by NFT or advantage-weighted matching."""
    _train(NFTTrainer, arguments, config, eta=0.0)


def train_ddpo(arguments: ImageArguments, config: DDPOConfig) -> None:
    """Align a text-to-image pipeline by policy gradients over the denoising steps."""
    _train(DDPOTrainer, arguments, config, eta=1.0)


def _train(trainer_type: Any, arguments: ImageArguments, config: Any, *, eta: float) -> None:
    if config.output_dir is None:
        raise ValueError("`output_dir` is missing: give the folder that the result goes to.")
    resume = config.resume_from_checkpoint
    resume = {"true": True, "false": None}.get(str(resume).lower(), resume)
    result = Path(config.output_dir) / ("adapter" if arguments.lora_rank else "pipeline")
    if resume is None and result.exists():
        raise ValueError(f"`output_dir` {config.output_dir} already holds {result.name}/: choose another folder.")
    policy = make_policy(arguments, eta=eta)
    trainer = trainer_type(
        policy,
        config,
        train_dataset=stream_of_rows(arguments.prompts, seed=config.seed),
        reward_function=JointReward(load_rewards(arguments.rewards)),
        pretraining_dataset=None if arguments.pairs is None else stream_of_rows(arguments.pairs, seed=config.seed),
        peft_config=LoraConfig(r=arguments.lora_rank, lora_alpha=arguments.lora_rank) if arguments.lora_rank else None,
    )
    cast_training_params(policy.denoiser, torch.float32)  # small steps are lost in bfloat16
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        facts = {"model": arguments.model, "trainer": trainer_type.__name__, "step": trainer.state.global_step}
        with checkpoint.write_folder_atomically(result, facts) as stage:
            save = policy.save_lora_weights if arguments.lora_rank else policy.pipeline.save_pretrained
            save(stage)
        print(f"· saved {result}", file=sys.stderr, flush=True)


def make_policy(arguments: ImageArguments, *, eta: float) -> TextToImagePolicy:
    """The pipeline as a controller; `eta` is the share of noise in its sampler."""
    if arguments.lora_rank < 0:
        raise ValueError(f"`lora_rank` must be at least 0, got {arguments.lora_rank}.")
    pipeline = DiffusionPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    return TextToImagePolicy(
        pipeline,
        scheduler=transition_scheduler(pipeline.scheduler, eta=eta),
        guidance_scale=arguments.guidance_scale,
        training_guidance_scale=arguments.training_guidance_scale,
        height=arguments.resolution,
        width=arguments.resolution,
    )


def load_rewards(sources: list[str]) -> dict[str, Callable[..., Any]]:
    """The reward functions by their names, or by their URLs.

    Raises:
        ValueError: there is none, a name twice, or what the file holds cannot be called.
        FileNotFoundError: there is no such file.
    """
    rewards: dict[str, Callable[..., Any]] = {}
    for source in sources:
        is_remote = source.startswith(("http://", "https://"))
        path, _, function = source.rpartition(":")
        name = source if is_remote else function
        if name in rewards:
            raise ValueError(f"`rewards` has two that are called {name!r}: rename one.")
        rewards[name] = HTTPReward(source) if is_remote else _from_file(Path(path), function)
    if not rewards:
        raise ValueError("`rewards` is empty: give `path/to/file.py:NAME` or a URL.")
    return rewards


def _from_file(path: Path, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise FileNotFoundError(f"`rewards` {path}:{name}: there is no file {path}.")
    found = _namespace(path).get(name)
    if not callable(found):
        raise ValueError(f"`rewards` {path}:{name} must be a function, got {type(found).__name__}.")
    return cast(Callable[..., Any], found)


@cache
def _namespace(path: Path) -> dict[str, Any]:
    return runpy.run_path(str(path))
