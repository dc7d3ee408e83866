"""Nav1D as LeRobot's EnvHub loads it: from a copy of the file."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmc_hub.envs import env_hub, nav1d


@pytest.fixture
def module(tmp_path: Path) -> Any:
    shutil.copy(env_hub.__file__, tmp_path / "env.py")
    spec = importlib.util.spec_from_file_location("hub_env_someone_nav1d", tmp_path / "env.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_episodes_are_those_of_nav1d(module: Any) -> None:
    env = module.make_env(n_envs=2, use_async_envs=False)
    observations, _ = env.reset(seed=[3, 4])
    assert observations["agent_pos"].shape == (2, 1)
    np.testing.assert_allclose(observations["environment_state"], nav1d.observation(np.zeros(2), 0)[:, 1:])
    solution, total = nav1d.optimal_value_function(), np.zeros(2)
    best = np.interp(observations["agent_pos"][0, 0], solution.positions, solution.values[0])
    for t in range(nav1d.HORIZON):
        actions = nav1d.optimal_action(observations["agent_pos"][:, 0], t)[:, None].astype(np.float32)
        actions[1] = 1  # away from the later targets
        observations, rewards, terminations, _, infos = env.step(actions)
        total += rewards
    assert terminations.all()
    assert total[0] == pytest.approx(best, abs=0.01)
    assert total[1] < 0.9 * total[0]
    assert infos["is_success"].tolist() == [True, False]
    assert env.call("_max_episode_steps") == (8, 8)
    assert isinstance(env.call("task_description")[0], str)
    env.close()
