"""What the trainers share that compare several samples of one condition: how these are made consistent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dmc_hub.trainers.sampling import SamplingConfig, SamplingTrainer


@dataclass(kw_only=True)
class CandidatesConfig(SamplingConfig):
    """What all trainers share that compare candidates."""

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
    num_candidates: int = field(default=8, metadata={"help": "Candidates per condition."})
    num_conditions: int = field(default=256, metadata={"help": "Conditions in one buffer."})
    steps_per_buffer: int = field(default=20, metadata={"help": "Micro-steps before the buffer is filled anew."})
    sample_from_reference: bool = field(
        default=False, metadata={"help": "Sample candidates from the foundation instead of the current controller."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_conditions", "steps_per_buffer")
        if self.num_candidates < 2:
            raise ValueError(f"`num_candidates` must be at least 2 to make a pair, got {self.num_candidates}.")
        if not 0 < self.shared_fraction < 1:
            raise ValueError(f"`shared_fraction` must lie between 0 and 1, got {self.shared_fraction}.")


def require_consistency(pipeline: Any, args: CandidatesConfig) -> None:
    """Raise a ValueError if the controller cannot sample what `pair_consistency` asks for."""
    if args.pair_consistency == "shared_part" and pipeline.config.horizon < 2:
        raise ValueError("`pair_consistency` 'shared_part' needs a horizon of at least 2: this controller's is 1.")
    if args.pair_consistency == "shared_latent" and pipeline.scheduler.config.get("kernel") == "dpm_solver_2m":
        raise ValueError(
            "`pair_consistency` 'shared_latent' needs a sampler that can stop between two steps, and "
            "'dpm_solver_2m' looks back: use another kernel, or another `pair_consistency`."
        )


class CandidatesTrainer(SamplingTrainer):
    """Samples candidates that differ where it matters (section 3.4 of arXiv:2502.12198).

    Candidates that share a latent z_t agree in what the first denoising steps decide, in-painted ones in a piece of the
    sequence. A sampler without noise cannot part from a shared latent; there each candidate's is first noised back by
    one step.
    """

    args: Any

    def __init__(self, pipeline: Any, args: Any, **kwargs: Any) -> None:
        require_consistency(pipeline, args)
        super().__init__(pipeline, args, **kwargs)

    @property
    def micro_steps_per_buffer(self) -> int:
        number: int = self.args.steps_per_buffer
        return number

    def candidates(self, condition: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """`num_candidates` consistent samples of each condition.

        Returns:
            Latents `(B, num_candidates, horizon, dim)`, and the conditions, which also fix a part that is shared.
        """
        if self.args.pair_consistency == "shared_latent":
            return self._share_latent(condition, generator), condition
        if self.args.pair_consistency == "shared_part":
            return self._share_part(condition, generator)
        return self._sample(condition, self.args.num_candidates, generator), condition

    def _sample(self, condition: dict[str, Tensor], count: int, generator: torch.Generator, **options: Any) -> Tensor:
        """`count` samples of each condition, `(B, count, horizon, dim)`."""
        repeated = self.pipeline.repeat(condition, count)
        steps = self.args.num_inference_steps
        samples: Tensor = self.pipeline.sample(repeated, num_inference_steps=steps, generator=generator, **options)
        result: Tensor = samples.unflatten(0, (-1, count))
        return result

    def _share_latent(self, condition: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Candidates whose denoising went the same way for the first steps."""
        scheduler, count = self.pipeline.scheduler, self.args.num_candidates
        with scheduler.record() as trajectory:
            first = self._sample(condition, 1, generator)
        total = len(trajectory)
        shared = max(1, min(total, round(self.args.shared_fraction * total)))
        latents = trajectory.next_latents[shared - 1]
        if any(std > 0 for std in trajectory.stds[shared:]):
            latents = latents.repeat_interleave(count - 1, dim=0)
            return torch.cat([first, self._sample(condition, count - 1, generator, resume=(latents, shared))], dim=1)
        latents = scheduler.renoise(
            latents.repeat_interleave(count, dim=0), trajectory.timesteps[shared - 1], generator
        )
        return self._sample(condition, count, generator, resume=(latents, shared - 1))

    def _share_part(self, condition: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Candidates that are in-painted around a contiguous part of the first, and the condition that fixes it."""
        horizon = self.pipeline.config.horizon
        first = self._sample(condition, 1, generator)
        length = min(max(1, round(self.args.shared_fraction * horizon)), horizon - 1)
        start = torch.randint(horizon - length + 1, (len(first), 1, 1), generator=generator)
        steps = torch.arange(horizon)[None, :, None]
        part = ((steps >= start) & (steps < start + length)).to(first.device).expand_as(first[:, 0])
        condition = self.pipeline.fix_entries(condition, first[:, 0], part)
        rest = self._sample(condition, self.args.num_candidates - 1, generator)
        return torch.cat([first, rest], dim=1), condition
