"""Panels: named short videos in rows, written as one animation (WebP, GIF) or as one still picture."""

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from vidssl.core.io import atomic_write, make_folder
from vidssl.pictures.formats import is_animated

BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
FAINT_INK = (120, 120, 120)
GAP = 6  # pixels between panels
TEXT = 13  # pixels, height of letters
STILL_FRAMES = 8  # of a panel in a still picture
ROW_NAME = 140  # pixels, the widest name of a row
PANEL_SIDE = 128  # pixels, the least height to which small videos are enlarged
HOLD_S = 0.8  # seconds that an animation rests on its last frame
HIDDEN_GREY = 225  # grey level of tokens that are not shown


class VideoPanel(NamedTuple):
    """A named video; a single frame stays still."""

    name: str
    frames: np.ndarray  # u8 [T, H, W, 3]
    note: str = ""  # a faint line below


class PanelRow(NamedTuple):
    """Panels side by side, which play together."""

    name: str
    panels: list[VideoPanel]


def write_panels(out: Path, rows: Sequence[PanelRow], fps: float, side: int = PANEL_SIDE) -> None:
    """Writes rows of panels: an animation (.webp, .gif), or of any other name a still picture in which the
    frames of a panel lie side by side. side: pixels to which smaller panels are enlarged."""
    make_folder(out.parent)
    if is_animated(out):
        data = encode_animation(play(rows, side), fps, out.suffix)
    else:
        data = encode_still(spread(rows, side), out.suffix)
    atomic_write(out, lambda temporary: temporary.write_bytes(data))


def encode_animation(frames: np.ndarray, fps: float, suffix: str = ".webp") -> bytes:
    """An endless animation of frames u8 [T, H, W, 3] as a file; it rests on the last frame."""
    images = [Image.fromarray(frame) for frame in frames]
    durations = [round(1000 / fps)] * len(images)
    durations[-1] += round(1000 * HOLD_S)
    out = io.BytesIO()
    options = {"quality": 85, "method": 4} if suffix == ".webp" else {"optimize": False}
    images[0].save(
        out,
        format=suffix.lstrip("."),
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        **options,
    )
    return out.getvalue()


