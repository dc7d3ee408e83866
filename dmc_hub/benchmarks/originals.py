"""What this library is compared with: the networks and the guided sampling of Diffuser (Janner et al., 2022,
arXiv:2205.09991) and the DiT of CleanDiffuser (Dong et al., 2024, arXiv:2406.09509), written down again from their
architecture. Names of layers are those of `dmc_hub.models` where the layers are the same.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines, of geometrically spaced frequencies."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=timestep.device) * -(math.log(10000) / (half - 1)))
        angles = timestep[:, None] * frequencies[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ConvBlock(nn.Module):
    """Convolution, group norm over an inserted dimension, Mish."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(8, out_channels)
        self.activation = nn.Mish()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.activation(self.norm(self.conv(x)[:, :, None])[:, :, 0]))


class ResidualBlock(nn.Module):
    """Two convolution blocks, the time embedding's projection between them."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, kernel_size: int) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, kernel_size)
        self.second = ConvBlock(out_channels, out_channels, kernel_size)
        self.time_projection = nn.Sequential(nn.Mish(), nn.Linear(time_dim, out_channels))
        same = in_channels == out_channels
        self.residual = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return cast(Tensor, self.second(self.first(x) + self.time_projection(time)[:, :, None]) + self.residual(x))


def _time_embedding(dim: int) -> nn.Sequential:
    return nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, dim * 4), nn.Mish(), nn.Linear(dim * 4, dim))


class DiffuserUnet(nn.Module):
    """Diffuser's temporal U-Net; 3,956,302 parameters for Hopper (14 numbers per step, `dim=32`, kernel 5)."""

    def __init__(self, transition_dim: int, dim: int = 32, mults: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        super().__init__()
        widths = [transition_dim, *(dim * mult for mult in mults)]
        pairs = list(itertools.pairwise(widths))
        self.time = _time_embedding(dim)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for a, b in pairs:
            half = nn.Identity() if b == widths[-1] else nn.Conv1d(b, b, 3, 2, 1)
            self.downs.append(nn.ModuleList([ResidualBlock(a, b, dim, 5), ResidualBlock(b, b, dim, 5), half]))
        self.middle = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], dim, 5) for _ in range(2))
        for a, b in reversed(pairs[1:]):
            double = nn.ConvTranspose1d(a, a, 4, 2, 1)
            self.ups.append(nn.ModuleList([ResidualBlock(b * 2, a, dim, 5), ResidualBlock(a, a, dim, 5), double]))
        self.head = nn.Sequential(ConvBlock(dim, dim, 5), nn.Conv1d(dim, transition_dim, 1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Plans `(batch, horizon, transition_dim)` and timesteps `(batch,)`."""
        x, time, skips = x.transpose(1, 2), self.time(timestep), []
        for first, second, half in cast(Any, self.downs):
            x = second(first(x, time), time)
            skips.append(x)
            x = half(x)
        for block in self.middle:
            x = block(x, time)
        for first, second, double in cast(Any, self.ups):
            x = double(second(first(torch.cat([x, skips.pop()], dim=1), time), time))
        return cast(Tensor, self.head(x).transpose(1, 2))


class DiffuserValue(nn.Module):
    """The value function whose gradient guides Diffuser, in the size of CleanDiffuser's for Hopper: kernel 3 (5 in the
    last two blocks), `dim=32`, widths of `(1, 2, 2, 2)` multiplied up; 1,488,801 parameters at horizon 32."""

    def __init__(self, transition_dim: int, horizon: int, dim: int = 32, mults: tuple[int, ...] = (1, 2, 2, 2)) -> None:
        super().__init__()
        widths = [transition_dim, *(dim * each for each in itertools.accumulate(mults, lambda a, b: a * b))]
        self.time = _time_embedding(dim)
        self.downs = nn.ModuleList()
        for a, b in itertools.pairwise(widths):
            half = nn.Identity() if b == widths[-1] else nn.Conv1d(b, b, 3, 2, 1)
            self.downs.append(nn.ModuleList([ResidualBlock(a, b, dim, 3), ResidualBlock(b, b, dim, 3), half]))
        for _ in range(len(mults) - 1):
            horizon = math.ceil(horizon / 2)
        widest, middle, narrow = widths[-1], widths[-1] // 2, widths[-1] // 4
        for a, b in ((widest, middle), (middle, narrow)):
            self.downs.append(nn.ModuleList([ResidualBlock(a, b, dim, 5), nn.Conv1d(b, b, 3, 2, 1)]))
            horizon = math.ceil(horizon / 2)
        width = narrow * horizon
        self.head = nn.Sequential(nn.Linear(width + dim, width // 2), nn.Mish(), nn.Linear(width // 2, 1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Values `(batch, 1)` of noisy plans `(batch, horizon, transition_dim)`."""
        x, time = x.transpose(1, 2), self.time(timestep)
        for *blocks, half in cast(Any, self.downs):
            for block in blocks:
                x = block(x, time)
            x = half(x)
        return cast(Tensor, self.head(torch.cat([x.flatten(1), time], dim=-1)))


class FourierEmbedding(nn.Module):
    """An MLP on random Fourier features of the timestep."""

    def __init__(self, dim: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(dim // 8) * scale)
        self.mlp = nn.Sequential(nn.Linear(dim // 4, dim), nn.Mish(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None].float() * (2 * math.pi * cast(Tensor, self.frequencies))[None]
        return cast(Tensor, self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)))


class CleanDiTBlock(nn.Module):
    """AdaLN-Zero around `nn.MultiheadAttention`, which adds to its normalised input."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Dropout(0.0), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        x = self.norm_attention(x) * (1 + scale_a) + shift_a
        x = x + gate_a * self.attention(x, x, x)[0]
        return cast(Tensor, x + gate_m * self.mlp(self.norm_mlp(x) * (1 + scale_m) + shift_m))


class CleanDiT(nn.Module):
    """CleanDiffuser's DiT of Decision Diffuser: width 320, 10 heads, depth 2; 4,073,547 parameters for Hopper."""

    def __init__(
        self, token_dim: int, dim: int = 320, num_heads: int = 10, depth: int = 2, time_dim: int = 128
    ) -> None:
        super().__init__()
        self.timestep = FourierEmbedding(time_dim)
        self.positions = SinusoidalEmbedding(dim)
        self.token_projection = nn.Linear(token_dim, dim)
        self.time = nn.Sequential(nn.Linear(time_dim, dim), nn.Mish(), nn.Linear(dim, dim), nn.Mish())
        self.blocks = nn.ModuleList(CleanDiTBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, token_dim)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Sequences `(batch, horizon, token_dim)` and timesteps `(batch,)`."""
        embedding = self.time(self.timestep(timestep))
        x = self.token_projection(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            x = block(x, embedding)
        shift, scale = self.modulation(embedding)[:, None].chunk(2, dim=-1)
        return cast(Tensor, self.head(self.norm(x) * (1 + scale) + shift))


@torch.no_grad()
def guided_sampling(
    denoiser: nn.Module,
    value: nn.Module,
    observations: Tensor,
    plan_shape: tuple[int, int],
    *,
    num_steps: int,
    num_guide_steps: int = 2,
    scale: float = 0.1,
    first_unguided: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Diffuser's guided DDPM sampling with its settings for locomotion (Algorithm 1 of arXiv:2205.09991): before each
    step the plan moves `num_guide_steps` times along the value's gradient, scaled by the variance of the posterior; the
    network predicts the clean plan, which is clamped.

    Args:
        denoiser: `(plans, timesteps) -> clean plans`.
        value: `(plans, timesteps) -> values`.
        observations: normalised, of shape `(batch, observation_dim)`, the plans' first.
        plan_shape: horizon and width.
        num_steps: of the cosine schedule and of sampling.
        num_guide_steps: steps along the gradient for each denoising step.
        scale: of them.
        first_unguided: the least noisy so many steps are not guided.
        generator: of the noise.

    Returns:
        Plans `(batch, horizon, width)`, the one of the highest value first.
    """
    batch, dim = observations.shape
    betas = _cosine_betas(num_steps).to(observations.device)
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    before = torch.cat([torch.ones_like(alphas_bar[:1]), alphas_bar[:-1]])
    variances = (betas * (1 - before) / (1 - alphas_bar)).clamp(min=1e-20)
    clean_weight = betas * before.sqrt() / (1 - alphas_bar)
    noisy_weight = (1 - before) * (1 - betas).sqrt() / (1 - alphas_bar)

    def condition(plans: Tensor) -> Tensor:
        plans[:, 0, :dim] = observations
        return plans

    x = condition(torch.randn(batch, *plan_shape, generator=generator, device=observations.device))
    values = torch.zeros(batch, device=x.device)
    for step in reversed(range(num_steps)):
        timesteps = torch.full((batch,), step, device=x.device)
        for _ in range(num_guide_steps):
            with torch.enable_grad():
                plans = x.detach().requires_grad_()
                values = value(plans, timesteps)[:, 0]
                gradient = torch.autograd.grad([values.sum()], [plans])[0]
            x = condition(x + (scale if step >= first_unguided else 0.0) * variances[step] * gradient)
        clean = denoiser(x, timesteps).clamp(-1, 1)
        mean = clean_weight[step] * clean + noisy_weight[step] * x
        noise = torch.randn(x.shape, generator=generator, device=x.device) if step else torch.zeros_like(x)
        x = condition(mean + variances[step].sqrt() * noise)
    return x[values.argsort(descending=True)]


def _cosine_betas(num_steps: int, offset: float = 0.008) -> Tensor:
    """Nichol & Dhariwal (2021, arXiv:2102.09672), Eq. 17."""
    t = torch.linspace(0, num_steps, num_steps + 1) / num_steps
    alphas_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(0, 0.999)
