"""LeRobot's DiffusionPolicy: its folders in, and folders that LeRobot loads out."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dmc_hub import checkpoint
from dmc_hub.hub import load_pipeline
from dmc_hub.interop.schedules import from_diffusers, to_diffusers
from dmc_hub.interop.vision import DEPTHS, named_by_torchvision
from dmc_hub.interop.weights import (
    InteropError,
    UnetNames,
    build,
    child,
    conditional_unet,
    read_json,
    read_tensors,
    renamed,
    under,
)
from dmc_hub.models.conditional_unet import ConditionalUnet1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.vision_encoder import VisionEncoder
from dmc_hub.pipelines import DiffusionPolicyPipeline

STATE, ENVIRONMENT_STATE, ACTION = "observation.state", "observation.environment_state", "action"
_EPS = 1e-8
_UNET = UnetNames(
    time=("diffusion_step_encoder.1", "diffusion_step_encoder.3"),
    down="down_modules.{i}.{j}",
    half="down_modules.{i}.2",
    middle=("mid_modules.0", "mid_modules.1"),
    up="up_modules.{i}.{j}",
    double="up_modules.{i}.2",
    head=("final_conv.0.block.0", "final_conv.0.block.1", "final_conv.1"),
    block={
        "block_in.0": "conv1.block.0",
        "block_in.1": "conv1.block.1",
        "block_out.0": "conv2.block.0",
        "block_out.1": "conv2.block.1",
        "film.1": "cond_encoder.1",
        "residual": "residual_conv",
    },
)
_PREPROCESSOR, _POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"
Statistics = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class LeRobotPolicy:
    """What a folder of LeRobot's DiffusionPolicy becomes.

    pipeline: the policy. Its state is `observation.state`, then `observation.environment_state` if the policy has it;
        its cameras have LeRobot's names.
    num_action_steps: actions that LeRobot executes per decision, for `Agent(pipeline, num_action_steps=...)`.
    observation_names: the entries of LeRobot's observation, in the order of the pipeline's.
    """

    pipeline: DiffusionPolicyPipeline
    num_action_steps: int
    observation_names: tuple[str, ...]

    def observation(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The pipeline's observation `(batch, observation_dim)` from LeRobot's, in the environment's units: vectors
        `(batch, dim)` and images `(batch, channels, height, width)` in `[0, 1]`."""
        missing = [name for name in self.observation_names if name not in batch]
        if missing:
            raise ValueError(f"`batch` lacks {', '.join(missing)}.")
        state = torch.cat(
            [batch[name] for name in (STATE, ENVIRONMENT_STATE) if name in self.observation_names], dim=-1
        )
        encoder = self.pipeline.vision_encoder
        if encoder is None:
            return state
        images = {name: batch[name].movedim(-3, -1) for name in encoder.cameras}
        return self.pipeline.observation_vectors({"state": state, **images})