def encode_still(picture: np.ndarray, suffix: str = ".png") -> bytes:
    """A picture u8 [H, W, 3] as a file."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format=suffix.lstrip("."))
    return out.getvalue()


def play(rows: Sequence[PanelRow], side: int = PANEL_SIDE) -> np.ndarray:
    """All panels at once, u8 [T, H, W, 3]: T is that of the longest; a shorter one takes as long. A name that
    stands above a panel is not repeated below it."""
    rows = [_enlarged(row, side) for row in rows]
    length = max(len(panel.frames) for row in rows for panel in row.panels)
    margin = _row_margin(rows)
    blocks = []
    above: list[str] = []
    for row in rows:
        names = [panel.name for panel in row.panels]
        parts = [_titled(panel, names != above, length) for panel in row.panels]
        above = names
        height = max(part.shape[1] for part in parts)
        block = np.concatenate([_padded(part, height, part.shape[2] + GAP) for part in parts], 2)
        name = "\n".join(_shortened(line, ROW_NAME) for line in row.name.split("\n"))
        left = _label_box(name, margin, height) if margin else np.zeros((height, 0, 3), np.uint8)
        left = np.broadcast_to(left, (length, *left.shape))
        blocks.append(np.concatenate([left, block], 2))
    return _framed(_stacked(blocks))


def spread(rows: Sequence[PanelRow], side: int = PANEL_SIDE) -> np.ndarray:
    """A still picture u8 [H, W, 3]: a line for each panel, its name at the left, its frames from left to
    right (at most STILL_FRAMES of them, evenly spaced)."""
    rows = [_enlarged(row, side) for row in rows]
    names = [text for row in rows for panel in row.panels for text in (panel.name, panel.note)]
    margin = max(_text_width(line) for name in names for line in name.split("\n")) + GAP
    blocks = []
    for row in rows:
        if row.name:
            name = row.name.replace("\n", "  ")
            text = _label_box(name, _text_width(name) + GAP, TEXT + GAP + 2, FAINT_INK)
            blocks.append(text[None])
        for panel in row.panels:
            frames = panel.frames
            if len(frames) > STILL_FRAMES:
                frames = frames[np.linspace(0, len(frames) - 1, STILL_FRAMES).round().astype(int)]
            name = f"{panel.name}\n{panel.note}" if panel.note else panel.name
            label = _label_box(name, margin, frames.shape[1])
            blocks.append(np.concatenate([label, film_strip(frames, GAP // 2)], 1)[None])
    return _framed(_stacked(blocks))[0]


def film_strip(video: np.ndarray, gap: int | None = None) -> np.ndarray:
    """The frames of a video [T, H, W, 3] side by side, u8 [H, T * (W + gap), 3], with a white gap after
    each. gap: pixels; None: a 40th of the width."""
    gap = -(-video.shape[2] // 40) if gap is None else gap
    framed = np.pad(video, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=255)
    return rearrange(framed, "t h w c -> h (t w) c").astype(np.uint8)


def enlarge(frames: np.ndarray, side: int = PANEL_SIDE, smooth: bool = False) -> np.ndarray:
    """Frames u8 [T, H, W, 3] enlarged by the whole factor that brings their height nearest to `side`; pixels
    become squares, or (smooth) are interpolated."""
    factor = max(1, round(side / frames.shape[1]))
    if factor == 1 or not smooth:
        return frames.repeat(factor, 1).repeat(factor, 2)
    size = (factor * frames.shape[2], factor * frames.shape[1])
    resized = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])


def _enlarged(row: PanelRow, side: int) -> PanelRow:
    return row._replace(panels=[p._replace(frames=enlarge(p.frames, side)) for p in row.panels])


def mark_frames(frames: np.ndarray, marked: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Frames u8 [T, H, W, 3] with a coloured edge around those where marked bool [T]."""
    out = frames.copy()
    width = max(1, frames.shape[1] // 64)
    for edge in (np.s_[:, :width], np.s_[:, -width:], np.s_[:, :, :width], np.s_[:, :, -width:]):
        part = out[marked]
        part[edge] = colour
        out[marked] = part
    return out


def stamp_times(frames: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """Frames u8 [T, H, W, 3] with a line of text below each."""
    boxes = [_label_box(text, frames.shape[2], TEXT + GAP, FAINT_INK) for text in texts]
    return np.concatenate([frames, np.stack(boxes)], 1)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(TEXT)


def _text_width(text: str) -> int:
    return int(np.ceil(_font().getlength(text)))


def _label_box(text: str, width: int, height: int, ink: tuple[int, int, int] = INK) -> np.ndarray:
    """Lines of text, centred in height, u8 [height, width, 3]."""
    image = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.multiline_text((0, height / 2), text, ink, _font(), anchor="lm", spacing=2)
    return np.asarray(image)


def _row_margin(rows: Sequence[PanelRow]) -> int:
    """Pixels at the left for the names of rows; 0 if they have none."""
    widest = max(_text_width(line) for row in rows for line in row.name.split("\n"))
    return min(widest, ROW_NAME) + 2 * GAP if widest else 0


def _shortened(text: str, width: int) -> str:
    """The text, cut so that it is at most `width` pixels wide."""
    if _text_width(text) <= width:
        return text
    while text and _text_width(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _titled(panel: VideoPanel, with_name: bool, length: int) -> np.ndarray:
    """A panel with its name above and its note below, u8 [length, H, W, 3]."""
    frames = panel.frames[np.arange(length) * len(panel.frames) // length]
    width = frames.shape[2]
    parts = [frames]
    line = TEXT + GAP
    if with_name:
        lines = panel.name.split("\n")
        title = "\n".join(_shortened(text, width + GAP) for text in lines)
        box = _label_box(title, width, line * len(lines))
        parts.insert(0, np.broadcast_to(box, (length, *box.shape)))
    if panel.note:
        box = _label_box(_shortened(panel.note, width), width, line, FAINT_INK)
        parts.append(np.broadcast_to(box, (length, *box.shape)))
    return np.concatenate(parts, 1)


def _padded(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Frames [T, H, W, 3] with background above and at the right, [T, height, width, 3]."""
    above = height - frames.shape[1]
    right = width - frames.shape[2]
    return np.pad(frames, ((0, 0), (above, 0), (0, right), (0, 0)), constant_values=BACKGROUND[0])


def _stacked(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks [T, H, W, 3] one below the other, with gaps."""
    width = max(block.shape[2] for block in blocks)
    padded = [_padded(block, block.shape[1] + GAP, width) for block in blocks]
    return np.concatenate(padded, 1)


def _framed(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] with a margin on all sides."""
    sides = ((0, 0), (GAP // 2, GAP), (GAP, GAP // 2), (0, 0))
    return np.pad(frames, sides, constant_values=BACKGROUND[0])
