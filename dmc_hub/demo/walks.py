"""What the page computes: walks of a controller with and without adapters, and their pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dmc_hub import portable
from dmc_hub.agent import Agent
from dmc_hub.envs import nav1d
from dmc_hub.hub import load_pipeline
from dmc_hub.publish import ADAPTER_WEIGHTS

FOUNDATION = "foundation (no adapter)"
MAX_CANDIDATES = 64
MAX_EPISODES = 128
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Walks:
    """Episodes of one controller.

    paths: positions of shape `(B, 9)`.
    rewards: shape `(B, 8)`.
    candidates: actions considered at each step, shape `(8, B, num_candidates)`.
    values: the critic's Q of each, of the same shape; None without a critic.
    actions: those taken, shape `(8, B)`.
    """

    paths: np.ndarray
    rewards: np.ndarray
    candidates: np.ndarray
    values: np.ndarray | None
    actions: np.ndarray

    @property
    def returns(self) -> np.ndarray:
        """Shape `(B,)`."""
        return cast(np.ndarray, self.rewards.sum(axis=1))


@dataclass
class Controller:
    """A loaded pipeline and the folders of the adapters that fit it, by name.

    Only one thread acts at a time: adapters are switched on the one network.
    """

    pipeline: Any
    adapters: dict[str, Path]
    _loaded: dict[str, str] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def load(cls, folder: Path, adapters: dict[str, Path]) -> Controller:
        """Load a pipeline of Nav1D, with those of the adapters that were trained on it.

        Raises:
            ValueError: not a pipeline, or not of Nav1D.
        """
        pipeline = load_pipeline(folder)
        pipeline.set_progress_bar_config(disable=True)
        if (pipeline.observation_dim, pipeline.action_dim) != (3, nav1d.ACTION_DIM):
            raise ValueError(
                f"`{folder}` is no controller of Nav1D: it has {pipeline.observation_dim} numbers of an observation "
                f"and {pipeline.action_dim} of an action, not 3 and {nav1d.ACTION_DIM}."
            )
        fingerprint = pipeline.base_fingerprint()
        return cls(pipeline, {name: path for name, path in adapters.items() if _fingerprint(path) == fingerprint})

    @property
    def choices(self) -> list[str]:
        """Names of what can act: the foundation, and each adapter on it."""
        return [FOUNDATION, *self.adapters]

    def walk(self, adapter: str, starts: np.ndarray, *, num_candidates: int, seed: int) -> Walks:
        """Act for one episode from each of `starts` `(B,)`, in `[-1, 1]`, all in one batch.

        Raises:
            ValueError: an unknown adapter, or an input out of its bounds.
            TimeoutError: the episode took longer than `TIMEOUT_SECONDS`.
        """
        starts = np.asarray(starts, dtype=np.float64)
        if not 1 <= num_candidates <= MAX_CANDIDATES or not 1 <= len(starts) <= MAX_EPISODES:
            raise ValueError(f"Candidates go from 1 to {MAX_CANDIDATES} and episodes from 1 to {MAX_EPISODES}.")
        if not (np.abs(starts) <= 1).all():
            raise ValueError("The start must lie in [-1, 1].")
        with self._lock, self._switched_to(adapter):
            return self._walk(starts, num_candidates, torch.Generator().manual_seed(int(seed) % 2**63))

    def _walk(self, starts: np.ndarray, num_candidates: int, generator: torch.Generator) -> Walks:
        selection = "expectation" if self.pipeline.critic is None else "greedy"
        agent, position, deadline = Agent(self.pipeline), starts, time.monotonic() + TIMEOUT_SECONDS
        paths, rewards, outputs = [starts], [], []
        for t in range(nav1d.HORIZON):
            if time.monotonic() > deadline:
                raise TimeoutError(f"The episode took longer than {TIMEOUT_SECONDS:.0f} s: use fewer candidates.")
            outputs.append(
                agent(
                    nav1d.observation(position, t),
                    num_candidates=num_candidates,
                    action_selection=selection,
                    generator=generator,
                )
            )
            position, reward = nav1d.step(position, outputs[-1].action[:, 0], t)
            paths.append(position)
            rewards.append(reward)
        has_values = outputs[0].values is not None
        return Walks(
            paths=np.stack(paths, axis=1),
            rewards=np.stack(rewards, axis=1),
            candidates=np.stack([output.candidates[..., 0] for output in outputs]),
            values=np.stack([output.values for output in outputs]) if has_values else None,
            actions=np.stack([output.action[:, 0] for output in outputs]),
        )

    @contextmanager
    def _switched_to(self, adapter: str) -> Iterator[None]:
        if adapter not in self.choices:
            raise ValueError(f"There is no adapter {adapter!r} for this pipeline.")
        if adapter == FOUNDATION:
            if not self._loaded:
                yield
                return
            with self.pipeline.lora_disabled():
                yield
            return
        if adapter not in self._loaded:
            name = f"adapter_{len(self._loaded)}"
            self.pipeline.load_lora_weights(self.adapters[adapter], adapter_name=name)
            self._loaded[adapter] = name
        self.pipeline.set_adapters(self._loaded[adapter])
        yield


def optimal_walks(starts: np.ndarray) -> Walks:
    """Episodes of the optimal policy."""
    position = np.asarray(starts, dtype=np.float64)
    paths, rewards, actions = [position], [], []
    for t in range(nav1d.HORIZON):
        actions.append(nav1d.optimal_action(position, t))
        position, reward = nav1d.step(position, actions[-1], t)
        paths.append(position)
        rewards.append(reward)
    taken = np.stack(actions)
    return Walks(np.stack(paths, axis=1), np.stack(rewards, axis=1), taken[..., None], None, taken)


def draw_walks(walks: Sequence[tuple[str, Walks]]) -> np.ndarray:
    """Paths of several controllers over the reward distributions, a uint8 picture `(height, width, 3)`."""
    figure, axes = _figure()
    nav1d.draw_reward_distributions(axes)
    for index, (name, walk) in enumerate(walks):
        for row, path in enumerate(walk.paths):
            label = f"{name}: {walk.returns.mean():.2f}" if row == 0 else None
            axes.plot(path, color=f"C{index + 1}", marker="o", markersize=4, linewidth=2, alpha=0.85, label=label)
    axes.legend(loc="lower left", fontsize=8, title="return")
    axes.set_title("episodes from the same start" if len(walks[0][1].paths) == 1 else "episodes")
    return _picture(figure)


def draw_candidates(walk: Walks, step: int) -> np.ndarray:
    """Where the candidates of one decision lead and what the critic expects of them; the taken one is ringed."""
    figure, axes = _figure()
    position, actions = walk.paths[0, step], walk.candidates[step, 0]
    reached, _ = nav1d.step(position, actions, step)
    grid = np.linspace(-1, 1, 201)
    axes.plot(grid, nav1d.reward(grid, step), color="tab:blue", label="reward of being there")
    axes.axvline(position, color="0.6", linewidth=1, label="now")
    if walk.values is None:
        axes.plot(reached, np.zeros_like(reached), "|", color="tab:orange", label="candidates")
    else:
        values = axes.twinx()
        values.scatter(reached, walk.values[step, 0], color="tab:orange", s=24, label="Q of a candidate")
        taken = int(np.abs(actions - walk.actions[step, 0]).argmin())
        values.scatter(
            reached[taken], walk.values[step, 0][taken], s=140, facecolor="none", edgecolor="tab:red", label="taken"
        )
        values.set_ylabel("Q")
        values.legend(loc="upper right", fontsize=8)
    axes.set(xlim=(-1.05, 1.05), xlabel=f"position after step {step + 1}", ylabel="reward")
    axes.legend(loc="upper left", fontsize=8)
    axes.set_title(f"candidates of decision {step + 1}")
    return _picture(figure)


def _fingerprint(adapter: Path) -> str | None:
    """Of the base that an adapter was trained on; None where there is no adapter to read."""
    try:
        return portable.read_metadata(adapter / ADAPTER_WEIGHTS).get("base_fingerprint")
    except (OSError, portable.UnreadableRepoError):
        return None


def _figure() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.2, 4.2), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _picture(figure: Figure) -> np.ndarray:
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
