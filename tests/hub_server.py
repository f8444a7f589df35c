"""What the local hubs of the tests have in common: files of one commit over HTTP, also interrupted or changed."""

import socket
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

COMMIT = "0123456789abcdef0123456789abcdef01234567"

S = TypeVar("S", bound=ThreadingHTTPServer)


@contextmanager
def served(server: S) -> Iterator[S]:
    """Runs a server in a thread while it holds."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """Answers for a server with `files` (name to bytes), `etag(name)`, and the name of a file `changed` or `interrupted`."""

    server: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer(body=True)

    @abstractmethod
    def answer(self, *, body: bool) -> None: ...

    def send_file(self, name: str, body: bool) -> None:
        data = self.server.files[name]
        if self.server.changed == name:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        headers = {"ETag": f'"{self.server.etag(name)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if body and self.server.interrupted == name:
            self.send(206 if start else 200, data[start:], False, headers)
            self.wfile.write(data[start : len(data) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send(206 if start else 200, data[start:], body, headers)

    def send(self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)
