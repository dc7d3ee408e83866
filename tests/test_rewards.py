"""Rewards by the critic, and what is refused from a reward function."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.rewards import call_reward, critic_reward
from dmc_hub.scheduler import TransitionScheduler

OBSERVATIONS, ACTIONS = torch.zeros(3, 2, 1), torch.tensor([0.5, -1.0, 2.0]).reshape(3, 1, 1).expand(3, 2, 1)


def linear_critic() -> TwinQCritic:
    """Without hidden layers: Q1 = 10 (o + 2 a), Q2 = 10 (o + 2 a + 1), V = 10 (3 o), inputs normalised."""
    critic = TwinQCritic(1, 1, hidden_dims=(), value_scale=10.0)
    with torch.no_grad():
        for network, weight, bias in ((critic.q_1, [1, 2], 0), (critic.q_2, [1, 2], 1), (critic.v, [3], 0)):
            network[0].weight.copy_(torch.tensor([weight]))
            network[0].bias.fill_(bias)
    return critic


def pipeline(critic: TwinQCritic | None) -> DiffusionPolicyPipeline:
    """Observations lie in [0, 4], actions in [-2, 2]: normalised, o -> o / 2 - 1 and a -> a / 2."""
    ends = np.array([[0.0], [1.0]], dtype=np.float32)
    return DiffusionPolicyPipeline(
        DiffusionTransformer1D(1, 1, dim=8, num_heads=2, depth=1),
        TransitionScheduler(4),
        Normalizer.from_data(4 * ends, 4 * ends - 2),
        critic,
        horizon=2,
        num_inference_steps=2,
    )


def test_critic_reward_is_q_minus_v_by_hand() -> None:
    observations = torch.tensor([[[4.0], [2.0]], [[0.0], [0.0]]])  # normalised 1, 0 and -1, -1
    actions = torch.tensor([[[2.0], [-1.0]], [[0.0], [1.0]]])  # normalised 1, -0.5 and 0, 0.5
    controller = pipeline(linear_critic())
    # First pair: min Q = 10 (1 + 2) = 30, V = 30; of the second sample -10 and -30.
    assert critic_reward(controller)(observations, actions).tolist() == pytest.approx([0, 20], abs=1e-5)
    assert critic_reward(controller, subtract_value=False)(observations, actions).tolist() == pytest.approx([30, -10])
    # Second pair: Q - V = 10 (0 - 1) - 0 = -10, and 10 (-1 + 1) + 30 = 30; more than there are is fine.
    for num_steps in (2, 9):
        both = critic_reward(controller, num_steps=num_steps)(observations, actions)
        assert both.tolist() == pytest.approx([-5, 25], abs=1e-5)


def test_sequences_of_a_critic_of_several_action_steps_by_hand() -> None:
    critic = TwinQCritic(1, 1, hidden_dims=(), num_action_steps=2)
    with torch.no_grad():
        for network, weight in ((critic.q_1, [1, 2, 4]), (critic.q_2, [1, 2, 4]), (critic.v, [3])):
            network[0].weight.copy_(torch.tensor([weight]))
            network[0].bias.zero_()
    controller = pipeline(critic)
    observations = torch.tensor([[[4.0]], [[0.0]]])  # normalised 1 and -1
    actions = torch.tensor([[[2.0], [-1.0]], [[0.0], [1.0]]])  # normalised 1, -0.5 and 0, 0.5
    # Q = 1 + 2 - 2 = 1 and -1 + 0 + 2 = 1; V = 3 and -3
    for num_steps in (1, 9):
        reward = critic_reward(controller, num_steps=num_steps)(observations, actions)
        assert reward.tolist() == pytest.approx([-2, 4], abs=1e-5)
    output = controller(np.array([[4.0], [0.0]], dtype=np.float32), num_candidates=3, generator=0)
    assert output.values is not None
    chosen = torch.from_numpy(output.actions / 2) @ torch.ones(1)
    expected = torch.tensor([1.0, -1.0]) + 2 * chosen[:, 0] + 4 * chosen[:, 1]
    assert output.values.max(1).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_gradients_reach_the_actions() -> None:
    actions = torch.zeros(2, 2, 1, requires_grad=True)
    reward = critic_reward(pipeline(linear_critic()))
    call_reward(reward, torch.zeros(2, 2, 1), actions).sum().backward()
    assert actions.grad is not None
    # dQ/da = 10 * 2 * (1 / 2) for the executed action, 0 for the one that does not count
    assert actions.grad.flatten().tolist() == pytest.approx([10, 0, 10, 0])


def test_critic_reward_needs_a_critic_and_a_step() -> None:
    with pytest.raises(ValueError, match="`pipeline` has no critic to reward with: train one with IQLTrainer"):
        critic_reward(pipeline(None))
    with pytest.raises(ValueError, match="`num_steps` must be at least 1, got 0"):
        critic_reward(pipeline(linear_critic()), num_steps=0)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda values: np.array(values, dtype=np.float64)])
def test_rewards_may_be_lists_arrays_or_tensors(kind: Any) -> None:
    rewards = call_reward(lambda observations, actions: kind([1, 2, 3]), OBSERVATIONS, ACTIONS)
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [1, 2, 3]


def test_the_function_gets_observations_then_actions() -> None:
    def first_action(observations: Tensor, actions: Tensor) -> Tensor:
        assert not observations.any()
        return actions[:, 0, 0]

    assert call_reward(first_action, OBSERVATIONS, ACTIONS).tolist() == [0.5, -1, 2]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"one reward per sample, shape \(3,\), got \(2,\)"),
        (1.0, r"shape \(3,\), got \(\)"),
        (torch.zeros(3, 1), r"shape \(3,\), got \(3, 1\)"),
        ([0.0, float("nan"), float("nan")], "returned nan for 2 of 3 samples, the first at index 1"),
        (np.array([0.0, 1.0, -np.inf]), "returned -inf for 1 of 3 samples, the first at index 2"),
        (torch.tensor([1e300, 0.0, 0.0], dtype=torch.float64), "returned inf for 1 of 3 samples, the first at index 0"),
    ],
)
def test_bad_rewards_are_refused(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_reward(lambda observations, actions: returned, OBSERVATIONS, ACTIONS)
