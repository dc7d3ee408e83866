"""Diffusion-DPO on pairs or rankings of samples, which the controller draws itself or finds in the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn

from dmc_hub.conditions import EpisodeConditions
from dmc_hub.losses import denoising_loss, diffusion_dpo_loss, plackett_luce_loss
from dmc_hub.trainers.candidates import CandidatesConfig, CandidatesTrainer
from dmc_hub.trainers.sampling import pack, unpack


@dataclass(kw_only=True)
class DiffusionDPOConfig(CandidatesConfig):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta <= 0 or self.snr_clip <= 0:
            raise ValueError(f"`beta` and `snr_clip` must be positive, got {self.beta} and {self.snr_clip}.")
        if not self.max_pair_distance > 0:
            raise ValueError(f"`max_pair_distance` must be positive, got {self.max_pair_distance}.")
        if self.pairs == "data" and (self.pair_consistency != "independent" or self.sample_from_reference):
            raise ValueError(
                "`pair_consistency` and `sample_from_reference` are about sampled pairs: leave them at 'independent' "
                "and False, or set `pairs` to 'sampled'."
            )
        if self.pairs == "sampled" and self.preference == "return":
            raise ValueError("`preference` 'return' needs logged rewards: set `pairs` to 'data', or use 'reward'.")


class DiffusionDPOTrainer(CandidatesTrainer):
    """Direct preference optimisation of a diffusion model (Eq. 10–12 of arXiv:2502.12198, arXiv:2311.12908).

    The samples of a group share their condition, and in the loss also time and noise. The errors are those of the noise
    prediction summed over the free entries, `||eps - eps_theta||^2`, whatever the network predicts.

    With `pairs="data"` a group is a logged window and its nearest neighbours by the first observation (the history of a
    policy), all under the first one's condition. Of a sampled group the best and the worst are a pair; entries that its
    candidates share (`pair_consistency`) don't count in the loss.
    """

    args: DiffusionDPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.require_reference()
        if self.args.pairs == "data":
            if not isinstance(self.source, EpisodeConditions):
                raise ValueError("`pairs` 'data' needs windows of episodes: set it to 'sampled'.")
            self.windows = self.source.windows
            history = self.windows.history(torch.arange(len(self.windows))).to(self.args.device)
            first = self.pipeline.normalizer.normalize_observations(history)
            self._states = first.flatten(1).cpu().numpy()
            self._neighbours = cKDTree(self._states)

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
        count = self.args.num_candidates
        samples, condition = self.candidates(self.conditions(self.args.num_conditions, generator), generator)
        rewards = self.rewards(samples.flatten(0, 1), self.pipeline.repeat(condition, count))
        self.log_metric("reward", rewards)
        ranked, rewards = self.ranked(samples.flatten(0, 1), rewards, count)
        return ranked, condition, rewards

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

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size = self.args.per_device_train_batch_size
        rows = torch.randint(self.args.num_conditions, (size,), generator=generator)
        rows = rows.to(next(iter(buffer.values())).device)
        return {
            **{name: value[rows] for name, value in buffer.items()},
            **self.noise_levels(size, generator),
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
        timesteps, noise = inputs["timesteps"].repeat(group), torch.cat([inputs["noise"]] * group)
        x0 = inputs["samples"].transpose(0, 1).flatten(0, 1)
        x_t = scheduler.add_noise(x0, noise, timesteps)
        clean, _ = scheduler.predict(self.pipeline.predict(x_t, timesteps, condition), x_t, timesteps)
        mask = self.pipeline.free_entries(condition)
        entries = x0[0].numel() if mask is None else mask.flatten(1).sum(1)
        at = scheduler.coefficients(timesteps, x0)
        snr = (at.alpha / at.sigma).pow(2).flatten().to(x0)
        errors = self._weight_on_clean_errors(snr) * entries * denoising_loss(clean, x0, mask)
        result: Tensor = errors.unflatten(0, (group, -1)).transpose(0, 1)
        return result

    def _weight_on_clean_errors(self, snr: Tensor) -> Tensor:
        """`snr omega`, because `||eps - eps_theta||^2 = snr ||x0 - x0_theta||^2`."""
        if self.args.weighting == "snr_clip":
            return snr.clamp(max=self.args.snr_clip)
        return snr if self.args.weighting == "constant" else snr**2


def _last(rewards: Tensor) -> Tensor:
    """The worst place that is not empty in each group of descending rewards, `(B, G)` to `(B,)`."""
    return rewards.isfinite().sum(1) - 1
