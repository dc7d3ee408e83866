"""Schedules, predictions, transitions and recording against closed forms and against diffusers' own schedulers."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dmc_hub.scheduler import (
    PREDICTION_TYPES,
    SCHEDULES,
    Coefficients,
    GaussianTransition,
    TransitionScheduler,
    ancestral,
    predict_clean_and_noise,
    prediction_target,
)

NAMED = [name for name in SCHEDULES if name != "tabulated"]  # those that need no table


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def coefficients(schedule: str, t: Tensor) -> Coefficients:
    return Coefficients(*SCHEDULES[schedule]()(t))


# Schedules


@pytest.mark.parametrize("schedule", NAMED)
def test_derivatives_match_autograd(schedule: str) -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    at = coefficients(schedule, t)
    for value, derivative in ((at.alpha, at.d_alpha), (at.sigma, at.d_sigma)):
        expected = torch.autograd.grad(value.sum(), t, retain_graph=True)[0] if value.requires_grad else 0 * t
        torch.testing.assert_close(derivative, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_variance_is_preserved_and_ends_above_zero(schedule: str) -> None:
    at = coefficients(schedule, torch.linspace(0, 1, 101, dtype=torch.float64))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones(101, dtype=torch.float64))
    assert at.alpha[0] == 1
    assert (at.alpha.diff() < 0).all()
    # exp(-(20 - 0.1) / 4 - 0.1 / 2) for the linear one, sqrt(1e-3) for the cosine
    assert float(at.alpha[-1]) == pytest.approx({"cosine": math.sqrt(1e-3), "linear": math.exp(-5.025)}[schedule])


def test_levels_of_the_exploding_and_the_flow_schedule() -> None:
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    exploding, flow = coefficients("variance_exploding", t), coefficients("flow", t)
    middle = ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7  # EDM, Eq. 5
    assert exploding.sigma.tolist() == pytest.approx([0, middle, 80])
    assert exploding.alpha.tolist() == [1, 1, 1]
    assert flow.alpha.tolist() == [1, 0.5, 0]
    assert flow.sigma.tolist() == [0, 0.5, 1]


def test_cosine_options_reach_the_schedule() -> None:
    scheduler = TransitionScheduler(10, "cosine", {"min_alpha_bar": 0.25})
    assert float(scheduler.coefficients(9, torch.zeros(1, 1)).alpha) == pytest.approx(0.5)


# Predictions

PAIRS = list(itertools.product(NAMED, PREDICTION_TYPES))
# At alpha = 0, the start of a flow, epsilon and score determine no x_0; just below they do.
SAMPLING_PAIRS = [pair for pair in PAIRS if pair not in {("flow", "epsilon"), ("flow", "score")}]


@pytest.mark.parametrize(("schedule", "prediction"), PAIRS)
def test_prediction_round_trip(schedule: str, prediction: Any) -> None:
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)[:, None]
    x0, eps = normal(25, 3).double(), normal(25, 3, seed=1).double()
    at = coefficients(schedule, t)
    output = prediction_target(x0, eps, at, prediction)
    x0_hat, eps_hat = predict_clean_and_noise(output, at.alpha * x0 + at.sigma * eps, at, prediction)
    torch.testing.assert_close(x0_hat, x0, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(eps_hat, eps, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("schedule", NAMED)
def test_velocity_is_the_time_derivative_of_the_path(schedule: str) -> None:
    x0, eps, t = torch.tensor([0.3]).double(), torch.tensor([-1.2]).double(), 0.37

    def path(t: float) -> Tensor:
        at = coefficients(schedule, torch.tensor([t], dtype=torch.float64))
        return at.alpha * x0 + at.sigma * eps

    at = coefficients(schedule, torch.tensor([t], dtype=torch.float64))
    difference = (path(t + 1e-6) - path(t - 1e-6)) / 2e-6
    torch.testing.assert_close(prediction_target(x0, eps, at, "velocity"), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", NAMED)
def test_score_is_the_gradient_of_the_log_density(schedule: str) -> None:
    x0, eps = torch.tensor([0.3]).double(), torch.tensor([-1.2]).double()
    at = coefficients(schedule, torch.tensor([0.4], dtype=torch.float64))
    x_t = (at.alpha * x0 + at.sigma * eps).requires_grad_()
    score = torch.autograd.grad(Normal(at.alpha * x0, at.sigma).log_prob(x_t).sum(), x_t)[0]
    torch.testing.assert_close(prediction_target(x0, eps, at, "score"), score)


@pytest.mark.parametrize(("schedule", "prediction"), SAMPLING_PAIRS)
def test_scheduler_finds_the_noise_it_added(schedule: str, prediction: str) -> None:
    scheduler = TransitionScheduler(10, schedule, prediction_type=prediction)
    x0, eps, timesteps = normal(4, 5, 2), normal(4, 5, 2, seed=1), scheduler.sample_timesteps(4, generator())
    x_t = scheduler.add_noise(x0, eps, timesteps)
    found = scheduler.predict(scheduler.training_target(x0, eps, timesteps), x_t, timesteps)
    for got, expected in zip(found, (x0, eps), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3 if schedule == "variance_exploding" else 1e-4)


# Time


@pytest.mark.parametrize("schedule", NAMED)
@pytest.mark.parametrize("levels", [1, 7, 32, 50])
def test_every_number_of_steps_runs_from_noise_to_clean(schedule: str, levels: int) -> None:
    scheduler = TransitionScheduler(levels, schedule, prediction_type="sample")
    for steps in range(1, levels + 1):
        scheduler.set_timesteps(steps)
        grid = scheduler.timesteps.tolist()
        times = [float(scheduler.time(t)) for t in [*grid, scheduler.next_timestep(grid[-1])]]
        assert len(grid) == steps
        assert times[0] == 1
        assert times[-1] == 0
        assert all(t > s for t, s in itertools.pairwise(times))
        assert [scheduler.next_timestep(t) for t in grid[:-1]] == grid[1:]


@pytest.mark.parametrize(("schedule", "levels"), [("cosine", {*range(8)}), ("flow", {*range(1, 9)})])
def test_training_draws_every_level(schedule: str, levels: set[int]) -> None:
    scheduler = TransitionScheduler(8, schedule, prediction_type="sample")
    assert set(scheduler.sample_timesteps(500, generator()).tolist()) == levels


# Parity with diffusers


def with_our_levels(reference: Any, ours: TransitionScheduler) -> Any:
    """The same noise levels without the rounding of `trained_betas` to float32."""
    levels = range(ours.config.num_train_timesteps)
    reference.alphas_cumprod = torch.stack([ours.coefficients(t, torch.zeros(1)).alpha ** 2 for t in levels])
    return reference


def betas(ours: TransitionScheduler) -> np.ndarray:
    levels = range(ours.config.num_train_timesteps)
    alpha_bar = [1.0, *(float(ours.coefficients(t, torch.zeros(1)).alpha ** 2) for t in levels)]
    return np.array([1 - b / a for a, b in itertools.pairwise(alpha_bar)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("steps", [40, 10])
def test_eta_1_is_ddpm(schedule: str, prediction: str, clip: float | None, steps: int) -> None:
    ours = TransitionScheduler(40, schedule, prediction_type=prediction, clip_range=clip)
    theirs = DDPMScheduler(
        40,
        trained_betas=betas(ours),
        variance_type="fixed_small",
        prediction_type=prediction,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="trailing",
    )
    with_our_levels(theirs, ours).betas = torch.from_numpy(betas(ours))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    output, sample = normal(3, 4, 2, seed=1), normal(3, 4, 2, seed=2)
    for timestep in ours.timesteps.tolist():
        transition = ours.transition(output, sample, timestep)
        if ours.next_timestep(timestep) >= 0:
            variance = float(theirs._get_variance(timestep))
            assert float(transition.std) == pytest.approx(math.sqrt(variance), abs=1e-5)
        else:
            assert float(transition.std) == 0
        expected = theirs.step(output, timestep, sample, generator=generator(3)).prev_sample.float()
        got = ours.step(output, timestep, sample, generator=generator(3)).prev_sample
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_any_eta_is_ddim(schedule: str, prediction: str, clip: float | None, eta: float) -> None:
    ours = TransitionScheduler(40, schedule, prediction_type=prediction, clip_range=clip, eta=eta)
    theirs = DDIMScheduler(
        40,
        trained_betas=betas(ours),
        prediction_type=prediction,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        timestep_spacing="trailing",
    )
    with_our_levels(theirs, ours)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    output, sample = normal(3, 4, 2, seed=1), normal(3, 4, 2, seed=2)
    zero, one = torch.zeros_like(sample), torch.ones_like(sample)
    for timestep in ours.timesteps.tolist():
        mean, raised = (
            theirs.step(
                output, timestep, sample, eta=eta, use_clipped_model_output=True, variance_noise=noise
            ).prev_sample.float()
            for noise in (zero, one)
        )
        transition = ours.transition(output, sample, timestep)
        torch.testing.assert_close(transition.mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(transition.std.expand_as(mean), raised - mean, rtol=1e-5, atol=1e-5)


def test_eta_of_the_call_overrides_the_configured_one() -> None:
    scheduler = TransitionScheduler(10, eta=1.0)
    output, sample = normal(2, 3, seed=1), normal(2, 3)
    assert float(scheduler.transition(output, sample, 5, eta=0.0).std) == 0
    assert float(scheduler.transition(output, sample, 5).std) > 0


@pytest.mark.parametrize("kernel", ["ancestral", "euler_maruyama"])
def test_eta_0_of_a_flow_is_flow_match_euler(kernel: str) -> None:
    ours = TransitionScheduler(12, "flow", prediction_type="velocity", kernel=kernel, eta=0.0)
    theirs = FlowMatchEulerDiscreteScheduler(12)
    theirs.set_timesteps(sigmas=[t / 12 for t in range(12, 0, -1)])
    output, sample = normal(3, 4, 2, seed=1), normal(3, 4, 2, seed=2)
    for mine, their in zip(ours.timesteps.tolist(), theirs.timesteps, strict=True):
        expected = theirs.step(output, their, sample).prev_sample
        torch.testing.assert_close(ours.step(output, mine, sample).prev_sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 11])
def test_a_shifted_flow_is_flow_match_euler(shift: float, steps: int) -> None:
    ours = TransitionScheduler(1000, "flow", {"shift": shift}, prediction_type="velocity", eta=0.0)
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)
    x = normal(3, 4)
    expected = x
    with ours.record() as trajectory:
        for timestep, their_timestep in zip(ours.timesteps.tolist(), theirs.timesteps, strict=True):
            x = ours.step(velocity := normal(3, 4, seed=int(timestep)), timestep, x, return_dict=False)[0]
            expected = theirs.step(velocity, their_timestep, expected, return_dict=False)[0]
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    assert trajectory.timesteps == ours.timesteps.tolist()  # not rounded to levels


def exploding(sigma: Tensor) -> Coefficients:
    zero = torch.zeros((), dtype=torch.float64)
    return Coefficients(zero + 1, sigma.double(), zero, zero + 1)


def test_eta_0_where_the_variance_explodes_is_edm_euler() -> None:
    theirs = EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction")
    theirs.set_timesteps(7)
    output, sample = normal(3, 4, 2, seed=1), normal(3, 4, 2, seed=2)
    for step, timestep in enumerate(theirs.timesteps):
        at_t, at_s = exploding(theirs.sigmas[step]), exploding(theirs.sigmas[step + 1])
        x_t = sample * float(at_t.sigma)
        theirs.scale_model_input(x_t, timestep)
        expected = theirs.step(output, timestep, x_t).prev_sample
        clean, noise = predict_clean_and_noise(output, x_t, at_t.to(x_t), "v_prediction")
        ours = ancestral(at_t, at_s, eta=0.0).to(x_t).transition(x_t, clean, noise).mean
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_eta_1_where_the_variance_explodes_is_ancestral_euler() -> None:
    theirs = EulerAncestralDiscreteScheduler(100)
    theirs.set_timesteps(9)
    output, sample = normal(3, 4, 2, seed=1), normal(3, 4, 2, seed=2)
    for step, timestep in enumerate(theirs.timesteps):
        at_t, at_s = exploding(theirs.sigmas[step]), exploding(theirs.sigmas[step + 1])
        theirs.scale_model_input(sample, timestep)
        expected = theirs.step(output, timestep, sample, generator=generator(step)).prev_sample
        weights = ancestral(at_t, at_s, eta=1.0).to(sample)
        transition = weights.transition(sample, sample - float(at_t.sigma) * output, output)
        drawn = transition.sample(torch.randn(sample.shape, generator=generator(step)))
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)


def test_euler_maruyama_is_the_reverse_vp_sde() -> None:
    """x + (beta / 2 x + beta score) dt + sqrt(beta dt) z, Song et al. 2021, Eq. 6 and 11."""
    scheduler = TransitionScheduler(100, "linear", prediction_type="score", kernel="euler_maruyama")
    x, score = normal(4, 3).double(), normal(4, 3, seed=1).double()
    for timestep in (99, 50, 0):
        beta, step = 0.1 + 19.9 * (timestep + 1) / 100, 0.01
        transition = scheduler.transition(score, x, timestep)
        torch.testing.assert_close(transition.mean, x + (0.5 * beta * x + beta * score) * step, rtol=1e-9, atol=1e-9)
        assert float(transition.std) == pytest.approx(math.sqrt(beta * step))


def test_euler_maruyama_is_flow_grpo() -> None:
    """Eq. 9 of Flow-GRPO (arXiv:2505.05470) with sigma_t = a sqrt(t / (1 - t)); our eta is a / sqrt(2)."""
    scheduler = TransitionScheduler(
        10, "flow", prediction_type="velocity", kernel="euler_maruyama", eta=0.7 / math.sqrt(2)
    )
    x, v, t, dt = normal(4, 3).double(), normal(4, 3, seed=1).double(), 0.6, 0.1
    sigma = 0.7 * math.sqrt(t / (1 - t))
    mean = x - (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt
    transition = scheduler.transition(v, x, 6)
    torch.testing.assert_close(transition.mean, mean, rtol=1e-9, atol=1e-9)
    assert float(transition.std) == pytest.approx(sigma * math.sqrt(dt))


def test_a_timestep_per_sample_equals_one_at_a_time() -> None:
    for schedule, kernel in itertools.product(NAMED, ("ancestral", "euler_maruyama")):
        scheduler = TransitionScheduler(10, schedule, prediction_type="v_prediction", kernel=kernel, eta=0.6)
        output, sample = normal(3, 4, 2, seed=1), normal(3, 4, 2, seed=2)
        timesteps = scheduler.timesteps[[0, 4, 9]]
        following = torch.tensor([scheduler.next_timestep(t) for t in timesteps])
        together = scheduler.transition(output, sample, timesteps, following)
        for row, timestep in enumerate(timesteps.tolist()):
            alone = scheduler.transition(output[row : row + 1], sample[row : row + 1], timestep)
            torch.testing.assert_close(together.mean[row : row + 1], alone.mean)
            torch.testing.assert_close(together.std[row].flatten()[0], alone.std.flatten()[0])


# Gaussians


def gaussians() -> tuple[GaussianTransition, GaussianTransition]:
    std, other = torch.tensor([0.5, 1.7]).reshape(2, 1, 1), torch.tensor([0.8, 1.1]).reshape(2, 1, 1)
    return GaussianTransition(normal(2, 3, 4), std), GaussianTransition(normal(2, 3, 4, seed=1), other)


@pytest.mark.parametrize("masked", [False, True])
def test_log_prob_kl_and_entropy_equal_those_of_torch(masked: bool) -> None:
    p, q = gaussians()
    mask = torch.rand(2, 3, 4, generator=generator()) > 0.5 if masked else None
    counted = torch.ones(2, 3, 4) if mask is None else mask.float()
    ours, other, x = Normal(p.mean, p.std), Normal(q.mean, q.std), normal(2, 3, 4, seed=2)
    torch.testing.assert_close(p.log_prob(x, mask), (ours.log_prob(x) * counted).sum((1, 2)))
    torch.testing.assert_close(p.kl(q, mask), (kl_divergence(ours, other) * counted).sum((1, 2)))
    torch.testing.assert_close(p.entropy(mask), (ours.entropy() * counted).sum((1, 2)))


def test_a_mask_broadcasts() -> None:
    p, _ = gaussians()
    x, rows = normal(2, 3, 4, seed=2), torch.tensor([True, False, True])[None, :, None]
    torch.testing.assert_close(p.log_prob(x, rows), p.log_prob(x, rows.expand(2, 3, 4)))


def test_kl_equals_its_monte_carlo_estimate() -> None:
    p = GaussianTransition(torch.tensor([[0.3, -0.5]]), torch.tensor([[0.5]]))
    q = GaussianTransition(torch.tensor([[0.1, 0.2]]), torch.tensor([[0.8]]))
    x = p.sample(normal(400_000, 2))
    log_ratio = p.log_prob(x) - q.log_prob(x)
    error = float(log_ratio.std()) / math.sqrt(400_000)
    assert error < 0.01
    assert float(log_ratio.mean()) == pytest.approx(float(p.kl(q)), abs=4 * error)


def test_zero_std_has_neither_density_nor_gradient() -> None:
    mean = torch.zeros(2, 3, requires_grad=True)
    certain = GaussianTransition(mean, torch.zeros(2, 1))
    x = certain.sample(normal(2, 3))
    assert torch.equal(x, mean)
    for value in (certain.log_prob(x + 1), certain.kl(certain), certain.entropy()):
        assert value.tolist() == [0, 0]
    (certain.log_prob(x.detach() + 1) + certain.kl(GaussianTransition(mean + 1, torch.zeros(2, 1)))).sum().backward()
    assert mean.grad is not None
    assert not mean.grad.any()


def test_a_batch_may_mix_zero_and_positive_std() -> None:
    mean = torch.zeros(2, 3, requires_grad=True)
    transition = GaussianTransition(mean, torch.tensor([[0.0], [0.5]]))
    log_prob = transition.log_prob(torch.ones(2, 3))
    log_prob.sum().backward()
    # d/dmean of log N(1; 0, 0.5^2) = (1 - 0) / 0.25 = 4
    assert mean.grad is not None
    assert mean.grad.tolist() == [[0, 0, 0], [4, 4, 4]]
    expected = Normal(0.0, 0.5).log_prob(torch.tensor(1.0)) * 3
    torch.testing.assert_close(log_prob.detach(), torch.stack([torch.tensor(0.0), expected]))


# The exact score of Gaussian data

MEAN, STD = 0.5, 0.5


def exact_output(scheduler: TransitionScheduler, x: Tensor, timestep: int) -> Tensor:
    """What a perfect network returns for data `N(MEAN, STD^2)`: the posterior mean, as the scheduler's prediction."""
    at = scheduler.coefficients(timestep, x).to(x)
    gain = at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2)
    x0 = MEAN + gain * (x - at.alpha * MEAN)
    return prediction_target(x0, (x - at.alpha * x0) / at.sigma, at, scheduler.config.prediction_type)


