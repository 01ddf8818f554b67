"""A stand-in for the hub on loopback that speaks its protocol: lists, redirects, refusals, and cuts where asked to.

As the hub does, it lists a gated repository to all, but gives its files to who has a token that was accepted; large
files lie on another host, which gets no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants

REPO = "acme/tiny-model"
COMMIT = "c0ffee" + "0" * 34
LATER = "c0ffee" + "1" * 34
CHUNK = 16 * 1024
BESIDE = {
    "flux2.safetensors": b"x" * 50_000,
    "README.md": b"---",
    "modeling.py": b"raise SystemExit",
    "transformer/modeling.py": b"raise SystemExit",
    "transformer/diffusion_pytorch_model.bin": b"x" * 50_000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"x" * 50_000,
    "text_encoder/model.onnx": b"x" * 50_000,
    "text_encoder/flax_model.msgpack": b"x" * 50_000,
    "vae/tf_model.h5": b"x" * 50_000,
    "vae_of_another/diffusion_pytorch_model.safetensors": b"x" * 50_000,
}
"""What repositories have beside what a run reads."""
_LARGE = (".safetensors", ".bin", ".gguf", ".onnx")
_ROUTE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")


@dataclass
class Hub:
    """Its one repository, and what was asked of it.

    Attributes:
        files: path -> content.
        revisions: branch, tag or commit -> commit.
        accepted: the token that may read the files; None: everybody may.
        cut_after: bytes of large files after which every connection is cut; None: none is.
        asked: (method, path without query, range) of each request.
        sent: path -> bytes of its content that went out.
        tokens_given_away: requests to the other host that had a token.
    """

    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT})
    accepted: str | None = None
    cut_after: int | None = None
    endpoint: str = ""
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    tokens_given_away: int = 0
    status: int | None = None  # what it answers to everything
    stalls: threading.Event | None = None  # large files stop in their middle until it is set
    corrupt: bool = False  # the first byte of what is large is another one
    lock: Any = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, folder: Path) -> Hub:
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return cls(files | BESIDE)

    @property
    def sent_bytes(self) -> int:
        return sum(self.sent.values())

    def may_send(self, wanted: int) -> int:
        """How many bytes of a large file go out before the cut."""
        with self.lock:
            if self.cut_after is None:
                return wanted
            now = min(wanted, self.cut_after)
            self.cut_after -= now
            return now

    def note_sent(self, path: str, nbytes: int) -> None:
        with self.lock:
            self.sent[path] = self.sent.get(path, 0) + nbytes


def etag_of(path: str, content: bytes) -> str:
    """What names the content: of a large file its SHA-256, of a small one git's name for it."""
    if path.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.asked.append((self.command, path, self.headers.get("Range")))
        if hub.status is not None:
            self._reply(hub.status, b"")
        elif path.startswith("/cdn/"):
            hub.tokens_given_away += "Authorization" in self.headers
            self._large(path.removeprefix("/cdn/"))
        elif found := _API.fullmatch(path):
            self._api(found["repo"], found["what"], found["revision"] or "main")
        elif found := _ROUTE.fullmatch(path):
            self._resolve(found["repo"], found["revision"], found["path"])
        else:
            self._refuse(404, "EntryNotFound")

    def _api(self, repo: str, what: str | None, revision: str) -> None:
        if (commit := self._commit(repo, revision)) is None:
            return
        if what == "tree":
            content: object = [self._entry(path, data) for path, data in sorted(self.hub.files.items())]
        else:
            content = {"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in self.hub.files]}
        self._reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _entry(self, path: str, data: bytes) -> dict[str, object]:
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
        if path.endswith(_LARGE):
            return {**entry, "lfs": {"oid": etag_of(path, data), "size": len(data), "pointerSize": 134}}
        return {**entry, "oid": etag_of(path, data)}

    def _commit(self, repo: str, revision: str) -> str | None:
        if repo != REPO:
            self._refuse(401, "RepoNotFound")  # the hub says no more to who may not know
            return None
        if (commit := self.hub.revisions.get(revision)) is None:
            self._refuse(404, "RevisionNotFound")
        return commit

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        hub = self.hub
        if (commit := self._commit(repo, revision)) is None:
            return
        token = self.headers.get("Authorization")
        if hub.accepted is not None and token != f"Bearer {hub.accepted}":
            return self._refuse(403 if token else 401, "GatedRepo")
        if (data := hub.files.get(path)) is None:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        named = {"X-Repo-Commit": commit, "ETag": f'"{etag_of(path, data)}"'}
        if not path.endswith(_LARGE):
            return self._reply(200, data, named, path)
        host = hub.endpoint.replace("127.0.0.1", "localhost")
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag_of(path, data)}"'}
        self._reply(302, b"", {**named, **linked, "Location": f"{host}/cdn/{path}"})

    def _large(self, path: str) -> None:
        data, first = self.hub.files[path], 0
        if self.hub.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        headers = {"Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            first = int(found[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        self._reply(206 if found else 200, data[first:], headers, path)

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, path: str | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        now = self.hub.may_send(len(body)) if path is not None and path.endswith(_LARGE) else len(body)
        stalls = self.hub.stalls if path is not None and path.endswith(_LARGE) else None
        half = now // 2 if stalls is not None else 0
        self.wfile.write(body[:half])
        if stalls is not None:
            stalls.wait(600)
        self.wfile.write(body[half:now])
        if path is not None:
            self.hub.note_sent(path, now)
        if now < len(body):
            self.close_connection = True

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._reply(status, b"{}", {"X-Error-Code": code, **(headers or {})})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who fetches may be gone."""


@contextmanager
def serving_hub(hub: Hub) -> Iterator[Hub]:
    """`hub`, answering at its `endpoint`."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path | None = None) -> None:
    """As HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_DISABLE_XET do, which are read when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    if cache is not None:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    for module in (huggingface_hub.file_download, huggingface_hub.utils._http):  # the pauses between two tries
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delenv("HF_TOKEN", raising=False)
