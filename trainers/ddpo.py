"""Policy gradients over the denoising steps: REINFORCE and PPO clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmc_hub.losses import (
    adapted_kl_coefficient,
    entropy_estimates,
    growing_clip_range,
    off_policy_mask,
    ppo_clip_loss,
    reinforce_loss,
    similarity_credit,
)
from dmc_hub.scheduler import GaussianTransition
from dmc_hub.trainers.sampling import pack, unpack
from dmc_hub.trainers.truncated import TruncatedConfig, TruncatedTrainer


@dataclass(kw_only=True)
class DDPOConfig(TruncatedConfig):
    """Settings of `DDPOTrainer`."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(
        default=256, metadata={"help": "Samples per process and micro-step, a multiple of `group_size`."}
    )
    max_steps: int = field(default=400, metadata={"help": "Optimizer steps."})
    loss_type: Literal["ppo", "reinforce"] = field(
        default="ppo", metadata={"help": "PPO's clipped surrogate, or REINFORCE on samples of the current policy."}
    )
    clip_range: float = field(
        default=0.2, metadata={"help": "PPO: the ratio of one denoising step stays within 1 ± clip_range."}
    )
    clip_range_high: float | None = field(
        default=None,
        metadata={"help": "PPO: the ratio's upper bound is 1 + this (DAPO's clip-higher); None for `clip_range`."},
    )
    clip_range_first: float | None = field(
        default=None,
        metadata={
            "help": "PPO: clip range of the noisiest step that is trained, from which it grows exponentially to "
            "`clip_range` (and `clip_range_high`) at the last, as in DPPO; None: the same for all steps."
        },
    )
    clip_unit: Literal["sample", "entry"] = field(
        default="sample",
        metadata={
            "help": "PPO: the ratio that is clipped is that of a sample's density, or its geometric mean over the free "
            "entries (as GSPO's over tokens), so that one clip range does for any resolution. The gradient of what is "
            "not clipped is the same before the first update."
        },
    )
    divergence_limit: float | None = field(
        default=None,
        metadata={
            "help": "PPO: a denoising step of a sample with a negative advantage is dropped once the mean over its "
            "free entries of log p_old - log p exceeds this; None: never."
        },
    )
    kl_coefficient: float = field(
        default=0.03, metadata={"help": "Weight of the closed-form KL to the foundation, per denoising step."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={
            "help": "Adapt the KL's weight, at first `kl_coefficient`, by up to a fiftieth each optimizer step so that "
            "the KL of a denoising step comes to this, in nats per free entry; None: constant weight."
        },
    )
    entropy_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Added to a sample's reward per nat (per free entry) of the entropy of its group, estimated from "
            "the distance to its nearest neighbour; needs groups of some size."
        },
    )
    group_size: int = field(default=8, metadata={"help": "Samples per condition; advantages are relative to them."})
    advantage_baseline: Literal["group", "batch"] = field(
        default="group",
        metadata={"help": "Advantages are relative to the mean reward of the group, or as in DDPO of the batch."},
    )
    advantage_scale: Literal["running", "global", "group", "none"] = field(
        default="running",
        metadata={
            "help": "Advantages are divided by the standard deviation of centred rewards: over the whole run so far, "
            "the batch, each group, or not at all. With the second and third the gradient does not fade as samples "
            "come to agree."
        },
    )
    num_train_denoising_steps: int | None = field(
        default=3,
        metadata={
            "help": "Denoising steps trained per sample and micro-step, drawn at random; None for all. 1, with several "
            "`epochs_per_rollout`, updates the controller step by step."
        },
    )
    credit: Literal["noise_level", "uniform", "decreasing", "similarity"] = field(
        default="noise_level",
        metadata={
            "help": "Weights kappa_t of the denoising steps, each of its policy loss and KL: proportional to the "
            "transition's std in units of the noisy sample's scale sqrt(alpha^2 + sigma^2), equal, linearly decreasing "
            "from the noisiest step, or for each sample the cosine, if positive, between the displacement of the step, "
            "z_{t-1} - z_t, and the whole one, z_0 - z_T."
        },
    )
    denoising_discount: float = field(
        default=1.0,
        metadata={"help": "kappa_t is multiplied by this to the power of the number of steps that follow (DPPO)."},
    )
    batches_per_rollout: int = field(default=1, metadata={"help": "Micro-batches sampled before training on them."})
    epochs_per_rollout: int = field(default=1, metadata={"help": "Times each sampled micro-batch is trained on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_train_denoising_steps", "batches_per_rollout", "epochs_per_rollout")
        clips = [name for name in ("clip_range_high", "clip_range_first") if getattr(self, name) is not None]
        self.require_not_negative("clip_range", *clips, "kl_coefficient", "entropy_coefficient")
        if not 0 < self.denoising_discount <= 1:
            raise ValueError(f"`denoising_discount` must lie in (0, 1], got {self.denoising_discount}.")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl_coefficient > 0):
            raise ValueError(
                f"`kl_target` and the `kl_coefficient` that it starts from must be positive, got {self.kl_target} and "
                f"{self.kl_coefficient}. To use no KL set `kl_target` to None."
            )
        smallest = 2 if self.advantage_baseline == "group" or self.entropy_coefficient > 0 else 1
        if self.group_size < smallest or self.per_device_train_batch_size % self.group_size:
            raise ValueError(
                f"`group_size` must be at least {smallest} and divide `per_device_train_batch_size` "
                f"({self.per_device_train_batch_size}), got {self.group_size}."
            )
        if self.divergence_limit is not None:
            clips.append("divergence_limit")
            self.require_not_negative("divergence_limit")
        if self.loss_type == "reinforce" and clips:
            raise ValueError(f"`{clips[0]}` is of the 'ppo' loss: set it to None for `loss_type` 'reinforce'.")
        if self.loss_type == "reinforce" and self.batches_per_rollout * self.epochs_per_rollout > 1:
            raise ValueError(
                "`loss_type` 'reinforce' needs samples of the current policy: set `batches_per_rollout` and "
                "`epochs_per_rollout` to 1, or use 'ppo'."
            )


