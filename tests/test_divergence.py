"""The distance to the foundation against a recorded denoising path, and the spread of candidates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from dmc_hub.data import make_nav1d_dataset
from dmc_hub.data.episodes import Episodes
from dmc_hub.divergence import candidate_spread, denoising_kl
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline
from dmc_hub.scheduler import TransitionScheduler

SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"prediction_type": "sample"},
    "ddim": {"prediction_type": "sample", "eta": 0.0},
    "sm": {"schedule": "variance_exploding", "prediction_type": "v_prediction"},
    "fm": {"schedule": "flow", "prediction_type": "velocity"},
    "solver": {"prediction_type": "sample", "kernel": "dpm_solver_2m", "eta": 0.0},
}


def make_pipeline(controller: str, sampler: str) -> Any:
    torch.manual_seed(0)
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=20))
    normalizer = Normalizer.from_data(episodes.observations, episodes.actions)
    scheduler = TransitionScheduler(20, **SAMPLERS[sampler])
    if controller == "policy":
        network: Any = DiffusionTransformer1D(1, 3, dim=16, num_heads=2, depth=1)
        torch.nn.init.normal_(network.head.weight, std=0.3)
        return DiffusionPolicyPipeline(network, scheduler, normalizer, horizon=1, num_inference_steps=5)
    network = TemporalUnet(4, dim=8, dim_mults=(1, 2))
    return DiffuserPlannerPipeline(network, scheduler, normalizer, horizon=4, num_inference_steps=5)


def shift(pipeline: Any) -> None:
    pipeline.add_lora(LoraConfig(r=4), seed=0)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_untouched_adapter_is_at_distance_0_and_a_changed_one_is_not(controller: str, sampler: str) -> None:
    pipeline = make_pipeline(controller, sampler)
    condition = pipeline.observation_condition(torch.rand(6, 3))
    assert denoising_kl(pipeline, condition) == 0
    pipeline.add_lora(LoraConfig(r=4), seed=0)
    assert denoising_kl(pipeline, condition) == 0
    pipeline.unload_lora()
    shift(pipeline)
    assert denoising_kl(pipeline, condition) > 1e-4
    assert denoising_kl(pipeline, condition) == denoising_kl(pipeline, condition)


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("sampler", ["ddpm", "fm"])
def test_it_is_the_kl_of_the_steps_of_a_recorded_path(controller: str, sampler: str) -> None:
    pipeline = make_pipeline(controller, sampler)
    shift(pipeline)
    condition = pipeline.observation_condition(torch.rand(6, 3))
    mask = pipeline.free_entries(condition)
    with torch.no_grad(), pipeline.scheduler.record(mask) as path:
        pipeline.sample(condition, generator=torch.Generator().manual_seed(3))
    total = torch.zeros(6)
    for x_t, timestep, following, std in zip(path.latents, path.timesteps, path.next_timesteps, path.stds, strict=True):
        if std == 0:
            continue
        with torch.no_grad():
            ours = pipeline.scheduler.transition(pipeline.predict(x_t, timestep, condition), x_t, timestep, following)
            with pipeline.lora_disabled():
                output = pipeline.predict(x_t, timestep, condition)
            theirs = pipeline.scheduler.transition(output, x_t, timestep, following)
        gap = (ours.mean - theirs.mean) ** 2 / (2 * std**2)
        total += (gap if mask is None else gap * mask).flatten(1).sum(1)
    entries = 1 if mask is None else 13  # of 4 x 4, less the first observation
    assert denoising_kl(pipeline, condition, seed=3) == pytest.approx(float((total / entries).mean()), rel=1e-4)


def test_the_spread_of_candidates_is_that_of_their_first_actions() -> None:
    pipeline = make_pipeline("policy", "ddpm")
    condition = pipeline.observation_condition(torch.rand(6, 3))
    repeated = pipeline.repeat(condition, 8)
    with torch.no_grad():
        latents = pipeline.sample(repeated, generator=torch.Generator().manual_seed(0))
    actions = pipeline.decode(latents, repeated)[1][:, 0, 0].reshape(6, 8)
    expected = float(actions.double().std(dim=1, correction=0).mean())
    assert candidate_spread(pipeline, condition) == pytest.approx(expected, rel=1e-5)
    assert expected > 0.01
