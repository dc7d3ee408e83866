"""Pipelines and adapters to the Hub and back, over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from dmc_hub import DiffuserPlannerPipeline


def test_a_pipeline_and_its_adapter_come_back_bit_for_bit(
    hub: Any, make_planner: Callable[..., Any], adapt: Callable[..., Any], act: Callable[..., Any]
) -> None:
    planner = make_planner()
    foundation = act(planner)
    pushed = planner.push_to_hub("alice/planner")
    assert pushed.repo_id == "alice/planner"
    aligned = act(adapt(planner))
    assert not np.allclose(aligned, foundation, atol=1e-3)
    planner.push_lora_to_hub("alice/planner-lora")
    loaded = DiffuserPlannerPipeline.from_pretrained("alice/planner")
    np.testing.assert_array_equal(act(loaded), foundation)
    loaded.load_lora_weights("alice/planner-lora")
    np.testing.assert_array_equal(act(loaded), aligned)
    assert loaded.task_metadata == planner.task_metadata
