"""Several adapters from one foundation in one run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from dmc_hub import checkpoint
from dmc_hub.data import Episodes
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner
from dmc_hub.trainers.multi_task import AlignmentTask, TaskResult, align_tasks
from dmc_hub.trainers.reward_gradient import RewardGradientConfig

MakePipeline = Callable[..., Any]
STAGE = RewardGradientConfig(
    output_dir=None, disable_tqdm=True, per_device_train_batch_size=16, max_steps=10, learning_rate=1e-2
)


def towards(target: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda observations, actions: -(actions[:, 0, 0] - target).square()


def mean_action(pipeline: Any, episodes: Episodes) -> float:
    return float(pipeline(episodes.observations[:64], generator=0).action.mean())


def make_task(target: float, episodes: Episodes, **settings: Any) -> AlignmentTask:
    def validate(pipeline: Any) -> dict[str, float]:
        return {"return_mean": 2 - abs(mean_action(pipeline, episodes) - target), "return_std": 0.0}

    return AlignmentTask(validate=validate, **{"reward_function": towards(target), **settings})


def config(folder: Path | None) -> AlignmentConfig:
    return AlignmentConfig(
        output_dir=None if folder is None else str(folder),
        methods=["reward_gradient"],
        max_passes=1,
        validations_per_stage=1,
    )


def align(
    pipeline: Any, tasks: dict[str, AlignmentTask], folder: Path | None, episodes: Episodes
) -> dict[str, TaskResult]:
    return align_tasks(
        pipeline,
        tasks,
        config(folder),
        train_dataset=episodes,
        stage_configs={"reward_gradient": STAGE},
        peft_config=LoraConfig(r=4, lora_alpha=8),
    )


def weights(pipeline: Any, name: str) -> dict[str, Tensor]:
    state = pipeline.denoiser.state_dict()
    return {key.replace(f".{name}.", "."): value for key, value in state.items() if f".{name}." in key}


def test_each_task_has_its_adapter_as_if_it_had_been_alone(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    pipeline = make_pipeline("policy")
    foundation, critic = pipeline.base_fingerprint(), pipeline.critic
    tasks = {"right": make_task(0.6, episodes), "left": make_task(-0.6, episodes)}
    results = align(pipeline, tasks, tmp_path, episodes)
    assert pipeline.lora_names == ["right", "left"]
    assert pipeline.get_active_adapters() == ["right"]
    assert pipeline.base_fingerprint() == foundation
    assert pipeline.critic is critic
    assert mean_action(pipeline, episodes) > 0.3
    pipeline.set_adapters("left")
    assert mean_action(pipeline, episodes) < -0.3
    pipeline.set_adapters(["right", "left"], [0.5, 0.5])
    assert abs(mean_action(pipeline, episodes)) < 0.3
    for name, task in tasks.items():
        alone = make_pipeline("policy")
        aligner = SequentialAligner(
            alone,
            config(None),
            train_dataset=episodes,
            validate=task.validate,
            reward_function=task.reward_function,
            stage_configs={"reward_gradient": STAGE},
            peft_config=LoraConfig(r=4, lora_alpha=8),
        )
        assert aligner.run()[-1].return_mean == results[name].stages[-1].return_mean
        expected = weights(alone, "default")
        assert expected
        for key, value in weights(pipeline, name).items():
            assert torch.equal(value, expected[key]), key
        checkpoint.verify(tmp_path / name / "adapter")
        loaded = make_pipeline("policy")
        loaded.load_lora_weights(tmp_path / name / "adapter", adapter_name=name)
        pipeline.set_adapters(name)
        assert mean_action(loaded, episodes) == mean_action(pipeline, episodes)


class Killed(BaseException):
    """What no part of the library catches."""


def test_an_interrupted_run_continues_with_the_task_it_was_at(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    tasks = {"right": make_task(0.6, episodes), "left": make_task(-0.6, episodes)}
    whole = make_pipeline("policy")
    align(whole, tasks, None, episodes)

    def kill(observations: Tensor, actions: Tensor) -> Tensor:
        raise Killed

    cut = make_pipeline("policy")
    fingerprint = cut.base_fingerprint()
    with pytest.raises(Killed):
        align(cut, {**tasks, "left": make_task(-0.6, episodes, reward_function=kill)}, tmp_path, episodes)
    assert cut.lora_names == []
    assert cut.base_fingerprint() == fingerprint
    stamp = (tmp_path / "right" / "stages" / "01-reward_gradient" / "manifest.json").stat().st_mtime_ns
    resumed = make_pipeline("policy")
    align(resumed, tasks, tmp_path, episodes)
    assert (tmp_path / "right" / "stages" / "01-reward_gradient" / "manifest.json").stat().st_mtime_ns == stamp
    for name in tasks:
        for key, value in weights(whole, name).items():
            assert torch.equal(value, weights(resumed, name)[key]), key


def test_a_task_may_have_its_own_critic_and_data(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    torch.manual_seed(1)
    critic = TwinQCritic(3, 1, hidden_dims=(8,))
    before = {name: tensor.clone() for name, tensor in critic.state_dict().items()}

    def by_the_critic(**settings: Any) -> AlignmentTask:
        count = itertools.count()  # every validation is better than the one before
        return AlignmentTask(validate=lambda _: {"return_mean": next(count), "return_std": 0.0}, **settings)

    tasks = {"shared": by_the_critic(), "own": by_the_critic(critic=critic), "again": by_the_critic()}
    tasks["elsewhere"] = by_the_critic(train_dataset=episodes.newest(80))
    pipeline = make_pipeline("policy")
    results = align(pipeline, tasks, None, episodes)
    own = results["own"].critic
    assert own is not critic
    assert own is not None
    for name, tensor in own.state_dict().items():
        assert torch.equal(tensor, before[name])
    shared, *others = (weights(pipeline, name) for name in tasks)
    same = [all(torch.equal(value, other[key]) for key, value in shared.items()) for other in others]
    assert same == [False, True, False]


def test_wrong_names_and_an_adapted_pipeline_are_refused(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    for tasks in ({}, {"a.b": make_task(0.0, episodes)}, {"../a": make_task(0.0, episodes)}):
        with pytest.raises(ValueError, match="`tasks` must have names of letters, digits, - and _"):
            align(pipeline, tasks, None, episodes)
    pipeline.add_lora(LoraConfig(r=1))
    with pytest.raises(ValueError, match=r"must be a foundation without adapters, it has \['default'\]"):
        align(pipeline, {"a": make_task(0.0, episodes)}, None, episodes)
