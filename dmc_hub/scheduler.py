"""Noise schedules, prediction types, Gaussian denoising transitions and the scheduler that ties them together.

One convention rules here: `x_t = alpha_t x_0 + sigma_t eps` with time `t` in `[0, 1]`, 0 clean and 1 noise. A network's
output of any prediction type is converted once, at the border, to `(x0_hat, eps_hat)`; a kernel turns those into the
Gaussian `p(x_s | x_t)`. Sampling and training call the same `transition`, so that a log-probability computed again on
the same batch equals the recorded one exactly.

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

PredictionType = Literal["epsilon", "sample", "v_prediction", "velocity", "score"]
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "velocity", "score")
KERNELS = ("ancestral", "euler_maruyama", "dpm_solver_2m")
_T = TypeVar("_T")
MOST_KEPT = 10_000  # numbers of a few bytes each


class NoiseSchedule(ABC):
    """`t -> (alpha, sigma, d_alpha, d_sigma)` of `x_t = alpha_t x_0 + sigma_t eps`, for `t` in `[0, 1]`.

    `timestep_origin` fixes what a network is told: `timestep = t * num_train_timesteps - timestep_origin`. The
    variance-preserving schedules count like diffusers' discrete ones (0 is the least noisy *noisy* level).
    """

    timestep_origin: int = 0

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Coefficients and their time derivatives, of the shape and dtype of `t`."""

    def input_scale(self, t: Tensor) -> Tensor:
        """What a noisy sample is multiplied by before the network sees it (1 unless the variance explodes)."""
        return torch.ones_like(t)

    def inference_levels(self, num_levels: int, num_inference_steps: int) -> list[int] | list[float]:
        """The levels `t * num_levels` that sampling goes through, `num_inference_steps` and the clean end, 0."""
        return [round(num_levels * (1 - step / num_inference_steps)) for step in range(num_inference_steps + 1)]

    def most_inference_steps(self, num_levels: int) -> int:
        """So many inference steps visit every level that sampling can visit."""
        return num_levels


@dataclass(frozen=True)
class CosineSchedule(NoiseSchedule):
    """Variance-preserving cosine schedule (Eq. 17 of Nichol & Dhariwal, 2021, arXiv:2102.09672).

    Time is scaled so that `alpha_bar` ends at `min_alpha_bar` instead of 0: an epsilon prediction is divided by
    `alpha_1`, and at 0 a small error becomes an infinite sample.
    """

    offset: float = 0.008
    min_alpha_bar: float = 1e-3
    timestep_origin: int = 1

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        start = self.offset / (1 + self.offset) * math.pi / 2
        end = math.acos(math.sqrt(self.min_alpha_bar) * math.cos(start))
        angle, speed = start + (end - start) * t, end - start
        alpha = torch.cos(angle) / math.cos(start)
        d_alpha = -torch.sin(angle) * speed / math.cos(start)
        sigma = torch.sqrt((1 - alpha**2).clamp(min=0))
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=1e-12)


@dataclass(frozen=True)
class LinearSchedule(NoiseSchedule):
    """Variance-preserving schedule with linear `beta(t)` (VP-SDE, Song et al., 2021, arXiv:2011.13456, App. C)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    timestep_origin: int = 1

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope = self.beta_max - self.beta_min
        alpha = torch.exp(-0.25 * slope * t**2 - 0.5 * self.beta_min * t)
        d_alpha = -0.5 * (self.beta_min + slope * t) * alpha
        sigma = torch.sqrt((-torch.expm1(-0.5 * slope * t**2 - self.beta_min * t)).clamp(min=0))
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=1e-12)


@dataclass(frozen=True)
class VarianceExplodingSchedule(NoiseSchedule):
    """`alpha = 1`, sigma from 0.002 to 80 along EDM's rho-curve, 0 at `t = 0` (Karras et al., arXiv:2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        base = low + t * (high - low)
        sigma = torch.where(t > 0, base**self.rho, torch.zeros_like(t))
        d_sigma = self.rho * base ** (self.rho - 1) * (high - low)
        return torch.ones_like(t), sigma, torch.zeros_like(t), d_sigma

    def input_scale(self, t: Tensor) -> Tensor:
        _, sigma, _, _ = self(t)
        return 1 / torch.sqrt(1 + sigma**2)


