"""Several methods in one update: the naive multi-objective optimisation that sequential alignment avoids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmc_hub.conditions import episodes_that_fit
from dmc_hub.rewards import RewardFunction
from dmc_hub.trainers.base import DiffusionTrainer
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

SINGLE_METHODS: dict[str, tuple[type[SamplingTrainer], type[SamplingConfig]]] = {
    "ddpo": (DDPOTrainer, DDPOConfig),
    "reward_gradient": (RewardGradientTrainer, RewardGradientConfig),
    "nft": (NFTTrainer, NFTConfig),
    "dpo": (DiffusionDPOTrainer, DiffusionDPOConfig),
    "sft": (SFTTrainer, SFTConfig),
}


@dataclass(kw_only=True)
class JointConfig(SamplingConfig):
    """Settings of `JointTrainer`."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    members: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {"ddpo": {}, "dpo": {}, "sft": {}},
        metadata={"help": f"Settings of each method, from {', '.join(SINGLE_METHODS)}."},
    )
    weights: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Weight of a method's loss in the sum; 1 where missing."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in (*self.members, *self.weights) if name not in SINGLE_METHODS]
        if unknown or not self.members:
            raise ValueError(f"`members` must be among {', '.join(SINGLE_METHODS)}; got {list(self.members)}.")
        members = self.members.values()
        if self.pretraining_coefficient > 0 or any("pretraining_coefficient" in settings for settings in members):
            raise ValueError("`pretraining_coefficient` must stay 0: only the losses of `members` are summed.")
        stray = set(self.weights) - set(self.members)
        if stray:
            raise ValueError(f"`weights` names {', '.join(sorted(stray))}, which `members` does not.")

    def member_config(self, method: str) -> Any:
        """The config of one method, with this run's seed, length and output folder."""
        config_type = SINGLE_METHODS[method][1]
        settings = {"num_inference_steps": self.num_inference_steps, **self.members[method]}
        return config_type(
            **{**settings, "output_dir": None, "seed": self.seed, "max_steps": self.max_steps, "report_to": "none"}
        )


class JointTrainer(DiffusionTrainer):
    """Descends the weighted sum of the losses of several methods, each with its own buffer of samples.

    It is the control of sequential alignment: section 3.5 of arXiv:2502.12198 expects of a naive multi-objective
    optimisation that its methods get in each other's way. Arguments as of the methods' own trainers.
    """

    args: JointConfig

    def __init__(
        self,
        pipeline: Any,
        args: JointConfig,
        *,
        train_dataset: Any,
        reward_function: RewardFunction | None = None,
        **kwargs: Any,
    ) -> None:
        train_dataset = episodes_that_fit(pipeline, train_dataset)
        super().__init__(pipeline, args, train_dataset=train_dataset, reward_function=reward_function, **kwargs)
        self.members: dict[str, SamplingTrainer] = {}
        for method in args.members:
            member = SINGLE_METHODS[method][0](
                pipeline, args.member_config(method), train_dataset=train_dataset, reward_function=reward_function
            )
            member.log_metric = partial(self._log_metric_of, method)  # type: ignore[method-assign]
            self.members[method] = member

    def _log_metric_of(self, method: str, name: str, value: Tensor | float) -> None:
        self.log_metric(f"{method}_{name}", value)

    def make_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = {}
        for method, member in self._in_this_micro_step():
            batch |= pack(method, member.make_batch(member.generator("batch")))
        return batch

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        total = torch.zeros((), device=self.args.device)
        for method, member in self._in_this_micro_step():
            loss = member.compute_loss(model, unpack(method, inputs))
            self.log_metric(f"{method}_loss", loss)
            total = total + self.args.weights.get(method, 1.0) * loss
        return total

    def after_optimizer_step(self) -> None:
        for _, member in self._in_this_micro_step():
            member.after_optimizer_step()

    def _in_this_micro_step(self) -> Iterator[tuple[str, SamplingTrainer]]:
        for method, member in self.members.items():
            member.micro_step = self.micro_step
            yield method, member

    def extra_state(self) -> dict[str, Tensor]:
        return {k: v for method, member in self.members.items() for k, v in pack(method, member.extra_state()).items()}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        for method, member in self.members.items():
            member.load_extra_state(unpack(method, state))

    def _run_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        exact, others = super()._run_facts()
        return {**exact, "members": self.args.members, "weights": self.args.weights}, others
