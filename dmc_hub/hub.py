"""Loading pipelines by what they say they are, from folders and from the Hub; pulling and describing repos."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import ModelCard

from dmc_hub import checkpoint, portable, publish, transfer
from dmc_hub.checkpoint import MANIFEST_NAME
from dmc_hub.pipelines import DiffuserPlannerPipeline, DiffusionPolicyPipeline

PIPELINES: dict[str, type[DiffuserPlannerPipeline] | type[DiffusionPolicyPipeline]] = {
    "DiffuserPlannerPipeline": DiffuserPlannerPipeline,
    "DiffusionPolicyPipeline": DiffusionPolicyPipeline,
}


def load_pipeline(
    name_or_path: str | os.PathLike[str], **options: Any
) -> DiffuserPlannerPipeline | DiffusionPolicyPipeline:
    """Load a saved planner or policy from a folder or the Hub, without a progress bar.

    Args:
        name_or_path: folder, or repo on the Hub.
        options: of `from_pretrained`, such as `revision`.

    Raises:
        FileNotFoundError: the folder holds no pipeline.
        HubError: the repo cannot be read.
        ValueError: it holds one of another kind, or files that are not those in its manifest, if it has one.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        repo_id = transfer.repo_id_of(name_or_path)
        places = ("revision", "token", "cache_dir", "local_files_only")
        snapshot = transfer.fetch(
            repo_id,
            wanted=lambda name: name == portable.INDEX_NAME,
            **{name: value for name, value in options.items() if name in places},
        )
        folder, options = snapshot.folder, {**options, "revision": snapshot.revision}
    name = portable.installed_class(portable.read_index(folder))
    if name not in PIPELINES:
        raise portable.UnreadableRepoError(f"`{name_or_path}` holds a {name}, not one of {', '.join(PIPELINES)}.")
    with _without_progress_bar():
        result: DiffuserPlannerPipeline | DiffusionPolicyPipeline = PIPELINES[name].from_pretrained(
            name_or_path, **options
        )
        return result


def pull(
    repo_id: str, folder: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> transfer.Snapshot:
    """Copy a repo's files into a new folder, once all of them have been compared with its manifest.

    Args:
        repo_id: `user/name`.
        folder: must not be there, or be empty.
        revision: branch, tag or commit.
        token: by default the one that is logged in.

    Raises:
        ValueError: the folder is there already.
        HubError: the repo cannot be read.
        CheckpointError: it does not hold what its manifest lists.
    """
    folder = Path(folder).absolute()
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"`{folder}` is there already: choose another folder.")
    snapshot = transfer.fetch(repo_id, revision=revision, token=token)
    stage = checkpoint.open_stage(folder)
    try:
        for name in (*snapshot.manifest.files, MANIFEST_NAME):
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot.folder / name, stage / name)
        checkpoint.verify(stage)
        os.replace(stage, folder)
    finally:
        checkpoint.discard_stage(stage)
    return snapshot


@dataclass(frozen=True)
class Description:
    """What a repo or folder is, as far as it can be told without loading it.

    Attributes:
        source: folder or repo.
        kind: `"pipeline"` or `"adapter"`.
        facts: name and value, in the order in which to show them.
        results: metric and value, of the card.
        doubts: why one should not load it; empty if it is safe to load.
    """

    source: str
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


def describe(
    name_or_path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Description:
    """Find out what a repo or folder is, whether it is complete, and whether this version can read it.

    Nothing is loaded, no code is run, and of a repo no weights are downloaded.

    Args:
        name_or_path: folder, or repo on the Hub.
        revision: branch, tag or commit of the repo.
        token: by default the one that is logged in.

    Raises:
        FileNotFoundError: no such folder.
        HubError: the repo cannot be read.
        ValueError: it is neither a pipeline nor an adapter, or its manifest is not valid.
    """
    folder, facts, doubts = Path(name_or_path), {}, []
    manifest = None
    if not folder.is_dir():
        repo_id = transfer.repo_id_of(name_or_path)
        snapshot = transfer.fetch(
            repo_id, wanted=lambda name: name.endswith((".json", ".md")), revision=revision, token=token
        )
        folder, manifest = snapshot.folder, snapshot.manifest
        facts["revision"] = snapshot.revision
        if unlisted := transfer.unlisted_files(repo_id, snapshot, token):
            facts["not in the manifest, never used"] = ", ".join(unlisted)
    elif (folder / MANIFEST_NAME).is_file():
        try:
            manifest = checkpoint.verify(folder)
        except checkpoint.CheckpointError as error:
            doubts.append(str(error))
    else:
        facts["manifest"] = "none: files cannot be compared with what was saved"
    kind = publish.kind_of(folder)
    if kind == "run":
        raise ValueError(f"`{name_or_path}` is a run: look at its pipeline/ or at its adapter/.")
    if manifest is not None:
        facts["written by"] = f"dmc_hub {manifest.library_version}"
        facts["size"] = f"{sum(record.size for record in manifest.files.values())} bytes"
    try:
        facts |= _pipeline_facts(folder) if kind == "pipeline" else _adapter_facts(folder, manifest)
        if manifest is not None and kind == "pipeline":
            portable.check_nothing_added(folder, manifest.files)
    except ValueError as error:
        doubts.append(str(error))
    return Description(str(name_or_path), kind, facts, _results(folder), tuple(doubts))


def _pipeline_facts(folder: Path) -> dict[str, Any]:
    index = portable.check_loadable(folder, list(PIPELINES), trust_remote_code=False)
    named = portable.installed_names(index)
    components = {name: value[1] for name, value in named.items() if isinstance(value, list) and value[0] is not None}
    return {"class": portable.installed_class(index), **(portable.task_of(index) or {}), "components": components}


def _adapter_facts(folder: Path, manifest: checkpoint.Manifest | None) -> dict[str, Any]:
    config = portable.read_json(folder / publish.ADAPTER_CONFIG)
    weights = folder / publish.ADAPTER_WEIGHTS
    fingerprint = manifest.metadata.get("fingerprint") if manifest is not None else None
    if fingerprint is None and weights.is_file():
        fingerprint = portable.read_metadata(weights).get("base_fingerprint")
    return {
        "base": config.get("base_model_name_or_path"),
        "base revision": config.get("revision"),
        "base fingerprint": fingerprint,
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
    }


def _results(folder: Path) -> dict[str, Any]:
    """The card's metrics; none if there is no card that huggingface_hub can read."""
    path = folder / publish.CARD_NAME
    if not path.is_file() or path.stat().st_size > portable.MAX_JSON_BYTES:
        return {}
    try:
        results = ModelCard(path.read_text(encoding="utf-8")).data.get("eval_results") or []
    except Exception:  # whatever a broken card makes of YAML
        return {}
    shown = {}
    for result in results:
        arguments = result.metric_args if isinstance(result.metric_args, dict) else {}
        std = f" ± {arguments['std']:.2f}" if isinstance(arguments.get("std"), float) else ""
        shown[f"{result.metric_name}"] = f"{result.metric_value}{std} ({arguments.get('episodes', '?')} episodes)"
    return shown


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    wanted = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if wanted:
            logging.enable_progress_bar()
