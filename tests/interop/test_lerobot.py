"""LeRobot's DiffusionPolicy computes here what it computes there; what is exported comes back the same.

The other side is its architecture written down again with its names of weights; tests/interop/test_with_lerobot.py
does the same against LeRobot itself where it is installed.
"""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmc_hub import Agent
from dmc_hub.interop import InteropError, LeRobotPolicy, export_lerobot_policy, import_lerobot_policy
from dmc_hub.models.conditional_unet import ConditionalUnet1D
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.pipelines import DiffusionPolicyPipeline

STATE_DIM, ENV_DIM, ACTION_DIM, HORIZON, STEPS = 3, 2, 2, 8, 2
IMAGE = (3, 70, 94)

# ---- LeRobot's architecture, written down again ------------------------------------------------------------


class Embedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rates = torch.exp(-np.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = torch.outer(t.float(), self.rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(8, outputs), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, cond: int, kernel: int, scales: bool) -> None:
        super().__init__()
        self.outputs, self.scales = outputs, scales
        self.conv1, self.conv2 = Conv(inputs, outputs, kernel), Conv(outputs, outputs, kernel)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, outputs * (1 + scales)))
        self.residual_conv = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        hidden, film = self.conv1(x), self.cond_encoder(cond)[..., None]
        if self.scales:
            hidden = film[:, : self.outputs] * hidden + film[:, self.outputs :]
        else:
            hidden = hidden + film
        return self.conv2(hidden) + self.residual_conv(x)


