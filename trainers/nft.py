"""Policy optimisation on the forward process: final samples and their rewards, no trajectory, any solver."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss, group_advantages, masked_mean_square, nft_loss, ppo_clip_loss
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack


@dataclass(kw_only=True)
class NFTConfig(SamplingConfig):
    """Settings of `NFTTrainer`."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Noised samples per process and step."})
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    loss_type: Literal["nft", "awm"] = field(
        default="nft",
        metadata={
            "help": "DiffusionNFT's contrast of a positive and a negative policy, or advantage-weighted matching: "
            "PPO's clipped surrogate with the denoising error for the log-probability."
        },
    )
    beta: float = field(
        default=1.0,
        metadata={"help": "nft: share of the trained network in the positive policy; smaller ones take larger steps."},
    )
    weighting: Literal["adaptive", "pretraining"] = field(
        default="adaptive",
        metadata={
            "help": "nft: errors of the clean sample over their own magnitude, or errors of the network's own "
            "prediction as in pretraining. awm always takes the latter."
        },
    )
    clip_range: float = field(
        default=0.2, metadata={"help": "awm: the ratio of a noised sample stays within 1 ± clip_range."}
    )
    reference_coefficient: float = field(
        default=0.01, metadata={"help": "Weight of the squared distance to the foundation's predictions; 0 for none."}
    )
    group_size: int = field(default=16, metadata={"help": "Samples per condition; advantages are relative to them."})
    advantage_scale: Literal["global", "group", "none"] = field(
        default="global",
        metadata={"help": "Advantages are divided by their standard deviation in the buffer, in each group, or not."},
    )
    advantage_clip: float = field(
        default=2.0,
        metadata={
            "help": "Advantages are cut to ± this; nft maps them to the optimality 1/2 + advantage / "
            "(2 advantage_clip)."
        },
    )
    num_conditions: int = field(default=64, metadata={"help": "Conditions in one buffer."})
    steps_per_buffer: int = field(default=5, metadata={"help": "Micro-steps before new samples are drawn."})
    old_policy_decay: float = field(
        default=0.5, metadata={"help": "Largest share of itself that the sampling policy keeps at an update."}
    )
    old_policy_decay_rate: float = field(
        default=0.001,
        metadata={"help": "That share grows by this with every buffer, from 0: at 0 samples are always on-policy."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_conditions", "steps_per_buffer")
        self.require_not_negative("clip_range", "reference_coefficient", "old_policy_decay_rate")
        if self.group_size < 2:
            raise ValueError(f"`group_size` must be at least 2 to compare samples, got {self.group_size}.")
        if not (self.beta > 0 and self.advantage_clip > 0):
            raise ValueError(
                f"`beta` and `advantage_clip` must be positive, got {self.beta} and {self.advantage_clip}."
            )
        if not 0 <= self.old_policy_decay < 1:
            raise ValueError(
                f"`old_policy_decay` must lie in [0, 1), got {self.old_policy_decay}: at 1 it never moves."
            )


class NFTTrainer(SamplingTrainer):
    """DiffusionNFT (Algorithm 1 of arXiv:2509.16117) and advantage-weighted matching (arXiv:2509.25050).

    An old policy samples groups, and only the final samples and their group-relative advantages are kept: the sampler
    may be deterministic or of any order. A micro-step noises them afresh, so one sample serves many noise levels. After
    each buffer the old policy becomes `eta_i old + (1 - eta_i) trained` with `eta_i = min(old_policy_decay_rate i,
    old_policy_decay)`; it is a second set of the trained weights, of the LoRA if there is one, in the same network.

    `"awm"` takes `-||v_theta - v||^2` of the pretraining loss, summed over the free entries, for the log-probability;
    a negative advantage stops pushing where the clip range ends.
    """

    args: NFTConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.warn_without_reference("reference_coefficient")
        self._old: dict[str, Tensor] = {}
        self._num_old_updates = 0

    @property
    def micro_steps_per_buffer(self) -> int:
        return self.args.steps_per_buffer

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        self._update_old_policy(self.micro_step // self.micro_steps_per_buffer)
        group = self.args.group_size
        condition = self.pipeline.repeat(self.conditions(self.args.num_conditions, generator), group)
        samples = self.pipeline.sample(
            condition,
            num_inference_steps=self.args.num_inference_steps,
            generator=generator,
            denoiser=self._old_denoiser,
        )
        rewards = self.rewards(samples, condition)
        self.log_metric("reward", rewards)
        advantages = self.advantages(rewards, group, self.args.advantage_scale)
        rounding = 4 * torch.finfo(rewards.dtype).eps * rewards.abs()  # equal rewards differ from their mean by this
        differs = group_advantages(rewards, group, scale="none").abs() > rounding
        advantages = torch.where(differs, advantages, 0).clamp(-self.args.advantage_clip, self.args.advantage_clip)
        return {"samples": samples, "advantages": advantages, **pack("condition", condition)}

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size, count = self.args.per_device_train_batch_size, len(buffer["samples"])
        rows = torch.randint(count, (size,), generator=generator).to(buffer["samples"].device)
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
        model.eval()  # with dropout, the two policies would differ before the first update
        condition, timesteps = unpack("condition", inputs), inputs["timesteps"]
        mask = self.pipeline.free_entries(condition)
        x_t = self.pipeline.scheduler.add_noise(inputs["samples"], inputs["noise"], timesteps)
        with torch.no_grad():
            old_output = self.pipeline.predict(x_t, timesteps, condition, self._old_denoiser)
        output = self.pipeline.predict(x_t, timesteps, condition)
        self.log_metric("old_distance", denoising_loss(output, old_output, mask))
        branch = self._contrast if self.args.loss_type == "nft" else self._matching
        loss = branch(output, old_output, x_t, inputs, mask).mean()
        if self.args.reference_coefficient > 0 and self.pipeline.lora_names:
            with torch.no_grad(), self.pipeline.lora_disabled():
                reference = self.pipeline.predict(x_t, timesteps, condition)
            distance = denoising_loss(output, reference, mask)
            self.log_metric("reference_distance", distance)
            loss = loss + self.args.reference_coefficient * distance.mean()
        return loss

    def _contrast(
        self, output: Tensor, old_output: Tensor, x_t: Tensor, inputs: dict[str, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Eq. 5 of DiffusionNFT per sample, `(B,)`."""
        scheduler, timesteps, samples = self.pipeline.scheduler, inputs["timesteps"], inputs["samples"]
        adaptive = self.args.weighting == "adaptive"
        if adaptive:
            output, old_output = (scheduler.predict(each, x_t, timesteps)[0] for each in (output, old_output))
        target = samples if adaptive else scheduler.training_target(samples, inputs["noise"], timesteps)
        optimality = 0.5 + inputs["advantages"] / (2 * self.args.advantage_clip)
        self.log_metric("optimality", optimality)
        return nft_loss(
            output, old_output, target, optimality, beta=self.args.beta, mask=mask, self_normalized=adaptive
        )

    def _matching(
        self, output: Tensor, old_output: Tensor, x_t: Tensor, inputs: dict[str, Tensor], mask: Tensor | None
    ) -> Tensor:
        """PPO's surrogate with the pretraining error for the log-probability, per sample, `(B,)`."""
        target = self.pipeline.scheduler.training_target(inputs["samples"], inputs["noise"], inputs["timesteps"])
        entries = target[0].numel() if mask is None else mask.flatten(1).sum(1)
        log_prob, old_log_prob = (-entries * masked_mean_square(each - target, mask) for each in (output, old_output))
        loss, ratio = ppo_clip_loss(log_prob, old_log_prob, inputs["advantages"], self.args.clip_range)
        self.log_metric("ratio", ratio)
        self.log_metric("clip_fraction", ((ratio - 1).abs() > self.args.clip_range).float())
        return loss

    # The old policy

    def _old_denoiser(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.trainable_module(), self._old, args, kwargs)

    def _update_old_policy(self, num_buffers: int) -> None:
        """Once for each buffer, also if collecting is tried again."""
        parameters = self.trainable_module().named_parameters()
        trained = {name: parameter.detach() for name, parameter in parameters if parameter.requires_grad}
        if num_buffers == 0:
            self._old = {name: tensor.clone() for name, tensor in trained.items()}
        elif num_buffers >= self._num_old_updates:
            decay = min(self.args.old_policy_decay_rate * num_buffers, self.args.old_policy_decay)
            for name, tensor in trained.items():
                self._old[name].lerp_(tensor, 1 - decay)
        self._num_old_updates = num_buffers + 1

    def extra_state(self) -> dict[str, Tensor]:
        updates = torch.tensor(self._num_old_updates)
        return {**super().extra_state(), **pack("old", self._old), "num_old_updates": updates}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        self._old = {name: tensor.to(self.args.device) for name, tensor in unpack("old", state).items()}
        self._num_old_updates = int(state.pop("num_old_updates"))
        super().load_extra_state({name: tensor for name, tensor in state.items() if not name.startswith("old.")})
