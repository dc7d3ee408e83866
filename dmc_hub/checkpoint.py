"""Folders that are either complete and verifiable, or not there: staged, checksummed, then renamed into
place.

A folder is written into a hidden sibling (its *stage*); `manifest.json`, with the size and sha256 of every
file, is written last; files and folder are flushed to disk; only then does `os.rename` give the folder its
name. A process that dies at any moment leaves a hidden stage, which the next writer removes, and never a
half-written checkpoint. Tensors are safetensors files, everything else is JSON: reading a checkpoint never
unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dmc_hub.errors import DmcHubError
from dmc_hub.version import __version__

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 << 20

_CHECKPOINT = re.compile(r"checkpoint-(?P<step>\d+)")
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>stage|old|trash)-(?P<host>.+)-(?P<pid>\d+)-(?P<salt>[0-9a-f]{8})")
_own_stages: set[Path] = set()  # a stage with our process id that is not listed here is from an earlier process


class CheckpointError(DmcHubError, ValueError):
    """A checkpoint is incomplete, was changed after it was written, or does not fit what it is loaded
    into."""


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of one file: its size in bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`; the keys of `files` are paths relative to the folder."""

    library_version: str
    files: Mapping[str, FileRecord]
    metadata: Mapping[str, Any]


# ---- Writing -----------------------------------------------------------------------------------------------


