"""Every trainer: learns a small real problem, resumes exactly, and refuses bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dmc_hub.data import Episodes
from dmc_hub.presets import nav1d
from dmc_hub.trainers.ddpo import DDPOConfig, DDPOTrainer
from dmc_hub.trainers.denoising import DenoisingConfig, DenoisingTrainer
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.inverse_dynamics import InverseDynamicsConfig, InverseDynamicsTrainer
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.nft import NFTConfig, NFTTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from dmc_hub.trainers.sft import SFTConfig, SFTTrainer

MakePipeline = Callable[..., Any]
QUIET: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "logging_steps": 1}

TRAINERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "denoising": (DenoisingTrainer, DenoisingConfig, {"per_device_train_batch_size": 16}),
    "iql": (IQLTrainer, IQLConfig, {"per_device_train_batch_size": 16}),
    "ddpo": (
        DDPOTrainer,
        DDPOConfig,
        {"per_device_train_batch_size": 16, "batches_per_rollout": 2, "epochs_per_rollout": 2},
    ),
    "reward_gradient": (RewardGradientTrainer, RewardGradientConfig, {"per_device_train_batch_size": 16}),
    "nft": (
        NFTTrainer,
        NFTConfig,
        {"per_device_train_batch_size": 8, "num_conditions": 4, "steps_per_buffer": 2, "old_policy_decay_rate": 0.3},
    ),
    "dpo": (
        DiffusionDPOTrainer,
        DiffusionDPOConfig,
        {"per_device_train_batch_size": 8, "num_conditions": 8, "steps_per_buffer": 4},
    ),
    "sft": (
        SFTTrainer,
        SFTConfig,
        {"per_device_train_batch_size": 8, "num_conditions": 8, "num_candidates": 4, "steps_per_buffer": 4},
    ),
}
ALIGNMENT = [name for name in TRAINERS if name not in ("denoising", "iql")]


def positive_actions(observations: Tensor, actions: Tensor) -> Tensor:
    """A reward with a known best action: 0.8 everywhere."""
    return -(actions[:, 0, 0] - 0.8).abs()


def make_trainer(name: str, pipeline: Any, episodes: Episodes, **settings: Any) -> Any:
    trainer_type, config_type, small = TRAINERS[name]
    aligned = name in ALIGNMENT
    extra = {"peft_config": LoraConfig(r=4, lora_alpha=8), "reward_function": positive_actions} if aligned else {}
    return trainer_type(pipeline, config_type(**{**QUIET, **small, **settings}), train_dataset=episodes, **extra)


def trained_weights(name: str, pipeline: Any) -> dict[str, Tensor]:
    module = pipeline.critic if name == "iql" else pipeline.denoiser
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("name", TRAINERS)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    name: str, controller: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings = {"max_steps": 7, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    whole = make_pipeline(controller)
    make_trainer(name, whole, episodes, **settings).train()

    saving = {**settings, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 3}
    make_trainer(name, make_pipeline(controller), episodes, **{**saving, "max_steps": 3}).train()
    resumed = make_pipeline(controller)
    make_trainer(name, resumed, episodes, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))

    expected, found = trained_weights(name, whole), trained_weights(name, resumed)
    fresh = trained_weights(name, make_pipeline(controller))
    assert expected.keys() == found.keys()
    assert any(not torch.equal(fresh.get(key, torch.zeros(())), value) for key, value in expected.items())
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key


@pytest.mark.parametrize("name", ALIGNMENT)
def test_each_method_alone_raises_the_reward(name: str, make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    foundation = {"max_steps": 150, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
    make_trainer("denoising", pipeline, episodes, **foundation).train()
    observations = episodes.observations[:256]

    def mean_reward() -> float:
        actions = pipeline(observations, generator=0).action
        return float(-np.abs(actions - 0.8).mean())

    before = mean_reward()
    settings = {
        "ddpo": {"max_steps": 60, "per_device_train_batch_size": 128, "learning_rate": 5e-3},
        "reward_gradient": {"max_steps": 30, "per_device_train_batch_size": 64, "learning_rate": 1e-2},
        "nft": {"max_steps": 60, "per_device_train_batch_size": 64, "num_conditions": 16, "learning_rate": 5e-3},
        "dpo": {"max_steps": 60, "per_device_train_batch_size": 64, "num_conditions": 64, "learning_rate": 3e-3},
        "sft": {"max_steps": 60, "per_device_train_batch_size": 64, "num_conditions": 64, "learning_rate": 5e-3},
    }[name]
    make_trainer(name, pipeline, episodes, **settings).train()
    assert before < -0.7
    assert mean_reward() > before + 0.25
    with pipeline.lora_disabled():
        assert mean_reward() == before


def test_the_first_ppo_ratio_is_exactly_one(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    for controller in ("policy", "planner"):
        pipeline = make_pipeline(controller, eta=0.7)
        if controller == "policy":  # an untrained one gives one action only, and equal rewards teach nothing
            torch.nn.init.normal_(pipeline.denoiser.head.weight)
        trainer = make_trainer(
            "ddpo",
            pipeline,
            episodes,
            max_steps=2,
            learning_rate=0.1,
            num_train_denoising_steps=None,
            batches_per_rollout=1,
            epochs_per_rollout=2,
        )
        trainer.train()
        first, second = trainer.history[:2]
        assert first["ratio"] == 1.0
        assert first["clip_fraction"] == 0.0
        assert second["ratio"] != 1.0  # the second epoch trains on samples of the policy before the update


def test_gradients_are_truncated_to_the_last_k_steps(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer("ddpo", make_pipeline("policy"), episodes, max_steps=1, last_k_steps=2)
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    assert batch["steps"].tolist() == [2, 3]  # of steps 0..4 the last is deterministic
    pipeline = make_pipeline("policy")
    condition = pipeline.observation_condition(torch.zeros(2, 3))
    pipeline.denoiser.head.bias.requires_grad_(True)
    latents = pipeline.sample(condition, generator=torch.Generator().manual_seed(0), num_grad_steps=0)
    assert not latents.requires_grad
    assert pipeline.sample(condition, generator=torch.Generator().manual_seed(0), num_grad_steps=1).requires_grad


def test_iql_recovers_the_value_of_a_known_process(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """With discount 0 Q is the mean reward of the step, which Nav1D defines in closed form."""
    pipeline = make_pipeline("policy")
    make_trainer(
        "iql", pipeline, episodes, max_steps=1500, per_device_train_batch_size=256, discount=0.0, learning_rate=1e-2
    ).train()
    batch = episodes.transitions(torch.arange(500))
    normalizer = pipeline.normalizer
    with torch.no_grad():
        q = pipeline.critic(
            normalizer.normalize_observations(batch["observations"]), normalizer.normalize_actions(batch["actions"])
        )
    assert (q - batch["rewards"]).abs().mean() < 0.06
    assert batch["rewards"].std() > 0.25


def test_the_denoising_loss_ignores_what_in_painting_fixed(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("planner")
    trainer = make_trainer("denoising", pipeline, episodes, max_steps=1, inpainting_probability=1.0)
    batch = trainer.make_batch(torch.Generator().manual_seed(0))
    loss = trainer.compute_loss(pipeline.denoiser, batch)
    steps = batch["num_context_steps"]
    assert len(set(steps.tolist())) == 4
    fixed = torch.arange(4)[None, :] < steps[:, None]
    noisy = {**batch, "noise": torch.where(fixed[..., None], torch.full_like(batch["noise"], 9.0), batch["noise"])}
    assert torch.equal(trainer.compute_loss(pipeline.denoiser, noisy), loss)


@pytest.mark.parametrize("name", ALIGNMENT)
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda observations, actions: actions[:1, 0, 0], r"one reward per sample, shape \(4,\), got \(1,\)"),
        (lambda observations, actions: actions[:, 0, 0] * float("nan"), "returned nan for 4 of 4 samples"),
    ],
)
def test_a_broken_reward_function_is_refused_before_training(
    name: str, reward: Any, message: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer_type, config_type, small = TRAINERS[name]
    with pytest.raises(ValueError, match=message):
        trainer_type(
            make_pipeline("policy"),
            config_type(**{**QUIET, **small}),
            train_dataset=episodes,
            reward_function=reward,
            peft_config=LoraConfig(r=4),
        )


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`group_size` must be at least 2 and divide .* \(10\), got 4"):
        DDPOConfig(output_dir=None, per_device_train_batch_size=10, group_size=4)
    with pytest.raises(ValueError, match="'reinforce' needs samples of the current policy"):
        DDPOConfig(output_dir=None, loss_type="reinforce", epochs_per_rollout=2)
    with pytest.raises(ValueError, match="`num_best` \\(9\\) must not exceed `num_candidates` \\(8\\)"):
        SFTConfig(output_dir=None, num_best=9, num_candidates=8)
    with pytest.raises(ValueError, match="`num_candidates` must be at least 2"):
        DiffusionDPOConfig(output_dir=None, num_candidates=1)
    with pytest.raises(ValueError, match="`expectile` must lie in"):
        IQLConfig(output_dir=None, expectile=1.0)


def test_a_deterministic_sampler_has_no_policy_gradient(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    trainer = make_trainer("ddpo", make_pipeline("policy", eta=0.0), episodes, max_steps=1)
    with pytest.raises(ValueError, match="The sampler is deterministic"):
        trainer.train()


def test_a_reward_without_gradient_is_refused_by_the_reward_gradient(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    trainer = RewardGradientTrainer(
        make_pipeline("policy"),
        RewardGradientConfig(**QUIET, max_steps=1, per_device_train_batch_size=4),
        train_dataset=episodes,
        reward_function=lambda observations, actions: actions[:, 0, 0].detach(),
        peft_config=LoraConfig(r=4),
    )
    with pytest.raises(ValueError, match="rewards without gradient"):
        trainer.train()


def test_sft_refuses_samples_the_foundation_finds_unlikely(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    make_trainer("denoising", pipeline, episodes, max_steps=150, learning_rate=3e-3).train()
    trainer = make_trainer("sft", pipeline, episodes, max_steps=1, num_conditions=64)
    generator = torch.Generator().manual_seed(0)
    data, condition = pipeline.encode(trainer.source.windows.gather(torch.arange(64)))
    real = trainer._reference_errors(data, condition, generator)
    far = trainer._reference_errors(data + 4.0, condition, generator)
    assert far.min() > real.max()


def test_inverse_dynamics_recover_the_action_from_two_observations(episodes: Episodes) -> None:
    """Inside the walls Nav1D moves by half the action, so the action is twice the change of the position."""
    preset_pipeline = nav1d("decision_diffuser").build_pipeline(episodes, 0)
    config = InverseDynamicsConfig(**QUIET, max_steps=800, per_device_train_batch_size=128, learning_rate=3e-3)
    InverseDynamicsTrainer(preset_pipeline, config, train_dataset=episodes).train()
    batch = episodes.transitions(torch.arange(400))
    normalizer = preset_pipeline.normalizer
    with torch.no_grad():
        predicted = normalizer.unnormalize_actions(
            preset_pipeline.inverse_dynamics(
                normalizer.normalize_observations(batch["observations"]),
                normalizer.normalize_observations(batch["next_observations"]),
            )
        )
    inside = batch["next_observations"][:, 0].abs() < 1
    assert (predicted - batch["actions"])[inside].abs().mean() < 0.05


@pytest.mark.parametrize("sampler", ["ddpm", "sm", "fm"])
def test_the_first_ratio_is_one_for_every_stochastic_sampler(sampler: str, episodes: Episodes) -> None:
    pipeline = nav1d("policy", sampler).build_pipeline(episodes, 0)
    trainer = make_trainer("ddpo", pipeline, episodes, max_steps=1, batches_per_rollout=1, epochs_per_rollout=1)
    trainer.train()
    assert trainer.history[0]["ratio"] == 1.0
