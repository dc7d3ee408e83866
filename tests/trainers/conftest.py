"""Small real controllers on Nav1D's data, for the trainers' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from torch import Tensor, nn

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


@pytest.fixture(scope="session")
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


class GaussianDenoiser(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The exact clean prediction for independent entries of N(0, std^2); the layer is there to carry a LoRA."""

    @register_to_config
    def __init__(self, std: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.scheduler: Any = None

    def forward(
        self, sample: Tensor, timestep: Any, condition: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        at = self.scheduler.coefficients(timestep, sample).to(sample)
        unscaled = sample / self.scheduler.scale_model_input(torch.ones_like(sample), timestep)
        variance = self.config.std**2
        return (at.alpha * variance * unscaled / (at.alpha**2 * variance + at.sigma**2),)


@pytest.fixture
def make_gaussian_policy(episodes: Episodes) -> Callable[..., Any]:
    """`make(std, horizon, **scheduler_options)`: a policy whose data distribution is known, with a LoRA."""

    def make(std: float = 1.0, horizon: int = 1, **scheduler_options: Any) -> Any:
        scheduler = TransitionScheduler(prediction_type="sample", **{"num_train_timesteps": 100, **scheduler_options})
        denoiser = GaussianDenoiser(std)
        denoiser.scheduler = scheduler
        normalizer = Normalizer.from_data(episodes.observations, episodes.actions, mode="gaussian")
        critic = TwinQCritic(3, 1, hidden_dims=(8,))
        pipeline = DiffusionPolicyPipeline(
            denoiser, scheduler, normalizer, critic, horizon=horizon, num_inference_steps=50
        )
        pipeline.add_lora(LoraConfig(r=1))
        return pipeline

    return make
