"""Diffusion-DPO: weightings, consistent pairs, pairs from the data, and its losses on a small real problem."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dmc_hub.data import Episodes
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.pipelines import DiffusionPolicyPipeline
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {
    "output_dir": None,
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "num_conditions": 16,
    "num_candidates": 4,
    "lr_scheduler_type": "constant",
}


def first_action(observations: Tensor, actions: Tensor) -> Tensor:
    return actions[:, 0, 0]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_trainer(pipeline: Any, episodes: Episodes, reward: Any = first_action, **settings: Any) -> DiffusionDPOTrainer:
    return DiffusionDPOTrainer(
        pipeline,
        DiffusionDPOConfig(**{**SMALL, **settings}),
        train_dataset=episodes,
        reward_function=reward,
        peft_config=LoraConfig(r=4, lora_alpha=8, init_lora_weights=False),
    )


@pytest.fixture
def distinct(episodes: Episodes) -> Episodes:
    """The same data without equal states, of which the walls make many, and equal rewards there."""
    rng = np.random.default_rng(0)
    changed = {
        name: (values + rng.normal(0, 3e-3, values.shape)).astype(np.float32)
        for name, values in vars(episodes).items()
        if name in ("observations", "rewards")
    }
    return Episodes(**{**vars(episodes), **changed})


def make_chunk_policy(pipeline: Any) -> DiffusionPolicyPipeline:
    """A policy of four actions with the other parts of a policy of one."""
    denoiser = DiffusionTransformer1D(1, 3, dim=32, num_heads=2, depth=1, timestep_dim=16)
    torch.nn.init.normal_(denoiser.head.weight)
    parts = {name: pipeline.components[name] for name in ("scheduler", "normalizer", "critic")}
    return DiffusionPolicyPipeline(denoiser, **parts, horizon=4, num_inference_steps=5)


@pytest.mark.parametrize("weighting", ["snr_clip", "constant", "snr"])
def test_weightings_are_on_noise_errors(weighting: str, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("planner")
    trainer = make_trainer(pipeline, episodes, weighting=weighting, snr_clip=3.0)
    batch = trainer.make_batch(seeded())
    condition = {"values": batch["condition.values"], "mask": batch["condition.mask"]}
    t = batch["timesteps"]
    at = pipeline.scheduler.coefficients(t, batch["noise"])
    snr = (at.alpha**2 / at.sigma**2).flatten()
    omega = {"snr_clip": snr.clamp(max=3.0) / snr, "constant": torch.ones_like(snr), "snr": snr}[weighting]
    assert (snr > 3).any()
    assert (snr < 3).any()
    for member in (0, 1):
        x_t = pipeline.scheduler.add_noise(batch["samples"][:, member], batch["noise"], t)
        _, noise = pipeline.scheduler.predict(pipeline.predict(x_t, t, condition), x_t, t)
        square = torch.where(condition["mask"], 0, (noise - batch["noise"]) ** 2).flatten(1).sum(1)
        expected = omega.to(square) * square
        torch.testing.assert_close(trainer._noise_errors(batch)[:, member], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_denoising_can_be_resumed_in_the_middle(controller: str, make_pipeline: MakePipeline) -> None:
    pipeline = make_pipeline(controller, eta=0.0)
    if controller == "policy":
        pipeline = make_chunk_policy(pipeline)
    condition = pipeline.observation_condition(torch.zeros(3, 3))
    with torch.no_grad(), pipeline.scheduler.record() as trajectory:
        whole = pipeline.sample(condition, generator=seeded())
    for done in (1, 4):
        with torch.no_grad():
            rest = pipeline.sample(condition, generator=seeded(1), resume=(trajectory.next_latents[done - 1], done))
        torch.testing.assert_close(rest, whole)


def test_a_shared_latent_correlates_candidates_as_much_as_it_says(
    make_gaussian_policy: MakePipeline, episodes: Episodes
) -> None:
    """For data of N(0, 1), `Cov(x_0, x_0' | z_t shared) = Var E[x_0 | z_t] = alpha_t^2`."""
    pipeline = make_gaussian_policy(1.0)
    for fraction in (0.4, 0.7):
        settings = {"pair_consistency": "shared_latent", "shared_fraction": fraction, "num_conditions": 4000}
        trainer = make_trainer(pipeline, episodes, num_candidates=3, **settings)
        with torch.no_grad():
            samples, _ = trainer.candidates(trainer.conditions(4000, seeded()), seeded(1))
        alpha, _, _, _ = pipeline.scheduler.noise_schedule(torch.tensor(1 - fraction, dtype=torch.float64))
        correlation = np.corrcoef(samples[:, :, 0, 0].numpy(), rowvar=False)
        for first, second in ((0, 1), (1, 2)):
            assert correlation[first, second] == pytest.approx(float(alpha) ** 2, abs=0.06)
        assert 0.1 < float(alpha) ** 2 < 0.9


def test_denoising_goes_on_at_the_noise_level_that_was_shared(
    make_gaussian_policy: MakePipeline, episodes: Episodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of N(0, 0.1^2): a latent's standard deviation tells its level."""
    pipeline = make_gaussian_policy(0.1)
    settings = {"pair_consistency": "shared_latent", "num_inference_steps": 10, "num_candidates": 2}
    trainer = make_trainer(pipeline, episodes, **settings)
    calls: list[dict[str, Any]] = []
    sample = pipeline.sample

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(kwargs)
        return sample(*args, **kwargs)

    monkeypatch.setattr(pipeline, "sample", recorded)
    with torch.no_grad():
        trainer.candidates(trainer.conditions(8000, seeded()), seeded(1))
    latents, done = calls[1]["resume"]
    alpha, sigma, _, _ = pipeline.scheduler.noise_schedule(torch.tensor(0.5, dtype=torch.float64))
    assert done == 5
    assert float(latents.std()) == pytest.approx(math.sqrt(0.01 * float(alpha) ** 2 + float(sigma) ** 2), rel=0.04)


