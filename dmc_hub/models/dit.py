"""A diffusion transformer over the steps of an action sequence or plan (Peebles & Xie, 2023, arXiv:2212.09748).

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import Tensor, nn
from torch.nn import functional as F

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


EMBEDDINGS = {"positional": positional_embedding}


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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift` with one shift and scale per sample: `(batch, tokens, dim)` and `(batch, dim)`."""
    return x * (1 + scale[:, None]) + shift[:, None]


def _zero_linear(in_features: int, out_features: int) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class AdaLNZeroBlock(nn.Module):
    """Self-attention and MLP, each modulated and gated by the embedding; the identity at initialisation.

    With `normalized_residual` the attention adds to its own normalised input, so that what came before is lost.
    """

    def __init__(self, dim: int, num_heads: int, normalized_residual: bool = False) -> None:
        super().__init__()
        self.normalized_residual = normalized_residual
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, dim * 3)
        self.projection = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU(approximate="tanh"), nn.Linear(dim * 4, dim))
        self.modulation = nn.Sequential(nn.SiLU(), _zero_linear(dim, dim * 6))

    def attention(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        result: Tensor = self.projection(mixed.transpose(1, 2).flatten(-2))
        return result

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """`modulation` is that of the embedding, `(batch, 6 dim)` or for all samples `(1, 6 dim)`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        hidden = modulate(self.norm_attention(x), shift_a, scale_a)
        x = (hidden if self.normalized_residual else x) + gate_a[:, None] * self.attention(hidden)
        result: Tensor = x + gate_m[:, None] * self.mlp(modulate(self.norm_mlp(x), shift_m, scale_m))
        return result


class DiffusionTransformer1D(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """AdaLN-Zero transformer whose tokens are the steps of a sequence; the condition joins the time embedding.

    The defaults are those of CleanDiffuser's Diffusion Policy for Push-T and of its Decision Diffuser (width 320,
    10 heads, depth 2), whose block overwrites its residual stream with the normalised input; this one does not.
    Parameters:

    - 4,052,811 for Decision Diffuser on Hopper (`token_dim=11`, observations only). CleanDiffuser counts 4,073,547: an
      MLP of 20,736 on random Fourier features of the timestep stands where this network has sines and cosines;
    - 4,153,282 for Diffusion Policy on Push-T (`token_dim=2, condition_dim=10`). CleanDiffuser counts 4,067,778 and has
      35,712 more in an encoder of the observations.

    Args:
        token_dim: width of one step (an action, or an observation and an action).
        condition_dim: width of the condition vector; 0 for none.
        dim: width of the transformer, divisible by `num_heads`.
        num_heads: of the attention.
        depth: number of blocks.
        timestep_dim: width of the sinusoidal time embedding.
        draft_dim: width of a draft (a cascade's `x^cond`) that each step of the input holds behind its noisy numbers.
            It enters through weights that start at zero.
        timestep_embedding: `"sinusoidal"`, or `"positional"` as in CleanDiffuser.
        position_embedding: of the steps: `"scaled"` to a norm below 1, or plain `"sinusoidal"` or `"positional"` as in
            versions of CleanDiffuser.
        normalized_residual: each block adds its attention to its normalised input, as CleanDiffuser's does.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        token_dim: int,
        condition_dim: int = 0,
        dim: int = 320,
        num_heads: int = 10,
        depth: int = 2,
        timestep_dim: int = 128,
        draft_dim: int = 0,
        timestep_embedding: str = "sinusoidal",
        position_embedding: str = "scaled",
        normalized_residual: bool = False,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 2:
            raise ValueError(f"`dim` must be even and divisible by `num_heads`, got {dim} and {num_heads}.")
        if timestep_dim % 2:
            raise ValueError(f"`timestep_dim` must be even, got {timestep_dim}: half of it are sines, half cosines.")
        if timestep_embedding not in ("sinusoidal", "positional"):
            raise ValueError(f"`timestep_embedding` must be 'sinusoidal' or 'positional', got {timestep_embedding!r}.")
        if position_embedding not in ("scaled", "sinusoidal", "positional"):
            raise ValueError(
                f"`position_embedding` must be 'scaled', 'sinusoidal' or 'positional', got {position_embedding!r}."
            )
        self.token_projection = nn.Linear(token_dim, dim)
        self.time_embedding = nn.Sequential(nn.Linear(timestep_dim, dim), nn.Mish(), nn.Linear(dim, dim), nn.Mish())
        self.condition_embedding = (
            nn.Sequential(nn.Linear(condition_dim, dim), nn.Mish(), nn.Linear(dim, dim)) if condition_dim else None
        )
        self.blocks = nn.ModuleList(AdaLNZeroBlock(dim, num_heads, normalized_residual) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), _zero_linear(dim, dim * 2))
        self.head = _zero_linear(dim, token_dim)
        self.draft_projection = _zero_linear(draft_dim, dim) if draft_dim else None
        self._of_step = StepCache()
        self._encoded: tuple[Tensor, Tensor] | None = None  # a condition and its embedding, inside `while_unchanged`
        self._positions: dict[tuple[Any, ...], Tensor] = {}

    @contextmanager
    def while_unchanged(self) -> Iterator[None]:
        """Inside the block, where neither weights nor a condition change, what depends on the timestep alone is
        computed once, and a condition is encoded once."""
        layers = [self.time_embedding[0], self.time_embedding[2]]
        if self.condition_embedding is None:
            layers += [part.modulation[1] for part in (*self.blocks, self)]
        try:
            with self._of_step.while_unchanged(layers):
                yield
        finally:
            self._encoded = None

    def modulations(self, timestep: Tensor | float, condition: Tensor | None, like: Tensor) -> list[Tensor]:
        """Of each block and of the head, for the timestep and the condition: `(1, 6 dim)` each and `(1, 2 dim)`, or
        `(batch, ...)` where there is a condition or one timestep per sample."""
        if self.condition_embedding is None:
            return self._of_step(timestep, like, lambda: self._modulations(self._time_embedding(timestep, like)))
        embedding = self._of_step(timestep, like, lambda: self._time_embedding(timestep, like))
        return self._modulations(embedding + self._condition_embedding(condition))

    def _time_embedding(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        embed = EMBEDDINGS.get(self.config.timestep_embedding, sinusoidal_embedding)
        timesteps = torch.as_tensor(timestep, device=like.device).reshape(-1)
        result: Tensor = self.time_embedding(embed(timesteps, self.config.timestep_dim).to(like.dtype))
        return result

    def _condition_embedding(self, condition: Tensor | None) -> Tensor:
        assert self.condition_embedding is not None
        assert condition is not None
        if not self._of_step.is_open or torch.is_grad_enabled():
            result: Tensor = self.condition_embedding(condition)
            return result
        if self._encoded is None or self._encoded[0] is not condition:
            self._encoded = condition, self.condition_embedding(condition)
        return self._encoded[1]

    def _modulations(self, embedding: Tensor) -> list[Tensor]:
        return [part.modulation(embedding) for part in (*self.blocks, self)]

    def position_embedding(self, num_steps: int, like: Tensor) -> Tensor:
        """Of the steps, `(num_steps, dim)`, computed once for each length."""
        key = (num_steps, like.dtype, like.device)
        if key not in self._positions:
            locate = EMBEDDINGS.get(self.config.position_embedding, sinusoidal_embedding)
            with torch.inference_mode(False), torch.no_grad():
                positions = locate(torch.arange(num_steps, device=like.device), self.config.dim).to(like.dtype)
                is_scaled = self.config.position_embedding == "scaled"
                self._positions[key] = positions / math.sqrt(self.config.dim) if is_scaled else positions
        return self._positions[key]

    def forward(
        self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None, return_dict: bool = True
    ) -> UNet1DOutput | tuple[Tensor]:
        """Denoise sequences.

        Args:
            sample: noisy sequences of shape `(batch, horizon, token_dim + draft_dim)`, drafts behind them.
            timestep: a number or shape `(batch,)`.
            condition: shape `(batch, condition_dim)`, or None where `condition_dim` is 0.

        Returns:
            An output whose `sample` has shape `(batch, horizon, token_dim)`.
        """
        self._check(sample, condition)
        x = self.denoise(sample, self.modulations(timestep, condition, sample))
        return UNet1DOutput(sample=x) if return_dict else (x,)

    def denoise(self, sample: Tensor, modulations: list[Tensor]) -> Tensor:
        """The network after `modulations`: `(batch, horizon, token_dim)`."""
        positions = self.position_embedding(sample.shape[1], sample)
        sample, draft = sample.split((self.config.token_dim, self.config.draft_dim), dim=-1)
        x = self.token_projection(sample.contiguous()) + positions
        if self.draft_projection is not None:
            x = x + self.draft_projection(draft)
        for block, modulation in zip(self.blocks, modulations):
            x = block(x, modulation)
        shift, scale = modulations[-1].chunk(2, dim=-1)
        result: Tensor = self.head(modulate(self.norm(x), shift, scale))
        return result

    def _check(self, sample: Tensor, condition: Tensor | None) -> None:
        width = self.config.token_dim + self.config.draft_dim
        if sample.ndim != 3 or sample.shape[-1] != width:
            raise ValueError(f"`sample` must have shape (batch, horizon, {width}), got {tuple(sample.shape)}.")
        expected = (sample.shape[0], self.config.condition_dim) if self.config.condition_dim else None
        given = None if condition is None else tuple(condition.shape)
        if given != expected:
            raise ValueError(f"`condition` must have shape {expected}, got {given}.")
