"""A Hugging Face hub on loopback for the tests of downloads."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Serves files as the hub does, and records the requests.

    Attributes:
        files: path → bytes.
        redirects: path → address of the same file on another server.
        tag: the ETag to send instead of a file's sha256.
        accepts_ranges: whether a request may start within a file.
        cuts: positions in the file where the connection breaks, one for each of the first responses.
        cut: position in the file where the connection of every later response breaks.
        stall: position after which nothing more is sent, while the connection stays open.
        surplus: number of bytes to send after the file, without announcing a length.
        requests: (method, path, token) of each request.
        starts: first byte of each response with content.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.redirects = files, {}
        self.tag = self.cut = self.stall = None
        self.accepts_ranges, self.cuts, self.surplus = True, [], 0
        self.requests, self.starts = [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send: bool):
        hub = self.server
        hub.requests.append((self.command, self.path, self.headers.get("Authorization")))
        data = hub.files.get(self.path)
        if data is None:
            self.head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
            return
        tag = hub.tag or f'"{hashlib.sha256(data).hexdigest()}"'
        if self.path in hub.redirects:
            linked = {"X-Linked-Size": len(data), "X-Linked-ETag": tag, "X-Repo-Commit": "0" * 40, "Content-Length": 0}
            self.head(302, {"Location": hub.redirects[self.path], **linked})
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        start = start if hub.accepts_ranges else 0
        headers = {"ETag": tag, "X-Repo-Commit": "0" * 40}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if not send or not hub.surplus:
            headers["Content-Length"] = len(data) - start
        self.head(206 if start else 200, headers)
        if send:
            hub.starts.append(start)
            self.send(data, start)

    def head(self, status: int, headers: dict[str, object]):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()

    def send(self, data: bytes, start: int):
        hub = self.server
        cut = hub.cuts.pop(0) if hub.cuts else hub.cut
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data[start : hub.stall or cut or len(data)])
            for _ in range(hub.surplus // 2**20):
                self.wfile.write(bytes(2**20))
            self.wfile.flush()
        self.close_connection = True
        if hub.stall:
            self.rfile.read(1)  # returns when the client disconnects

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve `files` within the context."""
    hub = Hub(files)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield hub
    hub.shutdown()
    hub.server_close()
