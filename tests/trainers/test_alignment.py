"""SequentialAligner: stages, decisions, rollback, and the continuation of an interrupted run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmc_hub.data import Episodes
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner, StageResult
from dmc_hub.trainers.dpo import DiffusionDPOConfig
from dmc_hub.trainers.reward_gradient import RewardGradientConfig
from dmc_hub.trainers.sft import SFTConfig

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "max_steps": 10, "per_device_train_batch_size": 16}


def stage_configs(**reward_gradient: Any) -> dict[str, Any]:
    return {
        "reward_gradient": RewardGradientConfig(**{**SMALL, "learning_rate": 1e-2, **reward_gradient}),
        "dpo": DiffusionDPOConfig(**SMALL, num_conditions=16),
        "sft": SFTConfig(**SMALL, num_conditions=16, num_candidates=4),
    }


def prefers_positive(observations: Tensor, actions: Tensor) -> Tensor:
    return -(actions[:, 0, 0] - 0.8).abs()


def mean_action_validation(episodes: Episodes) -> Callable[[Any], dict[str, float]]:
    observations = episodes.observations[:128]

    def validate(pipeline: Any) -> dict[str, float]:
        actions = pipeline(observations, generator=0).action
        rewards = 2 - np.abs(actions - 0.8)
        return {"return_mean": float(rewards.mean()), "return_std": float(rewards.std())}

    return validate


def make_aligner(
    pipeline: Any, episodes: Episodes, output_dir: Path | None = None, configs: Any = None, **settings: Any
) -> SequentialAligner:
    return SequentialAligner(
        pipeline,
        AlignmentConfig(
            output_dir=None if output_dir is None else str(output_dir),
            **{"methods": ["reward_gradient", "dpo", "sft"], "num_passes": 1, "max_return_drop": 0.05, **settings},
        ),
        train_dataset=episodes,
        validate=mean_action_validation(episodes),
        stage_configs=configs or stage_configs(),
        reward_function=prefers_positive,
    )


def adapter(pipeline: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in pipeline.denoiser.state_dict().items() if ".lora_" in k}


def without_time(results: list[StageResult]) -> list[dict[str, Any]]:
    return [{**vars(row), "wall_seconds": 0.0, "train_metrics": {}} for row in results]


def test_a_pass_improves_and_ends_at_its_best_state(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    pipeline = make_pipeline("policy")
    results = make_aligner(pipeline, episodes, tmp_path).run()
    assert [row.name for row in results] == ["foundation", "reward_gradient", "dpo", "sft"]
    best = max(row.return_mean for row in results if row.decision != "rolled back")
    assert best > results[0].return_mean + 0.2
    assert mean_action_validation(episodes)(pipeline)["return_mean"] == best
    log = [json.loads(line) for line in (tmp_path / "alignment_log.jsonl").read_text().splitlines()]
    assert [row["decision"] for row in log] == [row.decision for row in results]


def test_nan_ends_in_rollback_with_its_reason(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    """A learning rate of 1e30 overflows the weights after one step."""
    pipeline = make_pipeline("policy")
    results = make_aligner(pipeline, episodes, configs=stage_configs(learning_rate=1e30)).run()
    assert results[1].decision == "rolled back"
    assert "the loss is nan" in results[1].reason or "NaN or infinite actions" in results[1].reason
    assert results[1].return_mean == results[0].return_mean
    assert all(torch.isfinite(value).all() for value in adapter(pipeline).values())
    assert results[2].decision in ("kept", "rolled back")  # the next stage ran from the restored state


def test_a_lost_return_and_a_lost_coherency_are_rolled_back(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    measured = iter([(5.0, 0.9), (4.0, 0.9), (6.0, 0.5), (6.0, 0.85)])

    def validate(pipeline: Any) -> dict[str, float]:
        mean, coherency = next(measured)
        return {"return_mean": mean, "return_std": 0.0, "coherency": coherency}

    aligner = make_aligner(make_pipeline("policy"), episodes)
    aligner.validate = validate
    # after a rollback nothing is validated again: the measurement is the stage's own
    results = aligner.run()
    assert [row.decision for row in results] == ["start", "rolled back", "rolled back", "kept"]
    assert "return 4.000 fell below 4.750" in results[1].reason
    assert "coherency 0.500 fell below 0.810" in results[2].reason


def test_an_interrupted_alignment_continues_and_ends_the_same(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    whole = make_pipeline("policy")
    expected = make_aligner(whole, episodes, tmp_path / "whole").run()

    interrupted = make_aligner(make_pipeline("policy"), episodes, tmp_path / "cut")
    train = interrupted._train

    def die_in_the_second_stage(stage: int, method: str) -> dict[str, float]:
        if stage == 2:
            raise KeyboardInterrupt
        return train(stage, method)

    interrupted._train = die_in_the_second_stage  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        interrupted.run()

    resumed = make_pipeline("policy")
    results = make_aligner(resumed, episodes, tmp_path / "cut").run()
    assert without_time(results) == without_time(expected)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name


def test_unknown_methods_and_foreign_configs_are_refused(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    with pytest.raises(ValueError, match=r"`methods` must be a list of ddpo, .*; got \['ppo'\]"):
        AlignmentConfig(methods=["ppo"])
    with pytest.raises(ValueError, match="`stage_configs` has 'dpo': SFTConfig"):
        make_aligner(make_pipeline("policy"), episodes, configs={"dpo": SFTConfig(**SMALL)})
