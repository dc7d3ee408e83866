"""The inverse dynamics of Decision Diffuser (Ajay et al., 2023, arXiv:2211.15657, Sec. 3.1).

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class InverseDynamics(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The action between two consecutive observations, for planners that generate observations only.

    Two hidden layers with ReLU as in the original, 512 wide as in CleanDiffuser's `MlpInvDynamic` (the original's code
    is configured with 256): 275,971 parameters for Hopper (`observation_dim=11, action_dim=3`). The output is linear
    as in the original, so that actions at the bounds of the data are within reach; CleanDiffuser ends with a tanh.

    Inputs may have any dtype and actions are float32, also where the network was cast to bfloat16.

    Args:
        observation_dim: width of an observation.
        action_dim: width of an action.
        hidden_dims: widths of the hidden layers.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: Sequence[int] = (512, 512)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_dim = observation_dim * 2
        for width in hidden_dims:
            layers += [nn.Linear(in_dim, width), nn.ReLU()]
            in_dim = width
        self.network = nn.Sequential(*layers, nn.Linear(in_dim, action_dim))

    def forward(self, observations: Tensor, next_observations: Tensor) -> Tensor:
        """Actions `(..., action_dim)` that lead from the first to the second observation, all normalised.

        Args:
            observations: `o_t` of shape `(..., observation_dim)`.
            next_observations: `o_{t+1}` of the same shape.
        """
        width = self.config.observation_dim
        if observations.shape != next_observations.shape or observations.shape[-1:] != (width,):
            raise ValueError(
                f"`observations` and `next_observations` must have the same shape (..., {width}), got "
                f"{tuple(observations.shape)} and {tuple(next_observations.shape)}."
            )
        result: Tensor = self.network(torch.cat([observations, next_observations], dim=-1).to(self.dtype)).float()
        return result
