"""A Hub on loopback: the API that huggingface_hub's client speaks, over real HTTP, with faults to order.

Served: whoami, create_repo, branches, validate-yaml, info, tree, paths-info, preupload, LFS batch, upload and verify,
commit, resolve (HEAD and GET with ranges). One user, `alice`, whose token is `hf_write`; `hf_read` may only read.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub.repocard import ModelCard
from huggingface_hub.utils.sha import git_hash

LFS_SUFFIXES = (".safetensors", ".png", ".mp4", ".gif", ".bin", ".pkl")


@dataclass
class Commit:
    """A commit: hash, message, and the content of every file."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repo: commits from the oldest on, and where its branches are."""

    private: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        sha = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.sha == sha), None)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        text = f"{branch} {message} {len(self.commits)} {sorted((n, git_hash(c)) for n, c in files.items())}"
        made = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files)
        self.commits.append(made)
        self.branches[branch] = made.sha
        return made


@dataclass
class Fault:
    """What happens instead of, or after, the next `times` requests of a kind.

    `status` answers with an error; `drop` closes the connection, before anything is done or, with `after`, once it is
    done; `stall` never answers; `meanwhile` runs before the request is served; `content` changes what is sent or kept.
    """

    kind: str
    times: int = 1
    status: int | None = None
    drop: bool = False
    after: bool = False
    stall: bool = False
    meanwhile: Callable[[], Any] | None = None
    content: Callable[[bytes], bytes] | None = None


