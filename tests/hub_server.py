"""A small server that speaks as much of the hub's protocol as a download needs, and can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read_folder(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Hub:
    """One repository of models behind http://127.0.0.1; use it in a with statement.

    Attributes:
        files: what main holds, by path; what the listing says of them is taken when the hub is made.
        sent: bytes that were sent of each file.
        requests: how many requests came, of any kind.
        asked: files that were asked for, in order, with the Range header.
        cuts: by path, how many bytes each of the next connections brings before it is cut.
        ranges: whether Range is understood.
        status, error_code, body: how everything is answered from now on, where a status is set.
        tokens: by host name, the Authorization headers that came. Weights are sent from another host, as the hub does.
        stall_at: after how many bytes of all files nothing more is sent until release(); `stalled` says it came so far.
    """

    def __init__(self, repo_id: str, files: dict[str, bytes]) -> None:
        self.repo_id = repo_id
        self.reset(files)
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def reset(self, files: dict[str, bytes]) -> None:
        """Be as new, with these files."""
        self.files = dict(files)
        self.siblings = [self._sibling(path, content) for path, content in files.items()]
        self.commit = COMMIT
        self.past: dict[str, tuple[dict[str, bytes], list[dict[str, Any]]]] = {}
        self.sent: Counter[str] = Counter()
        self.requests = 0
        self.asked: list[tuple[str, str | None]] = []
        self.tokens: dict[str, set[str | None]] = defaultdict(set)
        self.cuts: dict[str, list[int]] = {}
        self.ranges = True
        self.status: int | None = None
        self.error_code: str | None = None
        self.body = b"{}"
        self.stall_at: int | None = None
        self.stalled = threading.Event()
        self._go = threading.Event()

    def publish(self, files: dict[str, bytes], commit: str) -> None:
        """Move main to a commit with other files; what was there can still be had by its commit."""
        self.past[self.commit] = (self.files, self.siblings)
        self.files, self.commit = dict(files), commit
        self.siblings = [self._sibling(path, content) for path, content in files.items()]

    def at(self, revision: str) -> tuple[dict[str, bytes], list[dict[str, Any]]] | None:
        """Files and listing of a revision, None where it is not known."""
        return (self.files, self.siblings) if revision in ("main", self.commit) else self.past.get(revision)

    def release(self) -> None:
        """End the stall."""
        self.stall_at = None
        self._go.set()

    def wait(self) -> None:
        """Wait where sending is to stall."""
        if self.stall_at is not None and sum(self.sent.values()) >= self.stall_at:
            self.stalled.set()
            self._go.wait(60)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def listing(self, revision: str) -> dict[str, Any] | None:
        """The answer of /api/models."""
        known = self.at(revision)
        commit = self.commit if revision == "main" else revision
        return {"id": self.repo_id, "sha": commit, "siblings": known[1]} if known else None

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    @staticmethod
    def _sibling(path: str, content: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git}
        if path.endswith(".safetensors"):
            # For these, git itself holds a pointer, whose id says nothing about the content.
            sha256 = hashlib.sha256(content).hexdigest()
            entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256, "size": len(content), "pointerSize": 134}}
        return entry


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients go away in the middle, as the tests want it."""


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests += 1
            path = unquote(urlsplit(self.path).path)
            host = self.headers["Host"].partition(":")[0]
            hub.tokens[host].add(self.headers.get("Authorization"))
            if hub.status is not None:
                return self._answer(hub.status, hub.body)
            if path.startswith(f"/api/models/{hub.repo_id}/revision/"):
                listing = hub.listing(path.rpartition("/")[2])
                return self._answer(200, json.dumps(listing).encode()) if listing else self._answer(404, b"{}")
            _, _, place = path.partition(f"/{hub.repo_id}/resolve/")
            commit, _, name = place.partition("/")
            files, _ = hub.at(commit) or ({}, [])
            if name not in files:
                return self._answer(404, b"{}")
            if name.endswith(".safetensors") and host != "localhost":
                return self._answer(302, b"", Location=hub.url.replace("127.0.0.1", "localhost") + self.path)
            hub.asked.append((name, self.headers.get("Range")))
            return self._send(name, files[name])

        def _send(self, name: str, content: bytes) -> None:
            start = 0
            wanted = self.headers.get("Range")
            if wanted and hub.ranges:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("X-Repo-Commit", hub.commit)
            self.end_headers()
            cuts = hub.cuts.get(name)
            body = content[start : start + cuts.pop(0)] if cuts else content[start:]
            for offset in range(0, len(body), 65536):
                hub.wait()
                self.wfile.write(body[offset : offset + 65536])
                hub.sent[name] += len(body[offset : offset + 65536])
            self.close_connection = start + len(body) < len(content)

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            if hub.error_code:
                self.send_header("X-Error-Code", hub.error_code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    return Handler
