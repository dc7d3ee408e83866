"""The schedule given by a table steps as diffusers' DDPM and DDIM schedulers do, at every number of steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from dmc_hub.scheduler import TabulatedSchedule, TransitionScheduler

BETAS: list[dict[str, Any]] = [
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 1e-3, "beta_end": 0.1},
]


def tabulated(stock: DDPMScheduler | DDIMScheduler, spacing: str, **options: Any) -> TransitionScheduler:
    table = stock.alphas_cumprod.double().tolist()
    return TransitionScheduler(
        len(table), "tabulated", {"alpha_bars": table, "timestep_spacing": spacing}, **{"clip_range": 1.0, **options}
    )


@pytest.mark.parametrize("betas", BETAS, ids=lambda betas: betas["beta_schedule"])
@pytest.mark.parametrize("steps", [50, 10, 7])
@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_every_step_is_that_of_diffusers(betas: dict[str, Any], steps: int, kind: str) -> None:
    if kind == "DDPM":
        stock, ours = (made := DDPMScheduler(50, **betas)), tabulated(made, "leading")
    else:  # where it clips, DDIM keeps the direction of the unclipped noise
        stock = DDIMScheduler(50, clip_sample=False, **betas)
        ours = tabulated(stock, "leading", eta=0.0, clip_range=None)
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for timestep in stock.timesteps.tolist():
        output = torch.randn(4, 3, generator=torch.Generator().manual_seed(timestep))
        noise = [torch.Generator().manual_seed(timestep) for _ in range(2)]
        expected = stock.step(output, timestep, x, generator=noise[0], return_dict=False)[0]
        actual = ours.step(output, timestep, x, generator=noise[1], return_dict=False)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        x = expected


def test_trailing_steps_start_at_the_noisiest_level() -> None:
    scheduler = tabulated(DDPMScheduler(50), "trailing")
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [49, 39, 29, 19, 9]


def test_noised_data_are_those_of_diffusers() -> None:
    stock = DDPMScheduler(50, beta_schedule="squaredcos_cap_v2")
    x0, noise = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0))
    levels = torch.arange(50)
    torch.testing.assert_close(
        tabulated(stock, "leading").add_noise(x0, noise, levels), stock.add_noise(x0, noise, levels)
    )


def test_derivatives_match_autograd_between_levels() -> None:
    schedule = TabulatedSchedule((0.9, 0.5, 0.01))
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = schedule(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=torch.float64))
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        torch.testing.assert_close(derivative, torch.autograd.grad(value.sum(), t, retain_graph=True)[0])


def test_levels_are_those_of_the_table() -> None:
    schedule = TabulatedSchedule((0.9, 0.5, 0.01))
    alpha, _, _, _ = schedule(torch.tensor([0, 1 / 3, 2 / 3, 1], dtype=torch.float64))
    torch.testing.assert_close(alpha**2, torch.tensor([1, 0.9, 0.5, 0.01], dtype=torch.float64))


def test_saved_table_loads_to_the_same_steps(tmp_path: Path) -> None:
    scheduler = tabulated(DDPMScheduler(50), "leading")
    scheduler.save_pretrained(tmp_path)
    loaded = TransitionScheduler.from_pretrained(tmp_path)
    assert loaded.noise_schedule == scheduler.noise_schedule


@pytest.mark.parametrize(
    ("levels", "options", "message"),
    [
        (3, {"alpha_bars": [0.9, 0.5]}, "`alpha_bars` has 2 levels, but `num_train_timesteps` is 3"),
        (2, {"alpha_bars": [0.5, 0.9]}, "must be falling numbers"),
        (2, {"alpha_bars": [0.5, 0.0]}, "must be falling numbers"),
        (1, {}, "must be falling numbers"),
        (1, {"alpha_bars": [0.5], "timestep_spacing": "linspace"}, "must be one of trailing, leading"),
    ],
)
def test_impossible_tables_are_refused(levels: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransitionScheduler(levels, "tabulated", options)


@pytest.mark.parametrize("ends_clean", [True, False])
@pytest.mark.parametrize("steps", [10, 7, 25])
def test_stable_diffusions_offset_and_end_are_those_of_diffusers(steps: int, ends_clean: bool) -> None:
    stock = DDIMScheduler(50, clip_sample=False, steps_offset=1, set_alpha_to_one=ends_clean, **BETAS[2])
    table = stock.alphas_cumprod.double().tolist()
    options = {"alpha_bars": table, "timestep_spacing": "leading", "steps_offset": 1, "ends_clean": ends_clean}
    ours = TransitionScheduler(50, "tabulated", options, eta=0.0)
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for timestep in stock.timesteps.tolist():
        output = torch.randn(4, 3, generator=torch.Generator().manual_seed(timestep))
        expected = stock.step(output, timestep, x, return_dict=False)[0]
        actual = ours.step(output, timestep, x, return_dict=False)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        x = expected


def test_steps_past_the_noisiest_level_are_refused() -> None:
    scheduler = TransitionScheduler(
        4, "tabulated", {"alpha_bars": [0.9, 0.8, 0.5, 0.1], "timestep_spacing": "leading", "steps_offset": 1}
    )
    assert scheduler.timesteps.tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match="`num_inference_steps` 4 with `steps_offset` 1 starts past the noisiest"):
        scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`steps_offset` must be 0"):
        TransitionScheduler(1, "tabulated", {"alpha_bars": [0.5], "steps_offset": 1})
