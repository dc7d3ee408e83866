"""Recorded episodes seen again: their actions are replayed in an environment that draws itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from PIL import Image

from dmc_hub.rollout import Rollouts
from dmc_hub.tasks import Task

GIF_SIZE = 320


@dataclass(frozen=True)
class Replay:
    """Frames of an episode.

    Attributes:
        seed: of the episode.
        frames: uint8 of shape `(num_frames, height, width, 3)`, evenly over the episode, first and last included.
        frames_per_second: at which they are as fast as the environment.
    """

    seed: int
    frames: np.ndarray
    frames_per_second: float


def best_median_worst(outcomes: np.ndarray) -> dict[str, int]:
    """Places of the best, the median (the lower one of two) and the worst of outcomes `(num_episodes,)`."""
    order = np.argsort(-np.asarray(outcomes), kind="stable")
    return {"best": int(order[0]), "median": int(order[len(order) // 2]), "worst": int(order[-1])}


def replay(task: Task, rollouts: Rollouts, seeds: Sequence[int], *, max_frames: int) -> list[Replay]:
    """Draw episodes by replaying their actions, which costs no decision; what is observed must be what was.

    Args:
        task: whose episodes they are.
        rollouts: that hold them.
        seeds: of the episodes to draw.
        max_frames: of each episode at most.

    Raises:
        ImportError: the environment's extra is not installed.
        ValueError: the task's environment cannot be drawn, `rollouts` lacks a seed, or the environment behaves
            otherwise than when the episode was recorded.
    """
    if task.make_render_env is None:
        raise ValueError(f"`task` {task.name!r} has no environment that draws: it lacks `make_render_env`.")
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo then draws without a screen
    env = task.make_render_env()
    try:
        return [_replay(env, rollouts, int(seed), max_frames) for seed in seeds]
    finally:
        env.close()


def _replay(env: gymnasium.Env[Any, Any], rollouts: Rollouts, seed: int, max_frames: int) -> Replay:
    [index, *_] = [*np.flatnonzero(rollouts.seeds == seed), None]
    if index is None:
        raise ValueError(f"`rollouts` holds no episode of seed {seed}.")
    length = int(rollouts.lengths[index])
    drawn = set(np.linspace(0, length, min(max_frames, length + 1)).round().astype(int).tolist())
    path = np.concatenate([rollouts.observations[index, :1], rollouts.next_observations[index, :length]])
    observation, _ = env.reset(seed=seed)
    frames = []
    for step in range(length + 1):
        if step > 0:
            observation, *_ = env.step(rollouts.actions[index, step - 1])
        if not np.array_equal(np.asarray(observation, np.float32), path[step]):
            raise ValueError(
                f"The episode of seed {seed} differs at step {step} when it is replayed: the environment is not a "
                "function of its seed and its actions."
            )
        if step in drawn:
            frames.append(np.asarray(env.render(), dtype=np.uint8))
    speed = float(env.metadata.get("render_fps", 30))
    return Replay(seed, np.stack(frames), max(1.0, speed * len(frames) / (length + 1)))


def save_video(replay: Replay, path: Path) -> Path:
    """Write the frames, whole or not at all, as MP4 where imageio has ffmpeg (the extra `[video]`), else as GIF.

    Args:
        replay: the frames.
        path: the file to write, without its ending.

    Returns:
        The file.
    """
    try:
        import imageio_ffmpeg  # noqa: F401
    except ImportError:
        return _save_gif(replay, path.with_name(f"{path.name}.gif"))
    return _save_mp4(replay, path.with_name(f"{path.name}.mp4"))


def _save_gif(replay: Replay, path: Path) -> Path:
    images = [Image.fromarray(frame) for frame in replay.frames]
    for image in images:
        image.thumbnail((GIF_SIZE, GIF_SIZE))
    unfinished = _unfinished(path)
    try:
        duration = 1000.0 / replay.frames_per_second
        images[0].save(unfinished, format="GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _save_mp4(replay: Replay, path: Path) -> Path:
    import imageio.v2 as imageio

    unfinished = _unfinished(path)
    height, width = (size // 2 * 2 for size in replay.frames.shape[1:3])  # H.264 in yuv420p needs even sizes
    try:
        imageio.mimwrite(
            unfinished,
            list(replay.frames[:, :height, :width]),
            format="FFMPEG",
            fps=replay.frames_per_second,
            macro_block_size=1,
        )
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _unfinished(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
