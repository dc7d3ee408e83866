"""Diffusion policy: sample action sequences conditioned on the observation, choose one by a critic.

This file travels to the Hub: apart from its guarded base class it imports torch, numpy and diffusers only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
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
class PolicyOutput:
    """One decision per observation, in the environment's units. The batch dimension `B` is the observation's, if any.

    Attributes:
        action: the selected action, shape `(B, action_dim)`.
        candidates: first actions of all sequences, shape `(B, num_candidates, action_dim)`.
        values: critic's value of each candidate, shape `(B, num_candidates)`; None without a critic.
        actions: the selected sequence, shape `(B, horizon - num_past_actions, action_dim)`: `action` first.
    """

    action: np.ndarray
    candidates: np.ndarray
    values: np.ndarray | None
    actions: np.ndarray


class DiffusionPolicyPipeline(ControlPipeline):
    """Act by sampling action sequences given the observation (Chi et al., arXiv:2303.04137; arXiv:2502.12198, 4.4).

    Args:
        denoiser: maps noisy action sequences `(batch, horizon, action_dim)`, a timestep and the normalised
            observations `(batch, num_observation_steps * observation_dim)` to the scheduler's prediction.
        scheduler: gives each denoising step as a Gaussian.
        normalizer: statistics of the data.
        critic: `(observations, actions) -> values` on normalised inputs; needed to choose between candidates.
        vision_encoder: a `VisionEncoder`: an observation is then the state and behind it the features of the cameras'
            images, which the normaliser leaves as they are. Critic, adapters and trainers take features for numbers
            like any others; each decision encodes its images once.
        upsampler: a denoiser whose input holds a draft behind the noisy sequence: it samples sequences of more reward
            than the draft's (section 3.4 of arXiv:2502.12198).
        horizon: actions of a sequence.
        num_past_actions: the first so many actions of a sequence belong to steps before the current one, and are
            sampled but never executed. 0 in this library's own policies; `num_observation_steps - 1` in LeRobot's.
        num_observation_steps: observations that the policy looks at, the current one last.
        num_inference_steps: default number of denoising steps.
    """

    _optional_components = ["critic", "vision_encoder", "upsampler"]
    model_cpu_offload_seq = "vision_encoder->denoiser->upsampler"

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        normalizer: ModelMixin,
        critic: ModelMixin | None = None,
        vision_encoder: ModelMixin | None = None,
        upsampler: ModelMixin | None = None,
        horizon: int = 16,
        num_observation_steps: int = 1,
        num_inference_steps: int = 10,
        num_past_actions: int = 0,
    ) -> None:
        super().__init__()
        for component in (denoiser, normalizer, critic, vision_encoder, upsampler):
            _align(component)
        self.register_modules(
            denoiser=denoiser,
            scheduler=scheduler,
            normalizer=normalizer,
            critic=critic,
            vision_encoder=vision_encoder,
            upsampler=upsampler,
        )
        if not 0 <= num_past_actions < horizon:
            raise ValueError(f"`num_past_actions` must lie in 0..{horizon - 1}, got {num_past_actions}.")
        self.register_to_config(
            horizon=horizon,
            num_observation_steps=num_observation_steps,
            num_inference_steps=num_inference_steps,
            num_past_actions=num_past_actions,
        )

        if vision_encoder is not None and self.state_dim < 1:
            raise ValueError(
                f"`normalizer` is for observations of {self.observation_dim} numbers, but `vision_encoder` alone gives "
                f"{self.observation_dim - self.state_dim} features: fit it with `Normalizer.from_data(states, actions, "
                "num_features=vision_encoder.feature_dim)`."
            )

    @property
    def observation_dim(self) -> int:
        """Width of an observation: with a vision encoder, of the state and the features."""
        number: int = self.normalizer.config.observation_dim
        return number

    @property
    def state_dim(self) -> int:
        """Numbers of an observation that are not features of images."""
        return self.observation_dim - (0 if self.vision_encoder is None else self.vision_encoder.feature_dim)

    @property
    def action_dim(self) -> int:
        number: int = self.normalizer.config.action_dim
        return number

    @property
    def num_observation_steps(self) -> int:
        """Observations that the policy looks at."""
        number: int = self.config.num_observation_steps
        return number

    @property
    def num_past_actions(self) -> int:
        """Actions of a sequence that belong to steps before the current one."""
        number: int = self.config.num_past_actions
        return number

    @torch.inference_mode()
    def __call__(
        self,
        observation: np.ndarray | Tensor | Mapping[str, np.ndarray | Tensor],
        *,
        num_candidates: int = 1,
        num_inference_steps: int | None = None,
        action_selection: str = "greedy",
        temperature: float = 1.0,
        early_ranking: Sequence[float] | None = None,
        num_upsampling_passes: int = 0,
        generator: int | np.integer | torch.Generator | None = None,
    ) -> PolicyOutput:
        """Choose actions; all observations × candidates are denoised in one batch.

        Args:
            observation: in the environment's units, shape `(observation_dim,)` or `(B, observation_dim)`; with
                `num_observation_steps > 1` the history, oldest first, of shape `(num_observation_steps,
                observation_dim)` or with `B` in front. With a vision encoder, a mapping of the same leading dimensions;
                see `observation_vectors`.
            num_candidates: action sequences sampled per observation.
            num_inference_steps: denoising steps; the pipeline's own by default.
            action_selection: `"greedy"` takes the candidate of the highest value, `"expectation"` the mean of all
                candidates, `"softmax"` draws one with probability proportional to `exp(value / temperature)` (IDQL,
                arXiv:2304.10573).
            temperature: of `"softmax"`, in units of the return.
            early_ranking: two shares, `(0.5, 0.25)` say: after so many of the denoising steps the critic values what
                the candidates are predicted to become, and so many of them, rounded up, are denoised to the end; the
                output holds these alone. None is off: all are.
            num_upsampling_passes: so many times the up-sampler samples a better candidate given each, which takes
                its place (sections 3.4 and 3.5 of arXiv:2502.12198, which advises 1 or 2); 0 is off.
            generator: a seed or a torch generator; None draws from torch's global one.

        Raises:
            ValueError: an observation of the wrong shape or dtype or with NaN, an unknown `action_selection`, no critic
                to choose with, an impossible `early_ranking`, or no up-sampler for `num_upsampling_passes`.
        """
        if isinstance(observation, Mapping):
            observation = self.observation_vectors(observation)
        history = self.normalizer.observation_batch(observation, self.num_observation_steps).to(self.denoiser.device)
        _check_selection(action_selection, num_candidates, temperature, has_critic=self.critic is not None)
        _check_passes(num_upsampling_passes, has_upsampler=self.upsampler is not None)
        if isinstance(generator, (int, np.integer)):
            generator = torch.Generator().manual_seed(int(generator))
        condition = self.repeat(self.observation_condition(history), num_candidates)

        def rated(latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
            sequences = self.decode(latents, condition)[1].unflatten(0, (len(history), -1))
            return sequences, None if self.critic is None else self._values(history[:, -1], sequences)

        def rate(latents: Tensor, condition: dict[str, Tensor]) -> Tensor | None:
            return rated(latents, condition)[1]

        ranking = _early_ranking(early_ranking, num_candidates, action_selection, self, rate)
        latents = self.sample(condition, num_inference_steps=num_inference_steps, generator=generator, ranking=ranking)
        condition = condition if ranking is None else ranking.kept(condition)
        for _ in range(num_upsampling_passes):
            drafted = {**condition, "draft": latents}
            latents = self.sample(drafted, num_inference_steps=num_inference_steps, generator=generator)
        sequences, values = rated(latents, condition)
        chosen = _select(sequences, values, action_selection, temperature, generator)
        single = np.ndim(observation) == (1 if self.num_observation_steps == 1 else 2)

        def rows(tensor: Tensor) -> np.ndarray:
            return tensor[0].cpu().numpy() if single else tensor.cpu().numpy()

        return PolicyOutput(
            action=rows(chosen[:, 0]),
            candidates=rows(sequences[:, :, 0]),
            values=None if values is None else rows(values),
            actions=rows(chosen),
        )

    # What trainers use: conditions, sampling, and the way between data and latents

    def observation_vectors(
        self, observation: Mapping[str, np.ndarray | Tensor], crop_offsets: Tensor | None = None
    ) -> Tensor:
        """Observations `(..., observation_dim)`: the state, and behind it the features of the images.

        Args:
            observation: `state` `(..., state_dim)` in the environment's units, and under each camera's name images
                `(..., height, width, channels)`, uint8, or floating point in `[0, 1]`.
            crop_offsets: of random crops, to train the encoder; see there. None: the encoder is frozen.

        Raises:
            ValueError: the pipeline has no vision encoder, or entries are missing, unknown, or of wrong shapes.
        """
        encoder = self.vision_encoder
        if encoder is None:
            raise ValueError("`observation` is a mapping, but this pipeline has no `vision_encoder`: pass an array.")
        parts = {name: _tensor(value).to(encoder.device) for name, value in observation.items()}
        names = ("state", *encoder.cameras)
        if set(parts) != set(names):
            raise ValueError(f"`observation` must have the entries {', '.join(names)}; it has {', '.join(parts)}.")
        state, first = parts["state"], parts[encoder.cameras[0]]
        for name in encoder.cameras:
            shape = parts[name].shape
            if state.shape[-1:] != (self.state_dim,) or (*state.shape[:-1], *first.shape[-3:]) != shape:
                raise ValueError(
                    f"`observation` must have a state (..., {self.state_dim}) and images (..., height, width, "
                    f"channels), alike in leading dimensions and size; got {tuple(state.shape)} and {name} "
                    f"{tuple(shape)}."
                )
        images = torch.stack([parts[name] for name in encoder.cameras], dim=-4).movedim(-1, -3)
        features = encoder.encode(images) if crop_offsets is None else encoder(images, crop_offsets)
        return torch.cat([state.float(), features], dim=-1)

    def observation_condition(self, observations: Tensor) -> dict[str, Tensor]:
        """The condition of action sequences after `observations`, in the environment's units.

        `observations` has shape `(B, num_observation_steps, observation_dim)`, or `(B, observation_dim)` for one.
        """
        normalized = self.normalizer.normalize_observations(observations.float())
        return {"embedding": normalized.reshape(-1, self.num_observation_steps * self.observation_dim)}

    def repeat(self, condition: dict[str, Tensor], num_candidates: int) -> dict[str, Tensor]:
        """Each condition `num_candidates` times in a row."""
        return {name: value.repeat_interleave(num_candidates, dim=0) for name, value in condition.items()}

    def fix_entries(self, condition: dict[str, Tensor], latents: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Fix the entries of action sequences that `mask` selects to those of `latents`, both of the latents' shape.

        Sampling overwrites them by their noised values (RePaint, arXiv:2201.09865, Algorithm 1).
        """
        return {**condition, "values": latents, "mask": mask}

    def free_entries(self, condition: dict[str, Tensor]) -> Tensor | None:
        """Entries that losses count, of the latents' shape; None: all, unless `fix_entries` fixed some."""
        return ~condition["mask"] if "mask" in condition else None

    def inpaint(self, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The latents as they are: nothing is fixed."""
        return latents

    def predict(
        self, sample: Tensor, timestep: float | Tensor, condition: dict[str, Tensor], denoiser: nn.Module | None = None
    ) -> Tensor:
        """The network's output for `sample`; `denoiser` stands in for the component.

        With a `draft` in the condition the component is the up-sampler: `p(x^r | x^cond, observation)`.
        """
        network, dtype = self._network(condition, denoiser), _dtype(self.denoiser)
        scaled = _scaled(self.scheduler, sample, timestep)
        if "draft" in condition:
            scaled = torch.cat([scaled, condition["draft"]], dim=-1)
        level = _network_timestep(self.scheduler, timestep)
        result: Tensor = network(scaled.to(dtype), level, condition["embedding"].to(dtype), return_dict=False)[
            0
        ].float()
        return result

    def sample(
        self,
        condition: dict[str, Tensor],
        *,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        denoiser: nn.Module | None = None,
        num_grad_steps: int = 0,
        resume: tuple[Tensor, int] | None = None,
        ranking: EarlyRanking | None = None,
    ) -> Tensor:
        """Denoise from noise to normalised action sequences `(B, horizon, action_dim)`.

        With a normaliser of `"limits"` they end clamped to the range of the data.

        Args:
            condition: of `observation_condition`, or of `fix_entries`.
            num_inference_steps: denoising steps; the pipeline's own by default.
            generator: source of all noise.
            denoiser: stands in for the component.
            num_grad_steps: gradients flow through the last so many steps only (`sg(., K)` of Eq. 9).
            resume: latents, and the number of denoising steps that led to them: go on from there.
            ranking: leaves out the rows of low value part-way.
        """
        steps = self.config.num_inference_steps if num_inference_steps is None else num_inference_steps
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps.tolist()
        if resume is None:
            shape = self.latent_shape(len(condition["embedding"]))
            latents = randn_tensor(shape, generator=generator, device=self.denoiser.device)
            latents = latents * _initial_std(self.scheduler)
        else:
            latents, timesteps = resume[0], timesteps[resume[1] :]
        has_fixed = "mask" in condition
        if has_fixed:
            latents = self._inpaint(latents, condition, timesteps[0], generator)
        extra = {"generator": generator} if _takes_generator(self.scheduler) else {}
        grad = torch.is_grad_enabled()
        ranked = 0 if ranking is None else ranking.num_steps_before(len(timesteps))
        with _while_unchanged(self._network(condition, denoiser)):
            for step, timestep in enumerate(timesteps):
                with torch.set_grad_enabled(grad and step >= len(timesteps) - num_grad_steps):
                    output = self.predict(latents, timestep, condition, denoiser)
                    clean = self.scheduler.predict(output, latents, timestep)[0] if step + 1 == ranked else None
                    latents = self.scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
                    if has_fixed:
                        next_timestep = self.scheduler.next_timestep(timestep)
                        latents = self._inpaint(latents, condition, next_timestep, generator)
                    if ranking is not None and clean is not None:
                        rows = ranking.choose(self._to_data_range(clean), condition)
                        latents, condition = latents[rows], _take(condition, rows)
                        self.scheduler.keep_rows(rows)
        return self._to_data_range(latents)

    def _to_data_range(self, latents: Tensor) -> Tensor:
        """Clamp actions: one outside the data's range is never executed."""
        result: Tensor = latents.clamp(-1, 1) if self.normalizer.config.mode == "limits" else latents
        return result

    def _network(self, condition: dict[str, Tensor], denoiser: nn.Module | None) -> nn.Module:
        """The one that is given, or the component: with a `draft` in the condition the up-sampler."""
        if denoiser is not None:
            return denoiser
        network = self.upsampler if "draft" in condition else self.denoiser
        result: nn.Module = network if ControlPipeline is DiffusionPipeline else self.acting_network(network)
        return result

    def _inpaint(
        self, latents: Tensor, condition: dict[str, Tensor], timestep: int, generator: torch.Generator | None
    ) -> Tensor:
        """Overwrite the fixed entries by their values noised to `timestep`."""
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device)
        noised = self.scheduler.add_noise(condition["values"], noise, torch.tensor([timestep]))
        return torch.where(condition["mask"], noised, latents)

    def latent_shape(self, batch_size: int) -> tuple[int, int, int]:
        """`(batch_size, horizon, action_dim)`."""
        return batch_size, self.config.horizon, self.action_dim

    def encode(
        self, batch: dict[str, Tensor], num_context_steps: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised action sequences and conditions from windows of data.

        Args:
            batch: `actions` `(B, horizon, action_dim)`, the first of them `num_past_actions` steps before now, and
                `observation_history` `(B, num_observation_steps, observation_dim)`. To train the vision encoder, the
                history of the state, of each camera's images as `images/<camera>`, and `crop_offsets`.
            num_context_steps: unused: a policy's context is its observation.
        """
        latents = self.normalizer.normalize_actions(batch["actions"])
        history = batch["observation_history"]
        if "crop_offsets" in batch:
            images = {name: batch[f"images/{name}"] for name in self.vision_encoder.cameras}
            history = self.observation_vectors({"state": history, **images}, batch["crop_offsets"])
        return latents, self.observation_condition(history)

    def decode(self, latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Observations `(B, 1, observation_dim)` and actions from now on `(B, horizon - num_past_actions, action_dim)`.

        Both are in the environment's units.
        """
        current = condition["embedding"][:, None, -self.observation_dim :]
        observations = self.normalizer.unnormalize_observations(current)
        return observations, self.normalizer.unnormalize_actions(latents[:, self.num_past_actions :])

    def _values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Critic's value of sequences `(B, C, T, action_dim)` at observations `(B, observation_dim)`: `(B, C)`."""
        length = getattr(self.critic.config, "num_action_steps", 1)
        actions = actions[:, :, 0] if length == 1 else actions[:, :, :length]
        observations = self.normalizer.normalize_observations(observations)[:, None].expand(-1, actions.shape[1], -1)
        result: Tensor = self.critic(observations, self.normalizer.normalize_actions(actions))
        return result


def _tensor(values: np.ndarray | Tensor) -> Tensor:
    """A copy of an array, because torch takes neither read-only ones nor reversed ones."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


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
