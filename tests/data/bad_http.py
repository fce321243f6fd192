"""A real HTTP server of a folder that misbehaves on demand."""

import http.server
import re
import threading
from collections import deque
from pathlib import Path
from types import TracebackType

STALL_S = 30.0


class BadServer:
    """Serves `folder` with ranges, but for its faults.

    `faults` says what it does with the next requests for shards, one each:
    a number: that status; "cut": half of the body, then the connection ends; "stall": half, then silence; "short": a
    Content-Length that is too small; "long": one that is too large; "whole": ignores the range; "flip": one wrong bit.
    `always` does so to every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: deque[str | int] = deque()
        self.always: str | int = ""
        self.requests: list[str] = []
        """Path and range of every request for a shard"""
        self.sent: dict[str, int] = {}
        """Bytes of the body that each shard's requests got"""
        self.wanted = ""
        """Authorization header without which every request is refused"""
        self.closing = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"

    def __enter__(self) -> "BadServer":
        threading.Thread(target=self._httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = self.folder / request.path.lstrip("/")
        is_shard = path.suffix == ".tar"
        fault: str | int = ""
        if is_shard:
            self.requests.append(f"{path.name} {request.headers.get('Range', '')}")
            fault = self.always or (self.faults.popleft() if self.faults else "")
        if self.wanted and request.headers.get("Authorization") != self.wanted:
            fault = 401
        if isinstance(fault, int) or not path.is_file():
            request.send_response(fault if isinstance(fault, int) else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        data = whole = path.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        ranged = span is not None and fault != "whole"
        if span is not None and fault != "whole":
            data = whole[int(span[1]) : int(span[2]) + 1]
        length = len(data)
        if fault == "short":
            length = len(data) // 2
        elif fault == "long":
            length = len(data) + 1000
        elif fault == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        request.send_response(206 if ranged else 200)
        request.send_header("Content-Length", str(length))
        if ranged and span is not None:
            request.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{len(whole)}")
        request.end_headers()
        if request.command == "HEAD":
            return
        body = data[: length if fault == "short" else len(data)]
        if fault in ("cut", "stall"):
            body = body[: len(body) // 2]
        if is_shard:
            self.sent[path.name] = self.sent.get(path.name, 0) + len(body)
        request.wfile.write(body)
        request.wfile.flush()
        if fault == "stall":
            self.closing.wait(STALL_S)
        if fault in ("cut", "stall", "long", "short"):
            request.close_connection = True
