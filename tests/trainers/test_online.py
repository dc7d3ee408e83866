"""Online fine-tuning: what is collected, what is kept, what the critic learns from, and what survives a kill."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dmc_hub.checkpoint import CheckpointError
from dmc_hub.data import Episodes
from dmc_hub.envs.nav1d import HORIZON, Nav1DVectorEnv
from dmc_hub.trainers.alignment import AlignmentConfig, SequentialAligner
from dmc_hub.trainers.iql import IQLConfig, IQLTrainer
from dmc_hub.trainers.loop import hash_seed
from dmc_hub.trainers.online import OnlineCollector, OnlineConfig
from dmc_hub.trainers.reward_gradient import RewardGradientConfig
from dmc_hub.trainers.sft import SFTConfig

MakePipeline = Callable[..., Any]
SMALL: dict[str, Any] = {"output_dir": None, "disable_tqdm": True, "per_device_train_batch_size": 16}
CRITIC = IQLConfig(**SMALL, max_steps=4, logging_steps=2)
STAGES = {
    "reward_gradient": RewardGradientConfig(**SMALL, max_steps=2),
    "sft": SFTConfig(**SMALL, max_steps=2, num_conditions=8, num_candidates=4),
}


class Environments:
    """Makes Nav1D and keeps what it made."""

    def __init__(self) -> None:
        self.made: list[Nav1DVectorEnv] = []

    def __call__(self) -> Nav1DVectorEnv:
        self.made.append(Nav1DVectorEnv(4))
        return self.made[-1]


def make_collector(pipeline: Any, episodes: Episodes, folder: Path | None = None, **settings: Any) -> OnlineCollector:
    config = OnlineConfig(**{"num_episodes": 5, "buffer_size": 100, **settings})
    return OnlineCollector(
        pipeline, config, logged=episodes, make_env=Environments(), critic_config=CRITIC, seed=3, folder=folder
    )


def make_aligner(pipeline: Any, episodes: Episodes, folder: Path | None = None, **settings: Any) -> SequentialAligner:
    def validate(pipeline: Any) -> dict[str, float]:
        values = pipeline(episodes.observations[:64], generator=0).action
        return {"return_mean": 2 + float(values.mean()), "return_std": 0.0}

    options: dict[str, Any] = {
        "online": OnlineConfig(num_episodes=5, buffer_size=60, num_candidates=4, action_selection="softmax"),
        "make_env": Environments(),
        "critic_config": CRITIC,
        **settings,
    }
    return SequentialAligner(
        pipeline,
        AlignmentConfig(
            output_dir=None if folder is None else str(folder),
            methods=["reward_gradient", "sft", "reward_gradient"],
            max_passes=1,
            max_return_drop=10.0,
            max_coherency_drop=10.0,
            validations_per_stage=1,
        ),
        train_dataset=episodes,
        validate=validate,
        stage_configs=STAGES,
        **options,
    )


@pytest.fixture(scope="module")
def finished(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path_factory: pytest.TempPathFactory
) -> SequentialAligner:
    """An aligner that has run, not interrupted."""
    aligner = make_aligner(make_pipeline("policy"), episodes, tmp_path_factory.mktemp("finished"))
    aligner.run()
    return aligner


def arrays(episodes: Episodes) -> dict[str, np.ndarray]:
    names = [field.name for field in dataclasses.fields(episodes) if field.name != "images"]
    return {name: getattr(episodes, name) for name in names}


def weights(pipeline: Any) -> dict[str, Tensor]:
    state = {f"denoiser.{name}": value for name, value in pipeline.denoiser.state_dict().items()}
    return state | {f"critic.{name}": value for name, value in pipeline.critic.state_dict().items()}


def test_the_oldest_collected_episodes_are_dropped_and_no_logged_ones(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    collector = make_collector(make_pipeline("policy"), episodes)
    seen = []
    for stage in (2, 3, 4):
        result = collector.collect_before(stage)
        assert (result.num_episodes, result.num_steps) == (5, 5 * HORIZON)
        assert collector.collected is not None
        seen.append(collector.collected)
    # 100 transitions hold 12 episodes of 8 steps: of the 15 collected the first 3 are gone
    assert [part.num_episodes for part in seen] == [5, 10, 12]
    assert (result.num_buffer_episodes, result.num_buffer_steps) == (12, 96)
    np.testing.assert_array_equal(seen[2].observations[: 7 * HORIZON], seen[1].observations[3 * HORIZON :])
    for name, joined in arrays(collector.episodes).items():
        np.testing.assert_array_equal(joined[: len(getattr(episodes, name))], getattr(episodes, name), err_msg=name)
    assert collector.episodes.num_steps == episodes.num_steps + 96
    starts = seen[2].observations[seen[2].episode_starts, 0]
    fresh = Nav1DVectorEnv(12).reset(seed=list(range(3_000_003, 3_000_015)))[0][:, 0]
    np.testing.assert_array_equal(starts, fresh)  # no seed comes twice


def test_the_current_controller_collects_and_its_environments_are_closed(
    make_pipeline: MakePipeline, episodes: Episodes
) -> None:
    collector = make_collector(make_pipeline("policy"), episodes)
    first = collector.collect_before(2)
    assert collector.collected is not None
    observations, actions = collector.collected.observations, collector.collected.actions
    again = make_collector(make_pipeline("policy"), episodes)
    again.collect_before(2)
    assert again.collected is not None
    np.testing.assert_array_equal(again.collected.actions, actions)
    changed = make_pipeline("policy")
    torch.nn.init.constant_(changed.denoiser.head.bias, 5.0)
    other = make_collector(changed, episodes)
    other.collect_before(2)
    assert other.collected is not None
    np.testing.assert_allclose(other.collected.actions, np.ones_like(actions), atol=1e-3)
    np.testing.assert_array_equal(other.collected.observations[::HORIZON], observations[::HORIZON])
    make_env: Any = other.make_env
    assert [env.closed for env in make_env.made] == [True]
    assert first.return_mean == pytest.approx(collector.collected.returns().mean())


def test_the_action_selection_of_a_collection_is_an_option(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    torch.manual_seed(0)
    torch.nn.init.normal_(pipeline.denoiser.head.weight, std=0.3)
    pipeline.critic.q_1, pipeline.critic.q_2 = FirstAction(), FirstAction()

    def first_actions(**settings: Any) -> np.ndarray:
        """Of the four episodes that start together."""
        collector = make_collector(pipeline, episodes, **settings)
        return collector._run_episodes(2).actions[:4, 0]

    starts = Nav1DVectorEnv(4).reset(seed=list(range(3_000_000, 3_000_004)))[0]
    source = torch.Generator().manual_seed(hash_seed("collect", 3, 2))
    candidates = pipeline(starts, num_candidates=8, generator=source).candidates
    best, mean = candidates.max(axis=1), candidates.mean(axis=1)
    assert (best - mean).min() > 0.01
    np.testing.assert_array_equal(first_actions(num_candidates=8), best)
    np.testing.assert_allclose(first_actions(num_candidates=8, action_selection="expectation"), mean, rtol=1e-5)
    softmax = {"num_candidates": 8, "action_selection": "softmax"}
    np.testing.assert_array_equal(first_actions(**softmax, temperature=1e-6), best)
    drawn = first_actions(**softmax, temperature=1e6)
    assert (drawn[:, None] == candidates).any(axis=1).all()
    assert not np.array_equal(drawn, best)


class FirstAction(torch.nn.Module):
    """A Q-function that is the action."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[..., -1:]


