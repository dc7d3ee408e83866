"""Foundation training: the denoising objective with random in-painting masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from dmc_hub.conditions import episodes_that_fit
from dmc_hub.data import Episodes
from dmc_hub.features import require_images
from dmc_hub.losses import denoising_loss
from dmc_hub.trainers.base import DiffusionConfig, DiffusionTrainer
from dmc_hub.trainers.loop import adapter_to_train, require_transitions


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


class EndToEnd(ModelMixin):
    """A vision encoder and a denoiser as one model, which is called as the denoiser is."""

    def __init__(self, vision_encoder: ModelMixin, denoiser: ModelMixin) -> None:
        super().__init__()
        self.vision_encoder = vision_encoder
        self.denoiser = denoiser
        self._supports_gradient_checkpointing = denoiser._supports_gradient_checkpointing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.denoiser(*args, **kwargs)


class DenoisingTrainer(DiffusionTrainer):
    """Fits the denoiser to windows of the data: Eq. 5 of arXiv:2502.12198 for any schedule and prediction type.

    A planner also learns to in-paint: random causal masks along time fix the first steps of some windows (section 3.6);
    fixed entries are clean in the input and do not count in the loss.

    The vision encoder of an image policy is trained end to end with the denoiser, on random crops, where the data has
    images. It stays as it is where they are encoded already (`encode_episodes`), or where an adapter is trained.

    `train_dataset` is an `Episodes` or a `datasets.Dataset` with its columns.
    """

    args: DenoisingConfig

    def __init__(self, pipeline: Any, args: DenoisingConfig, *, train_dataset: Any, **kwargs: Any) -> None:
        require_transitions(pipeline)
        episodes, self._end_to_end = Episodes.ensure(train_dataset), None
        adapts = kwargs.get("peft_config") is not None or adapter_to_train(pipeline.denoiser) is not None
        if pipeline.components.get("vision_encoder") is not None and episodes.images and not adapts:
            require_images(pipeline, episodes)
            self._end_to_end = EndToEnd(pipeline.vision_encoder, pipeline.denoiser)
        else:
            episodes = episodes_that_fit(pipeline, episodes)
        super().__init__(pipeline, args, train_dataset=episodes, **kwargs)
        self.windows = self.train_dataset.windows(
            pipeline.config.horizon, pipeline.num_observation_steps, pipeline.num_past_actions
        )

    def trainable_module(self) -> nn.Module:
        return self.pipeline.denoiser if self._end_to_end is None else self._end_to_end

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        rows = torch.randint(len(self.windows), (size,), generator=generator)
        batch = self.windows.gather(rows)
        horizon = batch["actions"].shape[1]
        random_length = torch.randint(0, horizon, (size,), generator=generator)
        masked = torch.rand(size, generator=generator) < self.args.inpainting_probability
        noise_shape = self.pipeline.latent_shape(size)
        return {
            **batch,
            "num_context_steps": torch.where(masked, random_length, 0),
            "timesteps": self.pipeline.scheduler.sample_timesteps(size, generator),
            "noise": torch.randn(noise_shape, generator=generator),
            **({} if self._end_to_end is None else self._images(rows, generator)),
        }

    def _images(self, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        encoder = self.pipeline.vision_encoder
        images = self.windows.image_history(rows, encoder.cameras)
        shape = images[f"images/{encoder.cameras[0]}"].shape
        return {**images, "crop_offsets": encoder.random_crop_offsets(shape[2:4], shape[:2], generator)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        scheduler = self.pipeline.scheduler
        with self.accelerator.autocast():
            x0, condition = self.pipeline.encode(inputs, inputs["num_context_steps"])
        x_t = scheduler.add_noise(x0, inputs["noise"], inputs["timesteps"])
        prediction = self.pipeline.predict(x_t, inputs["timesteps"], condition, model)
        target = scheduler.training_target(x0, inputs["noise"], inputs["timesteps"])
        return denoising_loss(prediction, target, self.pipeline.free_entries(condition)).mean()
