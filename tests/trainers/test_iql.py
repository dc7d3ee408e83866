"""IQL's loss for a critic of one action step and for one of several, against the formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dmc_hub.data import Episodes
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer


@pytest.mark.parametrize("num_action_steps", [1, 3])
def test_the_loss_by_the_formula(num_action_steps: int, make_pipeline: Callable[..., Any], episodes: Episodes) -> None:
    """Q regresses on the rewards of the steps and, unless the task ended, on the value after them."""
    pipeline, discount = make_pipeline("policy"), 0.9
    pipeline.register_modules(critic=TwinQCritic(3, 1, hidden_dims=(8,), num_action_steps=num_action_steps))
    config = IQLConfig(output_dir=None, discount=discount, expectile=0.8, per_device_train_batch_size=32)
    trainer = IQLTrainer(pipeline, config, train_dataset=episodes)
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    loss = trainer.compute_loss(trainer.model, batch)

    critic, normalizer = pipeline.critic, pipeline.normalizer
    starts = torch.randint(episodes.num_steps, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    ends = episodes.episode_ends
    total = 0.0
    for start in starts:
        stop = min(start + num_action_steps, int(ends[(ends > start).argmax()]))
        rewards = sum(discount**i * episodes.rewards[start + i] for i in range(stop - start))
        state = normalizer.normalize_observations(torch.tensor(episodes.observations[start]))
        after = normalizer.normalize_observations(torch.tensor(episodes.next_observations[stop - 1]))
        actions = torch.zeros(num_action_steps, 1)
        actions[: stop - start] = torch.tensor(episodes.actions[start:stop])
        actions = normalizer.normalize_actions(actions)
        actions = actions if num_action_steps > 1 else actions[0]
        with torch.no_grad():
            is_over = bool(episodes.terminations[stop - 1])
            target = rewards + (0 if is_over else discount ** (stop - start) * critic.value(after))
            gap = trainer.target(state, actions) - critic.value(state)
            q_1, q_2 = critic.twin_q(state, actions)
            total += (0.8 if gap > 0 else 0.2) * gap**2 + (q_1 - target) ** 2 + (q_2 - target) ** 2
    assert loss.item() == pytest.approx(float(total) / 32, rel=1e-4)
