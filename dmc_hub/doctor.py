"""Is everything there and in order: versions, extras, devices, caches, and the folder of a run."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from dmc_hub import checkpoint
from dmc_hub.errors import FolderInUseError
from dmc_hub.output_folder import alone_in, free_bytes
from dmc_hub.version import __version__

FEW_BYTES = 1 << 30
_DEVELOPMENT = ("dev",)


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis: `state` is "ok", "note" (something is missing that may not be needed) or "problem"."""

    state: Literal["ok", "note", "problem"]
    subject: str
    detail: str


def diagnose(output_dir: str | os.PathLike[str] | None = None) -> Iterator[Finding]:
    """Look at this installation and, if given, at the folder of a run. Changes nothing."""
    yield Finding("ok", "system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}")
    yield Finding("ok", "dmc_hub", __version__)
    yield from _dependencies()
    yield from _devices()
    yield from _hub()
    if output_dir is not None:
        yield from _run(Path(output_dir))


def _dependencies() -> Iterator[Finding]:
    try:
        requirements = [Requirement(text) for text in metadata.requires("dmc_hub") or []]
    except metadata.PackageNotFoundError:
        yield Finding("note", "dependencies", "dmc_hub is not installed, so what it needs is not known: pip install .")
        return
    base = [each for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    for requirement in base:
        state, detail = _state_of(requirement)
        yield Finding("problem" if state != "ok" else "ok", requirement.name, detail)
    for extra in metadata.metadata("dmc_hub").get_all("Provides-Extra") or []:
        if extra in _DEVELOPMENT:
            continue
        parts = [
            each for each in requirements if each not in base and each.marker and each.marker.evaluate({"extra": extra})
        ]
        wrong = [f"{each.name} {detail}" for each in parts for state, detail in [_state_of(each)] if state != "ok"]
        detail = f'{"; ".join(wrong)}: pip install "dmc_hub[{extra}]"' if wrong else "installed"
        yield Finding("note" if wrong else "ok", f"extra {extra}", detail)


def _state_of(requirement: Requirement) -> tuple[str, str]:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "missing", "is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return "ok", version
    return "wrong", f"{version} is installed, {requirement.specifier} is needed"


def _devices() -> Iterator[Finding]:
    threads = (
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, OMP_NUM_THREADS={_variable('OMP_NUM_THREADS')}"
    )
    yield _computes("cpu", threads)
    if not torch.cuda.is_available():
        yield Finding("note", "cuda", f"no GPU; torch {torch.__version__} is built for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield _computes(f"cuda:{index}", f"{facts.name}, {facts.total_memory:,} bytes")
    if torch.backends.mps.is_available():
        yield _computes("mps", "Apple GPU")


def _computes(device: str, detail: str) -> Finding:
    try:
        product = torch.eye(64, device=device) @ torch.full((64, 64), 2.0, device=device)
        is_right = bool((product == 2.0).all())
    except RuntimeError as error:
        return Finding("problem", device, f"{detail}: {' '.join(str(error).split())}")
    return Finding("ok" if is_right else "problem", device, detail if is_right else f"{detail}: it computes wrongly")


def _hub() -> Iterator[Finding]:
    yield Finding(
        "ok", "Hub", f"{constants.ENDPOINT}{', offline (HF_HUB_OFFLINE)' if constants.HF_HUB_OFFLINE else ''}"
    )
    has_token = get_token() is not None
    yield Finding(
        "ok" if has_token else "note", "token", "there is one" if has_token else "none: `hf auth login` to push"
    )
    folders = {"Hub cache": constants.HF_HUB_CACHE, "data cache": _data_cache(), "scratch": tempfile.gettempdir()}
    for name, folder in folders.items():
        yield _folder(name, Path(folder))


def _data_cache() -> str:
    from datasets import config

    return str(config.HF_DATASETS_CACHE)


def _folder(name: str, folder: Path) -> Finding:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = free_bytes(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("problem", name, f"`{folder}` cannot be written to: {error.strerror}")
    if free < FEW_BYTES:
        return Finding("problem", name, f"`{folder}` has only {free:,} bytes free")
    return Finding("ok", name, f"`{folder}`, {free:,} bytes free")


def _run(folder: Path) -> Iterator[Finding]:
    yield _folder("output folder", folder)
    if not folder.is_dir():
        yield Finding("note", "run", f"`{folder}` is not there yet")
        return
    try:
        with alone_in(folder):
            yield Finding("ok", "lock", "no process is at work in it")
    except FolderInUseError as error:
        yield Finding("note", "lock", str(error))
    except OSError as error:
        yield Finding("problem", "lock", f"`{folder}` cannot be locked: {error.strerror}")
    for manifest in sorted(folder.rglob(checkpoint.MANIFEST_NAME)):
        part = manifest.parent
        hidden = [name for name in part.relative_to(folder).parts if name.startswith(".")]
        if hidden:
            continue
        try:
            verified = checkpoint.verify(part)
        except checkpoint.CheckpointError as error:
            yield Finding("problem", str(part.relative_to(folder)), str(error))
        else:
            yield Finding("ok", str(part.relative_to(folder)), f"{len(verified.files)} files, all as they were written")
    for path in sorted(folder.rglob("checkpoint-*")):
        if path.is_dir() and not (path / checkpoint.MANIFEST_NAME).is_file():
            yield Finding("problem", str(path.relative_to(folder)), "has no manifest: it is not complete")
    stages = [path for path in folder.rglob(".*-*") if path.is_dir() and checkpoint.is_hidden_stage(path)]
    if stages:
        yield Finding("note", "stages", f"{len(stages)} of interrupted saves; the next run removes them")


def _variable(name: str) -> str:
    return os.environ.get(name, "not set")
