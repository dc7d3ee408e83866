"""Q-value policy gradient: the reward backpropagated through the last denoising steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss
from dmc_hub.trainers.sampling import pack, unpack
from dmc_hub.trainers.truncated import TruncatedConfig, TruncatedTrainer


@dataclass(kw_only=True)
class RewardGradientConfig(TruncatedConfig):
    """Settings of `RewardGradientTrainer`."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Samples per process and step."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    last_k_steps: int | None = field(
        default=2,
        metadata={"help": "Gradients flow through the last K denoising steps (`sg(., K)` of Eq. 9); None for all."},
    )
    reference_coefficient: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the squared distance to the foundation's predictions on noised samples of its own."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("reference_coefficient")


class RewardGradientTrainer(TruncatedTrainer):
    """QV-PG (Eq. 9 of arXiv:2502.12198): ascends the reward's own gradient; the reward must be differentiable.

    Only the last K steps are part of the graph, so memory grows with K and not with the number of steps; with
    `activation_checkpointing` by K latents instead of K times the network's activations. The divergence from the
    foundation is held by the distance of the two networks' predictions on noised data.
    """

    args: RewardGradientConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.warn_without_reference("reference_coefficient")

    @property
    def micro_steps_per_buffer(self) -> int:
        return 1

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        examples = self._examples(size, generator) if self.source.has_examples else {}
        return {
            **pack("condition", self.conditions(size, generator)),
            **examples,
            **self.noise_levels(size, generator),
        }

    def _examples(self, size: int, generator: torch.Generator) -> dict[str, Tensor]:
        x0, condition = self.source.examples(size, generator)
        return {"x0": x0, **pack("example", condition)}

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        return buffer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        condition = unpack("condition", inputs)
        num_steps = self.args.num_inference_steps or self.pipeline.config.num_inference_steps
        latents = self.pipeline.sample(
            condition,
            num_inference_steps=num_steps,
            generator=self.generator("denoising"),
            denoiser=self.network,
            num_grad_steps=self.num_grad_steps or num_steps,
        )
        rewards = self.rewards(latents, condition)
        if not rewards.requires_grad:
            raise ValueError(
                "`reward_function` returns rewards without gradient: RewardGradientTrainer needs a differentiable one. "
                "Use DDPOTrainer, DiffusionDPOTrainer or SFTTrainer for others."
            )
        self.log_metric("reward", rewards)
        loss = -rewards.mean()
        if self.args.reference_coefficient > 0 and self.pipeline.lora_names:
            distance = self._distance_to_reference(inputs, latents.detach())
            self.log_metric("reference_distance", distance)
            loss = loss + self.args.reference_coefficient * distance
        return loss

    def _distance_to_reference(self, inputs: dict[str, Tensor], samples: Tensor) -> Tensor:
        """On examples of the data, or on the samples themselves if it holds none."""
        x0, condition = samples, unpack("condition", inputs)
        if "x0" in inputs:
            x0, condition = inputs["x0"], unpack("example", inputs)
        condition = self.pipeline.complete_condition(condition, self.generator("reference"))
        x_t = self.pipeline.scheduler.add_noise(x0, inputs["noise"], inputs["timesteps"])
        prediction = self.pipeline.predict(x_t, inputs["timesteps"], condition, self.network)
        with torch.no_grad(), self.pipeline.lora_disabled():
            reference = self.pipeline.predict(x_t, inputs["timesteps"], condition)
        return denoising_loss(prediction, reference, self.pipeline.free_entries(condition)).mean()