@dataclass(frozen=True)
class FlowSchedule(NoiseSchedule):
    """Rectified flow: `alpha = 1 - t`, `sigma = t` (Liu et al., 2022, arXiv:2209.03003).

    shift: with it, sampling goes through the times of diffusers' FlowMatchEulerDiscreteScheduler with this `shift`,
        which are no whole levels: `shift u / (1 + (shift - 1) u)` for `u` evenly from 1 to its least noisy time
        (Eq. 23 of Esser et al., 2024, arXiv:2403.03206). None: through whole levels, evenly.
    """

    shift: float | None = None

    def __post_init__(self) -> None:
        if self.shift is not None and not self.shift > 0:
            raise ValueError(f"`shift` must be positive or None, got {self.shift}.")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)

    def inference_levels(self, num_levels: int, num_inference_steps: int) -> list[int] | list[float]:
        if self.shift is None:
            return super().inference_levels(num_levels, num_inference_steps)
        least = self._shifted(torch.tensor(1 / num_levels, dtype=torch.float64), self.shift)
        even = torch.linspace(1, float(least), num_inference_steps, dtype=torch.float64)
        levels = (num_levels * self._shifted(even, self.shift)).float()  # as a network is told them
        return [*levels.tolist(), 0.0]

    @staticmethod
    def _shifted(t: Tensor, shift: float) -> Tensor:
        return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class TabulatedSchedule(NoiseSchedule):
    """Variance-preserving schedule of a discrete chain, given by its table of `alpha_bar`: for networks that were
    trained elsewhere. `log alpha_bar` is linear in `t` between the levels.

    alpha_bars: of the levels from the least noisy on, falling, in `(0, 1)`; `num_train_timesteps` of them.
    timestep_spacing: `"trailing"` takes inference steps evenly from the noisiest level to the clean end; `"leading"`
        takes multiples of `num_train_timesteps // num_inference_steps` from the clean end on, as diffusers' DDPM and
        DDIM schedulers do unless told otherwise.
    steps_offset: of `"leading"`: all levels but the clean end are so much noisier, 1 in Stable Diffusion.
    ends_clean: False: sampling ends at the least noisy level, diffusers' `set_alpha_to_one=False`.
    """

    alpha_bars: tuple[float, ...] = ()
    timestep_spacing: str = "trailing"
    steps_offset: int = 0
    ends_clean: bool = True
    timestep_origin: int = 1

    def __post_init__(self) -> None:
        table = (1.0, *self.alpha_bars)
        if len(table) < 2 or not all(0 < low < high for high, low in itertools.pairwise(table)):
            raise ValueError("`alpha_bars` must be falling numbers in (0, 1), the least noisy level first.")
        _check_choice("timestep_spacing", self.timestep_spacing, ("trailing", "leading"))
        if self.steps_offset and (self.timestep_spacing == "trailing" or self.steps_offset < 0):
            raise ValueError(f"`steps_offset` must be 0, or at least 0 for 'leading'; got {self.steps_offset}.")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        levels = len(self.alpha_bars)
        table = torch.tensor((1.0, *self.alpha_bars), dtype=torch.float64, device=t.device).log().to(t.dtype)
        index = torch.ceil(t * levels - 1e-6).clamp(1, levels).long()
        slope = (table[index] - table[index - 1]) * levels
        log_alpha_bar = table[index] + slope * (t - index.to(t) / levels)
        alpha, sigma = torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar).clamp(max=0))
        d_alpha = slope * alpha / 2
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma.clamp(min=1e-12)

    def check_levels(self, num_train_timesteps: int) -> None:
        """Raise a ValueError unless the table has so many levels."""
        if len(self.alpha_bars) != num_train_timesteps:
            raise ValueError(
                f"`alpha_bars` has {len(self.alpha_bars)} levels, but `num_train_timesteps` is {num_train_timesteps}."
            )

    def inference_levels(self, num_levels: int, num_inference_steps: int) -> list[int] | list[float]:
        end = 0 if self.ends_clean else 1
        if self.timestep_spacing == "trailing":
            return [*super().inference_levels(num_levels, num_inference_steps)[:-1], end]
        stride, first = num_levels // num_inference_steps, 1 + self.steps_offset
        levels = [first + stride * step for step in reversed(range(num_inference_steps))]
        if levels[0] > num_levels:
            raise ValueError(
                f"`num_inference_steps` {num_inference_steps} with `steps_offset` {self.steps_offset} starts past the "
                f"noisiest of the {num_levels} levels: use fewer steps."
            )
        return [*levels, end]

    def most_inference_steps(self, num_levels: int) -> int:
        return num_levels - self.steps_offset


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "cosine": CosineSchedule,
    "linear": LinearSchedule,
    "variance_exploding": VarianceExplodingSchedule,
    "flow": FlowSchedule,
    "tabulated": TabulatedSchedule,
}


