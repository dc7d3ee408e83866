"""What the trainers share whose loss runs through denoising steps: truncation to the last K, recomputed activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from torch.utils.checkpoint import checkpoint

from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer


@dataclass(kw_only=True)
class TruncatedConfig(SamplingConfig):
    """What all trainers share whose loss runs through denoising steps."""

    last_k_steps: int | None = field(
        default=None,
        metadata={"help": "Train only the last K denoising steps (`sg(., K)` of Eq. 8 and 9); None for all."},
    )
    last_k_steps_final: int | None = field(
        default=None,
        metadata={
            "help": "K of the last optimizer step: K goes there from `last_k_steps` linearly, rounded. None: constant."
        },
    )
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Keep only the latents of each trained denoising step and evaluate the network again in the "
            "backward pass, so that memory does not grow with K times the network's activations.",
            "nargs": "?",
            "const": True,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("last_k_steps", "last_k_steps_final")
        if self.last_k_steps_final is not None and self.last_k_steps is None:
            raise ValueError("`last_k_steps_final` needs a K to start from: set `last_k_steps`, which is None.")


class TruncatedTrainer(SamplingTrainer):
    """Knows the K of each optimizer step (gradient truncation, section 3.1 of arXiv:2502.12198).

    `network` stands in for the pipeline's denoiser where gradients are taken: None, or one that recomputes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network = RecomputedNetwork(self.pipeline.denoiser) if self.args.activation_checkpointing else None

    @property
    def num_grad_steps(self) -> int | None:
        """K in this micro-step; None for all denoising steps."""
        first, final = self.args.last_k_steps, self.args.last_k_steps_final
        if final is None:
            return cast("int | None", first)
        step = self.micro_step // self.args.gradient_accumulation_steps
        result: int | None = round(first + (final - first) * step / max(1, self.args.max_steps - 1))
        return result

    def recompute_activations(self) -> None:
        """Nothing to do: `network` recomputes whole denoising steps, whatever the denoiser supports."""

    def _run_facts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        exact, others = super()._run_facts()
        schedule = {} if self.args.last_k_steps_final is None else {"max_steps": self.args.max_steps}
        return exact, {**others, **schedule}


class RecomputedNetwork(nn.Module):
    """Keeps a network's inputs and evaluates it again in the backward pass: the same gradients, dropout included."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.network, *args, use_reentrant=False, **kwargs)
