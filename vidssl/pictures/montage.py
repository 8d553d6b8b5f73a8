"""Rows of frames with a caption: what `vidssl search` has found."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw

from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write
from vidssl.data.shards import Shards
from vidssl.evaluation.isolated_clips import IsolatedEvalClips
from vidssl.evaluation.media_files import MediaFiles
from vidssl.evaluation.views import EvalClips, View

FRAMES = 4  # of a row
SIZE = 128  # pixels
GAP = 4  # pixels
CAPTION = 16  # pixels
DECODE_TIMEOUT_S = 60.0
DECODE_MEMORY = 4 << 30  # bytes


class Strip(NamedTuple):
    """A row of a montage."""

    caption: str
    frames: np.ndarray | None  # u8 [FRAMES, SIZE, SIZE, 3]; None: cannot be decoded


def strips_of(
    facts: dict[str, Any], rows: Sequence[tuple[str, float, float]], captions: Sequence[str]
) -> list[Strip]:
    """Frames evenly spread over rows (key, start, end) of an embedding. facts: kind, root and inputs of its
    embedding.json; end = 0: the whole file."""
    source: Shards | MediaFiles
    if facts["kind"] == "files":
        source = MediaFiles([key for key, _, _ in rows], facts["root"])
        samples = source.samples
    else:
        root = Path(facts["root"])
        source = Shards([str(root / item) if (root / item).exists() else item for item in facts["inputs"]])
        by_key = {sample.key: sample for sample in source.list_named_samples()}
        if missing := [key for key, _, _ in rows if key not in by_key]:
            raise UserError(
                f"{facts['inputs'][0]}: has no sample {missing[0]}, or several in its shards: embed again"
            )
        samples = [by_key[key] for key, _, _ in rows]
    view = View(frames=1, stride=1, fps=None, segments=FRAMES, crops=1, size=SIZE)
    spans = [(start, end) if end > 0 else (0.0, np.inf) for _, start, end in rows]
    clips = EvalClips(source, samples, view, FRAMES, spans)
    with closing(IsolatedEvalClips(clips, DECODE_TIMEOUT_S, DECODE_MEMORY)) as isolated:
        decoded = [isolated[number][1] for number in range(len(rows))]
    return [
        Strip(caption, None if isinstance(clip, str) else rearrange(clip.numpy(), "f c 1 h w -> f h w c"))
        for caption, clip in zip(captions, decoded, strict=True)
    ]


def draw_montage(strips: Sequence[Strip], out: Path) -> None:
    """Writes the rows, one below the other, the first one marked."""
    height = CAPTION + SIZE + GAP
    page = Image.new("RGB", (FRAMES * (SIZE + GAP) + GAP, len(strips) * height + GAP), "white")
    pen = ImageDraw.Draw(page)
    for row, strip in enumerate(strips):
        top = GAP + row * height
        pen.text((GAP, top), fitted(strip.caption), fill="firebrick" if row == 0 else "black")
        if strip.frames is None:
            pen.text((GAP, top + CAPTION), "cannot be decoded any more", fill="grey")
            continue
        for column, frame in enumerate(strip.frames):
            page.paste(Image.fromarray(frame), (GAP + column * (SIZE + GAP), top + CAPTION))
    kind = "PNG" if out.suffix.lower() == ".png" else "JPEG"
    atomic_write(out, partial(page.save, format=kind))


def fitted(text: str, characters: int = 84) -> str:
    """The text, without its middle if it is too long; only characters that the font has."""
    plain = text.encode("latin-1", "replace").decode("latin-1")
    half = (characters - 3) // 2
    return plain if len(plain) <= characters else f"{plain[:half]}...{plain[-half:]}"