def test_candidates_differ_also_where_no_noise_follows_the_shared_latent(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    for options, fraction in (({"eta": 0.0}, 0.5), ({}, 0.99)):  # the last step of an ancestral sampler has no noise
        pipeline = make_pipeline("policy", **options)
        pipeline.normalizer.register_to_config(mode="gaussian")  # nothing is clamped
        trainer = make_trainer(pipeline, episodes, pair_consistency="shared_latent", shared_fraction=fraction)
        with torch.no_grad():
            samples, _ = trainer.candidates(trainer.conditions(50, seeded()), seeded(1))
        assert bool((samples.flatten(2).std(1) > 0).all())


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_a_shared_part_is_contiguous_equal_and_does_not_count(
    controller: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    pipeline = make_pipeline(controller)
    if controller == "policy":
        pipeline = make_chunk_policy(pipeline)
    settings = {"pair_consistency": "shared_part", "loss_type": "listwise", "num_conditions": 64}
    trainer = make_trainer(pipeline, episodes, per_device_train_batch_size=64, **settings)
    batch = trainer.make_batch(seeded())
    mask = batch["condition.mask"]
    is_shared = mask.all(2)
    assert is_shared.sum(1).tolist() == [2] * 64
    assert {tuple(row.nonzero().flatten().diff().tolist()) for row in is_shared} == {(1,)}
    assert len({tuple(row.tolist()) for row in is_shared}) == 3  # it starts at step 0, 1 or 2
    spread = (batch["samples"] - batch["samples"][:, :1]).abs().amax(1)
    assert spread[mask].max() < 1e-5
    assert spread[~mask].max() > 0.1
    condition = {name.removeprefix("condition."): value for name, value in batch.items() if "condition." in name}
    x_t = pipeline.scheduler.add_noise(batch["samples"][:, 1], batch["noise"], batch["timesteps"])
    clean = pipeline.predict(x_t, batch["timesteps"], condition)  # these schedulers predict the sample
    at = pipeline.scheduler.coefficients(batch["timesteps"], clean)
    weight = (at.alpha / at.sigma).pow(2).flatten().clamp(max=5).to(clean)
    square = torch.where(mask, 0, (clean - batch["samples"][:, 1]) ** 2).flatten(1).sum(1)
    torch.testing.assert_close(trainer._noise_errors(batch)[:, 1], weight * square, rtol=1e-4, atol=1e-4)


def test_a_policy_is_in_painted_with_values_of_the_right_noise(make_gaussian_policy: MakePipeline) -> None:
    pipeline = make_gaussian_policy(1.0, horizon=2)
    condition = pipeline.observation_condition(torch.zeros(2000, 3))
    values, mask = torch.full((2000, 2, 1), 0.7), torch.zeros(2000, 2, 1, dtype=torch.bool)
    mask[:, 0] = True
    fixed = pipeline.fix_entries(condition, values, mask)
    with torch.no_grad(), pipeline.scheduler.record() as trajectory:
        samples = pipeline.sample(fixed, num_inference_steps=10, generator=seeded())
    torch.testing.assert_close(samples[:, 0], values[:, 0])
    assert 0.8 < float(samples[:, 1].std()) < 1.1
    for latents, timestep in zip(trajectory.latents, trajectory.timesteps, strict=True):
        at = pipeline.scheduler.coefficients(timestep, latents)
        assert float(latents[:, 0].mean()) == pytest.approx(0.7 * float(at.alpha), abs=0.1)
        assert float(latents[:, 0].std()) == pytest.approx(float(at.sigma), rel=0.06)


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("preference", ["reward", "return"])
def test_pairs_from_data_are_the_best_and_worst_of_the_nearest_windows(
    controller: str, preference: str, make_pipeline: MakePipeline, distinct: Episodes
) -> None:
    pipeline = make_pipeline(controller)
    settings = {"pairs": "data", "preference": preference, "num_candidates": 5, "max_pair_distance": 0.01}
    trainer = make_trainer(pipeline, distinct, num_conditions=40, **settings)
    buffer = trainer.collect(seeded())
    windows = trainer.source.windows
    everything = windows.gather(np.arange(len(windows)))
    latents, _ = pipeline.encode(everything)
    states = pipeline.normalizer.normalize_observations(everything["observations"][:, 0])
    scores = everything["rewards"].sum(1) if preference == "return" else everything["actions"][:, 0, 0]
    found = 0
    for row, anchor in enumerate(torch.randint(len(windows), (40,), generator=seeded()).tolist()):
        distance = (states - states[anchor]).abs().amax(1)
        nearest = [index for index in distance.argsort(stable=True)[:5].tolist() if distance[index] < 0.01]
        values = scores[nearest]
        torch.testing.assert_close(buffer["rewards"][row], torch.stack([values.max(), values.min()]))
        for member, index in enumerate((values.argmax(), values.argmin())):
            assert torch.equal(buffer["samples"][row, member], latents[nearest[int(index)]])
        context = "values" if controller == "planner" else "embedding"
        assert torch.equal(buffer[f"condition.{context}"][row].flatten()[:3], states[anchor])
        found += len(nearest) > 1
    assert 10 < found < 40


def test_windows_without_neighbours_are_no_pairs(make_pipeline: MakePipeline, distinct: Episodes) -> None:
    trainer = make_trainer(make_pipeline("policy"), distinct, pairs="data", max_pair_distance=1e-9)
    with pytest.raises(
        ValueError, match="No window has a neighbour of another reward within `max_pair_distance` 1e-09"
    ):
        trainer.make_batch(seeded())
    settings = {"pairs": "data", "max_pair_distance": 0.01, "num_conditions": 64, "num_candidates": 6}
    trainer = make_trainer(make_pipeline("policy"), distinct, loss_type="listwise", **settings)
    batch = trainer.make_batch(seeded())
    alone = batch["rewards"].isinf()
    assert alone.any()
    assert not alone[:, 0].any()
    loss = trainer.compute_loss(trainer.model, batch)
    samples = torch.where(alone[:, :, None, None], 7.0, batch["samples"])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, {**batch, "samples": samples}), loss)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "listwise"])
