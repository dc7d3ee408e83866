"""Acting step by step: history, chunks, temporal ensembling, warm starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dmc_hub.agent import Agent
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler


def parts() -> dict[str, Any]:
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    normalizer = Normalizer.from_data(np.repeat(ends, 3, 1), ends)
    return {"scheduler": TransitionScheduler(10, prediction_type="sample"), "normalizer": normalizer}


def make_policy(num_observation_steps: int = 1) -> DiffusionPolicyPipeline:
    torch.manual_seed(0)
    denoiser = DiffusionTransformer1D(1, 3 * num_observation_steps, dim=16, num_heads=2, depth=1)
    torch.nn.init.normal_(denoiser.head.weight)
    return DiffusionPolicyPipeline(
        denoiser, **parts(), horizon=4, num_observation_steps=num_observation_steps, num_inference_steps=2
    )


def make_planner() -> DiffuserPlannerPipeline:
    torch.manual_seed(0)
    return DiffuserPlannerPipeline(
        TemporalUnet(4, dim=8, dim_mults=(1, 2)), **parts(), horizon=4, num_inference_steps=5
    )


def observations(step: int) -> np.ndarray:
    return np.full((2, 3), step / 10, dtype=np.float32)


def test_without_options_an_agent_is_its_pipeline() -> None:
    pipeline = make_policy()
    agent = Agent(pipeline)
    for step in range(3):
        expected = pipeline(observations(step), generator=step)
        np.testing.assert_array_equal(agent(observations(step), generator=step).action, expected.action)


def test_a_history_is_kept_and_starts_with_copies_of_the_first() -> None:
    pipeline = make_policy(num_observation_steps=3)
    agent = Agent(pipeline)
    for _ in range(2):
        agent.reset()
        for step, seen in enumerate([(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3)]):
            action = agent(observations(step), generator=step).action
            history = np.stack([observations(i) for i in seen], axis=1)
            np.testing.assert_array_equal(action, pipeline(history, generator=step).action)


@pytest.mark.parametrize("make", [make_policy, make_planner])
def test_a_chunk_is_executed_before_the_next_decision(make: Any) -> None:
    pipeline = make()
    agent = Agent(pipeline, num_action_steps=3)
    decisions: list[Any] = [pipeline(observations(step), generator=step) for step in (0, 3)]
    planner = isinstance(pipeline, DiffuserPlannerPipeline)
    sequences = [decision.plan[..., 3:] if planner else decision.actions for decision in decisions]
    for step in range(6):
        action = agent(observations(step), generator=step).action
        np.testing.assert_array_equal(action, sequences[step // 3][:, step % 3])


def test_temporal_ensembling_weighs_the_oldest_opinion_most() -> None:
    pipeline = make_policy()
    agent = Agent(pipeline, ensembling_decay=0.5)
    opinions = [pipeline(observations(step), generator=step).actions for step in range(6)]
    for step in range(6):
        action = agent(observations(step), generator=step).action
        sources = range(max(0, step - 3), step + 1)  # the horizon is 4
        weights = np.exp(-0.5 * np.arange(len(sources)))
        expected = sum(w * opinions[i][:, step - i] for w, i in zip(weights, sources, strict=True)) / weights.sum()
        np.testing.assert_allclose(action, expected, atol=1e-6)


def test_a_warm_started_planner_runs_few_steps_after_its_first_plan() -> None:
    pipeline = make_planner()
    calls: list[Any] = []
    pipeline.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(inputs[1]))
    agent = Agent(pipeline, num_warm_start_steps=2)
    counts = []
    for step in range(3):
        calls.clear()
        agent(observations(step), generator=step)
        counts.append(len(calls))
    assert counts == [5, 2, 2]
    agent.reset()
    calls.clear()
    agent(observations(0), generator=0)
    assert len(calls) == 5


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="both together at most 4, the horizon; got 0 and 5"):
        Agent(make_policy(), num_action_steps=5)
    with pytest.raises(ValueError, match="`ensembling_decay` needs a decision at every step"):
        Agent(make_policy(), ensembling_decay=0.1, num_action_steps=2)
    with pytest.raises(ValueError, match="is for planners"):
        Agent(make_policy(), num_warm_start_steps=2)


def test_a_planners_window_slides_over_the_past() -> None:
    pipeline = make_planner()
    agent = Agent(pipeline, num_context_steps=2)
    actions: list[np.ndarray] = []
    for step in range(5):
        first = max(0, step - 2)
        options: dict[str, Any] = {}
        if step:
            seen = [observations(i) for i in range(first, step)]
            options["context"] = (np.stack(seen, axis=1), np.stack(actions[first:], axis=1))
        expected = pipeline(observations(step), generator=step, **options)
        output = agent(observations(step), generator=step)
        np.testing.assert_array_equal(output.action, expected.action)
        np.testing.assert_array_equal(output.action, expected.plan[:, step - first, 3:])
        actions.append(output.action)


def test_chunks_of_a_sliding_window_start_now() -> None:
    agent = Agent(make_planner(), num_context_steps=2, num_action_steps=2)
    for step in range(4):
        output = agent(observations(step), generator=step)
        context = 0 if step < 2 else 2
        np.testing.assert_array_equal(output.action, output.plan[:, context + step % 2, 3:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_context_steps": 4}, "both together at most 4"),
        ({"num_context_steps": -1}, "`num_context_steps` must be at least 0"),
        ({"num_context_steps": 1, "num_warm_start_steps": 1}, "set `num_context_steps` to 0"),
    ],
)
def test_context_that_does_not_fit_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Agent(make_planner(), **options)
    with pytest.raises(ValueError, match="`num_context_steps` is for planners"):
        Agent(make_policy(), num_context_steps=1)
