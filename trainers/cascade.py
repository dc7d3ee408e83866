"""The cascade: an up-sampler that turns a sample into one of more reward."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dmc_hub.losses import denoising_loss
from dmc_hub.trainers.candidates import CandidatesConfig, CandidatesTrainer, require_consistency
from dmc_hub.trainers.sampling import pack, unpack
from dmc_hub.trainers.sft import NoSamplesLeftError


@dataclass(kw_only=True)
class CascadeConfig(CandidatesConfig):
    """Settings of `CascadeTrainer`."""

    learning_rate: float = field(default=3e-4, metadata={"help": "Initial learning rate."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Pairs per process and step."})
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps."})
    pair_consistency: Literal["independent", "shared_latent", "shared_part"] = field(
        default="shared_latent",
        metadata={
            "help": "What the samples of a pair share: nothing but the condition, the latent after the first denoising "
            "steps, or a contiguous part around which they are in-painted."
        },
    )
    num_conditions: int = field(default=512, metadata={"help": "Conditions in one buffer."})


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
    return cast(nn.Module, upsampler)


class CascadeTrainer(CandidatesTrainer):
    """Trains the up-sampler `p(x^r | x^cond)` on pairs with `r(x^cond) < r(x^r)` (section 3.4 of arXiv:2502.12198).

    Both samples are the controller's, made consistent: their denoising starts from one partly denoised latent, or they
    share a piece of the plan. Of each group of candidates the best is `x^r` and each of the others once `x^cond`; pairs
    of equal reward are dropped. The condition is always given (the paper's `p = 1`), the loss is the denoising
    objective (Eq. 5) of `x^r` on the entries that the observation leaves free, and all weights of the up-sampler are
    trained: without one in the pipeline it starts as a copy of the foundation. The controller stays as it is.

    """

    args: CascadeConfig

    def __init__(self, pipeline: Any, args: CascadeConfig, **kwargs: Any) -> None:
        if kwargs.get("peft_config") is not None:
            raise ValueError(
                "`peft_config` must be None: CascadeTrainer trains a whole network. To align it with a LoRA "
                "afterwards, pass `pipeline.upsampler_policy()` to DDPOTrainer, DiffusionDPOTrainer or SFTTrainer."
            )
        require_consistency(pipeline, args)  # before the pipeline gets an up-sampler
        if pipeline.upsampler is None:
            warm_start_upsampler(pipeline)
        elif pipeline.upsampler_policy().lora_names:
            raise ValueError(
                "`pipeline` has a LoRA on its up-sampler: remove it with `upsampler_policy().unload_lora`."
            )
        super().__init__(pipeline, args, **kwargs)

    def trainable_module(self) -> nn.Module:
        result: nn.Module = self.pipeline.upsampler
        return result

    def collect(self, generator: torch.Generator) -> dict[str, Tensor]:
        count, each = self.args.num_conditions, self.args.num_candidates
        condition = self.conditions(count, generator)
        with self.reference_if(self.args.sample_from_reference and bool(self.pipeline.lora_names)):
            samples, _ = self.candidates(condition, generator)
        rewards = self.rewards(samples.flatten(0, 1), self.pipeline.repeat(condition, each)).reshape(count, each)
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
            "samples": samples,
            "best": best,
            "is_pair": is_pair,
            **pack("condition", condition),
        }

    def draw(self, buffer: dict[str, Tensor], position: int, generator: torch.Generator) -> dict[str, Tensor]:
        size, pairs = self.args.per_device_train_batch_size, buffer["is_pair"].nonzero()
        if not len(pairs):
            raise NoSamplesLeftError(
                "All candidates of each condition have the same reward, so there is no pair to learn from: lower "
                "`shared_fraction`, or raise `num_candidates`."
            )
        rows = torch.randint(len(pairs), (size,), generator=generator).to(pairs.device)
        groups, others = pairs[rows].unbind(1)
        condition = unpack("condition", buffer)
        return {
            "targets": buffer["samples"][groups, buffer["best"][groups]],
            "drafts": buffer["samples"][groups, others],
            **pack("condition", {name: value[groups] for name, value in condition.items()}),
            **self.noise_levels(size, generator),
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