class Unet(nn.Module):
    def __init__(self, width: int, cond: int, dims: tuple[int, ...], kernel: int, step_dim: int, scales: bool) -> None:
        super().__init__()
        self.diffusion_step_encoder = nn.Sequential(
            Embedding(step_dim), nn.Linear(step_dim, step_dim * 4), nn.Mish(), nn.Linear(step_dim * 4, step_dim)
        )

        def residual(inputs: int, outputs: int) -> Residual:
            return Residual(inputs, outputs, step_dim + cond, kernel, scales)

        self.down_modules, self.up_modules = nn.ModuleList(), nn.ModuleList()
        for i, (a, b) in enumerate(zip((width, *dims), dims, strict=False)):
            half = nn.Identity() if i == len(dims) - 1 else nn.Conv1d(b, b, 3, 2, 1)
            self.down_modules.append(nn.ModuleList([residual(a, b), residual(b, b), half]))
        self.mid_modules = nn.ModuleList([residual(dims[-1], dims[-1]) for _ in range(2)])
        for i in reversed(range(1, len(dims))):
            a, b = dims[i - 1], dims[i]
            self.up_modules.append(
                nn.ModuleList([residual(2 * b, a), residual(a, a), nn.ConvTranspose1d(a, a, 4, 2, 1)])
            )
        self.final_conv = nn.Sequential(Conv(dims[0], dims[0], kernel), nn.Conv1d(dims[0], width, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        x, cond, skips = x.mT, torch.cat([self.diffusion_step_encoder(t), cond], dim=1), []
        for first, second, half in cast(Any, self.down_modules):
            x = second(first(x, cond), cond)
            skips.append(x)
            x = half(x)
        for middle in self.mid_modules:
            x = middle(x, cond)
        for first, second, double in cast(Any, self.up_modules):
            x = double(second(first(torch.cat([x, skips.pop()], 1), cond), cond))
        return self.final_conv(x).mT


class BasicBlock(nn.Module):
    """Of torchvision's ResNet-18 (He et al., 2016, Fig. 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (hidden + (x if self.downsample is None else self.downsample(x))).relu()


def resnet18() -> nn.Sequential:
    stages = [
        nn.Sequential(BasicBlock(a, b, 1 if a == b else 2), BasicBlock(b, b, 1))
        for a, b in ((64, 64), (64, 128), (128, 256), (256, 512))
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *stages)


def with_group_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(child.num_features // 16, child.num_features))
        else:
            with_group_norm(child)
    return module


class Pool(nn.Module):
    def __init__(self, keypoints: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.nets = nn.Conv2d(512, keypoints, 1)
        x, y = np.meshgrid(np.linspace(-1, 1, size[1]), np.linspace(-1, 1, size[0]))
        self.register_buffer("pos_grid", torch.from_numpy(np.stack([x.ravel(), y.ravel()], 1)).float())

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.nets(x).flatten(2), dim=-1) @ cast(Tensor, self.pos_grid)


class RgbEncoder(nn.Module):
    def __init__(self, keypoints: int, crop: tuple[int, int] | None, group_norm: bool) -> None:
        super().__init__()
        self.crop = crop
        self.backbone = with_group_norm(resnet18()) if group_norm else resnet18()
        height, width = crop or IMAGE[1:]
        self.pool = Pool(keypoints, (-(-height // 32), -(-width // 32)))
        self.out = nn.Linear(2 * keypoints, 2 * keypoints)

    def forward(self, x: Tensor) -> Tensor:
        if self.crop is not None:
            top, left = ((IMAGE[1] - self.crop[0]) // 2, (IMAGE[2] - self.crop[1]) // 2)
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return self.out(self.pool(self.backbone(x)).flatten(1)).relu()


class Policy(nn.Module):
    """`generate_actions` of a policy of `config`, statistics included."""

    def __init__(self, config: dict[str, Any], statistics: dict[str, dict[str, Tensor]]) -> None:
        super().__init__()
        self.config, self.statistics = config, statistics
        self.images = [name for name in config["input_features"] if "image" in name]
        self.diffusion = nn.Module()
        cond, keypoints = STATE_DIM, config["spatial_softmax_num_keypoints"]
        if self.images:
            count = len(self.images) if config["use_separate_rgb_encoder_per_camera"] else 1
            encoders = [RgbEncoder(keypoints, config["crop_shape"], config["use_group_norm"]) for _ in range(count)]
            separate = config["use_separate_rgb_encoder_per_camera"]
            self.diffusion.rgb_encoder = nn.ModuleList(encoders) if separate else encoders[0]
            cond += 2 * keypoints * len(self.images)
        if "observation.environment_state" in config["input_features"]:
            cond += ENV_DIM
        self.diffusion.unet = Unet(
            ACTION_DIM,
            cond * STEPS,
            tuple(config["down_dims"]),
            config["kernel_size"],
            config["diffusion_step_embed_dim"],
            config["use_film_scale_modulation"],
        )
        scheduler: Any = DDPMScheduler if config["noise_scheduler_type"] == "DDPM" else DDIMScheduler
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample", "prediction_type")
        self.scheduler = scheduler(**{name: config[name] for name in names})

    def normalize(self, name: str, kind: str, x: Tensor, *, inverse: bool = False) -> Tensor:
        mode = self.config["normalization_mapping"].get(kind, "IDENTITY")
        if mode == "IDENTITY":
            return x
        if mode == "MEAN_STD":
            mean, std = self.statistics[name]["mean"], self.statistics[name]["std"]
            return x * std + mean if inverse else (x - mean) / (std + 1e-8)
        low, high = self.statistics[name]["min"], self.statistics[name]["max"]
        span = torch.where(high == low, torch.tensor(1e-8), high - low)
        return (x + 1) / 2 * span + low if inverse else 2 * (x - low) / span - 1

    @torch.no_grad()
    def condition(self, history: list[dict[str, Tensor]]) -> Tensor:
        steps = []
        for batch in history:
            parts = [self.normalize("observation.state", "STATE", batch["observation.state"])]
            for i, name in enumerate(self.images):
                encoder = cast(Any, self.diffusion.rgb_encoder)
                encoder = encoder[i] if isinstance(encoder, nn.ModuleList) else encoder
                parts.append(encoder(self.normalize(name, "VISUAL", batch[name])))
            if "observation.environment_state" in self.config["input_features"]:
                name = "observation.environment_state"
                parts.append(self.normalize(name, "ENV", batch[name]))
            steps.append(torch.cat(parts, dim=1))
        return torch.cat(steps, dim=1)

    @torch.no_grad()
    def act(self, history: list[dict[str, Tensor]], generator: torch.Generator) -> Tensor:
        condition = self.condition(history)
        x = torch.randn((len(condition), HORIZON, ACTION_DIM), generator=generator)
        self.scheduler.set_timesteps(self.config["num_inference_steps"] or self.config["num_train_timesteps"])
        for t in self.scheduler.timesteps:
            output = cast(Any, self.diffusion.unet)(x, t.repeat(len(x)), condition)
            x = self.scheduler.step(output, t, x, generator=generator).prev_sample
        return self.normalize("action", "ACTION", x, inverse=True)[:, STEPS - 1 :]


# ---- Folders as LeRobot saves them -------------------------------------------------------------------------


def configuration(*, cameras: int = 0, environment_state: bool = True, **changes: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {"observation.state": {"type": "STATE", "shape": [STATE_DIM]}}
    for i in range(cameras):
        inputs[f"observation.images.camera_{i}"] = {"type": "VISUAL", "shape": list(IMAGE)}
    if environment_state:
        inputs["observation.environment_state"] = {"type": "ENV", "shape": [ENV_DIM]}
    return {
        "type": "diffusion",
        "n_obs_steps": STEPS,
        "horizon": HORIZON,
        "n_action_steps": 4,
        "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        "input_features": inputs,
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
        "vision_backbone": "resnet18",
        "crop_shape": None,
        "use_group_norm": False,
        "spatial_softmax_num_keypoints": 4,
        "use_separate_rgb_encoder_per_camera": False,
        "down_dims": [16, 32],
        "kernel_size": 5,
        "n_groups": 8,
        "diffusion_step_embed_dim": 12,
        "use_film_scale_modulation": True,
        "noise_scheduler_type": "DDPM",
        "num_train_timesteps": 30,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_inference_steps": None,
        **changes,
    }


def statistics(config: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Of every feature; the first entry of the state is constant."""
    source, found = torch.Generator().manual_seed(11), {}
    for name, feature in {**config["input_features"], **config["output_features"]}.items():
        shape = (3, 1, 1) if feature["type"] == "VISUAL" else tuple(feature["shape"])
        low, span = torch.randn(shape, generator=source), 0.5 + torch.rand(shape, generator=source)
        if name == "observation.state":
            span[0] = 0
        found[name] = {"min": low, "max": low + span, "mean": low + span / 2, "std": 0.2 + span / 4}
    return found


def make_policy(config: dict[str, Any]) -> Policy:
    torch.manual_seed(0)
    policy = Policy(config, statistics(config)).eval()
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
        for name, parameter in policy.named_parameters():
            if "pool.nets" in name:
                parameter.mul_(5 if config["use_group_norm"] else 0.002)  # keypoints move
        for name, buffer in policy.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=source))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=source))
    return policy