def sampled_distribution(scheduler: TransitionScheduler, steps: int) -> tuple[float, float]:
    """Mean and std of the samples without any sampling error: with an exact score every step is affine in `x`."""
    scheduler.set_timesteps(steps)
    mean, variance = 0.0, scheduler.init_noise_sigma**2
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for timestep in scheduler.timesteps.tolist():
        transition = scheduler.transition(exact_output(scheduler, probe, timestep), probe, timestep)
        offset = float(transition.mean[0])
        slope = float(transition.mean[1]) - offset
        mean, variance = slope * mean + offset, slope**2 * variance + float(transition.std.max()) ** 2
    return mean, math.sqrt(variance)


# Kernel, eta, steps of each schedule for a std within 2 %. Euler's method in time, without noise, is refused
# where the variance explodes: it needs a thousand steps, and the ancestral kernel at eta 0 takes its own in sigma.
EXACT: list[tuple[str, float, dict[str, int]]] = [
    ("ancestral", 0.0, {"cosine": 100, "linear": 200, "flow": 100, "variance_exploding": 200}),
    ("ancestral", 1.0, {"cosine": 250, "linear": 500, "flow": 200, "variance_exploding": 400}),
    ("euler_maruyama", 0.0, {"cosine": 50, "linear": 100, "flow": 100}),
    ("euler_maruyama", 1.0, {"cosine": 50, "linear": 100, "flow": 50, "variance_exploding": 50}),
]