def import_lerobot_policy(folder: str | os.PathLike[str]) -> LeRobotPolicy:
    """Read a folder (a downloaded repository) of LeRobot's DiffusionPolicy.

    It reads `config.json`, `model.safetensors` and the statistics: of the processors that LeRobot 0.4 and later save,
    or of the buffers inside `model.safetensors` before that. The pipeline's denoising steps are LeRobot's, and it has
    no critic: train one on features of the same kind before candidates are to be ranked.

    Not supported: other group counts than 8, backbones other than ResNet-18 and -34, quantile normalisation.

    Raises:
        InteropError: another kind of policy, a setting that has no counterpart, files that are damaged.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    _check_config(config)
    state = read_tensors(folder / "model.safetensors")
    features = {**config["input_features"], **config["output_features"]}
    modes, statistics = _statistics(folder, config, state)
    unet = under(state, "diffusion.unet.")
    denoiser = conditional_unet(renamed(unet, _UNET.modules(unet)), f"`{folder}`")
    images = [name for name, feature in config["input_features"].items() if feature["type"] == "VISUAL"]
    encoder = _vision_encoder(config, state, images, statistics, modes) if images else None
    names = (STATE, *((ENVIRONMENT_STATE,) if ENVIRONMENT_STATE in features else ()), *images)
    scheduler = _scheduler(config)
    clips = scheduler.config.clip_range is not None and scheduler.config.clip_range <= 1
    pipeline = DiffusionPolicyPipeline(
        denoiser,
        scheduler,
        _normalizer(names, features, modes, statistics, encoder, clips=clips),
        vision_encoder=encoder,
        horizon=config["horizon"],
        num_observation_steps=config["n_obs_steps"],
        num_inference_steps=config.get("num_inference_steps") or scheduler.config.num_train_timesteps,
        num_past_actions=config["n_obs_steps"] - 1,
    )
    width = config["n_obs_steps"] * pipeline.observation_dim
    if denoiser.config.condition_dim != width:
        raise InteropError(
            f"The network of `{folder}` reads {denoiser.config.condition_dim} numbers, the features make {width}."
        )
    if denoiser.config.action_dim != pipeline.action_dim:
        raise InteropError(f"The network of `{folder}` has {denoiser.config.action_dim} actions, not as its features.")
    if encoder is not None and ENVIRONMENT_STATE in features:
        _put_features_last(denoiser, config["n_obs_steps"], features[STATE]["shape"][0], encoder.feature_dim)
    pipeline.set_progress_bar_config(disable=True)
    return LeRobotPolicy(pipeline, config["n_action_steps"], names)


def export_lerobot_policy(
    pipeline: DiffusionPolicyPipeline, folder: str | os.PathLike[str], *, state_dim: int, num_action_steps: int = 1
) -> None:
    """Write a policy as a folder that LeRobot 0.4 and later load; an attached LoRA adapter is merged into the weights.

    Args:
        pipeline: a policy with a `ConditionalUnet1D` whose denoising steps diffusers' schedulers have; one that came
            from LeRobot, for example.
        folder: replaced if it is there.
        state_dim: the first so many numbers of an observation are LeRobot's `observation.state`, the others its
            `observation.environment_state`, without which (or an image) it takes no policy.
        num_action_steps: actions that LeRobot executes per decision.

    Raises:
        InteropError: the policy has no counterpart in LeRobot.
    """
    unet, config = _exported_config(pipeline, state_dim, num_action_steps)
    modules = {ours: theirs for theirs, ours in _UNET.modules(_their_names(unet)).items()}
    statistics = _exported_statistics(pipeline.normalizer, state_dim)
    with checkpoint.write_folder_atomically(folder) as stage:
        checkpoint.save_json(stage / "config.json", config)
        weights = {f"diffusion.unet.{name}": tensor for name, tensor in renamed(unet, modules).items()}
        checkpoint.save_tensors(stage / "model.safetensors", weights, {"format": "pt"})
        steps: list[tuple[str, dict[str, Any]]] = [
            ("rename_observations_processor", {"rename_map": {}}),
            ("to_batch_processor", {}),
            ("device_processor", {"device": "cpu", "float_dtype": None}),
            ("normalizer_processor", _normalizer_config(config)),
        ]
        _save_processor(stage, _PREPROCESSOR, steps, statistics)
        back: list[tuple[str, dict[str, Any]]] = [
            ("unnormalizer_processor", _normalizer_config(config, outputs_only=True)),
            ("device_processor", {"device": "cpu", "float_dtype": None}),
        ]
        _save_processor(stage, _POSTPROCESSOR, back, statistics)


def save_lerobot_plugin_policy(
    pipeline: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    state_dim: int | None = None,
    num_candidates: int = 1,
    num_action_steps: int = 1,
    seed: int = 0,
) -> None:
    """Write any saved planner or policy as a folder that LeRobot runs as the policy type `dmc_hub`, critic included.

    LeRobot knows that type where the distribution `lerobot_policy_dmc_hub` is installed (scripts/ has it).

    Args:
        pipeline: folder of the pipeline.
        folder: replaced if it is there.
        adapter: folder of an adapter that was trained on it.
        state_dim: the first so many numbers of an observation are `observation.state`, the others
            `observation.environment_state`; None: all are the state.
        num_candidates: candidates per decision.
        num_action_steps: actions executed per decision.
        seed: of the sampling noise.

    Raises:
        InteropError: an impossible `state_dim`.
        ValueError: what the folders hold cannot be loaded together.
    """
    loaded = load_pipeline(pipeline)
    if loaded.components.get("vision_encoder") is not None:
        raise InteropError("The policy type `dmc_hub` sees states only: this pipeline has a vision encoder.")
    if adapter is not None:
        loaded.load_lora_weights(adapter)
    split = loaded.observation_dim if state_dim is None else state_dim
    if not 0 < split <= loaded.observation_dim:
        raise InteropError(f"`state_dim` must lie in 1..{loaded.observation_dim}, got {split}.")
    inputs = {STATE: {"type": "STATE", "shape": [split]}}
    if split < loaded.observation_dim:
        inputs[ENVIRONMENT_STATE] = {"type": "ENV", "shape": [loaded.observation_dim - split]}
    config = {
        "type": "dmc_hub",
        "input_features": inputs,
        "output_features": {ACTION: {"type": "ACTION", "shape": [loaded.action_dim]}},
        "normalization_mapping": {},
        "num_candidates": num_candidates,
        "action_selection": "expectation" if loaded.critic is None else "greedy",
        "num_action_steps": num_action_steps,
        "seed": seed,
        "device": "cpu",
    }
    to_device: tuple[str, dict[str, Any]] = ("device_processor", {"device": "cpu", "float_dtype": None})
    with checkpoint.write_folder_atomically(folder) as stage:
        shutil.copytree(pipeline, stage / "pipeline", ignore=shutil.ignore_patterns(".*"))
        if adapter is not None:
            shutil.copytree(adapter, stage / "adapter", ignore=shutil.ignore_patterns(".*"))
        checkpoint.save_json(stage / "config.json", config)
        before = [("rename_observations_processor", {"rename_map": {}}), ("to_batch_processor", {}), to_device]
        _save_processor(stage, _PREPROCESSOR, before, {})
        _save_processor(stage, _POSTPROCESSOR, [to_device], {})


# ---- Import ----------------------------------------------------------------------------------------------


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("type") != "diffusion":
        raise InteropError(f"The policy's `type` is {config.get('type')!r}, not 'diffusion'.")
    for name in ("input_features", "output_features", "normalization_mapping"):
        if not isinstance(config.get(name), dict):
            raise InteropError(f"The policy's configuration lacks `{name}`.")
    for name in ("horizon", "n_obs_steps", "n_action_steps"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise InteropError(f"The policy's `{name}` must be a positive integer, got {config.get(name)!r}.")
    if config.get("n_groups", 8) != 8:
        raise InteropError(f"The policy's `n_groups` is {config['n_groups']}; only 8 are supported.")
    known = {STATE: "STATE", ENVIRONMENT_STATE: "ENV"}
    for name, feature in config["input_features"].items():
        kind = known.get(name, "VISUAL" if name.startswith("observation.image") else None)
        if not isinstance(feature, dict) or feature.get("type") != kind:
            raise InteropError(f"The policy's input {name!r} is not one of DiffusionPolicy.")
    if STATE not in config["input_features"] or set(config["output_features"]) != {ACTION}:
        raise InteropError(f"The policy must have the input {STATE!r} and the output {ACTION!r} alone.")


def _scheduler(config: Mapping[str, Any]) -> Any:
    kind = config.get("noise_scheduler_type", "DDPM")
    if kind not in ("DDPM", "DDIM"):
        raise InteropError(f"The policy's `noise_scheduler_type` is {kind!r}, not 'DDPM' or 'DDIM'.")
    defaults = {
        "num_train_timesteps": 100,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "prediction_type": "epsilon",
    }
    return from_diffusers(
        {n: config.get(n, value) for n, value in defaults.items()}, eta=1.0 if kind == "DDPM" else 0.0
    )


def _statistics(
    folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, str], Statistics]:
    """Normalisation mode by type of feature, and statistics by feature."""
    if not (folder / f"{_PREPROCESSOR}.json").is_file():
        return dict(config["normalization_mapping"]), _statistics_of_buffers(config, state)
    for step in read_json(folder / f"{_PREPROCESSOR}.json").get("steps", ()):
        if isinstance(step, dict) and step.get("registry_name") == "normalizer_processor":
            modes = step.get("config", {}).get("norm_map")
            if not isinstance(modes, dict):
                break
            flat = read_tensors(child(folder, step.get("state_file")))
            statistics: Statistics = {}
            for name, tensor in flat.items():
                feature, _, statistic = name.rpartition(".")
                statistics.setdefault(feature, {})[statistic] = tensor
            return modes, statistics
    raise InteropError(f"`{folder / _PREPROCESSOR}.json` has no normalizer_processor.")


def _statistics_of_buffers(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Statistics:
    """Of LeRobot before 0.4, which kept them in the policy."""
    found: Statistics = {}
    for part, features in (("normalize_inputs", "input_features"), ("unnormalize_outputs", "output_features")):
        for name in config[features]:
            values = under(state, f"{part}.buffer_{name.replace('.', '_')}.")
            if values:
                found[name] = values
    if not found:
        raise InteropError("There are no statistics: neither a policy_preprocessor.json nor buffers in the weights.")
    return found


def _affine(
    name: str, kind: str, modes: Mapping[str, str], statistics: Statistics, width: int
) -> tuple[Tensor, Tensor]:
    """Shift and scale, as `(x - shift) / scale`, float32 of shape `(width,)`."""
    mode = modes.get(kind, "IDENTITY")
    if mode == "IDENTITY" or name not in statistics:
        return torch.zeros(width), torch.ones(width)
    keys = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max")}.get(mode)
    if keys is None:
        raise InteropError(f"The normalisation {mode!r} of {name!r} is not supported, only MEAN_STD and MIN_MAX.")
    missing = [key for key in keys if key not in statistics[name]]
    if missing:
        raise InteropError(f"The statistics of {name!r} lack {missing[0]!r}.")
    first, second = (statistics[name][key].double().flatten() for key in keys)
    if first.shape != (width,) or second.shape != (width,):
        raise InteropError(f"The statistics of {name!r} have {len(first)} entries, the feature has {width}.")
    if mode == "MEAN_STD":
        # LeRobot adds 1e-8 to the standard deviation. A constant is 0 either way.
        shift, scale = first, torch.where(second > 0, second, torch.full_like(second, _EPS if kind == "ACTION" else 1))
        return shift.float(), scale.float()
    # LeRobot maps a constant observation to -1, and the action back from anything.
    constant = _EPS / 2 if kind == "ACTION" else 1.0
    scale = torch.where(second > first, (second - first) / 2, torch.full_like(first, constant))
    return (first + scale).float(), scale.float()


def _put_features_last(denoiser: ConditionalUnet1D, num_steps: int, state_dim: int, feature_dim: int) -> None:
    """LeRobot's condition has the environment's state behind the features, a pipeline's has the features at the end."""
    width = denoiser.config.condition_dim // num_steps
    behind = state_dim + feature_dim
    step = [*range(state_dim), *range(behind, width), *range(state_dim, behind)]
    columns = torch.tensor([i * width + column for i in range(num_steps) for column in step])
    for name, parameter in denoiser.named_parameters():
        if name.endswith("film.1.weight"):
            condition = parameter.data[:, -len(columns) :]
            condition.copy_(condition[:, columns])