def save_policy(folder: Path, policy: Policy, *, processors: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(policy.config))
    weights = {name: tensor.contiguous() for name, tensor in policy.state_dict().items()}
    if processors:
        flat = {f"{name}.{key}": value for name, values in policy.statistics.items() for key, value in values.items()}
        save_file(flat, folder / "policy_preprocessor_step_1_normalizer_processor.safetensors")
        step = {
            "registry_name": "normalizer_processor",
            "config": {"norm_map": policy.config["normalization_mapping"], "eps": 1e-8},
            "state_file": "policy_preprocessor_step_1_normalizer_processor.safetensors",
        }
        steps = [{"registry_name": "to_batch_processor", "config": {}}, step]
        (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))
    else:
        for name, values in policy.statistics.items():
            part = "unnormalize_outputs" if name == "action" else "normalize_inputs"
            for key, value in values.items():
                weights[f"{part}.buffer_{name.replace('.', '_')}.{key}"] = value
    save_file(weights, folder / "model.safetensors")
    return folder


def history(
    config: dict[str, Any], statistics: dict[str, dict[str, Tensor]], batch: int = 3
) -> list[dict[str, Tensor]]:
    source, steps = torch.Generator().manual_seed(5), []
    for _ in range(STEPS):
        step = {}
        for name, feature in config["input_features"].items():
            values = torch.rand((batch, *feature["shape"]), generator=source)
            if feature["type"] != "VISUAL":
                low, high = statistics[name]["min"], statistics[name]["max"]
                values = low + (high - low) * values
            step[name] = values
        steps.append(step)
    return steps


def act(imported: LeRobotPolicy, steps: list[dict[str, Tensor]], generator: torch.Generator) -> np.ndarray:
    observations = torch.stack([imported.observation(step) for step in steps], dim=1)
    return imported.pipeline(observations, generator=generator).actions


