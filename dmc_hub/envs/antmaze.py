"""AntMaze (Fu et al., 2020, arXiv:2004.07219) as gymnasium-robotics simulates it, in D4RL's coordinates and layout.

gymnasium's ant is faster than D4RL's: scores must not be set beside those of D4RL's environments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from dmc_hub.envs.extras import require
from dmc_hub.envs.flat import FlatEnv, make_quietly

MAX_EPISODE_STEPS = 1000
OBSERVATION_DIM, ACTION_DIM = 29, 8
CELL_SIZE = 4.0
MAZES = {"medium": ("MEDIUM_MAZE", (1, 1), (6, 6)), "large": ("LARGE_MAZE", (1, 1), (7, 9))}
"""Name of the map in gymnasium-robotics, and the cells (row, column) where episodes start and where the goal is."""


class AntMazeEnv(FlatEnv):
    """An ant that walks from one corner of a maze to the other.

    gymnasium-robotics lets y fall with a cell's row and puts the origin into the maze's middle. Here the map is turned
    over and the origin is the start, so that positions are those of D4RL's data: x is 4 (column - 1), y is 4 (row - 1).

    Observation: float32 `(29,)`: position x and y, then height, orientation and joints (13), velocities (14).
    Action: float32 `(8,)`, torques in `[-1, 1]`.
    Reward: 1 within 0.45 of the goal, else 0.
    Termination: at the goal, which is success; truncation after 1,000 steps.

    Args:
        maze: "medium" or "large".
        render_mode: "rgb_array", or None for an environment that does not draw.

    Raises:
        ImportError: gymnasium-robotics is not installed.
    """

    def __init__(self, maze: str, render_mode: str | None = None) -> None:
        require("gymnasium_robotics", "robotics")
        maps = require("gymnasium_robotics.envs.maze.maps", "robotics")
        name, start, goal = MAZES[maze]
        cells = [list(row) for row in getattr(maps, name)]
        cells[start[0]][start[1]], cells[goal[0]][goal[1]] = maps.RESET, maps.GOAL
        super().__init__(
            make_quietly(
                f"AntMaze_{maze.capitalize()}-v4",
                maze_map=cells[::-1],
                continuing_task=False,
                reset_target=False,
                render_mode=render_mode,
            )
        )
        inner: Any = self.env.unwrapped
        inner.position_noise_range = 0.0
        inner.ant_env._reset_noise_scale = 0.1  # as in D4RL; gymnasium-robotics starts every episode alike
        height, width = len(cells), len(cells[0])
        camera = inner.ant_env.mujoco_renderer  # its own camera shows the floor: look at the whole maze from above
        camera.camera_id = -1
        distance = CELL_SIZE * 1.25 * max(height, width)
        camera.default_cam_config = {"lookat": np.zeros(3), "distance": distance, "elevation": -90, "azimuth": 90}
        corner = CELL_SIZE * np.array([width / 2 - 0.5, height / 2 - 0.5])
        self._origin = CELL_SIZE * np.array([start[1], start[0]]) - corner
        self.goal = CELL_SIZE * np.array([goal[1] - start[1], goal[0] - start[0]])
        self.observation_space = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)

    def flatten(self, observation: Any) -> np.ndarray:
        """Position, then the rest of the state."""
        position = observation["achieved_goal"] - self._origin
        return np.concatenate([position, observation["observation"]]).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, {"success": bool(info["success"])}
