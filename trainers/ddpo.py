"""Policy gradients over the denoising steps: REINFORCE and PPO clip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmc_hub.losses import group_advantages, ppo_clip_loss, reinforce_loss
from dmc_hub.scheduler import GaussianTransition
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack


@dataclass(kw_only=True)
class DDPOConfig(SamplingConfig):
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
    kl_coefficient: float = field(
        default=0.03, metadata={"help": "Weight of the closed-form KL to the foundation, per denoising step."}
    )
    group_size: int = field(default=8, metadata={"help": "Samples per condition; advantages are relative to them."})
    advantage_scale: Literal["running", "global", "group", "none"] = field(
        default="running",
        metadata={
            "help": "Advantages are divided by the standard deviation of centred rewards: over the whole run so far, "
            "the batch, each group, or not at all. Only the first lets the gradient fade as samples come to agree."
        },
    )
    num_train_denoising_steps: int | None = field(
        default=3, metadata={"help": "Denoising steps trained per sample, drawn at random; None for all."}
    )
    last_k_steps: int | None = field(
        default=None, metadata={"help": "Train only the last K denoising steps (`sg(., K)` of Eq. 8); None for all."}
    )
    credit: Literal["noise_level", "uniform", "decreasing"] = field(
        default="noise_level",
        metadata={
            "help": "Weights kappa_t of the denoising steps: proportional to the transition's std in units of the "
            "noisy sample's scale sqrt(alpha^2 + sigma^2), equal, or linearly decreasing from the noisiest step."
        },
    )
    batches_per_rollout: int = field(default=1, metadata={"help": "Micro-batches sampled before training on them."})
    epochs_per_rollout: int = field(default=1, metadata={"help": "Times each sampled micro-batch is trained on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_train_denoising_steps", "last_k_steps", "batches_per_rollout", "epochs_per_rollout")
        self.require_not_negative("clip_range", "kl_coefficient")
        if self.group_size < 2 or self.per_device_train_batch_size % self.group_size:
            raise ValueError(
                f"`group_size` must be at least 2 and divide `per_device_train_batch_size` "
                f"({self.per_device_train_batch_size}), got {self.group_size}."
            )
        if self.loss_type == "reinforce" and self.batches_per_rollout * self.epochs_per_rollout > 1:
            raise ValueError(
                "`loss_type` 'reinforce' needs samples of the current policy: set `batches_per_rollout` and "
                "`epochs_per_rollout` to 1, or use 'ppo'."
            )


class DDPOTrainer(SamplingTrainer):
    """Treats denoising as a multi-step decision process and follows its policy gradient (Eq. 7, 8 of arXiv:2502.12198).

    One micro-batch is sampled, and trained on, in the same composition: a step's log-probability is computed twice by
    the same code on the same tensors, so the ratio before the first update is exactly 1 (DDPO, arXiv:2305.13301).
    """

    args: DDPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.warn_without_reference("kl_coefficient")
        self._reward_moments = torch.zeros(2, dtype=torch.float64)  # sum of squared centred rewards, their number

    @property
    def micro_steps_per_buffer(self) -> int:
        return self.args.batches_per_rollout * self.args.epochs_per_rollout

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        chunks = [self._sample_batch(generator) for _ in range(self.args.batches_per_rollout)]
        return {name: torch.stack([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = {name: value[position % self.args.batches_per_rollout] for name, value in buffer.items()}
        steps = batch["stds"].nonzero().flatten()[-(self.args.last_k_steps or len(batch["stds"])) :]
        count = self.args.num_train_denoising_steps or len(steps)
        return {**batch, "steps": steps[torch.randperm(len(steps), generator=generator)[:count]].sort().values}

    def _sample_batch(self, generator: torch.Generator) -> dict[str, Tensor]:
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
        rewards = self.rewards(latents, condition)
        self.log_metric("reward", rewards)
        return {
            "latents": torch.stack(trajectory.latents),
            "next_latents": torch.stack(trajectory.next_latents),
            "log_probs": torch.stack(trajectory.log_probs),
            "timesteps": torch.tensor(trajectory.timesteps),
            "next_timesteps": torch.tensor(trajectory.next_timesteps),
            "stds": torch.tensor(trajectory.stds),
            "advantages": self._advantages(rewards),
            **pack("condition", condition),
        }

    def _advantages(self, rewards: Tensor) -> Tensor:
        if self.args.advantage_scale != "running":
            return group_advantages(rewards, self.args.group_size, scale=self.args.advantage_scale)
        centred = group_advantages(rewards, self.args.group_size, scale="none")
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
        credits = self._credits(inputs["stds"], inputs["timesteps"])
        losses = [credits[step] * self._step_loss(inputs, step) for step in inputs["steps"].tolist()]
        return torch.stack(losses).mean()

    def _step_loss(self, inputs: dict[str, Tensor], step: int) -> Tensor:
        """Policy loss and KL of one denoising step, averaged over the samples."""
        condition = unpack("condition", inputs)
        mask = self.pipeline.free_entries(condition)
        x_s, old_log_prob, advantages = inputs["next_latents"][step], inputs["log_probs"][step], inputs["advantages"]
        transition = self._transition(inputs, step, condition)
        log_prob = transition.log_prob(x_s, mask)
        if self.args.loss_type == "reinforce":
            loss = reinforce_loss(log_prob, advantages)
        else:
            loss, ratio = ppo_clip_loss(log_prob, old_log_prob, advantages, self.args.clip_range)
            self.log_metric("ratio", ratio)
            self.log_metric("clip_fraction", ((ratio - 1).abs() > self.args.clip_range).float())
        if self.args.kl_coefficient > 0 and self.pipeline.lora_names:
            with torch.no_grad(), self.pipeline.lora_disabled():
                reference = self._transition(inputs, step, condition)
            kl = transition.kl(reference, mask)
            self.log_metric("kl", kl)
            loss = loss + self.args.kl_coefficient * kl
        return loss.mean()

    def _transition(self, inputs: dict[str, Tensor], step: int, condition: dict[str, Tensor]) -> GaussianTransition:
        x_t, timestep = inputs["latents"][step], int(inputs["timesteps"][step])
        output = self.pipeline.predict(x_t, timestep, condition)
        return self.pipeline.scheduler.transition(output, x_t, timestep, int(inputs["next_timesteps"][step]))

    def _credits(self, stds: Tensor, timesteps: Tensor) -> list[float]:
        """`kappa_t` of every denoising step, 1 on average over those that have a density (section 3.1)."""
        stochastic = (stds > 0).to(stds)
        if self.args.credit == "noise_level":
            at = self.pipeline.scheduler.coefficients(timesteps, timesteps)
            weights = stds / torch.sqrt(at.alpha**2 + at.sigma**2).to(stds)
        elif self.args.credit == "decreasing":
            weights = stochastic * torch.linspace(len(stds), 1, len(stds), device=stds.device)
        else:
            weights = stochastic
        return (weights * stochastic.sum() / weights.sum()).tolist()

    def extra_state(self) -> dict[str, Tensor]:
        return {**super().extra_state(), "reward_moments": self._reward_moments}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self._reward_moments = state.pop("reward_moments")
        super().load_extra_state(state)
