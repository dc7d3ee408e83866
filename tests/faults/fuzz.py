"""Row 24: files of every reader with bytes changed, cut and put in: our errors only, and never a crash or a hang."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dmc_hub import checkpoint, cli, hub, portable
from dmc_hub.data import open_source
from dmc_hub.errors import DmcHubError
from tests.faults.cases import Case, Tally, must, peak_bytes
from tests.faults.small import planner, save_adapter, save_pipeline
from tests.trainers.test_base import make_config

SECONDS = 1.0
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"1e999",
    b"-1",
    b"NaN",
    b"\\u0000",
    b"\xff",
    b"../",
    b"true",
    b"99999999999",
]


def damaged(content: bytes, seed: int) -> bytes:
    """The content with a few stretches replaced by bytes or by words of JSON."""
    chance, result = random.Random(seed), bytearray(content)
    for _ in range(chance.randint(1, 4)):
        start = chance.randint(0, max(len(result) - 1, 0))
        added = chance.randbytes(chance.randint(0, 8)) if chance.random() < 0.5 else chance.choice(TOKENS)
        result[start : start + chance.randint(0, 8)] = added
    return bytes(result)


def fuzz(path: Path, read: Callable[[], Any], count: int, head: int = 3000) -> Tally:
    """Read the file so often with its first bytes damaged; the reader may raise our errors and `ValueError` alone."""
    content, before = path.read_bytes(), peak_bytes()
    slowest, tried = [0.0], [0]

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**63))
    def attempt(seed: int) -> None:
        path.write_bytes(damaged(content[:head], seed) + content[head:])
        start = time.process_time()
        with contextlib.suppress(DmcHubError, ValueError, FileNotFoundError, FloatingPointError):
            read()
        slowest[0] = max(slowest[0], time.process_time() - start)
        tried[0] += 1

    try:
        attempt()
    finally:
        path.write_bytes(content)
    grown = peak_bytes() - before
    must(grown < 500 << 20, f"it took {grown >> 20} MiB")
    must(slowest[0] < SECONDS, f"one took {slowest[0]:.1f} s")
    return Tally(tried[0], tried[0], f"slowest {slowest[0]:.3f} s, {grown >> 20} MiB")


def _manifest(folder: Path) -> tuple[Path, Callable[[], Any]]:
    saved = save_pipeline(folder / "pipeline")
    return saved / checkpoint.MANIFEST_NAME, lambda: checkpoint.read_manifest(saved)


def _pipeline(name: str, folder: Path) -> tuple[Path, Callable[[], Any]]:
    saved = save_pipeline(folder / "pipeline")
    (saved / checkpoint.MANIFEST_NAME).unlink()
    return saved / name, lambda: portable.check_loadable(saved, ["DiffuserPlannerPipeline"], trust_remote_code=False)


def _adapter(name: str, folder: Path) -> tuple[Path, Callable[[], Any]]:
    saved, pipeline = save_adapter(folder / "adapter"), planner()
    (saved / checkpoint.MANIFEST_NAME).unlink()

    def read() -> None:
        pipeline.load_lora_weights(saved)
        pipeline.unload_lora()

    return saved / name, read


def _described(folder: Path) -> tuple[Path, Callable[[], Any]]:
    saved = save_adapter(folder / "adapter")
    return saved / "adapter_config.json", lambda: hub.describe(saved)


def _optimizer(name: str, folder: Path) -> tuple[Path, Callable[[], Any]]:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint.save_optimizer(optimizer, folder)
    return folder / name, lambda: checkpoint.load_optimizer(optimizer, folder)


def _random_state(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "rng.safetensors"
    checkpoint.save_rng_state(path)
    return path, lambda: checkpoint.load_rng_state(path)


def _config(folder: Path) -> tuple[Path, Callable[[], Any]]:
    path = folder / "config.yaml"
    path.write_text("output-dir: a\nlearning_rate: 1e-3\nmax_steps: 5\nema_decay: 0.9\nbf16: false\nreport_to: none\n")
    kind = type(make_config())
    return path, lambda: cli.parse_arguments(kind, argv=["--config", str(path)])


def _hdf5(folder: Path) -> tuple[Path, Callable[[], Any]]:
    import h5py

    path = folder / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name, shape in {"observations": (8, 2), "actions": (8, 1), "rewards": (8,)}.items():
            file[name] = np.zeros(shape, np.float32)
        file["terminals"] = np.arange(8) == 7
    return path, lambda: list(open_source(path, "d4rl").episodes())


def _npy(folder: Path) -> tuple[Path, Callable[[], Any]]:
    for name, shape in {"observations_seq": (5, 2, 60), "actions_seq": (5, 2, 9), "existence_mask": (5, 2)}.items():
        np.save(folder / f"{name}.npy", np.ones(shape, np.float32))
    return folder / "existence_mask.npy", lambda: list(
        open_source(folder, "relay-kitchen", time_axis=0, reward="zero").episodes()
    )


def _zarr(folder: Path) -> tuple[Path, Callable[[], Any]]:
    facts = {"zarr_format": 2, "compressor": None, "fill_value": 0, "filters": None, "order": "C", "dtype": "<f4"}
    for name, values in {"data/state": np.zeros((6, 2), "<f4"), "data/action": np.zeros((6, 1), "<f4")}.items():
        _write_array(folder / "z" / name, values, facts)
    _write_array(folder / "z/meta/episode_ends", np.array([6], "<i8"), {**facts, "dtype": "<i8"})
    (folder / "z/.zgroup").write_text('{"zarr_format": 2}')
    return folder / "z/data/state/.zarray", lambda: list(open_source(folder / "z", "zarr", reward="zero").episodes())


def _write_array(folder: Path, values: np.ndarray, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / ".zarray").write_text(json.dumps({**facts, "shape": values.shape, "chunks": values.shape}))
    (folder / ".".join("0" * values.ndim)).write_bytes(values.tobytes())


READERS: dict[str, Callable[[Path], tuple[Path, Callable[[], Any]]]] = {
    "manifest.json": _manifest,
    "model_index.json": partial(_pipeline, "model_index.json"),
    "config.json of a network": partial(_pipeline, "denoiser/config.json"),
    "scheduler_config.json": partial(_pipeline, "scheduler/scheduler_config.json"),
    "safetensors of a pipeline": partial(_pipeline, "denoiser/diffusion_pytorch_model.safetensors"),
    "adapter_config.json": partial(_adapter, "adapter_config.json"),
    "safetensors of an adapter": partial(_adapter, "adapter_model.safetensors"),
    "info on an adapter": _described,
    "optimizer.json": partial(_optimizer, "optimizer.json"),
    "optimizer.safetensors": partial(_optimizer, "optimizer.safetensors"),
    "rng.safetensors": _random_state,
    "config.yaml": _config,
    "HDF5 of D4RL": _hdf5,
    "npy of relay-kitchen": _npy,
    "zarr metadata": _zarr,
}


def fuzz_reader(name: str, folder: Path, count: int) -> Tally:
    path, read = READERS[name](folder)
    read()
    return fuzz(path, read, count)


def cases(quick: bool) -> Iterator[Case]:
    """One for each reader."""
    for name in READERS:
        yield Case(24, name, partial(fuzz_reader, name, count=200 if quick else 10_000))
