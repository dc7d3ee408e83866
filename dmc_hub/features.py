"""Cached features: episodes of images become episodes of numbers, once, by a frozen vision encoder."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from dmc_hub.data import Episodes

_CHUNK_SIZE = 256
"""Steps whose images are in memory at once."""


def encode_episodes(pipeline: Any, episodes: Episodes) -> Episodes:
    """Episodes whose observations are what an image policy acts on: the state, and behind it the images' features.

    They are ordinary episodes without images, on which critic and alignment train as on any others. The features are
    those that the policy computes when it acts, bit for bit: encode again after the encoder has been trained. What
    follows the last step of an episode has no image; it gets the features of that step's.

    Args:
        pipeline: an image policy.
        episodes: with the images of all its cameras, and the state as observations.

    Raises:
        ValueError: the images of a camera are missing, the state has another width, or the pipeline has no encoder.
    """
    encoder = pipeline.vision_encoder
    if encoder is None:
        raise ValueError("`pipeline` has no vision encoder.")
    require_images(pipeline, episodes)
    observations = np.empty((episodes.num_steps, pipeline.observation_dim), dtype=np.float32)
    for start in tqdm(range(0, episodes.num_steps, _CHUNK_SIZE), desc="encoding images", unit="chunk", disable=None):
        rows = slice(start, start + _CHUNK_SIZE)
        images = {name: torch.from_numpy(np.array(episodes.images[name][rows])) for name in encoder.cameras}
        vectors = pipeline.observation_vectors(
            {"state": torch.from_numpy(episodes.observations[rows].copy()), **images}
        )
        observations[rows] = vectors.cpu().numpy()
    last = np.repeat(episodes.episode_ends - 1, episodes.episode_lengths)
    following = observations[np.minimum(np.arange(episodes.num_steps) + 1, last)]
    following[:, : pipeline.state_dim] = episodes.next_observations
    return dataclasses.replace(episodes, observations=observations, next_observations=following, images={})


def require_images(pipeline: Any, episodes: Episodes) -> None:
    """Raise a ValueError unless the episodes have the states and all the images that an image policy sees."""
    missing = [name for name in pipeline.vision_encoder.cameras if name not in episodes.images]
    if missing:
        raise ValueError(
            f"`episodes` have no images of the cameras {', '.join(missing)} that the policy sees, only of "
            f"{', '.join(episodes.images) or 'none'}."
        )
    if episodes.observation_dim != pipeline.state_dim:
        raise ValueError(
            f"`episodes` have states of width {episodes.observation_dim} beside their images, but the policy's are of "
            f"width {pipeline.state_dim}."
        )