def _normalizer(
    names: Iterable[str],
    features: Mapping[str, Any],
    modes: Mapping[str, str],
    statistics: Statistics,
    encoder: VisionEncoder | None,
    *,
    clips: bool,
) -> Normalizer:
    """With the mode "limits" the pipeline clamps actions at the end; LeRobot does so where it clips."""
    parts = []
    for name in names:
        if features[name]["type"] != "VISUAL":
            (width,) = features[name]["shape"]
            parts.append(_affine(name, features[name]["type"], modes, statistics, width))
    if encoder is not None:
        parts.append((torch.zeros(encoder.feature_dim), torch.ones(encoder.feature_dim)))
    shift, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    (action_dim,) = features[ACTION]["shape"]
    normalizer = Normalizer(len(shift), action_dim, "limits" if clips else "gaussian")
    action_shift, action_scale = _affine(ACTION, "ACTION", modes, statistics, action_dim)
    values = {"observation_shift": shift, "observation_scale": scale}
    normalizer.load_state_dict({**values, "action_shift": action_shift, "action_scale": action_scale})
    return cast(Normalizer, normalizer)


def _vision_encoder(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    images: list[str],
    statistics: Statistics,
    modes: Mapping[str, str],
) -> VisionEncoder:
    backbone = config.get("vision_backbone", "resnet18")
    if backbone not in DEPTHS:
        raise InteropError(f"The policy's `vision_backbone` is {backbone!r}; supported are {', '.join(DEPTHS)}.")
    shapes = {tuple(config["input_features"][name]["shape"]) for name in images}
    if len(shapes) > 1:
        raise InteropError(f"The policy's images differ in shape: {sorted(shapes)}.")
    (channels, *_), separate = shapes.pop(), bool(config.get("use_separate_rgb_encoder_per_camera", False))
    resize, crop = config.get("resize_shape"), config.get("crop_shape")
    weights: dict[str, Tensor] = {}
    for i in range(len(images) if separate else 1):
        prefix = f"diffusion.rgb_encoder.{i}." if separate else "diffusion.rgb_encoder."
        backbone_weights = named_by_torchvision(under(state, f"{prefix}backbone."))
        weights |= {f"encoders.{i}.backbone.{name}": tensor for name, tensor in backbone_weights.items()}
        for theirs, ours in (("pool.nets", "keypoints"), ("out", "projection")):
            weights |= {
                f"encoders.{i}.{ours}.{name}": tensor for name, tensor in under(state, f"{prefix}{theirs}.").items()
            }
    scales = [_affine(name, "VISUAL", modes, statistics, channels) for name in images]
    mean, std = (torch.cat(part) for part in zip(*scales, strict=True))
    num_keypoints = config.get("spatial_softmax_num_keypoints", 32)
    result: VisionEncoder = build(
        VisionEncoder,
        weights,
        "the image encoder",
        cameras=images,
        depths=DEPTHS[backbone],
        norm="group" if config.get("use_group_norm", False) else "batch",
        num_keypoints=num_keypoints,
        projection_dim=2 * num_keypoints,
        projection_relu=True,
        separate=separate,
        resize=resize,
        crop=crop,
        image_mean=mean.tolist(),
        image_std=(std + _EPS).tolist(),
        num_channels=channels,
    )
    return result


