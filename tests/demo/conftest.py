"""A small planner of Nav1D and two adapters on it, as folders."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from dmc_hub.data import Episodes, make_nav1d_dataset
from dmc_hub.presets import build_nav1d_planner


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first/pipeline`, and the adapters `gentle/adapter` and `bold/adapter`."""
    root = tmp_path_factory.mktemp("runs")
    episodes = Episodes.from_dataset(make_nav1d_dataset("full", num_episodes=20))
    planner = build_nav1d_planner(episodes, seed=0)
    planner.register_to_config(num_inference_steps=2)
    planner.save_pretrained(root / "first/pipeline")
    source = torch.Generator().manual_seed(1)
    for name, size in (("gentle", 0.02), ("bold", 0.3)):
        planner.add_lora(LoraConfig(r=2), seed=0)
        with torch.no_grad():
            for key, parameter in planner.denoiser.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(size * torch.randn(parameter.shape, generator=source))
        planner.save_lora_weights(root / name / "adapter")
        planner.unload_lora()
    return root
