"""What a planner can be asked beyond a plan: goals, warm starts, resampling, plan values, inverse dynamics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline
from dmc_hub.scheduler import TransitionScheduler

HORIZON = 4


class Difference(ModelMixin, ConfigMixin):
    """Inverse dynamics in closed form: the action is the change of the first coordinate."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, observations: Tensor, next_observations: Tensor) -> Tensor:
        return (next_observations - observations)[..., :1] * self.scale


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact clean prediction for independent data N(mean, std^2), for any schedule's network timestep."""

    @register_to_config
    def __init__(self, mean: float = 0.3, std: float = 0.2) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.schedule = TransitionScheduler()

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = False) -> tuple[Tensor]:
        at = self.schedule.coefficients(timestep, sample).to(sample)
        mean, variance = self.config.mean, self.config.std**2
        gain = at.alpha * variance / (at.alpha**2 * variance + at.sigma**2)
        return (mean + gain * (sample - at.alpha * mean),)


class GaussianVelocity(GaussianDenoiser):
    """The same for the velocity `eps - x0` of the flow schedule, told `1000 t`."""

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = False) -> tuple[Tensor]:
        t = torch.as_tensor(timestep, dtype=sample.dtype) / 1000
        mean, variance = self.config.mean, self.config.std**2
        gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
        x0 = mean + gain * (sample - (1 - t) * mean)
        return ((sample - x0) / t,)


class GaussianEDM(GaussianDenoiser):
    """The same in EDM's preconditioning (our v prediction), told where on the schedule of `levels` it is."""

    levels = 200

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = False) -> tuple[Tensor]:
        schedule = TransitionScheduler(self.levels, "variance_exploding", prediction_type="v_prediction")
        at = schedule.coefficients(timestep, sample).to(sample)
        sigma = at.sigma.clamp(min=0.002)
        norm, variance = torch.sqrt(1 + sigma**2), self.config.std**2
        x_t = sample * norm
        x0 = self.config.mean + variance / (variance + sigma**2) * (x_t - self.config.mean)
        return (((x_t - x0) / sigma - sigma * x0) / norm,)


def normalizer() -> Normalizer:
    rng = np.random.default_rng(0)
    return Normalizer.from_data(
        rng.uniform(-2, 2, (500, 3)).astype(np.float32), rng.uniform(-1, 1, (500, 1)).astype(np.float32)
    )


def planner(**options: Any) -> DiffuserPlannerPipeline:
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "denoiser": TemporalUnet(4, dim=8, dim_mults=(1, 2)),
        "scheduler": TransitionScheduler(num_train_timesteps=20, prediction_type="sample"),
        "normalizer": normalizer(),
        "critic": TwinQCritic(3, 1, hidden_dims=(16,)),
    }
    return DiffuserPlannerPipeline(**{**parts, "horizon": HORIZON, "num_inference_steps": 5, **options})


