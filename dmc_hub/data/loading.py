"""The one way to open data: a raw file of any format, a converted or saved folder, a dataset on the Hub."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from tqdm import tqdm

from dmc_hub import checkpoint
from dmc_hub.data.conversion import convert, is_converted, name_of
from dmc_hub.data.episodes import Episodes
from dmc_hub.data.readers import READERS, EpisodeSource, detect_format, open_source
from dmc_hub.data.validation import DatasetDefectsError, missing_shards
from dmc_hub.version import __version__

MAX_CARD_BYTES = 1 << 20


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
    options: dict[str, Any] = {"format": format, "config": config, "split": split, "revision": revision, "token": token}
    return Episodes.from_dataset(open_dataset(source, **options, **reader_options))


def open_dataset(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    token: str | None = None,
    **reader_options: Any,
) -> datasets.Dataset:
    """What `load_episodes` reads, as it is, for `validate_dataset`.

    Raises:
        ValueError: as `open_source` and `convert`; an option that the source has not, shards that are missing, or a
            card that names files outside the folder.
        CheckpointError: a converted folder is not complete.
    """
    path = Path(source)
    if format is None and is_converted(path):
        _refuse_options(source, reader_options, config=config)
        return _open_converted(path)
    if format is None and path.exists():
        format = detect_format(path)
        if format is None and (path.is_file() or reader_options):
            open_source(path)  # says which formats there are
    if format is None:
        _refuse_options(source, reader_options)
        if path.is_dir():
            _check_folder(path)
        else:
            revision = _checked_revision(os.fspath(source), revision, token)
        return datasets.load_dataset(os.fspath(source), config, split=split, revision=revision, token=token)
    if config is not None or split != "train":
        raise ValueError(f"`{source}` is a file of {format}: give options of its reader, not `config` or `split`.")
    raw = open_source(path, format, **reader_options)
    folder = cache_folder(raw)
    if not is_converted(folder):
        tqdm.write(f"converting {raw.name}, once, into {folder}", file=sys.stderr)
        convert(raw, folder)
    return _open_converted(folder)


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


def _check_folder(folder: Path) -> None:
    """Refuse a folder of `save_dataset` that is not whole, and one whose card reads other folders."""
    missing = missing_shards(folder)
    if missing:
        raise DatasetDefectsError(f"`{folder}` is not whole: {'; '.join(defect.message for defect in missing)}.")
    card = folder / "README.md"
    if card.is_file() and card.stat().st_size <= MAX_CARD_BYTES:
        check_card(card.read_text(encoding="utf-8", errors="replace"), str(folder))


def _checked_revision(repo_id: str, revision: str | None, token: str | None) -> str | None:
    """The commit of a repo whose card was looked at; offline, what was asked for and downloaded before."""
    try:
        commit = HfApi(token=token).dataset_info(repo_id, revision=revision).sha
        card = hf_hub_download(repo_id, "README.md", repo_type="dataset", revision=commit, token=token)
    except EntryNotFoundError:
        return revision
    except (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
        return revision  # what is wrong `load_dataset` says
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore"):
            raise
        return revision
    check_card(Path(card).read_text(encoding="utf-8", errors="replace")[:MAX_CARD_BYTES], repo_id)
    return commit


def check_card(text: str, name: str) -> None:
    """Refuse a dataset's card whose `configs` name files outside its folder: `datasets` would read them.

    Raises:
        ValueError: naming the path, or what is wrong with the card's header.
    """
    match = re.match(r"\s*---[^\n]*\n(.*?)\n---", text, re.DOTALL)
    if match is None:
        return
    try:
        header = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(
            f"`{name}`: the header of README.md is not YAML: {' '.join(str(error).split())[:200]}."
        ) from error
    configs = header.get("configs") if isinstance(header, dict) else None
    for path in _texts([configs] if not isinstance(configs, list) else [_paths_of(entry) for entry in configs]):
        if ".." in PurePosixPath(path).parts or path.startswith(("/", "~", "\\")) or "://" in path:
            raise ValueError(f"`{name}`: README.md names the data file {path!r}, outside the folder. Do not use it.")


def _paths_of(config: Any) -> Any:
    return [config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else config


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _refuse_options(source: str | os.PathLike[str], options: dict[str, Any], **others: Any) -> None:
    given = sorted([*options, *(name for name, value in others.items() if value is not None)])
    if given:
        raise ValueError(
            f"`{source}` is not a raw file of {', '.join(READERS)}; {', '.join(given)} can only be given for one."
        )
