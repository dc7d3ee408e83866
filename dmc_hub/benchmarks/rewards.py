"""What it costs to optimise for more rewards at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dmc_hub.joint_reward import JointReward

NUM_IMAGES, RESOLUTION, REPEATS = 128, 64, 5


def reward_cost(count: int, *, seed: int) -> dict[str, Any]:
    """Median seconds of `count` small convolutional rewards on 128 images of 64 x 64: one by one, and jointly.

    Returns:
        `count`, `alone`, and `joint` by weighting: the difference is normalisation, weights and sum.
    """
    torch.manual_seed(seed)
    networks = [nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 1, 3)) for _ in range(count)]
    rewards = {str(index): _reward_of(network) for index, network in enumerate(networks)}
    images = torch.rand(NUM_IMAGES, 3, RESOLUTION, RESOLUTION)
    prompts = [str(index % 8) for index in range(NUM_IMAGES)]
    metadata: list[dict[str, Any]] = [{} for _ in prompts]
    joint: dict[str, Callable[..., Tensor]] = {
        "fixed": JointReward(rewards),
        "min_norm": JointReward(rewards, weighting="min_norm"),
    }
    return {
        "count": count,
        "alone": _seconds(lambda: [reward(images, prompts, metadata) for reward in rewards.values()]),
        "joint": {name: _seconds(partial(reward, images, prompts, metadata)) for name, reward in joint.items()},
    }


def _reward_of(network: nn.Module) -> Callable[..., Tensor]:
    @torch.no_grad()
    def reward(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return cast(Tensor, network(images).mean((1, 2, 3)))

    return reward


def _seconds(call: Callable[[], Any]) -> float:
    taken = []
    for _ in range(REPEATS):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return statistics.median(taken)
