"""Readers of other libraries' data: each streams its episodes, one at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dmc_hub.data.readers.d4rl import D4RLSource
from dmc_hub.data.readers.lerobot import LeRobotSource
from dmc_hub.data.readers.minari import MinariSource
from dmc_hub.data.readers.recording import record_episodes
from dmc_hub.data.readers.relay_kitchen import RelayKitchenSource
from dmc_hub.data.readers.replay_zarr import ReplayZarrSource
from dmc_hub.data.readers.robomimic import RobomimicSource
from dmc_hub.data.readers.source import Contents, EpisodeSource

READERS: dict[str, type[EpisodeSource]] = {
    reader.format: reader
    for reader in (D4RLSource, RobomimicSource, ReplayZarrSource, RelayKitchenSource, MinariSource, LeRobotSource)
}
"""By name of the format; `reads` is asked in this order."""


def open_source(path: str | os.PathLike[str], format: str | None = None, **options: Any) -> EpisodeSource:
    """The reader of a file or folder.

    Args:
        path: the file or folder; with the format "minari" also a dataset's id, with "lerobot" a repository on the Hub.
        format: one of `READERS`; by default found out from magic bytes, keys and names of files.
        options: of the reader: the fields of its class.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: an unknown format or option, or a file of no known format.
    """
    if format is None and not Path(path).exists():
        raise FileNotFoundError(f"`{path}` does not exist.")
    if format is None:
        format = detect_format(Path(path))
    if format is None:
        raise ValueError(
            f"`{path}` has no format that is known. Formats are {', '.join(READERS)}: give one as `format`."
        )
    if format not in READERS:
        raise ValueError(f"`format` {format!r} is unknown; formats are {', '.join(READERS)}.")
    reader = READERS[format]
    unknown = sorted(set(options) - set(reader.option_names()))
    if unknown:
        raise ValueError(
            f"The reader of {format} has no option {', '.join(unknown)}; its options are "
            f"{', '.join(reader.option_names())}."
        )
    return reader(**{"path": reader.locate(os.fspath(path), options), **options})


def detect_format(path: Path) -> str | None:
    """The name of the format of an existing file or folder, None if no reader knows it."""
    return next((name for name, reader in READERS.items() if reader.reads(path)), None)


__all__ = [
    "READERS",
    "Contents",
    "D4RLSource",
    "EpisodeSource",
    "LeRobotSource",
    "MinariSource",
    "RelayKitchenSource",
    "ReplayZarrSource",
    "RobomimicSource",
    "detect_format",
    "open_source",
    "record_episodes",
]
