"""Publishing a saved pipeline, an adapter or a whole run: what belongs to it, its card, and one commit."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmc_hub import cards, checkpoint, portable, transfer
from dmc_hub.transfer import Bundle, HubError
from dmc_hub.version import __version__

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
DIFFUSERS_ADAPTER_WEIGHTS = "pytorch_lora_weights.safetensors"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class Published:
    """Where something was pushed: the repo and the hash of its commit."""

    repo_id: str
    revision: str


def kind_of(folder: Path) -> str:
    """`"pipeline"`, `"adapter"` or `"run"`.

    Raises:
        ValueError: the folder is none of them.
    """
    if (folder / portable.INDEX_NAME).is_file():
        return "pipeline"
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    if (folder / "pipeline").is_dir() and (folder / "adapter").is_dir():
        return "run"
    raise ValueError(
        f"`{folder}` holds no {portable.INDEX_NAME} (a pipeline), no {ADAPTER_CONFIG} (an adapter) and no pipeline/ "
        "beside adapter/ (a run): there is nothing to push."
    )


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    adapter_repo_id: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
) -> list[Published]:
    """Push a saved pipeline, an adapter, or both of a run; repeating it pushes only what has changed.

    Files beside those that belong to a pipeline or an adapter are not pushed. A card and the pictures are added from
    the run's report, where the folder lies in a run.

    Args:
        folder: of `save_pretrained`, of `save_lora_weights`, or of `dmc-hub align`.
        repo_id: repo of the pipeline, or of the adapter if the folder is one.
        adapter_repo_id: repo of a run's adapter; `repo_id` and "-lora" by default.
        base_model: repo of the pipeline that an adapter fits; for a run it is `repo_id`.
        base_revision: commit of that repo.
        private: visibility of new repos.
        revision: branch to push to.
        token: by default the one that is logged in.
        message: of the commit.

    Returns:
        One entry for each repo, the pipeline's first.

    Raises:
        ValueError: the folder holds nothing to push, or something that must not be.
        HubError: the push failed; the message ends with the command that repeats it. Nothing local was changed.
    """
    folder = Path(folder)
    kind, options = kind_of(folder), {"private": private, "revision": revision, "token": token}
    if kind != "run" and adapter_repo_id is not None:
        raise ValueError(f"`adapter_repo_id` is for a run; `{folder}` is {_article(kind)}.")
    if kind != "adapter" and (base_model is not None or base_revision is not None):
        raise ValueError(f"`base_model` is for an adapter; `{folder}` is {_article(kind)}.")
    command = _command(folder, repo_id, adapter_repo_id, base_model, base_revision, private, revision)
    try:
        if kind == "adapter":
            bundle = adapter_bundle(folder, repo_id, base_model=base_model, base_revision=base_revision)
            return [_push(bundle, repo_id, message or "Upload adapter", options)]
        if kind == "pipeline":
            return [_push(pipeline_bundle(folder, repo_id), repo_id, message or "Upload pipeline", options)]
        adapter_repo_id = adapter_repo_id or f"{repo_id}-lora"
        changed = folder / "pipeline-after"  # with what alignment trained beside the adapter
        source = changed if changed.is_dir() else folder / "pipeline"
        pipeline = pipeline_bundle(source, repo_id, adapter_repo_id=adapter_repo_id)
        base = _push(pipeline, repo_id, message or "Upload pipeline", options)
        adapter = adapter_bundle(folder / "adapter", adapter_repo_id, base_model=repo_id, base_revision=base.revision)
        return [base, _push(adapter, adapter_repo_id, message or "Upload adapter", options)]
    except HubError as error:
        raise HubError(f"{error} Nothing on this machine was changed; repeat the push with: {command}") from error


def pipeline_bundle(folder: Path, repo_id: str, *, adapter_repo_id: str | None = None) -> Bundle:
    """What is pushed of a saved pipeline.

    Raises:
        ValueError: the folder is damaged, or holds a component whose code does not travel.
    """
    manifest = _verified(folder)
    index = portable.read_index(folder)
    portable.check_travels(folder, index)
    files: dict[str, Path | bytes] = {name: folder / name for name in portable.pipeline_files(folder)}
    report, pictures = _report_of(folder)
    facts = index[portable.FACTS]
    card = cards.pipeline_card(
        report,
        class_name=index["_class_name"][1],
        facts=facts["task"],
        repo_id=repo_id,
        adapter_repo_id=adapter_repo_id,
        pictures=list(pictures),
    )
    return _bundle("pipeline", files, manifest, card, report, pictures, facts["version"])


def adapter_bundle(folder: Path, repo_id: str, *, base_model: str | None, base_revision: str | None) -> Bundle:
    """What is pushed of an adapter; its configuration names the base's repo."""
    manifest = _verified(folder)
    names = [name for name in (ADAPTER_WEIGHTS, DIFFUSERS_ADAPTER_WEIGHTS) if (folder / name).is_file()]
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    config = portable.read_json(folder / ADAPTER_CONFIG)
    if base_model is None:  # what it was trained on, if that came from the Hub
        base_model, base_revision = config.get("base_model_name_or_path"), config.get("revision")
    config |= {"base_model_name_or_path": base_model, "revision": base_revision}
    files[ADAPTER_CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    header = portable.read_metadata(folder / ADAPTER_WEIGHTS)
    report, pictures = _report_of(folder)
    if report is not None and report["base_fingerprint"] != header.get("base_fingerprint"):
        report, pictures = None, {}  # of another run's adapter
    card = cards.adapter_card(
        report,
        repo_id=repo_id,
        base_model=base_model,
        base_revision=base_revision,
        fingerprint=header.get("base_fingerprint"),
        pictures=list(pictures),
    )
    facts = {"base_model": base_model, "base_revision": base_revision, "fingerprint": header.get("base_fingerprint")}
    return _bundle("adapter", files, manifest, card, report, pictures, None, facts)


def _bundle(
    kind: str,
    files: Mapping[str, Path | bytes],
    manifest: checkpoint.Manifest | None,
    card: str,
    report: Mapping[str, Any] | None,
    pictures: Mapping[str, Path],
    version: str | None,
    facts: Mapping[str, Any] | None = None,
) -> Bundle:
    added: dict[str, Path | bytes] = {CARD_NAME: card.encode(), **pictures}
    if report is not None:
        added[cards.REPORT_NAME] = (json.dumps(report, indent=2) + "\n").encode()
    version = manifest.library_version if manifest is not None else version
    metadata = {"kind": kind, **(facts or {})}
    return Bundle({**files, **added}, metadata, version or __version__)


def _verified(folder: Path) -> checkpoint.Manifest | None:
    return checkpoint.verify(folder) if (folder / checkpoint.MANIFEST_NAME).is_file() else None


def _report_of(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Path]]:
    """The report and the pictures of the run that a folder lies in, if it does."""
    run = folder.absolute().parent
    if not (run / cards.REPORT_NAME).is_file():
        return None, {}
    return cards.read_report(run / cards.REPORT_NAME), cards.pictures_in(run)


def _push(bundle: Bundle, repo_id: str, message: str, options: Mapping[str, Any]) -> Published:
    return Published(repo_id, transfer.push(bundle, repo_id, message=message, **options))


def _command(
    folder: Path,
    repo_id: str,
    adapter_repo_id: str | None,
    base_model: str | None,
    base_revision: str | None,
    private: bool | None,
    revision: str | None,
) -> str:
    options = {
        "folder": str(folder),
        "repo-id": repo_id,
        "adapter-repo-id": adapter_repo_id,
        "base-model": base_model,
        "base-revision": base_revision,
        "private": None if private is None else str(private).lower(),
        "revision": revision,
    }
    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return shlex.join(["dmc-hub", "push", *words])


def _article(kind: str) -> str:
    return "an adapter" if kind == "adapter" else f"a {kind}"
