"""Checkpoints of real-stanford/diffusion_policy act here as they act there."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from dmc_hub.interop import InteropError, import_diffusion_policy
from dmc_hub.interop.diffusion_policy import PUSHT_SCHEDULER

OBSERVATION_DIM, ACTION_DIM, HORIZON, STEPS = 5, 2, 8, 2
SCHEDULER = {**PUSHT_SCHEDULER, "num_train_timesteps": 30}


class Embedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.rates = torch.exp(-np.log(10000) / (dim // 2 - 1) * torch.arange(dim // 2))

    def forward(self, t: Tensor) -> Tensor:
        angles = torch.outer(t.float(), self.rates)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(inputs, outputs, 5, padding=2), nn.GroupNorm(8, outputs), nn.Mish())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, cond: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Conv(inputs, outputs), Conv(outputs, outputs)])
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond, outputs * 2), nn.Unflatten(-1, (-1, 1)))
        self.residual_conv = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, bias = self.cond_encoder(cond).chunk(2, dim=1)
        return self.blocks[1](scale * self.blocks[0](x) + bias) + self.residual_conv(x)


class Resample(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Unet(nn.Module):
    """Two levels of `ConditionalUnet1D` with a global condition."""

    def __init__(self, width: int, cond: int, dims: tuple[int, int] = (16, 32), step_dim: int = 12) -> None:
        super().__init__()
        a, b, cond = *dims, cond + step_dim
        self.diffusion_step_encoder = nn.Sequential(
            Embedding(step_dim), nn.Linear(step_dim, step_dim * 4), nn.Mish(), nn.Linear(step_dim * 4, step_dim)
        )
        self.mid_modules = nn.ModuleList([Residual(b, b, cond), Residual(b, b, cond)])
        self.down_modules = nn.ModuleList(
            [
                nn.ModuleList([Residual(width, a, cond), Residual(a, a, cond), Resample(nn.Conv1d(a, a, 3, 2, 1))]),
                nn.ModuleList([Residual(a, b, cond), Residual(b, b, cond), nn.Identity()]),
            ]
        )
        double = Resample(nn.ConvTranspose1d(a, a, 4, 2, 1))
        self.up_modules = nn.ModuleList([nn.ModuleList([Residual(2 * b, a, cond), Residual(a, a, cond), double])])
        self.final_conv = nn.Sequential(Conv(a, a), nn.Conv1d(a, width, 1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        cond = torch.cat([self.diffusion_step_encoder(t), cond], dim=1)
        (first, second, half), (third, fourth, _) = cast(Any, self.down_modules)
        fifth, sixth, double = cast(Any, self.up_modules)[0]
        x = second(first(x.mT, cond), cond)
        bottom = skip = fourth(third(half(x), cond), cond)
        for middle in self.mid_modules:
            bottom = middle(bottom, cond)
        x = double(sixth(fifth(torch.cat([bottom, skip], 1), cond), cond))
        return self.final_conv(x).mT


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Unet(ACTION_DIM, OBSERVATION_DIM * STEPS)
        source = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
        self.normalizer = nn.Module()
        self.normalizer.params_dict = nn.ModuleDict(
            {
                name: nn.ParameterDict(
                    {
                        "scale": 0.5 + torch.rand(width, generator=source),
                        "offset": torch.randn(width, generator=source),
                        "input_stats": nn.ParameterDict({"min": torch.zeros(width), "max": torch.ones(width)}),
                    }
                )
                for name, width in (("obs", OBSERVATION_DIM), ("action", ACTION_DIM))
            }
        )
        self.requires_grad_(False)

    def act(self, observations: Tensor, generator: torch.Generator, start: int) -> Tensor:
        scheduler, statistics = DDPMScheduler(**SCHEDULER), cast(Any, self.normalizer.params_dict)
        condition = (observations * statistics["obs"]["scale"] + statistics["obs"]["offset"]).flatten(1)
        x = torch.randn((len(condition), HORIZON, ACTION_DIM), generator=generator)
        scheduler.set_timesteps(SCHEDULER["num_train_timesteps"])
        for t in scheduler.timesteps:
            output = self.model(x, t.repeat(len(x)), condition)
            x = scheduler.step(output, int(t), x, generator=generator).prev_sample
        return ((x - statistics["action"]["offset"]) / statistics["action"]["scale"])[:, start:]


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy().eval()


def save(path: Path, policy: Policy, **extra: Any) -> Path:
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dicts": {"ema_model": state, "model": {}}, **extra}, path)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "latest.ckpt"])
@pytest.mark.parametrize("observe_then_act", [True, False])
def test_policy_acts_the_same(tmp_path: Path, policy: Policy, name: str, observe_then_act: bool) -> None:
    ours = import_diffusion_policy(
        save(tmp_path / name, policy), horizon=HORIZON, scheduler=SCHEDULER, observe_then_act=observe_then_act
    )
    observations = torch.randn(3, STEPS, OBSERVATION_DIM, generator=torch.Generator().manual_seed(1))
    expected = policy.act(observations, torch.Generator().manual_seed(2), STEPS - 1 if observe_then_act else STEPS)
    actual = ours(observations, generator=torch.Generator().manual_seed(2)).actions
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


class Configuration:
    """Stands for the configuration objects that are pickled in the originals."""


def test_pickled_objects_are_refused_with_a_remedy(tmp_path: Path, policy: Policy) -> None:
    path = save(tmp_path / "latest.ckpt", policy, cfg=Configuration())
    with pytest.raises(InteropError, match=r"is not unpickled: .* save that with safetensors"):
        import_diffusion_policy(path)


def test_missing_parts_are_named(tmp_path: Path, policy: Policy) -> None:
    path = save(tmp_path / "weights.safetensors", policy)
    state = {name: tensor for name, tensor in policy.state_dict().items() if "params_dict.obs" not in name}
    save_file(state, path)
    with pytest.raises(InteropError, match=r"lacks the statistics `normalizer.params_dict.obs.scale`"):
        import_diffusion_policy(path)
    save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(InteropError, match="The weights hold no U-Net"):
        import_diffusion_policy(path)
    with pytest.raises(InteropError, match="is missing"):
        import_diffusion_policy(tmp_path / "nothing.ckpt")
    torch.save({"state_dicts": {"model": {}}}, tmp_path / "latest.ckpt")
    with pytest.raises(InteropError, match="has no state dictionary 'ema_model'"):
        import_diffusion_policy(tmp_path / "latest.ckpt")
