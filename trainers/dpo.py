"""Diffusion-DPO on pairs or rankings of samples, which the controller draws itself or finds in the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss, diffusion_dpo_loss, plackett_luce_loss
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack


@dataclass(kw_only=True)
class DiffusionDPOConfig(SamplingConfig):
    """Settings of `DiffusionDPOTrainer`."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Pairs per process and step."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    beta: float = field(
        default=10.0,
        metadata={"help": "Strength of the pull to the foundation: gamma of Eq. 11, beta of Diffusion-DPO."},
    )
    loss_type: Literal["sigmoid", "ipo", "listwise"] = field(
        default="sigmoid",
        metadata={
            "help": "DPO's log-sigmoid of a pair's margin, IPO's squared distance of it from a finite target, or "
            "the Plackett-Luce likelihood of the ranking of all candidates."
        },
    )
    weighting: Literal["snr_clip", "constant", "snr"] = field(
        default="snr_clip",
        metadata={
            "help": "omega(lambda_t) on noise errors: min(snr, snr_clip) / snr, so that no noise level dominates; 1, "
            "as in Diffusion-DPO; or snr."
        },
    )
    snr_clip: float = field(default=5.0, metadata={"help": "Of the weighting 'snr_clip'."})
    pairs: Literal["sampled", "data"] = field(
        default="sampled",
        metadata={"help": "Candidates are sampled by the controller, or are logged windows from nearby states."},
    )
    max_pair_distance: float = field(
        default=0.1,
        metadata={"help": "Pairs from data: no normalised entry of their first observations differs by this or more."},
    )
    preference: Literal["reward", "return"] = field(
        default="reward",
        metadata={"help": "Ranked by the reward function (the critic by default), or pairs from data by their return."},
    )
    pair_consistency: Literal["independent", "shared_latent", "shared_part"] = field(
        default="independent",
        metadata={
            "help": "Sampled candidates of a condition share nothing else, the latent after the first denoising steps, "
            "or a contiguous part around which they are in-painted."
        },
    )
    shared_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of the denoising steps, or of the horizon, that they share."},
    )
    num_candidates: int = field(
        default=8, metadata={"help": "Candidates per condition; the best and the worst of them are a pair."}
    )
    num_conditions: int = field(default=256, metadata={"help": "Pairs in one buffer."})
    steps_per_buffer: int = field(default=20, metadata={"help": "Micro-steps before the buffer is filled anew."})
    sample_from_reference: bool = field(
        default=False, metadata={"help": "Sample pairs from the foundation instead of the current controller."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_conditions", "steps_per_buffer")
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` must be at least 2 to make a pair, got {self.num_candidates}.")
        if self.beta <= 0 or self.snr_clip <= 0:
            raise ValueError(f"`beta` and `snr_clip` must be positive, got {self.beta} and {self.snr_clip}.")
        if not self.max_pair_distance > 0:
            raise ValueError(f"`max_pair_distance` must be positive, got {self.max_pair_distance}.")
        if not 0 < self.shared_fraction < 1:
            raise ValueError(f"`shared_fraction` must lie between 0 and 1, got {self.shared_fraction}.")
        if self.pairs == "data" and (self.pair_consistency != "independent" or self.sample_from_reference):
            raise ValueError(
                "`pair_consistency` and `sample_from_reference` are about sampled pairs: leave them at 'independent' "
                "and False, or set `pairs` to 'sampled'."
            )
        if self.pairs == "sampled" and self.preference == "return":
            raise ValueError("`preference` 'return' needs logged rewards: set `pairs` to 'data', or use 'reward'.")


class DiffusionDPOTrainer(SamplingTrainer):
    """Direct preference optimisation of a diffusion model (Eq. 10–12 of arXiv:2502.12198, arXiv:2311.12908).

    The samples of a group share their condition, and in the loss also time and noise. The errors are those of the noise
    prediction summed over the free entries, `||eps - eps_theta||^2`, whatever the network predicts.

    With `pairs="data"` a group is a logged window and its nearest neighbours by the first observation (the history of a
    policy), all under the first one's condition. Consistent samples (section 3.4) differ where it matters: candidates
    that share a latent z_t agree in what the first denoising steps decide, in-painted ones in a piece of trajectory,
    whose entries then don't count in the loss.
    """

    args: DiffusionDPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.require_reference()
        self._check_consistency()
        if self.args.pairs == "data":
            first = self.pipeline.normalizer.normalize_observations(
                self.windows.history(torch.arange(len(self.windows))).to(self.args.device)
            )
            self._states = first.flatten(1).cpu().numpy()
            self._neighbours = cKDTree(self._states)

    @property
    def micro_steps_per_buffer(self) -> int:
        return self.args.steps_per_buffer

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        if self.args.pairs == "data":
            samples, condition, rewards = self._ranked_windows(generator)
        else:
            with self.reference_if(self.args.sample_from_reference):
                samples, condition, rewards = self._ranked_samples(generator)
        rows, worst = torch.arange(len(rewards), device=rewards.device), _last(rewards)
        gap = rewards[:, 0] - rewards[rows, worst]
        if not bool((gap > 0).any()) and self.args.pairs == "data":
            raise ValueError(
                f"No window has a neighbour of another {self.args.preference} within `max_pair_distance` "
                f"{self.args.max_pair_distance}: raise it, or use `pairs='sampled'`."
            )
        self.log_metric("reward_gap", gap)
        if self.args.loss_type != "listwise":
            samples = torch.stack([samples[:, 0], samples[rows, worst]], dim=1)
            rewards = torch.stack([rewards[:, 0], rewards[rows, worst]], dim=1)
        return {"samples": samples, "rewards": rewards, **pack("condition", condition)}

    def _ranked_samples(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Candidates `(num_conditions, num_candidates, horizon, dim)`, their conditions and rewards, best first."""
        count, consistency = self.args.num_candidates, self.args.pair_consistency
        if consistency == "independent":
            return self.sample_ranked(self.args.num_conditions, count, generator)
        condition = self.conditions(self.args.num_conditions, generator)
        sample = self._share_latent if consistency == "shared_latent" else self._share_part
        samples, condition = sample(condition, generator)
        rewards = self.rewards(samples.flatten(0, 1), self.pipeline.repeat(condition, count))
        self.log_metric("reward", rewards)
        ranked, rewards = self.ranked(samples.flatten(0, 1), rewards, count)
        return ranked, condition, rewards

    def _share_latent(
        self, condition: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Candidates whose denoising went the same way for the first steps."""
        others = self.args.num_candidates - 1
        steps = self._num_inference_steps
        shared = min(max(1, round(self.args.shared_fraction * steps)), steps - 1)
        with self.pipeline.scheduler.record() as trajectory:
            first = self.pipeline.sample(condition, num_inference_steps=steps, generator=generator)
        if not any(step >= shared for step in trajectory.stochastic_steps):
            raise ValueError(
                f"No noise is drawn after the {shared} of {steps} denoising steps that candidates share, so they would "
                "be equal: lower `shared_fraction`, use more steps or a scheduler with `eta > 0`, or 'independent'."
            )
        latents = trajectory.next_latents[shared - 1].repeat_interleave(others, dim=0)
        rest = self.pipeline.sample(
            self.pipeline.repeat(condition, others),
            num_inference_steps=steps,
            generator=generator,
            resume=(latents, shared),
        )
        return torch.cat([first[:, None], rest.unflatten(0, (-1, others))], dim=1), condition

    def _share_part(self, condition: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Candidates that are in-painted around a contiguous part of the first, and the condition that fixes it."""
        others, horizon = self.args.num_candidates - 1, self.pipeline.config.horizon
        options = {"num_inference_steps": self.args.num_inference_steps, "generator": generator}
        first = self.pipeline.sample(condition, **options)
        length = min(max(1, round(self.args.shared_fraction * horizon)), horizon - 1)
        start = torch.randint(horizon - length + 1, (len(first), 1, 1), generator=generator)
        steps = torch.arange(horizon)[None, :, None]
        part = ((steps >= start) & (steps < start + length)).to(first.device).expand_as(first)
        condition = self.pipeline.fix_entries(condition, first, part)
        rest = self.pipeline.sample(self.pipeline.repeat(condition, others), **options)
        return torch.cat([first[:, None], rest.unflatten(0, (-1, others))], dim=1), condition

    def _ranked_windows(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Windows that start near each other; a place without a neighbour has reward -inf and comes last."""
        count = self.args.num_candidates
        anchors = torch.randint(len(self.windows), (self.args.num_conditions,), generator=generator)
        _, found = self._neighbours.query(
            self._states[anchors.numpy()],
            k=count,
            p=float("inf"),
            distance_upper_bound=self.args.max_pair_distance,
        )
        neighbours = torch.as_tensor(found)
        is_empty = neighbours == len(self.windows)
        rows = torch.where(is_empty, anchors[:, None], neighbours).flatten()
        batch = {name: value.to(self.args.device) for name, value in self.windows.gather(rows).items()}
        samples, condition = self.pipeline.encode(batch)
        rewards = batch["rewards"].sum(1) if self.args.preference == "return" else self.rewards(samples, condition)
        self.log_metric("paired_share", (~is_empty).sum(1).gt(1).float())
        self.log_metric("reward", rewards)
        samples, rewards = self.ranked(
            samples, rewards.masked_fill(is_empty.flatten().to(rewards.device), float("-inf")), count
        )
        # The first of each group is at distance 0 from the anchor: its condition is the anchor's.
        return samples, {name: value[::count] for name, value in condition.items()}, rewards

    @property
    def _num_inference_steps(self) -> int:
        return self.args.num_inference_steps or self.pipeline.config.num_inference_steps

    def _check_consistency(self) -> None:
        consistency, horizon = self.args.pair_consistency, self.pipeline.config.horizon
        if consistency == "shared_part" and horizon < 2:
            raise ValueError("`pair_consistency` 'shared_part' needs a horizon of at least 2: this controller's is 1.")
        if consistency == "shared_latent" and self._num_inference_steps < 2:
            raise ValueError("`pair_consistency` 'shared_latent' needs at least 2 denoising steps, one of them shared.")

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        rows = torch.randint(self.args.num_conditions, (size,), generator=generator).to(self.args.device)
        return {
            **{name: value[rows] for name, value in buffer.items()},
            "timesteps": self.pipeline.scheduler.sample_timesteps(size, generator),
            "noise": torch.randn(self.pipeline.latent_shape(size), generator=generator),
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        errors = self._noise_errors(inputs)
        with torch.no_grad(), self.pipeline.lora_disabled():
            reference = self._noise_errors(inputs)
        rewards, beta = inputs["rewards"], self.args.beta
        last = _last(rewards)[:, None]
        if self.args.loss_type == "listwise":
            scores = -beta * (errors - reference)
            loss, margin = plackett_luce_loss(scores, rewards), (scores[:, :1] - scores.gather(1, last))[:, 0]
        else:
            loss, margin = diffusion_dpo_loss(
                *errors.unbind(1), *reference.unbind(1), beta=beta, loss_type=self.args.loss_type
            )
        self.log_metric("accuracy", (margin > 0).float())
        self.log_metric("margin", margin)
        counts = (rewards[:, :1] > rewards.gather(1, last))[:, 0].to(loss)  # equal rewards prefer nothing
        counted = self.accelerator.reduce(counts.sum()) / self.args.world_size  # the mean over all processes' pairs
        return (loss * counts).sum() / counted.clamp(min=1 / self.args.world_size)

    def _noise_errors(self, inputs: dict[str, Tensor]) -> Tensor:
        """`omega(lambda_t) ||eps - eps_theta||^2` of each member of each group in one forward, shape `(B, G)`."""
        group, scheduler = inputs["samples"].shape[1], self.pipeline.scheduler
        condition = {name: torch.cat([value] * group) for name, value in unpack("condition", inputs).items()}
        timesteps, noise = inputs["timesteps"].repeat(group), inputs["noise"].repeat(group, 1, 1)
        x0 = inputs["samples"].transpose(0, 1).flatten(0, 1)
        x_t = scheduler.add_noise(x0, noise, timesteps)
        clean, _ = scheduler.predict(self.pipeline.predict(x_t, timesteps, condition), x_t, timesteps)
        mask = self.pipeline.free_entries(condition)
        entries = x0[0].numel() if mask is None else mask.flatten(1).sum(1)
        at = scheduler.coefficients(timesteps, x0)
        snr = (at.alpha / at.sigma).pow(2).flatten().to(x0)
        errors = self._weight_on_clean_errors(snr) * entries * denoising_loss(clean, x0, mask)
        return errors.unflatten(0, (group, -1)).transpose(0, 1)

    def _weight_on_clean_errors(self, snr: Tensor) -> Tensor:
        """`snr omega`, because `||eps - eps_theta||^2 = snr ||x0 - x0_theta||^2`."""
        if self.args.weighting == "snr_clip":
            return snr.clamp(max=self.args.snr_clip)
        return snr if self.args.weighting == "constant" else snr**2


def _last(rewards: Tensor) -> Tensor:
    """The worst place that is not empty in each group of descending rewards, `(B, G)` to `(B,)`."""
    return rewards.isfinite().sum(1) - 1
