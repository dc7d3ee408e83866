"""The cascade: an up-sampler that turns a sample into one of more reward."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss
from dmc_hub.pipelines import DiffuserPlannerPipeline
from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer, pack, unpack
from dmc_hub.trainers.sft import NoSamplesLeftError


@dataclass(kw_only=True)
class CascadeConfig(SamplingConfig):
    """Settings of `CascadeTrainer`."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Pairs per process and step."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    consistency: Literal["shared_latent", "in_painting"] = field(
        default="shared_latent",
        metadata={
            "help": "What the samples of a pair share: a latent of their denoising, or (planner) a piece of the plan."
        },
    )
    shared_denoising_fraction: float = field(
        default=0.5, metadata={"help": "shared_latent: candidates part after this fraction of the denoising steps."}
    )
    shared_plan_fraction: float = field(
        default=0.5, metadata={"help": "in_painting: fraction of a plan's steps, in one piece, that candidates share."}
    )
    num_candidates: int = field(
        default=8, metadata={"help": "Consistent samples per condition: the best makes a pair with each of the others."}
    )
    num_conditions: int = field(default=512, metadata={"help": "Conditions in one buffer."})
    steps_per_buffer: int = field(default=20, metadata={"help": "Micro-steps before new pairs are sampled."})
    sample_from_reference: bool = field(
        default=False, metadata={"help": "Sample pairs from the foundation instead of the (aligned) controller."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_conditions", "steps_per_buffer")
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` must be at least 2 to make a pair, got {self.num_candidates}.")
        for name in ("shared_denoising_fraction", "shared_plan_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie between 0 and 1, got {getattr(self, name)}.")


def warm_start_upsampler(pipeline: Any) -> nn.Module:
    """Give the pipeline an up-sampler that computes what its foundation does, bit for bit, whatever the draft.

    It is a second network of the denoiser's class with `draft_dim`; it gets the base weights, without adapters, and
    the draft enters through weights that are zero (the warm start of section 3.4 of arXiv:2502.12198).

    Returns:
        The new component; one that was there is replaced.

    Raises:
        ValueError: the denoiser's class has no `draft_dim`.
    """
    denoiser = pipeline.denoiser
    if "draft_dim" not in inspect.signature(type(denoiser).__init__).parameters:
        raise ValueError(
            f"`pipeline` has a denoiser of class {type(denoiser).__name__}, which takes no draft: give the class an "
            "argument `draft_dim`, as TemporalUnet and DiffusionTransformer1D have."
        )
    config = {name: value for name, value in denoiser.config.items() if not name.startswith("_")}
    with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
        upsampler = type(denoiser)(**{**config, "draft_dim": pipeline.latent_shape(1)[-1]})
    loaded = upsampler.load_state_dict(pipeline.base_weights(), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("draft_projection.") for name in loaded.missing_keys)
    upsampler = nn.Module.to(upsampler, denoiser.device, denoiser.dtype).eval()
    pipeline.register_modules(upsampler=upsampler)
    return upsampler


class CascadeTrainer(SamplingTrainer):
    """Trains the up-sampler `p(x^r | x^cond)` on pairs with `r(x^cond) < r(x^r)` (section 3.4 of arXiv:2502.12198).

    Both samples are the controller's, made consistent: their denoising starts from one partly denoised latent, or they
    share a piece of the plan. Of each group of candidates the best is `x^r` and each of the others once `x^cond`; pairs
    of equal reward are dropped. The condition is always given (the paper's `p = 1`), the loss is the denoising
    objective (Eq. 5) of `x^r` on the entries that the observation leaves free, and all weights of the up-sampler are
    trained: without one in the pipeline it starts as a copy of the foundation. The controller stays as it is.

    A sampler without noise cannot part from a shared latent; there each candidate's is first noised back by one step.
    """

    args: CascadeConfig

    def __init__(self, pipeline: Any, args: CascadeConfig, **kwargs: Any) -> None:
        if kwargs.get("peft_config") is not None:
            raise ValueError(
                "`peft_config` must be None: CascadeTrainer trains a whole network. To align it with a LoRA "
                "afterwards, pass `pipeline.upsampler_policy()` to DDPOTrainer, DiffusionDPOTrainer or SFTTrainer."
            )
        if args.consistency == "in_painting" and not isinstance(pipeline, DiffuserPlannerPipeline):
            raise ValueError("`consistency` 'in_painting' needs a planner: a policy has no plan; use 'shared_latent'.")
        if args.consistency == "shared_latent" and pipeline.scheduler.config.kernel == "dpm_solver_2m":
            raise ValueError(
                "`consistency` 'shared_latent' needs a sampler that can stop between two steps, and 'dpm_solver_2m' "
                "looks back: use another kernel, or a planner and 'in_painting'."
            )
        if pipeline.upsampler is None:
            warm_start_upsampler(pipeline)
        elif pipeline.upsampler_policy().lora_names:
            raise ValueError(
                "`pipeline` has a LoRA on its up-sampler: remove it with `upsampler_policy().unload_lora`."
            )
        super().__init__(pipeline, args, **kwargs)

    def trainable_module(self) -> nn.Module:
        return self.pipeline.upsampler

    @property
    def micro_steps_per_buffer(self) -> int:
        return self.args.steps_per_buffer

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        count, each = self.args.num_conditions, self.args.num_candidates
        condition = self.conditions(count, generator)
        with self.reference_if(self.args.sample_from_reference and bool(self.pipeline.lora_names)):
            samples = self._consistent_samples(condition, generator)
        rewards = self.rewards(samples, self.pipeline.repeat(condition, each)).reshape(count, each)
        best = rewards.argmax(1)
        winners = rewards.gather(1, best[:, None])
        gaps = winners - rewards
        rounding = 4 * torch.finfo(rewards.dtype).eps * winners.abs()
        is_pair = gaps > rounding
        self.log_metric("reward", rewards)
        self.log_metric("pair_share", is_pair.float().sum() / (count * (each - 1)))
        if bool(is_pair.any()):
            self.log_metric("reward_gap", gaps[is_pair])
        return {
            "samples": samples.unflatten(0, (count, each)),
            "best": best,
            "is_pair": is_pair,
            **pack("condition", condition),
        }

    def _consistent_samples(self, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """`num_candidates` samples of each condition in a row, consistent with each other."""
        if self.args.consistency == "in_painting":
            return self._samples_with_a_shared_piece(condition, generator)
        return self._samples_from_a_shared_latent(condition, generator)

    def _samples_from_a_shared_latent(self, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        steps, scheduler = self.args.num_inference_steps, self.pipeline.scheduler
        with scheduler.record() as trajectory:
            self.pipeline.sample(condition, num_inference_steps=steps, generator=generator)
        total = len(trajectory)
        shared = max(1, min(total, round(self.args.shared_denoising_fraction * total)))
        latents = trajectory.next_latents[shared - 1].repeat_interleave(self.args.num_candidates, dim=0)
        if not any(std > 0 for std in trajectory.stds[shared:]):
            shared -= 1
            latents = scheduler.renoise(latents, trajectory.timesteps[shared], generator)
        repeated = self.pipeline.repeat(condition, self.args.num_candidates)
        return self.pipeline.sample(repeated, num_inference_steps=steps, generator=generator, resume=(latents, shared))

    def _samples_with_a_shared_piece(self, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        steps, horizon = self.args.num_inference_steps, self.pipeline.config.horizon
        plans = self.pipeline.sample(condition, num_inference_steps=steps, generator=generator)
        length = max(1, min(horizon - 1, round(self.args.shared_plan_fraction * horizon)))
        starts = torch.randint(horizon - length + 1, (len(plans), 1, 1), generator=generator).to(plans.device)
        times = torch.arange(horizon, device=plans.device)[None, :, None]
        piece = (starts <= times) & (times < starts + length)
        fixed = {"values": plans, "mask": condition["mask"] | piece}
        repeated = self.pipeline.repeat(fixed, self.args.num_candidates)
        return self.pipeline.sample(repeated, num_inference_steps=steps, generator=generator)

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size, pairs = self.args.per_device_train_batch_size, buffer["is_pair"].nonzero()
        if not len(pairs):
            raise NoSamplesLeftError(
                "All candidates of each condition have the same reward, so there is no pair to learn from: lower "
                "`shared_denoising_fraction` or `shared_plan_fraction`, or raise `num_candidates`."
            )
        rows = torch.randint(len(pairs), (size,), generator=generator).to(pairs.device)
        groups, others = pairs[rows].unbind(1)
        condition = unpack("condition", buffer)
        return {
            "targets": buffer["samples"][groups, buffer["best"][groups]],
            "drafts": buffer["samples"][groups, others],
            **pack("condition", {name: value[groups] for name, value in condition.items()}),
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
        scheduler, timesteps = self.pipeline.scheduler, inputs["timesteps"]
        condition = {**unpack("condition", inputs), "draft": inputs["drafts"]}
        x_t = scheduler.add_noise(inputs["targets"], inputs["noise"], timesteps)
        prediction = self.pipeline.predict(x_t, timesteps, condition, model)
        target = scheduler.training_target(inputs["targets"], inputs["noise"], timesteps)
        return denoising_loss(prediction, target, self.pipeline.free_entries(condition)).mean()

    def _run_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Pairs of another controller, be it of another adapter only, would be other pairs."""
        exact, others = super()._run_facts()
        digest = hashlib.sha256(self.pipeline.base_fingerprint().encode())
        for name, tensor in sorted(self.pipeline.denoiser.state_dict().items()):
            if ".lora_" in name:
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return {**exact, "controller_fingerprint": digest.hexdigest()}, others
