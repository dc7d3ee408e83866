"""The cascade's trainer: which pairs it makes, that it learns from them, and the other methods on the up-sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import Tensor

from dmc_hub import DiffusionPolicyPipeline, commands
from dmc_hub.arguments import CascadeArguments
from dmc_hub.checkpoint import CheckpointError
from dmc_hub.data import Episodes
from dmc_hub.presets import SAMPLERS
from dmc_hub.scheduler import TransitionScheduler
from dmc_hub.trainers.cascade import CascadeConfig, CascadeTrainer, warm_start_upsampler
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import NoSamplesLeftError, SFTConfig, SFTTrainer

MakePipeline = Callable[..., Any]
QUIET: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "logging_steps": 1}
SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_conditions": 16,
    "num_candidates": 4,
    "steps_per_buffer": 4,
}
LORA = LoraConfig(r=4, lora_alpha=8)


def near(observations: Tensor, actions: Tensor) -> Tensor:
    """A reward with a known best action: 0.8 everywhere."""
    return -(actions[:, 0, 0] - 0.8).abs()


def make_trainer(pipeline: Any, episodes: Episodes, reward: Any = near, **settings: Any) -> CascadeTrainer:
    config = CascadeConfig(**{**QUIET, "max_steps": 1, **SMALL, **settings})
    return CascadeTrainer(pipeline, config, train_dataset=episodes, reward_function=reward)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def untrained_but_random(pipeline: Any) -> Any:
    """An untrained transformer gives one action only, and equal rewards make no pair."""
    source = generator(5)
    with torch.no_grad():
        for parameter in pipeline.denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    return pipeline


def state(module: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- Pairs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("controller", "consistency"),
    [("policy", "shared_latent"), ("planner", "shared_latent"), ("planner", "shared_part")],
)
def test_in_every_pair_the_target_earns_more_than_the_draft(
    controller: str, consistency: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    pipeline = untrained_but_random(make_pipeline(controller))
    trainer = make_trainer(pipeline, episodes, pair_consistency=consistency)
    batch = trainer.make_batch(generator())
    condition = {name.removeprefix("condition."): value for name, value in batch.items() if "condition." in name}
    gaps = trainer.rewards(batch["targets"], condition) - trainer.rewards(batch["drafts"], condition)
    assert float(gaps.min()) > 0
    if controller == "planner":  # the same start
        for name in ("targets", "drafts"):
            assert torch.equal(batch[name][:, 0, :3], condition["values"][:, 0, :3])
    candidates = trainer._buffer["samples"]
    for row, (target, draft) in enumerate(zip(batch["targets"], batch["drafts"], strict=True)):
        [group] = (candidates == target).flatten(2).all(2).any(1).nonzero()[:, 0].unique().tolist()
        assert (candidates[group] == draft).flatten(1).all(1).any(), row  # of the target's own group
        rewards = trainer.rewards(candidates[group], _repeated(trainer, condition, row))
        assert torch.equal(candidates[group][rewards.argmax()], target)


def _repeated(trainer: CascadeTrainer, condition: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return trainer.pipeline.repeat({name: value[row : row + 1] for name, value in condition.items()}, 4)


def test_pairs_of_equal_reward_are_dropped_and_the_gap_is_logged(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    def sign(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.where(actions[:, 0, 0] > 0.1, 2.0, -1.0)

    trainer = make_trainer(untrained_but_random(make_pipeline("policy")), episodes, sign, num_conditions=64)
    trainer.train()
    rewards = torch.where(trainer._buffer["samples"][..., 0, 0] > 0.1, 2.0, -1.0)
    wins = (rewards == 2).sum(1)
    expected = int(((4 - wins) * (wins > 0)).sum())  # of a mixed group, the best with each of the others that lost
    assert 0 < expected < 64 * 3
    assert int(trainer._buffer["is_pair"].sum()) == expected
    assert trainer.history[0]["pair_share"] == pytest.approx(expected / (64 * 3))
    assert trainer.history[0]["reward_gap"] == pytest.approx(3.0)
    equal = make_trainer(
        make_pipeline("policy"), episodes, lambda observations, actions: torch.full((len(actions),), 0.3)
    )
    with pytest.raises(NoSamplesLeftError, match="All candidates of each condition have the same reward"):
        equal.train()


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact clean prediction for data N(0.3, 0.4^2), independent in every entry."""

    @register_to_config
    def __init__(self, draft_dim: int = 0) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.draft_projection = torch.nn.Linear(1, 1) if draft_dim else None
        self.schedule = TransitionScheduler(100)

    def forward(self, sample: Tensor, timestep: Any, condition: Any, return_dict: bool = False) -> tuple[Tensor]:
        at = self.schedule.coefficients(timestep, sample).to(sample)
        gain = at.alpha * 0.16 / (at.alpha**2 * 0.16 + at.sigma**2)
        return (0.3 + gain * (sample - at.alpha * 0.3),)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
