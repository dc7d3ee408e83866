"""Small real controllers on Nav1D's data, for the trainers' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler


@pytest.fixture(scope="session")
def episodes() -> Episodes:
    return Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=300))


@pytest.fixture
def make_pipeline(episodes: Episodes) -> Callable[..., Any]:
    """`make_pipeline("policy" | "planner", **scheduler_options)`: untrained, the same at every call."""

    def make(controller: str, **scheduler_options: Any) -> Any:
        torch.manual_seed(0)
        normalizer = Normalizer.from_data(episodes.observations, episodes.actions)
        scheduler = TransitionScheduler(**{"num_train_timesteps": 20, "prediction_type": "sample", **scheduler_options})
        critic = TwinQCritic(3, 1, hidden_dims=(32,))
        if controller == "policy":
            policy = DiffusionTransformer1D(1, 3, dim=32, num_heads=2, depth=1, timestep_dim=16)
            return DiffusionPolicyPipeline(policy, scheduler, normalizer, critic, horizon=1, num_inference_steps=5)
        planner = TemporalUnet(4, dim=8, dim_mults=(1, 2))
        return DiffuserPlannerPipeline(planner, scheduler, normalizer, critic, horizon=4, num_inference_steps=5)

    return make
