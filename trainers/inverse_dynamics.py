"""Inverse dynamics: which action leads from one observation to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmc_hub.conditions import episodes_that_fit
from dmc_hub.trainers.base import DiffusionConfig, DiffusionTrainer


@dataclass(kw_only=True)
class InverseDynamicsConfig(DiffusionConfig):
    """Settings of `InverseDynamicsTrainer`."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Transitions per process and step."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})


class InverseDynamicsTrainer(DiffusionTrainer):
    """Fits a planner's inverse dynamics by regression on transitions (Eq. 9 of Decision Diffuser, arXiv:2211.15657).

    `train_dataset` is an `Episodes` or a `datasets.Dataset` with its columns.
    """

    args: InverseDynamicsConfig

    def __init__(self, pipeline: Any, args: InverseDynamicsConfig, *, train_dataset: Any, **kwargs: Any) -> None:
        if pipeline.inverse_dynamics is None:
            raise ValueError("`pipeline` has no inverse dynamics to train: give it an InverseDynamics.")
        super().__init__(pipeline, args, train_dataset=episodes_that_fit(pipeline, train_dataset), **kwargs)

    def trainable_module(self) -> nn.Module:
        result: nn.Module = self.pipeline.inverse_dynamics
        return result

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        size = (self.args.per_device_train_batch_size,)
        tensors: dict[str, Tensor] = self.train_dataset.transitions(
            torch.randint(self.train_dataset.num_steps, size, generator=generator)
        )
        return tensors

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        normalizer = self.pipeline.normalizer
        observations = normalizer.normalize_observations(inputs["observations"])
        next_observations = normalizer.normalize_observations(inputs["next_observations"])
        return F.mse_loss(model(observations, next_observations), normalizer.normalize_actions(inputs["actions"]))
