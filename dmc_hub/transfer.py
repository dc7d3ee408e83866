"""To the Hub and back: the files of a manifest and no others, compared by checksum on both ways.

A bundle is pushed as one commit on top of the head that it was compared with. After any failure that may be an
accident of the network the head is read again: what has landed is never sent twice, and what is half there never
becomes a commit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from huggingface_hub.utils.sha import git_hash

from dmc_hub import checkpoint
from dmc_hub.checkpoint import MANIFEST_NAME, CheckpointError, FileRecord, Manifest
from dmc_hub.errors import DmcHubError
from dmc_hub.version import __version__

_T = TypeVar("_T")
NUM_TRIES = 5
REQUEST_SECONDS = 120.0
"""How long a request may go without a byte; huggingface_hub itself waits for ever."""
MAX_MANIFEST_BYTES = 4 << 20
SUFFIXES = (".safetensors", ".parquet", ".json", ".py", ".md", ".png", ".gif", ".mp4")
"""Kinds of files that travel. None is ever unpickled."""
_PERMANENT = (400, 401, 402, 403, 404, 413)


class HubError(DmcHubError, OSError):
    """What stands between this machine and a repo on the Hub, and what to do about it."""


@dataclass(frozen=True)
class Bundle:
    """What is pushed.

    Attributes:
        files: where the content of each file of the repo is: a path on this machine, or bytes.
        metadata: JSON-ready facts for the manifest.
        library_version: the dmc_hub that wrote the files.
    """

    files: Mapping[str, Path | bytes]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    library_version: str = __version__

    def with_manifest(self) -> dict[str, Path | bytes]:
        """The files, and the manifest of them.

        Raises:
            ValueError: a symlink, something that is no file, a hidden name, or a kind of file that does not travel.
        """
        for name, content in self.files.items():
            _check_travels(name, content)
        records = {name: _record(content) for name, content in sorted(self.files.items())}
        manifest = Manifest(self.library_version, records, dict(self.metadata))
        return {**self.files, MANIFEST_NAME: checkpoint.manifest_text(manifest).encode()}


@dataclass(frozen=True)
class Snapshot:
    """A repo as it was at one commit, on this machine.

    Attributes:
        folder: the downloaded files.
        manifest: of the repo; files that were not wanted are in it, but not in `folder`.
        revision: the commit's hash.
    """

    folder: Path
    manifest: Manifest
    revision: str


# ---- Pushing


def check_access(repo_id: str, token: str | None = None) -> None:
    """Find out, before anything expensive is done, whether `repo_id` can be written. Creates nothing.

    Raises:
        ValueError: not the name of a repo.
        HubError: no token, one that is not valid or may not write there, or no way to the Hub.
    """
    _check_repo_id(repo_id)
    try:
        with _limited_waiting():
            user = HfApi(token=token).whoami()
    except LocalTokenNotFoundError as error:
        raise HubError(f"Pushing to `{repo_id}` needs a token: `hf auth login`, or set HF_TOKEN.") from error
    except Exception as error:
        raise _explained(error, f"`{repo_id}` cannot be pushed to") from error
    allowed = [user["name"], *(org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read")]
    namespace = repo_id.partition("/")[0]
    if namespace not in allowed:
        raise HubError(f"`{repo_id}` is not yours to write: this token is for {', '.join(allowed)}.")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"Pushing to `{repo_id}` needs a token with the role write; this one can only read.")


def push(
    bundle: Bundle,
    repo_id: str,
    *,
    message: str,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """Make a repo hold the bundle, in one commit; returns the hash of the commit that does.

    Files of an earlier bundle that this one lacks are deleted; what never was in a manifest is left alone. Where the
    repo already holds the bundle nothing is committed, so that repeating a push is safe.

    Args:
        bundle: what to push.
        repo_id: `user/name`; created if it is not there.
        message: of the commit.
        repo_type: "model" or "dataset".
        private: visibility of a new repo; the namespace's default if None.
        revision: branch; main by default. A new one starts at main.
        token: by default the one that is logged in.

    Raises:
        ValueError: something in the bundle must not travel, or the card's metadata is not valid.
        HubError: refused, or still failing after `NUM_TRIES` tries. The repo is as it was then.
    """
    _check_repo_id(repo_id)
    files = bundle.with_manifest()
    repo = _Repo(HfApi(token=token), repo_id, repo_type, revision)
    try:
        with _limited_waiting():
            _repeated(lambda: repo.open(private))
            return _repeated(lambda: repo.commit_difference(files, message))
    except Exception as error:
        tried = f"did not take the commit in {NUM_TRIES} tries" if _may_pass(error) else "was not changed"
        raise _explained(error, f"`{repo_id}` {tried}") from error


@dataclass(frozen=True)
class _Repo:
    """A branch of a repo that is pushed to."""

    api: HfApi
    repo_id: str
    repo_type: str
    revision: str | None

    def open(self, private: bool | None) -> None:
        """Create what is not there."""
        self.api.create_repo(self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True)
        if self.revision is not None:
            self.api.create_branch(self.repo_id, repo_type=self.repo_type, branch=self.revision, exist_ok=True)

    def commit_difference(self, files: Mapping[str, Path | bytes], message: str) -> str:
        """Commit what differs between the head and `files`, then read the new head; the hash once nothing differs."""
        for _ in range(2):
            head = self.api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.revision).sha
            assert head is not None
            tree = self.api.list_repo_tree(self.repo_id, repo_type=self.repo_type, recursive=True, revision=head)
            remote = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            added = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
                for name, content in files.items()
                if name not in remote or not _is_same(remote[name], content)
            ]
            if not added:
                return head
            gone = self._files_of_last_bundle(head, remote) & (remote.keys() - files.keys())
            self.api.create_commit(
                self.repo_id,
                [*added, *(CommitOperationDelete(path_in_repo=name) for name in sorted(gone))],
                commit_message=message,
                repo_type=self.repo_type,
                revision=self.revision,
                parent_commit=head,
                num_threads=2,
            )
        raise ConnectionError("the repo does not hold what was committed: another push, or a fault of the server")

    def _files_of_last_bundle(self, head: str, remote: Mapping[str, RepoFile]) -> set[str]:
        """What the manifest in the repo lists; nothing if there is none that can be read."""
        if MANIFEST_NAME not in remote or remote[MANIFEST_NAME].size > MAX_MANIFEST_BYTES:
            return set()
        path = hf_hub_download(
            self.repo_id, MANIFEST_NAME, repo_type=self.repo_type, revision=head, token=self.api.token
        )
        try:
            return set(checkpoint.read_manifest(Path(path).parent).files)
        except CheckpointError:
            return set()


def _is_same(remote: RepoFile, content: Path | bytes) -> bool:
    """Whether the Hub's entry of a file, an LFS pointer or a git blob, is of this content."""
    if remote.lfs is not None:
        record = _record(content)
        return (remote.lfs.size, remote.lfs.sha256) == (record.size, record.sha256)
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    return remote.size == size and remote.blob_id == git_hash(_bytes(content))


