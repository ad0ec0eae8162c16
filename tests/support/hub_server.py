"""A stand-in for a model hub on loopback: the part of its HTTP API that pull, push and huggingface_hub use.

Files above `LFS_BYTES` are stored as the hub stores them: their addresses lead to another host (here another
port), which takes no token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LFS_BYTES = 10_000
TOKEN = "hf_test"
BLOCK = 1 << 14

Files = dict[str, bytes]


@dataclass
class Hub:
    """What the stand-in holds, and how it behaves.

    Attributes:
        repos: the commits of each repository, oldest first.
        gated, private: ids that answer as such; private ones are there for TOKEN.
        break_after: a download ends without a word after so many bytes, once for each entry.
        no_ranges: every download begins at byte 0.
        sizes: of files, in place of the true ones.
        broken_uploads: so many uploads of large files fail.
        ignored: names that the repository's .gitignore drops.
        requests: method, path and headers of every request; "cdn" before the path of the other host's.
    """

    repos: dict[str, list[Files]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    break_after: list[int] = field(default_factory=list)
    no_ranges: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    broken_uploads: int = 0
    ignored: set[str] = field(default_factory=set)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    cdn: str = ""

    def add(self, id: str, files: Files) -> str:
        """Commits a repository's files; returns the commit."""
        commits = self.repos.setdefault(id, [])
        commits.append(files)
        self.blobs |= {_sha256(data): data for data in files.values()}
        return commit_of(id, len(commits) - 1)

    def files(self, id: str, revision: str = "main") -> Files | None:
        commits = self.repos.get(id, [])
        named = {commit_of(id, i): files for i, files in enumerate(commits)}
        return commits[-1] if revision == "main" and commits else named.get(revision)

    def downloads(self) -> list[str]:
        """Names and hashes of what was fetched."""
        paths = [path for method, path, _ in self.requests if method == "GET"]
        return [path.rpartition("/")[2] for path in paths if "/resolve/" in path or path.startswith("cdn")]


def commit_of(id: str, number: int) -> str:
    return hashlib.sha1(f"{id} {number}".encode()).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_cdn = False

    def log_message(self, *args: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that has read enough
            super().handle()

    def do_GET(self) -> None:
        self._note()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.is_cdn:
            self._send_file(self.hub.blobs[parts[-1]])
        elif parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        elif parts[2:3] == ["resolve"]:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._refuse(404, "")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "")
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[-1] == "batch":
            return self._batch(json.loads(body))
        id = "/".join(parts[2:4])
        if parts[4] == "preupload":
            return self._preupload(id, json.loads(body))
        return self._commit(id, [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        self._note()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.hub.broken_uploads:
            self.hub.broken_uploads -= 1
            return self._refuse(400, "")
        self.hub.blobs[_sha256(data)] = data
        return self._json({})

    # Reading. -------------------------------------------------------------------------------------

    def _info(self, id: str, revision: str) -> None:
        if not self._may_read(id):
            return self._refuse(401, "RepoNotFound")
        if (files := self.hub.files(id, revision)) is None:
            return self._refuse(404, "RevisionNotFound")
        siblings = []
        for name, data in files.items():
            entry: dict[str, Any] = {"rfilename": name, "size": self.hub.sizes.get(name, len(data))}
            if len(data) > LFS_BYTES:
                entry["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        number = next(i for i, each in enumerate(self.hub.repos[id]) if each is files)
        self._json({"id": id, "modelId": id, "sha": commit_of(id, number), "siblings": siblings})

    def _resolve(self, id: str, revision: str, name: str) -> None:
        if not self._may_read(id):
            return self._refuse(401, "RepoNotFound")
        if id in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        files = self.hub.files(id, revision) or {}
        if name not in files:
            return self._refuse(404, "EntryNotFound")
        if len(files[name]) <= LFS_BYTES:
            return self._send_file(files[name])
        self.send_response(302)
        self.send_header("Location", f"{self.hub.cdn}/{_sha256(files[name])}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_file(self, data: bytes) -> None:
        start = 0
        if (wanted := self.headers.get("Range")) and not self.hub.no_ranges:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        end = len(data)
        if self.is_cdn and self.hub.break_after:
            end = min(end, start + self.hub.break_after.pop(0))
        with contextlib.suppress(OSError):
            for begin in range(start, end, BLOCK):
                self.wfile.write(data[begin : min(begin + BLOCK, end)])
        self.close_connection = end < len(data)

    def _may_read(self, id: str) -> bool:
        if id not in self.hub.repos:
            return False
        return id not in self.hub.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # Writing. -------------------------------------------------------------------------------------

    def _create(self, asked: dict[str, Any]) -> None:
        id = f"{asked['organization']}/{asked['name']}"
        if id in self.hub.repos:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{id}"}, 409
            )
        self.hub.repos[id] = [{".gitattributes": b""}]
        if asked.get("private"):
            self.hub.private.add(id)
        return self._json({"url": f"{self.hub.url}/{id}", "name": id})

    def _preupload(self, id: str, asked: dict[str, Any]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] > LFS_BYTES else "regular",
                "shouldIgnore": file["path"] in self.hub.ignored,
            }
            for file in asked["files"]
        ]
        self._json({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.cdn}/{each['oid']}", "header": {}}}
            there = each["oid"] in self.hub.blobs
            objects.append({**each, **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, id: str, lines: list[dict[str, Any]]) -> None:
        files = dict(self.hub.files(id) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(id, files)
        self._json(
            {"commitOid": commit, "commitUrl": f"{self.hub.url}/{id}/commit/{commit}", "success": True}
        )

    # Both. ----------------------------------------------------------------------------------------

    def _note(self) -> None:
        path = f"cdn{self.path}" if self.is_cdn else self.path
        self.hub.requests.append((self.command, path, dict(self.headers)))

    def _json(self, data: object, status: int = 200) -> None:
        text = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that HF_ENDPOINT leads to, without a token until HF_TOKEN is set."""
    hub = Hub()
    servers = []
    for is_cdn in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "is_cdn": is_cdn})
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in servers]
    for thread in threads:
        thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nonexistent")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
