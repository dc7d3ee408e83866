"""Several methods in one update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import TrainerCallback

from dmc_hub.data import Episodes
from dmc_hub.trainers.joint import SINGLE_METHODS, JointConfig, JointTrainer

SMALL: dict[str, dict[str, Any]] = {
    "ddpo": {"per_device_train_batch_size": 16, "group_size": 8},
    "reward_gradient": {"per_device_train_batch_size": 16},
    "nft": {"per_device_train_batch_size": 16, "num_conditions": 4, "steps_per_buffer": 2},
    "dpo": {"per_device_train_batch_size": 8, "num_conditions": 8, "steps_per_buffer": 2},
    "sft": {"per_device_train_batch_size": 16, "num_conditions": 8, "num_candidates": 4, "steps_per_buffer": 2},
}


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def joint(pipeline: Any, episodes: Episodes, members: tuple[str, ...], **options: Any) -> JointTrainer:
    defaults: dict[str, Any] = {"output_dir": None, "max_steps": 3, "logging_steps": 1, "disable_tqdm": True}
    config = JointConfig(**{**defaults, "members": {name: SMALL[name] for name in members}, **options})
    return JointTrainer(pipeline, config, train_dataset=episodes, peft_config=LoraConfig(r=2))


@pytest.mark.parametrize("controller", ["planner", "policy"])
def test_the_gradient_is_the_weighted_sum_of_the_methods_own(
    controller: str, make_pipeline: Callable[..., Any], episodes: Episodes
) -> None:
    weights = {"ddpo": 2.0, "nft": 0.25}

    def gradient(members: tuple[str, ...], weights: dict[str, float]) -> list[torch.Tensor]:
        trainer = joint(make_pipeline(controller), episodes, members, weights=weights)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # a LoRA starts where the gradient of one of its halves is zero
            for parameter in trainer.trainable_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        inputs = trainer.make_batch(trainer.generator("batch"))
        trainer.compute_loss(trainer.model, inputs).backward()
        return [parameter.grad for parameter in trainer.trainable_parameters() if parameter.grad is not None]

    both = gradient(("ddpo", "nft"), weights)
    first, second = gradient(("ddpo",), {}), gradient(("nft",), {})
    for total, one, other in zip(both, first, second, strict=True):
        torch.testing.assert_close(total, 2.0 * one + 0.25 * other, rtol=1e-4, atol=1e-6)


def test_every_method_can_be_a_member_and_logs_under_its_name(
    make_pipeline: Callable[..., Any], episodes: Episodes
) -> None:
    trainer = joint(make_pipeline("policy"), episodes, tuple(SINGLE_METHODS))
    trainer.train()
    logged = trainer.history[0]
    assert {f"{name}_loss" for name in SINGLE_METHODS} <= logged.keys()
    assert logged["loss"] == pytest.approx(sum(logged[f"{name}_loss"] for name in SINGLE_METHODS), rel=1e-4)


def test_a_resumed_run_equals_an_uninterrupted_one(
    make_pipeline: Callable[..., Any], episodes: Episodes, tmp_path: Path
) -> None:
    def run(folder: Path, interrupted: bool) -> dict[str, torch.Tensor]:
        options = {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 3, "max_steps": 5}
        members = ("nft", "dpo", "sft")
        if interrupted:
            trainer = joint(make_pipeline("policy"), episodes, members, **options)
            trainer.add_callback(StopAt(3))
            trainer.train()
        pipeline = make_pipeline("policy")
        joint(pipeline, episodes, members, **options).train(resume_from_checkpoint=interrupted)
        return get_peft_model_state_dict(pipeline.denoiser)

    whole, resumed = run(tmp_path / "whole", interrupted=False), run(tmp_path / "resumed", interrupted=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": {}}, "`members`"),
        ({"members": {"reinforce": {}}}, "`members`"),
        ({"members": {"dpo": {}}, "weights": {"sft": 1.0}}, "`weights` names sft"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointConfig(output_dir=None, **options)
