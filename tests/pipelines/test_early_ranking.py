"""Candidates that the critic values little are given up part-way: the same as ranking by hand."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dmc_hub.benchmarks.plan import SAMPLERS
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline, diffuser_planner, diffusion_policy
from dmc_hub.scheduler import TransitionScheduler

OBSERVATIONS = np.array([[0.5, -1.0, 0.2], [-0.3, 0.8, 1.5]], dtype=np.float32)
CANDIDATES, KEPT, STEPS, FIRST = 7, 3, 6, 4
SHARES = (FIRST / STEPS, 0.4)  # ceil(0.4 * 7) = 3


def build(kind: str, sampler: str = "DDPM", *, critic: bool = True, mode: str = "gaussian") -> Any:
    """Three observations of deviation 2 and two actions of deviation 1, weights as after training."""
    torch.manual_seed(0)
    ends = np.array([[-1.0], [1.0]], dtype=np.float32)
    normalizer = Normalizer.from_data(np.repeat(2 * ends, 3, 1), np.repeat(ends, 2, 1), mode)
    parts = TransitionScheduler(24, **SAMPLERS[sampler]), normalizer, TwinQCritic(3, 2, (16,)) if critic else None
    pipeline: Any
    if kind == "planner":
        networks = {"upsampler": TemporalUnet(5, dim=8, dim_mults=(1, 2), draft_dim=5)}
        pipeline = DiffuserPlannerPipeline(
            TemporalUnet(5, dim=8, dim_mults=(1, 2)), *parts, **networks, horizon=4, num_inference_steps=STEPS
        )
    else:
        denoiser = DiffusionTransformer1D(2, 3, dim=16, num_heads=2, depth=1)
        networks = {"upsampler": DiffusionTransformer1D(2, 3, dim=16, num_heads=2, depth=1, draft_dim=2)}
        pipeline = DiffusionPolicyPipeline(denoiser, *parts, **networks, horizon=4, num_inference_steps=STEPS)
    with torch.no_grad():
        for parameter in pipeline.denoiser.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return pipeline


def by_hand(pipeline: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and values after ranking in plain loops: `(B, KEPT, action_dim)` and `(B, KEPT)`."""
    scheduler, generator = pipeline.scheduler, torch.Generator().manual_seed(seed)
    condition = pipeline.repeat(pipeline.observation_condition(torch.from_numpy(OBSERVATIONS)), CANDIDATES)
    scheduler.set_timesteps(STEPS)
    latents = torch.randn(pipeline.latent_shape(len(OBSERVATIONS) * CANDIDATES), generator=generator)
    latents = pipeline.inpaint(latents * scheduler.init_noise_sigma, condition)

    def actions_of(clean: Tensor) -> Tensor:
        return pipeline.decode(pipeline.inpaint(clean, condition), condition)[1][:, 0]

    def values_of(actions: Tensor) -> Tensor:
        seen = torch.from_numpy(OBSERVATIONS).repeat_interleave(len(actions) // len(OBSERVATIONS), dim=0)
        return pipeline.critic(seen / 2, actions)

    for number, timestep in enumerate(scheduler.timesteps.tolist()):
        output = pipeline.predict(latents, timestep, condition)
        clean, _ = scheduler.predict(output, latents, timestep)
        latents = pipeline.inpaint(scheduler.step(output, timestep, latents, generator=generator)[0], condition)
        if number + 1 == FIRST:
            values, rows = values_of(actions_of(clean)).tolist(), []
            for start in range(0, len(values), CANDIDATES):
                ranked = sorted(range(start, start + CANDIDATES), key=lambda row: -values[row])
                rows += sorted(ranked[:KEPT])
            latents = latents[rows]
            condition = {name: value[rows] for name, value in condition.items()}
            if scheduler._previous is not None:
                scheduler._previous = scheduler._previous[0][rows], scheduler._previous[1]
    actions = actions_of(latents)
    shape = (len(OBSERVATIONS), KEPT)
    return actions.reshape(*shape, 2).numpy(), values_of(actions).reshape(shape).numpy()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_it_is_ranking_by_hand(kind: str, sampler: str) -> None:
    pipeline = build(kind, sampler)
    output = pipeline(OBSERVATIONS, num_candidates=CANDIDATES, early_ranking=SHARES, generator=3)
    with torch.no_grad():
        candidates, values = by_hand(pipeline, 3)
    np.testing.assert_allclose(output.candidates, candidates, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.values, values, rtol=1e-4, atol=1e-5)
    best = candidates[np.arange(len(candidates)), values.argmax(axis=1)]
    np.testing.assert_allclose(output.action, best, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["DDIM", "flow matching", "DPM-Solver++(2M)"])
@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_without_noise_in_the_steps_the_kept_end_where_they_would_have_ended(kind: str, sampler: str) -> None:
    pipeline = build(kind, sampler)
    everything = pipeline(OBSERVATIONS, num_candidates=CANDIDATES, generator=1).candidates
    kept = pipeline(OBSERVATIONS, num_candidates=CANDIDATES, early_ranking=SHARES, generator=1).candidates
    for some, full in zip(kept, everything, strict=True):
        distances = np.abs(some[:, None] - full[None]).max(axis=-1)
        np.testing.assert_allclose(distances.min(axis=1), 0.0, atol=1e-5)
        places = distances.argmin(axis=1)
        assert list(places) == sorted(set(places)), "in their order, each once"


@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_what_is_ranked_lies_in_the_range_of_the_data(kind: str) -> None:
    pipeline, seen = build(kind, mode="limits"), []
    pipeline.critic.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].abs().max().item()))
    pipeline(OBSERVATIONS, num_candidates=CANDIDATES, early_ranking=SHARES, generator=2)
    assert seen == pytest.approx([1.0, 1.0]), "predictions reach beyond it at both rankings, and are clamped"


