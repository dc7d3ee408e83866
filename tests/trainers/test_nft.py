"""Policy optimisation on the forward process: its equations, its old policy, and what it asks of the sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import TrainerCallback

from dmc_hub.data import Episodes
from dmc_hub.losses import group_advantages
from dmc_hub.scheduler import TransitionScheduler, prediction_target
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {
    "output_dir": None,
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 16,
    "num_conditions": 4,
    "group_size": 4,
    "lr_scheduler_type": "constant",
}


def first_action(observations: Tensor, actions: Tensor) -> Tensor:
    return actions[:, 0, 0]


def make_trainer(pipeline: Any, episodes: Episodes, reward: Any = first_action, **settings: Any) -> NFTTrainer:
    if isinstance(pipeline.denoiser.head, torch.nn.Linear):  # an untrained policy gives one action only
        torch.nn.init.normal_(pipeline.denoiser.head.weight)
    return NFTTrainer(
        pipeline,
        NFTConfig(**{**SMALL, **settings}),
        train_dataset=episodes,
        reward_function=reward,
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )


def move(trainer: NFTTrainer) -> None:
    """A trained policy that is no longer the old one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def test_the_loss_is_equation_5_on_the_velocity(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy", schedule="flow", prediction_type="velocity")
    trainer = make_trainer(pipeline, episodes, weighting="pretraining", beta=0.3, reference_coefficient=0.0)
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    condition = {"embedding": batch["condition.embedding"]}
    t = (batch["timesteps"] / 20)[:, None, None]
    x_t, target = (1 - t) * batch["samples"] + t * batch["noise"], batch["noise"] - batch["samples"]
    old = pipeline.predict(x_t, batch["timesteps"], condition)
    move(trainer)
    new = pipeline.predict(x_t, batch["timesteps"], condition)
    assert not torch.allclose(new, old)
    optimality = 0.5 + 0.5 * batch["advantages"][:, None, None] / 2.0
    positive = (0.7 * old + 0.3 * new - target) ** 2
    negative = (1.3 * old - 0.3 * new - target) ** 2
    expected = (optimality * positive + (1 - optimality) * negative).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_advantages_are_relative_to_the_group_and_cut(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(make_pipeline("policy"), episodes, advantage_clip=1.0)
    buffer = trainer.collect(torch.Generator().manual_seed(0))
    actions = trainer.pipeline.normalizer.unnormalize_actions(buffer["samples"])[:, 0, 0]
    expected = group_advantages(actions, 4, scale="global").clamp(-1, 1)
    torch.testing.assert_close(buffer["advantages"], expected)
    assert buffer["advantages"].abs().max() == 1
    assert torch.equal(buffer["condition.embedding"][0], buffer["condition.embedding"][3])


@pytest.mark.parametrize("schedule", ["cosine", "variance_exploding"])
def test_the_adaptive_loss_is_the_same_for_every_prediction_type(
    schedule: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(make_pipeline("policy"), episodes)
    generator = torch.Generator().manual_seed(0)
    samples, noise, clean, old_clean = (torch.randn(8, 1, 1, generator=generator) for _ in range(4))
    timesteps = torch.arange(6, 14)
    inputs = {"samples": samples, "noise": noise, "timesteps": timesteps, "advantages": torch.linspace(-2, 2, 8)}
    losses = []
    for kind in ("sample", "epsilon", "v_prediction", "velocity", "score"):
        scheduler = TransitionScheduler(num_train_timesteps=20, schedule=schedule, prediction_type=kind)
        trainer.pipeline.register_modules(scheduler=scheduler)
        x_t = scheduler.add_noise(samples, noise, timesteps)
        at = scheduler.coefficients(timesteps, samples).to(samples)
        outputs = [prediction_target(x0, (x_t - at.alpha * x0) / at.sigma, at, kind) for x0 in (clean, old_clean)]
        losses.append(trainer._contrast(outputs[0], outputs[1], x_t, inputs, None))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("loss_type", ["nft", "awm"])
@pytest.mark.parametrize("reward", [0.3, -7777.7])
def test_equal_rewards_teach_nothing(
    loss_type: str, reward: float, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    def equal(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.full((len(actions),), reward)

    settings = {"loss_type": loss_type, "reference_coefficient": 0.0, "group_size": 7}
    trainer = make_trainer(make_pipeline("policy"), episodes, equal, **settings)
    trainer.train()
    assert trainer.history[0]["grad_norm"] == 0.0


@pytest.mark.parametrize("options", [{"bf16": True, "use_cpu": True}, {}], ids=["bf16", "float32"])
def test_the_first_step_is_on_policy_and_later_ones_are_not(
    options: dict[str, Any], make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(
        make_pipeline("planner"),
        episodes,
        loss_type="awm",
        max_steps=2,
        steps_per_buffer=2,
        learning_rate=0.1,
        **options,
    )
    trainer.train()
    first, second = trainer.history[:2]
    assert (first["ratio"], first["clip_fraction"], first["old_distance"]) == (1.0, 0.0, 0.0)
    assert second["old_distance"] > 0


def test_matching_starts_as_the_advantage_weighted_pretraining_gradient(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(make_pipeline("planner"), episodes, loss_type="awm", reference_coefficient=0.0)
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    parameters = trainer.trainable_parameters()
    ours = torch.autograd.grad(trainer.compute_loss(trainer.model, batch), parameters)
    pipeline, timesteps = trainer.pipeline, batch["timesteps"]
    condition = {"values": batch["condition.values"], "mask": batch["condition.mask"]}
    x_t = pipeline.scheduler.add_noise(batch["samples"], batch["noise"], timesteps)
    error = pipeline.predict(x_t, timesteps, condition) - batch["samples"]  # this scheduler predicts the sample
    square = torch.where(condition["mask"], 0, error**2).flatten(1).sum(1)
    expected = torch.autograd.grad((batch["advantages"] * square).mean(), parameters)
    assert max(float(gradient.abs().max()) for gradient in ours) > 0
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


class Weights(TrainerCallback):
    """The trained weights before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def keep(self, model: Any) -> None:
        self.seen.append(next(p for n, p in model.named_parameters() if "lora_B" in n).detach().clone())

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.keep(kwargs["model"])

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.keep(kwargs["model"])


def test_the_old_policy_follows_the_trained_one_on_its_schedule(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    settings = {"max_steps": 4, "steps_per_buffer": 1, "old_policy_decay_rate": 0.25, "old_policy_decay": 0.4}
    trainer = make_trainer(make_pipeline("planner"), episodes, learning_rate=0.1, **settings)
    weights = Weights()
    trainer.add_callback(weights)
    trainer.train()
    expected = weights.seen[0]
    for eta, trained in zip((0.25, 0.4, 0.4), weights.seen[1:4], strict=True):
        expected = eta * expected + (1 - eta) * trained
    name = next(name for name in trainer._old if "lora_B" in name)
    torch.testing.assert_close(trainer._old[name], expected)
    assert not torch.allclose(expected, weights.seen[3])
    assert trainer._old.keys() == {n for n, p in trainer.model.named_parameters() if ".lora_" in n}


def test_samples_come_from_the_old_policy(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer(make_pipeline("planner"), episodes, old_policy_decay_rate=1.0, old_policy_decay=1 - 1e-9)
    first = trainer.collect(torch.Generator().manual_seed(0))
    move(trainer)
    trainer.micro_step = trainer.micro_steps_per_buffer
    second = trainer.collect(torch.Generator().manual_seed(0))
    torch.testing.assert_close(second["samples"], first["samples"], atol=1e-4, rtol=1e-4)
    condition = {name: first[f"condition.{name}"] for name in ("values", "mask")}
    generator = torch.Generator().manual_seed(0)
    torch.randint(9, (4,), generator=generator)
    moved = trainer.pipeline.sample(condition, generator=generator)
    assert not torch.allclose(moved, first["samples"], atol=1e-2)


@pytest.mark.parametrize("loss_type", ["nft", "awm"])
def test_entries_that_in_painting_fixed_do_not_count(
    loss_type: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = make_trainer(make_pipeline("planner"), episodes, loss_type=loss_type)
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    move(trainer)
    fixed = batch["condition.mask"]
    changed = {**batch, **{name: torch.where(fixed, 9.0, batch[name]) for name in ("noise", "samples")}}
    loss = trainer.compute_loss(trainer.model, batch)
    assert torch.equal(trainer.compute_loss(trainer.model, changed), loss)


@pytest.mark.parametrize(("loss_type", "kernel"), [("nft", "dpm_solver_2m"), ("awm", "ancestral")])
def test_deterministic_solvers_will_do(
    loss_type: str, kernel: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    pipeline = make_pipeline("policy", eta=0.0, kernel=kernel)
    foundation: dict[str, Any] = {"max_steps": 100, "learning_rate": 3e-3, "output_dir": None, "disable_tqdm": True}
    DenoisingTrainer(pipeline, DenoisingConfig(**foundation), train_dataset=episodes).train()
    observations = episodes.observations[:256]
    before = np.mean(pipeline(observations, generator=0).action)
    settings = {"max_steps": 40, "per_device_train_batch_size": 64, "num_conditions": 16, "learning_rate": 5e-3}
    NFTTrainer(
        pipeline,
        NFTConfig(**{**SMALL, "loss_type": loss_type, **settings}),
        train_dataset=episodes,
        reward_function=first_action,
        peft_config=LoraConfig(r=4, lora_alpha=8),
    ).train()
    assert np.mean(pipeline(observations, generator=0).action) > before + 0.25


def test_all_weights_can_be_trained_without_an_adapter(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("planner")
    config = NFTConfig(**{**SMALL, "reference_coefficient": 0.0, "max_steps": 2, "steps_per_buffer": 2})
    trainer = NFTTrainer(pipeline, config, train_dataset=episodes, reward_function=first_action)
    trainer.train()
    assert trainer.history[1]["old_distance"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"`beta` and `advantage_clip` must be positive, got 0\.0 and 2\.0"),
        ({"advantage_clip": float("nan")}, "`beta` and `advantage_clip` must be positive"),
        ({"group_size": 1}, "`group_size` must be at least 2"),
        ({"old_policy_decay": 1.0}, r"`old_policy_decay` must lie in \[0, 1\), got 1\.0"),
        ({"old_policy_decay_rate": -0.1}, r"`old_policy_decay_rate` must be at least 0, got -0\.1"),
        ({"loss_type": "ppo"}, "`loss_type` must be one of nft, awm; got 'ppo'"),
        ({"weighting": "uniform"}, "`weighting` must be one of adaptive, pretraining; got 'uniform'"),
        ({"steps_per_buffer": 0}, "`steps_per_buffer` must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NFTConfig(**{**SMALL, **settings})
