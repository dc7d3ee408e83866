"""Supervised fine-tuning on the controller's own best samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss
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
            "help": "Samples that the foundation denoises worse than this quantile of data windows are rejected."
        },
    )
    num_likelihood_levels: int = field(
        default=4, metadata={"help": "Noise levels at which the foundation's denoising error is measured."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_best", "num_conditions", "steps_per_buffer", "num_likelihood_levels")
        if self.num_best > self.num_candidates:
            raise ValueError(f"`num_best` ({self.num_best}) must not exceed `num_candidates` ({self.num_candidates}).")
        if not 0 < self.likelihood_quantile <= 1:
            raise ValueError(f"`likelihood_quantile` must lie in (0, 1], got {self.likelihood_quantile}.")


class NoSamplesLeftError(ValueError):
    """Every sample was rejected: there is nothing to train on."""


class SFTTrainer(SamplingTrainer):
    """Iterated best-of-n distillation (section 3.3 of arXiv:2502.12198).

    Of the samples of each condition the best few are kept, those below a likelihood threshold of the foundation are
    dropped (a bound on the denoising error stands for the likelihood), and the denoising objective is trained on the
    rest. `log_history` has the share that was rejected.
    """

    args: SFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.require_reference()

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
        rows = torch.randint(len(self.windows), (len(samples),), generator=generator)
        data = {name: value.to(samples.device) for name, value in self.windows.gather(rows).items()}
        real, real_condition = self.pipeline.encode(data)
        real_condition = self.pipeline.complete_condition(real_condition, generator)
        threshold = self._reference_errors(real, real_condition, generator).quantile(self.args.likelihood_quantile)
        accepted = self._reference_errors(samples, condition, generator) <= threshold
        self.log_metric("rejected_share", 1 - accepted.float())
        self.log_metric("kept_reward", rewards[:, : self.args.num_best])
        return {"samples": samples, "accepted": accepted, **pack("condition", condition)}

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
            "timesteps": self.pipeline.scheduler.sample_timesteps(size, generator),
            "noise": torch.randn(self.pipeline.latent_shape(size), generator=generator),
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
