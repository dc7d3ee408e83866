"""Per-dimension statistics of observations and actions, saved inside the pipeline.

This file travels to the Hub with every pipeline: it imports torch, numpy and diffusers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class Normalizer(ModelMixin, ConfigMixin):
    """Affine maps between the units of the data and those of the networks, one per dimension.

    With `mode="limits"` the data's range becomes `[-1, 1]`; with `"gaussian"` its mean becomes 0 and its standard
    deviation 1. A constant dimension maps to 0. The statistics stay float32 whatever dtype the pipeline is cast to, and
    a normaliser that was never fitted refuses to work.

    Args:
        observation_dim: width of an observation.
        action_dim: width of an action.
        mode: `"limits"` or `"gaussian"`.
    """

    @register_to_config
    def __init__(self, observation_dim: int, action_dim: int, mode: str = "limits") -> None:
        super().__init__()
        if mode not in ("limits", "gaussian"):
            raise ValueError(f"`mode` must be 'limits' or 'gaussian', got {mode!r}.")
        for name, dim in (("observation", observation_dim), ("action", action_dim)):
            self.register_buffer(f"{name}_shift", torch.full((dim,), float("nan")))
            self.register_buffer(f"{name}_scale", torch.full((dim,), float("nan")))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Normalizer:
        """As in diffusers, but the statistics are read as float32 whatever dtype is asked for."""
        others = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
        result: Normalizer = super().from_pretrained(*args, **others)
        return result

    @classmethod
    def from_data(
        cls, observations: np.ndarray, actions: np.ndarray, mode: str = "limits", num_features: int = 0
    ) -> Normalizer:
        """Fit to arrays of shape `(steps, dim)` and `(steps, action_dim)`.

        An observation has `num_features` further numbers behind those, features of images, which stay as they are.
        """
        if observations.ndim != 2 or actions.ndim != 2 or len(observations) != len(actions):
            raise ValueError(
                "`observations` and `actions` must have shapes (steps, observation_dim) and (steps, action_dim), got "
                f"{observations.shape} and {actions.shape}."
            )
        normalizer = cls(observations.shape[-1] + num_features, actions.shape[-1], mode)
        for name, data in (("observation", observations), ("action", actions)):
            if not len(data) or not np.isfinite(data).all():
                raise ValueError(f"`{name}s` must be finite and not empty to compute statistics from.")
            if mode == "limits":
                low, high = data.min(0).astype(np.float64), data.max(0).astype(np.float64)
                shift, scale = (high + low) / 2, (high - low) / 2
            else:
                shift, scale = data.mean(0, dtype=np.float64), data.std(0, dtype=np.float64)
            scale = np.where(scale > 1e-6, scale, 1.0)
            for statistic, values, neutral in (("shift", shift, 0.0), ("scale", scale, 1.0)):
                buffer = getattr(normalizer, f"{name}_{statistic}").fill_(neutral)
                buffer[: len(values)] = torch.from_numpy(values)
        return cast(Normalizer, normalizer)

    def observation_batch(self, observation: np.ndarray | Tensor, num_steps: int = 1) -> Tensor:
        """Check an observation from outside and return it as a float32 batch `(B, num_steps, observation_dim)`.

        Args:
            observation: `(observation_dim,)` or `(B, observation_dim)`; with `num_steps > 1` a history, the oldest
                first, `(num_steps, observation_dim)` or `(B, num_steps, observation_dim)`.
            num_steps: observations that the controller looks at.

        Raises:
            ValueError: another shape, a dtype that is not floating point, or entries that are not finite.
        """
        shape = (self.config.observation_dim,) if num_steps == 1 else (num_steps, self.config.observation_dim)
        tensor = observation if isinstance(observation, Tensor) else _tensor(observation)
        extra = tensor.ndim - len(shape)
        if extra not in (0, 1) or tensor.shape[extra:] != shape or not tensor.numel():
            sizes = ", ".join(map(str, shape))
            raise ValueError(
                f"`observation` must have shape ({sizes}{',' * (len(shape) == 1)}) or (batch, {sizes}), got "
                f"{tuple(tensor.shape)}."
            )
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"`observation` must be floating point, got {tensor.dtype}: use `.astype('float32')`.")
        tensor = tensor.float().reshape(-1, num_steps, self.config.observation_dim)
        if not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
            raise ValueError(
                f"`observation` has NaN or infinite entries in row {row}: {tensor[row].flatten().tolist()}."
            )
        return tensor

    def normalize_observations(self, observations: Tensor) -> Tensor:
        """From the environment's units; shape `(..., observation_dim)`."""
        result: Tensor = (observations - self._fitted(self.observation_shift)) / self.observation_scale
        return result

    def unnormalize_observations(self, observations: Tensor) -> Tensor:
        """To the environment's units; shape `(..., observation_dim)`."""
        result: Tensor = observations * self.observation_scale + self._fitted(self.observation_shift)
        return result

    def normalize_actions(self, actions: Tensor) -> Tensor:
        """From the environment's units; shape `(..., action_dim)`."""
        result: Tensor = (actions - self._fitted(self.action_shift)) / self.action_scale
        return result

    def unnormalize_actions(self, actions: Tensor) -> Tensor:
        """To the environment's units; shape `(..., action_dim)`."""
        result: Tensor = actions * self.action_scale + self._fitted(self.action_shift)
        return result

    def _fitted(self, statistics: Tensor) -> Tensor:
        if torch.isnan(statistics).any():
            raise ValueError("This normalizer has no statistics: build it with `Normalizer.from_data`.")
        return statistics

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow a move to another device, but no cast to another dtype: bfloat16 would round the statistics."""
        for name, statistics in self._buffers.items():
            if statistics is not None:
                self._buffers[name] = statistics.to(fn(statistics).device)
        return self


def _tensor(observation: Any) -> Tensor:
    """A copy, because torch takes neither read-only arrays nor reversed ones."""
    try:
        return torch.from_numpy(np.array(observation))
    except (TypeError, ValueError) as error:
        raise ValueError(f"`observation` must be an array of floating point numbers: {error}.") from error
