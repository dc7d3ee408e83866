"""Episodes as a Minari dataset; Minari is the extra `[minari]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from dmc_hub.data import Episodes
from dmc_hub.interop.weights import InteropError

if TYPE_CHECKING:
    from datasets import Dataset


def save_minari_dataset(
    data: Episodes | Dataset,
    dataset_id: str,
    *,
    env_id: str | None = None,
    observation_space: gymnasium.Space[Any] | None = None,
    action_space: gymnasium.Space[Any] | None = None,
    description: str | None = None,
    reference_scores: Mapping[str, float] | None = None,
) -> Any:
    """Store episodes in Minari's local folder (`MINARI_DATASETS_PATH`) and return the `minari.MinariDataset`.

    Args:
        data: the episodes; the observation after each step has to be the next one's.
        dataset_id: `"name/behaviour-v0"`.
        env_id: gymnasium's id of the environment, from which the spaces are taken too.
        observation_space: without an `env_id`, like `action_space`.
        action_space: see above.
        description: what the data are.
        reference_scores: `"random"` and `"expert"`, the returns that Minari normalises scores by.

    Raises:
        ImportError: Minari is not installed.
        InteropError: episodes that Minari cannot hold, or unknown reference scores.
    """
    try:
        import minari
        from minari.data_collector import EpisodeBuffer
    except ImportError as error:
        raise ImportError("Minari is not installed: `pip install dmc_hub[minari]`.") from error
    episodes = Episodes.ensure(data)
    scores = dict(reference_scores or {})
    if not set(scores) <= {"random", "expert"}:
        raise InteropError(f"`reference_scores` may hold 'random' and 'expert', got {sorted(scores)}.")
    if env_id is None and (observation_space is None or action_space is None):
        raise InteropError("Give an `env_id`, or `observation_space` and `action_space`.")
    _check_chain(episodes)
    buffers = [
        EpisodeBuffer(
            id=index,
            observations=np.concatenate([episodes.observations[start:end], episodes.next_observations[end - 1 : end]]),
            actions=episodes.actions[start:end],
            rewards=list(episodes.rewards[start:end].astype(float)),
            terminations=list(map(bool, episodes.terminations[start:end])),
            truncations=list(map(bool, episodes.truncations[start:end])),
        )
        for index, (start, end) in enumerate(zip(episodes.episode_starts, episodes.episode_ends, strict=True))
    ]
    return minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        env=None if env_id is None else gymnasium.spec(env_id),
        observation_space=observation_space,
        action_space=action_space,
        description=description,
        ref_min_score=scores.get("random"),
        ref_max_score=scores.get("expert"),
    )


def load_minari_episodes(dataset: Any) -> Episodes:
    """The episodes of a `minari.MinariDataset` with vectors as observations and actions, in float32.

    Raises:
        InteropError: observations or actions that are not vectors.
        ValueError: as `Episodes.from_dataset`.
    """
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("observations", "actions", "next_observations")}
    scalars: dict[str, list[np.ndarray]] = {name: [] for name in ("rewards", "terminations", "truncations")}
    for episode in dataset.iterate_episodes():
        observations, actions = np.asarray(episode.observations), np.asarray(episode.actions)
        if observations.ndim != 2 or actions.ndim != 2:
            raise InteropError("Only vectors are supported as observations and actions: flatten them first.")
        rows["observations"].append(observations[:-1])
        rows["next_observations"].append(observations[1:])
        rows["actions"].append(actions)
        for name, values in scalars.items():
            values.append(np.asarray(getattr(episode, name)))
    ends = np.cumsum([len(part) for part in scalars["rewards"]])
    columns: dict[str, Any] = {name: np.concatenate(parts).astype(np.float32) for name, parts in rows.items()}
    columns["rewards"] = np.concatenate(scalars["rewards"]).astype(np.float32)
    for name in ("terminations", "truncations"):
        columns[name] = np.concatenate(scalars[name]).astype(bool)
    return Episodes.from_dataset(Episodes(**columns, episode_ends=ends).to_dataset())  # checked


def _check_chain(episodes: Episodes) -> None:
    inside = np.ones(episodes.num_steps, dtype=bool)
    inside[episodes.episode_ends - 1] = False
    rows = np.flatnonzero(inside)
    broken = (episodes.next_observations[rows] != episodes.observations[rows + 1]).any(axis=1)
    if broken.any():
        row = rows[broken][0]
        raise InteropError(
            f"Minari keeps one observation between two steps, but the one after step {row} is not that before step "
            f"{row + 1}."
        )
