"""The one way to open data: a raw file of any format, a converted or saved folder, a dataset on the Hub."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from dmc_hub import checkpoint
from dmc_hub.data.conversion import convert, is_converted, name_of
from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers import READERS, EpisodeSource, detect_format, open_source
from dmc_hub.version import __version__


def load_episodes(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    token: str | None = None,
    **reader_options: Any,
) -> Episodes:
    """Episodes of whatever `source` is, mapped into memory.

    A file or folder of one of the formats of `READERS` is converted once, into a folder below that of the datasets
    library's cache, and found again there while file, options and version are the same.

    Args:
        source: a raw file or folder; a folder of `convert`, of `Dataset.save_to_disk` or of `save_dataset`; or a
            repository on the Hub.
        format: of a raw file; found out by default. A Minari dataset by its id and a LeRobotDataset on the Hub need it.
        config: of a saved folder or repository; the first one by default.
        split: of a saved folder or repository.
        revision: of a repository.
        token: of the Hub.
        reader_options: of a raw file: the fields of its reader.

    Raises:
        ValueError: as `open_source`, `convert` and `Episodes.from_dataset`; or an option that the source has not.
        CheckpointError: a converted folder is not complete.
    """
    path = Path(source)
    if format is None and is_converted(path):
        _refuse_options(source, reader_options, config=config)
        return Episodes.from_dataset(_open_converted(path))
    if format is None and path.exists():
        format = detect_format(path)
        if format is None and (path.is_file() or reader_options):
            open_source(path)  # says which formats there are
    if format is None:
        _refuse_options(source, reader_options)
        dataset = datasets.load_dataset(os.fspath(source), config, split=split, revision=revision, token=token)
        return Episodes.from_dataset(dataset)
    if config is not None or split != "train":
        raise ValueError(f"`{source}` is a file of {format}: give options of its reader, not `config` or `split`.")
    raw = open_source(path, format, **reader_options)
    folder = cache_folder(raw)
    if not is_converted(folder):
        tqdm.write(f"converting {raw.name}, once, into {folder}", file=sys.stderr)
        convert(raw, folder)
    return Episodes.from_dataset(_open_converted(folder))


def cache_folder(source: EpisodeSource) -> Path:
    """Where a source is converted to: the name is a digest of its files' names, sizes and times, its options, and this
    library's version.

    Raises:
        ValueError: an option is a function without a name of its own, so that it could not be told from another.
    """
    assert source.path is not None
    path = source.path.resolve()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    identity = {
        "version": __version__,
        "format": source.format,
        "options": source.options(),
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
    digest = hashlib.sha256(json.dumps(identity, default=_identity_of_option).encode()).hexdigest()[:16]
    return Path(datasets.config.HF_DATASETS_CACHE) / "dmc_hub" / f"{path.stem}-{digest}"


def _identity_of_option(value: Any) -> Any:
    if not callable(value):
        return repr(value)
    name = name_of(value) if inspect.isfunction(value) else "<lambda>"
    if "<" in name:
        raise ValueError(
            f"The option {value!r} has no name to find its results by: pass a function of a module, or convert the data"
            " with `dmc_hub.data.convert` and load the folder."
        )
    return [name, inspect.getsource(value)]


def _open_converted(folder: Path) -> datasets.Dataset:
    if (folder / checkpoint.MANIFEST_NAME).is_file():
        for name, record in checkpoint.read_manifest(folder).files.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != record.size:
                raise checkpoint.CheckpointError(
                    f"`{folder / name}` should have {record.size} bytes and has {size}: delete `{folder}` and convert "
                    "the data again."
                )
    return datasets.load_from_disk(os.fspath(folder), keep_in_memory=False)


def _refuse_options(source: str | os.PathLike[str], options: dict[str, Any], **others: Any) -> None:
    given = sorted([*options, *(name for name, value in others.items() if value is not None)])
    if given:
        raise ValueError(
            f"`{source}` is not a raw file of {', '.join(READERS)}; {', '.join(given)} can only be given for one."
        )
