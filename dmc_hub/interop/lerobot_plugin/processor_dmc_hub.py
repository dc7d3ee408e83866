"""LeRobot's processors for the policy type `dmc_hub`: they batch, and change no number."""

from __future__ import annotations

from typing import Any

from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    PolicyProcessorPipeline,
    RenameObservationsProcessorStep,
)
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action


def make_dmc_hub_pre_post_processors(config: Any, dataset_stats: Any = None) -> tuple[Any, Any]:
    """The processors before and after the policy; `dataset_stats` is not used."""
    steps = [RenameObservationsProcessorStep(rename_map={}), AddBatchDimensionProcessorStep()]
    before: Any = PolicyProcessorPipeline(
        steps=[*steps, DeviceProcessorStep(device=config.device)], name="policy_preprocessor"
    )
    after: Any = PolicyProcessorPipeline(
        steps=[DeviceProcessorStep(device="cpu")],
        name="policy_postprocessor",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    return before, after
