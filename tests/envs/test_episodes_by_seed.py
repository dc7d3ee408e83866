"""What every task's environment promises: its spaces, and episodes that a seed fixes."""

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest

from dmc_hub.envs.extras import require
from dmc_hub.envs.flat import FlatEnv
from dmc_hub.tasks import TASKS, Task, describe_task, make_vector_env

LIBRARY_OF_EXTRA = {"mujoco": "mujoco", "robotics": "gymnasium_robotics", "robosuite": "robosuite"}
NAMES = (
    "nav1d-full",
    "hopper-medium",
    "halfcheetah-medium",
    "walker2d-medium",
    "push-t",
    "push-t-image",
    "metaworld-button-press",
    "metaworld-sweep-into",
    "antmaze-medium-play",
    "antmaze-large-diverse",
    "kitchen-mixed",
    "kitchen-partial",
    "relay-kitchen",
    "robomimic-lift-ph",
    "robomimic-transport-mh",
)


@pytest.fixture(params=NAMES)
def task(request: pytest.FixtureRequest) -> Task:
    task = TASKS[request.param]
    for extra in task.extras:
        pytest.importorskip(LIBRARY_OF_EXTRA[extra], reason=f"the environment comes with the extra [{extra}]")
    return task


def play(env: gymnasium.Env[Any, Any], seed: int, num_steps: int = 25) -> dict[str, Any]:
    observation, _ = env.reset(seed=seed)
    rng = np.random.default_rng(0)
    observations, rewards = [observation], []
    for _ in range(num_steps):
        low, high = (getattr(env.action_space, bound) for bound in ("low", "high"))
        observation, reward, terminated, truncated, _ = env.step(rng.uniform(low, high).astype(np.float32))
        observations.append(observation)
        rewards.append(reward)
        if terminated or truncated:
            break
    assert all(env.observation_space.contains(each) for each in observations)
    flat: list[Any] = [gymnasium.spaces.flatten(env.observation_space, each) for each in observations]
    return {"observations": np.stack(flat), "rewards": np.array(rewards)}


def test_a_seed_fixes_an_episode(task: Task) -> None:
    env, another = task.make_env(), task.make_env()
    first, other = play(env, seed=11), play(env, seed=12)
    again = play(env, seed=11)  # after an episode of another seed
    fresh = play(another, seed=11)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
        np.testing.assert_array_equal(values, fresh[name])
    assert not np.array_equal(first["observations"][0], other["observations"][0])
    env.close()
    another.close()


def test_the_table_says_what_the_environment_is(task: Task) -> None:
    env = task.make_env()
    assert isinstance(env.action_space, gymnasium.spaces.Box)
    assert env.action_space.shape == (task.action_dim,)
    assert env.action_space.dtype == np.float32
    assert np.isfinite(env.action_space.low).all()
    if task.observation_dim is None:
        assert isinstance(env.observation_space, gymnasium.spaces.Dict)
        assert {"state", "image"} <= set(env.observation_space.keys())
        return
    assert env.observation_space.shape == (task.observation_dim,)
    assert env.observation_space.dtype == np.float32
    assert describe_task(task)["observation_space"]["shape"] == [task.observation_dim]
    vector_env = make_vector_env(task, 2)
    assert vector_env.num_envs == 2
    single, _ = env.reset(seed=5)
    batch, _ = vector_env.reset(seed=[9, 5])  # type: ignore[arg-type]
    np.testing.assert_array_equal(batch[1], single)
    vector_env.close()
    env.close()


def test_episodes_end_when_the_table_says() -> None:
    for name in ("halfcheetah-medium", "kitchen-mixed"):
        for extra in TASKS[name].extras:
            pytest.importorskip(LIBRARY_OF_EXTRA[extra], reason=f"the environment comes with the extra [{extra}]")
        env = TASKS[name].make_env()
        env.reset(seed=0)
        action, length, over = np.zeros(TASKS[name].action_dim, np.float32), 0, False
        while not over:
            *_, terminated, truncated, _ = env.step(action)
            length, over = length + 1, terminated or truncated
        assert (length, terminated, truncated) == (TASKS[name].max_episode_steps, False, True)


def test_the_number_of_environments_is_limited() -> None:
    task = dataclasses.replace(TASKS["nav1d-full"], max_num_envs=3)
    assert make_vector_env(task, 2).num_envs == 2
    assert make_vector_env(task, 9).num_envs == 3
    with pytest.raises(ValueError, match="`num_envs` must be at least 1, got 0"):
        make_vector_env(task, 0)


def test_flat_observations_and_clipped_actions() -> None:
    class Nested(gymnasium.Env[Any, Any]):
        observation_space = gymnasium.spaces.Dict(
            {"b": gymnasium.spaces.Box(0, 1, (2,)), "a": gymnasium.spaces.Box(-1, 1, (1,))}
        )
        action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            return {"a": np.array([0.5]), "b": np.array([0.25, 0.75])}, {}

        def step(self, action: Any) -> Any:
            return {"a": action / 2, "b": np.zeros(2)}, np.float64(action[0]), np.bool_(True), False, {}

    env = FlatEnv(Nested())
    np.testing.assert_array_equal(env.reset()[0], np.array([0.5, 0.25, 0.75], np.float32))
    observation, reward, terminated, _, _ = env.step(np.array([7.0]))
    np.testing.assert_array_equal(observation, np.array([1, 0, 0], np.float32))
    assert (reward, terminated) == (2.0, True)
    assert type(reward) is float
    discrete = gymnasium.make("CartPole-v1")
    with pytest.raises(ValueError, match=r"`env` must have actions of shape \(dim,\), got Discrete\(2\)"):
        FlatEnv(discrete)


def test_a_missing_library_names_its_extra() -> None:
    with pytest.raises(ImportError, match=r'`no_such_simulator` cannot be imported .* `pip install "dmc_hub\[robotics'):
        require("no_such_simulator", "robotics")
