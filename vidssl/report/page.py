"""The page: one HTML file that holds its data, pictures, style and programs, and asks for nothing else."""

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from vidssl.core.io import atomic_write

MAX_BYTES = 15_000_000
SECURITY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def plotly_script() -> str:
    """The plotting library, as the package plotly brings it."""
    from plotly.offline import get_plotlyjs  # imported late: it takes a second

    return get_plotlyjs()


def asset(name: str) -> str:
    """A file of this package's folder `assets`."""
    return files("vidssl.report").joinpath("assets", name).read_text()


def embedded_json(contents: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element."""
    text = json.dumps(contents, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def make_page(contents: dict[str, Any], ask_every_s: float | None = None) -> str:
    """The HTML of a page. ask_every_s: seconds after which it asks its server for new data; None: never."""
    connect = "" if ask_every_s is None else "; connect-src 'self'"
    parts = {
        "SECURITY": SECURITY + connect,
        "TITLE": html.escape(f"{contents['title']} - vidssl report"),
        "STYLE": asset("page.css"),
        "PLOTLY": plotly_script(),
        "CONTENTS": embedded_json({**contents, "ask_every_s": ask_every_s}),
        "SCRIPT": asset("page.js"),
    }
    pieces = asset("page.html").split("%%")
    # The template alone is cut, so what is put in is never searched for marks
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def write_page(path: Path, contents: dict[str, Any]) -> int:
    """Writes the page of these contents. Returns its bytes."""
    data = make_page(contents).encode()
    atomic_write(path, lambda beside: beside.write_bytes(data))
    return len(data)