def test_the_critic_goes_on_with_logged_and_collected_data(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    pipeline = make_pipeline("policy")
    before = copy.deepcopy(pipeline.critic)
    collector = make_collector(pipeline, episodes)
    result = collector.collect_before(2)
    expected = make_pipeline("policy")
    expected.critic.load_state_dict(before.state_dict())
    changes: dict[str, Any] = {"seed": hash_seed("critic", 3, 2) % 2**31, "output_dir": None}
    config = dataclasses.replace(CRITIC, **changes)
    trainer = IQLTrainer(expected, config, train_dataset=collector.episodes)
    trainer.train()
    for name, value in pipeline.critic.state_dict().items():
        assert torch.equal(value, expected.critic.state_dict()[name]), name
    assert not torch.equal(pipeline.critic.q_1[0].weight, before.q_1[0].weight)
    assert result.critic_metrics["q_loss"] == trainer.history[1]["q_loss"]


def test_stages_train_on_what_was_collected_and_the_log_has_a_row_for_each_collection(
    make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    aligner = make_aligner(make_pipeline("policy"), episodes, tmp_path)
    sizes, make_trainer = [], aligner._trainer

    def watch(method: str, config: Any) -> Any:
        trainer = make_trainer(method, config)
        sizes.append(trainer.train_dataset.num_steps - episodes.num_steps)
        return trainer

    aligner._trainer = watch  # type: ignore[method-assign]
    conditions = aligner._conditions()
    aligner.run()
    assert sizes == [0, 40, 56]  # before the first stage nothing is collected; 60 transitions hold 7 episodes
    for name, value in conditions.items():  # the divergence is measured where it was
        assert torch.equal(value, aligner._conditions()[name])
    rows = [json.loads(line) for line in (tmp_path / "alignment_log.jsonl").read_text().splitlines()]
    methods = ["foundation", "reward_gradient", "online", "sft", "online", "reward_gradient", "end"]
    assert [row["name"] for row in rows] == methods
    assert [row["stage"] for row in rows[:-1]] == [0, 1, 2, 2, 3, 3]
    assert rows[2]["reason"] == "5 episodes with softmax selection among 4"
    assert rows[4]["num_buffer_steps"] == 56


class Killed(BaseException):
    """What no part of the library catches."""


def die(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("moment", ["collecting", "critic", "stage"])
def test_a_killed_run_goes_on_with_the_same_data_to_the_same_weights(
    moment: str, finished: SequentialAligner, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    """The run dies at its second collection, in the critic's training after it, or in the stage that follows."""
    cut = make_aligner(make_pipeline("policy"), episodes, tmp_path)
    assert cut.collector is not None
    owner, name = {
        "collecting": (cut.collector, "_run_episodes"),
        "critic": (cut.collector, "_continue_critic"),
        "stage": (cut, "_run_stage"),
    }[moment]
    work = getattr(owner, name)
    setattr(owner, name, lambda stage, *rest: die() if stage == 3 else work(stage, *rest))
    with pytest.raises(Killed):
        cut.run()
    resumed = make_aligner(make_pipeline("policy"), episodes, tmp_path)
    resumed.run()
    assert resumed.collector is not None
    assert finished.collector is not None
    make_env: Any = resumed.collector.make_env
    found = {"collecting": 1, "critic": 2, "stage": 2}[moment]
    assert (resumed.collector.num_found, len(make_env.made)) == (found, 2 - found)
    for key, value in arrays(finished.collector.episodes).items():
        np.testing.assert_array_equal(value, getattr(resumed.collector.episodes, key))
    ours, theirs = weights(finished.pipeline), weights(resumed.pipeline)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    timeless = [{**dataclasses.asdict(row), "wall_seconds": 0.0} for row in finished.collector.results]
    assert timeless == [{**dataclasses.asdict(row), "wall_seconds": 0.0} for row in resumed.collector.results]


def test_damaged_collections_and_runs_of_another_kind_are_refused(
    finished: SequentialAligner, make_pipeline: MakePipeline, episodes: Episodes, tmp_path: Path
) -> None:
    shutil.copytree(str(finished.config.output_dir), tmp_path, dirs_exist_ok=True)
    offline = make_aligner(make_pipeline("policy"), episodes, tmp_path, online=None, make_env=None)
    with pytest.raises(ValueError, match="holds a run with online collection: choose another folder"):
        offline.run()
    data = tmp_path / "stages" / "02-online" / "episodes.safetensors"
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"episodes\.safetensors` was changed.*delete their folders in"):
        make_aligner(make_pipeline("policy"), episodes, tmp_path).run()
    other = make_collector(make_pipeline("policy"), episodes, tmp_path / "stages")
    with pytest.raises(ValueError, match="holds a run with seed 0, not 3"):
        other.collect_before(3)
    shutil.rmtree(tmp_path / "stages" / "02-online")
    with pytest.raises(ValueError, match="holds a run without online collection"):
        make_aligner(make_pipeline("policy"), episodes, tmp_path).run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_episodes": 0}, "`num_episodes` must be at least 1, got 0"),
        ({"buffer_size": 0}, "`buffer_size` must be at least 1, got 0"),
        ({"num_candidates": 0}, "`num_candidates` must be at least 1, got 0"),
        ({"action_selection": "best"}, "`action_selection` must be one of greedy, expectation, softmax; got 'best'"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"first_seed": -1}, "`first_seed` must not be negative, got -1"),
    ],
)
def test_wrong_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnlineConfig(**settings)


def test_what_cannot_work_is_refused(make_pipeline: MakePipeline, episodes: Episodes) -> None:
    with pytest.raises(ValueError, match="`online` and `make_env` belong together"):
        make_aligner(make_pipeline("policy"), episodes, make_env=None)
    without_critic = make_pipeline("policy")
    without_critic.register_modules(critic=None)
    with pytest.raises(ValueError, match="`pipeline` has no critic"):
        make_collector(without_critic, episodes)
    with pytest.raises(ValueError, match="`buffer_size` must hold at least one episode: the last one has 8 steps"):
        make_collector(make_pipeline("policy"), episodes, buffer_size=7).collect_before(2)
