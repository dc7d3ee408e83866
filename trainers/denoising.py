"""Foundation training: the denoising objective with random in-painting masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmc_hub.conditions import episodes_that_fit
from dmc_hub.losses import denoising_loss
from dmc_hub.trainers.base import DiffusionConfig, DiffusionTrainer
from dmc_hub.trainers.loop import require_transitions


@dataclass(kw_only=True)
class DenoisingConfig(DiffusionConfig):
    """Settings of `DenoisingTrainer`."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Windows per process and step."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    inpainting_probability: float = field(
        default=0.25,
        metadata={"help": "Planner: share of windows of which a random number of first steps is fixed, not only one."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.inpainting_probability <= 1:
            raise ValueError(f"`inpainting_probability` must lie in [0, 1], got {self.inpainting_probability}.")


class DenoisingTrainer(DiffusionTrainer):
    """Fits the denoiser to windows of the data: Eq. 5 of arXiv:2502.12198 for any schedule and prediction type.

    A planner also learns to in-paint: random causal masks along time fix the first steps of some windows (section 3.6);
    fixed entries are clean in the input and do not count in the loss.

    `train_dataset` is an `Episodes` or a `datasets.Dataset` with its columns.
    """

    args: DenoisingConfig

    def __init__(self, pipeline: Any, args: DenoisingConfig, *, train_dataset: Any, **kwargs: Any) -> None:
        require_transitions(pipeline)
        super().__init__(pipeline, args, train_dataset=episodes_that_fit(pipeline, train_dataset), **kwargs)
        self.windows = self.train_dataset.windows(
            pipeline.config.horizon, pipeline.num_observation_steps, pipeline.num_past_actions
        )

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        batch = self.windows.gather(torch.randint(len(self.windows), (size,), generator=generator))
        horizon = batch["actions"].shape[1]
        random_length = torch.randint(0, horizon, (size,), generator=generator)
        masked = torch.rand(size, generator=generator) < self.args.inpainting_probability
        noise_shape = self.pipeline.latent_shape(size)
        return {
            **batch,
            "num_context_steps": torch.where(masked, random_length, 0),
            "timesteps": self.pipeline.scheduler.sample_timesteps(size, generator),
            "noise": torch.randn(noise_shape, generator=generator),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        scheduler = self.pipeline.scheduler
        x0, condition = self.pipeline.encode(inputs, inputs["num_context_steps"])
        x_t = scheduler.add_noise(x0, inputs["noise"], inputs["timesteps"])
        prediction = self.pipeline.predict(x_t, inputs["timesteps"], condition, model)
        target = scheduler.training_target(x0, inputs["noise"], inputs["timesteps"])
        return denoising_loss(prediction, target, self.pipeline.free_entries(condition)).mean()