@pytest.mark.parametrize(
    ("kernel", "eta", "schedule", "steps"),
    [(kernel, eta, schedule, steps) for kernel, eta, table in EXACT for schedule, steps in table.items()],
)
def test_exact_score_reproduces_the_distribution(kernel: str, eta: float, schedule: str, steps: int) -> None:
    for prediction in [prediction for name, prediction in SAMPLING_PAIRS if name == schedule]:
        scheduler = TransitionScheduler(steps, schedule, prediction_type=prediction, kernel=kernel, eta=eta)
        mean, std = sampled_distribution(scheduler, steps)
        assert mean == pytest.approx(MEAN, abs=0.02)
        assert std == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "flow"])
@pytest.mark.parametrize(("kernel", "eta"), [("ancestral", 0.0), ("ancestral", 1.0), ("euler_maruyama", 1.0)])
def test_20_000_samples_reproduce_the_distribution(schedule: str, kernel: str, eta: float) -> None:
    steps = 500 if (schedule, kernel, eta) == ("linear", "ancestral", 1.0) else 250
    scheduler = TransitionScheduler(steps, schedule, prediction_type="v_prediction", kernel=kernel, eta=eta)
    source = generator(1)
    x = torch.randn((20_000, 4), generator=source) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps.tolist():
        x = scheduler.step(exact_output(scheduler, x, timestep), timestep, x, generator=source).prev_sample
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("schedule", NAMED)
@pytest.mark.parametrize(("kernel", "eta"), [("ancestral", 0.0), ("ancestral", 1.0), ("euler_maruyama", 1.0)])
def test_the_error_falls_at_least_at_first_order(schedule: str, kernel: str, eta: float) -> None:
    errors = []
    for steps in (100, 200, 400):
        scheduler = TransitionScheduler(steps, schedule, prediction_type="sample", kernel=kernel, eta=eta)
        errors.append(abs(sampled_distribution(scheduler, steps)[1] / STD - 1))
    for coarse, fine in itertools.pairwise(errors):
        assert fine < coarse / 1.8 or coarse < 1e-5


