"""Noise levels of others as a `TransitionScheduler`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DDPMScheduler

from dmc_hub.interop.weights import InteropError
from dmc_hub.scheduler import TransitionScheduler

_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_UNSUPPORTED = {
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}


def from_diffusers(config: Mapping[str, Any], *, eta: float) -> TransitionScheduler:
    """The scheduler whose levels, steps and noise are those of diffusers' DDPM (`eta=1`) or DDIM (`eta=0`) scheduler.

    One difference remains: where DDIM clips its prediction of the clean sample, it goes on in the direction of the
    unclipped one's noise, and this one in that of the clipped one's, as DDPM does.

    Args:
        config: the arguments of diffusers' scheduler.
        eta: share of the full noise.

    Raises:
        InteropError: a setting that has no counterpart.
    """
    stock = (DDPMScheduler if eta else DDIMScheduler).from_config(dict(config))
    settings = stock.config
    for name, only in _UNSUPPORTED.items():
        if settings.get(name, only) != only:
            raise InteropError(f"The scheduler's `{name}` must be {only!r}, got {settings[name]!r}.")
    if settings.get("variance_type", "fixed_small") not in ("fixed_small", "fixed_small_log"):
        raise InteropError(f"The scheduler's `variance_type` must be 'fixed_small', got {settings['variance_type']!r}.")
    if settings["prediction_type"] not in _PREDICTIONS:
        raise InteropError(f"The scheduler's `prediction_type` is {settings['prediction_type']!r}: unknown here.")
    result: TransitionScheduler = TransitionScheduler(
        num_train_timesteps=settings["num_train_timesteps"],
        schedule="tabulated",
        schedule_options={"alpha_bars": stock.alphas_cumprod.double().tolist(), "timestep_spacing": "leading"},
        prediction_type=settings["prediction_type"],
        eta=eta,
        clip_range=settings["clip_sample_range"] if settings["clip_sample"] else None,
    )
    return result


def to_diffusers(scheduler: TransitionScheduler) -> dict[str, Any]:
    """The arguments of diffusers' DDPM or DDIM scheduler with these levels.

    Raises:
        InteropError: no `beta_schedule` of diffusers gives them.
    """
    config = scheduler.config
    if config.schedule != "tabulated" or config.kernel != "ancestral" or config.eta not in (0, 1):
        raise InteropError(
            f"A scheduler with schedule {config.schedule!r}, kernel {config.kernel!r} and eta {config.eta} has no "
            "counterpart elsewhere: 'tabulated', 'ancestral' and 0 or 1 have."
        )
    table = np.array(config.schedule_options["alpha_bars"])
    betas = 1 - table / np.array([1.0, *table[:-1]])
    base = {
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": config.prediction_type,
        "clip_sample": config.clip_range is not None,
        "clip_sample_range": 1.0 if config.clip_range is None else config.clip_range,
    }
    for kind in ("squaredcos_cap_v2", "linear", "scaled_linear"):
        options = {**base, "beta_schedule": kind}
        if kind != "squaredcos_cap_v2":
            options |= {"beta_start": _rounded(betas[0]), "beta_end": _rounded(betas[-1])}
        if np.allclose(DDPMScheduler(**options).alphas_cumprod.double().numpy(), table, rtol=1e-5, atol=0):
            return options
    raise InteropError("The scheduler's levels are those of no `beta_schedule` of diffusers.")


def cleandiffuser_scheduler(
    num_steps: int,
    *,
    noise_schedule: str = "cosine",
    epsilon: float = 1e-3,
    predict_noise: bool = True,
    eta: float = 1.0,
    clip_range: float | None = None,
) -> TransitionScheduler:
    """The levels of CleanDiffuser's `DiscreteDiffusionSDE`: `num_steps` times, evenly from `epsilon` to 1.

    Sampling goes on from its least noisy level to the clean sample, where CleanDiffuser stops at that level.

    Args:
        num_steps: its `diffusion_steps`.
        noise_schedule: `"cosine"` (of which the last time is 0.9946) or `"linear"`.
        epsilon: the first time.
        predict_noise: whether the network predicts the noise, or the clean sample.
        eta: 1 for its solver `"ddpm"`, 0 for `"ddim"`.
        clip_range: its `x_max`, where `x_min` is the negative of it.
    """
    if noise_schedule not in ("cosine", "linear"):
        raise InteropError(f"`noise_schedule` must be 'cosine' or 'linear', got {noise_schedule!r}.")
    times = np.linspace(epsilon, 1, num_steps)
    if noise_schedule == "cosine":
        times[-1] = 0.9946
        angles = (times + 0.008) / 1.008 * math.pi / 2
        alphas = np.cos(angles) / math.cos(0.008 / 1.008 * math.pi / 2)
    else:
        alphas = np.exp(-(20 - 0.1) / 4 * times**2 - 0.1 / 2 * times)
    alpha_bars = [float(alpha) for alpha in alphas**2]
    if any(low >= high for high, low in itertools.pairwise(alpha_bars)):
        raise InteropError(f"`num_steps` {num_steps} puts a time past 0.9946, where the cosine schedule ends.")
    result: TransitionScheduler = TransitionScheduler(
        num_train_timesteps=num_steps,
        schedule="tabulated",
        schedule_options={"alpha_bars": alpha_bars},
        prediction_type="epsilon" if predict_noise else "sample",
        eta=eta,
        clip_range=clip_range,
    )
    return result


def _rounded(beta: float) -> float:
    """The number of few digits that a table in single precision was made from."""
    return float(f"{beta:.4g}")