# ---- Import ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_film_scale_modulation": False, "kernel_size": 3, "down_dims": [16, 32, 64]},
        {"prediction_type": "sample", "beta_schedule": "linear"},
        {"noise_scheduler_type": "DDIM", "num_inference_steps": 10, "clip_sample": False, "prediction_type": "sample"},
        {"num_inference_steps": 10},
        {"normalization_mapping": {"STATE": "MEAN_STD", "ENV": "MIN_MAX", "ACTION": "MEAN_STD"}},
    ],
    ids=["default", "shift", "sample", "ddim", "few-steps", "mean-std"],
)
@pytest.mark.parametrize("processors", [True, False], ids=["processors", "buffers"])
def test_state_policy_acts_the_same(tmp_path: Path, changes: dict[str, Any], processors: bool) -> None:
    policy = make_policy(configuration(**changes))
    imported = import_lerobot_policy(save_policy(tmp_path / "theirs", policy, processors=processors))
    steps = history(policy.config, policy.statistics)
    expected = policy.act(steps, torch.Generator().manual_seed(3))
    actual = act(imported, steps, torch.Generator().manual_seed(3))
    assert imported.num_action_steps == 4
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cameras", "changes"),
    [
        (1, {"crop_shape": [64, 64], "environment_state": False}),
        (2, {"use_separate_rgb_encoder_per_camera": True, "use_group_norm": True}),
        (2, {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"}}),
    ],
    ids=["crop", "separate-group-norm", "shared"],
)
def test_image_policy_acts_the_same(tmp_path: Path, cameras: int, changes: dict[str, Any]) -> None:
    policy = make_policy(configuration(cameras=cameras, num_train_timesteps=5, **changes))
    imported = import_lerobot_policy(save_policy(tmp_path / "theirs", policy))
    steps = history(policy.config, policy.statistics, batch=2)
    observations = torch.stack([imported.observation(step) for step in steps], dim=1)
    condition = imported.pipeline.observation_condition(observations)["embedding"].unflatten(1, (STEPS, -1))
    theirs = policy.condition(steps).unflatten(1, (STEPS, -1))
    num_features = imported.pipeline.observation_dim - imported.pipeline.state_dim
    features_last = torch.cat([theirs[..., :STATE_DIM], theirs[..., STATE_DIM + num_features :]], dim=-1)
    features_last = torch.cat([features_last, theirs[..., STATE_DIM : STATE_DIM + num_features]], dim=-1)
    torch.testing.assert_close(condition, features_last, rtol=1e-5, atol=1e-5)
    assert (condition[0] - condition[1])[:, -num_features:].abs().max() > 0.02
    expected = policy.act(steps, torch.Generator().manual_seed(3))
    np.testing.assert_allclose(act(imported, steps, torch.Generator().manual_seed(3)), expected, rtol=1e-5, atol=1e-5)


def test_imported_policy_runs_in_an_agent_and_takes_a_lora(tmp_path: Path) -> None:
    policy = make_policy(configuration())
    imported = import_lerobot_policy(save_policy(tmp_path / "theirs", policy))
    agent = Agent(imported.pipeline, num_action_steps=imported.num_action_steps)
    steps = history(policy.config, policy.statistics)
    observation = imported.observation(steps[0]).numpy()
    chunk = policy.act([steps[0], steps[0]], torch.Generator().manual_seed(3))
    for step in range(4):
        action = agent(observation, generator=torch.Generator().manual_seed(3)).action
        np.testing.assert_allclose(action, chunk[:, step], rtol=1e-5, atol=1e-5)
    imported.pipeline.add_lora(LoraConfig(r=2))
    assert imported.pipeline.lora_names == ["default"]
    with pytest.raises(ValueError, match="both together at most 7, the horizon"):
        Agent(imported.pipeline, num_action_steps=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "act"}, "`type` is 'act', not 'diffusion'"),
        ({"n_groups": 4}, "`n_groups` is 4; only 8"),
        ({"horizon": 0}, "`horizon` must be a positive integer, got 0"),
        ({"noise_scheduler_type": "Euler"}, "`noise_scheduler_type` is 'Euler'"),
        ({"input_features": {"observation.environment_state": {"type": "ENV", "shape": [5]}}}, "must have the input"),
        ({"input_features": {"tactile": {"type": "STATE", "shape": [5]}}}, "input 'tactile' is not one"),
        ({"normalization_mapping": {"STATE": "QUANTILES", "ACTION": "MIN_MAX"}}, "normalisation 'QUANTILES'"),
    ],
)
def test_other_policies_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = save_policy(tmp_path / "theirs", make_policy(configuration()), processors=False)
    (folder / "config.json").write_text(json.dumps({**configuration(), **changes}))
    with pytest.raises(InteropError, match=message):
        import_lerobot_policy(folder)