def test_few_steps_of_the_flow_sde_keep_the_std() -> None:
    """`g` is infinite at the start of a flow; a bound on 1 / alpha instead of the next level gave 8 times the std."""
    for steps, eta in itertools.product((5, 10, 20), (0.7, 1.0)):
        scheduler = TransitionScheduler(steps, "flow", prediction_type="velocity", kernel="euler_maruyama", eta=eta)
        assert sampled_distribution(scheduler, steps)[1] == pytest.approx(STD, rel=0.07)


# Recording


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )


def test_recording_inside_an_unmodified_diffusers_pipeline() -> None:
    scheduler = TransitionScheduler(20, "linear", clip_range=1.0)
    pipeline = DDPMPipeline(tiny_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    with scheduler.record() as trajectory:
        images = pipeline(batch_size=3, generator=generator(), num_inference_steps=5, output_type="np").images
    assert images.shape == (3, 8, 8, 1)
    assert trajectory.timesteps == [19, 15, 11, 7, 3]
    assert trajectory.next_timesteps == [15, 11, 7, 3, -1]
    assert trajectory.stochastic_steps == [0, 1, 2, 3]
    assert len(trajectory) == 5
    for step, timestep in enumerate(trajectory.timesteps):
        x_t, x_s = trajectory.latents[step], trajectory.next_latents[step]
        with torch.no_grad():
            output = pipeline.unet(x_t, timestep).sample
        transition = scheduler.transition(output, x_t, timestep, trajectory.next_timesteps[step])
        assert torch.equal(transition.log_prob(x_s), trajectory.log_probs[step])
        assert step == 4 or torch.equal(trajectory.latents[step + 1], x_s)
    assert trajectory.log_probs[-1].tolist() == [0, 0, 0]
    finished = (trajectory.next_latents[-1] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(images, finished)


def test_a_list_has_one_generator_per_sample() -> None:
    pipeline = DDPMPipeline(tiny_unet(), TransitionScheduler(20, "linear", clip_range=1.0))
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"num_inference_steps": 3, "output_type": "np"}
    both = pipeline(batch_size=2, generator=[generator(1), generator(2)], **arguments).images
    second = pipeline(batch_size=1, generator=generator(2), **arguments).images
    np.testing.assert_allclose(both[1], second[0], atol=1e-5)
    assert not np.allclose(both[0], both[1])


@pytest.mark.parametrize("kernel", ["ancestral", "euler_maruyama"])
@pytest.mark.parametrize("schedule", NAMED)
def test_recomputed_log_probs_equal_recorded_ones_bit_for_bit(schedule: str, kernel: str) -> None:
    scheduler = TransitionScheduler(20, schedule, prediction_type="v_prediction", kernel=kernel, eta=0.8)
    scheduler.set_timesteps(7)
    torch.manual_seed(0)
    network, mask = torch.nn.Linear(3, 3), torch.rand(6, 4, 3, generator=generator()) > 0.3
    x = torch.randn((6, 4, 3), generator=generator()) * scheduler.init_noise_sigma
    source = generator(1)
    with scheduler.record(mask) as trajectory, torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t)), t, x, generator=source).prev_sample
    for step, t in enumerate(trajectory.timesteps):
        x_t, x_s = trajectory.latents[step], trajectory.next_latents[step]
        output = network(scheduler.scale_model_input(x_t, t))
        log_prob = scheduler.transition(output, x_t, t, trajectory.next_timesteps[step]).log_prob(x_s, mask)
        assert torch.equal(log_prob, trajectory.log_probs[step])
        assert log_prob.requires_grad or trajectory.stds[step] == 0
        assert torch.isfinite(log_prob).all()


