"""The evaluation function: twin Q and V by implicit Q-learning."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dmc_hub.conditions import episodes_that_fit
from dmc_hub.losses import expectile_loss
from dmc_hub.trainers.base import DiffusionConfig, DiffusionTrainer


@dataclass(kw_only=True)
class IQLConfig(DiffusionConfig):
    """Settings of `IQLTrainer`; discount, expectile and Polyak rate are the original's for locomotion."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Transitions per process and step."})
    max_steps: int = field(default=10_000, metadata={"help": "Optimizer steps."})
    discount: float = field(default=0.99, metadata={"help": "Discount of future rewards, in [0, 1]."})
    expectile: float = field(default=0.7, metadata={"help": "Expectile of Q that V fits, in (0, 1); towards 1: max."})
    polyak: float = field(default=0.005, metadata={"help": "Share of the Q networks moved into the target each step."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.discount <= 1:
            raise ValueError(f"`discount` must lie in [0, 1], got {self.discount}.")
        if not 0 < self.expectile < 1 or not 0 < self.polyak <= 1:
            raise ValueError(
                f"`expectile` must lie in (0, 1) and `polyak` in (0, 1], got {self.expectile} and {self.polyak}."
            )


class IQLTrainer(DiffusionTrainer):
    """Fits the pipeline's critic offline (Kostrikov et al., 2021, arXiv:2110.06169).

    V is the expectile of the target Q (Eq. 5), Q regresses on `r + discount * V(s')` (Eq. 6); both losses are summed
    and stepped once. The target follows Q by Polyak averaging and is part of the checkpoint. The Q of a critic of
    several action steps regresses on their discounted rewards and the value after them.

    `train_dataset` is an `Episodes` or a `datasets.Dataset` with its columns.
    """

    args: IQLConfig

    def __init__(self, pipeline: Any, args: IQLConfig, *, train_dataset: Any, **kwargs: Any) -> None:
        if pipeline.critic is None:
            raise ValueError("`pipeline` has no critic to train: give it a TwinQCritic.")
        super().__init__(pipeline, args, train_dataset=episodes_that_fit(pipeline, train_dataset), **kwargs)
        self.target = copy.deepcopy(pipeline.critic).requires_grad_(False)
        self.windows = self.train_dataset.windows(pipeline.critic.config.num_action_steps)

    def trainable_module(self) -> nn.Module:
        result: nn.Module = self.pipeline.critic
        return result

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        size = (self.args.per_device_train_batch_size,)
        steps = torch.randint(self.train_dataset.num_steps, size, generator=generator)
        if self.windows.horizon > 1:
            tensors: dict[str, Tensor] = self.windows.transitions(steps, self.args.discount)
            return tensors
        transitions = self.train_dataset.transitions(steps)
        return {**transitions, "discounts": torch.full(size, self.args.discount)}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        critic, normalizer = self.pipeline.critic, self.pipeline.normalizer
        observations = normalizer.normalize_observations(inputs["observations"])
        actions = normalizer.normalize_actions(inputs["actions"])
        with torch.no_grad():
            target_q = self.target(observations, actions)
            next_value = critic.value(normalizer.normalize_observations(inputs["next_observations"]))
            backup = inputs["rewards"] + inputs["discounts"] * (1 - inputs["terminations"]) * next_value
        value, (q_1, q_2) = critic.value(observations), critic.twin_q(observations, actions)
        value_loss = expectile_loss(target_q - value, self.args.expectile).mean()
        q_loss = F.mse_loss(q_1, backup) + F.mse_loss(q_2, backup)
        self.log_metric("value_loss", value_loss)
        self.log_metric("q_loss", q_loss)
        self.log_metric("q", q_1)
        return (value_loss + q_loss) / critic.config.value_scale**2

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """The target starts as the main process's critic, as the critics of the other processes have just become."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.world_size > 1:
            for tensor in self.target.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        return prepared

    def after_optimizer_step(self) -> None:
        """Move the target a share `polyak` towards the critic."""
        with torch.no_grad():
            targets, sources = list(self.target.parameters()), list(self.pipeline.critic.parameters())
            torch._foreach_lerp_(targets, [source.detach() for source in sources], self.args.polyak)

    def extra_state(self) -> dict[str, Tensor]:
        return dict(self.target.state_dict())

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self.target.load_state_dict(state)
