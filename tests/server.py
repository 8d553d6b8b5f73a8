"""A real HTTP server in a thread, over a folder, whose answers can be made to fail."""

import gzip
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.queues import Queue
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from vidssl.data.shards import Shards

SLOW = 0.02  # seconds between the blocks of a slow answer


class Server(ThreadingHTTPServer):
    """faults: name of a file -> what befalls the next requests for it, one after the other; "" stands for
    nothing.

    "500", "403": that status. "cut 100", "stall 100": only 100 bytes come, then the end, or silence.
    "slow 100": 100 bytes at a time. "hold 100": after 100 bytes no more until `released` is set. "wrong": the
    last byte is another. "short": a file without its second half.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, root: Path, ranges: bool):
        self.root, self.ranges = root, ranges
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.asked: list[tuple[str, int]] = []  # (name, first byte asked for)
        self.sent: dict[str, int] = defaultdict(int)  # bytes of each name
        self.larger: dict[str, int] = defaultdict(int)  # zeros that are sent after the bytes of each name
        self.encoding = ""  # "gzip": answers are compressed
        self.released = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, folder: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/{folder}"

    def times_asked(self, suffix: str) -> int:
        return sum(name.endswith(suffix) for name, _ in self.asked)

    def handle_error(self, *_) -> None:  # the client went away
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Server = self.server  # type: ignore[assignment]
        path = server.root / unquote(urlsplit(self.path).path).lstrip("/")
        wanted = self.headers.get("Range")
        first, last = wanted.removeprefix("bytes=").split("-") if wanted and server.ranges else ("0", "")
        begin = int(first)
        server.asked.append((path.name, begin))
        faults = server.faults[path.name]
        fault, _, count = (faults.pop(0) if faults else "").partition(" ")
        self.close_connection = True
        if fault.isdecimal() or not path.is_file():
            return self.send_error(int(fault or 404))
        data = path.read_bytes() + bytes(server.larger[path.name])
        if server.encoding == "gzip":
            data = gzip.compress(data)
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if begin > len(data) or (begin and begin == len(data)):
            return self.send_error(416)
        end = min(int(last) + 1, len(data)) if last else len(data)
        self.send_response(206 if wanted and server.ranges else 200)
        self.send_header("Content-Length", str(end - begin))
        if server.encoding:
            self.send_header("Content-Encoding", server.encoding)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.end_headers()
        with suppress(OSError):
            self.send_body(path.name, data[begin:end], fault, int(count or 0))

    def send_body(self, name: str, data: bytes, fault: str, count: int) -> None:
        server: Server = self.server  # type: ignore[assignment]
        if fault in ("cut", "stall"):
            data = data[:count]
        for i in range(0, len(data), count or len(data) or 1):
            self.wfile.write(data[i : i + (count or len(data))])
            server.sent[name] += len(data[i : i + (count or len(data))])
            if fault == "slow":
                time.sleep(SLOW)
            if fault == "hold":
                server.released.wait()
        if fault == "stall":
            time.sleep(3)

    def log_message(self, *_) -> None:
        pass


def put_lengths(shards: "Shards", put: Queue) -> None:
    """Of all samples, read in this process; it stands here because what a spawned process imports takes its
    time."""
    put.put([len(shards.read(sample)) for sample in shards.list_samples()])


@contextmanager
def serving(root: Path, ranges: bool = True) -> Iterator[Server]:
    server = Server(root, ranges)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
