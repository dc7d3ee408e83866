"""Diffusion-DPO on pairs that the controller samples itself and the reward ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss, diffusion_dpo_loss
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack


@dataclass(kw_only=True)
class DiffusionDPOConfig(SamplingConfig):
    """Settings of `DiffusionDPOTrainer`."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Pairs per process and step."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    beta: float = field(
        default=10.0,
        metadata={"help": "Strength of the pull to the foundation: gamma of Eq. 11, beta of Diffusion-DPO."},
    )
    snr_clip: float = field(
        default=5.0,
        metadata={
            "help": "omega(lambda_t) = min(snr, snr_clip) / snr on noise errors, so that no noise level dominates."
        },
    )
    num_candidates: int = field(
        default=8, metadata={"help": "Samples per condition; the best and the worst of them are a pair."}
    )
    num_conditions: int = field(default=256, metadata={"help": "Pairs in one buffer."})
    steps_per_buffer: int = field(default=20, metadata={"help": "Micro-steps before new pairs are sampled."})
    sample_from_reference: bool = field(
        default=False, metadata={"help": "Sample pairs from the foundation instead of the current controller."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_conditions", "steps_per_buffer")
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` must be at least 2 to make a pair, got {self.num_candidates}.")
        if self.beta <= 0 or self.snr_clip <= 0:
            raise ValueError(f"`beta` and `snr_clip` must be positive, got {self.beta} and {self.snr_clip}.")


class DiffusionDPOTrainer(SamplingTrainer):
    """Direct preference optimisation of a diffusion model (Eq. 10–12 of arXiv:2502.12198, arXiv:2311.12908).

    Both samples of a pair share their condition, and in the loss also time and noise. The errors are those of the noise
    prediction summed over the free entries, `||eps - eps_theta||^2`, whatever the network predicts.
    """

    args: DiffusionDPOConfig

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
        gap = rewards[:, 0] - rewards[:, -1]
        self.log_metric("reward_gap", gap)
        return {"winners": ranked[:, 0], "losers": ranked[:, -1], "gap": gap, **pack("condition", condition)}

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        rows = torch.randint(self.args.num_conditions, (size,), generator=generator).to(self.args.device)
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
        winner, loser = self._noise_errors(inputs)
        with torch.no_grad(), self.pipeline.lora_disabled():
            winner_reference, loser_reference = self._noise_errors(inputs)
        loss, margin = diffusion_dpo_loss(winner, loser, winner_reference, loser_reference, beta=self.args.beta)
        self.log_metric("accuracy", (margin > 0).float())
        self.log_metric("margin", margin)
        counts = (inputs["gap"] > 0).to(loss)  # equal rewards prefer nothing
        return (loss * counts).sum() / counts.sum().clamp(min=1)

    def _noise_errors(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`omega(lambda_t) ||eps - eps_theta||^2` of winners and losers in one forward, each of shape `(B,)`."""
        scheduler, timesteps = self.pipeline.scheduler, inputs["timesteps"].repeat(2)
        condition = unpack("condition", inputs)
        condition = {name: torch.cat([value, value]) for name, value in condition.items()}
        x0, noise = torch.cat([inputs["winners"], inputs["losers"]]), inputs["noise"].repeat(2, 1, 1)
        x_t = scheduler.add_noise(x0, noise, timesteps)
        clean, _ = scheduler.predict(self.pipeline.predict(x_t, timesteps, condition), x_t, timesteps)
        mask = self.pipeline.free_entries(condition)
        entries = x0[0].numel() if mask is None else mask.flatten(1).sum(1)
        at = scheduler.coefficients(timesteps, x0)
        snr = (at.alpha / at.sigma).pow(2).flatten().to(x0)
        # ||eps - eps_theta||^2 = snr ||x0 - x0_theta||^2, so omega leaves min(snr, snr_clip) here
        errors = snr.clamp(max=self.args.snr_clip) * entries * denoising_loss(clean, x0, mask)
        return tuple(errors.chunk(2))
