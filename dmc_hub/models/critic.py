"""Twin Q-functions and a state value, the evaluation function of every alignment method.

This file travels to the Hub with every pipeline: it imports torch and diffusers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


def _mlp(in_dim: int, hidden_dims: Sequence[int], layer_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(in_dim, width), *([nn.LayerNorm(width)] if layer_norm else []), nn.ReLU()]
        in_dim = width
    return nn.Sequential(*layers, nn.Linear(in_dim, 1))


class TwinQCritic(ModelMixin, ConfigMixin):
    """Two Q-functions and V of implicit Q-learning (Kostrikov et al., 2021, arXiv:2110.06169) on normalised inputs.

    Inputs may have any dtype and values are float32, also where the networks were cast to bfloat16.

    Args:
        observation_dim: width of an observation.
        action_dim: width of an action.
        hidden_dims: widths of the hidden layers; the defaults are those of the original.
        layer_norm: normalise the hidden layers, which curbs over-estimation outside the data.
        num_action_steps: Q is the value of executing so many actions in a row (Q-chunking, Li et al., 2025,
            arXiv:2507.07969), for controllers that execute chunks. With 1, actions have the shape `(..., action_dim)`,
            with more `(..., num_action_steps, action_dim)`.
        value_scale: the networks learn values divided by this, so that their outputs are of order 1.
    """

    @register_to_config
    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: Sequence[int] = (256, 256),
        layer_norm: bool = False,
        value_scale: float = 1.0,
        num_action_steps: int = 1,
    ) -> None:
        super().__init__()
        width = observation_dim + action_dim * num_action_steps
        self.q_1 = _mlp(width, hidden_dims, layer_norm)
        self.q_2 = _mlp(width, hidden_dims, layer_norm)
        self.v = _mlp(observation_dim, hidden_dims, layer_norm)

    def twin_q(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Both action values; inputs of shape `(..., observation_dim)` and `(..., action_dim)`, outputs `(...)`."""
        if self.config.num_action_steps > 1:
            actions = actions.flatten(-2)
        inputs = torch.cat([observations, actions], dim=-1).to(self.dtype)
        scale = self.config.value_scale
        return self.q_1(inputs).squeeze(-1).float() * scale, self.q_2(inputs).squeeze(-1).float() * scale

    def value(self, observations: Tensor) -> Tensor:
        """State values of shape `(...)`."""
        result: Tensor = self.v(observations.to(self.dtype)).squeeze(-1).float() * self.config.value_scale
        return result

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The pessimistic action value `min(Q1, Q2)` of shape `(...)`, in units of the return."""
        return torch.minimum(*self.twin_q(observations, actions))