def test_nothing_is_kept_outside_the_block_and_recording_does_not_nest() -> None:
    scheduler = TransitionScheduler(4)
    x = normal(2, 3)
    with scheduler.record() as trajectory:
        with pytest.raises(RuntimeError, match="already recording"), scheduler.record():
            pass
        scheduler.step(x, 3, x)
    scheduler.step(x, 2, x)
    assert trajectory.timesteps == [3]
    with pytest.raises(ZeroDivisionError), scheduler.record():
        raise ZeroDivisionError
    with scheduler.record() as second:
        scheduler.step(x, 1, x)
    assert second.timesteps == [1]


def test_a_seed_fixes_a_step_and_eta_0_draws_nothing() -> None:
    scheduler, x = TransitionScheduler(10), normal(2, 3)
    first, again, other = (scheduler.step(x, 5, x, generator=generator(seed)).prev_sample for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    source = generator()
    before = source.get_state()
    (sample,) = scheduler.step(x, 5, x, eta=0.0, generator=source, return_dict=False)
    assert torch.equal(source.get_state(), before)
    assert torch.equal(sample, scheduler.transition(x, x, 5, eta=0.0).mean)


# Configuration


def test_save_and_load(tmp_path: Path) -> None:
    scheduler = TransitionScheduler(
        30, "cosine", {"min_alpha_bar": 0.01}, "v_prediction", "euler_maruyama", eta=1.4, clip_range=2.0
    )
    scheduler.save_pretrained(tmp_path)
    loaded = TransitionScheduler.from_pretrained(tmp_path)
    kept = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    assert {name: value for name, value in loaded.config.items() if not name.startswith("_")} == kept
    output, sample = normal(2, 3, seed=1), normal(2, 3)
    for timestep in scheduler.timesteps:
        ours, theirs = scheduler.transition(output, sample, timestep), loaded.transition(output, sample, timestep)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.std, theirs.std)
    assert len(loaded) == 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"schedule": "sine"},
            "`schedule` must be one of cosine, linear, variance_exploding, flow, tabulated; got 'sine'",
        ),
        ({"prediction_type": "noise"}, "`prediction_type` must be one of epsilon, sample,"),
        ({"kernel": "heun"}, "`kernel` must be one of ancestral, euler_maruyama, dpm_solver_2m; got 'heun'"),
        ({"num_train_timesteps": 0}, "`num_train_timesteps` must be at least 1, got 0"),
        ({"eta": 1.5}, r"`eta` must lie in \[0, 1\] for the ancestral kernel"),
        ({"eta": -0.1, "kernel": "euler_maruyama"}, "`eta` must lie in"),
        ({"eta": float("nan")}, "`eta` must lie in"),
        ({"clip_range": 0.0}, "`clip_range` must be positive or None, got 0.0"),
        ({"schedule_options": {"beta_min": 1.0}}, "`schedule_options` of 'cosine' are min_alpha_bar, offset; got beta"),
        (
            {"schedule": "flow", "prediction_type": "velocity", "schedule_options": {"bend": 3.0}},
            "`schedule_options` of 'flow' are shift; got bend",
        ),
        ({"schedule": "flow", "prediction_type": "epsilon"}, "'flow': use 'velocity', 'v_prediction' or 'sample'"),
        ({"schedule": "flow", "prediction_type": "score"}, "`prediction_type` 'score' says nothing of x_0"),
        (
            {"schedule": "variance_exploding", "kernel": "euler_maruyama", "eta": 0.0},
            "use kernel 'ancestral' with `eta` 0",
        ),
    ],
)
def test_invalid_configurations_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionScheduler(**config)


