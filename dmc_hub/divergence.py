"""How far a controller has gone from its foundation, and how much its samples still differ from each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmc_hub.evaluation import candidate_diversity
from dmc_hub.scheduler import TransitionScheduler, randn


@torch.no_grad()
def denoising_kl(
    pipeline: Any, condition: dict[str, Tensor], *, num_inference_steps: int | None = None, seed: int = 0
) -> float:
    """KL divergence of the controller's denoising path from the foundation's, in nats per denoised entry.

    `E[sum_t KL(p_theta(x_s | x_t) || p_foundation(x_s | x_t))] / entries` along the controller's own path: an upper
    bound of the divergence between what both generate, `div` of Eq. 6 of arXiv:2502.12198. It is measured with the
    ancestral kernel at `eta = 1` whatever the controller samples with, so that it is defined for deterministic samplers
    and comparable between methods. The last step has no density and does not count.

    Args:
        pipeline: a planner or policy with an adapter, switched off for the foundation; 0 without one.
        condition: of `observation_condition`.
        num_inference_steps: denoising steps; the pipeline's own by default.
        seed: of the noise.
    """
    if not pipeline.lora_names:
        return 0.0
    # not by `from_config`, which takes arguments that were given by position for defaults
    settings = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    scheduler = TransitionScheduler(**{**settings, "kernel": "ancestral", "eta": 1.0})
    scheduler.set_timesteps(num_inference_steps or pipeline.config.num_inference_steps)
    generator, device = torch.Generator().manual_seed(seed), pipeline.denoiser.device
    shape = pipeline.latent_shape(len(next(iter(condition.values()))))
    mask = pipeline.free_entries(condition)
    latents = pipeline.inpaint(randn(shape, generator, device) * scheduler.init_noise_sigma, condition)
    total = torch.zeros(shape[0], device=device)
    for timestep in scheduler.timesteps.tolist():
        ours = scheduler.transition(pipeline.predict(latents, timestep, condition), latents, timestep)
        with pipeline.lora_disabled():
            theirs = scheduler.transition(pipeline.predict(latents, timestep, condition), latents, timestep)
        total += ours.kl(theirs, mask)
        latents = pipeline.inpaint(ours.sample(randn(shape, generator, device)), condition)
    entries = latents[0].numel() if mask is None else mask.flatten(1).sum(1)
    return float((total / entries).mean())


@torch.no_grad()
def candidate_spread(pipeline: Any, condition: dict[str, Tensor], *, num_candidates: int = 8, seed: int = 0) -> float:
    """Standard deviation between candidates of their first actions, averaged over dimensions and conditions, in the
    environment's units (`dmc_hub.evaluation.candidate_diversity` at given conditions)."""
    repeated = pipeline.repeat(condition, num_candidates)
    latents = pipeline.sample(repeated, generator=torch.Generator().manual_seed(seed))
    _, actions = pipeline.decode(latents, repeated)
    return candidate_diversity(actions[:, 0].unflatten(0, (-1, num_candidates)).cpu().numpy())
