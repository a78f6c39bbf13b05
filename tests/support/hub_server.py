"""A hub and its storage host on 127.0.0.1, with the failures that real ones have.

The hub answers HEAD with the file's size and hash and redirects GET to the storage host, another
origin, as huggingface.co does. `faults` maps a file's name to what goes wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NO_HASH = ("no-hash", "no-size", "odd-size", "page", "empty")
STATUS_CODES = {
    "gated": (403, "GatedRepo"),
    "private": (401, "RepoNotFound"),
    "no-repository": (404, "RepoNotFound"),
    "no-revision": (404, "RevisionNotFound"),
    "no-file": (404, "EntryNotFound"),
    "teapot": (418, ""),
}


@dataclass
class Hub:
    """What the servers hold, and what they saw."""

    files: dict[str, bytes]
    faults: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str, str | None, str | None]] = field(default_factory=list)
    """(server, method, file, Range, Authorization) of each request."""
    folders: dict[str, str] = field(default_factory=dict)
    """The folders that files of a data set are in, by name."""
    counts: dict[str, int] = field(default_factory=dict)
    url: str = ""
    storage_url: str = ""

    def seen(self, server: str, method: str) -> list[tuple[str | None, str | None]]:
        """Return (Range, Authorization) of the requests to one server."""
        return [(r[3], r[4]) for r in self.requests if r[:2] == (server, method)]


def _handler(hub: Hub, server: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            name = self.path.rpartition("/")[2].partition("?")[0]
            row = (self.headers.get("Range"), self.headers.get("Authorization"))
            hub.requests.append((server, self.command, name, *row))
            hub.counts[name] = hub.counts.get(name, 0) + 1
            if self.path.startswith("/api/datasets/"):
                self.list_files(hub.faults.get("listing", ""))
            else:
                (self.from_hub if server == "hub" else self.from_storage)(name)

        def list_files(self, fault: str) -> None:
            if fault in STATUS_CODES:
                self.reply(STATUS_CODES[fault][0], {})
                return
            items = [
                {
                    "type": "file", "path": hub.folders.get(name, "") + name, "size": len(data),
                    "oid": "0" * 40, "lfs": {"oid": hashlib.sha256(data).hexdigest()},
                }
                for name, data in hub.files.items()
            ]  # fmt: skip
            self.reply(200, {}, b"<html>" if fault == "page" else json.dumps(items).encode())

        def from_hub(self, name: str) -> None:
            fault = hub.faults.get(name, "")
            if fault in STATUS_CODES:
                status, code = STATUS_CODES[fault]
                self.reply(status, {"X-Error-Code": code})
            elif fault == "busy-twice" and hub.counts[name] <= 2:
                self.reply(503 if hub.counts[name] == 1 else 429, {"Retry-After": "0"})
            elif fault == "renamed" and "/new/" not in self.path:
                self.reply(307, {"Location": self.path.replace("/me/", "/new/")})
            elif fault == "down":
                self.reply(500, {})
            elif fault == "login":
                self.reply(200, {"Content-Type": "text/html"}, b"<html>Please sign in</html>")
            else:
                data = hub.files[name]
                headers = {
                    "X-Repo-Commit": "0" * 40,
                    "X-Linked-Size": str(len(data)),
                    "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                    "Location": f"{hub.storage_url}/{name}?signature=secret",
                }
                if fault in NO_HASH:
                    del headers["X-Linked-Etag"]
                if fault in ("no-size", "page", "empty"):
                    headers["X-Linked-Size"] = "0"
                if fault == "odd-size":
                    headers["X-Linked-Size"] = "²".encode().decode("latin-1")
                if fault == "circle" and self.command == "GET":
                    headers["Location"] = self.path
                self.reply(302, headers)

        def from_storage(self, name: str) -> None:
            fault, data = hub.faults.get(name, ""), hub.files[name]
            wanted = self.headers.get("Range")
            begin, _, last = (wanted or "").removeprefix("bytes=").partition("-")
            first, end = int(begin or 0), int(last) + 1 if last else None
            if fault == "ignores-range":
                wanted, first, end = None, 0, None
            if fault == "login-at-storage":
                self.reply(200, {"Content-Type": "text/html"}, b"<html>Please sign in</html>")
                return
            if fault in ("page", "empty"):
                self.reply(200, {}, b"<html>Please sign in</html>" if fault == "page" else b"")
                return
            if fault == "corrupt":
                data = data[:-1] + bytes([data[-1] ^ 1])
            if fault == "longer":
                data += b"more"
            body, headers = data[first:end], {"Content-Type": "application/octet-stream"}
            if wanted:
                headers["Content-Range"] = f"bytes {first}-{first + len(body) - 1}/{len(data)}"
            self.send_response(206 if wanted else 200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            is_first = len(hub.seen("storage", "GET")) == 1
            if fault == "drops-always":
                body = b""
            elif is_first and fault in ("drops", "stalls", "ignores-range"):
                body = body[: len(data) // 2]
            n_pieces = 20 if fault == "slow" else 1
            for i in range(n_pieces):
                self.wfile.write(body[len(body) * i // n_pieces : len(body) * (i + 1) // n_pieces])
                self.wfile.flush()
                time.sleep(0.01 if fault == "slow" else 0)
            if fault == "stalls" and is_first:
                time.sleep(1.0)
            self.close_connection = True

    return Handler


@contextmanager
def serve(files: dict[str, bytes], faults: dict[str, str] | None = None) -> Iterator[Hub]:
    """Run both servers; gives their `Hub`."""
    hub = Hub(files, faults or {})
    servers = []
    for name in ("hub", "storage"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, name))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
    hub.url, hub.storage_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
