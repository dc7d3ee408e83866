"""The configuration, registered with LeRobot as the policy type `dmc_hub`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import NormalizationMode


@PreTrainedConfig.register_subclass("dmc_hub")
@dataclass
class DmcHubConfig(PreTrainedConfig):
    """How a planner or policy acts in LeRobot; the controller itself lies beside it in `pipeline/` and `adapter/`."""

    num_candidates: int = field(default=1, metadata={"help": "Candidates per decision."})
    action_selection: str = field(
        default="greedy", metadata={"help": "How one is chosen: greedy, expectation or softmax."}
    )
    early_ranking: list[float] | None = field(
        default=None, metadata={"help": "Two shares: of the denoising steps, and of the candidates that go on then."}
    )
    num_action_steps: int = field(default=1, metadata={"help": "Actions executed before the next decision."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling noise of an evaluation."})
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=dict, metadata={"help": "Empty: the controller has its own statistics."}
    )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> Any:
        raise NotImplementedError("This policy is trained by dmc_hub's own trainers.")

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Nothing to check before the controller is loaded."""
