"""HDF5 without surprises: no link leaves the file, and nothing is read that declares more than it can hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from dmc_hub.data.readers.source import BLOCK_BYTES, MAX_CHUNK_BYTES, check_expansion, check_numeric
from dmc_hub.errors import DmcHubError

MAGIC = b"\x89HDF\r\n\x1a\n"


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """Open a file for reading.

    Raises:
        ImportError: h5py is not installed.
        ValueError: it is not an HDF5 file, or a truncated one.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError('HDF5 files are read by h5py: `pip install "dmc_hub[hdf5]"`.') from error
    if not is_hdf5(path):
        raise ValueError(f"`{path}` is not an HDF5 file.")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"`{path}` is not a whole HDF5 file: {error}. Copy it again.") from error
    with file:
        try:
            yield file
        except (RuntimeError, OSError, KeyError, TypeError, OverflowError) as error:  # what HDF5 makes of damaged bytes
            if isinstance(error, DmcHubError):
                raise
            raise ValueError(f"`{path}` is damaged ({error}). Copy it again.") from error


def is_hdf5(path: Path) -> bool:
    """Whether a file starts as HDF5 files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def find(file: Any, key: str) -> Any:
    """The group or dataset at `key`, None if there is none.

    Raises:
        ValueError: a link on the way, which could lead out of the file.
    """
    import h5py

    node = file
    for part in key.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise ValueError(f"`{file.filename}`: {key!r} is a link to {link.path!r}; only data in the file is read.")
        node = node[part]
    return node


def members(file: Any, key: str) -> list[str]:
    """Sorted names in the group at `key`; none if there is no such group."""
    import h5py

    node = find(file, key)
    return sorted(node) if isinstance(node, h5py.Group) else []


def array(file: Any, key: str) -> Any:
    """The dataset at `key`, of numbers that lie in the file itself.

    Raises:
        ValueError: missing, not numbers, stored outside the file, or in chunks that are too large.
    """
    import h5py

    name, node = file.filename, find(file, key)
    if not isinstance(node, h5py.Dataset):
        raise ValueError(f"`{name}` lacks the array {key!r}; it has {sorted(array_keys(file))[:40]}.")
    if node.is_virtual or node.external:
        raise ValueError(f"`{name}`: {key!r} is stored outside the file; only data in the file is read.")
    check_numeric(name, key, node.dtype)
    if node.shape is None:
        raise ValueError(f"`{name}`: {key!r} is empty.")
    if node.chunks is not None and np.prod(node.chunks, dtype=float) * node.dtype.itemsize > MAX_CHUNK_BYTES:
        raise ValueError(f"`{name}`: {key!r} has chunks of {node.chunks}, more than {MAX_CHUNK_BYTES >> 20} MiB each.")
    return node


def walk(group: Any) -> Iterator[tuple[str, Any]]:
    """Key and node of every group and dataset below a group, each once; a link is None and not followed."""
    import h5py

    seen: set[int] = set()
    open_groups = [("", group)]
    while open_groups:
        prefix, parent = open_groups.pop()
        for name in parent:
            is_inside = isinstance(parent.get(name, getlink=True), h5py.HardLink)
            node = parent[name] if is_inside else None
            yield prefix + name, node
            if isinstance(node, h5py.Group) and (address := h5py.h5o.get_info(node.id).addr) not in seen:
                seen.add(address)
                open_groups.append((f"{prefix}{name}/", node))


def array_keys(group: Any, limit: int = 10_000) -> list[str]:
    """Keys of the datasets below a group, at most `limit`."""
    import h5py

    return list(islice((key for key, node in walk(group) if isinstance(node, h5py.Dataset)), limit))


def check_sizes(file: Any, arrays: Mapping[str, Any]) -> None:
    """`check_expansion` of some datasets of a file."""
    check_expansion(
        file.filename, {key: node.nbytes for key, node in arrays.items()}, Path(file.filename).stat().st_size
    )


def describe(node: Any) -> str:
    """Type and shape of a dataset, for people."""
    return f"{node.dtype} {tuple(node.shape)}"


def read_rows(node: Any, start: int, stop: int) -> np.ndarray:
    """Rows of a dataset.

    Raises:
        ValueError: naming file and key, when they cannot be read.
    """
    try:
        return cast(np.ndarray, node[start:stop])
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"`{node.file.filename}`: {node.name.lstrip('/')!r} cannot be read from row {start}: {error}. "
            "The file is damaged; copy it again."
        ) from error


def row_blocks(arrays: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Starts and ends of slices of about `BLOCK_BYTES` of arrays of one length, in whole chunks where that is small."""
    nodes = list(arrays.values())
    count = len(nodes[0])
    row_bytes = sum(node.dtype.itemsize * int(np.prod(node.shape[1:])) for node in nodes)
    chunk_rows = max((node.chunks[0] for node in nodes if node.chunks), default=1)
    rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    rows = rows // chunk_rows * chunk_rows or rows
    for start in range(0, count, rows):
        yield start, min(start + rows, count)


def check_file(file: Any) -> None:
    """Refuse a file of which something is a link or lies outside, or that declares more than it can hold.

    Raises:
        ValueError: naming file and key.
    """
    import h5py

    arrays = {}
    for key, node in walk(file):
        if node is None or (isinstance(node, h5py.Dataset) and (node.is_virtual or node.external)):
            raise ValueError(f"`{file.filename}`: {key!r} is a link or stored outside; only data in the file is read.")
        if isinstance(node, h5py.Dataset):
            arrays[key] = node
    check_sizes(file, arrays)
