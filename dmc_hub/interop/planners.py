"""Planners of diffusers (`UNet1DModel`, as in the `ValueGuidedRLPipeline` repositories) and of CleanDiffuser."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmc_hub.interop.schedules import from_diffusers
from dmc_hub.interop.weights import (
    InteropError,
    UnetNames,
    build,
    checked_tensors,
    read_json,
    read_tensors,
    read_torch_file,
    renamed,
    temporal_unet,
    under,
)
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.inverse_dynamics import InverseDynamics
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffuserPlannerPipeline
from dmc_hub.scheduler import TransitionScheduler

_DIFFUSERS_UNET = UnetNames(
    time=("time_mlp.linear_1", "time_mlp.linear_2"),
    down="down_blocks.{i}.resnets.{j}",
    half="down_blocks.{i}.downsample.conv",
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    up="up_blocks.{i}.resnets.{j}",
    double="up_blocks.{i}.upsample.conv",
    head=("out_block.final_conv1d_1", "out_block.final_conv1d_gn", "out_block.final_conv1d_2"),
    block={
        "block_in.0": "conv_in.conv1d",
        "block_in.1": "conv_in.group_norm",
        "block_out.0": "conv_out.conv1d",
        "block_out.1": "conv_out.group_norm",
        "time_projection.1": "time_emb",
        "residual": "residual_conv",
    },
)
_CLEANDIFFUSER_UNET = UnetNames(
    time=("map_emb.0", "map_emb.2"),
    down="downs.{i}.{j}",
    half="downs.{i}.3.conv",
    middle=("mid_block1", "mid_block2"),
    up="ups.{i}.{j}",
    double="ups.{i}.3.conv",
    head=("final_conv.0", "final_conv.1", "final_conv.3"),
    block={
        "block_in.0": "conv1.0",
        "block_in.1": "conv1.1",
        "block_out.0": "conv2.0",
        "block_out.1": "conv2.1",
        "time_projection.1": "emb_mlp.1",
        "residual": "residual_conv",
    },
)
_UNET_SETTINGS = {
    "mid_block_type": "MidResTemporalBlock1D",
    "out_block_type": "OutConv1DBlock",
    "time_embedding_type": "positional",
    "use_timestep_embedding": True,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "act_fn": "mish",
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "extra_in_channels": 0,
    "downsample_each_block": False,
}


def import_value_guided_planner(
    folder: str | os.PathLike[str], *, normalizer: Normalizer, horizon: int, num_inference_steps: int = 20
) -> DiffuserPlannerPipeline:
    """The planner of a repository of diffusers' `ValueGuidedRLPipeline`, from `unet/` and `scheduler/`.

    Its plans hold actions before observations; the weights are reordered. Such a repository has no statistics (the
    original computes them from the environment's data) and says nothing of the horizon. Its value function guides noisy
    plans and is no critic of actions: it is left out, so train a critic before candidates are to be ranked.

    Args:
        folder: the downloaded repository.
        normalizer: statistics of the data that the network was trained on.
        horizon: steps of a plan.
        num_inference_steps: default number of denoising steps.

    Raises:
        InteropError: another architecture or schedule, weights that do not fit, or widths that are not those of
            `normalizer`.
    """
    folder = Path(folder)
    config = read_json(folder / "unet" / "config.json")
    _check_unet_config(config)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = read_tensors(weights if weights.is_file() else weights.with_suffix(".bin"))
    state = renamed(state, _DIFFUSERS_UNET.modules(state))
    action_dim = normalizer.config.action_dim
    denoiser = temporal_unet(_observations_first(state, action_dim), f"`{folder}`", timestep_embedding="sinusoidal")
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler_config.get("_class_name") != "DDPMScheduler":
        raise InteropError(f"The scheduler must be a DDPMScheduler, got {scheduler_config.get('_class_name')!r}.")
    scheduler_config = {name: value for name, value in scheduler_config.items() if not name.startswith("_")}
    return _planner(denoiser, from_diffusers(scheduler_config, eta=1.0), normalizer, None, horizon, num_inference_steps)


def import_cleandiffuser_planner(
    path: str | os.PathLike[str],
    *,
    scheduler: TransitionScheduler,
    normalizer: Normalizer,
    horizon: int,
    num_heads: int | None = None,
    position_embedding: str = "sinusoidal",
    inverse_dynamics: InverseDynamics | None = None,
    use_ema: bool = True,
    num_inference_steps: int = 20,
) -> DiffuserPlannerPipeline:
    """An unconditional planner of CleanDiffuser: `JannerUNet1d` or `DiT1d` with positional embeddings of the timestep.

    A checkpoint of CleanDiffuser holds tensors and nothing else, so that noise levels, statistics and the number of
    heads have to be given. Not supported: Fourier embeddings and other timesteps than those of discrete diffusion,
    attention or other norms than group norm in the U-Net, learned positions and cross-attention in the DiT. Weights of
    a condition's embedding are left out: the network is the unconditional one.

    Args:
        path: what `agent.save(path)` wrote.
        scheduler: the noise levels of training, see `cleandiffuser_scheduler`.
        normalizer: statistics of the data.
        horizon: steps of a plan.
        num_heads: of the DiT's attention.
        position_embedding: of the DiT's positions, which its weights do not tell: `"sinusoidal"` in the version of the
            paper (class `SinusoidalEmbedding`), `"positional"` in later ones (`UntrainablePositionalEmbedding`).
        inverse_dynamics: for networks that plan observations alone, as Decision Diffuser.
        use_ema: take the running average of the weights, which CleanDiffuser samples with.
        num_inference_steps: default number of denoising steps.

    Raises:
        InteropError: another architecture, weights that do not fit, or widths that are not those of `normalizer`.
    """
    path = Path(path)
    content, part = read_torch_file(path), "model_ema" if use_ema else "model"
    if not isinstance(content, dict) or part not in content:
        raise InteropError(f"`{path}` is no checkpoint of CleanDiffuser: it has no entry {part!r}.")
    state = under(checked_tensors(content[part], path), "diffusion.")
    unknown = sorted(
        name for name in state if name.startswith("map_noise.") or ".to_qkv" in name or name.endswith(".g")
    )
    if unknown:
        raise InteropError(
            f"`{path}` has {unknown[0]}: Fourier embeddings, attention and layer norms are not supported."
        )
    if "x_proj.weight" in state:
        denoiser: Any = _cleandiffuser_dit(state, num_heads, position_embedding, path)
    else:
        state = renamed(state, _CLEANDIFFUSER_UNET.modules(state))
        denoiser = temporal_unet(state, f"`{path}`", timestep_embedding="positional")
        if denoiser.config.dim < 32:
            raise InteropError(
                f"`{path}` has width {denoiser.config.dim}: below 32 its norms have fewer than 8 groups."
            )
    return _planner(denoiser, scheduler, normalizer, inverse_dynamics, horizon, num_inference_steps)


def _planner(
    denoiser: Any,
    scheduler: TransitionScheduler,
    normalizer: Normalizer,
    inverse_dynamics: InverseDynamics | None,
    horizon: int,
    num_inference_steps: int,
) -> DiffuserPlannerPipeline:
    pipeline = DiffuserPlannerPipeline(
        denoiser,
        scheduler,
        normalizer,
        inverse_dynamics=inverse_dynamics,
        horizon=horizon,
        num_inference_steps=num_inference_steps,
    )
    config = denoiser.config
    width = config.token_dim if isinstance(denoiser, DiffusionTransformer1D) else config.transition_dim
    if width != pipeline.latent_dim:
        raise InteropError(
            f"The network plans {width} numbers per step, but `normalizer` has {pipeline.observation_dim} of an "
            f"observation and {pipeline.action_dim} of an action"
            f"{', of which inverse dynamics give the actions' if inverse_dynamics is not None else ''}."
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _check_unet_config(config: dict[str, Any]) -> None:
    levels = len(config.get("down_block_types", ()))
    wanted = {
        "_class_name": "UNet1DModel",
        "down_block_types": ["DownResnetBlock1D"] * levels,
        "up_block_types": ["UpResnetBlock1D"] * (levels - 1),
        **_UNET_SETTINGS,
    }
    for name, value in wanted.items():
        if config.get(name) != value:
            raise InteropError(f"The network's `{name}` must be {value!r}, got {config.get(name)!r}.")
    if config.get("in_channels") != config.get("out_channels"):
        raise InteropError("The network's `in_channels` and `out_channels` differ.")


def _observations_first(state: dict[str, Tensor], action_dim: int) -> dict[str, Tensor]:
    """Reorder what reads and writes a step of a plan: from actions first to observations first."""
    state = dict(state)
    for name in ("down.0.first.block_in.0.weight", "down.0.first.residual.weight"):
        if name in state:
            state[name] = torch.cat([state[name][:, action_dim:], state[name][:, :action_dim]], dim=1)
    for name in ("head.1.weight", "head.1.bias"):
        if name in state:
            state[name] = torch.cat([state[name][action_dim:], state[name][:action_dim]])
    return state


def _cleandiffuser_dit(
    state: dict[str, Tensor], num_heads: int | None, position_embedding: str, path: Path
) -> DiffusionTransformer1D:
    if position_embedding not in ("sinusoidal", "positional"):
        raise InteropError(f"`position_embedding` must be 'sinusoidal' or 'positional', got {position_embedding!r}.")
    if num_heads is None:
        raise InteropError("`num_heads` is missing: a DiT's weights do not tell it.")
    for name in ("pos_emb", "t_proj.0.weight"):
        if name in state:
            raise InteropError(f"`{path}` has {name}: a DiT of this version of CleanDiffuser is not supported.")
    modules = {
        "x_proj": "token_projection",
        "map_emb.0": "time_embedding.0",
        "map_emb.2": "time_embedding.2",
        "final_layer.linear": "head",
        "final_layer.adaLN_modulation.1": "modulation.1",
    }
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for i in range(depth):
        modules[f"blocks.{i}.attn.out_proj"] = f"blocks.{i}.projection"
        modules[f"blocks.{i}.mlp.3"] = f"blocks.{i}.mlp.2"  # theirs has a dropout in between
        modules[f"blocks.{i}.adaLN_modulation.1"] = f"blocks.{i}.modulation.1"
    packed = {f"attn.in_proj_{leaf}": f"qkv.{leaf}" for leaf in ("weight", "bias")}
    state = renamed(state, modules)
    for theirs, ours in packed.items():
        for i in range(depth):
            if f"blocks.{i}.{theirs}" in state:
                state[f"blocks.{i}.{ours}"] = state.pop(f"blocks.{i}.{theirs}")
    for name in ("token_projection.weight", "time_embedding.0.weight"):
        if name not in state:
            raise InteropError(f"`{path}` lacks what is called {name} here.")
    dim, token_dim = state["token_projection.weight"].shape
    if num_heads < 1 or dim % num_heads:
        raise InteropError(f"`num_heads` must divide the width {dim}, got {num_heads}.")
    result: DiffusionTransformer1D = build(
        DiffusionTransformer1D,
        state,
        f"`{path}`",
        token_dim=token_dim,
        dim=dim,
        num_heads=num_heads,
        depth=depth,
        timestep_dim=state["time_embedding.0.weight"].shape[1],
        timestep_embedding="positional",
        position_embedding=position_embedding,
        normalized_residual=True,
    )
    return result
