"""Nav1D, the one-dimensional navigation task of section 4.1 of Huh & Mohapatra, 2025 (arXiv:2502.12198).

The first half of the file is the task as pure vectorised functions, dynamic programming included; the second
half wraps them as a gymnasium environment and a vector environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from scipy.ndimage import maximum_filter1d

HORIZON = 8
STEP_SIZE = 0.5
REWARD_STD = 0.25
OBSERVATION_DIM = 3
ACTION_DIM = 1
GRID_POINTS_PER_UNIT = 2000
_MEANS_SEED = 5


@lru_cache(maxsize=1)
def _reward_means() -> np.ndarray:
    means = np.random.default_rng(_MEANS_SEED).uniform(-0.9, 0.9, HORIZON)
    means.setflags(write=False)
    return means


def reward_means() -> np.ndarray:
    """Means of the reward distributions: entry `t` rewards the state reached by the action of step `t`.

    Returns:
        A read-only float64 array of shape `(8,)`, in `[-0.9, 0.9]`.
    """
    return _reward_means()


def reward(next_position: np.ndarray, t: np.ndarray | int) -> np.ndarray:
    """Reward of arriving at `next_position` with the action of step `t` (Eq. 14), in `(0, 1]`."""
    gap = np.asarray(next_position) - reward_means()[t]
    return cast(np.ndarray, np.exp(-0.5 * np.square(gap / REWARD_STD)))


def step(
    position: np.ndarray | float, action: np.ndarray | float, t: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray]:
    """One transition of the task (Eq. 13 and 14); all arguments broadcast against each other.

    Args:
        position: positions, in `[-1, 1]`.
        action: moves in units of the step size 0.5; values outside `[-1, 1]` are clipped to it.
        t: index of the step, an integer in `[0, 7]`.

    Returns:
        The next position, in `[-1, 1]`, and the reward, in `(0, 1]`.
    """
    next_position = np.clip(np.asarray(position) + STEP_SIZE * np.clip(action, -1.0, 1.0), -1.0, 1.0)
    return next_position, reward(next_position, t)


def observation(position: np.ndarray | float, t: np.ndarray | int) -> np.ndarray:
    """Float32 observations `(position, t / 8, mean of the next reward)`; the last is 0 once the episode is
    over.

    Args:
        position: positions of shape `(...)`.
        t: number of steps taken so far, an integer in `[0, 8]`, broadcast against `position`.

    Returns:
        Observations of shape `(..., 3)`.
    """
    position, t = np.broadcast_arrays(position, t)
    next_mean = np.append(reward_means(), 0.0)[t]
    return np.stack([position, t / HORIZON, next_mean], axis=-1).astype(np.float32)


def decode_observation(observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position and step index of observations of shape `(..., 3)`: the inverse of `observation`."""
    observations = np.asarray(observations)
    return observations[..., 0].astype(np.float64), np.rint(observations[..., 1] * HORIZON).astype(np.int64)


