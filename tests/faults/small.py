"""A small saved pipeline, and an adapter of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline
from dmc_hub.scheduler import TransitionScheduler


def planner(**changes: Any) -> DiffuserPlannerPipeline:
    """Untrained, the same at every call; `changes` of the options make it another."""
    options = {"seed": 0, "mults": (1, 2), "timesteps": 10, "low": -1.0, "horizon": 4, "observation_dim": 3, **changes}
    torch.manual_seed(options["seed"])
    ends = np.array([[options["low"]], [1.0]], dtype=np.float32)
    width = options["observation_dim"]
    return DiffuserPlannerPipeline(
        TemporalUnet(width + 1, dim=8, dim_mults=options["mults"]),
        TransitionScheduler(num_train_timesteps=options["timesteps"], prediction_type="sample"),
        Normalizer.from_data(np.repeat(ends, width, 1) + np.float32(0.1), ends),
        TwinQCritic(width, 1, hidden_dims=(16,)),
        horizon=options["horizon"],
        num_inference_steps=3,
    )


def save_pipeline(folder: Path) -> Path:
    planner().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, **changes: Any) -> Path:
    """Of a pipeline with these changes, with weights that are not all zero."""
    pipeline = planner(**changes)
    pipeline.add_lora(LoraConfig(r=2, lora_alpha=6, init_lora_weights=False))
    pipeline.save_lora_weights(folder)
    return folder
