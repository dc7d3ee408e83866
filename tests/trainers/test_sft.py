"""SFT: the variational bound against known densities, the hard filter, and its iteration."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from dmc_hub.data import Episodes
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer, negative_elbo

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {
    "output_dir": None,
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "num_conditions": 16,
    "num_candidates": 2,
    "likelihood": "elbo",
}
SCHEDULES = ["cosine", "linear", "variance_exploding", "flow"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bound(pipeline: Any, x0: Tensor, num_levels: int) -> Tensor:
    condition = pipeline.observation_condition(torch.zeros(len(x0), 3))
    return negative_elbo(pipeline, x0, condition, num_levels=num_levels, generator=seeded(1))


@pytest.mark.parametrize(
    ("schedule", "options"), [*((schedule, {}) for schedule in SCHEDULES), ("cosine", {"min_alpha_bar": 0.3})]
)
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_the_bound_is_that_of_the_training_levels_for_gaussian_data(
    std: float, schedule: str, options: dict[str, float], make_gaussian_policy: MakePipeline
) -> None:
    """Data of N(0, c^2) under the exact denoiser: the mean squared error at t is `c^2 / (1 + c^2 snr)`; the entropy,
    `log(2 pi e c^2) / 2` nats per entry, lies below."""
    settings = {"schedule": schedule, "schedule_options": options, "num_train_timesteps": 1000}
    pipeline = make_gaussian_policy(std, horizon=2, **settings)
    x0 = std * torch.randn(4000, 2, 1, generator=seeded())
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma, _, _ = pipeline.scheduler.noise_schedule(t)
    snr = alpha**2 / sigma**2
    chain = 0.5 * ((snr[:-1] - snr[1:]) * std**2 / (1 + std**2 * snr[1:])).sum()
    noise = math.sqrt(float(alpha[-1] ** 2 + sigma[-1] ** 2))
    prior = kl_divergence(Normal(float(alpha[-1]) * x0.flatten(), float(sigma[-1])), Normal(0.0, noise)).mean()
    first = Normal(0.0, float(sigma[0] / alpha[0])).entropy()
    expected = float(chain + prior + first)
    assert 0 < expected - 0.5 * math.log(2 * math.pi * math.e * std**2) < 2
    assert float(bound(pipeline, x0, 100).mean()) == pytest.approx(expected, abs=0.05)
    assert float(bound(pipeline, x0, 10).mean()) == pytest.approx(expected, abs=0.2)


def test_the_bound_is_the_density_pointwise(make_gaussian_policy: MakePipeline) -> None:
    """Of two samples the difference is that of their log-densities, `x^2 / 2` under N(0, 1)."""
    pipeline = make_gaussian_policy(1.0, num_train_timesteps=2000)
    at_zero, *others = (float(bound(pipeline, torch.full((2000, 1, 1), x), 200).mean()) for x in (0.0, 1.0, 2.5))
    for value, found in zip((1.0, 2.5), others, strict=True):
        assert found - at_zero == pytest.approx(0.5 * value**2, rel=0.1)


def test_fixed_entries_are_conditioned_on(make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline("planner")
    condition = pipeline.observation_condition(torch.zeros(8, 3))
    x0 = torch.randn(8, 4, 4, generator=seeded())
    found = [
        negative_elbo(pipeline, each, condition, num_levels=5, generator=seeded())
        for each in (x0, torch.where(condition["mask"], 9.0, x0))
    ]
    assert torch.equal(*found)
    assert found[0].shape == (8,)


def test_samples_less_likely_than_the_data_are_rejected(make_gaussian_policy: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_gaussian_policy(1.0)
    trainer = SFTTrainer(
        pipeline,
        SFTConfig(**{**SMALL, "num_conditions": 400, "num_likelihood_levels": 30, "likelihood_quantile": 0.9}),
        train_dataset=episodes,
        reward_function=lambda observations, actions: actions[:, 0, 0].abs(),
        peft_config=LoraConfig(r=1),
    )
    buffer = trainer.collect(seeded())
    size = buffer["samples"][:, 0, 0].abs()
    assert size[~buffer["accepted"]].mean() > size[buffer["accepted"]].mean() + 0.5
    assert buffer["accepted"][size > 2.5].float().mean() < 0.3
    assert buffer["accepted"][size < 1].float().mean() > 0.85
    assert 0.05 < 1 - float(buffer["accepted"].float().mean()) < 0.6
    drawn = trainer.draw(buffer, 0, seeded())
    assert drawn["accepted"].all()
    assert set(trainer._drain_metrics()) >= {"rejected_share", "unlikeliness"}


def test_the_foundation_is_asked_for_the_likelihood(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("planner")
    trainer = SFTTrainer(
        pipeline,
        SFTConfig(**SMALL),
        train_dataset=episodes,
        peft_config=LoraConfig(r=4, init_lora_weights=False),
    )
    x0, condition = pipeline.encode(trainer.source.windows.gather(torch.arange(8)))
    levels = trainer.args.num_likelihood_levels
    adapted = negative_elbo(pipeline, x0, condition, num_levels=levels, generator=seeded())
    with pipeline.lora_disabled():
        expected = negative_elbo(pipeline, x0, condition, num_levels=levels, generator=seeded())
    assert torch.equal(trainer._unlikeliness(x0, condition, seeded()), expected)
    assert not torch.allclose(adapted, expected)


def test_it_iterates_on_what_the_controller_has_become(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """The same noise at the same conditions: the second buffer differs from the foundation's by the training alone."""
    changes = []
    for from_reference in (True, False):
        settings = {"steps_per_buffer": 2, "max_steps": 2, "learning_rate": 0.1, "likelihood": "denoising_error"}
        trainer = SFTTrainer(
            make_pipeline("planner"),
            SFTConfig(**{**SMALL, **settings}, sample_from_reference=from_reference),
            train_dataset=episodes,
            peft_config=LoraConfig(r=4),
        )
        first = trainer.collect(seeded())
        trainer.train()
        trainer.micro_step = 2
        assert not torch.equal(trainer.make_batch(seeded(5))["samples"], trainer.make_batch(seeded(6))["samples"])
        changes.append(not torch.equal(trainer.collect(seeded())["samples"], first["samples"]))
    assert changes == [False, True]


def test_an_unknown_likelihood_is_refused() -> None:
    with pytest.raises(ValueError, match="`likelihood` must be one of denoising_error, elbo; got 'exact'"):
        SFTConfig(**{**SMALL, "likelihood": "exact"})