def test_candidates_part_where_they_should(eta: float, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """With the exact denoiser of Gaussian data every step is linear, `x_s = a x_t + b + std noise`, so variances follow
    `v -> a^2 v + std^2`: from 1 for all samples, from 0 at the shared latent for those of one condition. Without noise
    the latent is first noised back by one step, `v -> keep^2 v + added`."""
    pipeline = make_pipeline("policy", num_train_timesteps=100, eta=eta)
    pipeline.denoiser = GaussianDenoiser()
    pipeline.normalizer.register_to_config(mode="gaussian")  # so that nothing is clamped
    trainer = make_trainer(
        pipeline,
        episodes,
        num_conditions=2000,
        num_candidates=8,
        num_inference_steps=10,
        shared_fraction=0.7,
    )
    with torch.no_grad():
        samples = trainer.candidates(trainer.conditions(2000, generator()), generator(1))[0].reshape(2000, 8)
    pipeline.scheduler.set_timesteps(10)
    levels = [
        tuple(float(value) for value in pipeline.scheduler.noise_schedule(pipeline.scheduler.time(timestep))[:2])
        for timestep in [*pipeline.scheduler.timesteps.tolist(), -1]
    ]

    def denoised(variance: float, first: int, last: int) -> float:
        for (alpha, sigma), (alpha_s, sigma_s) in itertools.pairwise(levels[first : last + 1]):
            gain = alpha * 0.16 / (alpha**2 * 0.16 + sigma**2)
            std = eta * math.sqrt(sigma**2 - (alpha / alpha_s) ** 2 * sigma_s**2) * sigma_s / sigma
            slope = alpha_s * gain + math.sqrt(sigma_s**2 - std**2) * (1 - alpha * gain) / sigma
            variance = slope**2 * variance + std**2
        return variance

    first, within, total = 7, 0.0, denoised(1.0, 0, 7)
    if eta == 0:
        (alpha, sigma), (alpha_s, sigma_s) = levels[6], levels[7]
        keep = alpha / alpha_s
        added = sigma**2 - keep**2 * sigma_s**2
        first, within, total = 6, added, keep**2 * total + added
    assert float(samples.var(1).mean()) == pytest.approx(denoised(within, first, 10), rel=0.05)
    assert float(samples.var()) == pytest.approx(denoised(total, first, 10), rel=0.1)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_pairs_also_at_the_ends(
    sampler: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    pipeline = untrained_but_random(make_pipeline("policy", **SAMPLERS[sampler][0]))
    pipeline.normalizer.register_to_config(mode="gaussian")  # nothing is clamped, so no two samples are equal
    for fraction in (0.01, 0.5, 0.99):
        trainer = make_trainer(pipeline, episodes, shared_fraction=fraction)
        trainer.train()
        assert trainer.history[0]["pair_share"] == 1.0, fraction


def test_in_painted_candidates_share_one_piece_of_the_plan(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(make_pipeline("planner"), episodes, pair_consistency="shared_part", shared_fraction=0.5)
    condition = trainer.conditions(200, generator())
    with torch.no_grad():
        plans, _ = trainer.candidates(condition, generator(1))
    shared = (plans == plans[:, :1]).all(1)  # (200, horizon, dim)
    starts = set()
    for row in shared:
        assert bool(row[0, :3].all())  # the observation
        whole = row.all(1).nonzero()[:, 0].tolist()
        assert len(whole) == 2
        assert whole[1] == whole[0] + 1
        starts.add(whole[0])
        free = [step for step in range(4) if step not in whole]
        assert not bool(row[free, 3].any())
    assert starts == {0, 1, 2}


# ---- The loss and what is trained ------------------------------------------------------------------------


def test_the_loss_counts_free_entries_only_and_sees_the_draft(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("planner")
    trainer = make_trainer(pipeline, episodes)
    torch.nn.init.normal_(pipeline.upsampler.draft_projection.weight)
    batch = trainer.make_batch(generator())
    loss = trainer.compute_loss(pipeline.upsampler, batch)
    fixed = torch.zeros(4, 4, dtype=torch.bool)
    fixed[0, :3] = True
    for name in ("noise", "targets"):
        changed = {**batch, name: torch.where(fixed, torch.full_like(batch[name], 9.0), batch[name])}
        assert torch.equal(trainer.compute_loss(pipeline.upsampler, changed), loss)
    assert not torch.equal(trainer.compute_loss(pipeline.upsampler, {**batch, "drafts": -batch["drafts"]}), loss)

    condition = {"values": batch["condition.values"], "mask": batch["condition.mask"], "draft": batch["drafts"]}
    x_t = pipeline.scheduler.add_noise(batch["targets"], batch["noise"], batch["timesteps"])
    x_t = torch.where(fixed, condition["values"], x_t)
    prediction = pipeline.upsampler(torch.cat([x_t, batch["drafts"]], -1), batch["timesteps"]).sample
    by_hand = ((prediction - batch["targets"]) ** 2)[:, ~fixed].mean()  # this scheduler predicts the clean sample
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("from_reference", [True, False])
def test_only_the_upsampler_is_trained_and_pairs_come_from_the_chosen_controller(
    from_reference: bool, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    foundation = untrained_but_random(make_pipeline("policy"))
    plain = make_trainer(foundation, episodes)
    plain.train()
    pipeline = untrained_but_random(make_pipeline("policy"))
    pipeline.add_lora(LoraConfig(r=4, init_lora_weights=False))
    before = state(pipeline.denoiser)
    trainer = make_trainer(pipeline, episodes, sample_from_reference=from_reference, max_steps=2)
    start = state(pipeline.upsampler)
    trainer.train()
    assert same(state(pipeline.denoiser), before)
    trained = state(pipeline.upsampler)
    assert not any(".lora_" in name for name in trained)
    moved = [name for name in trained if not torch.equal(trained[name], start[name])]
    assert "draft_projection.weight" in moved
    assert "token_projection.weight" in moved  # the whole network, not the new weights alone
    assert torch.equal(trainer._buffer["samples"], plain._buffer["samples"]) == from_reference


@pytest.mark.parametrize(
    ("controller", "consistency"),
    [("policy", "shared_latent"), ("planner", "shared_latent"), ("planner", "shared_part")],
)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    controller: str, consistency: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings = {"max_steps": 7, "lr_scheduler_type": "constant", "learning_rate": 1e-2, "pair_consistency": consistency}
    saving = {**settings, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    whole = untrained_but_random(make_pipeline(controller))
    make_trainer(whole, episodes, **settings).train()
    make_trainer(untrained_but_random(make_pipeline(controller)), episodes, **{**saving, "max_steps": 3}).train()
    resumed = untrained_but_random(make_pipeline(controller))
    make_trainer(resumed, episodes, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(state(resumed.upsampler), state(whole.upsampler))
    other = untrained_but_random(make_pipeline(controller))
    other.add_lora(LoraConfig(r=4, init_lora_weights=False))
    with pytest.raises(CheckpointError, match="is of a run with controller_fingerprint"):
        make_trainer(other, episodes, **{**saving, "max_steps": 8}).train(resume_from_checkpoint=True)


# ---- Learning --------------------------------------------------------------------------------------------


def trained_foundation(make_pipeline: MakePipeline, episodes: Episodes, **scheduler: Any) -> Any:
    pipeline = make_pipeline("policy", **scheduler)
    config = DenoisingConfig(**QUIET, max_steps=150, per_device_train_batch_size=64, learning_rate=3e-3)
    DenoisingTrainer(pipeline, config, train_dataset=episodes).train()
    return pipeline


def mean_reward(pipeline: Any, episodes: Episodes, passes: int) -> float:
    actions = pipeline(episodes.observations[:256], generator=0, num_upsampling_passes=passes).action
    return float(-np.abs(actions - 0.8).mean())


LEARNING = {"max_steps": 80, "per_device_train_batch_size": 64, "num_conditions": 128, "num_candidates": 8}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_pass_raises_the_reward_and_a_second_does_not_lower_it(
    sampler: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    pipeline = trained_foundation(make_pipeline, episodes, **SAMPLERS[sampler][0])
    warm_start_upsampler(pipeline)
    none, untrained = (mean_reward(pipeline, episodes, passes) for passes in (0, 1))
    assert abs(untrained - none) < 0.1
    make_trainer(pipeline, episodes, **LEARNING, learning_rate=3e-3, shared_fraction=0.3).train()
    assert mean_reward(pipeline, episodes, 0) == none
    one, two = (mean_reward(pipeline, episodes, passes) for passes in (1, 2))
    assert one > none + 0.2
    assert two > one - 0.05


ALIGNERS: dict[str, tuple[Any, Any]] = {
    "ddpo": (
        DDPOTrainer,
        DDPOConfig(**QUIET, max_steps=40, per_device_train_batch_size=128, learning_rate=5e-3),
    ),
    "reward_gradient": (
        RewardGradientTrainer,
        RewardGradientConfig(**QUIET, max_steps=30, per_device_train_batch_size=64, learning_rate=1e-2),
    ),
    "dpo": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig(
            **QUIET, max_steps=60, per_device_train_batch_size=64, num_conditions=64, learning_rate=3e-3
        ),
    ),
    "sft": (
        SFTTrainer,
        SFTConfig(**QUIET, max_steps=60, per_device_train_batch_size=64, num_conditions=64, learning_rate=5e-3),
    ),
}


@pytest.mark.parametrize("name", ALIGNERS)
def test_each_method_aligns_the_upsampler_by_a_lora(name: str, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = trained_foundation(make_pipeline, episodes)
    warm_start_upsampler(pipeline)
    view = pipeline.upsampler_policy()
    none, before = (mean_reward(pipeline, episodes, passes) for passes in (0, 1))
    controller = state(pipeline.denoiser)
    trainer_type, config = ALIGNERS[name]
    trainer = trainer_type(view, config, train_dataset=episodes, reward_function=near, peft_config=LORA)
    trainer.train()
    if name == "ddpo":
        assert trainer.history[0]["ratio"] == 1.0
    assert pipeline.lora_names == []
    assert view.lora_names == ["default"]
    assert same(state(pipeline.denoiser), controller)
    assert mean_reward(pipeline, episodes, 0) == none
    assert mean_reward(pipeline, episodes, 1) > before + 0.2
    with view.lora_disabled():
        assert mean_reward(pipeline, episodes, 1) == before


@pytest.mark.parametrize(("name", "controller"), [("ddpo", "planner"), ("sft", "policy")])
def test_an_interrupted_alignment_of_the_upsampler_equals_an_uninterrupted_one(
    name: str, controller: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    small = SMALL if name == "sft" else {"per_device_train_batch_size": 16}
    settings = {**QUIET, **small, "lr_scheduler_type": "constant", "max_steps": 5}
    saving = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}

    def trainer(**changes: Any) -> Any:
        pipeline = untrained_but_random(make_pipeline(controller))
        warm_start_upsampler(pipeline)
        trainer_type, config = ALIGNERS[name]
        return trainer_type(
            pipeline.upsampler_policy(),
            type(config)(**{**settings, **changes}),
            train_dataset=episodes,
            reward_function=near,
            peft_config=LORA,
        )

    whole = trainer()
    fresh = state(whole.model)
    whole.train()
    trainer(**saving, max_steps=3).train()
    resumed = trainer(**saving)
    resumed.train(resume_from_checkpoint=True)
    assert not same(state(whole.model), fresh)
    assert same(state(resumed.model), state(whole.model))


# ---- What is refused, and the command --------------------------------------------------------------------


def test_what_makes_no_sense_is_refused(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    with pytest.raises(ValueError, match="`pair_consistency` 'shared_part' needs a horizon of at least 2"):
        make_trainer(make_pipeline("policy"), episodes, pair_consistency="shared_part")
    solver = {"kernel": "dpm_solver_2m", "eta": 0.0}
    planner = make_pipeline("planner", **solver)
    with pytest.raises(ValueError, match="`pair_consistency` 'shared_latent' needs a sampler that can stop"):
        make_trainer(planner, episodes)
    assert planner.upsampler is None
    make_trainer(planner, episodes, pair_consistency="shared_part").train()
    pipeline = make_pipeline("policy")
    with pytest.raises(ValueError, match="`peft_config` must be None: CascadeTrainer trains a whole network"):
        CascadeTrainer(pipeline, CascadeConfig(**QUIET, **SMALL), train_dataset=episodes, peft_config=LORA)
    assert pipeline.upsampler is None
    warm_start_upsampler(pipeline)
    pipeline.upsampler_policy().add_lora(LORA)
    with pytest.raises(ValueError, match="has a LoRA on its up-sampler"):
        make_trainer(pipeline, episodes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pair_consistency": "none"},
            "`pair_consistency` must be one of independent, shared_latent, shared_part",
        ),
        ({"num_candidates": 1}, "`num_candidates` must be at least 2 to make a pair, got 1"),
        ({"num_conditions": 0}, "`num_conditions` must be at least 1, got 0"),
        ({"shared_fraction": 1.0}, "`shared_fraction` must lie between 0 and 1, got 1.0"),
        ({"shared_fraction": float("nan")}, "`shared_fraction` must lie between 0 and 1, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CascadeConfig(**{**QUIET, **settings})


def test_the_command_saves_a_pipeline_that_the_adapter_still_fits(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    pipeline = untrained_but_random(make_pipeline("policy"))
    pipeline.save_pretrained(tmp_path / "foundation")
    pipeline.add_lora(LoraConfig(r=4, init_lora_weights=False))
    pipeline.save_lora_weights(tmp_path / "adapter")
    arguments = CascadeArguments(
        task="nav1d-full", pipeline=str(tmp_path / "foundation"), adapter=str(tmp_path / "adapter")
    )
    settings = {**QUIET, **SMALL, "max_steps": 1, "output_dir": str(tmp_path / "cascade")}
    commands.train_cascade(arguments, CascadeConfig(**settings))
    loaded = DiffusionPolicyPipeline.from_pretrained(tmp_path / "cascade" / "pipeline")
    loaded.load_lora_weights(tmp_path / "adapter")
    observations = episodes.observations[:8]
    np.testing.assert_array_equal(
        loaded(observations, generator=0).candidates, pipeline(observations, generator=0).candidates
    )
    assert np.isfinite(loaded(observations, generator=0, num_upsampling_passes=2).candidates).all()
    with pytest.raises(ValueError, match="already holds pipeline/"):
        commands.train_cascade(arguments, CascadeConfig(**settings))
