"""Row 19: small files that declare much are refused from their metadata."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from dmc_hub import checkpoint, portable
from dmc_hub.data import open_source
from dmc_hub.errors import DmcHubError
from dmc_hub.hub import load_pipeline
from tests.faults.cases import Case, must, peak_bytes
from tests.faults.configurations import CONFIG, WEIGHTS
from tests.faults.small import planner, save_adapter, save_pipeline


def _header(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def many_tensors(path: Path) -> None:
    """Half a million empty tensors."""
    path.write_bytes(_header({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(500_000)}))


def huge_tensor(path: Path) -> None:
    """One of a terabyte."""
    path.write_bytes(_header({"x": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}) + bytes(8))


def _pipeline_with(change: Callable[[Path], None], name: str, folder: Path) -> Callable[[], object]:
    saved = save_pipeline(folder / "pipeline")
    change(saved / name)
    (saved / checkpoint.MANIFEST_NAME).unlink()
    return partial(load_pipeline, saved)


def _adapter_with(change: Callable[[Path], None], folder: Path) -> Callable[[], object]:
    saved, pipeline = save_adapter(folder / "adapter"), planner()
    change(saved / "adapter_model.safetensors")
    (saved / checkpoint.MANIFEST_NAME).unlink()
    return partial(pipeline.load_lora_weights, saved)


def _long_config(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "dim_mults": [1] * 1_000_000}))


def _long_list(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "dim_mults": [1] * 200_000}))


def _h5(folder: Path) -> Callable[[], object]:
    """8 GB of observations that are not stored."""
    import h5py

    path = folder / "bomb.hdf5"
    with h5py.File(path, "w") as file:
        for name, width in (("observations", 1000), ("actions", 1)):
            file.create_dataset(name, (2_000_000, width), "f4", chunks=(1000, width))
        for name in ("rewards", "terminals"):
            file.create_dataset(name, (2_000_000,), "f4", chunks=(1000,))
    return lambda: open_source(path, "d4rl").contents


def _npy(folder: Path) -> Callable[[], object]:
    """A relay-kitchen array whose header declares a terabyte."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 19, 1 << 19)})
    for name in ("observations_seq.npy", "actions_seq.npy", "existence_mask.npy"):
        (folder / name).write_bytes(header.getvalue())
    return lambda: list(open_source(folder, "relay-kitchen").episodes())


def _zarr(folder: Path) -> Callable[[], object]:
    """A replay buffer of a few bytes that declares 8 GB."""
    path = folder / "bomb.zarr.zip"
    facts = {"zarr_format": 2, "compressor": None, "dtype": "<f4", "fill_value": 0, "filters": None, "order": "C"}
    arrays = {"data/state": [1_000_000, 2000], "data/action": [1_000_000, 2], "meta/episode_ends": [1]}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(".zgroup", '{"zarr_format": 2}')
        for name, shape in arrays.items():
            dtype = "<i8" if name.endswith("ends") else "<f4"
            archive.writestr(
                f"{name}/.zarray", json.dumps({**facts, "dtype": dtype, "shape": shape, "chunks": [1, *shape[1:]]})
            )
    return lambda: open_source(path, "zarr", reward="zero").contents


def _manifest(folder: Path) -> Callable[[], object]:
    """A manifest with a million files."""
    saved = save_pipeline(folder / "pipeline")
    records = {str(i): checkpoint.FileRecord(0, "0" * 64) for i in range(100_000)}
    text = checkpoint.manifest_text(checkpoint.Manifest("1", records, {}))
    (saved / checkpoint.MANIFEST_NAME).write_text(text)
    return partial(load_pipeline, saved)


def _index(folder: Path) -> Callable[[], object]:
    saved = save_pipeline(folder / "pipeline")
    (saved / checkpoint.MANIFEST_NAME).unlink()
    (saved / "model_index.json").write_bytes(b" " * (portable.MAX_JSON_BYTES + 1))
    return partial(load_pipeline, saved)


BOMBS: dict[str, Callable[[Path], Callable[[], object]]] = {
    "HDF5 of 8 GB": _h5,
    "npy of 1 TB": _npy,
    "zarr of 8 GB": _zarr,
    "500,000 tensors in a pipeline": partial(_pipeline_with, many_tensors, WEIGHTS),
    "500,000 tensors in an adapter": partial(_adapter_with, many_tensors),
    "a tensor of 1 TB in a pipeline": partial(_pipeline_with, huge_tensor, WEIGHTS),
    "a tensor of 1 TB in an adapter": partial(_adapter_with, huge_tensor),
    "a list of 1,000,000 in a configuration": partial(_pipeline_with, _long_config, CONFIG),
    "a list of 200,000 in a configuration": partial(_pipeline_with, _long_list, CONFIG),
    "100,000 files in a manifest": _manifest,
    "an index of a megabyte": _index,
}


def refused(name: str, folder: Path) -> None:
    """In less than a second, with less than 500 MB."""
    load_pipeline(save_pipeline(folder / "sound"))  # imports what loading needs
    inner = folder / "inner"
    inner.mkdir()
    attempt = BOMBS[name](inner)
    before, start = peak_bytes(), time.monotonic()
    try:
        attempt()
    except (DmcHubError, ValueError) as error:
        must(str(inner) in str(error), str(error))
    else:
        must(False, "it was read")
    seconds, grown = time.monotonic() - start, peak_bytes() - before
    must(seconds < 1.0, f"it took {seconds:.2f} s")
    must(grown < 500 << 20, f"it took {grown >> 20} MiB")


def cases(quick: bool) -> Iterator[Case]:
    """Of the row."""
    for name in BOMBS:
        yield Case(19, name, partial(refused, name))
