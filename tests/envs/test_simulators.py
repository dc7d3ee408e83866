"""What the wrappers of other libraries' environments change, against the environments themselves."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="these environments come with the extra [robotics]")
pytest.importorskip("metaworld", reason="these environments come with the extra [robotics]")

from dmc_hub.envs.antmaze import MAZES, AntMazeEnv
from dmc_hub.envs.flat import make_quietly
from dmc_hub.envs.kitchen import SUBTASKS, KitchenEnv
from dmc_hub.envs.locomotion import make_locomotion
from dmc_hub.envs.metaworld import MetaWorldEnv


def test_locomotion_is_gymnasiums_v4() -> None:
    ours, theirs = make_locomotion("Hopper"), make_quietly("Hopper-v4")
    observation, _ = ours.reset(seed=3)
    np.testing.assert_array_equal(observation, theirs.reset(seed=3)[0].astype(np.float32))
    for action in np.random.default_rng(0).uniform(-1, 1, (15, 3)).astype(np.float32):
        mine, expected = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(mine[0], expected[0].astype(np.float32))
        assert mine[1:4] == expected[1:4]


def test_metaworlds_seed_chooses_among_its_goals() -> None:
    env = MetaWorldEnv("drawer-open")
    goals = [env.reset(seed=seed)[1]["goal"] for seed in range(200)]
    assert len(set(goals)) > 40
    assert max(goals) < 50
    first, _ = env.reset(seed=0)
    chosen, info = env.reset(seed=1, options={"goal": goals[0]})
    assert info == {"goal": goals[0]}
    np.testing.assert_array_equal(first, chosen)
    assert env.observation_space.contains(first)
    assert env.observation_space.shape is not None
    assert np.abs(first[36:]).max() > 0  # the goal is seen, as in MT1


def test_the_expert_solves_metaworld() -> None:
    policy: Any = pytest.importorskip("metaworld.policies").ENV_POLICY_MAP["button-press-v3"]()
    env = MetaWorldEnv("button-press")
    observation, _ = env.reset(seed=2)
    successes = []
    warnings.filterwarnings("ignore", "Constant")  # the expert asks for more than an action can be
    for _ in range(150):
        observation, reward, terminated, truncated, info = env.step(policy.get_action(observation.astype(float)))
        successes.append(info["success"])
        assert 0 <= reward <= 10
    assert not successes[0]
    assert any(successes)
    assert not terminated
    assert not truncated


@pytest.mark.parametrize("maze", list(MAZES))
def test_antmaze_stands_in_d4rls_coordinates(maze: str) -> None:
    env: Any = AntMazeEnv(maze)
    starts = np.stack([env.reset(seed=seed)[0] for seed in range(5)])
    assert np.abs(starts[:, :2]).max() <= 0.1  # the start is the origin, but for the ant's own noise
    assert np.ptp(starts[:, 0]) > 0
    inner = env.unwrapped
    np.testing.assert_allclose(env.goal, {"medium": (20, 20), "large": (32, 24)}[maze])
    np.testing.assert_allclose(inner.goal - env._origin, env.goal)
    # In D4RL the cell (row, column) lies at x = 4 (column - 1), y = 4 (row - 1): walls have to be where its map says.
    maps = pytest.importorskip("gymnasium_robotics.envs.maze.maps")
    geoms = {
        inner.ant_env.model.geom(i).name: inner.ant_env.model.geom_pos[i] for i in range(inner.ant_env.model.ngeom)
    }
    walls = {tuple(np.round(p[:2] - env._origin).astype(int)) for name, p in geoms.items() if name.startswith("block")}
    cells = getattr(maps, MAZES[maze][0])
    expected = {(4 * (j - 1), 4 * (i - 1)) for i, row in enumerate(cells) for j, cell in enumerate(row) if cell == 1}
    assert walls == expected


def test_antmaze_ends_at_the_goal() -> None:
    env: Any = AntMazeEnv("medium")
    env.reset(seed=0)
    inner = env.unwrapped
    qpos = inner.ant_env.data.qpos.copy()
    qpos[:2] = inner.goal
    inner.ant_env.set_state(qpos, inner.ant_env.data.qvel * 0)
    observation, reward, terminated, _, info = env.step(np.zeros(8, np.float32))
    assert (reward, terminated, info) == (1.0, True, {"success": True})
    np.testing.assert_allclose(observation[:2], env.goal, atol=0.1)


@pytest.mark.parametrize("kind", list(SUBTASKS))
def test_the_kitchen_has_d4rls_layout(kind: str) -> None:
    env: Any = KitchenEnv(kind)
    observation, _ = env.reset(seed=0)
    qpos = env.unwrapped.robot_env.data.qpos
    np.testing.assert_allclose(observation[:30], qpos[:30], atol=0.02)
    elements = pytest.importorskip("gymnasium_robotics.envs.franka_kitchen.kitchen_env")
    goal = observation[30:]
    shown = {
        name
        for name, index in elements.OBS_ELEMENT_INDICES.items()
        if np.allclose(goal[index], elements.OBS_ELEMENT_GOALS[name])
    }
    assert shown == (set() if kind == "relay" else set(SUBTASKS[kind]))


def test_completed_subtasks_are_the_return() -> None:
    env: Any = KitchenEnv("mixed")
    env.reset(seed=0)
    robot = env.unwrapped.robot_env
    elements = pytest.importorskip("gymnasium_robotics.envs.franka_kitchen.kitchen_env")
    rewards = []
    for name in SUBTASKS["mixed"]:
        qpos = robot.data.qpos.copy()
        qpos[elements.OBS_ELEMENT_INDICES[name]] = elements.OBS_ELEMENT_GOALS[name]
        robot.set_state(qpos, robot.data.qvel * 0)
        _, reward, terminated, _, info = env.step(np.zeros(9))
        rewards.append(reward)
    assert sum(rewards) == 4
    assert terminated
    assert info == {"success": True, "num_completed": 4}


def test_quiet_environments_are_gymnasiums() -> None:
    assert isinstance(make_quietly("Pendulum-v1").unwrapped, type(gymnasium.make("Pendulum-v1").unwrapped))
