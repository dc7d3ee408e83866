"""A Hub on loopback, and huggingface_hub's client turned to it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import close_session, constants, hf_api
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
from peft import LoraConfig

from dmc_hub.models.critic import TwinQCritic
from dmc_hub.models.normalizer import Normalizer
from dmc_hub.models.temporal_unet import TemporalUnet
from dmc_hub.pipelines import DiffuserPlannerPipeline
from dmc_hub.scheduler import TransitionScheduler


def _server_module() -> Any:
    """`server.py` beside this file, which is on no path that could be imported from."""
    spec = importlib.util.spec_from_file_location("dmc_hub_test_server", Path(__file__).with_name("server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server() -> Iterator[Any]:
    """A `HubServer` of its own for each test."""
    hub = _server_module().HubServer()
    yield hub
    hub.close()


@pytest.fixture
def hub(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The server, and this process's client talking to it as alice, as HF_ENDPOINT and HF_TOKEN would have it."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where a push that fails leaves what it had
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    disable_progress_bars()
    close_session()
    yield server
    close_session()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between two tries; the waits that would have been."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.fixture
def make_planner() -> Callable[..., Any]:
    """`make_planner(seed, **scheduler_options)`: an untrained planner with a critic, the same at every call."""

    def make(seed: int = 0, **scheduler_options: Any) -> DiffuserPlannerPipeline:
        ends = np.array([[-1.0], [1.0]], dtype=np.float32)
        torch.manual_seed(seed)
        pipeline = DiffuserPlannerPipeline(
            TemporalUnet(4, dim=8, dim_mults=(1, 2)),
            TransitionScheduler(**{"num_train_timesteps": 10, "prediction_type": "sample", **scheduler_options}),
            Normalizer.from_data(np.repeat(ends, 3, 1) + np.float32(0.1), ends),
            TwinQCritic(3, 1, hidden_dims=(16,)),
            horizon=4,
            num_inference_steps=3,
        )
        pipeline.describe_task(task="nav1d-full", environment="dmc_hub/Nav1D-v0")
        return pipeline

    return make


@pytest.fixture
def adapt() -> Callable[..., Any]:
    """`adapt(pipeline)`: the pipeline with a LoRA that changes what it does."""

    def make(pipeline: Any, seed: int = 0) -> Any:
        pipeline.add_lora(LoraConfig(r=2, lora_alpha=6))
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in pipeline.denoiser.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
        return pipeline

    return make


@pytest.fixture
def act() -> Callable[[Any], np.ndarray]:
    """`act(pipeline)`: plans, bytes and all."""

    def run(pipeline: Any) -> np.ndarray:
        observations = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
        return pipeline(observations, num_candidates=4, generator=0).trajectories

    return run


@pytest.fixture
def shell(hub: Any, tmp_path: Path) -> Callable[..., str]:
    """`shell(code, *arguments, **variables)`: what a new process with an empty cache prints."""
    ours = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": "hf_write",
        "HF_HOME": str(tmp_path / "empty"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}

    def run(code: str, *arguments: str, **variables: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        env = {**theirs, **ours, **variables}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