def test_policy_without_statistics_is_refused(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "theirs", make_policy(configuration()))
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(InteropError, match="There are no statistics"):
        import_lerobot_policy(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", None, "a/b"])
def test_statistics_outside_the_folder_are_refused(tmp_path: Path, name: str | None) -> None:
    folder = save_policy(tmp_path / "theirs", make_policy(configuration()))
    processor = json.loads((folder / "policy_preprocessor.json").read_text())
    processor["steps"][1]["state_file"] = name
    (folder / "policy_preprocessor.json").write_text(json.dumps(processor))
    with pytest.raises(InteropError, match="which is not one of the folder"):
        import_lerobot_policy(folder)


# ---- Export ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"noise_scheduler_type": "DDIM", "beta_schedule": "linear"}])
def test_export_then_import_is_the_identity(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = make_policy(configuration(**changes))
    first = import_lerobot_policy(save_policy(tmp_path / "theirs", policy)).pipeline
    export_lerobot_policy(first, tmp_path / "ours", state_dim=STATE_DIM, num_action_steps=4)
    again = import_lerobot_policy(tmp_path / "ours")
    second = again.pipeline
    for name in ("denoiser", "normalizer"):
        left, right = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert dict(getattr(first, name).config) == dict(getattr(second, name).config)
    assert dict(first.config) == dict(second.config)
    assert again.num_action_steps == 4
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    different = {"normalization_mapping", "num_inference_steps"}
    assert {n: written[n] for n in written if n in policy.config and n not in different} == {
        n: policy.config[n] for n in written if n in policy.config and n not in different
    }


def test_exported_scheduler_has_the_same_levels(tmp_path: Path) -> None:
    first = import_lerobot_policy(save_policy(tmp_path / "theirs", make_policy(configuration()))).pipeline
    export_lerobot_policy(first, tmp_path / "ours", state_dim=STATE_DIM)
    second = import_lerobot_policy(tmp_path / "ours").pipeline
    assert first.scheduler.noise_schedule == second.scheduler.noise_schedule


def test_adapter_is_merged_on_export_and_stays(tmp_path: Path) -> None:
    pipeline = import_lerobot_policy(save_policy(tmp_path / "theirs", make_policy(configuration()))).pipeline
    pipeline.add_lora(LoraConfig(r=2))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in pipeline.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=source))
    observation = torch.rand(2, STEPS, STATE_DIM + ENV_DIM, generator=source)
    expected = pipeline(observation, generator=0).actions
    export_lerobot_policy(pipeline, tmp_path / "ours", state_dim=STATE_DIM)
    merged = import_lerobot_policy(tmp_path / "ours").pipeline
    np.testing.assert_allclose(merged(observation, generator=0).actions, expected, atol=1e-4)
    np.testing.assert_array_equal(pipeline(observation, generator=0).actions, expected)
    with pipeline.lora_disabled():
        assert np.abs(pipeline(observation, generator=0).actions - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 5}, r"`state_dim` must lie in 1..4, so that both kinds of state have entries; got 5"),
        ({"state_dim": 3, "num_action_steps": 8}, r"`num_action_steps` must lie in 1..7, got 8"),
    ],
)
def test_impossible_exports_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    pipeline = import_lerobot_policy(save_policy(tmp_path / "theirs", make_policy(configuration()))).pipeline
    with pytest.raises(InteropError, match=message):
        export_lerobot_policy(pipeline, tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


def test_policies_without_counterpart_are_refused(tmp_path: Path) -> None:
    pipeline = import_lerobot_policy(save_policy(tmp_path / "theirs", make_policy(configuration()))).pipeline

    def changed(**changes: Any) -> DiffusionPolicyPipeline:
        parts = {name: pipeline.components[name] for name in ("denoiser", "scheduler", "normalizer")}
        config = {"horizon": HORIZON, "num_observation_steps": STEPS, "num_past_actions": 1}
        return DiffusionPolicyPipeline(**{**parts, **config, **changes})

    cosine = type(pipeline.scheduler)(30)
    for changes, message in (
        ({"denoiser": DiffusionTransformer1D(2, 10, dim=16, num_heads=2)}, "not a DiffusionTransformer1D"),
        ({"num_past_actions": 0}, "start 1 steps before now, this pipeline's 0"),
        ({"scheduler": cosine}, "schedule 'cosine', kernel 'ancestral' and eta 1.0 has no counterpart"),
        ({"horizon": 6}, "wants a horizon divisible by 4, this one is 6"),
    ):
        with pytest.raises(InteropError, match=message):
            export_lerobot_policy(changed(**changes), tmp_path / "ours", state_dim=3)
    assert isinstance(pipeline.denoiser, ConditionalUnet1D)