def test_equal_rewards_prefer_nothing(loss_type: str, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(
        make_pipeline("planner"), episodes, lambda observations, actions: torch.ones(len(actions)), loss_type=loss_type
    )
    trainer.train()
    assert trainer.history[0]["grad_norm"] == 0.0


VARIANTS: dict[str, dict[str, Any]] = {
    "ipo": {"loss_type": "ipo", "beta": 0.3},
    "listwise": {"loss_type": "listwise", "beta": 3.0},
    "data": {"pairs": "data"},
    "shared_latent": {"pair_consistency": "shared_latent", "shared_fraction": 0.2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_raises_the_reward(name: str, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    foundation: dict[str, Any] = {"max_steps": 100, "learning_rate": 3e-3, "output_dir": None, "disable_tqdm": True}
    DenoisingTrainer(pipeline, DenoisingConfig(**foundation), train_dataset=episodes).train()
    before = np.mean(pipeline(episodes.observations[:256], generator=0).action)
    settings = {"max_steps": 30, "per_device_train_batch_size": 64, "num_conditions": 64, "learning_rate": 3e-3}
    DiffusionDPOTrainer(
        pipeline,
        DiffusionDPOConfig(**{**SMALL, **settings, **VARIANTS[name]}),
        train_dataset=episodes,
        reward_function=first_action,
        peft_config=LoraConfig(r=4, lora_alpha=8),
    ).train()
    assert np.mean(pipeline(episodes.observations[:256], generator=0).action) > before + 0.2


@pytest.mark.parametrize("settings", [{"pairs": "data"}, {"pair_consistency": "shared_part"}], ids=str)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    settings: dict[str, Any], make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings = {**settings, "loss_type": "listwise", "steps_per_buffer": 2, "max_steps": 5, "learning_rate": 1e-2}
    saving = {**settings, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    whole, first, resumed = (make_pipeline("planner") for _ in range(3))
    make_trainer(whole, episodes, **settings).train()
    make_trainer(first, episodes, **{**saving, "max_steps": 3}).train()
    make_trainer(resumed, episodes, **saving).train(resume_from_checkpoint=True)
    found = resumed.denoiser.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in whole.denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "elbo"}, "`weighting` must be one of snr_clip, constant, snr; got 'elbo'"),
        ({"loss_type": "hinge"}, "`loss_type` must be one of sigmoid, ipo, listwise; got 'hinge'"),
        ({"shared_fraction": 1.0}, r"`shared_fraction` must lie between 0 and 1, got 1\.0"),
        ({"max_pair_distance": 0.0}, r"`max_pair_distance` must be positive, got 0\.0"),
        ({"preference": "return"}, "`preference` 'return' needs logged rewards: set `pairs` to 'data'"),
        ({"pairs": "data", "pair_consistency": "shared_part"}, "are about sampled pairs"),
        ({"pairs": "data", "sample_from_reference": True}, "are about sampled pairs"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(**{**SMALL, **settings})


def test_consistency_must_fit_the_controller(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    with pytest.raises(ValueError, match="'shared_part' needs a horizon of at least 2"):
        make_trainer(make_pipeline("policy"), episodes, pair_consistency="shared_part")
