"""The conditional U-Net of Diffusion Policy (Chi et al., 2023, arXiv:2303.04137, Sec. III-A).

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import Tensor, nn


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Transformer position embedding of `timestep`, shape `(batch,)` to `(batch, dim)`."""
    frequencies = torch.exp(torch.arange(dim // 2, device=timestep.device) * (-math.log(10000) / max(dim // 2 - 1, 1)))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConvBlock(nn.Sequential):
    """Convolution over time, group norm, Mish."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 8) -> None:
        super().__init__(
            nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, out_channels),
            nn.Mish(),
        )


class FiLMResidualBlock(nn.Module):
    """Two convolution blocks; the embedding scales and shifts the channels between them (FiLM, arXiv:1709.07871)."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, kernel_size: int, predict_scale: bool
    ) -> None:
        super().__init__()
        self.predict_scale = predict_scale
        self.block_in = ConvBlock(in_channels, out_channels, kernel_size)
        self.block_out = ConvBlock(out_channels, out_channels, kernel_size)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(embedding_dim, out_channels * (2 if predict_scale else 1)))
        same = in_channels == out_channels
        self.residual = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden, film = self.block_in(x), self.film(embedding)[:, :, None]
        if self.predict_scale:
            scale, bias = film.chunk(2, dim=1)
            hidden = scale * hidden + bias
        else:
            hidden = hidden + film
        result: Tensor = self.block_out(hidden) + self.residual(x)
        return result


class Level(nn.Module):
    """Two residual blocks at one resolution, then a change of resolution (or none)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        kernel_size: int,
        predict_scale: bool,
        resample: nn.Module,
    ) -> None:
        super().__init__()
        self.first = FiLMResidualBlock(in_channels, out_channels, embedding_dim, kernel_size, predict_scale)
        self.second = FiLMResidualBlock(out_channels, out_channels, embedding_dim, kernel_size, predict_scale)
        self.resample = resample

    def forward(self, x: Tensor, embedding: Tensor, draft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The level's output after and before the change of resolution; `draft` is added between the blocks."""
        x = self.first(x, embedding)
        x = self.second(x if draft is None else x + draft, embedding)
        return self.resample(x), x


