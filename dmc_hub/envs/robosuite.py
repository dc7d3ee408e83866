"""The tasks of robomimic's data (Mandlekar et al., 2021, arXiv:2108.03298) in robosuite itself."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces

from dmc_hub.envs.extras import require

IMAGE_SIZE = 84
MODEL_SEED = 0


class RobosuiteTask(NamedTuple):
    """A task of robosuite: its name there, how many Pandas, the width of "object", and the cameras of its images."""

    name: str
    num_robots: int
    object_dim: int
    cameras: tuple[str, ...]

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """Keys of robomimic's `obs` in the order in which Diffusion Policy concatenates them."""
        return ("object", *self.robot_keys)

    @property
    def robot_keys(self) -> tuple[str, ...]:
        """Those of the robots: position and orientation of the hand, the gripper's fingers."""
        parts = ("eef_pos", "eef_quat", "gripper_qpos")
        return tuple(f"robot{i}_{part}" for i in range(self.num_robots) for part in parts)

    @property
    def robot_dim(self) -> int:
        return 9 * self.num_robots

    @property
    def action_dim(self) -> int:
        return 7 * self.num_robots


ROBOSUITE_TASKS = {
    "lift": RobosuiteTask("Lift", 1, 10, ("agentview", "robot0_eye_in_hand")),
    "can": RobosuiteTask("PickPlaceCan", 1, 14, ("agentview", "robot0_eye_in_hand")),
    "square": RobosuiteTask("NutAssemblySquare", 1, 14, ("agentview", "robot0_eye_in_hand")),
    "transport": RobosuiteTask(
        "TwoArmTransport",
        2,
        41,
        ("shouldercamera0", "robot0_eye_in_hand", "shouldercamera1", "robot1_eye_in_hand"),
    ),
}


class RobosuiteEnv(gymnasium.Env[Any, np.ndarray]):
    """One of robomimic's tasks with the controller its demonstrations were recorded with (OSC_POSE, 20 Hz).

    The model is built once and an episode only sets its state (`hard_reset=False`): a hard reset takes a second. So
    Lift's cube, which robosuite draws between 4.0 and 4.4 cm wide with each model, always has one size. An episode's
    seed fixes where objects and robots start; robosuite 1.5 draws that from numpy's global generator, whose state is
    put back.

    Observation: without images float32 `(observation_dim,)`, the keys `observation_keys` in their order (lift 19, can
    and square 23, transport 59). With images a dict of "state", float32, the robots' keys (9 each), and "image",
    "image_1", ..., uint8 `(84, 84, 3)`, one for each of `cameras`, upright.
    Action: float32 `(7,)` per robot in `[-1, 1]`: the hand's move, its rotation, the gripper.
    Reward: 1 while the task is solved, else 0.
    Termination: none; truncation after `max_episode_steps`. `info["success"]` says whether the task is solved.

    Args:
        name: one of `ROBOSUITE_TASKS`.
        max_episode_steps: length of an episode.
        images: whether observations hold images.

    Raises:
        ImportError: robosuite is not installed.
    """

    def __init__(self, name: str, max_episode_steps: int, images: bool = False) -> None:
        self.task, self.images, self.max_episode_steps = ROBOSUITE_TASKS[name], images, max_episode_steps
        with _global_generator_seeded(MODEL_SEED):
            self._env = _make(self.task, images)
        self._num_steps = 0
        self.action_space = spaces.Box(-1.0, 1.0, (self.task.action_dim,), np.float32)
        self.observation_space = self._observation_space()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        self._num_steps = 0
        with _global_generator_seeded(int(self.np_random.integers(2**32))):
            return self._observation(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        observations, reward, _, _ = self._env.step(np.clip(action, -1.0, 1.0))
        self._num_steps += 1
        info = {"success": bool(self._env._check_success())}
        return self._observation(observations), float(reward), False, self._num_steps >= self.max_episode_steps, info

    def close(self) -> None:
        """Free the simulation."""
        self._env.close()

    def _observation_space(self) -> spaces.Space[Any]:
        if not self.images:
            return spaces.Box(-np.inf, np.inf, (self.task.object_dim + self.task.robot_dim,), np.float32)
        cameras = {name: spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) for name in self._image_names()}
        return spaces.Dict({"state": spaces.Box(-np.inf, np.inf, (self.task.robot_dim,), np.float32), **cameras})

    def _image_names(self) -> list[str]:
        return ["image", *(f"image_{i}" for i in range(1, len(self.task.cameras)))]

    def _observation(self, observations: dict[str, Any]) -> Any:
        keys = self.task.robot_keys if self.images else ("object-state", *self.task.robot_keys)
        state = np.concatenate([observations[key] for key in keys]).astype(np.float32)
        if not self.images:
            return state
        views = [np.ascontiguousarray(observations[f"{camera}_image"][::-1]) for camera in self.task.cameras]
        return {"state": state, **dict(zip(self._image_names(), views, strict=True))}


def _make(task: RobosuiteTask, images: bool) -> Any:
    logger = logging.getLogger("robosuite_logs")
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        suite = require("robosuite", "robosuite")
        logger.setLevel(logging.ERROR)  # importing it has set another level
        config = suite.load_composite_controller_config(controller="BASIC", robot="Panda")
        # robosuite before 1.5, which the demonstrations come from, moved hands along the world's axes.
        config["body_parts"]["right"]["input_ref_frame"] = "world"
        return suite.make(
            task.name,
            robots=["Panda"] * task.num_robots,
            controller_configs=config,
            has_renderer=False,
            has_offscreen_renderer=images,
            use_camera_obs=images,
            camera_names=list(task.cameras),
            camera_heights=IMAGE_SIZE,
            camera_widths=IMAGE_SIZE,
            use_object_obs=True,
            reward_shaping=False,
            control_freq=20,
            ignore_done=True,
            hard_reset=False,
        )


@contextlib.contextmanager
def _global_generator_seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