def _record(content: Path | bytes) -> FileRecord:
    if isinstance(content, bytes):
        return FileRecord(len(content), sha256(content).hexdigest())
    return checkpoint.record_of(content)


def _bytes(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _check_travels(name: str, content: Path | bytes) -> None:
    if isinstance(content, Path):
        if content.is_symlink():
            raise ValueError(f"`{content}` is a symlink: what it points to is not pushed. Copy the file there.")
        if not content.is_file():
            raise ValueError(f"`{content}` is missing or no regular file.")
    _check_name(name)


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or path.suffix not in SUFFIXES:
        raise ValueError(f"{name!r} is not a file that a repo of dmc_hub holds ({', '.join(SUFFIXES)}).")


# ---- Fetching


def fetch(
    repo_id: str,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    verify: bool = True,
) -> Snapshot:
    """Download what a repo's manifest lists, all of one commit, and compare each file with its sha256.

    A file that is not what the manifest says is downloaded once more, in case a copy on this machine is damaged.
    Without a connection, what was downloaded before is used.

    Args:
        repo_id: `user/name`.
        wanted: which files of the manifest to download.
        revision: branch, tag or commit; main by default.
        token: by default the one that is logged in.
        cache_dir: huggingface_hub's by default.
        local_files_only: use only what was downloaded before.
        force_download: download even what was downloaded before.
        verify: whether to compare checksums; the manifest's own is compared in any case.

    Raises:
        HubError: no such repo or revision, no access, no manifest, or a download that fails.
        CheckpointError: the manifest is not valid, lists what no repo of dmc_hub holds, or is not kept.
    """
    _check_repo_id(repo_id)

    def download(name: str, commit: str | None, force: bool) -> Path:
        path = _repeated(
            lambda: hf_hub_download(
                repo_id,
                name,
                revision=commit,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force,
            )
        )
        return Path(path)

    try:
        with _limited_waiting():
            if not local_files_only and not constants.HF_HUB_OFFLINE:
                _check_manifest_is_there(repo_id, revision, token)
            path = download(MANIFEST_NAME, revision, force_download)
            manifest, commit = _trusted_manifest(path, repo_id), path.parent.name
            for name, record in manifest.files.items():
                if not wanted(name):
                    continue
                file = download(name, commit, force_download)
                if verify and checkpoint.record_of(file) != record:
                    _check_second(download(name, commit, True), name, record, repo_id)
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"`{repo_id}`{_at(revision)} was not downloaded before, and the Hub cannot be reached or must not be "
            "asked (HF_HUB_OFFLINE, `local_files_only`)."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"`{repo_id}`{_at(revision)} lacks a file: {_first_line(error)}") from error
    except (CheckpointError, HubError):
        raise
    except Exception as error:
        raise _explained(error, f"`{repo_id}`{_at(revision)} cannot be read") from error
    return Snapshot(path.parent, manifest, commit)