# ---- Export ----------------------------------------------------------------------------------------------


def _exported_config(
    pipeline: DiffusionPolicyPipeline, state_dim: int, num_action_steps: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The network's weights under this library's names, and LeRobot's configuration."""
    denoiser = pipeline.denoiser
    if pipeline.vision_encoder is not None:
        raise InteropError(
            "Image policies are imported from LeRobot, not exported: this pipeline has a vision encoder."
        )
    if not isinstance(denoiser, ConditionalUnet1D) or denoiser.config.draft_dim:
        raise InteropError(f"LeRobot's DiffusionPolicy has a ConditionalUnet1D, not a {type(denoiser).__name__}.")
    steps, dims = pipeline.num_observation_steps, list(denoiser.config.dims)
    if pipeline.num_past_actions != steps - 1:
        raise InteropError(
            f"LeRobot's action sequences start {steps - 1} steps before now, this pipeline's "
            f"{pipeline.num_past_actions}."
        )
    if not 0 < state_dim < pipeline.observation_dim:
        raise InteropError(
            f"`state_dim` must lie in 1..{pipeline.observation_dim - 1}, so that both kinds of state have entries; got "
            f"{state_dim}."
        )
    if not 1 <= num_action_steps <= pipeline.config.horizon - steps + 1:
        raise InteropError(
            f"`num_action_steps` must lie in 1..{pipeline.config.horizon - steps + 1}, got {num_action_steps}."
        )
    if pipeline.config.horizon % 2 ** len(dims):
        raise InteropError(
            f"LeRobot wants a horizon divisible by {2 ** len(dims)}, this one is {pipeline.config.horizon}."
        )
    scheduler = to_diffusers(pipeline.scheduler)
    if scheduler["clip_sample"] != (pipeline.normalizer.config.mode == "limits"):
        raise InteropError(
            "LeRobot clamps actions where it clips samples: use a normalizer of mode 'limits' with a "
            "`clip_range`, or neither."
        )
    config = {
        "type": "diffusion",
        "n_obs_steps": steps,
        "horizon": pipeline.config.horizon,
        "n_action_steps": num_action_steps,
        "normalization_mapping": {"STATE": "MEAN_STD", "ENV": "MEAN_STD", "ACTION": "MEAN_STD"},
        "input_features": {
            STATE: {"type": "STATE", "shape": [state_dim]},
            ENVIRONMENT_STATE: {"type": "ENV", "shape": [pipeline.observation_dim - state_dim]},
        },
        "output_features": {ACTION: {"type": "ACTION", "shape": [pipeline.action_dim]}},
        "down_dims": dims,
        "kernel_size": denoiser.config.kernel_size,
        "n_groups": 8,
        "diffusion_step_embed_dim": denoiser.config.timestep_dim,
        "use_film_scale_modulation": denoiser.config.cond_predict_scale,
        "noise_scheduler_type": "DDPM" if pipeline.scheduler.config.eta else "DDIM",
        **scheduler,
        "num_inference_steps": pipeline.config.num_inference_steps,
        "device": "cpu",
    }
    return _merged_weights(pipeline), config


def _merged_weights(pipeline: DiffusionPolicyPipeline) -> dict[str, Tensor]:
    if not pipeline.lora_names:
        return dict(pipeline.denoiser.state_dict())
    denoiser = copy.deepcopy(pipeline.denoiser)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return dict(denoiser.state_dict())


def _their_names(unet: Mapping[str, Tensor]) -> list[str]:
    """Keys from which `UnetNames` sees the number of levels."""
    levels = len({name.split(".")[1] for name in unet if name.startswith("down.")})
    return [f"down_modules.{i}.0.conv1.block.0.weight" for i in range(levels)]


def _exported_statistics(normalizer: Normalizer, state_dim: int) -> dict[str, Tensor]:
    shift, scale = normalizer.observation_shift, normalizer.observation_scale
    parts = {
        STATE: (shift[:state_dim], scale[:state_dim]),
        ENVIRONMENT_STATE: (shift[state_dim:], scale[state_dim:]),
        ACTION: (normalizer.action_shift, normalizer.action_scale),
    }
    return {
        f"{name}.{key}": value for name, pair in parts.items() for key, value in zip(("mean", "std"), pair, strict=True)
    }


def _normalizer_config(config: Mapping[str, Any], *, outputs_only: bool = False) -> dict[str, Any]:
    features = config["output_features"] if outputs_only else {**config["input_features"], **config["output_features"]}
    return {"eps": _EPS, "features": features, "norm_map": config["normalization_mapping"]}


def _save_processor(
    folder: Path, name: str, steps: list[tuple[str, dict[str, Any]]], statistics: Mapping[str, Tensor]
) -> None:
    entries: list[dict[str, Any]] = []
    for index, (registry_name, config) in enumerate(steps):
        entry: dict[str, Any] = {"registry_name": registry_name, "config": config}
        if "norm_map" in config:
            entry["state_file"] = f"{name}_step_{index}_{registry_name}.safetensors"
            checkpoint.save_tensors(folder / entry["state_file"], statistics)
        entries.append(entry)
    checkpoint.save_json(folder / f"{name}.json", {"name": name, "steps": entries})