@contextmanager
def write_folder_atomically(
    folder: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield a stage to write files into; on leaving the block it becomes `folder`, after an exception it is
    removed.

    A folder that already has this name is replaced: it is renamed away, the new one takes its name, the old
    one is deleted. If the process dies in between, the next call of `remove_stale` gives the old folder its
    name back.

    Args:
        folder: The final path. Its parents are created.
        metadata: JSON-serialisable facts kept in the manifest, such as the step.
    """
    stage = open_stage(folder)
    try:
        yield stage
        commit_stage(stage, folder, metadata)
    finally:
        discard_stage(stage)


def open_stage(folder: str | os.PathLike[str]) -> Path:
    """Create the empty stage of `folder` beside it, after removing what dead processes left there."""
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(folder.parent)
    stage = _hidden(folder, "stage")
    stage.mkdir()
    _own_stages.add(stage)
    return stage


def commit_stage(stage: Path, folder: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> Manifest:
    """Write the manifest of `stage`, flush it to disk and rename it to `folder`, replacing a folder of that
    name."""
    folder = Path(folder).absolute()
    paths = sorted(path for path in stage.rglob("*") if path.is_file() and path != stage / MANIFEST_NAME)
    manifest = write_manifest(stage, [path.relative_to(stage).as_posix() for path in paths], metadata)
    for path in [*paths, stage / MANIFEST_NAME, *(p for p in stage.rglob("*") if p.is_dir()), stage]:
        _flush(path)
    old = _hidden(folder, "old") if folder.exists() else None
    if old is not None:
        os.rename(folder, old)
    try:
        os.rename(stage, folder)
    except OSError:
        if old is not None:
            os.rename(old, folder)
        raise
    _own_stages.discard(stage)
    _flush(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return manifest


def write_manifest(folder: Path, names: Iterable[str], metadata: Mapping[str, Any] | None = None) -> Manifest:
    """Write the manifest of some files of a folder, paths relative to it; an earlier one stays until it is replaced."""
    files = {name: record_of(folder / name) for name in sorted(names)}
    manifest = Manifest(__version__, files, dict(metadata or {}))
    write_text(folder / MANIFEST_NAME, manifest_text(manifest))
    return manifest


def discard_stage(stage: Path) -> None:
    """Remove a stage that was not committed; does nothing after `commit_stage`."""
    if stage in _own_stages:
        _own_stages.discard(stage)
        shutil.rmtree(stage, ignore_errors=True)


def remove_stale(parent: str | os.PathLike[str]) -> None:
    """Clean `parent` of what dead processes of this machine left: stages and half-deleted folders go, and a
    folder that was being replaced gets its name back if the new one never arrived."""
    for path in Path(parent).absolute().iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if match is None or match["host"] != socket.gethostname() or _is_in_use(path, int(match["pid"])):
            continue
        final = path.with_name(match["name"])
        if match["kind"] == "old" and not final.exists():
            with suppress(FileNotFoundError):  # another process of the run was faster
                os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_hidden_stage(path: Path) -> bool:
    """Whether a path is a stage, or a folder that is being replaced or deleted."""
    return _HIDDEN.fullmatch(path.name) is not None


def _is_in_use(path: Path, pid: int) -> bool:
    if pid == os.getpid():
        return path in _own_stages
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _hidden(folder: Path, kind: str) -> Path:
    salt = secrets.token_hex(4)
    return folder.with_name(f".{folder.name}.{kind}-{socket.gethostname()}-{os.getpid()}-{salt}")


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- Verifying ---------------------------------------------------------------------------------------------


def verify(folder: str | os.PathLike[str]) -> Manifest:
    """Read every file of `folder` and compare it with the manifest.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or changed.
    """
    with verifying(folder) as manifest:
        return manifest


@contextmanager
def verifying(folder: str | os.PathLike[str], wanted: Callable[[str], bool] | None = None) -> Iterator[Manifest]:
    """Compare the files of `folder` with the manifest while the block loads them.

    All sizes, and all files but weights, are compared before the block begins: code and configurations are never used
    unseen. Weights are compared on another thread meanwhile, and the block ends when they have been. An error in the
    block gives way to that of a file that is not what it was: it is why.

    Args:
        folder: with a manifest.
        wanted: which of its files to compare, by name; all by default.

    Raises:
        CheckpointError: naming the first file that is missing, truncated or changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    records = {name: record for name, record in manifest.files.items() if wanted is None or wanted(name)}
    weights: list[str] = []
    others: list[str] = []
    for name, record in records.items():
        _check_size(folder / name, record)
        (weights if name.endswith(".safetensors") else others).append(name)
    with ThreadPoolExecutor(1, thread_name_prefix="verifying") as pool:
        comparisons = [pool.submit(_check_content, folder / name, records[name]) for name in weights]
        try:
            for name in others:
                _check_content(folder / name, records[name])
            yield manifest
        finally:
            for comparison in comparisons:
                comparison.result()


def _check_size(path: Path, expected: FileRecord) -> None:
    if not path.is_file():
        raise CheckpointError(f"`{path}` is missing. {_REMEDY}")
    size = path.stat().st_size
    if size != expected.size:
        what = "truncated" if size < expected.size else "longer than it was written"
        raise CheckpointError(f"`{path}` is {what}: {size} bytes instead of {expected.size}. {_REMEDY}")


def _check_content(path: Path, expected: FileRecord) -> None:
    if record_of(path) != expected:
        raise CheckpointError(f"`{path}` was changed: its sha256 is not the one in the manifest. {_REMEDY}")


_REMEDY = "Use another checkpoint, or copy this one again from where it came from."


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read `manifest.json` without reading the other files. Raises `CheckpointError` if it is missing or
    invalid."""
    path = Path(folder) / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"`{path}` has {path.stat().st_size} bytes, more than a manifest has: it is not read."
            )
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` is missing: the folder is not a complete checkpoint. {_REMEDY}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"`{path}` cannot be read ({error}). {_REMEDY}") from error
    try:
        content = json.loads(text)
        version = content["format"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CheckpointError(
                f"`{path}` has format {version}, this version reads {FORMAT_VERSION}: upgrade dmc_hub."
            )
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        manifest = Manifest(content["library_version"], files, dict(content["metadata"]))
        intact = text == manifest_text(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"`{path}` is not a valid manifest ({type(error).__name__}: {error}). {_REMEDY}"
        ) from error
    if not intact:
        raise CheckpointError(f"`{path}` was changed after it was written. {_REMEDY}")
    for name in files:
        if not _is_below(name):
            raise CheckpointError(f"`{path}` names a file outside its folder: {name!r}. Do not use this checkpoint.")
    return manifest


def _is_below(name: str) -> bool:
    """Whether a name in a manifest stays inside the folder, whatever the operating system that reads it."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and not set(name) & set("\\:\0")


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-<step>` in `output_dir`, by ascending step, verified or not."""
    found = []
    for path in Path(output_dir).iterdir() if Path(output_dir).is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match["step"]), path))
    return [path for _, path in sorted(found)]


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest `checkpoint-<step>` in `output_dir` that verifies, or None.

    Each newer one that does not verify is skipped with a warning that names the folder and the reason.
    """
    if Path(output_dir).is_dir():
        remove_stale(output_dir)
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify(folder)
        except CheckpointError as error:  # noqa: PERF203
            warnings.warn(f"Skipping the corrupt checkpoint `{folder}`: {error}", stacklevel=2)
        else:
            return folder
    return None


def prune(output_dir: str | os.PathLike[str], keep: int, protect: Iterable[Path] = ()) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, once the newest has been verified; return the deleted
    ones.

    Each is renamed to a hidden name before it is deleted, so that a half-deleted checkpoint never has a valid
    name.

    Raises:
        CheckpointError: if the newest does not verify. Nothing has been deleted then.
    """
    if keep < 1:
        raise ValueError(f"`keep` must be at least 1, got {keep}: the newest checkpoint is never deleted.")
    found = checkpoints(output_dir)
    protected = {Path(path).absolute() for path in protect}
    doomed = [folder for folder in found[:-keep] if folder.absolute() not in protected]
    if doomed:
        verify(found[-1])
    for folder in doomed:
        remove_folder(folder)
    return doomed


def remove_folder(folder: Path) -> None:
    """Delete a folder, if it is there, that is never half deleted under its name."""
    trash = _hidden(folder.absolute(), "trash")
    with suppress(FileNotFoundError):
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def record_of(path: Path) -> FileRecord:
    """Size and sha256 of a file, read block by block."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(max(path.stat().st_size, 1), 1 << 20)))
        while count := file.readinto(block):
            digest.update(block[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def manifest_text(manifest: Manifest) -> str:
    """The one text a manifest can have; its last key, a checksum of the others, makes any change of it
    visible."""
    content: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "library": "dmc_hub",
        "library_version": manifest.library_version,
        "metadata": manifest.metadata,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
    }
    content["sha256"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content, indent=2) + "\n"


# ---- States ------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """`safetensors.torch.save_file` of contiguous CPU copies: views, shared storage and any device are
    welcome."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(copies, path, metadata=metadata)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises `CheckpointError` if it is missing or
    unreadable."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` is missing: this checkpoint was saved without it.") from None
    except SafetensorError as error:
        raise CheckpointError(f"`{path}` is not a readable safetensors file: {error}") from error


def check_same_tensors(path: Path, loaded: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `CheckpointError`, naming `path`, unless both have the same names and shapes."""
    missing, unknown = sorted(expected.keys() - loaded.keys()), sorted(loaded.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"`{path}` does not fit the model: it lacks {missing[:3]} ({len(missing)} in all) and "
            f"has the unknown {unknown[:3]} ({len(unknown)} in all)."
        )
    for name, tensor in expected.items():
        got = tuple(loaded[name].shape)
        if got != tuple(tensor.shape):
            raise CheckpointError(f"`{path}`: {name} has shape {got}, the model's has {tuple(tensor.shape)}.")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file that is either the old one or the new one, whole, whenever the process dies."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def save_json(path: Path, content: Any) -> None:
    """`write_text` of `content` as JSON; floats keep every bit."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def load_json(path: Path) -> Any:
    """Read a JSON file. Raises `CheckpointError` if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"`{path}` is missing: this checkpoint was saved without it.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` is not JSON: {error}") from error


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, *, part: str = "") -> None:
    """Write an optimizer as `optimizer.safetensors` (every tensor) and `optimizer.json` (everything else).

    Of a sharded one each process writes its own `part`, which stands before the dot.

    Raises:
        ValueError: if the state holds something that is neither a tensor nor a number, text, bool or None.
    """
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    groups: list[dict[str, Any]] = [{} for _ in state["param_groups"]]
    for index, entries in state["state"].items():
        for name, value in entries.items():
            _put(f"state/{index}/{name}", name, value, tensors, scalars)
    for position, group in enumerate(state["param_groups"]):
        for name, value in group.items():
            _put(f"group/{position}/{name}", name, value, tensors, groups[position])
    save_tensors(folder / f"optimizer{part}.safetensors", tensors)
    save_json(
        folder / f"optimizer{part}.json",
        {"class": type(optimizer).__name__, "state": scalars, "param_groups": groups},
    )


def _put(key: str, name: str, value: Any, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
    if isinstance(value, torch.Tensor):
        tensors[key] = value
    elif value is None or isinstance(value, bool | int | float | str | list | tuple):
        plain[key if key.startswith("state/") else name] = value
    else:
        raise ValueError(f"The optimizer's `{name}` is a {type(value).__name__}, which a checkpoint cannot hold.")


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restore, bit for bit, what `save_optimizer` wrote, in one part or several, for an optimizer of the same class
    and parameters.

    Raises:
        CheckpointError: if the files are missing or of another kind of optimizer or other parameters.
    """
    parts = sorted(folder.glob("optimizer*.json")) or [folder / "optimizer.json"]
    contents = [load_json(path) for path in parts]
    tensors = {key: value for path in parts for key, value in load_tensors(path.with_suffix(".safetensors")).items()}
    try:
        states = {key: value for content in contents for key, value in content["state"].items()}
        _load_optimizer(optimizer, {**contents[0], "state": states}, tensors, folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"`{parts[0]}` is damaged ({type(error).__name__}: {error}).") from error


def _load_optimizer(
    optimizer: torch.optim.Optimizer, content: Any, tensors: Mapping[str, torch.Tensor], folder: Path
) -> None:
    if content["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"`{folder}` holds the state of a {content['class']}, not of a {type(optimizer).__name__}: "
            f"resume with the same `optim`."
        )
    expected = [len(group["params"]) for group in optimizer.param_groups]
    got = [len(group["params"]) for group in content["param_groups"]]
    if got != expected:
        raise CheckpointError(f"`{folder}` holds {got} optimised parameters per group, the model has {expected}.")
    groups = [
        {name: tuple(value) if isinstance(value, list) and name != "params" else value for name, value in group.items()}
        for group in content["param_groups"]
    ]
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **content["state"]}.items():
        kind, index, name = key.split("/", 2)
        (state.setdefault(int(index), {}) if kind == "state" else groups[int(index)])[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_rng_state(path: Path) -> None:
    """Write the states of the global generators of torch (CPU and current GPU), numpy and python to one
    file."""
    version, python_state, gauss_next = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one is meant
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "python": torch.tensor(python_state, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    plain = {"python": [version, gauss_next], "numpy": [kind, int(position), int(has_gauss), float(cached)]}
    save_tensors(path, tensors, metadata={"state": json.dumps(plain)})


def load_rng_state(path: Path) -> None:
    """Restore what `save_rng_state` wrote. Raises `CheckpointError` if the file is missing or incomplete."""
    tensors = load_tensors(path)
    try:
        _load_rng_state(path, tensors)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"`{path}` is damaged ({type(error).__name__}: {error}).") from error


def _load_rng_state(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        plain = json.loads((file.metadata() or {}).get("state", "{}"))
    missing = {"torch", "numpy", "python"} - tensors.keys() | {"numpy", "python"} - plain.keys()
    if missing:
        raise CheckpointError(f"`{path}` lacks the generator state of {', '.join(sorted(missing))}.")
    torch.set_rng_state(tensors["torch"])
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    version, gauss_next = plain["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss_next))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