def _zero_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv1d:
    layer = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class ConditionalUnet1D(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """U-Net over the steps of an action sequence; the diffusion step and the observation history modulate every block.

    The defaults are those of Diffusion Policy for Push-T from low-dimensional observations
    (`train_diffusion_unet_lowdim_workspace.yaml` of real-stanford/diffusion_policy). Parameters with `action_dim=2`:

    - 65,353,218 with `condition_dim=10`: the original on 2 observations of Push-T's state;
    - 65,783,298 with `condition_dim=40`: the original on 2 observations of 20 keypoint coordinates;
    - 63,497,090 with `condition_dim=36, timestep_dim=128`: LeRobot's, set to these `dims`, on 2 observations of 18;
    - 68,879,874 with `condition_dim=256`: CleanDiffuser's `ChiUNet1d` behind its linear encoder of observations, with
      which it counts 68,882,690.

    Args:
        action_dim: width of one step of the sequence.
        condition_dim: width of the condition, the observation history of `num_steps * observation_dim` numbers; 0 for
            none.
        dims: channels of each level, divisible by 8; the horizon must be divisible by `2 ** (len(dims) - 1)`.
        kernel_size: of the convolutions over time.
        timestep_dim: width of the embedding of the diffusion step.
        cond_predict_scale: the condition scales and shifts the channels; otherwise it only shifts them.
        draft_dim: width of a draft (a cascade's `x^cond`) that each step of the input holds behind its noisy numbers.
            It enters through weights that start at zero.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        action_dim: int,
        condition_dim: int = 0,
        dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        timestep_dim: int = 256,
        cond_predict_scale: bool = True,
        draft_dim: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(dims, kernel_size, timestep_dim)
        widths = [action_dim, *dims]
        pairs = list(itertools.pairwise(widths))
        self.time_embedding = nn.Sequential(
            nn.Linear(timestep_dim, timestep_dim * 4), nn.Mish(), nn.Linear(timestep_dim * 4, timestep_dim)
        )

        def level(in_channels: int, out_channels: int, resample: nn.Module) -> Level:
            embedding_dim = timestep_dim + condition_dim
            return Level(in_channels, out_channels, embedding_dim, kernel_size, cond_predict_scale, resample)

        self.down = nn.ModuleList()
        for index, (in_channels, out_channels) in enumerate(pairs):
            last = index == len(pairs) - 1
            halve = nn.Identity() if last else nn.Conv1d(out_channels, out_channels, 3, 2, 1)
            self.down.append(level(in_channels, out_channels, halve))
        self.middle = level(widths[-1], widths[-1], nn.Identity())
        self.up = nn.ModuleList()
        for in_channels, out_channels in reversed(pairs[1:]):
            double = nn.ConvTranspose1d(in_channels, in_channels, 4, 2, 1)
            self.up.append(level(out_channels * 2, in_channels, double))
        self.head = nn.Sequential(ConvBlock(dims[0], dims[0], kernel_size), nn.Conv1d(dims[0], action_dim, 1))
        self.draft_projection = _zero_conv(draft_dim, dims[0], kernel_size) if draft_dim else None
        self.gradient_checkpointing = False

    def forward(
        self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None, return_dict: bool = True
    ) -> UNet1DOutput | tuple[Tensor]:
        """Denoise action sequences.

        Args:
            sample: noisy sequences of shape `(batch, horizon, action_dim + draft_dim)`, drafts behind them.
            timestep: a number or shape `(batch,)`.
            condition: normalised observation history of shape `(batch, condition_dim)`, or None where `condition_dim`
                is 0.

        Returns:
            An output whose `sample` has shape `(batch, horizon, action_dim)`.

        Raises:
            ValueError: inputs of the wrong shape, or a horizon that cannot be halved often enough.
        """
        self._check(sample, condition)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        embedding = self.time_embedding(sinusoidal_embedding(timestep, self.config.timestep_dim).to(sample.dtype))
        if condition is not None:
            embedding = torch.cat([embedding, condition], dim=-1)
        x, draft = sample.transpose(1, 2).split((self.config.action_dim, self.config.draft_dim), dim=1)
        extra = None if self.draft_projection is None else self.draft_projection(draft)
        skips = []
        for level in self.down:
            x, before = self._run(level, x, embedding, extra)
            skips.append(before)
            extra = None
        x, _ = self._run(self.middle, x, embedding)
        for level in self.up:
            x, _ = self._run(level, torch.cat([x, skips.pop()], dim=1), embedding)
        x = self.head(x).transpose(1, 2)
        return UNet1DOutput(sample=x) if return_dict else (x,)

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)

    def _check(self, sample: Tensor, condition: Tensor | None) -> None:
        factor = 2 ** (len(self.down) - 1)
        width = self.config.action_dim + self.config.draft_dim
        if sample.ndim != 3 or sample.shape[-1] != width or sample.shape[1] % factor:
            raise ValueError(
                f"`sample` must have shape (batch, horizon, {width}) with a horizon divisible by "
                f"{factor} (this U-Net halves it {len(self.down) - 1} times), got {tuple(sample.shape)}."
            )
        expected = (sample.shape[0], self.config.condition_dim) if self.config.condition_dim else None
        given = None if condition is None else tuple(condition.shape)
        if given != expected:
            raise ValueError(f"`condition` must have shape {expected}, got {given}.")


def _check_sizes(dims: Sequence[int], kernel_size: int, timestep_dim: int) -> None:
    if not dims or any(dim < 1 or dim % 8 for dim in dims):
        raise ValueError(f"`dims` must be divisible by 8, the groups of the normalisation; got {tuple(dims)}.")
    if kernel_size % 2 == 0:
        raise ValueError(f"`kernel_size` must be odd, got {kernel_size}: an even one changes the horizon.")
    if timestep_dim % 2:
        raise ValueError(f"`timestep_dim` must be even, got {timestep_dim}: half of it are sines, half cosines.")
