"""The table of tasks, its scores, and tasks of a user's own."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub import cli
from dmc_hub.collect import BEHAVIORS
from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.evaluation import return_statistics
from dmc_hub.presets import CONTROLLERS, control, preset_of
from dmc_hub.rollout import Rollouts
from dmc_hub.tasks import TASKS, get_task
from dmc_hub.tasks.scores import share_with_subtasks

OWN_TASK = """
import gymnasium
from dmc_hub.envs.flat import FlatEnv
from dmc_hub.tasks import Task

PENDULUM = Task(
    name="pendulum",
    summary="swing up",
    env_id="Pendulum-v1",
    make_env=lambda: FlatEnv(gymnasium.make("Pendulum-v1")),
    max_episode_steps=200,
    observation_dim=3,
    action_dim=1,
    controllers=("policy",),
    horizon=4,
)
SAME = Task(**{**vars(PENDULUM), "name": "nav1d-full"})
NUMBER = 3
"""


def rollouts(rewards: list[list[float]], successes: list[list[bool]] | None = None) -> Rollouts:
    """Episodes of given rewards; their padding holds rewards and successes that must not count."""
    width = max(map(len, rewards)) + 1
    valid = np.array([[i < len(row) for i in range(width)] for row in rewards])
    padded = np.array([row + [0.0] * (width - len(row)) for row in rewards], dtype=np.float32)
    told = None
    if successes is not None:
        told = np.array([row + [False] * (width - len(row)) for row in successes])
    empty: Any = np.zeros(0)
    return Rollouts(
        seeds=np.arange(len(rewards)),
        returns=np.array([sum(row) for row in rewards]),
        lengths=valid.sum(axis=1),
        observations=empty,
        actions=empty,
        rewards=padded,
        next_observations=empty,
        terminations=empty,
        truncations=empty,
        valid=valid,
        failed_seeds=empty,
        visited=empty,
        successes=told,
    )


def score(name: str, episodes: Rollouts) -> list[float]:
    function = TASKS[name].score
    assert function is not None
    return [float(value) for value in function(episodes)]


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("halfcheetah", -280.178953, 12135.0), ("hopper", -20.272305, 3234.3), ("walker2d", 1.629008, 4592.3)],
)
def test_locomotion_is_scored_as_by_d4rl(name: str, low: float, high: float) -> None:
    episodes = rollouts([[low], [high], [low, 0.5 * (high - low)]])
    for quality in ("random", "medium", "medium-replay", "medium-expert"):
        np.testing.assert_allclose(score(f"{name}-{quality}", episodes), [0, 100, 50], atol=1e-9)


def test_other_tasks_are_scored_as_in_the_tables() -> None:
    episodes = rollouts([[0.0, 1.0, 0.25], [-0.5, -0.25]], [[False, True, False], [False, False]])
    np.testing.assert_allclose(score("push-t", episodes), [1.0, -0.25])  # the padding's 0 is no reward
    assert score("metaworld-sweep-into", episodes) == [1, 0]
    assert score("antmaze-large-play", episodes) == [100, 0]
    assert score("robomimic-can-mh", episodes) == [1, 0]
    assert score("relay-kitchen", episodes) == [1, 0]
    assert score("kitchen-mixed", rollouts([[1, 0, 1], [1, 0, 2]])) == [50, 75]
    np.testing.assert_allclose(share_with_subtasks(np.array([0, 1, 3, 4]), 5), [0.75, 0.5, 0.5, 0.25, 0])


def test_success_is_at_any_step_or_at_the_last() -> None:
    episodes = rollouts([[0, 0, 0], [0, 0], [0]], [[False, True, False], [False, True], [False]])
    assert episodes.succeeded("any step").tolist() == [True, True, False]
    assert episodes.succeeded("last step").tolist() == [False, True, False]
    with pytest.raises(ValueError, match="`when` must be 'any step' or 'last step', got 'first'"):
        episodes.succeeded("first")
    with pytest.raises(ValueError, match="`info` has neither 'success' nor 'is_success'"):
        rollouts([[0.0]]).succeeded("any step")


def test_statistics_hold_success_and_score() -> None:
    statistics = return_statistics(np.ones(4), successes=np.array([True, False, False, False]), scores=np.arange(4.0))
    assert (statistics.success_rate, statistics.normalized_score) == (0.25, 1.5)
    assert return_statistics(np.ones(4)).success_rate is None


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_record_is_whole(task: Any) -> None:
    assert TASKS[task.name] is task
    assert task.behavior in BEHAVIORS
    assert set(task.controllers) <= set(CONTROLLERS)
    assert task.num_action_steps <= task.horizon
    assert (task.score is None) == (task.score_name is None)
    assert task.make_dataset is not None or task.data_hint
    assert task.reader is not None or task.make_dataset is not None or "dmc-hub data collect" in task.data_hint
    if task.make_dataset is None:
        with pytest.raises(ValueError, match=f"`task` '{task.name}' has no data of its own"):
            task.dataset(0)
    assert (task.observation_dim is None) == (task.state_dim is not None) == bool(task.cameras)
    for controller in task.controllers:
        assert preset_of(task, controller, "ddpm").num_candidates > 1


def test_a_controller_that_does_not_suit_is_refused() -> None:
    with pytest.raises(ValueError, match="`controller of relay-kitchen` must be one of policy; got 'planner'"):
        control(TASKS["relay-kitchen"], "planner")


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN_TASK)
    return path


def test_a_task_of_ones_own_is_the_same_record(own_file: Path) -> None:
    task = get_task(f"{own_file}:PENDULUM")
    assert task.name == "pendulum"
    assert get_task(f"{own_file}:PENDULUM") is task
    assert task.make_env().reset(seed=0)[0].shape == (3,)


def test_wrong_files_of_tasks_are_refused(own_file: Path) -> None:
    with pytest.raises(ValueError, match=r"mine.py:NUMBER must be a `dmc_hub.tasks.Task`, got int"):
        get_task(f"{own_file}:NUMBER")
    with pytest.raises(ValueError, match=r"mine.py:MISSING must be a `dmc_hub.tasks.Task`, got NoneType"):
        get_task(f"{own_file}:MISSING")
    with pytest.raises(ValueError, match="is called 'nav1d-full', like a built-in one"):
        get_task(f"{own_file}:SAME")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*other.py"):
        get_task(f"{own_file.parent / 'other.py'}:PENDULUM")


def test_a_task_of_ones_own_is_checked(own_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["task", "check", "--task", f"{own_file}:PENDULUM"]) == 0
    printed = capsys.readouterr().out
    assert str(own_file) not in printed
    for part in ("environment", "100 random steps", "dataset", "policy: train", "policy: align", "policy: evaluate"):
        assert part in printed
    assert "pendulum  ok in" in printed


def test_an_environment_that_differs_from_its_record_is_found(
    own_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_file.write_text(OWN_TASK.replace("observation_dim=3", "observation_dim=4"))
    assert cli.main(["task", "check", "--task", f"{own_file}:PENDULUM"]) == 2
    assert "`observation_dim` of task 'pendulum' is 4, but it has Box" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gym_pusht", None)  # as if it were not installed
    assert cli.main(["task", "check", "--task", "push-t"]) == 2
    assert 'pip install "dmc_hub[robotics]"' in capsys.readouterr().err


@pytest.fixture
def walks(tmp_path: Path) -> Path:
    make_nav1d_dataset("full", num_episodes=3).save_to_disk(tmp_path / "walks")
    return tmp_path / "walks"


def test_data_are_read_one_source_after_the_other(walks: Path) -> None:
    task = dataclasses.replace(TASKS["nav1d-full"], make_dataset=None)
    whole = task.episodes(0, [str(walks)])
    assert whole.num_episodes == 3
    joined = task.episodes(0, [f"{walks}[:17]", str(walks)])
    assert joined.num_episodes == 5
    np.testing.assert_array_equal(joined.rewards, np.concatenate([whole.rewards[:16], whole.rewards]))
    with pytest.raises(ValueError, match="has no data of its own"):
        task.episodes(0)
    wider = dataclasses.replace(task, observation_dim=4)
    with pytest.raises(ValueError, match="has observations of width 3; those of 'nav1d-full' have 4"):
        wider.episodes(0, [str(walks)])


def test_an_image_policy_gets_the_state_and_the_cameras_under_their_names(tmp_path: Path) -> None:
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=2))
    frames = np.arange(episodes.num_steps, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    dataclasses.replace(episodes, images={"img": frames}).to_dataset().save_to_disk(tmp_path / "seen")
    task = dataclasses.replace(TASKS["nav1d-full"], observation_dim=None, state_dim=2, cameras={"image": "img"})
    seen = task.episodes(0, [str(tmp_path / "seen")])
    np.testing.assert_array_equal(seen.observations, episodes.observations[:, :2])
    np.testing.assert_array_equal(seen.next_observations, episodes.next_observations[:, :2])
    assert list(seen.images) == ["image"]
    np.testing.assert_array_equal(seen.images["image"], frames)
    other = dataclasses.replace(task, cameras={"image": "wrist"})
    with pytest.raises(ValueError, match="has no images wrist: 'nav1d-full' needs them"):
        other.episodes(0, [str(tmp_path / "seen")])


def test_scores_are_normalised_to_an_experts() -> None:
    def normalized(name: str, episodes: Rollouts) -> list[float] | None:
        function = TASKS[name].score
        scores = None if function is None else function(episodes)
        found = TASKS[name].normalized_scores(episodes.returns, scores)
        return None if found is None else [round(float(value), 6) for value in found]

    assert normalized("hopper-medium", rollouts([[-20.272305], [3234.3]])) == [0, 1]
    assert normalized("antmaze-large-play", rollouts([[0.0, 1.0]], [[False, True]])) == [1]
    assert normalized("kitchen-mixed", rollouts([[1.0, 1.0, 1.0], [1.0] * 4])) == [0.75, 1]
    assert normalized("relay-kitchen", rollouts([[1.0] * 4], [[False, False, False, True]])) == [1]
    assert normalized("push-t", rollouts([[0.2, 0.5, 0.1]])) == [0.5]
    optimum = TASKS["nav1d-full"].optimal_return
    assert optimum is not None
    assert normalized("nav1d-full", rollouts([[optimum() / 2] * 2])) == [1]
    unknown = dataclasses.replace(TASKS["nav1d-full"], optimal_return=None)
    assert unknown.normalized_scores(np.ones(2), None) is None