class HubServer:
    """The server; `url` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.closing = threading.Event()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, kind: str, **what: Any) -> None:
        """Order a fault; see `Fault`. Kinds: those of `Handler.ROUTES`."""
        self.faults.append(Fault(kind, **what))

    def fault(self, kind: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind:
                    fault.times -= 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Content of every file of a repo."""
        commit = self.repos[repo_id].at(revision)
        assert commit is not None
        return commit.files

    def replace(self, repo_id: str, **changed: bytes | None) -> None:
        """Commit as someone else would: contents by file name, None deletes."""
        repo = self.repos[repo_id]
        files = {**self.files(repo_id), **changed}
        repo.commit("main", "someone else", {name: content for name, content in files.items() if content is not None})


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    ROUTES = {
        "whoami": r"GET /api/whoami-v2",
        "create": r"POST /api/repos/create",
        "branch": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)",
        "yaml": r"POST /api/validate-yaml",
        "tree": r"GET /api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.+))?",
        "preupload": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
        "commit": r"POST /api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
        "info": r"GET /api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?",
        "batch": r"POST /(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        "upload": r"PUT /lfs/(?P<oid>[0-9a-f]{64})",
        "verify": r"POST /lfs/verify",
        "head": r"HEAD /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "download": r"GET /(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
    }

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_chunks()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = re.sub("^(/api)?/datasets/", lambda found: "/api/models/" if found[1] else "/", url.path)
        matches = {kind: re.fullmatch(route, f"{self.command} {path}") for kind, route in self.ROUTES.items()}
        kind, match = next(((k, m) for k, m in matches.items() if m is not None), ("", None))
        if match is None:
            return self.answer(404, {"error": f"no route for {self.command} {url.path}"})
        self.hub.requests[kind] += 1
        fault = self.hub.fault(kind)
        if fault is not None:
            if fault.meanwhile is not None:
                fault.meanwhile()
            if fault.stall:
                self.hub.closing.wait(30)
            if fault.stall or (fault.drop and not fault.after):
                return self.drop()
            if fault.status is not None and not fault.after:
                return self.answer(fault.status, {"error": "ordered"}, {"Retry-After": "0"})
        self.fault = fault
        arguments = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        with self.hub.lock:
            return getattr(self, f"on_{kind}")(body, **arguments)

    do_GET = do_POST = do_PUT = do_HEAD = serve

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        fault = getattr(self, "fault", None)
        if fault is not None and fault.after:
            if fault.drop:
                return self.drop()
            status, content = fault.status or status, {"error": "ordered, after it was done"}
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return None

    def error(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def role(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return {"hf_write": "write", "hf_read": "read"}.get(token)

    def found(self, repo: str, revision: str = "main") -> tuple[Repo, Commit] | None:
        """The repo and the commit; answers, and returns None, where there is none."""
        if repo not in self.hub.repos or (self.hub.repos[repo].private and self.role() is None):
            self.error(401 if self.role() is None else 404, "RepoNotFound", "Repository not found")
            return None
        commit = self.hub.repos[repo].at(revision)
        if commit is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return self.hub.repos[repo], commit

    def may_write(self, repo: str) -> bool:
        if self.role() is None:
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
            return False
        if self.role() == "read" or not repo.startswith("alice/"):
            self.answer(403, {"error": "You don't have the rights to write there"})
            return False
        return True

    # ---- Routes

    def on_whoami(self, body: bytes) -> None:
        if self.role() is None:
            return self.answer(401, {"error": "Invalid user token."})
        token = {"role": self.role(), "displayName": "test"}
        orgs = [{"name": "lab", "roleInOrg": "read"}]
        return self.answer(200, {"name": "alice", "orgs": orgs, "auth": {"accessToken": token}})

    def on_create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo_id = f"{wanted.get('organization') or 'alice'}/{wanted['name']}"
        if not self.may_write(repo_id):
            return None
        url = {"url": f"{self.hub.url}/{repo_id}"}
        if repo_id in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        repo = self.hub.repos[repo_id] = Repo(
            private=wanted.get("visibility") == "private" or bool(wanted.get("private"))
        )
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.answer(200, url)

    def on_branch(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_write(repo) or (found := self.found(repo)) is None:
            return None
        if revision in found[0].branches:
            return self.error(409, "BranchExists", "Reference already exists")
        found[0].branches[revision] = found[1].sha
        return self.answer(201, {})

    def on_yaml(self, body: bytes) -> None:
        try:
            ModelCard(json.loads(body)["content"])
        except Exception as error:
            return self.answer(400, {"errors": [{"message": str(error)}], "warnings": []})
        return self.answer(200, {"errors": [], "warnings": []})

    def on_info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self.found(repo, revision)) is None:
            return None
        siblings = [{"rfilename": name, **_entry(name, content)} for name, content in found[1].files.items()]
        info = {"id": repo, "modelId": repo, "sha": found[1].sha, "private": found[0].private, "siblings": siblings}
        return self.answer(200, {**info, "tags": [], "downloads": 0, "likes": 0})

    def on_tree(self, body: bytes, repo: str, revision: str, path: str = "") -> None:
        if (found := self.found(repo, revision)) is None:
            return None
        prefix = f"{path}/" if path else ""
        files = {name: content for name, content in found[1].files.items() if name.startswith(prefix)}
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {".", path}
        if self.query.get("recursive") != ["true"]:
            files = {name: content for name, content in files.items() if "/" not in name[len(prefix) :]}
            folders = {name for name in folders if name.startswith(prefix) and "/" not in name[len(prefix) :]}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)
        ]
        entries += [{"type": "file", "path": n, "oid": git_hash(c), **_entry(n, c)} for n, c in files.items()]
        return self.answer(200, entries)

    def on_preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_write(repo) or (found := self.found(repo, revision)) is None:
            return None
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            held = found[1].files.get(file["path"])
            oid = {} if held is None else {"oid": git_hash(held)}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
        return self.answer(200, {"files": answers})

    def on_batch(self, body: bytes, repo: str) -> None:
        if not self.may_write(repo):
            return None
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}
            objects.append(answer)
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def on_upload(self, body: bytes, oid: str) -> None:
        if self.fault is not None and self.fault.content is not None:
            body = self.fault.content(body)
        self.hub.blobs[oid] = body
        return self.answer(200, b"")

    def on_verify(self, body: bytes) -> None:
        wanted = json.loads(body)
        kept = self.hub.blobs.get(wanted["oid"], b"")
        if hashlib.sha256(kept).hexdigest() != wanted["oid"]:
            self.hub.blobs.pop(wanted["oid"], None)
            return self.answer(422, {"error": "The uploaded object has another sha256"})
        return self.answer(200, {})

    def on_commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self.may_write(repo) or (found := self.found(repo, revision)) is None:
            return None
        header, *operations = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != found[1].sha:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(found[1].files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self.answer(400, {"error": f"LFS pointer to a missing object: {value['path']}"})
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        made = found[0].commit(revision, header["value"]["summary"], files)
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}", "commitOid": made.sha})

    def on_head(self, body: bytes, repo: str, revision: str, path: str) -> None:
        self.on_download(body, repo, revision, path)

    def on_download(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (found := self.found(repo, revision)) is None:
            return None
        if path not in found[1].files:
            return self.error(404, "EntryNotFound", "Entry not found")
        content = found[1].files[path]
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LFS_SUFFIXES) else git_hash(content)
        headers = {"X-Repo-Commit": found[1].sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if self.fault is not None and self.fault.content is not None:
            content = self.fault.content(content)
        status, wanted = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is not None:
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content = content[start:]
        if self.fault is not None and self.fault.drop:
            return self.break_off(content, headers)
        return self.answer(status, content, headers)

    def break_off(self, content: bytes, headers: dict[str, str]) -> None:
        """Announce everything, send half, hang up."""
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.wfile.flush()
        self.drop()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": len(content)}
    if name.endswith(LFS_SUFFIXES):
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "sha256": digest, "size": len(content), "pointerSize": 134}
    return entry