def planned_next_positions(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Where the true dynamics would lead from every planned state under its planned action.

    The clock of a plan is the one of its first observation, which is the observed state.

    Args:
        observations: planned observations of shape `(..., horizon, 3)`.
        actions: planned actions of shape `(..., horizon, 1)`.

    Returns:
        Positions of shape `(..., horizon - 1, 1)`; NaN for transitions past the end of the task.
    """
    position, t = decode_observation(observations)
    steps = t[..., :1] + np.arange(observations.shape[-2] - 1)
    next_position, _ = step(position[..., :-1], actions[..., :-1, 0], np.minimum(steps, HORIZON - 1))
    return np.where(steps < HORIZON, next_position, np.nan)[..., None]


class OptimalSolution(NamedTuple):
    """Dynamic programming on a grid.

    positions: grid of shape `(num_points,)`.
    values: optimal values of shape `(9, num_points)`, the last row zero.
    arrival_values: reward plus next value of arriving at a grid point, of shape `(8, num_points)`.
    peaks: positions of the local maxima of each row of `arrival_values`, padded with NaN.
    """

    positions: np.ndarray
    values: np.ndarray
    arrival_values: np.ndarray
    peaks: np.ndarray


@lru_cache(maxsize=8)
def optimal_value_function(low: float = -1.0, high: float = 1.0) -> OptimalSolution:
    """Solve the task by backward dynamic programming where every state has to stay in `[low, high]`.

    From `s` every point of `[s - 0.5, s + 0.5]` inside the region can be reached, so one backward step is a
    sliding maximum over the grid of spacing 0.0005.
    """
    if not -1.0 <= low < high <= 1.0:
        raise ValueError(f"`low` and `high` must satisfy -1 <= low < high <= 1, got {low} and {high}.")
    num_points = round((high - low) * GRID_POINTS_PER_UNIT) + 1
    positions = np.linspace(low, high, num_points)
    radius = int(STEP_SIZE * (num_points - 1) / (high - low) + 1e-9)
    values = np.zeros((HORIZON + 1, num_points))
    arrival_values = np.empty((HORIZON, num_points))
    for t in reversed(range(HORIZON)):
        arrival_values[t] = reward(positions, t) + values[t + 1]
        values[t] = maximum_filter1d(arrival_values[t], 2 * radius + 1, mode="nearest")
    solution = OptimalSolution(positions, values, arrival_values, _peaks(positions, arrival_values))
    for array in solution:
        array.setflags(write=False)
    return solution


def _peaks(positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    padded = np.pad(rows, ((0, 0), (1, 1)), constant_values=-np.inf)
    is_peak = (rows > padded[:, :-2]) & (rows >= padded[:, 2:])
    order = np.argsort(~is_peak, axis=1, kind="stable")[:, : is_peak.sum(axis=1).max()]
    return np.where(np.take_along_axis(is_peak, order, axis=1), positions[order], np.nan)


def _interpolate(rows: np.ndarray, positions: np.ndarray, t: np.ndarray | int, position: np.ndarray) -> np.ndarray:
    scaled = (position - positions[0]) / (positions[1] - positions[0])
    left = np.clip(scaled.astype(np.int64), 0, len(positions) - 2)
    weight = scaled - left
    return cast(np.ndarray, (1.0 - weight) * rows[t, left] + weight * rows[t, left + 1])


def optimal_q(position: np.ndarray | float, t: np.ndarray | int, action: np.ndarray | float) -> np.ndarray:
    """Return of taking `action` at step `t` from `position`, then acting optimally; arguments broadcast."""
    solution = optimal_value_function()
    next_position, rewards = step(position, action, t)
    result: np.ndarray = rewards + _interpolate(solution.values, solution.positions, np.asarray(t) + 1, next_position)
    return result


def optimal_action(position: np.ndarray | float, t: np.ndarray | int) -> np.ndarray:
    """The optimal action, in `[-1, 1]`, at step `t` from `position`; arguments broadcast.

    The best reachable point is an end of the reachable interval or a local maximum of the value of arriving
    there, and there are only a handful of those: all are compared.
    """
    solution = optimal_value_function()
    position, t = np.broadcast_arrays(np.asarray(position, dtype=np.float64), t)
    lowest, highest = np.maximum(position - STEP_SIZE, -1.0), np.minimum(position + STEP_SIZE, 1.0)
    peaks = np.clip(solution.peaks[t], lowest[..., None], highest[..., None])
    targets = np.concatenate([lowest[..., None], highest[..., None], np.nan_to_num(peaks)], axis=-1)
    unreachable = np.abs(targets - position[..., None]) > STEP_SIZE * (1.0 + 1e-9)
    values = _interpolate(solution.arrival_values, solution.positions, t[..., None], targets)
    best = np.argmax(np.where(unreachable, -np.inf, values), axis=-1)[..., None]
    result: np.ndarray = np.clip((np.take_along_axis(targets, best, axis=-1)[..., 0] - position) / STEP_SIZE, -1.0, 1.0)
    return result


def optimal_return(low: float = -1.0, high: float = 1.0) -> float:
    """Optimal return over uniform starts in `[low, high]` with every state confined to it.

    About 7.38 for the whole task, about 4.82 for the region `[0, 1]` of the *partial* dataset.
    """
    values = optimal_value_function(low, high).values[0]
    return float(np.mean((values[1:] + values[:-1]) / 2.0))


class Nav1DEnv(gym.Env[np.ndarray, np.ndarray]):
    """One-dimensional navigation: be where the reward is, eight times in a row.

    | part | meaning | dtype, shape, range |
    |---|---|---|
    | observation | position; `t / 8`; mean of the next reward distribution (0 after the last step) | float32 `(3,)`, `[-1, 1]`, `[0, 1]`, `[-1, 1]` |
    | action | move `s' = clip(s + 0.5 a, -1, 1)`; values outside the range are clipped to it | float32 `(1,)`, `[-1, 1]` |
    | reward | `exp(-(s' - mean_t)^2 / (2 * 0.25^2))` | float, `(0, 1]` |
    | termination | after exactly 8 steps; never truncated | bool |
    | start | uniform in `[-1, 1]` | |

    The means are fixed (`reward_means()`). An episode's return is in `(0, 8]`; the optimum averages 7.38 over starts.
    `render_mode="rgb_array"` draws Figure 4 of the paper: the reward distributions in blue, the trajectory in green,
    and the positions each action could reach in gray.
    """  # noqa: E501

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, render_mode: str | None = None) -> None:
        _check_render_mode(render_mode)
        self.render_mode = render_mode
        self.observation_space = _observation_space()
        self.action_space = _action_space()
        self._path: list[float] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a position drawn uniformly from `[-1, 1]`."""
        super().reset(seed=seed)
        self._path = [_draw_start(self.np_random)]
        return observation(self._path[-1], 0), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move by `0.5 * action`; see the class for what is returned."""
        t = len(self._path) - 1
        if not 0 <= t < HORIZON:
            raise ValueError(f"The episode is not running (step {t} of {HORIZON}): call `reset` first.")
        action = _check_actions(action, (ACTION_DIM,))
        next_position, rewards = step(self._path[-1], action[0], t)
        self._path.append(float(next_position))
        return observation(self._path[-1], t + 1), float(rewards), t + 1 == HORIZON, False, {}

    def render(self) -> np.ndarray | None:
        """The picture of the episode so far as a uint8 array of shape `(360, 560, 3)`."""
        return _draw_episode(self._path) if self.render_mode == "rgb_array" else None


class Nav1DVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` copies of Nav1D stepped as one array; contract and starts as in `Nav1DEnv`.

    Environment `i` of `reset(seed=s)` starts like `Nav1DEnv.reset(seed=s + i)`; a list gives each its own
    seed. Autoreset is gymnasium's NEXT_STEP: the step after an episode's last one ignores the action and
    resets.
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(self, num_envs: int = 1, render_mode: str | None = None) -> None:
        if num_envs < 1:
            raise ValueError(f"`num_envs` must be at least 1, got {num_envs}.")
        _check_render_mode(render_mode)
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = _observation_space()
        self.single_action_space = _action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generators = [seeding.np_random()[0] for _ in range(num_envs)]
        self._paths = np.zeros((num_envs, HORIZON + 1))
        self._steps = np.full(num_envs, -1)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all episodes; `seed` is one seed for the first environment, or a list with one for each."""
        for i, env_seed in enumerate(_seeds_per_env(seed, self.num_envs)):
            if env_seed is not None:
                self._generators[i] = seeding.np_random(env_seed)[0]
        self._restart(np.ones(self.num_envs, dtype=bool))
        return observation(self._paths[:, 0], 0), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step all environments; the ones whose episode ended in the previous step are reset instead."""
        if self._steps[0] < 0:
            raise ValueError("No episode is running: call `reset` first.")
        actions = _check_actions(actions, (self.num_envs, ACTION_DIM))
        resetting = self._steps == HORIZON
        t = np.where(resetting, 0, self._steps)
        rows = np.arange(self.num_envs)
        next_positions, rewards = step(self._paths[rows, t], actions[:, 0], t)
        self._paths[rows, t + 1] = next_positions
        self._steps = t + 1
        self._restart(resetting)
        observations = observation(self._paths[rows, self._steps], self._steps)
        rewards = np.where(resetting, 0.0, rewards)
        return observations, rewards, self._steps == HORIZON, np.zeros(self.num_envs, dtype=bool), {}

    def render(self) -> tuple[np.ndarray, ...] | None:
        """One picture per environment, as `Nav1DEnv.render`."""
        if self.render_mode != "rgb_array":
            return None
        return tuple(_draw_episode(path[: steps + 1]) for path, steps in zip(self._paths, self._steps, strict=True))

    def _restart(self, mask: np.ndarray) -> None:
        for i in np.flatnonzero(mask):
            self._paths[i, 0] = _draw_start(self._generators[i])
        self._steps[mask] = 0


def _observation_space() -> gym.spaces.Box:
    return gym.spaces.Box(np.array([-1, 0, -1], np.float32), np.array([1, 1, 1], np.float32), dtype=np.float32)


def _action_space() -> gym.spaces.Box:
    return gym.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)


def _draw_start(generator: np.random.Generator) -> float:
    return float(generator.uniform(-1.0, 1.0))


def _seeds_per_env(seed: int | Sequence[int | None] | None, num_envs: int) -> list[int | None]:
    if seed is None:
        return [None] * num_envs
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + i for i in range(num_envs)]
    seeds = [None if value is None else int(value) for value in seed]
    if len(seeds) != num_envs:
        raise ValueError(f"`seed` must hold one seed per environment: got {len(seeds)} for {num_envs} of them.")
    return seeds


def _check_render_mode(render_mode: str | None) -> None:
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f'`render_mode` must be "rgb_array" or None, got {render_mode!r}.')


def _check_actions(actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    actions = np.asarray(actions, dtype=np.float64)
    if actions.shape != shape:
        raise ValueError(f"`action` must have shape {shape}, got {actions.shape}.")
    if not np.isfinite(actions).all():
        raise ValueError(f"`action` must be finite, got {actions[~np.isfinite(actions)][0]}.")
    return actions


def draw_reward_distributions(axes: Any) -> None:
    """Draw the reward distribution of every step in blue, time on the x axis, onto matplotlib `axes`."""
    positions = np.linspace(-1.0, 1.0, 201)
    for t in range(HORIZON):
        width = 0.55 * reward(positions, t)
        axes.fill_betweenx(positions, t + 1 - width, t + 1, color="tab:blue", alpha=0.25, linewidth=0)
        axes.plot(t + 1 - width, positions, color="tab:blue", linewidth=0.8, alpha=0.8)
        axes.plot([t + 1, t + 1], [-1.0, 1.0], color="tab:blue", linewidth=0.5, alpha=0.4)
    axes.set(xlim=(-0.2, HORIZON + 0.2), ylim=(-1.06, 1.06), xlabel="step", ylabel="position")
    axes.set_xticks(range(HORIZON + 1))


def _draw_episode(path: Sequence[float] | np.ndarray) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw_reward_distributions(axes)
    for t, position in enumerate(path[:HORIZON]):
        reachable = np.clip([position - STEP_SIZE, position + STEP_SIZE], -1.0, 1.0)
        axes.fill_between([t, t + 1], [position, reachable[0]], [position, reachable[1]], color="0.5", alpha=0.22)
    axes.plot(range(len(path)), path, color="tab:green", marker="o", markersize=4, linewidth=2)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
