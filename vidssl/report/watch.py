"""Serves a page on this machine, and new data for it while runs write."""

import json
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vidssl.core.errors import UserError
from vidssl.pictures.strips import Group, group
from vidssl.report.contents import Draw
from vidssl.report.page import make_page
from vidssl.report.run_files import RunFiles

HOST = "127.0.0.1"
ASK_EVERY_S = 3.0  # of an open page
WATCHED = ("config.yaml", "log.jsonl", "encoder.safetensors", "results.csv", "table.md")
REPORTS = ("*/probe.json", "*/*/probe.json", "*/dense.json", "*/decoded.json")
Contents = dict[str, Any]


def files_state(folders: Sequence[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the files that a page of these folders is made of."""
    found: list[tuple[str, int, int]] = []
    for folder in folders:
        for run in (folder, *sorted(folder.glob("*")), *sorted(folder.glob("runs/*"))):
            paths = [run / name for name in WATCHED]
            for pattern in REPORTS:
                paths += [*run.glob(pattern), *run.absolute().parent.glob(f"probes/{pattern}")]
            for path in sorted(set(paths)):
                try:
                    status = path.stat()
                except OSError:
                    continue
                found.append((str(path), status.st_mtime_ns, status.st_size))
    return tuple(found)


class LaterPictures:
    """Draws in a thread, so that figures wait for no picture. Until it is done there are those of before."""

    def __init__(self, draw: Draw):
        self.draw = draw
        self.drawn: list[Group] = [group("pictures", "Pictures", "They are being drawn.")]
        self.number = 0  # of the drawings so far that differ
        self.thread: threading.Thread | None = None

    def __call__(self, runs: Sequence[RunFiles]) -> list[Group]:
        """The groups of a page."""
        if self.thread is None or not self.thread.is_alive():
            # A daemon, so that Ctrl-C does not wait for it
            self.thread = threading.Thread(target=self._draw, args=(runs,), daemon=True)
            self.thread.start()
        return self.drawn

    def _draw(self, runs: Sequence[RunFiles]) -> None:
        drawn = self.draw(runs)
        if drawn is not self.drawn:
            self.drawn = drawn
            self.number += 1


class LiveContents:
    """The contents of a page, made anew when a file has changed or pictures are drawn."""

    def __init__(
        self,
        folders: Sequence[Path],
        make: Callable[[Draw | None], Contents],
        draw: Draw | None = None,
    ):
        """make: the contents with pictures that a function draws, or without any."""
        self.folders = folders
        self.make = make
        self.pictures = None if draw is None else LaterPictures(draw)
        self.lock = threading.Lock()
        self.state: Any = None
        self.contents: Contents = {}
        self.number = 0  # of the versions so far

    def current(self) -> tuple[int, Contents]:
        """The number of the version, and its contents."""
        with self.lock:
            pictures = self.pictures
            state = (files_state(self.folders), pictures and pictures.number)
            if state != self.state:
                self.contents = self.make(pictures)
                self.state = state
                self.number += 1
            return self.number, self.contents


class PageHandler(BaseHTTPRequestHandler):
    """`/`: the page; `/contents.json?since=N`: its contents, or nothing where N is the newest version."""

    live: LiveContents

    def do_GET(self) -> None:
        # Another site whose name leads here must not read what a run wrote
        if (self.headers.get("Host") or "").split(":")[0] not in (HOST, "localhost"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        path, _, query = self.path.partition("?")
        try:
            if path == "/":
                number, contents = self.live.current()
                self._send(make_page({**contents, "number": number}, ASK_EVERY_S), "text/html")
            elif path == "/contents.json":
                number, contents = self.live.current()
                if query == f"since={number}":
                    self.send_response(HTTPStatus.NO_CONTENT)
                    self.end_headers()
                else:
                    text = json.dumps({**contents, "number": number}, allow_nan=False)
                    self._send(text, "application/json")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)
        except UserError as e:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(e))
        except (BrokenPipeError, ConnectionResetError):
            # The page was closed meanwhile
            return

    def _send(self, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Requests are no news."""


def open_server(live: LiveContents, port: int) -> ThreadingHTTPServer:
    """A server that no other machine reaches. port: 0 takes a free one."""
    handler = type("BoundPageHandler", (PageHandler,), {"live": live})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as e:
        raise UserError(f"--port {port}: {e.strerror}; give another one, or 0 for any that is free") from e


def serve_page(live: LiveContents, port: int) -> None:
    """Serves until Ctrl-C."""
    live.current()
    with open_server(live, port) as server:
        print(
            f"http://{HOST}:{server.server_port}/ shows the page while this program runs; Ctrl-C ends it",
            flush=True,
        )
        server.serve_forever()
