"""What a plan costs beyond the bare forwards of its network, with every kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from dmc_hub.benchmarks.timing import machine, take_turns
from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline
from dmc_hub.scheduler import TransitionScheduler

SAMPLERS: dict[str, dict[str, Any]] = {
    "DDPM": {"eta": 1.0},
    "DDIM": {"eta": 0.0},
    "reverse SDE": {"schedule": "linear", "kernel": "euler_maruyama", "eta": 1.0},
    "score matching": {"schedule": "variance_exploding", "prediction_type": "v_prediction", "eta": 1.0},
    "flow matching": {"schedule": "flow", "prediction_type": "velocity", "eta": 0.0},
    "DPM-Solver++(2M)": {"kernel": "dpm_solver_2m", "eta": 0.0},
}


@dataclass(frozen=True)
class PlannerSizes:
    """Sizes of a planner; the defaults are Diffuser's for Hopper."""

    observation_dim: int = 11
    action_dim: int = 3
    horizon: int = 32
    dim: int = 32
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    num_inference_steps: int = 20

    def build(self, sampler: str = "DDPM", *, device: str = "cpu", seed: int = 0) -> DiffuserPlannerPipeline:
        """A planner with a critic, of random weights that any two calls share."""
        rng = np.random.default_rng(seed)
        data = [rng.normal(size=(256, width)).astype(np.float32) for width in (self.observation_dim, self.action_dim)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            denoiser = TemporalUnet(self.observation_dim + self.action_dim, self.dim, self.dim_mults).eval()
            critic = TwinQCritic(self.observation_dim, self.action_dim).eval()
        pipeline = DiffuserPlannerPipeline(
            denoiser,
            TransitionScheduler(100, **SAMPLERS[sampler]),
            Normalizer.from_data(*data),
            critic,
            horizon=self.horizon,
            num_inference_steps=self.num_inference_steps,
        )
        return cast(DiffuserPlannerPipeline, pipeline.to(device))

    def observation(self, seed: int = 0) -> np.ndarray:
        """One observation, `(observation_dim,)`."""
        return np.random.default_rng(seed).normal(size=self.observation_dim).astype(np.float32)


def measure_plans(
    *,
    batch_sizes: Sequence[int] = (1, 64),
    samplers: Sequence[str] = tuple(SAMPLERS),
    sizes: PlannerSizes = PlannerSizes(),
    repeats: int = 7,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Seconds of whole calls of the pipeline, one observation and so many candidates ranked by the critic, over as many
    bare forwards of its network at the same timesteps.

    Small batches take `64 / batch size` times as many repeats, at most four times.
    """
    pipelines = {name: sizes.build(name, device=device, seed=seed) for name in samplers}
    denoiser, observation = pipelines[samplers[0]].denoiser, sizes.observation(seed)
    width = sizes.observation_dim + sizes.action_dim

    def bare(latents: torch.Tensor) -> None:
        with torch.inference_mode():
            for timestep in pipelines[samplers[0]].scheduler.timesteps.tolist():
                denoiser(latents, timestep, return_dict=False)

    results = {}
    for batch_size in batch_sizes:
        latents = torch.randn(batch_size, sizes.horizon, width, device=device)
        runs: dict[str, Any] = {"bare forwards": functools.partial(bare, latents)}
        for name, pipeline in pipelines.items():
            runs[name] = functools.partial(pipeline, observation, num_candidates=batch_size, generator=seed)
        more = min(4, max(1, 64 // batch_size))
        results[str(batch_size)] = take_turns(runs, "bare forwards", repeats=more * repeats, device=device, warm_up=1)
    return {"machine": machine(device), "sizes": vars(sizes), "batch_sizes": results}
