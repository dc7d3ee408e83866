"""A pipeline with the memory that acting step by step needs."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline


class Agent:
    """Calls a planner or policy once per step (or once per chunk) and keeps what the next call needs.

    It is called like the pipeline, with the observations of all environments at one step, and must be `reset` when
    episodes start. It keeps the observation history of a policy, the past that a planner's window slides over,
    the rest of an action chunk, the sequences that temporal ensembling averages, and the plan of a warm start.

    Args:
        pipeline: the controller.
        num_action_steps: actions executed before the next decision (Diffusion Policy's `T_a`, arXiv:2303.04137).
        ensembling_decay: average what all earlier sequences say of this step with weights `exp(-decay * age rank)`, the
            oldest sequence first (ACT, arXiv:2304.13705); decides at every step, so `num_action_steps` must be 1.
        num_warm_start_steps: a planner starts from its previous plan, shifted and noised again, and runs so many
            denoising steps; a call's `warm_start_level` says how far it is noised.
        num_context_steps: the first steps of a planner's window are the last so many observed steps (fewer at the start
            of an episode), the rest is the future: for tasks whose observation does not tell everything.
    """

    def __init__(
        self,
        pipeline: DiffuserPlannerPipeline | DiffusionPolicyPipeline,
        *,
        num_action_steps: int = 1,
        ensembling_decay: float | None = None,
        num_warm_start_steps: int | None = None,
        num_context_steps: int = 0,
    ) -> None:
        future = pipeline.config.horizon - pipeline.num_past_actions - num_context_steps
        if num_context_steps < 0 or not 1 <= num_action_steps <= future:
            raise ValueError(
                f"`num_context_steps` must be at least 0 and `num_action_steps` at least 1, both together at most "
                f"{pipeline.config.horizon - pipeline.num_past_actions}, the horizon; got {num_context_steps} and "
                f"{num_action_steps}."
            )
        if num_context_steps and not isinstance(pipeline, DiffuserPlannerPipeline):
            raise ValueError("`num_context_steps` is for planners: a policy has `num_observation_steps`.")
        if num_context_steps and num_warm_start_steps is not None:
            raise ValueError("`num_warm_start_steps` needs a window that starts now: set `num_context_steps` to 0.")
        if ensembling_decay is not None and num_action_steps > 1:
            raise ValueError("`ensembling_decay` needs a decision at every step: set `num_action_steps` to 1.")
        if num_warm_start_steps is not None and not isinstance(pipeline, DiffuserPlannerPipeline):
            raise ValueError("`num_warm_start_steps` is for planners: a policy has no previous plan.")
        if num_warm_start_steps is not None and num_action_steps > 1:
            raise ValueError(
                "`num_warm_start_steps` shifts the previous plan by one step: set `num_action_steps` to 1."
            )
        self.pipeline = pipeline
        self.num_action_steps = num_action_steps
        self.ensembling_decay = ensembling_decay
        self.num_warm_start_steps = num_warm_start_steps
        self.num_context_steps = num_context_steps
        self._num_future_steps = future
        self.reset()

    def reset(self) -> None:
        """Forget everything: new episodes start in all environments."""
        self._history: deque[Any] = deque(maxlen=self.pipeline.num_observation_steps)
        self._past: deque[tuple[Any, np.ndarray]] = deque(maxlen=self.num_context_steps)
        self._sequences: deque[np.ndarray] = deque(maxlen=self._num_future_steps)
        self._output: Any = None
        self._age = 0

    def __call__(
        self,
        observations: np.ndarray | Mapping[str, np.ndarray],
        *,
        generator: int | torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """The pipeline's output, its `action` the one to execute now.

        Args:
            observations: of all environments, shape `(B, observation_dim)`, or of an image policy the mapping of
                `state` and images.
            generator: see the pipeline.
            options: passed to the pipeline.
        """
        if not isinstance(observations, Mapping):
            observations = np.asarray(observations, dtype=np.float32)
        if not self._history:
            self._history.extend([observations] * self.pipeline.num_observation_steps)
        else:
            self._history.append(observations)
        self._age += 1
        if self._output is None or self._age >= self.num_action_steps or self.ensembling_decay is not None:
            self._decide(generator, options)
        action = self._action()
        self._past.append((observations, action))
        return dataclasses.replace(self._output, action=action)

    def _decide(self, generator: int | torch.Generator | None, options: dict[str, Any]) -> None:
        several = self.pipeline.num_observation_steps > 1
        seen = _stacked(self._history) if several else self._history[-1]
        if self.num_warm_start_steps is not None and self._output is not None:
            warm = {"previous_plan": self._output.plan, "num_warm_start_steps": self.num_warm_start_steps}
            options = {**options, **warm}
        if self._past:
            options = {**options, "context": tuple(np.stack(part, axis=1) for part in zip(*self._past, strict=True))}
        self._output = self.pipeline(seen, generator=generator, **options)
        self._age = 0
        if isinstance(self.pipeline, DiffuserPlannerPipeline):
            self._sequences.append(self._output.plan[:, len(self._past) :, self.pipeline.observation_dim :])
        else:
            self._sequences.append(self._output.actions)

    def _action(self) -> np.ndarray:
        if self.ensembling_decay is None:
            return self._sequences[-1][:, self._age]
        newest = len(self._sequences) - 1
        opinions = np.stack([sequence[:, newest - i] for i, sequence in enumerate(self._sequences)])
        weights = np.exp(-self.ensembling_decay * np.arange(len(opinions)))
        return np.tensordot(weights / weights.sum(), opinions, axes=1).astype(np.float32)


def _stacked(history: Sequence[Any]) -> Any:
    """Observations of several steps as one, `(B, steps, ...)`, entry by entry where they are mappings."""
    if isinstance(history[-1], Mapping):
        return {name: np.stack([step[name] for step in history], axis=1) for name in history[-1]}
    return np.stack(history, axis=1)