@dataclass(frozen=True)
class Coefficients:
    """A schedule's values at one time, shaped to broadcast against a sample."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    def to(self, sample: Tensor) -> Coefficients:
        return Coefficients(*(value.to(sample) for value in (self.alpha, self.sigma, self.d_alpha, self.d_sigma)))


def predict_clean_and_noise(
    model_output: Tensor, x_t: Tensor, at: Coefficients, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """`(x0_hat, eps_hat)` from a network's output; all have the shape of `x_t`.

    `v_prediction` is `(alpha eps - sigma x0) / sqrt(alpha^2 + sigma^2)`: the v of Salimans & Ho (2022,
    arXiv:2202.00512) for variance-preserving schedules and EDM's preconditioned target (with `sigma_data = 1`, up to
    the sign) for the exploding one. `velocity` is `d_alpha x0 + d_sigma eps`, `score` is `-eps / sigma`.
    """
    alpha, sigma = at.alpha, at.sigma
    if prediction_type == "sample":
        return model_output, (x_t - alpha * model_output) / sigma
    if prediction_type == "v_prediction":
        norm = torch.sqrt(alpha**2 + sigma**2)
        a, s, x = alpha / norm, sigma / norm, x_t / norm
        return a * x - s * model_output, s * x + a * model_output
    if prediction_type == "velocity":
        determinant = alpha * at.d_sigma - sigma * at.d_alpha
        x0 = (at.d_sigma * x_t - sigma * model_output) / determinant
        return x0, (alpha * model_output - at.d_alpha * x_t) / determinant
    eps = -sigma * model_output if prediction_type == "score" else model_output
    return (x_t - sigma * eps) / alpha, eps


def prediction_target(x0: Tensor, eps: Tensor, at: Coefficients, prediction_type: PredictionType) -> Tensor:
    """What a perfect network of `prediction_type` returns; the inverse of `predict_clean_and_noise`."""
    if prediction_type == "sample":
        return x0
    if prediction_type == "v_prediction":
        return (at.alpha * eps - at.sigma * x0) / torch.sqrt(at.alpha**2 + at.sigma**2)
    if prediction_type == "velocity":
        return at.d_alpha * x0 + at.d_sigma * eps
    return -eps / at.sigma if prediction_type == "score" else eps


@dataclass(frozen=True)
class GaussianTransition:
    """`p(x_s | x_t) = N(mean, std^2)`; `std` broadcasts against `mean` and is the same for every entry of a sample."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std * noise`."""
        return self.mean + self.std * noise

    def log_prob(self, x_s: Tensor, mask: Tensor | None = None) -> Tensor:
        """Log-density of `x_s`, **summed** over all entries but the first dimension; shape `(batch,)`.

        `mask` (broadcastable, bool) selects the entries that count: those which in-painting did not fix. A transition
        of zero std has no density; its log-probability is 0 by convention and carries no gradient.
        """
        std = torch.where(self.std > 0, self.std, torch.ones_like(self.std))
        z = (x_s - self.mean) / std
        density = -0.5 * z**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
        return _sum_entries(torch.where(self.std > 0, density, torch.zeros_like(density)), mask)

    def kl(self, other: GaussianTransition, mask: Tensor | None = None) -> Tensor:
        """`KL(self || other)` in closed form, summed like `log_prob`; shape `(batch,)`. 0 where std is 0."""
        variance = torch.where(self.std > 0, self.std**2, torch.ones_like(self.std))
        other_variance = torch.where(other.std > 0, other.std**2, torch.ones_like(other.std))
        ratio = variance / other_variance
        divergence = 0.5 * ((self.mean - other.mean) ** 2 / other_variance + ratio - 1 - torch.log(ratio))
        return _sum_entries(torch.where(self.std > 0, divergence, torch.zeros_like(divergence)), mask)

    def entropy(self, mask: Tensor | None = None) -> Tensor:
        """Differential entropy summed over the entries; shape `(batch,)`. 0 where std is 0."""
        std = torch.where(self.std > 0, self.std, torch.ones_like(self.std))
        entropy = (0.5 * math.log(2 * math.pi * math.e) + torch.log(std)) * torch.ones_like(self.mean)
        return _sum_entries(torch.where(self.std > 0, entropy, torch.zeros_like(entropy)), mask)


