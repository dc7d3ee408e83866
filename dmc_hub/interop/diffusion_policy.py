"""Checkpoints of real-stanford/diffusion_policy: low-dimensional policies with the U-Net."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from dmc_hub.interop.schedules import from_diffusers
from dmc_hub.interop.weights import (
    InteropError,
    UnetNames,
    checked_tensors,
    conditional_unet,
    read_tensors,
    read_torch_file,
    renamed,
    under,
)
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffusionPolicyPipeline

PUSHT_SCHEDULER: Mapping[str, Any] = {
    "num_train_timesteps": 100,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
"""The DDPM scheduler of all published configurations."""

_UNET = UnetNames(
    time=("diffusion_step_encoder.1", "diffusion_step_encoder.3"),
    down="down_modules.{i}.{j}",
    half="down_modules.{i}.2.conv",
    middle=("mid_modules.0", "mid_modules.1"),
    up="up_modules.{i}.{j}",
    double="up_modules.{i}.2.conv",
    head=("final_conv.0.block.0", "final_conv.0.block.1", "final_conv.1"),
    block={
        "block_in.0": "blocks.0.block.0",
        "block_in.1": "blocks.0.block.1",
        "block_out.0": "blocks.1.block.0",
        "block_out.1": "blocks.1.block.1",
        "film.1": "cond_encoder.1",
        "residual": "residual_conv",
    },
)


def import_diffusion_policy(
    path: str | os.PathLike[str],
    *,
    horizon: int = 16,
    use_ema: bool = True,
    scheduler: Mapping[str, Any] = PUSHT_SCHEDULER,
    num_inference_steps: int | None = None,
    observe_then_act: bool = True,
) -> DiffusionPolicyPipeline:
    """A `DiffusionUnetLowdimPolicy` with observations as global condition, from its tensors.

    Its own checkpoints hold pickled configuration objects, which are never unpickled here: take the state dictionary
    out where that code is installed and trusted, `payload["state_dicts"]["ema_model"]`, and save it by `torch.save` or
    safetensors. A payload whose other entries are plain data is read as it is. Widths, observation steps and statistics
    follow from the tensors. Not supported: images, the transformer, observations as local condition or in-painted.

    Args:
        path: a `.safetensors` file, or a file of `torch.save`.
        horizon: actions of a sequence.
        use_ema: of a payload, take the running average of the weights.
        scheduler: arguments of its DDPM scheduler.
        num_inference_steps: default number of denoising steps; all by default, as there.
        observe_then_act: its `oa_step_convention`: the first executed action is that of the last observation; otherwise
            the one after.

    Raises:
        InteropError: a file that holds more than data, another architecture, weights that do not fit.
    """
    path = Path(path)
    state = _state_dict(path, "ema_model" if use_ema else "model")
    unet = under(state, "model.")
    denoiser = conditional_unet(renamed(unet, _UNET.modules(unet)), f"`{path}`")
    ours = from_diffusers(scheduler, eta=1.0)
    clips = ours.config.clip_range is not None and ours.config.clip_range <= 1
    normalizer = _normalizer(under(state, "normalizer.params_dict."), path, "limits" if clips else "gaussian")
    observation_dim, width = normalizer.config.observation_dim, denoiser.config.condition_dim
    if not width or width % observation_dim or denoiser.config.action_dim != normalizer.config.action_dim:
        raise InteropError(
            f"The network of `{path}` has {denoiser.config.action_dim} numbers per step and {width} as its condition, "
            f"its statistics are of {observation_dim} observed and {normalizer.config.action_dim} acted. Only policies "
            "with observations as global condition are supported."
        )
    num_steps = width // observation_dim
    pipeline = DiffusionPolicyPipeline(
        denoiser,
        ours,
        normalizer,
        horizon=horizon,
        num_observation_steps=num_steps,
        num_inference_steps=num_inference_steps or ours.config.num_train_timesteps,
        num_past_actions=num_steps - 1 if observe_then_act else num_steps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _state_dict(path: Path, part: str) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    content = read_torch_file(path)
    if isinstance(content, dict) and "state_dicts" in content:
        parts = content["state_dicts"]
        if not isinstance(parts, dict) or part not in parts:
            raise InteropError(f"`{path}` has no state dictionary {part!r}.")
        content = parts[part]
    return checked_tensors(content, path)


def _normalizer(state: Mapping[str, Tensor], path: Path, mode: str) -> Normalizer:
    """From `x * scale + offset` to `(x - shift) / scale`."""
    values = {}
    for theirs, ours in (("obs", "observation"), ("action", "action")):
        for name in ("scale", "offset"):
            if f"{theirs}.{name}" not in state:
                raise InteropError(f"`{path}` lacks the statistics `normalizer.params_dict.{theirs}.{name}`.")
        scale, offset = state[f"{theirs}.scale"].double(), state[f"{theirs}.offset"].double()
        if not bool((scale != 0).all()):
            raise InteropError(f"`{path}` has a scale of 0 in the statistics of {theirs!r}.")
        values[f"{ours}_shift"], values[f"{ours}_scale"] = (-offset / scale).float(), (1 / scale).float()
    normalizer = Normalizer(len(values["observation_shift"]), len(values["action_shift"]), mode)
    normalizer.load_state_dict(values)
    return cast(Normalizer, normalizer)
