"""RewardGradientTrainer: its gradient, the last-K schedule, and what is kept in memory for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dmc_hub.data import Episodes
from dmc_hub.models.dit import DiffusionTransformer1D
from dmc_hub.trainers.dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from dmc_hub.trainers.reward_gradient import RewardGradientConfig, RewardGradientTrainer

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {
    "output_dir": None,
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 1,
    "per_device_train_batch_size": 16,
}
SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"schedule": "cosine"},
    "ddim": {"schedule": "linear", "eta": 0.0, "prediction_type": "epsilon"},
    "sm": {"schedule": "variance_exploding", "prediction_type": "v_prediction"},
    "fm": {"schedule": "flow", "prediction_type": "velocity", "kernel": "euler_maruyama"},
}


def smooth(observations: Tensor, actions: Tensor) -> Tensor:
    return -((actions[:, 0, 0] - 0.8) ** 2)


def make_trainer(
    pipeline: Any, episodes: Episodes, *, lora: dict[str, Any] | None = None, callbacks: Any = (), **settings: Any
) -> RewardGradientTrainer:
    return RewardGradientTrainer(
        pipeline,
        RewardGradientConfig(**{**SMALL, **settings}),
        train_dataset=episodes,
        reward_function=smooth,
        peft_config=LoraConfig(r=4, init_lora_weights=False, **(lora or {})),
        callbacks=callbacks,
    )


def loss_of(trainer: RewardGradientTrainer) -> Tensor:
    return trainer.compute_loss(trainer.model, trainer.make_batch(torch.Generator().manual_seed(0)))


def gradients(trainer: RewardGradientTrainer) -> list[Tensor]:
    trainer.model.train()
    torch.manual_seed(0)
    loss_of(trainer).backward()
    return [parameter.grad.clone() for parameter in trainer._trainable if parameter.grad is not None]


def saved_bytes(trainer: RewardGradientTrainer) -> int:
    """Of the different tensors that autograd keeps for the backward pass, the weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(trainer)
        assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# ---- Memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_memory_does_not_grow_with_the_number_of_steps(
    controller: str, activation_checkpointing: bool, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    kept = {
        (steps, k): saved_bytes(
            make_trainer(
                make_pipeline(controller, num_train_timesteps=100),
                episodes,
                num_inference_steps=steps,
                last_k_steps=k,
                activation_checkpointing=activation_checkpointing,
                reference_coefficient=0.0,
            )
        )
        for steps, k in ((10, 1), (100, 1), (10, 2))
    }
    assert kept[100, 1] <= 1.1 * kept[10, 1]
    assert kept[10, 2] > kept[10, 1]


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_with_recomputed_activations_a_step_keeps_latents_only(
    controller: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    def kept_per_step(activation_checkpointing: bool) -> float:
        few, many = (
            saved_bytes(
                make_trainer(
                    make_pipeline(controller),
                    episodes,
                    num_inference_steps=20,
                    last_k_steps=k,
                    activation_checkpointing=activation_checkpointing,
                )
            )
            for k in (2, 10)
        )
        return (many - few) / 8

    pipeline = make_pipeline(controller)
    latent_bytes = 4 * torch.Size(pipeline.latent_shape(16)).numel()
    assert kept_per_step(True) <= 6 * latent_bytes + 1024  # and some numbers per step
    assert kept_per_step(False) > 20 * latent_bytes + 10 * 1024


# ---- Gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["policy", "planner"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_recomputed_activations_give_the_same_gradients(
    sampler: str, controller: str, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """Also with dropout, whose masks are drawn again."""
    plain, saving = (
        gradients(
            make_trainer(
                make_pipeline(controller, **SAMPLERS[sampler]),
                episodes,
                lora={"lora_dropout": 0.3},
                last_k_steps=3,
                activation_checkpointing=activation_checkpointing,
            )
        )
        for activation_checkpointing in (False, True)
    )
    assert len(plain) == len(saving) > 0
    assert any(bool(gradient.any()) for gradient in plain)
    for expected, found in zip(plain, saving, strict=True):
        assert torch.equal(expected, found)


def test_activation_checkpointing_trains_the_same_and_evaluates_the_network_again(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    weights, evaluations = [], []
    for activation_checkpointing in (False, True):
        pipeline = make_pipeline("policy")
        trainer = make_trainer(
            pipeline,
            episodes,
            max_steps=3,
            learning_rate=1e-2,
            last_k_steps=2,
            activation_checkpointing=activation_checkpointing,
        )
        count: list[int] = []
        pipeline.denoiser.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer.train()
        evaluations.append(len(count))
        weights.append([parameter.detach().clone() for parameter in trainer._trainable])
        assert trainer.args.activation_checkpointing == activation_checkpointing
    assert evaluations == [3 * (5 + 2), 3 * (5 + 2 + 2 + 1)]  # sampling, reference; again: K steps, distance
    for expected, found in zip(*weights, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("last_k_steps", [None, 2])
def test_the_gradient_is_that_of_the_mean_reward(
    last_k_steps: int | None, make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    """Against central differences in one weight, which is moved during the last K denoising steps only."""
    pipeline = make_pipeline("policy")
    trainer = make_trainer(
        pipeline, episodes, last_k_steps=last_k_steps, reference_coefficient=0.0, per_device_train_batch_size=64
    )
    torch.nn.init.normal_(pipeline.denoiser.head.base_layer.weight, std=0.1)
    parameter = next(p for name, p in pipeline.denoiser.named_parameters() if name == "head.lora_B.default.weight")
    parameter.requires_grad_(True)
    loss_of(trainer).backward()
    assert parameter.grad is not None
    index = tuple(int(value) for value in (parameter.grad.abs() == parameter.grad.abs().max()).nonzero()[0])
    first_moved = 0 if last_k_steps is None else 5 - last_k_steps

    def loss_at(change: float) -> float:
        evaluations = [0]

        def move(*_: Any) -> None:
            with torch.no_grad():
                parameter[index] += change * (evaluations[0] == first_moved)
            evaluations[0] += 1

        hook = pipeline.denoiser.register_forward_pre_hook(move)
        value = float(loss_of(trainer).detach())
        hook.remove()
        with torch.no_grad():
            parameter[index] -= change
        assert evaluations[0] == 5
        return value

    difference = (loss_at(0.01) - loss_at(-0.01)) / 0.02
    assert abs(difference) > 1e-3
    assert float(parameter.grad[index]) == pytest.approx(difference, rel=0.01)


# ---- The schedule of K -------------------------------------------------------------------------------------


class CountGradSteps(TrainerCallback):
    """Counts the network's evaluations with gradient in every optimizer step."""

    def __init__(self, network: torch.nn.Module, stop_at: int | None = None) -> None:
        self.counts: list[int] = []
        self.current, self.stop_at = 0, stop_at
        network.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.current += torch.is_grad_enabled()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.counts.append(self.current)
        self.current = 0
        control.should_training_stop = state.global_step == self.stop_at


@pytest.mark.parametrize("controller", ["policy", "planner"])
def test_k_goes_linearly_to_its_last_value_and_a_run_resumes_in_between(
    controller: str, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    settings = {"max_steps": 5, "learning_rate": 1e-2, "last_k_steps": 1, "last_k_steps_final": 5}
    saving = {**settings, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    weights, counts = {}, {}
    for name, options, stop_at in (("whole", settings, None), ("cut", saving, 2), ("resumed", saving, None)):
        pipeline = make_pipeline(controller)
        counter = CountGradSteps(pipeline.denoiser, stop_at)
        trainer = make_trainer(pipeline, episodes, reference_coefficient=0.0, callbacks=[counter], **options)
        trainer.train(resume_from_checkpoint=name == "resumed")
        weights[name] = [parameter.detach().clone() for parameter in trainer._trainable]
        counts[name] = counter.counts
    assert counts == {"whole": [1, 2, 3, 4, 5], "cut": [1, 2], "resumed": [3, 4, 5]}
    for expected, found in zip(weights["whole"], weights["resumed"], strict=True):
        assert torch.equal(expected, found)


def test_a_schedule_without_a_start_is_refused() -> None:
    with pytest.raises(ValueError, match="`last_k_steps_final` needs a K to start from: set `last_k_steps`"):
        RewardGradientConfig(**SMALL, last_k_steps=None, last_k_steps_final=3)
    with pytest.raises(ValueError, match="`last_k_steps` must be at least 1, got 0"):
        RewardGradientConfig(**SMALL, last_k_steps=0)


# ---- The setting in every trainer --------------------------------------------------------------------------


def test_the_deprecated_name_of_activation_checkpointing_works() -> None:
    with pytest.warns(FutureWarning, match="Use `activation_checkpointing` instead"):
        config = RewardGradientConfig(**SMALL, gradient_checkpointing=True)
    assert config.activation_checkpointing


def test_what_cannot_be_recomputed_is_refused(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    assert not DiffusionTransformer1D._supports_gradient_checkpointing
    trainer = DiffusionDPOTrainer(
        make_pipeline("policy"),
        DiffusionDPOConfig(**SMALL, num_conditions=16, activation_checkpointing=True),
        train_dataset=episodes,
        peft_config=LoraConfig(r=4),
    )
    with pytest.raises(ValueError, match="`activation_checkpointing` must be False: `DiffusionTransformer1D` has no"):
        trainer.train()
    with pytest.raises(ValueError, match=r"`activation_checkpointing_kwargs` must be empty, got .*use_reentrant"):
        RewardGradientConfig(**SMALL, activation_checkpointing_kwargs={"use_reentrant": True})
