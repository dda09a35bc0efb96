"""A stand-in of the Hugging Face Hub: as much of its HTTP API as a push of a model needs, with what was pushed.

It answers as the hub does (status codes, headers, the upload of large files by git LFS's basic transfer), for the real
`huggingface_hub` to talk to.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKENS = {"hf_writes": "write", "hf_reads": "read"}
"""Tokens that it accepts, and what they may do; they are of the user `someone`."""


@dataclass
class Hub:
    """What the hub has, and what it was asked.

    Attributes:
        address: for HF_ENDPOINT.
        repositories: the files of each branch of each repository.
        commits: of all repositories: the name and the first line.
        requests: their methods and paths.
        private: repositories that were made private.
        forbidden: repositories that `hf_writes` may read only.
        failing: a part of a path: whoever asks for it is told that the server cannot do it.
    """

    address: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    failing: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a repository, by their paths."""
        return self.repositories[name][branch]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: object) -> None:
        """Is silent."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{method} {path}")
        if self.hub.failing is not None and self.hub.failing in path:
            self._send(413, {"error": "Content Too Large"})  # Not a status that is tried again for half a minute.
            return
        if path.startswith("/blobs/"):  # The storage, which asks for no token.
            self.hub.blobs[path.removeprefix("/blobs/")] = body
            self._send(200, {})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            self._send(*_validate(json.loads(body)["content"]))
        elif token not in TOKENS:
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/whoami-v2":
            self._send(200, {"type": "user", "name": "someone", "auth": {"accessToken": {"role": TOKENS[token]}}})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        else:
            self._of_repository(method, path, body)

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        if name.split("/")[0] not in ("someone", "a-team"):
            self._send(403, {"error": f"You don't have the rights to create a model under the namespace of {name}"})
            return
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}})
        if status == 200 and (wanted.get("visibility") == "private" or wanted.get("private") is True):
            self.hub.private.add(name)
        answer: dict[str, Any] = {"url": f"{self.hub.address}/{name}", "name": name, "id": name}
        self._send(status, answer | ({"error": "You already created this model repo"} if status == 409 else {}))

    def _of_repository(self, method: str, path: str, body: bytes) -> None:
        words = path.removeprefix("/api/models").strip("/").split("/")
        name, action = "/".join(words[:2]).removesuffix(".git"), words[2] if len(words) > 2 else ""
        if name not in self.hub.repositories:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        branches = self.hub.repositories[name]
        if action == "auth-check":
            self._send(*((403, {"error": "Forbidden"}) if name in self.hub.forbidden else (200, {})))
        elif action == "branch":
            branches.setdefault(words[3], dict(branches["main"]))
            self._send(200, {})
        elif action == "info" and path.endswith("/objects/batch"):
            self._send(200, {"transfer": "basic", "objects": self._places(json.loads(body)["objects"])})
        elif action in ("preupload", "commit", "tree", "revision") and words[3] not in branches:
            self._send(404, {"error": f"Invalid rev id: {words[3]}"}, {"X-Error-Code": "RevisionNotFound"})
        elif action == "preupload":
            self._send(200, {"files": [self._mode(branches[words[3]], file) for file in json.loads(body)["files"]]})
        elif action == "commit":
            self._commit(name, branches[words[3]], [json.loads(line) for line in body.splitlines()])
        elif action == "tree":
            self._send(200, [_entry(file, content) for file, content in branches[words[3]].items()])
        else:
            self._send(200, {"id": name, "sha": "0" * 40, "siblings": [], "private": name in self.hub.private})

    def _places(self, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Where large files are to be put; nothing of those that are there."""
        return [
            wanted
            | ({} if (oid := wanted["oid"]) in self.hub.blobs else {"actions": {"upload": {"href": self._blob(oid)}}})
            for wanted in objects
        ]

    def _blob(self, oid: str) -> str:
        return f"{self.hub.address}/blobs/{oid}"

    @staticmethod
    def _mode(files: dict[str, bytes], file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        there = files.get(file["path"])
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False} | (
            {} if there is None else {"oid": _oid(file["path"], there)}
        )

    def _commit(self, name: str, files: dict[str, bytes], operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                self.hub.commits.append((name, value["summary"]))
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content = self.hub.blobs[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                files[value["path"]] = content
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        answer = {"commitUrl": f"{self.hub.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        self._send(200, answer)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _oid(path: str, content: bytes) -> str:
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}


def _validate(text: str) -> tuple[int, dict[str, Any]]:
    """As the hub does of a card's head: `base_model` and `datasets` are names of its own."""
    import yaml

    content = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    errors = []
    for key in ("base_model", "datasets"):
        values = content.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if value.startswith(("/", ".")) or value.count("/") > 1:
                errors.append({"message": f'"{key}" with value "{value}" is not valid. Use a model id.'})
    return (400 if errors else 200), {"errors": errors, "warnings": []}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that serves in a thread of this process while the context lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
