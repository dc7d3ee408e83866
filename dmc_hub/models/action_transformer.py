"""The transformer of Diffusion Policy (Chi et al., 2023, arXiv:2303.04137, Sec. III-A).

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_1d import UNet1DOutput
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Transformer position embedding of `timestep`, shape `(batch,)` to `(batch, dim)`."""
    frequencies = torch.exp(torch.arange(dim // 2, device=timestep.device) * (-math.log(10000) / max(dim // 2 - 1, 1)))
    angles = timestep.float()[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class CausalSelfAttention(nn.Module):
    """Every token attends to itself and to earlier ones.

    Its layers are plain `nn.Linear`: LoRA does not reach the input projection of `nn.MultiheadAttention`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (_split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        result: Tensor = self.projection(
            _merge_heads(F.scaled_dot_product_attention(query, key, value, is_causal=True))
        )
        return result


class CrossAttention(nn.Module):
    """Every token attends to the tokens of the condition, or to those that `mask` `(tokens, memory tokens)` allows."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, dim * 2)
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        query = _split_heads(self.query(x), self.num_heads)
        key, value = (_split_heads(part, self.num_heads) for part in self.key_value(memory).chunk(2, dim=-1))
        result: Tensor = self.projection(
            _merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
        )
        return result


class DecoderBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each on the normalised residual stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.self_attention = CausalSelfAttention(dim, num_heads)
        self.norm_cross = nn.LayerNorm(dim)
        self.cross_attention = CrossAttention(dim, num_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU(), nn.Linear(dim * 4, dim))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attention(self.norm_self(x))
        x = x + self.cross_attention(self.norm_cross(x), memory, mask)
        result: Tensor = x + self.mlp(self.norm_mlp(x))
        return result


class ActionTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Causal decoder over the steps of an action sequence, attending to the diffusion step and to each observation.

    The defaults are those of Diffusion Policy for Push-T from low-dimensional observations
    (`train_diffusion_transformer_lowdim_pusht_workspace.yaml` of real-stanford/diffusion_policy), but for its dropout
    of 0.01: with dropout the log-probabilities of training would differ from those of sampling. Parameters with
    `action_dim=2`:

    - 8,965,122 with `observation_dim=20`: the original on keypoints;
    - 4,745,986 with `observation_dim=5, horizon=10, depth=4`: CleanDiffuser's `ChiTransformer` on Push-T's state, which
      counts 5,271,554 because it holds an MLP that nothing calls.

    Args:
        action_dim: width of one step of the sequence.
        observation_dim: width of one observation.
        num_observation_steps: observations of the condition.
        horizon: longest sequence, the number of learned position embeddings.
        dim: width of the transformer, even and divisible by `num_heads`.
        num_heads: of the attention.
        depth: number of decoder blocks.
        causal_condition: step `t` of the sequence attends to the observations 0 to `t` only. For sequences that begin
            at the first observation, as in the original; where they begin at the last one it hides the present.
        draft_dim: width of a draft (a cascade's `x^cond`) that each step of the input holds behind its noisy numbers.
            It enters through weights that start at zero.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        action_dim: int,
        observation_dim: int,
        num_observation_steps: int = 2,
        horizon: int = 16,
        dim: int = 256,
        num_heads: int = 4,
        depth: int = 8,
        causal_condition: bool = False,
        draft_dim: int = 0,
    ) -> None:
        super().__init__()
        if dim % num_heads or dim % 2:
            raise ValueError(f"`dim` must be even and divisible by `num_heads`, got {dim} and {num_heads}.")
        if min(num_observation_steps, horizon) < 1:
            raise ValueError(
                f"`num_observation_steps` and `horizon` must be positive, got {num_observation_steps} and {horizon}."
            )
        self.action_projection = nn.Linear(action_dim, dim)
        self.action_positions = nn.Parameter(torch.empty(horizon, dim))
        self.observation_projection = nn.Linear(observation_dim, dim)
        self.memory_positions = nn.Parameter(torch.empty(1 + num_observation_steps, dim))
        self.encoder = nn.Sequential(nn.Linear(dim, dim * 4), nn.Mish(), nn.Linear(dim * 4, dim))
        self.blocks = nn.ModuleList(DecoderBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, action_dim)
        self.draft_projection = nn.Linear(draft_dim, dim) if draft_dim else None
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """The original's: weights and positions of std 0.02, no biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.draft_projection is not None:
            nn.init.zeros_(self.draft_projection.weight)
        nn.init.normal_(self.action_positions, std=0.02)
        nn.init.normal_(self.memory_positions, std=0.02)

    def forward(
        self, sample: Tensor, timestep: Tensor | float, condition: Tensor | None = None, return_dict: bool = True
    ) -> UNet1DOutput | tuple[Tensor]:
        """Denoise action sequences.

        Args:
            sample: noisy sequences of shape `(batch, steps, action_dim + draft_dim)`, drafts behind them, with at most
                `horizon` steps.
            timestep: a number or shape `(batch,)`.
            condition: normalised observations, the oldest first, of shape
                `(batch, num_observation_steps * observation_dim)`.

        Returns:
            An output whose `sample` has shape `(batch, steps, action_dim)`.

        Raises:
            ValueError: inputs of the wrong shape, or no condition.
        """
        observations = self._observation_tokens(sample, condition)
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = sinusoidal_embedding(timestep, self.config.dim).to(sample.dtype)[:, None]
        memory = self.encoder(torch.cat([time, observations], dim=1) + self.memory_positions)
        sample, draft = sample.split((self.config.action_dim, self.config.draft_dim), dim=-1)
        x = self.action_projection(sample.contiguous()) + self.action_positions[: sample.shape[1]]
        if self.draft_projection is not None:
            x = x + self.draft_projection(draft)
        mask = self._memory_mask(sample) if self.config.causal_condition else None
        for block in self.blocks:
            x = self._run(block, x, memory, mask)
        x = self.head(self.norm(x))
        return UNet1DOutput(sample=x) if return_dict else (x,)

    def _observation_tokens(self, sample: Tensor, condition: Tensor | None) -> Tensor:
        steps, horizon = self.config.num_observation_steps, self.config.horizon
        width = self.config.action_dim + self.config.draft_dim
        if sample.ndim != 3 or sample.shape[-1] != width or sample.shape[1] > horizon:
            raise ValueError(
                f"`sample` must have shape (batch, steps, {width}) with at most {horizon} steps, the `horizon` of this "
                f"transformer; got {tuple(sample.shape)}."
            )
        expected = (sample.shape[0], steps * self.config.observation_dim)
        if condition is None or tuple(condition.shape) != expected:
            given = None if condition is None else tuple(condition.shape)
            raise ValueError(
                f"`condition` must have shape {expected}, {steps} observations of {self.config.observation_dim}; "
                f"got {given}."
            )
        result: Tensor = self.observation_projection(condition.unflatten(1, (steps, -1)))
        return result

    def _memory_mask(self, sample: Tensor) -> Tensor:
        """What each step may see: the first token, the diffusion step's, and observations up to its own time."""
        action_steps = torch.arange(sample.shape[1], device=sample.device)
        observation_steps = torch.arange(-1, self.config.num_observation_steps, device=sample.device)
        return observation_steps[None, :] <= action_steps[:, None]

    def _run(self, module: nn.Module, *inputs: Tensor | None) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *inputs)
        return module(*inputs)


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    result: Tensor = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return result


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)
