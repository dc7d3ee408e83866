"""The temporal U-Net of Diffuser (Janner et al., 2022, arXiv:2205.09991, App. C).

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import Tensor, nn

_T = TypeVar("_T")


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Transformer position embedding of `timestep`, shape `(batch,)` to `(batch, dim)`."""
    frequencies = torch.exp(torch.arange(dim // 2, device=timestep.device) * (-math.log(10000) / max(dim // 2 - 1, 1)))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def positional_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Position embedding of DDPM++ (Song et al., 2021, arXiv:2011.13456) as EDM writes it, cosines first and the
    slowest frequency left out; shape `(batch,)` to `(batch, dim)`."""
    frequencies = 10000.0 ** -(torch.arange(dim // 2, device=timestep.device) / (dim // 2))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


TIMESTEP_EMBEDDINGS = {"sinusoidal": sinusoidal_embedding, "positional": positional_embedding}


class StepCache:
    """Tensors that depend on nothing but the number of a timestep and some layers, kept between runs of sampling.

    They are kept only inside `while_unchanged`, without gradient, and while all layers are plain `nn.Linear`: one that
    an adapter wraps is evaluated each time. Entering compares the layers' values with those of the run before.
    """

    def __init__(self) -> None:
        self.is_open = False
        self._weights: list[Tensor] = []
        self._kept: dict[tuple[Any, ...], Any] = {}

    @contextmanager
    def while_unchanged(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Inside the block the layers' weights stay as they are."""
        if self.is_open or any(type(layer) is not nn.Linear for layer in layers):
            yield
            return
        weights = [parameter.detach() for layer in layers for parameter in layer.parameters()]
        if not _are_equal(weights, self._weights):
            self._weights, self._kept = [weight.clone() for weight in weights], {}
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    def __call__(self, timestep: float | Tensor, like: Tensor, compute: Callable[[], _T]) -> _T:
        """What `compute` returns, or returned before for this timestep, dtype and device."""
        if not self.is_open or torch.is_grad_enabled() or isinstance(timestep, Tensor):
            return compute()
        key = (timestep, like.dtype, like.device)
        if key not in self._kept:
            if len(self._kept) >= 1024:
                self._kept.clear()
            self._kept[key] = compute()
        value: _T = self._kept[key]
        return value


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    same = [(each.shape, each.dtype, each.device) for each in some] == [(b.shape, b.dtype, b.device) for b in others]
    return same and all(torch.equal(each, other) for each, other in zip(some, others))


class ConvBlock(nn.Sequential):
    """Convolution over time, group norm, Mish."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 8) -> None:
        super().__init__(
            nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, out_channels),
            nn.Mish(),
        )


class ResidualTemporalBlock(nn.Module):
    """Two convolution blocks with the time embedding added between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.block_in = ConvBlock(in_channels, out_channels, kernel_size)
        self.block_out = ConvBlock(out_channels, out_channels, kernel_size)
        self.time_projection = nn.Sequential(nn.Mish(), nn.Linear(embedding_dim, out_channels))
        same = in_channels == out_channels
        self.residual = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """`shift` is the time embedding's projection, `(batch, out_channels, 1)` or for all samples `(1, ...)`."""
        result: Tensor = self.block_out(self.block_in(x) + shift) + self.residual(x)
        return result


class Level(nn.Module):
    """Two residual blocks at one resolution, then a change of resolution (or none)."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, kernel_size: int, resample: nn.Module
    ) -> None:
        super().__init__()
        self.first = ResidualTemporalBlock(in_channels, out_channels, embedding_dim, kernel_size)
        self.second = ResidualTemporalBlock(out_channels, out_channels, embedding_dim, kernel_size)
        self.resample = resample

    def forward(self, x: Tensor, shifts: tuple[Tensor, Tensor], draft: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The level's output after and before the change of resolution; `draft` is added between the blocks."""
        x = self.first(x, shifts[0])
        x = self.second(x if draft is None else x + draft, shifts[1])
        return self.resample(x), x


def _zero_conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv1d:
    layer = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


class TemporalUnet(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """U-Net of 1-D convolutions over the steps of a plan.

    With `dim=32, dim_mults=(1, 2, 4, 8), transition_dim=14` it has the 3,956,302 parameters of the original for Hopper.

    Args:
        transition_dim: width of one step of the plan, observation and action together.
        dim: channels of the first level.
        dim_mults: channels of each level in units of `dim`; the horizon must be divisible by
            `2 ** (len(dim_mults) - 1)`.
        kernel_size: of the convolutions over time.
        draft_dim: width of a draft (a cascade's `x^cond`) that each step of the input holds behind its noisy numbers.
            It enters through weights that start at zero.
        timestep_embedding: `"sinusoidal"` as in Diffuser, or `"positional"` as in CleanDiffuser.
        timestep_dim: width of the embedding of the timestep; `dim` by default.
        head_kernel_size: of the head's convolution; `kernel_size` by default.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        transition_dim: int,
        dim: int = 32,
        dim_mults: Sequence[int] = (1, 2, 4, 8),
        kernel_size: int = 5,
        draft_dim: int = 0,
        timestep_embedding: str = "sinusoidal",
        timestep_dim: int | None = None,
        head_kernel_size: int | None = None,
    ) -> None:
        super().__init__()
        if dim % 8:
            raise ValueError(f"`dim` must be divisible by 8, the groups of the normalisation; got {dim}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}: an even one changes the horizon.")
        if timestep_embedding not in TIMESTEP_EMBEDDINGS:
            raise ValueError(
                f"`timestep_embedding` must be one of {', '.join(TIMESTEP_EMBEDDINGS)}; got {timestep_embedding!r}."
            )
        self.timestep_dim = dim if timestep_dim is None else timestep_dim
        widths = [transition_dim, *(dim * mult for mult in dim_mults)]
        pairs = list(itertools.pairwise(widths))
        self.time_embedding = nn.Sequential(nn.Linear(self.timestep_dim, dim * 4), nn.Mish(), nn.Linear(dim * 4, dim))

        self.down = nn.ModuleList()
        for level, (in_channels, out_channels) in enumerate(pairs):
            last = level == len(pairs) - 1
            halve = nn.Identity() if last else nn.Conv1d(out_channels, out_channels, 3, 2, 1)
            self.down.append(Level(in_channels, out_channels, dim, kernel_size, halve))
        self.middle = Level(widths[-1], widths[-1], dim, kernel_size, nn.Identity())
        self.up = nn.ModuleList()
        for in_channels, out_channels in reversed(pairs[1:]):
            double = nn.ConvTranspose1d(in_channels, in_channels, 4, 2, 1)
            self.up.append(Level(out_channels * 2, in_channels, dim, kernel_size, double))
        self.head = nn.Sequential(
            ConvBlock(dim, dim, head_kernel_size or kernel_size), nn.Conv1d(dim, transition_dim, 1)
        )
        self.draft_projection = _zero_conv(draft_dim, widths[1], kernel_size) if draft_dim else None
        self._of_step = StepCache()

    def while_unchanged(self) -> AbstractContextManager[None]:
        """Inside the block, where no weight changes, what depends on the timestep alone is computed once."""
        projections = [block.time_projection[1] for level in self._levels() for block in (level.first, level.second)]
        return self._of_step.while_unchanged([self.time_embedding[0], self.time_embedding[2], *projections])

    def _levels(self) -> list[Any]:
        return [*self.down, self.middle, *self.up]

    def time_shifts(self, timestep: Tensor | float, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each level's two blocks add for the timestep, `(1, channels, 1)`, or `(batch, channels, 1)` where there
        is one timestep per sample."""
        return self._of_step(timestep, like, lambda: self._time_shifts(timestep, like))

    def _time_shifts(self, timestep: Tensor | float, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        embed = TIMESTEP_EMBEDDINGS[self.config.timestep_embedding]
        timesteps = torch.as_tensor(timestep, device=like.device).reshape(-1)
        embedding = self.time_embedding(embed(timesteps, self.timestep_dim).to(like.dtype))
        return [
            (level.first.time_projection(embedding)[:, :, None], level.second.time_projection(embedding)[:, :, None])
            for level in self._levels()
        ]

    def forward(
        self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None, return_dict: bool = True
    ) -> UNet1DOutput | tuple[Tensor]:
        """Denoise plans.

        Args:
            sample: noisy plans of shape `(batch, horizon, transition_dim + draft_dim)`, drafts behind them.
            timestep: a number or shape `(batch,)`.
            condition: must be None: a planner is conditioned by in-painting.

        Returns:
            An output whose `sample` has shape `(batch, horizon, transition_dim)`.
        """
        factor = 2 ** (len(self.down) - 1)
        width = self.config.transition_dim + self.config.draft_dim
        if sample.ndim != 3 or sample.shape[-1] != width or sample.shape[1] % factor:
            raise ValueError(
                f"`sample` must have shape (batch, horizon, {width}) with a horizon divisible by "
                f"{factor} (this U-Net halves it {len(self.down) - 1} times), got {tuple(sample.shape)}."
            )
        if condition is not None:
            raise ValueError("`condition` must be None: TemporalUnet is conditioned by in-painting.")
        x = self.denoise(sample, self.time_shifts(timestep, sample))
        return UNet1DOutput(sample=x) if return_dict else (x,)

    def denoise(self, sample: Tensor, shifts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The network after `time_shifts`: `(batch, horizon, transition_dim)`."""
        x, draft = sample.transpose(1, 2).split((self.config.transition_dim, self.config.draft_dim), dim=1)
        extra = None if self.draft_projection is None else self.draft_projection(draft)
        skips, remaining = [], iter(shifts)
        for level in self.down:
            x, before = level(x, next(remaining), extra)
            skips.append(before)
            extra = None
        x, _ = self.middle(x, next(remaining))
        for level in self.up:
            x, _ = level(torch.cat([x, skips.pop()], dim=1), next(remaining))
        result: Tensor = self.head(x).transpose(1, 2)
        return result
