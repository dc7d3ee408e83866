"""What trainers that sample draw from their data: conditions, and clean samples with the conditions they belong to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from dmc_hub.data import Episodes
from dmc_hub.features import encode_episodes


class ConditionSource(ABC):
    """Draws from a trainer's data. A pipeline makes its own kind with `condition_source(train_dataset, ...)`.

    Conditions are dicts of tensors of one row per sample, on the device of the pipeline's denoiser.
    """

    data: Any
    has_examples: bool = True
    """Whether the data hold clean samples, not only conditions."""

    @abstractmethod
    def conditions(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`count` conditions, drawn with `generator` where the data can be indexed."""

    @abstractmethod
    def examples(self, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """`count` clean samples of the data as latents, and their conditions.

        Raises:
            ValueError: the data hold none.
        """

    @abstractmethod
    def trial(self) -> tuple[Tensor, dict[str, Tensor]]:
        """A few latents and their conditions, to try a reward function on; nothing is used up."""

    def state(self) -> dict[str, Tensor]:
        """Where the source stands, if that is not a function of the generators: kept in checkpoints."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where `state` was taken."""
        assert not state, "this source keeps none"


class EpisodeConditions(ConditionSource):
    """The observations of logged episodes, and their windows as examples.

    Args:
        pipeline: planner or policy.
        data: `Episodes` or a `datasets.Dataset` with its columns.

    Raises:
        ValueError: the data's observations or actions have another width than the pipeline was built for.
    """

    def __init__(self, pipeline: Any, data: Any) -> None:
        self.pipeline = pipeline
        self.data: Episodes = episodes_that_fit(pipeline, data)
        self.windows = self.data.windows(
            pipeline.config.horizon, pipeline.num_observation_steps, pipeline.num_past_actions
        )

    def conditions(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        steps = torch.randint(len(self.windows), (count,), generator=generator)
        history = self.windows.history(steps).to(self.pipeline.denoiser.device)
        condition: dict[str, Tensor] = self.pipeline.observation_condition(history)
        return condition

    def examples(self, count: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return self._encoded(torch.randint(len(self.windows), (count,), generator=generator))

    def trial(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self._encoded(torch.arange(min(4, self.data.num_steps)))

    def _encoded(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = {name: value.to(self.pipeline.denoiser.device) for name, value in self.windows.gather(rows).items()}
        latents, condition = self.pipeline.encode(batch)
        return latents, condition


def episodes_that_fit(pipeline: Any, data: Any) -> Episodes:
    """`Episodes.ensure(data)`, of the widths that the pipeline was built for.

    Images that an image policy sees become features here, once: its encoder is frozen.

    Raises:
        ValueError: the data's observations or actions have another width, or it lacks images of a camera.
    """
    episodes = Episodes.ensure(data)
    if pipeline.components.get("vision_encoder") is not None and episodes.images:
        episodes = encode_episodes(pipeline, episodes)
    for name in ("observation", "action"):
        got, wanted = getattr(episodes, f"{name}_dim"), getattr(pipeline, f"{name}_dim")
        if got != wanted:
            raise ValueError(f"`train_dataset` has {name}s of width {got}, but the pipeline is for width {wanted}.")
    return episodes