@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_keeping_all_changes_no_bit(kind: str) -> None:
    pipeline = build(kind)
    off, on = (
        pipeline(OBSERVATIONS, num_candidates=CANDIDATES, early_ranking=shares, generator=2)
        for shares in (None, (0.5, 1.0))
    )
    for name, value in vars(off).items():
        np.testing.assert_array_equal(getattr(on, name), value)


def test_the_network_sees_fewer_afterwards() -> None:
    pipeline, sizes = build("planner"), []
    pipeline.denoiser.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    pipeline(OBSERVATIONS, num_candidates=CANDIDATES, early_ranking=SHARES, generator=0)
    assert sizes == [2 * CANDIDATES] * FIRST + [2 * KEPT] * (STEPS - FIRST)
    sizes.clear()
    output = pipeline(OBSERVATIONS, num_candidates=CANDIDATES, early_ranking=SHARES, generator=0, num_inference_steps=1)
    assert sizes == [2 * CANDIDATES]
    assert output.values.shape == (2, CANDIDATES), "one step leaves nothing to save"


def test_what_a_plan_is_conditioned_on_stays_with_it() -> None:
    """Goals, a past, a warm start and the up-sampler see the candidates that are left."""
    planner = build("planner")
    goals, mask = np.zeros((2, 4, 5), np.float32), np.zeros((2, 4, 5), bool)
    goals[:, 3, 0], mask[:, 3, 0] = (1.0, -1.5), True
    past = np.full((2, 1, 3), 0.25, np.float32), np.full((2, 1, 2), -0.5, np.float32)
    options: dict[str, Any] = {"num_candidates": CANDIDATES, "early_ranking": SHARES, "generator": 0}
    output = planner(OBSERVATIONS, context=past, inpainting=(goals, mask), num_upsampling_passes=1, **options)
    assert output.trajectories.shape == (2, KEPT, 4, 5)
    np.testing.assert_allclose(output.trajectories[:, :, 1, :3], np.repeat(OBSERVATIONS[:, None], KEPT, 1), atol=1e-6)
    np.testing.assert_allclose(output.trajectories[:, :, 3, 0], [[1.0] * KEPT, [-1.5] * KEPT], atol=1e-6)
    np.testing.assert_allclose(output.trajectories[:, :, 0, 3:], -0.5, atol=1e-6)
    output = build("policy")(OBSERVATIONS, num_upsampling_passes=1, **options)
    assert output.candidates.shape == (2, KEPT, 2)
    output = planner(OBSERVATIONS, **options)
    warm = planner(OBSERVATIONS, previous_plan=output.plan, num_warm_start_steps=2, **options)
    np.testing.assert_allclose(warm.trajectories[:, :, 0, :3], np.repeat(OBSERVATIONS[:, None], KEPT, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_ranking": (0.5,)}, "must be two shares"),
        ({"early_ranking": (0.0, 0.5)}, r"got \(0.0, 0.5\)"),
        ({"early_ranking": (1.0, 0.5)}, "must be two shares"),
        ({"early_ranking": (0.5, 0.0)}, "must be two shares"),
        ({"early_ranking": (0.5, 1.1)}, "must be two shares"),
        ({"early_ranking": (float("nan"), 0.5)}, "must be two shares"),
        ({"early_ranking": SHARES, "action_selection": "expectation"}, "another `action_selection`"),
    ],
)
@pytest.mark.parametrize("kind", ["planner", "policy"])
def test_impossible_shares_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind)(OBSERVATIONS, num_candidates=2, **options)


def test_it_needs_a_critic_and_a_scheduler_that_predicts() -> None:
    with pytest.raises(ValueError, match="it needs a critic"):
        build("planner", critic=False)(OBSERVATIONS, early_ranking=SHARES)
    planner = build("planner")
    planner.scheduler = DDIMScheduler(24, prediction_type="epsilon")
    with pytest.raises(ValueError, match=r"needs a TransitionScheduler.* DDIMScheduler"):
        planner(OBSERVATIONS, num_candidates=2, early_ranking=SHARES)


def test_both_pipelines_carry_the_same_ranking() -> None:
    """Each file travels to the Hub alone."""
    for name in ("EarlyRanking", "_take", "_early_ranking"):
        assert inspect.getsource(getattr(diffuser_planner, name)) == inspect.getsource(getattr(diffusion_policy, name))
