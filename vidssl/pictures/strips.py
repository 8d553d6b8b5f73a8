"""Videos of a page as strips: frames side by side in one picture, of which the page shows one at a time."""

import io
from base64 import b64encode
from typing import Any

import numpy as np
from PIL import Image

SIDE = 112  # pixels, height to which larger frames are scaled down
WIDEST = 2 * SIDE
FPS = 6
QUALITY = 82  # of WebP
Group = dict[str, Any]


SHOWN_NAME = 28  # characters of a file name


def short_name(name: str) -> str:
    """A file name without its middle if it is long: its ends tell files apart."""
    return name if len(name) <= SHOWN_NAME else f"{name[: SHOWN_NAME // 2]}…{name[-SHOWN_NAME // 2 :]}"


def group(name: str, title: str, about: str) -> Group:
    """A section of a page: players of clips, and what is missing."""
    return {"id": name, "title": title, "about": about, "items": [], "missing": []}


def item(
    title: str, about: str, strips: list[dict[str, Any]], columns: int | None = None, fps: float = FPS
) -> dict[str, Any]:
    """Strips that play together; one with fewer frames starts again."""
    frames = max(one["frames"] for one in strips)
    return {"title": title, "about": about, "frames": frames, "fps": fps, "rows": strips, "columns": columns}


def strip(label: str, video: np.ndarray, smooth: bool = False, note: str = "") -> dict[str, Any]:
    """A video u8 [T, H, W, 3] as one picture. smooth: its pixels are not shown as squares; note: below the
    label."""
    frames = fitted_frames(video.astype(np.uint8))
    length, height, width = frames.shape[:3]
    whole = Image.new("RGB", (width * length, height))
    for i, frame in enumerate(frames):
        whole.paste(Image.fromarray(frame), (i * width, 0))
    out = io.BytesIO()
    whole.save(out, "WEBP", quality=QUALITY)
    source = f"data:image/webp;base64,{b64encode(out.getvalue()).decode()}"
    return {
        "label": label,
        "note": note,
        "src": source,
        "width": width,
        "height": height,
        "smooth": smooth or height >= SIDE,
        "frames": length,
    }


def fitted_frames(video: np.ndarray) -> np.ndarray:
    """Frames u8 [T, H, W, 3], scaled down to at most SIDE pixels of height and WIDEST of width."""
    height, width = video.shape[1:3]
    factor = min(1.0, SIDE / height, WIDEST / width)
    if factor == 1.0:
        return video
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in video])
