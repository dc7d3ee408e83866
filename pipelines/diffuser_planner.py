"""Diffuser-style planning: sample trajectories through the current state, rank them by a critic, act on the best.

This file travels to the Hub: apart from its guarded base class it imports torch, numpy and diffusers only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
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
        plan: the selected plan (the mean of all with `"expectation"`), shape
            `(B, horizon, observation_dim + action_dim)`; its shifted copy can warm-start the next decision.
    """

    action: np.ndarray
    candidates: np.ndarray
    values: np.ndarray | None
    trajectories: np.ndarray
    plan: np.ndarray


class DiffuserPlannerPipeline(ControlPipeline):
    """Plan by sampling state-action trajectories (Janner et al., 2022, arXiv:2205.09991; arXiv:2502.12198, 4.3).

    A plan is a sequence of `horizon` pairs of observation and action. The current observation is in-painted as its
    first state; there is no return conditioning, candidates are ranked by the critic instead. With `inverse_dynamics`
    the denoiser plans observations alone and actions follow from pairs of them (Decision Diffuser, arXiv:2211.15657).

    Args:
        denoiser: maps noisy plans `(batch, horizon, observation_dim + action_dim)`, or `(batch, horizon,
            observation_dim)` with `inverse_dynamics`, and a timestep to the scheduler's prediction.
        scheduler: gives each denoising step as a Gaussian. A stock diffusers scheduler of the same noise levels can
            stand in for plain sampling.
        normalizer: statistics of the data.
        critic: `(observations, actions) -> values` on normalised inputs; needed to choose between candidates.
        inverse_dynamics: `(observations, next_observations) -> actions`, normalised.
        upsampler: a denoiser whose input holds a draft behind the noisy plan: it samples plans of more reward than the
            draft's (section 3.4 of arXiv:2502.12198).
        horizon: steps of a plan.
        num_inference_steps: default number of denoising steps.
    """

    _optional_components = ["critic", "inverse_dynamics", "upsampler"]
    model_cpu_offload_seq = "denoiser->upsampler"

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        normalizer: ModelMixin,
        critic: ModelMixin | None = None,
        inverse_dynamics: ModelMixin | None = None,
        upsampler: ModelMixin | None = None,
        horizon: int = 32,
        num_inference_steps: int = 20,
    ) -> None:
        super().__init__()
        for component in (denoiser, normalizer, critic, inverse_dynamics, upsampler):
            _align(component)
        self.register_modules(
            denoiser=denoiser,
            scheduler=scheduler,
            normalizer=normalizer,
            critic=critic,
            inverse_dynamics=inverse_dynamics,
            upsampler=upsampler,
        )
        self.register_to_config(horizon=horizon, num_inference_steps=num_inference_steps)

    @property
    def observation_dim(self) -> int:
        number: int = self.normalizer.config.observation_dim
        return number

    @property
    def action_dim(self) -> int:
        number: int = self.normalizer.config.action_dim
        return number

    @property
    def num_observation_steps(self) -> int:
        """1: a plan starts at the current observation."""
        return 1

    @property
    def num_past_actions(self) -> int:
        """0: a plan starts at the current observation."""
        return 0

    @property
    def latent_dim(self) -> int:
        """Width of one denoised step: the observation's, and the action's unless inverse dynamics give it."""
        return self.observation_dim + (self.action_dim if self.inverse_dynamics is None else 0)

    @torch.inference_mode()
    def __call__(
        self,
        observation: np.ndarray | Tensor,
        *,
        num_candidates: int = 1,
        num_inference_steps: int | None = None,
        action_selection: str = "greedy",
        temperature: float = 1.0,
        early_ranking: Sequence[float] | None = None,
        num_value_steps: int = 1,
        context: tuple[np.ndarray, np.ndarray] | None = None,
        inpainting: tuple[np.ndarray, np.ndarray] | None = None,
        num_resampling_steps: int = 1,
        previous_plan: np.ndarray | None = None,
        num_warm_start_steps: int | None = None,
        warm_start_level: float = 0.7,
        num_upsampling_passes: int = 0,
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
            early_ranking: two shares, `(0.5, 0.25)` say: after so many of the denoising steps the critic values what
                the candidates are predicted to become, and so many of them, rounded up, are denoised to the end; the
                output holds these alone. None is off: all are.
            num_value_steps: candidates are valued by the mean of Q over so many pairs of the plan from now on; 1 values
                the action about to be executed.
            context: the last `k < horizon` observations and actions before `observation`, of shapes
                `(B, k, observation_dim)` and `(B, k, action_dim)` (without `B` for a single observation). They fill
                the first steps of the plan, which then slides over the episode with the past in view.
            inpainting: further entries to fix, goals or parts of a trajectory: values in the environment's units and a
                bool mask, both of shape `(horizon, observation_dim + action_dim)` or with `B` in front.
            num_resampling_steps: denoise each step so many times, noising it again in between (RePaint,
                arXiv:2201.09865, Algorithm 1): in-painted entries and the rest agree better.
            previous_plan: `plan` of the decision before, one step ago: denoising starts from its shifted copy.
            num_warm_start_steps: denoising steps run from there; by default a quarter of all.
            warm_start_level: time in `(0, 1]` to which the previous plan is noised: 1 forgets it, 0 would keep it.
            num_upsampling_passes: so many times the up-sampler samples a better candidate given each, which takes
                its place (sections 3.4 and 3.5 of arXiv:2502.12198, which advises 1 or 2); 0 is off.
            generator: a seed or a torch generator; None draws from torch's global one.

        Raises:
            ValueError: an observation of the wrong shape or dtype or with NaN, an unknown `action_selection`, no critic
                to choose with, an impossible `early_ranking`, or no up-sampler for `num_upsampling_passes`.
        """
        observations = self.normalizer.observation_batch(observation)[:, 0].to(self.denoiser.device)
        _check_selection(action_selection, num_candidates, temperature, has_critic=self.critic is not None)
        _check_passes(num_upsampling_passes, has_upsampler=self.upsampler is not None)
        if isinstance(generator, (int, np.integer)):
            generator = torch.Generator().manual_seed(int(generator))
        condition, now = self.observation_condition(observations), 0
        if context is not None:
            condition, now = self._context(observations, *context), np.shape(context[0])[-2]
        if inpainting is not None:
            condition = self.inpainting_condition(condition, *inpainting)
        condition = self.repeat(condition, num_candidates)
        start = None if previous_plan is None else self._shifted(previous_plan, len(observations), num_candidates)

        def rated(latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            plans = torch.cat(self.decode(latents, condition), dim=-1).unflatten(0, (len(observations), -1))
            return plans, None if self.critic is None else self._plan_values(plans[:, :, now:], num_value_steps)

        def rate(latents: Tensor, condition: dict[str, Tensor]) -> Tensor | None:
            return rated(latents, condition)[1]

        ranking = _early_ranking(early_ranking, num_candidates, action_selection, self, rate)
        latents = self.sample(
            condition,
            num_inference_steps=num_inference_steps,
            generator=generator,
            num_resampling_steps=num_resampling_steps,
            start=start,
            num_start_steps=num_warm_start_steps,
            start_level=warm_start_level,
            ranking=ranking,
        )
        condition = condition if ranking is None else ranking.kept(condition)
        for _ in range(num_upsampling_passes):
            latents = self.sample(
                {**condition, "draft": latents},
                num_inference_steps=num_inference_steps,
                generator=generator,
                num_resampling_steps=num_resampling_steps,
            )
        plans, values = rated(latents, condition)
        plan = _select(plans, values, action_selection, temperature, generator)
        single = np.ndim(observation) == 1

        def rows(tensor: Tensor) -> np.ndarray:
            return tensor[0].cpu().numpy() if single else tensor.cpu().numpy()

        return PlannerOutput(
            action=rows(plan[:, now, self.observation_dim :]),
            candidates=rows(plans[:, :, now, self.observation_dim :]),
            values=None if values is None else rows(values),
            trajectories=rows(plans),
            plan=rows(plan),
        )

    # What trainers use: conditions, sampling, and the way between data and latents

    def observation_condition(self, observations: Tensor) -> dict[str, Tensor]:
        """The condition of plans that start at `observations`, in the environment's units.

        `observations` has shape `(B, observation_dim)`, or `(B, 1, observation_dim)` as a history of one.
        """
        first = self.normalizer.normalize_observations(observations.float()).reshape(-1, self.observation_dim)
        plan = first.new_zeros(self.latent_shape(len(first)))
        plan[:, 0, : self.observation_dim] = first
        return self.context_condition(plan, torch.zeros(len(first), dtype=torch.int64))

    def context_condition(self, latents: Tensor, num_context_steps: Tensor) -> dict[str, Tensor]:
        """Fix the first steps of each plan and the observation after them (the causal masks of section 3.6).

        Args:
            latents: normalised plans `(B, horizon, latent_dim)`; only fixed entries are read.
            num_context_steps: `(B,)`, in `0..horizon - 1`; 0 fixes the first observation alone.
        """
        steps = torch.arange(self.config.horizon, device=latents.device)[None, :, None]
        context = num_context_steps.to(latents.device)[:, None, None]
        is_observation = torch.arange(latents.shape[-1], device=latents.device) < self.observation_dim
        return {"values": latents, "mask": (steps < context) | ((steps == context) & is_observation)}

    def inpainting_condition(
        self, condition: dict[str, Tensor], values: np.ndarray | Tensor, mask: np.ndarray | Tensor
    ) -> dict[str, Tensor]:
        """Fix further entries of plans; see `inpainting` of the call. Entries that are already fixed stay so."""
        shape = (self.config.horizon, self.observation_dim + self.action_dim)
        given, fixed = torch.as_tensor(values), torch.as_tensor(mask)
        if fixed.dtype != torch.bool or any(x.shape[-2:] != shape or x.ndim > 3 for x in (given, fixed)):
            raise ValueError(
                f"`inpainting` must be values and a bool mask of shape {shape}, batched or not; got "
                f"{tuple(given.shape)} and {tuple(fixed.shape)} of {fixed.dtype}."
            )
        if self.inverse_dynamics is not None and bool(fixed[..., self.observation_dim :].any()):
            raise ValueError("`inpainting` cannot fix actions: this planner's actions follow from its observations.")
        given = torch.where(fixed, given.float(), torch.zeros(())).to(condition["values"].device)
        if not bool(torch.isfinite(given).all()):
            raise ValueError("`inpainting` has NaN or infinite values where its mask is True.")
        observations, actions = given.split((self.observation_dim, self.action_dim), dim=-1)
        normalized = [self.normalizer.normalize_observations(observations), self.normalizer.normalize_actions(actions)]
        plan = torch.cat(normalized, dim=-1)[..., : self.latent_dim].expand_as(condition["values"])
        added = fixed[..., : self.latent_dim].to(plan.device).expand_as(condition["mask"]) & ~condition["mask"]
        return {"values": torch.where(added, plan, condition["values"]), "mask": condition["mask"] | added}

    def fix_entries(self, condition: dict[str, Tensor], latents: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Fix also the entries of plans that `mask` selects to those of `latents`, both of the latents' shape."""
        return {"values": torch.where(mask, latents, condition["values"]), "mask": condition["mask"] | mask}

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
        """The network's output for (in-painted) `sample`; `denoiser` stands in for the component.

        With a `draft` in the condition the component is the up-sampler: `p(x^r | x^cond, observation)`.
        """
        scaled = self.inpaint(_scaled(self.scheduler, sample, timestep), condition)
        if "draft" in condition:
            scaled = torch.cat([scaled, condition["draft"]], dim=-1)
        network = self._network(condition, denoiser)
        level = _network_timestep(self.scheduler, timestep)
        result: Tensor = network(scaled.to(_dtype(self.denoiser)), level, return_dict=False)[0].float()
        return result

    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        denoiser: nn.Module | None = None,
        num_grad_steps: int = 0,
        num_resampling_steps: int = 1,
        start: Tensor | None = None,
        num_start_steps: int | None = None,
        start_level: float = 0.7,
        resume: tuple[Tensor, int] | None = None,
        ranking: EarlyRanking | None = None,
    ) -> Tensor:
        """Denoise from noise to normalised plans `(B, horizon, latent_dim)`.

        With a normaliser of `"limits"`, actions end clamped to the range of the data.

        Args:
            condition: of `observation_condition`, `context_condition` or `fix_entries`.
            num_inference_steps: denoising steps; the pipeline's own by default.
            generator: source of all noise.
            denoiser: stands in for the component.
            num_grad_steps: gradients flow through the last so many steps only (`sg(., K)` of Eq. 9).
            num_resampling_steps: denoise each step so many times (RePaint).
            start: clean plans to start from, noised to about `start_level`, instead of noise.
            num_start_steps: denoising steps run from `start`, evenly over the levels below; by default a quarter of
                `num_inference_steps`, at least 1.
            start_level: time in `(0, 1]`.
            resume: latents, and the number of denoising steps that led to them: go on from there.
            ranking: leaves out the rows of low value part-way.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        if start is not None:
            steps, count = _steps_from(start_level, max(1, steps // 4) if num_start_steps is None else num_start_steps)
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps.tolist()
        latents = randn_tensor(condition["values"].shape, generator=generator, device=self.denoiser.device)
        if resume is not None:
            latents, timesteps = resume[0], timesteps[resume[1] :]
        elif start is None:
            latents = latents * _initial_std(self.scheduler)
        else:
            timesteps = timesteps[-count:]
            latents = self.scheduler.add_noise(start, latents, torch.tensor(timesteps[:1]))
        latents = self.inpaint(latents, condition)
        extra = {"generator": generator} if _takes_generator(self.scheduler) else {}
        grad = torch.is_grad_enabled()
        ranked = 0 if ranking is None else ranking.num_steps_before(len(timesteps))
        with _while_unchanged(self._network(condition, denoiser)):
            for step, timestep in enumerate(timesteps):
                with torch.set_grad_enabled(grad and step >= len(timesteps) - num_grad_steps):
                    for repetition in range(num_resampling_steps):
                        if repetition:
                            latents = self.scheduler.renoise(latents, timestep, generator)
                            latents = self.inpaint(latents, condition)
                        output = self.predict(latents, timestep, condition, denoiser)
                        clean = self.scheduler.predict(output, latents, timestep)[0] if step + 1 == ranked else None
                        latents = self.scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
                        latents = self.inpaint(latents, condition)
                    if ranking is not None and clean is not None:
                        rows = ranking.choose(self._to_data_range(self.inpaint(clean, condition)), condition)
                        latents, condition = latents[rows], _take(condition, rows)
                        self.scheduler.keep_rows(rows)
        return self._to_data_range(latents)

    def _network(self, condition: dict[str, Tensor], denoiser: nn.Module | None) -> nn.Module:
        """The one that is given, or the component: with a `draft` in the condition the up-sampler."""
        if denoiser is not None:
            return denoiser
        network = self.upsampler if "draft" in condition else self.denoiser
        result: nn.Module = network if ControlPipeline is DiffusionPipeline else self.acting_network(network)
        return result

    def _to_data_range(self, latents: Tensor) -> Tensor:
        """Clamp actions, not observations: an action outside the data's range is never executed."""
        if self.normalizer.config.mode != "limits" or self.inverse_dynamics is not None:
            return latents
        observations, actions = latents.split((self.observation_dim, self.action_dim), dim=-1)
        return torch.cat([observations, actions.clamp(-1, 1)], dim=-1)

    def latent_shape(self, batch_size: int) -> tuple[int, int, int]:
        """`(batch_size, horizon, latent_dim)`."""
        return batch_size, self.config.horizon, self.latent_dim

    def encode(
        self, batch: dict[str, Tensor], num_context_steps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised plans and their conditions from windows of data.

        Args:
            batch: `observations` and `actions` of shape `(B, horizon, dim)`.
            num_context_steps: see `context_condition`; by default only the first observation is fixed.
        """
        latents = self.normalizer.normalize_observations(batch["observations"])
        if self.inverse_dynamics is None:
            latents = torch.cat([latents, self.normalizer.normalize_actions(batch["actions"])], dim=-1)
        if num_context_steps is None:
            num_context_steps = torch.zeros(len(latents), dtype=torch.int64)
        return latents, self.context_condition(latents, num_context_steps)

    def decode(self, latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Observations and actions of plans in the environment's units."""
        if self.inverse_dynamics is None:
            observations, actions = latents.split((self.observation_dim, self.action_dim), dim=-1)
        else:
            observations, following = latents, torch.cat([latents[:, 1:], latents[:, -1:]], dim=1)
            actions = self.inverse_dynamics(observations, following)
            actions = actions.clamp(-1, 1) if self.normalizer.config.mode == "limits" else actions
        return self.normalizer.unnormalize_observations(observations), self.normalizer.unnormalize_actions(actions)

    def _plan_values(self, plans: Tensor, num_value_steps: int) -> Tensor:
        """Mean of the critic's values over the first pairs of plans `(B, C, horizon, O + A)`, shape `(B, C)`."""
        length = getattr(self.critic.config, "num_action_steps", 1)
        longest = plans.shape[2] - length + 1
        if not 1 <= num_value_steps <= longest:
            raise ValueError(f"`num_value_steps` must lie in 1..{longest}, got {num_value_steps}.")
        observations, actions = plans.split((self.observation_dim, self.action_dim), dim=-1)
        actions = self.normalizer.normalize_actions(actions)
        if length > 1:
            actions = actions.unfold(2, length, 1).transpose(-1, -2)
        observations = self.normalizer.normalize_observations(observations[:, :, :num_value_steps])
        result: Tensor = self.critic(observations, actions[:, :, :num_value_steps]).mean(-1)
        return result

    def _context(
        self, observations: Tensor, past_observations: np.ndarray, past_actions: np.ndarray
    ) -> dict[str, Tensor]:
        """The condition of plans that begin with the given past; see `context` of the call."""
        past = [torch.as_tensor(part, dtype=torch.float32) for part in (past_observations, past_actions)]
        past = [(part[None] if part.ndim == 2 else part).to(observations.device) for part in past]
        count, rows = past[0].shape[1] if past[0].ndim == 3 else -1, len(observations)
        expected = [(rows, count, self.observation_dim), (rows, count, self.action_dim)]
        if not 0 <= count < self.config.horizon or [tuple(part.shape) for part in past] != expected:
            raise ValueError(
                f"`context` must be observations ({rows}, k, {self.observation_dim}) and actions "
                f"({rows}, k, {self.action_dim}) with k < {self.config.horizon}, the horizon; got "
                f"{' and '.join(str(tuple(part.shape)) for part in past)}."
            )
        if not all(bool(torch.isfinite(part).all()) for part in past):
            raise ValueError("`context` has NaN or infinite values.")
        seen = self.normalizer.normalize_observations(torch.cat([past[0], observations[:, None]], dim=1))
        plan = seen.new_zeros(self.latent_shape(rows))
        plan[:, : count + 1, : self.observation_dim] = seen
        if self.inverse_dynamics is None:
            plan[:, :count, self.observation_dim :] = self.normalizer.normalize_actions(past[1])
        return self.context_condition(plan, torch.full((rows,), count))

    def _shifted(self, previous_plan: np.ndarray | Tensor, num_plans: int, num_candidates: int) -> Tensor:
        """The previous plan one step later, its last step repeated, as normalised latents for every candidate."""
        plan = torch.as_tensor(previous_plan, dtype=torch.float32, device=self.denoiser.device)
        plan = plan[None] if plan.ndim == 2 else plan
        expected = (num_plans, self.config.horizon, self.observation_dim + self.action_dim)
        if plan.shape != expected or not bool(torch.isfinite(plan).all()):
            raise ValueError(f"`previous_plan` must be finite and of shape {expected}, got {tuple(plan.shape)}.")
        observations, actions = plan.split((self.observation_dim, self.action_dim), dim=-1)
        latents, _ = self.encode({"observations": observations, "actions": actions})
        return torch.cat([latents[:, 1:], latents[:, -1:]], dim=1).repeat_interleave(num_candidates, dim=0)


def _steps_from(level: float, count: int) -> tuple[int, int]:
    """How many denoising steps there are from noise if `count` of the same size lead down from time `level`."""
    if not 0 < level <= 1:
        raise ValueError(f"`warm_start_level` must lie in (0, 1], got {level}.")
    if count < 1:
        raise ValueError(f"`num_warm_start_steps` must be at least 1, got {count}.")
    return max(count, round(count / level)), count


# What follows stands in both pipelines' files, because each travels to the Hub alone.


def _align(module: nn.Module | None) -> None:
    """Copy weights that lie in a mapped file to memory of torch's own: its kernels round by alignment."""
    for tensor in () if module is None else (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _dtype(network: nn.Module) -> torch.dtype:
    """Of the first parameter, without the search through all modules that diffusers' `dtype` makes."""
    return next(network.parameters()).dtype


def _while_unchanged(network: nn.Module) -> AbstractContextManager[None]:
    """Inside the block the weights stay as they are: a network that knows the word computes less then."""
    return getattr(network, "while_unchanged", nullcontext)()


def _scaled(scheduler: SchedulerMixin, sample: Tensor, timestep: float | Tensor) -> Tensor:
    """The network's input; diffusers' flow schedulers scale nothing and have no such method."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _network_timestep(scheduler: SchedulerMixin, timestep: float | Tensor) -> float | Tensor:
    """What the network is told. diffusers' EDM schedulers count in `log(sigma) / 4`; the network knows the position on
    the schedule of Karras et al. (arXiv:2206.00364, Eq. 5), as `TransitionScheduler` counts."""
    if not hasattr(scheduler, "precondition_noise"):
        return timestep
    config = scheduler.config
    low, high = (sigma ** (1 / config.rho) for sigma in (config.sigma_min, config.sigma_max))
    sigma = torch.exp(4 * torch.as_tensor(timestep))
    result: float | Tensor = (sigma ** (1 / config.rho) - low) / (high - low) * config.num_train_timesteps
    return result


def _initial_std(scheduler: SchedulerMixin) -> float:
    """Standard deviation of the noise to start from; diffusers' flow schedulers do not say that it is 1."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def _takes_generator(scheduler: SchedulerMixin) -> bool:
    """Whether `step` draws noise; some of diffusers' deterministic schedulers have no such argument."""
    return "generator" in inspect.signature(scheduler.step).parameters


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


def _check_passes(num_upsampling_passes: int, *, has_upsampler: bool) -> None:
    if num_upsampling_passes < 0:
        raise ValueError(f"`num_upsampling_passes` must be at least 0, got {num_upsampling_passes}.")
    if num_upsampling_passes > 0 and not has_upsampler:
        raise ValueError(
            f"`num_upsampling_passes` is {num_upsampling_passes}, but this pipeline has no up-sampler: train one with "
            "CascadeTrainer, or leave it at 0."
        )


@dataclass
class EarlyRanking:
    """After a share of the denoising steps the candidates of each condition are ranked by what they are predicted to
    become, and only the best are denoised to the end.

    share_of_steps: in `(0, 1)`; at least one step comes before the ranking and one after it.
    num_kept: candidates of each condition that go on.
    rate: clean latents and their conditions to values `(B, C)`, `C` candidates in a row for each of `B` conditions.
    rows: of the latents that went on, once it is known; None where a single step left nothing to save.
    """

    share_of_steps: float
    num_kept: int
    rate: Callable[[Tensor, dict[str, Tensor]], Tensor | None]
    rows: Tensor | None = None

    def num_steps_before(self, num_steps: int) -> int:
        """Denoising steps of all candidates, out of so many."""
        return min(max(1, round(self.share_of_steps * num_steps)), num_steps - 1)

    def choose(self, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The rows of the best, in their order."""
        values = self.rate(latents, condition)
        assert values is not None
        best = values.topk(self.num_kept, dim=1).indices.sort(dim=1).values
        first = values.shape[1] * torch.arange(len(values), device=values.device)
        self.rows = (first[:, None] + best).flatten()
        return self.rows

    def kept(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The conditions of those that went on."""
        return condition if self.rows is None else _take(condition, self.rows)


def _take(condition: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in condition.items()}


def _early_ranking(
    shares: Sequence[float] | None,
    num_candidates: int,
    selection: str,
    pipeline: DiffusionPipeline,
    rate: Callable[[Tensor, dict[str, Tensor]], Tensor | None],
) -> EarlyRanking | None:
    """The ranking that a call's `early_ranking` asks for."""
    if shares is None:
        return None
    if len(shares) != 2 or not 0 < shares[0] < 1 or not 0 < shares[1] <= 1:
        raise ValueError(
            "`early_ranking` must be two shares: of the denoising steps, in (0, 1), and of the candidates that go on, "
            f"in (0, 1]; got {shares}."
        )
    if pipeline.critic is None or selection == "expectation":
        raise ValueError(
            "`early_ranking` leaves out candidates that the critic values little: it needs a critic and another "
            f"`action_selection` than 'expectation', got {selection!r}."
        )
    if not hasattr(pipeline.scheduler, "keep_rows"):
        raise ValueError(
            f"`early_ranking` needs a TransitionScheduler, which says what a sample is predicted to become; this "
            f"pipeline's is a {type(pipeline.scheduler).__name__}."
        )
    return EarlyRanking(shares[0], math.ceil(round(shares[1] * num_candidates, 6)), rate)


def _select(
    candidates: Tensor, values: Tensor | None, selection: str, temperature: float, generator: torch.Generator | None
) -> Tensor:
    """One of the candidates `(B, C, ...)` for each observation, or their mean; shape `(B, ...)`."""
    if selection == "expectation" or values is None:
        return candidates.mean(1)
    if selection == "greedy":
        index = values.argmax(1)
    else:
        source = generator.device if generator is not None else values.device
        shares = torch.softmax(values / temperature, dim=1).to(source)
        index = torch.multinomial(shares, 1, generator=generator)[:, 0].to(values.device)
    return candidates[torch.arange(len(candidates), device=candidates.device), index]
