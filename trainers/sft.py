"""Supervised fine-tuning on the controller's own best samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmc_hub.errors import DmcHubError
from dmc_hub.losses import denoising_loss, masked_mean_square
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack


@dataclass(kw_only=True)
class SFTConfig(SamplingConfig):
    """Settings of `SFTTrainer`."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Samples per process and step."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    num_candidates: int = field(default=32, metadata={"help": "Samples per condition."})
    num_best: int = field(default=1, metadata={"help": "Samples kept per condition: those of the highest reward."})
    num_conditions: int = field(default=512, metadata={"help": "Conditions in one buffer."})
    steps_per_buffer: int = field(default=20, metadata={"help": "Micro-steps before new samples are drawn."})
    sample_from_reference: bool = field(
        default=True,
        metadata={
            "help": "Sample from the foundation, whose candidates stay diverse; False: from the current controller."
        },
    )
    likelihood_quantile: float = field(
        default=1.0,
        metadata={
            "help": "Samples that are less likely under the foundation than this quantile of data windows are rejected."
        },
    )
    likelihood: Literal["denoising_error", "elbo"] = field(
        default="denoising_error",
        metadata={
            "help": "Measured by the foundation's mean denoising error, or by its variational bound, nats per entry."
        },
    )
    num_likelihood_levels: int = field(
        default=4,
        metadata={"help": "Noise levels at which either is measured; more give less noise."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_best", "num_conditions", "steps_per_buffer", "num_likelihood_levels")
        if self.num_best > self.num_candidates:
            raise ValueError(f"`num_best` ({self.num_best}) must not exceed `num_candidates` ({self.num_candidates}).")
        if not 0 < self.likelihood_quantile <= 1:
            raise ValueError(f"`likelihood_quantile` must lie in (0, 1], got {self.likelihood_quantile}.")


class NoSamplesLeftError(DmcHubError, ValueError):
    """Every sample was rejected: there is nothing to train on."""

    exit_code = 1


class SFTTrainer(SamplingTrainer):
    """Iterated best-of-n distillation (section 3.3 of arXiv:2502.12198).

    Of the samples of each condition the best few are kept, those below a likelihood threshold of the foundation are
    dropped, and the denoising objective is trained on the rest. `log_history` has the share that was rejected. Every
    `steps_per_buffer` micro-steps that is done again; with `sample_from_reference=False` the controller then samples,
    which has learned from the buffers before, and the threshold keeps it near the foundation.
    """

    args: SFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.require_reference()
        if self.args.likelihood_quantile < 1 and not self.source.has_examples:
            raise ValueError(
                "`likelihood_quantile` compares samples with those of the data, and `train_dataset` holds none: leave "
                "it at 1."
            )

    @property
    def micro_steps_per_buffer(self) -> int:
        return self.args.steps_per_buffer

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        with self.reference_if(self.args.sample_from_reference):
            ranked, condition, rewards = self.sample_ranked(
                self.args.num_conditions, self.args.num_candidates, generator
            )
        samples = ranked[:, : self.args.num_best].flatten(0, 1)
        condition = self.pipeline.repeat(condition, self.args.num_best)
        accepted = self._accepted(samples, condition, generator)
        self.log_metric("rejected_share", 1 - accepted.float())
        self.log_metric("kept_reward", rewards[:, : self.args.num_best])
        return {"samples": samples, "accepted": accepted, **pack("condition", condition)}

    def _accepted(self, samples: Tensor, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Which samples are likely enough, `(B,)`; all, if the data hold no examples to compare with."""
        if not self.source.has_examples:
            return torch.ones(len(samples), dtype=torch.bool, device=samples.device)
        real, real_condition = self.source.examples(len(samples), generator)
        real_condition = self.pipeline.complete_condition(real_condition, generator)
        of_data = self.accelerator.gather(self._unlikeliness(real, real_condition, generator))
        unlikeliness = self._unlikeliness(samples, condition, generator)
        self.log_metric("unlikeliness", unlikeliness)
        result: Tensor = unlikeliness <= of_data.quantile(self.args.likelihood_quantile)
        return result

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        accepted = buffer["accepted"].nonzero().flatten()
        if not len(accepted):
            raise NoSamplesLeftError(
                "All samples fall below the foundation's likelihood threshold: raise `likelihood_quantile` or sample "
                "from the foundation with `sample_from_reference=True`."
            )
        rows = accepted[torch.randint(len(accepted), (size,), generator=generator).to(accepted.device)]
        return {
            **{name: value[rows] for name, value in buffer.items()},
            **self.noise_levels(size, generator),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        condition = unpack("condition", inputs)
        return self._denoising_errors(inputs["samples"], condition, inputs["timesteps"], inputs["noise"]).mean()

    def _denoising_errors(self, x0: Tensor, condition: dict[str, Tensor], timesteps: Tensor, noise: Tensor) -> Tensor:
        scheduler = self.pipeline.scheduler
        x_t = scheduler.add_noise(x0, noise, timesteps)
        prediction = self.pipeline.predict(x_t, timesteps, condition)
        target = scheduler.training_target(x0, noise, timesteps)
        return denoising_loss(prediction, target, self.pipeline.free_entries(condition))

    def _unlikeliness(self, x0: Tensor, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The measure that must not exceed its quantile on data, `(B,)`."""
        if self.args.likelihood == "denoising_error":
            return self._reference_errors(x0, condition, generator)
        with self.reference_if(True):
            return negative_elbo(
                self.pipeline, x0, condition, num_levels=self.args.num_likelihood_levels, generator=generator
            )

    @torch.no_grad()
    def _reference_errors(self, x0: Tensor, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The foundation's denoising error of each sample, averaged over evenly spaced noise levels; `(B,)`."""
        scheduler, count = self.pipeline.scheduler, self.args.num_likelihood_levels
        levels = (torch.arange(count) + 0.5) / count * scheduler.config.num_train_timesteps
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        with self.reference_if(True):
            errors = [
                self._denoising_errors(x0, condition, torch.full((len(x0),), int(level)), noise) for level in levels
            ]
        return torch.stack(errors).mean(0)


@torch.no_grad()
def negative_elbo(
    pipeline: Any, x0: Tensor, condition: dict[str, Tensor], *, num_levels: int, generator: torch.Generator
) -> Tensor:
    """Estimate of the variational bound on `-log p(x0 | condition)`, in nats per free entry; shape `(B,)`.

    The bound is that of a sampler of all training levels: the sum over steps of
    `(snr(s) - snr(t)) / 2 ||x0 - x0_hat(z_t)||^2`, the KL divergence of `q(z_1 | x0)` to the noise that sampling starts
    from, and `-log p(x0 | z_0)`, a Gaussian at the finest level (Eq. 11–14 of Kingma et al., VDM, arXiv:2107.00630;
    `L_t` of Ho et al., arXiv:2006.11239, section 3.2).

    Of the sum, `num_levels` steps are measured with one noise each: the mid-quantiles of what the steps contribute for
    entries of unit variance, whose error is at best `1 / (1 + snr)`. More of them leave less noise and quadrature
    error.

    Args:
        pipeline: in the state that is asked for its likelihood.
        x0: normalised samples `(B, horizon, dim)`.
        condition: of the samples; entries that it fixes are conditioned on and don't count.
        num_levels: at least 1.
        generator: of the noise.
    """
    scheduler, mask = pipeline.scheduler, pipeline.free_entries(condition)
    train = scheduler.config.num_train_timesteps
    levels = torch.arange(1, train + 1) - scheduler.noise_schedule.timestep_origin
    at = scheduler.coefficients(levels, torch.empty(train))
    snr = (at.alpha / at.sigma) ** 2
    bound = 0.5 * (1 - torch.log(snr[0]) + math.log(2 * math.pi)) + _prior_divergence(at, x0, mask)
    contributions = (-0.5 * snr.diff() / (1 + snr[1:])).cumsum(0)
    quantiles = contributions[-1] * (torch.arange(num_levels, dtype=snr.dtype) + 0.5) / num_levels
    for step in (1 + torch.searchsorted(contributions, quantiles)).tolist():
        timesteps = levels[step].expand(len(x0))
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        z_t = scheduler.add_noise(x0, noise, timesteps)
        clean, _ = scheduler.predict(pipeline.predict(z_t, timesteps, condition), z_t, timesteps)
        weight = contributions[-1] * (1 + snr[step]) / num_levels
        bound = bound + weight * masked_mean_square(clean - x0, mask)
    return bound.to(x0)


def _prior_divergence(at: Any, x0: Tensor, mask: Tensor | None) -> Tensor:
    """KL of `N(alpha_1 x0, sigma_1^2)` to `N(0, alpha_1^2 + sigma_1^2)`, the noise of the start, per entry; `(B,)`."""
    alpha, sigma = at.alpha[-1], at.sigma[-1]
    variance = alpha**2 + sigma**2
    mean_square = alpha**2 * masked_mean_square(x0, mask)
    result: Tensor = 0.5 * ((sigma**2 + mean_square) / variance - 1 - torch.log(sigma**2 / variance))
    return result
