"""Rows 17 and 18: files that run code when they are unpickled, wherever they may lie; environments that name code."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmc_hub import checkpoint, hub
from dmc_hub.data import load_episodes, open_source
from dmc_hub.hub import load_pipeline
from dmc_hub.interop.weights import read_torch_file
from tests.faults.cases import Case, must
from tests.faults.small import planner, save_adapter, save_pipeline
from tests.trainers.test_base import make_trainer


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _torch_file(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": bomb}, buffer)
    return buffer.getvalue()


def _npy(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([bomb], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _npz(bomb: Bomb) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.npy", _npy(bomb))
    return buffer.getvalue()


def _in_checkpoint(names: tuple[str, ...], folder: Path, bomb: Bomb) -> Callable[[], Any]:
    """Beside and in the place of a checkpoint's files."""
    make_trainer(folder / "run", max_steps=2).train()
    for name in names:
        (folder / "run" / "checkpoint-2" / name).write_bytes(_torch_file(bomb))
    trainer = make_trainer(folder / "run")
    return lambda: trainer.train(resume_from_checkpoint=True)


def _in_pipeline(name: str, in_manifest: bool, folder: Path, bomb: Bomb) -> Callable[[], Any]:
    saved = save_pipeline(folder / "pipeline")
    (saved / name).write_bytes(_torch_file(bomb))
    weights = saved / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    files = [
        path.relative_to(saved).as_posix()
        for path in saved.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    ]
    checkpoint.write_manifest(saved, files if in_manifest else [])
    return lambda: load_pipeline(saved, verify=in_manifest)


def _in_adapter(name: str, folder: Path, bomb: Bomb) -> Callable[[], Any]:
    saved = save_adapter(folder / "adapter")
    (saved / "manifest.json").unlink()
    (saved / "adapter_model.safetensors").unlink()
    (saved / name).write_bytes(_torch_file(bomb))
    return lambda: planner().load_lora_weights(saved)


def _as_weights(suffix: str, folder: Path, bomb: Bomb) -> Callable[[], Any]:
    path = folder / f"weights{suffix}"
    path.write_bytes(_torch_file(bomb) if suffix != ".pkl" else pickle.dumps(bomb))
    return lambda: read_torch_file(path)


def _as_kitchen(folder: Path, bomb: Bomb) -> Callable[[], Any]:
    for name in ("observations_seq.npy", "actions_seq.npy", "existence_mask.npy"):
        (folder / name).write_bytes(_npy(bomb))
    return lambda: list(open_source(folder, "relay-kitchen").episodes())


def _as_data(suffix: str, folder: Path, bomb: Bomb) -> Callable[[], Any]:
    path = folder / f"data{suffix}"
    path.write_bytes(_npz(bomb) if suffix == ".npz" else pickle.dumps(bomb))
    return lambda: load_episodes(path)


def _as_zarr(folder: Path, bomb: Bomb) -> Callable[[], Any]:
    """An array of objects, whose codec unpickles."""
    facts = {"zarr_format": 2, "compressor": None, "fill_value": 0, "order": "C", "shape": [1], "chunks": [1]}
    for name in ("data/state", "data/action", "meta/episode_ends"):
        (folder / name).mkdir(parents=True)
        (folder / name / ".zarray").write_text(
            json.dumps({**facts, "dtype": "|O", "filters": [{"id": "pickle", "protocol": 5}]})
        )
        (folder / name / "0").write_bytes(pickle.dumps(bomb))
    (folder / ".zgroup").write_text('{"zarr_format": 2}')
    return lambda: list(open_source(folder, "zarr", reward="zero").episodes())


def _as_saved_dataset(folder: Path, bomb: Bomb) -> Callable[[], Any]:
    for name in ("data.pkl", "state.json", "dataset_info.json", "train.pkl", "train.pt"):
        (folder / name).write_bytes(pickle.dumps(bomb))
    return lambda: load_episodes(folder)


PLACES: dict[str, Callable[[Path, Bomb], Callable[[], Any]]] = {
    "optimizer.pt of a checkpoint": partial(_in_checkpoint, ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    "training_args.bin of a checkpoint": partial(_in_checkpoint, ("training_args.bin",)),
    "custom_checkpoint_0.pkl of a checkpoint": partial(
        _in_checkpoint, ("custom_checkpoint_0.pkl", "random_states_0.pkl")
    ),
    "optimizer.safetensors of a checkpoint": partial(_in_checkpoint, ("optimizer.safetensors",)),
    "trainer_state.json of a checkpoint": partial(_in_checkpoint, ("trainer_state.json",)),
    "manifest.json of a checkpoint": partial(_in_checkpoint, ("manifest.json",)),
    ".bin of a pipeline": partial(_in_pipeline, "denoiser/diffusion_pytorch_model.bin", True),
    ".bin of a pipeline, not verified": partial(_in_pipeline, "denoiser/diffusion_pytorch_model.bin", False),
    ".pt of a pipeline": partial(_in_pipeline, "denoiser/diffusion_pytorch_model.pt", False),
    "a pickle called .safetensors": partial(_in_pipeline, "denoiser/other.safetensors", False),
    "adapter_model.bin": partial(_in_adapter, "adapter_model.bin"),
    "an adapter called .safetensors": partial(_in_adapter, "adapter_model.safetensors"),
    ".pt of others' weights": partial(_as_weights, ".pt"),
    ".ckpt of others' weights": partial(_as_weights, ".ckpt"),
    ".pth of others' weights": partial(_as_weights, ".pth"),
    ".pkl of others' weights": partial(_as_weights, ".pkl"),
    ".npy of relay-kitchen": _as_kitchen,
    ".npz as data": partial(_as_data, ".npz"),
    ".pkl as data": partial(_as_data, ".pkl"),
    "a zarr codec that unpickles": _as_zarr,
    "a folder of pickles as data": _as_saved_dataset,
}


def never_runs(name: str, folder: Path) -> None:
    """Whatever comes of the attempt, the file is not unpickled; in the end it is, to see that it would have worked."""
    mark, inner = folder / "ran", folder / "inner"
    inner.mkdir()
    attempt = PLACES[name](inner, Bomb(mark))
    with suppress(Exception):
        attempt()
    with suppress(Exception):
        hub.describe(inner)
    must(not mark.exists(), "code was run")
    pickle.loads(pickle.dumps(Bomb(mark)))
    must(mark.exists(), "the file would never have done anything")


def entry_point_is_not_called(folder: Path) -> None:
    """A Minari dataset whose environment names code of its own."""
    import h5py

    (folder / "data").mkdir()
    spec = {"id": "evil-v0", "entry_point": "os:system", "kwargs": {"command": f"touch {folder / 'ran'}"}}
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        file.attrs["env_spec"] = json.dumps(spec)
        file.attrs["eval_env_spec"] = json.dumps(spec)
        group = file.create_group("episode_0")
        for key, shape in {"observations": (3, 2), "actions": (2, 1), "rewards": (2,)}.items():
            group.create_dataset(key, data=np.zeros(shape, np.float32))
        for key in ("terminations", "truncations"):
            group.create_dataset(key, data=np.array([False, True]))
    with suppress(Exception):
        load_episodes(folder, format="minari")
    with suppress(Exception):
        load_episodes(folder / "data" / "main_data.hdf5")
    must(not (folder / "ran").exists(), "the entry point was called")


def cases(quick: bool) -> Iterator[Case]:
    """Of both rows."""
    for name in PLACES:
        yield Case(17, name, partial(never_runs, name))
    yield Case(18, "an environment's entry point", entry_point_is_not_called)