def test_steps_that_do_not_exist_are_refused() -> None:
    scheduler = TransitionScheduler(10)
    for steps in (0, 11):
        with pytest.raises(ValueError, match=rf"`num_inference_steps` must lie in 1..10, .* got {steps}\. Use fewer"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(5)
    x = normal(2, 3)
    for timestep in (8, 10, -1, 7.5):
        with pytest.raises(ValueError, match=rf"`timestep` {timestep} is not one of the 5 inference steps \[9, 7, 5"):
            scheduler.step(x, timestep, x)


@pytest.mark.parametrize(
    ("schedule", "prediction_type", "kernel", "eta"),
    [
        ("cosine", "epsilon", "ancestral", 1.0),
        ("linear", "v_prediction", "euler_maruyama", 0.7),
        ("flow", "velocity", "ancestral", 0.0),
        ("variance_exploding", "v_prediction", "ancestral", 0.5),
    ],
)
def test_numbers_that_are_kept_are_those_of_each_sample(
    schedule: str, prediction_type: str, kernel: str, eta: float
) -> None:
    """A number goes through what was computed once, a timestep per sample through what is computed anew."""
    scheduler = TransitionScheduler(20, schedule, prediction_type=prediction_type, kernel=kernel, eta=eta)
    scheduler.set_timesteps(5)
    for dtype in (torch.float32, torch.float64, torch.float32):
        output, sample = normal(3, 4, 2, seed=1).to(dtype), normal(3, 4, 2, seed=2).to(dtype)
        for timestep in scheduler.timesteps.tolist():
            each, following = torch.full((3,), timestep), torch.full((3,), scheduler.next_timestep(timestep))
            kept = scheduler.transition(output, sample, timestep)
            anew = scheduler.transition(output, sample, each, following)
            assert kept.mean.dtype == dtype
            assert torch.equal(kept.mean, anew.mean)
            assert torch.equal(kept.std.expand(3), anew.std.expand(3, 1, 1).flatten())
            scaled = scheduler.scale_model_input(sample, timestep)
            assert torch.equal(scaled, scheduler.scale_model_input(sample, each))


def test_numbers_kept_while_acting_serve_training() -> None:
    scheduler = TransitionScheduler(10)
    output, sample = normal(2, 3, seed=1), normal(2, 3, seed=2)
    with torch.inference_mode():
        scheduler.transition(output, sample, 5)
    output.requires_grad_()
    scheduler.transition(output, sample, 5).log_prob(sample).sum().backward()
    assert output.grad is not None
