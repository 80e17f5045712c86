"""A hub on loopback: what huggingface_hub asks of huggingface.co, answered from local folders.

    GET  /api/models/ORG/NAME/revision/REVISION         the commit
    GET  /api/models/ORG/NAME/tree/COMMIT               the files, weights with the sha256 of git LFS
    HEAD, GET  /ORG/NAME/resolve/REVISION/FILE          small files directly, weights by redirect
    GET  /cdn/SHA256, on another host                   weights, ranges of them too

Clients find it by HF_ENDPOINT, which huggingface_hub reads when it is imported: they have to be other processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """revisions: name of a branch or tag, or a commit -> commit. gated: nobody has accepted its terms."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> file -> content
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False


class Hub(ThreadingHTTPServer):
    """The server. requests: "METHOD path" of all that came, with the range that was asked for.

    cuts: file -> how often its transfer is cut in the middle; what is left of it is then sent, if it is asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.cuts: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, folder: Path, revision: str = "main", *, gated: bool = False) -> str:
        """Publish a folder as a revision of a repository; its commit."""
        repository = self.repositories.setdefault(name, Repository())
        repository.gated = gated
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        commit = hashlib.sha1(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
        repository.files[commit] = files
        repository.revisions |= {revision: commit, commit: commit}
        return commit

    def environment(self, cache: Path) -> Mapping[str, str]:
        """Of a process that knows this hub only, with a cache of its own."""
        ours = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key != "HF_TOKEN"}
        return ours | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache)}

    def transfers(self, file: str) -> list[str]:
        """The requests for a file's content so far."""
        hashes = {
            hashlib.sha256(files[file]).hexdigest()
            for repository in self.repositories.values()
            for files in repository.files.values()
            if file in files
        }
        return [r for r in self.requests if r.startswith("GET /cdn/") and r.split()[1].removeprefix("/cdn/") in hashes]


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(" ".join(filter(None, (self.command, path, self.headers["Range"]))))
        kind, _, rest = path.lstrip("/").partition("/")
        if kind == "cdn":
            self._content(rest)
        elif kind == "api" and rest.startswith("models/"):
            self._api(rest)
        elif kind == "api":
            self._send(404, b"", {})
        else:
            self._resolve(path)

    def _api(self, rest: str) -> None:
        _, organisation, short, what, revision = rest.split("/", 4)  # models/ORG/NAME/revision/REVISION
        name = f"{organisation}/{short}"
        if (found := self._commit(name, revision)) is None:
            return
        commit, files = found
        if what == "revision":
            repository = self.server.repositories[name]
            gated = "auto" if repository.gated else False
            self._json({"id": name, "sha": commit, "private": False, "gated": gated, "tags": [], "siblings": []})
        else:
            self._json([self._entry(file, content) for file, content in files.items()])

    def _entry(self, file: str, content: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": file, "size": len(content), "oid": _git_id(content)}
        if _is_large(file):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def _resolve(self, path: str) -> None:
        name, _, rest = path.lstrip("/").partition("/resolve/")
        if (repository := self.server.repositories.get(name)) and repository.gated:
            self._error(
                403 if self.headers["Authorization"] else 401, "GatedRepo", "Access to this model is restricted"
            )
            return
        revision, _, file = rest.rpartition("/")
        if (found := self._commit(name, revision)) is None:
            return
        commit, files = found
        if file not in files:
            self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content, headers = files[file], {"X-Repo-Commit": commit}
        if not _is_large(file):
            self._send(200, content, headers | {"ETag": f'"{_git_id(content)}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", headers | {"Location": f"http://localhost:{self.server.server_port}/cdn/{digest}"})

    def _content(self, digest: str) -> None:
        file, content = next(
            (file, content)
            for repository in self.server.repositories.values()
            for files in repository.files.values()
            for file, content in files.items()
            if hashlib.sha256(content).hexdigest() == digest
        )
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        part = content[start:]
        headers = {"ETag": f'"{digest}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.server.cuts.get(file, 0)
        if cut:
            self.server.cuts[file] = cut - 1
        sent = part[: len(part) // 2 if start == 0 else 0] if cut else part
        self._send(206 if start else 200, sent, headers | {"Content-Length": str(len(part))})
        self.close_connection = bool(cut)

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A revision's commit and files, None where an error was answered, the real hub's."""
        repository = self.server.repositories.get(name)
        if repository is None:
            self._error(401, "RepoNotFound", "Invalid username or password.")
        elif (commit := repository.revisions.get(revision)) is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return commit, repository.files[commit]
        return None

    def _error(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message} | dict(headers or {}))

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _is_large(file: str) -> bool:
    """Whether the hub keeps it by git LFS."""
    return file.endswith((".safetensors", ".gguf"))


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
