"""Diffuser-style planning: sample trajectories through the current state, rank them by a critic, act on the best.

This file travels to the Hub: apart from its guarded base class it imports torch, numpy and diffusers only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor, nn

try:
    from dmc_hub.control_pipeline import ControlPipeline
except ImportError:  # loaded from the Hub where dmc_hub is not installed
    ControlPipeline = DiffusionPipeline  # type: ignore[misc]

ACTION_SELECTIONS = ("greedy", "expectation", "softmax")


@dataclass(frozen=True)
class PlannerOutput:
    """One decision per observation, in the environment's units. The batch dimension `B` is the observation's, if any.

    Attributes:
        action: the selected action, shape `(B, action_dim)`.
        candidates: first actions of all plans, shape `(B, num_candidates, action_dim)`.
        values: critic's value of each candidate, shape `(B, num_candidates)`; None without a critic.
        trajectories: all plans, observations before actions, shape
            `(B, num_candidates, horizon, observation_dim + action_dim)`.
    """

    action: np.ndarray
    candidates: np.ndarray
    values: np.ndarray | None
    trajectories: np.ndarray


class DiffuserPlannerPipeline(ControlPipeline):
    """Plan by sampling state-action trajectories (Janner et al., 2022, arXiv:2205.09991; section 4 of arXiv:2502.12198).

    A plan is a sequence of `horizon` pairs of observation and action. The current observation is in-painted as its first
    state; there is no return conditioning, candidates are ranked by the critic instead.

    Args:
        denoiser: maps noisy plans `(batch, horizon, observation_dim + action_dim)` and a timestep to the scheduler's
            prediction.
        scheduler: gives each denoising step as a Gaussian.
        normalizer: statistics of the data.
        critic: `(observations, actions) -> values` on normalised inputs; needed to choose between candidates.
        horizon: steps of a plan.
        num_inference_steps: default number of denoising steps.
    """

    _optional_components = ["critic"]
    model_cpu_offload_seq = "denoiser"

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        normalizer: ModelMixin,
        critic: ModelMixin | None = None,
        horizon: int = 32,
        num_inference_steps: int = 20,
    ) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, normalizer=normalizer, critic=critic)
        self.register_to_config(horizon=horizon, num_inference_steps=num_inference_steps)

    @property
    def observation_dim(self) -> int:
        return self.normalizer.config.observation_dim

    @property
    def action_dim(self) -> int:
        return self.normalizer.config.action_dim

    @torch.inference_mode()
    def __call__(
        self,
        observation: np.ndarray | Tensor,
        *,
        num_candidates: int = 1,
        num_inference_steps: int | None = None,
        action_selection: str = "greedy",
        temperature: float = 1.0,
        generator: int | np.integer | torch.Generator | None = None,
    ) -> PlannerOutput:
        """Choose actions; all observations × candidates are denoised in one batch.

        Args:
            observation: in the environment's units, shape `(observation_dim,)` or `(B, observation_dim)`.
            num_candidates: plans sampled per observation.
            num_inference_steps: denoising steps; the pipeline's own by default.
            action_selection: `"greedy"` takes the candidate of the highest value, `"expectation"` the mean of all
                candidates, `"softmax"` draws one with probability proportional to `exp(value / temperature)` (IDQL,
                arXiv:2304.10573).
            temperature: of `"softmax"`, in units of the return.
            generator: a seed or a torch generator; None draws from torch's global one.

        Raises:
            ValueError: an observation of the wrong shape or dtype or with NaN, an unknown `action_selection`, or no critic
                to choose with.
        """
        observations = self.normalizer.observation_batch(observation).to(self.denoiser.device)
        _check_selection(action_selection, num_candidates, temperature, has_critic=self.critic is not None)
        if isinstance(generator, (int, np.integer)):
            generator = torch.Generator().manual_seed(int(generator))
        condition = self.repeat(self.observation_condition(observations), num_candidates)
        latents = self.sample(condition, num_inference_steps=num_inference_steps, generator=generator)
        plans = torch.cat(self.decode(latents, condition), dim=-1).unflatten(0, (-1, num_candidates))
        actions = plans[:, :, 0, self.observation_dim :]
        values = self.values(observations, actions) if self.critic is not None else None
        chosen = _select(actions, values, action_selection, temperature, generator)
        single = np.ndim(observation) == 1

        def rows(tensor: Tensor) -> np.ndarray:
            return tensor[0].cpu().numpy() if single else tensor.cpu().numpy()

        return PlannerOutput(
            action=rows(chosen),
            candidates=rows(actions),
            values=None if values is None else rows(values),
            trajectories=rows(plans),
        )

    # What trainers use: conditions, sampling, and the way between data and latents

    def observation_condition(self, observations: Tensor) -> dict[str, Tensor]:
        """The condition of plans that start at `observations` `(B, observation_dim)`, in the environment's units."""
        first = self.normalizer.normalize_observations(observations.float())
        plan = first.new_zeros(len(first), self.config.horizon, self.observation_dim + self.action_dim)
        plan[:, 0, : self.observation_dim] = first
        return self.context_condition(plan, torch.zeros(len(first), dtype=torch.int64))

    def context_condition(self, latents: Tensor, num_context_steps: Tensor) -> dict[str, Tensor]:
        """Fix the first steps of each plan and the observation after them (the causal masks of section 3.6).

        Args:
            latents: normalised plans `(B, horizon, observation_dim + action_dim)`; only fixed entries are read.
            num_context_steps: `(B,)`, in `0..horizon - 1`; 0 fixes the first observation alone.
        """
        steps = torch.arange(self.config.horizon, device=latents.device)[None, :, None]
        context = num_context_steps.to(latents.device)[:, None, None]
        is_observation = torch.arange(latents.shape[-1], device=latents.device) < self.observation_dim
        return {"values": latents, "mask": (steps < context) | ((steps == context) & is_observation)}

    def repeat(self, condition: dict[str, Tensor], num_candidates: int) -> dict[str, Tensor]:
        """Each condition `num_candidates` times in a row."""
        return {name: value.repeat_interleave(num_candidates, dim=0) for name, value in condition.items()}

    def free_entries(self, condition: dict[str, Tensor]) -> Tensor | None:
        """Entries that in-painting does not fix, `(B, horizon, dim)`: those that losses and log-probabilities count."""
        return ~condition["mask"]

    def inpaint(self, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Overwrite the fixed entries by their clean values, as Diffuser does."""
        return torch.where(condition["mask"], condition["values"], latents)

    def predict(
        self, sample: Tensor, timestep: float | Tensor, condition: dict[str, Tensor], denoiser: nn.Module | None = None
    ) -> Tensor:
        """The network's output for (in-painted) `sample`; `denoiser` stands in for the component, wrapped for DDP say."""
        network = self.denoiser if denoiser is None else denoiser
        scaled = self.inpaint(self.scheduler.scale_model_input(sample, timestep), condition)
        return network(scaled.to(self.denoiser.dtype), timestep, return_dict=False)[0].float()

    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        denoiser: nn.Module | None = None,
        num_grad_steps: int = 0,
    ) -> Tensor:
        """Denoise from noise to normalised plans `(B, horizon, observation_dim + action_dim)`.

        With a normaliser of `"limits"`, actions end clamped to the range of the data.

        Args:
            condition: of `observation_condition` or `context_condition`.
            num_inference_steps: denoising steps; the pipeline's own by default.
            generator: source of all noise.
            denoiser: stands in for the component.
            num_grad_steps: gradients flow through the last so many steps only (`sg(., K)` of Eq. 9).
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps)
        latents = self.inpaint(
            self.scheduler.initial_noise(condition["values"].shape, generator, self.denoiser.device), condition
        )
        timesteps = self.scheduler.timesteps.tolist()
        grad = torch.is_grad_enabled()
        for step, timestep in enumerate(timesteps):
            with torch.set_grad_enabled(grad and step >= len(timesteps) - num_grad_steps):
                output = self.predict(latents, timestep, condition, denoiser)
                latents = self.scheduler.step(output, timestep, latents, generator=generator, return_dict=False)[0]
                latents = self.inpaint(latents, condition)
        return self._to_data_range(latents)

    def _to_data_range(self, latents: Tensor) -> Tensor:
        """Clamp actions, not observations: an action outside the data's range is never executed."""
        if self.normalizer.config.mode != "limits":
            return latents
        observations, actions = latents.split((self.observation_dim, self.action_dim), dim=-1)
        return torch.cat([observations, actions.clamp(-1, 1)], dim=-1)

    def latent_shape(self, batch_size: int) -> tuple[int, int, int]:
        """`(batch_size, horizon, observation_dim + action_dim)`."""
        return batch_size, self.config.horizon, self.observation_dim + self.action_dim

    def encode(
        self, batch: dict[str, Tensor], num_context_steps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised plans and their conditions from windows of data.

        Args:
            batch: `observations` and `actions` of shape `(B, horizon, dim)`.
            num_context_steps: see `context_condition`; by default only the first observation is fixed.
        """
        observations = self.normalizer.normalize_observations(batch["observations"])
        latents = torch.cat([observations, self.normalizer.normalize_actions(batch["actions"])], dim=-1)
        if num_context_steps is None:
            num_context_steps = torch.zeros(len(latents), dtype=torch.int64)
        return latents, self.context_condition(latents, num_context_steps)

    def decode(self, latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Observations and actions of plans in the environment's units."""
        observations, actions = latents.split((self.observation_dim, self.action_dim), dim=-1)
        return self.normalizer.unnormalize_observations(observations), self.normalizer.unnormalize_actions(actions)

    def values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Critic's value of actions `(B, C, action_dim)` at observations `(B, observation_dim)`, shape `(B, C)`."""
        observations = self.normalizer.normalize_observations(observations)[:, None].expand(-1, actions.shape[1], -1)
        return self.critic(observations, self.normalizer.normalize_actions(actions))


def _check_selection(selection: str, num_candidates: int, temperature: float, *, has_critic: bool) -> None:
    if selection not in ACTION_SELECTIONS:
        raise ValueError(f"`action_selection` must be one of {', '.join(ACTION_SELECTIONS)}; got {selection!r}.")
    if num_candidates < 1 or not temperature > 0:
        raise ValueError(f"`num_candidates` and `temperature` must be positive, got {num_candidates}, {temperature}.")
    if selection != "expectation" and num_candidates > 1 and not has_critic:
        raise ValueError(
            f"`action_selection` {selection!r} chooses between candidates by the critic, and this pipeline has none: "
            "add a critic, use 'expectation', or `num_candidates=1`."
        )


def _select(
    actions: Tensor, values: Tensor | None, selection: str, temperature: float, generator: torch.Generator | None
) -> Tensor:
    if selection == "expectation" or values is None:
        return actions.mean(1)
    if selection == "greedy":
        index = values.argmax(1)
    else:
        source = generator.device if generator is not None else values.device
        shares = torch.softmax(values / temperature, dim=1).to(source)
        index = torch.multinomial(shares, 1, generator=generator)[:, 0].to(values.device)
    return actions[torch.arange(len(actions), device=actions.device), index]