class DDPOTrainer(TruncatedTrainer):
    """Treats denoising as a multi-step decision process and follows its policy gradient (Eq. 7, 8 of arXiv:2502.12198).

    One micro-batch is sampled, and trained on, in the same composition: a step's log-probability is computed twice by
    the same code on the same tensors, so the ratio before the first update is exactly 1 (DDPO, arXiv:2305.13301).

    The buffer holds two latents and one number per sample and denoising step, of `batches_per_rollout` micro-batches,
    and does not grow with the run.

    The loss is the mean over the trained denoising steps of `kappa_t (policy loss + KL coefficient * KL)`. `kappa_t`
    weighs the whole objective of a step, its KL included, and is 1 on average over the steps that have a density. A
    deterministic step, as the last one is, has none: it changes only with the network that it shares with the others.

    The entropy bonus is a reward, not a term of the loss: the std of a transition does not depend on the network, so
    the entropy of each step is constant and its gradient 0. What training can lose is the diversity of `z_0`, which is
    estimated from nearest neighbours among the samples of a condition (as in APT, arXiv:2103.04551).
    """

    args: DDPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.warn_without_reference("kl_coefficient")
        self._reward_moments = torch.zeros(2, dtype=torch.float64)  # sum of squared centred rewards, their number
        self._kl_coefficient = self.args.kl_coefficient
        self._kl_moments = torch.zeros(2, device=self.args.device)  # of this optimizer step: sum of KLs, their number

    @property
    def micro_steps_per_buffer(self) -> int:
        return self.args.batches_per_rollout * self.args.epochs_per_rollout

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        moments = self._reward_moments
        pending = [self._sample_batch(generator) for _ in range(self.args.batches_per_rollout)]
        try:
            chunks = [chunk() for chunk in pending]  # rewards that come from elsewhere were computed meanwhile
        except Exception:
            self._reward_moments = moments
            raise
        return {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = {name: value[position % self.args.batches_per_rollout] for name, value in buffer.items()}
        steps = self._trainable_steps(batch["stds"])
        count = self.args.num_train_denoising_steps or len(steps)
        order = torch.randperm(
            len(steps), generator=self.common_generator("draw")
        )  # one batch on however many processes
        return {**batch, "steps": steps[order[:count]].sort().values}

    def _trainable_steps(self, stds: Tensor) -> Tensor:
        """Indices of the steps that have a density, of these the last K."""
        steps = stds.nonzero().flatten()
        return steps[-(self.num_grad_steps or len(steps)) :]

    def _sample_batch(self, generator: torch.Generator) -> Callable[[], dict[str, Tensor]]:
        """Sample a micro-batch and ask for its rewards; the function returned waits for them and completes it."""
        size = self.args.per_device_train_batch_size
        condition = self.conditions(size // self.args.group_size, generator)
        condition = self.pipeline.repeat(condition, self.args.group_size)
        with self.pipeline.scheduler.record(self.pipeline.free_entries(condition)) as trajectory:
            latents = self.pipeline.sample(
                condition, num_inference_steps=self.args.num_inference_steps, generator=generator
            )
        if not trajectory.stochastic_steps:
            raise ValueError(
                "The sampler is deterministic, so its steps have no log-probability: use a scheduler with `eta > 0` "
                "and more than one inference step, or RewardGradientTrainer, DiffusionDPOTrainer or SFTTrainer."
            )
        rewards_to_come = self.rewards_to_come(latents, condition)
        sampled = {
            "latents": torch.stack(trajectory.latents),
            "next_latents": torch.stack(trajectory.next_latents),
            "timesteps": torch.tensor(trajectory.timesteps),
            "next_timesteps": torch.tensor(trajectory.next_timesteps),
            "stds": torch.tensor(trajectory.stds),
        }
        log_probs = trajectory.log_probs
        if not self.pipeline.samples_as_trained:
            log_probs = self._log_probs(sampled, condition)
        sampled["log_probs"] = torch.stack(log_probs)
        sampled = self.kept({**sampled, **pack("condition", condition)})

        def complete() -> dict[str, Tensor]:
            advantages = self._advantages(self._bonus(rewards_to_come(), latents, condition))
            return {**sampled, **self.kept({"advantages": advantages})}

        return complete

    def _bonus(self, rewards: Tensor, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """The rewards with that of entropy."""
        self.log_metric("reward", rewards)
        if self.args.entropy_coefficient == 0:
            return rewards
        entropies = entropy_estimates(latents, self.args.group_size, self.pipeline.free_entries(condition))
        self.log_metric("entropy", entropies)
        return rewards + self.args.entropy_coefficient * entropies

    def _log_probs(self, sampled: dict[str, Tensor], condition: dict[str, Tensor]) -> list[Tensor]:
        """Of every step under the policy that is trained, `(B,)` each, where it is not the one that sampled."""
        mask = self.pipeline.free_entries(condition)
        steps = [self._transition(sampled, step, condition) for step in range(len(sampled["stds"]))]
        return [step.log_prob(x_s, mask) for step, x_s in zip(steps, sampled["next_latents"], strict=True)]

    def _advantages(self, rewards: Tensor) -> Tensor:
        by_group = self.args.advantage_baseline == "group"
        group = self.args.group_size if by_group else len(rewards) * self.args.world_size
        if self.args.advantage_scale != "running":
            return self.advantages(rewards, group, self.args.advantage_scale)
        centred = self.advantages(rewards, group, "none")
        rounding = 4 * torch.finfo(rewards.dtype).eps * rewards.abs()  # equal rewards differ from their mean by this
        centred = torch.where(centred.abs() > rounding, centred, 0)
        moments = torch.stack([centred.double().pow(2).sum(), torch.tensor(float(len(rewards)), dtype=torch.float64)])
        self._reward_moments = self._reward_moments + self.accelerator.reduce(moments.to(self.args.device)).cpu()
        std = (self._reward_moments[0] / self._reward_moments[1]).sqrt()
        return centred / (std.to(centred) + 1e-8)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        model.eval()  # with dropout, two evaluations of one policy would differ
        credits = self._credits(inputs)
        return torch.stack([self._step_loss(inputs, step, credits[step]) for step in inputs["steps"].tolist()]).mean()

    def _step_loss(self, inputs: dict[str, Tensor], step: int, credit: Tensor) -> Tensor:
        """Policy loss and KL of one denoising step, weighted by its credit, `()` or `(B,)`; mean over the samples."""
        condition = unpack("condition", inputs)
        mask = self.pipeline.free_entries(condition)
        transition = self._transition(inputs, step, condition, self.network)
        loss = self._policy_loss(transition.log_prob(inputs["next_latents"][step], mask), inputs, step)
        if self.args.kl_coefficient > 0 and self.pipeline.lora_names:
            with torch.no_grad(), self.pipeline.lora_disabled():
                reference = self._transition(inputs, step, condition)
            kl = transition.kl(reference, mask)
            self.log_metric("kl", kl)
            if self.args.kl_target is not None:
                entries = transition.mean[0].numel() if mask is None else mask.flatten(1).sum(1)
                self._kl_moments += torch.stack([(kl.detach() / entries).sum(), kl.new_tensor(len(kl))])
            loss = loss + self._kl_coefficient * kl
        return credit * loss.mean() if credit.ndim == 0 else (credit * loss).mean()

    def _policy_loss(self, log_prob: Tensor, inputs: dict[str, Tensor], step: int) -> Tensor:
        """REINFORCE or PPO of one denoising step, `(B,)`."""
        if self.args.loss_type == "reinforce":
            return reinforce_loss(log_prob, inputs["advantages"])
        low, high = self._clip_ranges(inputs["stds"], step)
        entries = self._num_free_entries(inputs)
        unit = entries if self.args.clip_unit == "entry" else 1
        old_log_prob, advantages = inputs["log_probs"][step], inputs["advantages"]
        loss, ratio = ppo_clip_loss(log_prob / unit, old_log_prob / unit, advantages, low, high)
        self.log_metric("ratio", ratio)
        self.log_metric("clip_fraction", ((1 - ratio > low) | (ratio - 1 > high)).float())
        if self.args.divergence_limit is not None:
            kept = off_policy_mask(
                log_prob.detach() / entries, old_log_prob / entries, advantages, self.args.divergence_limit
            )
            self.log_metric("dropped", (~kept).float())
            loss = torch.where(kept, loss, 0)
        return unit * loss

    def _num_free_entries(self, inputs: dict[str, Tensor]) -> Tensor | int:
        mask = self.pipeline.free_entries(unpack("condition", inputs))
        return inputs["latents"][0, 0].numel() if mask is None else mask.flatten(1).sum(1)

    def _clip_ranges(self, stds: Tensor, step: int) -> tuple[float, float]:
        """How far the ratio of this step may fall below 1 and rise above it."""
        low, first = self.args.clip_range, self.args.clip_range_first
        high = low if self.args.clip_range_high is None else self.args.clip_range_high
        if first is None:
            return low, high
        steps = self._trainable_steps(stds).tolist()
        position = steps.index(step) / (len(steps) - 1) if len(steps) > 1 else 1.0
        return growing_clip_range(position, first, low), growing_clip_range(position, first, high)

    def _transition(
        self, inputs: dict[str, Tensor], step: int, condition: dict[str, Tensor], network: nn.Module | None = None
    ) -> GaussianTransition:
        x_t, timestep = inputs["latents"][step], inputs["timesteps"][step].item()
        output = self.pipeline.predict(x_t, timestep, condition, network)
        result: GaussianTransition = self.pipeline.scheduler.transition(
            output, x_t, timestep, inputs["next_timesteps"][step].item()
        )
        return result

    def _credits(self, inputs: dict[str, Tensor]) -> Tensor:
        """`kappa_t` of every denoising step, `(N,)` or for each sample `(N, B)` (section 3.1); 0 without a density."""
        stds = inputs["stds"]
        weights = (stds > 0).to(stds)
        if self.args.credit == "noise_level":
            at = self.pipeline.scheduler.coefficients(inputs["timesteps"], stds)
            weights = stds / torch.sqrt(at.alpha**2 + at.sigma**2).to(stds)
        elif self.args.credit == "decreasing":
            weights = weights * torch.linspace(len(stds), 1, len(stds), device=stds.device)
        weights = weights * self.args.denoising_discount ** torch.arange(len(stds) - 1, -1, -1, device=stds.device)
        if self.args.credit == "similarity":
            mask = self.pipeline.free_entries(unpack("condition", inputs))
            similarity = similarity_credit(inputs["latents"], inputs["next_latents"], mask)
            counted = weights[:, None] * similarity
            # a sample may have come all its way in the last step, which has no density
            weights = torch.where(counted.sum(0) > 0, counted, weights[:, None])
        return weights * (stds > 0).sum() / weights.sum(0)

    def after_optimizer_step(self) -> None:
        if self.args.kl_target is None or not self.pipeline.lora_names:
            return
        total, count = self.accelerator.reduce(self._kl_moments).tolist()
        self._kl_coefficient = adapted_kl_coefficient(self._kl_coefficient, total / count, self.args.kl_target)
        self._kl_moments = torch.zeros_like(self._kl_moments)
        self.log_metric("kl_coefficient", self._kl_coefficient)

    def extra_state(self) -> dict[str, Tensor]:
        kl_coefficient = torch.tensor(self._kl_coefficient, dtype=torch.float64)
        return {**super().extra_state(), "reward_moments": self._reward_moments, "kl_coefficient": kl_coefficient}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self._reward_moments = state.pop("reward_moments")
        self._kl_coefficient = state.pop("kl_coefficient").item()
        super().load_extra_state(state)