def test_in_painted_goals_and_pieces_are_kept_and_the_rest_is_not() -> None:
    pipeline = planner()
    values, mask = np.full((HORIZON, 4), np.nan, np.float32), np.zeros((HORIZON, 4), bool)
    values[-1, :2], mask[-1, :2] = (0.7, -0.4), True
    values[1, 3], mask[1, 3] = 0.25, True
    observation = np.array([0.1, 0.2, 0.3], np.float32)
    plans = pipeline(observation, num_candidates=3, inpainting=(values, mask), generator=0).trajectories
    np.testing.assert_allclose(plans[:, mask], np.tile(values[mask], (3, 1)), atol=1e-6)
    np.testing.assert_allclose(plans[:, 0, :3], np.tile(observation, (3, 1)), atol=1e-6)
    assert plans[:, ~mask].std(0)[3:].min() > 0
    batch = pipeline(np.stack([observation] * 2), inpainting=(np.stack([values] * 2), mask), generator=0)
    np.testing.assert_allclose(batch.trajectories[:, 0, -1, :2], [[0.7, -0.4]] * 2, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (np.zeros((3, 4)), np.ones((4, 4), bool), r"of shape \(4, 4\), batched or not; got \(3, 4\) and \(4, 4\)"),
        (np.zeros((4, 4)), np.ones((4, 4)), "and a bool mask"),
        (np.full((4, 4), np.nan), np.ones((4, 4), bool), "NaN or infinite values where its mask is True"),
    ],
)
def test_bad_in_painting_is_refused(values: np.ndarray, mask: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planner()(np.zeros(3, np.float32), inpainting=(values, mask))


def test_plans_are_ranked_by_the_mean_value_of_their_pairs() -> None:
    pipeline = planner()
    output = pipeline(np.zeros(3, np.float32), num_candidates=6, num_value_steps=3, generator=0)
    observations, actions = torch.from_numpy(output.trajectories[:, :3]).split((3, 1), dim=-1)
    with torch.no_grad():
        values = pipeline.critic(
            pipeline.normalizer.normalize_observations(observations), pipeline.normalizer.normalize_actions(actions)
        ).mean(1)
    assert output.values is not None
    np.testing.assert_allclose(output.values, values.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(output.plan, output.trajectories[int(values.argmax())])
    np.testing.assert_array_equal(output.action, output.plan[0, 3:])
    with pytest.raises(ValueError, match=r"`num_value_steps` must lie in 1\.\.4, got 5"):
        pipeline(np.zeros(3, np.float32), num_candidates=2, num_value_steps=5)


def test_plans_are_ranked_by_the_value_of_their_action_sequences() -> None:
    pipeline = planner(critic=TwinQCritic(3, 1, (16,), num_action_steps=2))
    output = pipeline(np.zeros(3, np.float32), num_candidates=6, num_value_steps=3, generator=0)
    observations, actions = torch.from_numpy(output.trajectories).split((3, 1), dim=-1)
    observations = pipeline.normalizer.normalize_observations(observations)
    actions = pipeline.normalizer.normalize_actions(actions)
    with torch.no_grad():
        values = sum(pipeline.critic(observations[:, i], actions[:, i : i + 2]) for i in range(3)) / 3
    assert output.values is not None
    np.testing.assert_allclose(output.values, values.numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"`num_value_steps` must lie in 1\.\.3, got 4"):
        pipeline(np.zeros(3, np.float32), num_candidates=2, num_value_steps=4)


def test_a_warm_start_runs_few_steps_and_stays_near_the_shifted_plan() -> None:
    """The exact denoiser of data with std 0.2 moves a plan of the data only within the data's own spread."""
    denoiser = GaussianDenoiser()
    pipeline = planner(
        denoiser=denoiser,
        scheduler=TransitionScheduler(num_train_timesteps=100, prediction_type="sample"),
        num_inference_steps=20,
    )
    calls: list[float] = []
    denoiser.register_forward_hook(lambda module, inputs, output: calls.append(inputs[1]))
    first = pipeline(np.zeros(3, np.float32), generator=0)
    assert len(calls) == 20
    calls.clear()
    pipeline(np.zeros(3, np.float32), previous_plan=first.plan, warm_start_level=0.25, generator=1)
    assert calls == [24, 19, 14, 9, 4]  # a quarter of the steps by default
    calls.clear()
    second = pipeline(
        np.zeros(3, np.float32), previous_plan=first.plan, num_warm_start_steps=2, warm_start_level=0.1, generator=1
    )
    assert calls == [9, 4]
    shifted = np.concatenate([first.plan[1:], first.plan[-1:]])
    cold = pipeline(np.zeros(3, np.float32), generator=1).plan
    near, far = np.abs(second.plan - shifted)[1:].mean(), np.abs(cold - shifted)[1:].mean()
    assert near < 0.7 * far
    with pytest.raises(ValueError, match="`num_warm_start_steps` must be at least 1, got 0"):
        pipeline(np.zeros(3, np.float32), previous_plan=first.plan, num_warm_start_steps=0)
    with pytest.raises(ValueError, match=r"`warm_start_level` must lie in \(0, 1\], got 0"):
        pipeline(np.zeros(3, np.float32), previous_plan=first.plan, warm_start_level=0)
    with pytest.raises(ValueError, match=r"`previous_plan` must be finite and of shape \(1, 4, 4\), got \(1, 3, 4\)"):
        pipeline(np.zeros(3, np.float32), previous_plan=first.plan[:3])


def test_resampling_repeats_every_step() -> None:
    pipeline = planner()
    calls: list[float] = []
    pipeline.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(inputs[1]))
    pipeline(np.zeros(3, np.float32), num_resampling_steps=3, generator=0)
    assert len(calls) == 15
    assert calls[:4] == [calls[0]] * 3 + [calls[3]]


def test_renoising_undoes_a_step_in_distribution() -> None:
    """Noise of level s, noised to level t, has the forward process' mean and variance at t."""
    scheduler = TransitionScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(5)
    timestep = int(scheduler.timesteps[2])
    x0, generator = torch.full((40_000, 1), 0.8), torch.Generator().manual_seed(0)
    x_s = scheduler.add_noise(
        x0, torch.randn(x0.shape, generator=generator), torch.tensor([scheduler.next_timestep(timestep)])
    )
    x_t = scheduler.renoise(x_s, timestep, generator)
    at = scheduler.coefficients(timestep, x0)
    assert float(x_t.mean()) == pytest.approx(0.8 * float(at.alpha), abs=0.015)
    assert float(x_t.std()) == pytest.approx(float(at.sigma), rel=0.015)


def test_inverse_dynamics_turn_planned_observations_into_actions(tmp_path: Path) -> None:
    pipeline = planner(denoiser=TemporalUnet(3, dim=8, dim_mults=(1, 2)), inverse_dynamics=Difference())
    assert pipeline.latent_shape(2) == (2, HORIZON, 3)
    output = pipeline(np.zeros((2, 3), np.float32), num_candidates=2, generator=0)
    observations = pipeline.normalizer.normalize_observations(torch.from_numpy(output.trajectories[..., :3]))
    change = (observations[:, :, 1:, :1] - observations[:, :, :-1, :1]).clamp(-1, 1)
    expected = pipeline.normalizer.unnormalize_actions(change)
    np.testing.assert_allclose(output.trajectories[:, :, :-1, 3:], expected.numpy(), atol=1e-5)
    np.testing.assert_array_equal(output.candidates, output.trajectories[:, :, 0, 3:])
    mask = np.zeros((HORIZON, 4), bool)
    mask[1, 3] = True
    with pytest.raises(ValueError, match="cannot fix actions"):
        pipeline(np.zeros(3, np.float32), inpainting=(np.zeros((HORIZON, 4)), mask))


def test_stock_schedulers_of_the_same_levels_sample_the_same_distribution() -> None:
    ours = TransitionScheduler(num_train_timesteps=100, prediction_type="sample")
    alpha_bar = ours.coefficients(torch.arange(100), torch.zeros(1)).alpha.flatten() ** 2
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    settings: dict[str, Any] = {
        "num_train_timesteps": 100,
        "trained_betas": betas.tolist(),
        "prediction_type": "sample",
    }
    for stock in (DPMSolverMultistepScheduler(**settings), UniPCMultistepScheduler(**settings)):
        pipeline = planner(denoiser=GaussianDenoiser(), scheduler=stock, num_inference_steps=60)
        latents = pipeline.sample(
            pipeline.observation_condition(torch.zeros(4000, 3)), generator=torch.Generator().manual_seed(0)
        )[:, 1:, :3]
        assert float(latents.mean()) == pytest.approx(0.3, abs=0.02)
        assert float(latents.std()) == pytest.approx(0.2, rel=0.06)


@pytest.mark.parametrize("stock", [True, False])
def test_flow_sampling_by_our_scheduler_and_by_the_stock_one(stock: bool) -> None:
    levels = 1000
    scheduler: Any = TransitionScheduler(
        num_train_timesteps=levels, schedule="flow", prediction_type="velocity", eta=0.0
    )
    denoiser = GaussianVelocity()
    if stock:
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels)
    pipeline = planner(denoiser=denoiser, scheduler=scheduler, num_inference_steps=50)
    latents = pipeline.sample(
        pipeline.observation_condition(torch.zeros(4000, 3)), generator=torch.Generator().manual_seed(0)
    )[:, 1:, :3]
    assert float(latents.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(latents.std()) == pytest.approx(0.2, rel=0.06)


def test_edm_euler_drives_a_network_trained_where_the_variance_explodes() -> None:
    stock = EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction", num_train_timesteps=GaussianEDM.levels)
    pipeline = planner(denoiser=GaussianEDM(), scheduler=stock, num_inference_steps=60)
    latents = pipeline.sample(
        pipeline.observation_condition(torch.zeros(4000, 3)), generator=torch.Generator().manual_seed(0)
    )[:, 1:, :3]
    assert float(latents.mean()) == pytest.approx(0.3, abs=0.02)
    assert float(latents.std()) == pytest.approx(0.2, rel=0.06)


@pytest.mark.parametrize("decision_diffuser", [False, True])
def test_context_fills_the_first_steps_and_the_action_is_that_of_now(decision_diffuser: bool) -> None:
    options: dict[str, Any] = {"denoiser": TemporalUnet(3, dim=8, dim_mults=(1, 2))} if decision_diffuser else {}
    if decision_diffuser:
        options["inverse_dynamics"] = Difference()
    pipeline = planner(**options)
    rng = np.random.default_rng(0)
    past = rng.uniform(-1, 1, (2, 2, 3)).astype(np.float32), rng.uniform(-0.9, 0.9, (2, 2, 1)).astype(np.float32)
    now = rng.uniform(-1, 1, (2, 3)).astype(np.float32)
    output = pipeline(now, context=past, num_candidates=3, action_selection="expectation", generator=0)
    seen = np.concatenate([past[0], now[:, None]], axis=1)
    for candidate in range(3):
        np.testing.assert_allclose(output.trajectories[:, candidate, :3, :3], seen, atol=1e-5)
        if not decision_diffuser:
            np.testing.assert_allclose(output.trajectories[:, candidate, :2, 3:], past[1], atol=1e-5)
    np.testing.assert_array_equal(output.action, output.plan[:, 2, 3:])
    np.testing.assert_array_equal(output.candidates, output.trajectories[:, :, 2, 3:])
    if not decision_diffuser:
        assert np.ptp(output.trajectories[:, :, 2, 3:], axis=1).min() > 0  # the present action is free


def test_an_empty_context_is_none_and_a_wrong_one_is_refused() -> None:
    pipeline = planner()
    now, empty = np.zeros((1, 3), np.float32), (np.zeros((1, 0, 3)), np.zeros((1, 0, 1)))
    np.testing.assert_array_equal(pipeline(now, context=empty, generator=0).plan, pipeline(now, generator=0).plan)
    wrong = [
        (np.zeros((1, HORIZON, 3)), np.zeros((1, HORIZON, 1))),
        (np.zeros((1, 2, 3)), np.zeros((1, 1, 1))),
        (np.zeros((2, 1, 3)), np.zeros((2, 1, 1))),
        (np.zeros(3), np.zeros(1)),
    ]
    for context in wrong:
        with pytest.raises(ValueError, match=r"`context` must be observations \(1, k, 3\) and actions \(1, k, 1\)"):
            pipeline(now, context=context)
    with pytest.raises(ValueError, match="`context` has NaN"):
        pipeline(now, context=(np.full((1, 1, 3), np.nan), np.zeros((1, 1, 1))))