def _sum_entries(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        values = torch.where(mask, values, torch.zeros_like(values))
    return values.flatten(1).sum(1)


@dataclass(frozen=True)
class KernelWeights:
    """A kernel between two times as numbers: `mean = x + span (clean x0 + noise eps)`, or `clean x0 + noise eps` where
    `span` is None, and `std`."""

    clean: Tensor
    noise: Tensor
    std: Tensor
    span: Tensor | None = None

    def to(self, sample: Tensor) -> KernelWeights:
        span = None if self.span is None else self.span.to(sample)
        return KernelWeights(self.clean.to(sample), self.noise.to(sample), self.std.to(sample), span)

    def transition(self, x_t: Tensor, x0: Tensor, eps: Tensor) -> GaussianTransition:
        """The transition from `x_t` for the predictions `x0` and `eps`, all of one shape."""
        direction = self.clean * x0 + self.noise * eps
        return GaussianTransition(direction if self.span is None else x_t + direction * self.span, self.std)


def ancestral(at_t: Coefficients, at_s: Coefficients, *, eta: float) -> KernelWeights:
    """The ancestral kernel: DDPM at `eta = 1`, DDIM at `eta = 0` (Eq. 12 and 16 of arXiv:2010.02502), for any schedule.

    `std = eta sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) sigma_s / sigma_t` and
    `mean = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps`.
    """
    added = (at_t.sigma**2 - (at_t.alpha / at_s.alpha) ** 2 * at_s.sigma**2).clamp(min=0)
    std = eta * torch.sqrt(added) * at_s.sigma / at_t.sigma
    return KernelWeights(at_s.alpha, torch.sqrt((at_s.sigma**2 - std**2).clamp(min=0)), std)


def euler_maruyama(at_t: Coefficients, t: Tensor, s: Tensor, *, g: Tensor) -> KernelWeights:
    """One Euler–Maruyama step of the reverse SDE whose marginals are those of the probability-flow ODE.

    `mean = x + (u + g^2 eps / (2 sigma)) (s - t)` with `u = d_alpha x0 + d_sigma eps`, `std = g sqrt(t - s)`: the
    reverse VP-SDE of arXiv:2011.13456 at `g = sqrt(beta(t))` and the SDE of Flow-GRPO (arXiv:2505.05470).
    """
    noise = at_t.d_sigma + g**2 / (2 * at_t.sigma)
    return KernelWeights(at_t.d_alpha, noise, g * torch.sqrt((t - s).clamp(min=0)), span=s - t)


def _log_snr(at: Coefficients) -> Tensor:
    return torch.log(at.alpha / at.sigma)


def _diffusion(at_t: Coefficients, at_s: Coefficients) -> Tensor:
    """The SDE's own `g(t)`: `g^2 = d(sigma^2)/dt - 2 (d log alpha / dt) sigma^2`, which is beta(t) for VP.

    It is infinite where `alpha_t = 0`, at the start of a flow; `alpha_s` stands in there, as in Flow-GRPO.
    """
    alpha = torch.where(at_t.alpha > 1e-6, at_t.alpha, at_s.alpha)
    squared = 2 * at_t.sigma * at_t.d_sigma - 2 * at_t.d_alpha / alpha * at_t.sigma**2
    return torch.sqrt(squared.clamp(min=0))


@dataclass
class DenoisingTrajectory:
    """One recorded sampling run of `N` steps over a batch of `B` samples, in float32 and without gradient.

    `latents[k]` is `x_t` and `next_latents[k]` the drawn `x_s`, each of shape `(B, ...)`; `timesteps[k]` and
    `next_timesteps[k]` are numbers on the network's scale (`next` is `-timestep_origin` at the clean end);
    `log_probs[k]`, of shape `(B,)`, is summed over the entries that `mask` selects; `stds[k]` is the transition's.
    """

    mask: Tensor | None = None
    latents: list[Tensor] = field(default_factory=list)
    next_latents: list[Tensor] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    next_timesteps: list[float] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    stds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic_steps(self) -> list[int]:
        """The steps with a density: those a policy gradient can be taken through."""
        return [step for step, std in enumerate(self.stds) if std > 0]


class TransitionScheduler(SchedulerMixin, ConfigMixin):
    """A diffusers scheduler whose every step is a Gaussian with a log-probability.

    It stands in for DDPMScheduler (`eta=1`), DDIMScheduler (any `eta`) and FlowMatchEulerDiscreteScheduler
    (`schedule="flow"`, `eta=0`), also inside unmodified diffusers pipelines. `with scheduler.record() as trajectory:`
    keeps what a policy gradient needs (Black et al., 2023, arXiv:2305.13301).

    Args:
        num_train_timesteps: noise levels of training, evenly spaced in `t`.
        schedule: `"cosine"`, `"linear"`, `"variance_exploding"`, `"flow"` or `"tabulated"`.
        schedule_options: fields of the schedule's class, such as `{"min_alpha_bar": 1e-3}`.
        prediction_type: `"epsilon"`, `"sample"`, `"v_prediction"`, `"velocity"` or `"score"`.
        kernel: `"ancestral"`, `"euler_maruyama"`, or `"dpm_solver_2m"`, the second-order multistep solver of the
            probability-flow ODE (Algorithm 2 of DPM-Solver++, arXiv:2211.01095), for plain sampling in few steps.
        eta: share of the kernel's full noise, in `[0, 1]` for the ancestral one. 1 is DDPM, 0 deterministic; it must be
            0 for the ODE solver.
        clip_range: clamp `x0_hat` to `[-clip_range, clip_range]`. Clamped entries carry no policy gradient.
    """

    order = 1
    _compatibles: list[str] = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 100,
        schedule: str = "cosine",
        schedule_options: dict[str, Any] | None = None,
        prediction_type: str = "epsilon",
        kernel: str = "ancestral",
        eta: float = 1.0,
        clip_range: float | None = None,
    ) -> None:
        _check_choice("schedule", schedule, tuple(SCHEDULES))
        _check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        _check_choice("kernel", kernel, KERNELS)
        if num_train_timesteps < 1:
            raise ValueError(f"`num_train_timesteps` must be at least 1, got {num_train_timesteps}.")
        if not (eta >= 0 and (eta <= 1 or kernel != "ancestral")):
            raise ValueError(f"`eta` must lie in [0, 1] for the ancestral kernel and be at least 0, got {eta}.")
        if kernel == "dpm_solver_2m" and eta != 0:
            raise ValueError(f"`eta` must be 0 for the kernel 'dpm_solver_2m', which is deterministic; got {eta}.")
        if clip_range is not None and not clip_range > 0:
            raise ValueError(f"`clip_range` must be positive or None, got {clip_range}.")
        if schedule == "flow" and prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"`prediction_type` {prediction_type!r} says nothing of x_0 where alpha is 0, at the start of schedule "
                "'flow': use 'velocity', 'v_prediction' or 'sample'."
            )
        if schedule == "variance_exploding" and kernel == "euler_maruyama" and eta == 0:
            raise ValueError(
                "`kernel` 'euler_maruyama' with `eta` 0 takes Euler steps in time, along which sigma explodes: use "
                "kernel 'ancestral' with `eta` 0, whose Euler steps are in sigma (Algorithm 1 of arXiv:2206.00364 "
                "without churn), or 'dpm_solver_2m'."
            )
        self.noise_schedule = _noise_schedule(schedule, schedule_options or {})
        if isinstance(self.noise_schedule, TabulatedSchedule):
            self.noise_schedule.check_levels(num_train_timesteps)
        self.num_inference_steps: int | None = None
        self._of_numbers: dict[tuple[Any, ...], Any] = {}
        self._trajectory: DenoisingTrajectory | None = None
        self._previous: tuple[Tensor, float] | None = None  # x0_hat and timestep of the step before: multistep solver
        self.set_timesteps(self.noise_schedule.most_inference_steps(num_train_timesteps))

    # Time

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        one = torch.ones((), dtype=torch.float64)
        alpha, sigma, _, _ = self.noise_schedule(one)
        return float(torch.sqrt(alpha**2 + sigma**2))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose `num_inference_steps` of the training levels, evenly from noise (`t = 1`) to the clean end."""
        levels = self.config.num_train_timesteps
        if not 1 <= num_inference_steps <= levels:
            raise ValueError(
                f"`num_inference_steps` must lie in 1..{levels}, the training steps of this scheduler, got "
                f"{num_inference_steps}. Use fewer steps or a scheduler with a larger `num_train_timesteps`."
            )
        self.num_inference_steps = num_inference_steps
        origin = self.noise_schedule.timestep_origin
        grid = [level - origin for level in self.noise_schedule.inference_levels(levels, num_inference_steps)]
        self._previous = None
        self._first_timestep = grid[0]
        self._next_timestep: dict[float, float] = dict(itertools.pairwise(grid))
        self.timesteps = torch.tensor(grid[:-1], device=device)

    def next_timestep(self, timestep: float | Tensor) -> float:
        """The level after `timestep` in the current inference steps; `-timestep_origin` stands for clean."""
        try:
            return self._next_timestep[float(timestep)]
        except KeyError:
            known = sorted(self._next_timestep, reverse=True)
            raise ValueError(f"`timestep` {timestep} is not one of the {len(known)} inference steps {known}.") from None

    def time(self, timestep: float | Tensor) -> Tensor:
        """Continuous time in `[0, 1]` (float64) of timesteps on the network's scale."""
        t = torch.as_tensor(timestep)
        precise = torch.float32 if t.device.type == "mps" else torch.float64
        result: Tensor = (t.to(precise) + self.noise_schedule.timestep_origin) / self.config.num_train_timesteps
        return result

    def coefficients(self, timestep: float | Tensor, sample: Tensor) -> Coefficients:
        """Schedule values at `timestep` (a number or shape `(batch,)`), float64, broadcastable against `sample`."""
        if not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return self._once(
                ("at", float(timestep)), lambda: Coefficients(*self.noise_schedule(self._number(timestep)))
            )
        return Coefficients(*self.noise_schedule(self._time_of(timestep, sample)))

    def _time_of(self, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """As `time`, broadcastable against `sample`."""
        if not isinstance(timestep, Tensor) or timestep.ndim == 0:
            return self._number(timestep)
        return self.time(timestep).to(sample.device).reshape(-1, *(1,) * (sample.ndim - 1))

    def _number(self, timestep: float | Tensor) -> Tensor:
        return self.time(timestep.cpu() if isinstance(timestep, Tensor) else timestep)

    def _once(self, key: tuple[Any, ...], compute: Callable[[], _T]) -> _T:
        """What follows from numbers and the configuration alone, which is fixed: computed once for all samples."""
        if key not in self._of_numbers:
            if len(self._of_numbers) >= MOST_KEPT:
                self._of_numbers.clear()
            with torch.inference_mode(False), torch.no_grad():
                self._of_numbers[key] = compute()
        value: _T = self._of_numbers[key]
        return value

    def sample_timesteps(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """Uniformly drawn training levels, shape `(batch_size,)`, int64, on the CPU."""
        levels = torch.randint(0, self.config.num_train_timesteps, (batch_size,), generator=generator)
        return levels + 1 - self.noise_schedule.timestep_origin

    # Forward process and predictions

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha_t x_0 + sigma_t eps`, of the shape of `original_samples`; `timesteps` of shape `(batch,)`."""
        at = self.coefficients(timesteps, original_samples).to(original_samples)
        return at.alpha * original_samples + at.sigma * noise

    def training_target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should return for `add_noise(x0, noise, timesteps)`."""
        at = self.coefficients(timesteps, x0).to(x0)
        return prediction_target(x0, noise, at, self.config.prediction_type)

    def renoise(self, x_s: Tensor, timestep: float, generator: torch.Generator | None = None) -> Tensor:
        """Noise `x_s`, the result of the inference step at `timestep`, back to that level: one step of the forward
        process, `x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) eps`."""
        at_t, at_s = self.coefficients(timestep, x_s), self.coefficients(self.next_timestep(timestep), x_s)
        keep = at_t.alpha / at_s.alpha
        std = torch.sqrt((at_t.sigma**2 - keep**2 * at_s.sigma**2).clamp(min=0))
        return keep.to(x_s) * x_s + std.to(x_s) * randn(x_s.shape, generator, x_s.device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The sample as the network wants to see it: of about unit variance for every schedule."""
        if self.config.schedule != "variance_exploding":
            return sample
        if isinstance(timestep, Tensor) and timestep.ndim:
            return sample * self.noise_schedule.input_scale(self._time_of(timestep, sample)).to(sample)
        key = ("scale", float(timestep), sample.dtype, sample.device)
        return sample * self._once(key, lambda: self.noise_schedule.input_scale(self._number(timestep)).to(sample))

    def predict(self, model_output: Tensor, sample: Tensor, timestep: float | Tensor) -> tuple[Tensor, Tensor]:
        """`(x0_hat, eps_hat)`; with `clip_range`, `eps_hat` belongs to the clipped `x0_hat`, as in DDPM."""
        at = self._coefficients_for(sample, timestep)
        x0, eps = predict_clean_and_noise(model_output, sample, at, self.config.prediction_type)
        if self.config.clip_range is not None:
            x0 = x0.clamp(-self.config.clip_range, self.config.clip_range)
            eps = (sample - at.alpha * x0) / at.sigma
        return x0, eps

    def _coefficients_for(self, sample: Tensor, timestep: float | Tensor) -> Coefficients:
        """Of the dtype and on the device of `sample`."""
        if isinstance(timestep, Tensor) and timestep.ndim:
            return self.coefficients(timestep, sample).to(sample)
        key = ("at", float(timestep), sample.dtype, sample.device)
        return self._once(key, lambda: self.coefficients(timestep, sample).to(sample))

    # Transitions

    def transition(
        self,
        model_output: Tensor,
        sample: Tensor,
        timestep: float | Tensor,
        next_timestep: float | Tensor | None = None,
        *,
        eta: float | None = None,
    ) -> GaussianTransition:
        """`p(x_s | x_t)` for the network's output at `sample` (`x_t`); differentiable in `model_output`.

        Args:
            model_output: of the shape of `sample`.
            sample: `x_t` of shape `(batch, ...)`.
            timestep: a number, or one per sample of shape `(batch,)`.
            next_timestep: of `x_s`; by default the following inference step (then `timestep` must be a number).
            eta: overrides the configured one.
        """
        if self.config.kernel == "dpm_solver_2m":
            raise ValueError(
                "The kernel 'dpm_solver_2m' has no transition density: its steps depend on the ones before. Use "
                "'ancestral' or 'euler_maruyama' to train, and this one to sample."
            )
        if next_timestep is None:
            next_timestep = self.next_timestep(timestep)
        x0, eps = self.predict(model_output, sample, timestep)
        return self._kernel_weights(sample, timestep, next_timestep, eta).transition(sample, x0, eps)

    def _kernel_weights(
        self, sample: Tensor, timestep: float | Tensor, next_timestep: float | Tensor, eta: float | None
    ) -> KernelWeights:
        eta = self.config.eta if eta is None else eta
        if any(isinstance(each, Tensor) and each.ndim for each in (timestep, next_timestep)):
            return self._new_kernel_weights(sample, timestep, next_timestep, eta).to(sample)
        key = ("kernel", float(timestep), float(next_timestep), eta, sample.dtype, sample.device)
        return self._once(key, lambda: self._new_kernel_weights(sample, timestep, next_timestep, eta).to(sample))

    def _new_kernel_weights(
        self, sample: Tensor, timestep: float | Tensor, next_timestep: float | Tensor, eta: float
    ) -> KernelWeights:
        at_t, at_s = self.coefficients(timestep, sample), self.coefficients(next_timestep, sample)
        if self.config.kernel == "ancestral":
            return ancestral(at_t, at_s, eta=eta)
        t, s = self._time_of(timestep, sample), self._time_of(next_timestep, sample)
        return euler_maruyama(at_t, t, s, g=eta * _diffusion(at_t, at_s))

    def _largest_std(self, timestep: float | Tensor, eta: float | None) -> float:
        """Of the step from `timestep`, which waits for no device."""
        eta, clean = self.config.eta if eta is None else eta, self.next_timestep(timestep)
        sample = torch.empty(0)
        key = ("std", float(timestep), clean, eta)
        return self._once(key, lambda: float(self._new_kernel_weights(sample, float(timestep), clean, eta).std.max()))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Draw `x_s`; noise comes from `generator`. Signature and outputs as in diffusers' schedulers."""
        if self.config.kernel == "dpm_solver_2m":
            x_s = self._solver_step(model_output, sample, timestep)
            return SchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)
        transition = self.transition(model_output, sample, timestep, eta=eta)
        x_s = transition.mean
        std = self._largest_std(timestep, eta)
        if std > 0:
            x_s = transition.sample(randn(sample.shape, generator, sample.device).to(sample))
        if self._trajectory is not None:
            self._append(self._trajectory, transition, sample, x_s, timestep, std)
        return SchedulerOutput(prev_sample=x_s) if return_dict else (x_s,)

    def _solver_step(self, model_output: Tensor, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """One step of DPM-Solver++(2M): `x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) D` with the step `h` in
        log-SNR `lambda = log(alpha / sigma)` and `D` the clean prediction extrapolated from the last two. The first
        step and the one to the clean end are of first order."""
        if self._trajectory is not None:
            raise ValueError("The kernel 'dpm_solver_2m' cannot be recorded: it has no log-probabilities.")
        x0, _ = self.predict(model_output, sample, timestep)
        is_first = self._previous is None or float(timestep) == float(self._first_timestep)
        earlier_x0, earlier = (x0, None) if is_first else cast(Any, self._previous)
        key = ("solver", float(timestep), self.next_timestep(timestep), earlier, sample.dtype, sample.device)
        shrink, pull, share = self._once(key, lambda: self._solver_weights(timestep, earlier, x0))
        estimate = x0 if share is None else (1 + share) * x0 - share * earlier_x0
        self._previous = (x0, float(timestep))
        return shrink * sample + pull * estimate

    def _solver_weights(
        self, timestep: float | Tensor, earlier: float | None, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the sample, of the clean prediction, and the share of its extrapolation, None where there is none."""
        at_t, at_s = (self.coefficients(each, like) for each in (timestep, self.next_timestep(timestep)))
        shrink = at_s.sigma / at_t.sigma
        weights = shrink.to(like), (at_s.alpha - shrink * at_t.alpha).to(like)
        if earlier is None or float(at_s.sigma) <= 0:
            return *weights, None
        log_snr, earlier_log_snr = (_log_snr(each) for each in (at_t, self.coefficients(earlier, like)))
        share = (_log_snr(at_s) - log_snr) / (2 * (log_snr - earlier_log_snr))
        is_finite = bool(torch.isfinite(share))  # at t = 1 of the flow schedule the log-SNR is -infinity
        return *weights, share.to(like) if is_finite else None

    def keep_rows(self, rows: Tensor) -> None:
        """Of the samples in the middle of their denoising these rows alone go on."""
        if self._previous is not None:
            self._previous = (self._previous[0][rows], self._previous[1])

    @contextmanager
    def record(self, mask: Tensor | None = None) -> Iterator[DenoisingTrajectory]:
        """Keep every step taken inside the `with` block. `mask` selects the entries whose log-probability counts."""
        if self._trajectory is not None:
            raise RuntimeError("This scheduler is already recording: end the outer `record()` first.")
        self._trajectory = DenoisingTrajectory(mask=mask)
        try:
            yield self._trajectory
        finally:
            self._trajectory = None

    def _append(
        self,
        trajectory: DenoisingTrajectory,
        transition: GaussianTransition,
        x_t: Tensor,
        x_s: Tensor,
        timestep: float | Tensor,
        std: float,
    ) -> None:
        trajectory.latents.append(x_t.detach().float())
        trajectory.next_latents.append(x_s.detach().float())
        trajectory.timesteps.append(timestep.item() if isinstance(timestep, Tensor) else timestep)
        trajectory.next_timesteps.append(self.next_timestep(timestep))
        trajectory.log_probs.append(transition.log_prob(x_s, trajectory.mask).detach().float())
        trajectory.stds.append(std)

    def __len__(self) -> int:
        number: int = self.config.num_train_timesteps
        return number


def randn(
    shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None, device: str | torch.device
) -> Tensor:
    """Standard normal noise, drawn on the generator's device and moved to `device`; a list has one per sample."""
    result: Tensor = randn_tensor(shape, generator=generator, device=torch.device(device))
    return result


def _noise_schedule(name: str, options: dict[str, Any]) -> NoiseSchedule:
    known = {option.name for option in fields(cast(Any, SCHEDULES[name]))} - {"timestep_origin"}
    if not options.keys() <= known:
        raise ValueError(
            f"`schedule_options` of {name!r} are {', '.join(sorted(known)) or 'none'}; got "
            f"{', '.join(sorted(options))}."
        )
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return SCHEDULES[name](**frozen)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.")