def _check_manifest_is_there(repo_id: str, revision: str | None, token: str | None) -> None:
    """Before anything is downloaded; a Hub that does not answer is left to the download, which can use the cache."""
    try:
        info = HfApi(token=token).model_info(repo_id, revision=revision, files_metadata=True)
    except Exception as error:
        if _may_pass(error):
            return
        raise
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    if MANIFEST_NAME not in sizes:
        raise HubError(
            f"`{repo_id}`{_at(revision)} has no {MANIFEST_NAME}: it was not pushed by dmc_hub, or by a version from "
            "before there were manifests. Use the library that wrote it, or push it again."
        )
    if (sizes[MANIFEST_NAME] or 0) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"`{repo_id}` has a {MANIFEST_NAME} of {sizes[MANIFEST_NAME]} bytes: it is not read.")


def _trusted_manifest(path: Path, repo_id: str) -> Manifest:
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"`{repo_id}` has a {MANIFEST_NAME} of {path.stat().st_size} bytes: it is not read.")
    manifest = checkpoint.read_manifest(path.parent)
    try:
        for name in manifest.files:
            _check_name(name)
    except ValueError as error:
        raise CheckpointError(f"`{repo_id}` is not used: {error}") from error
    return manifest


def _check_second(path: Path, name: str, record: FileRecord, repo_id: str) -> None:
    got = checkpoint.record_of(path)
    if got != record:
        raise CheckpointError(
            f"`{repo_id}`: {name} is not the file that the manifest lists ({got.size} bytes with sha256 "
            f"{got.sha256[:12]} instead of {record.size} with {record.sha256[:12]}), also after a second download. "
            "Nothing of the repo is used; tell its owner."
        )


def unlisted_files(repo_id: str, snapshot: Snapshot, token: str | None = None) -> list[str]:
    """Files of a repo that its manifest does not list; `fetch` never downloads them.

    Raises:
        HubError: the repo cannot be read.
    """
    try:
        with _limited_waiting():
            names = HfApi(token=token).list_repo_files(repo_id, revision=snapshot.revision)
    except Exception as error:
        raise _explained(error, f"`{repo_id}` cannot be read") from error
    return sorted(set(names) - {*snapshot.manifest.files, MANIFEST_NAME, ".gitattributes"})


def repo_id_of(name_or_path: str | os.PathLike[str]) -> str:
    """The name of a repo. Raises `FileNotFoundError` for what looks like a folder that is not there."""
    name = os.fspath(name_or_path)
    if not isinstance(name_or_path, str) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"`{name}` is neither a folder nor the name of a repo (`user/name`).")
    return name


# ---- What goes wrong


@contextmanager
def _limited_waiting() -> Iterator[None]:
    """Let no request of huggingface_hub wait longer than `REQUEST_SECONDS` for the next byte."""
    session = get_session()
    before = session.timeout
    session.timeout = REQUEST_SECONDS
    try:
        yield
    finally:
        session.timeout = before


def _repeated(call: Callable[[], _T]) -> _T:
    """The result of a call that may be repeated, after at most `NUM_TRIES` tries."""
    for attempt in range(NUM_TRIES - 1):
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(min(2.0**attempt, 30.0))
    return call()


def _may_pass(error: BaseException | None) -> bool:
    """Whether the same request may succeed later: conflicts, overload, faults of the server and of the network."""
    while error is not None:
        if isinstance(error, OfflineModeIsEnabled):
            return False
        if isinstance(error, HfHubHTTPError):
            return error.response is not None and error.response.status_code not in _PERMANENT
        if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.partition(".")[0] in (
            "httpcore",
            "httpx",
            "httpx2",
        ):
            return True
        error = error.__cause__
    return False


def _explained(error: Exception, what: str) -> HubError:
    """An error of huggingface_hub or of the network as one sentence; our own mistakes are raised as they are."""
    if isinstance(error, (AssertionError, AttributeError, LookupError, TypeError)):
        raise error
    cause: BaseException = error
    while not isinstance(cause, (HfHubHTTPError, OfflineModeIsEnabled)) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OfflineModeIsEnabled):
        return HubError(f"{what}: HF_HUB_OFFLINE is set. Unset it, or use what was downloaded before.")
    if isinstance(cause, RevisionNotFoundError):
        return HubError(f"{what}: there is no such revision.")
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) and cause.response is not None else None
    if isinstance(cause, RepositoryNotFoundError) or status in (401, 403):
        return HubError(
            f"{what}: there is no such repo, or this token ({status}) may not use it. Check the name; log in with "
            "`hf auth login` or set HF_TOKEN."
        )
    shown = error if isinstance(error, ValueError) else cause
    return HubError(f"{what}: {type(shown).__name__}: {_first_line(shown)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no answer"


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at {revision}"


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` {repo_id!r} is not the name of a repo: it must be `user/name`.") from error
    if "/" not in repo_id:
        raise ValueError(f"`repo_id` {repo_id!r} lacks the user or organisation: it must be `user/name`.")
