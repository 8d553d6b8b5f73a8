"""Short films of a spot that moves over a random background, for the search for copies."""

import io

import av
import numpy as np
from PIL import Image


def film(seed: int, seconds: float = 4.0) -> np.ndarray:
    """u8 [n,96,128,3], 24 frames per second: a bright spot moves over a background; both are random."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 200, (6, 8, 3), np.uint8))
    back = np.asarray(small.resize((128, 96), Image.Resampling.BICUBIC))
    return spots(back, rng, seconds)


def spots(back: np.ndarray, rng: np.random.Generator, seconds: float) -> np.ndarray:
    frames = np.repeat(back[None], round(seconds * 24), 0)
    f, p = rng.uniform(0.1, 0.4, 2), rng.uniform(0, 6, 2)
    for i, frame in enumerate(frames):
        x, y = (
            int(size * (0.5 + 0.35 * np.sin(2 * np.pi * f * i / 24 + p)[k]))
            for k, size in enumerate((128, 96))
        )
        frame[y - 7 : y + 7, x - 7 : x + 7] = 255
    return frames


def encode(frames: np.ndarray, size: tuple[int, int] = (128, 96), every: int = 1, crf: int = 18) -> bytes:
    """H.264 of every `every`-th frame (of 24 a second), scaled to `size` (width, height)."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as box:
        stream = box.add_stream("libx264", rate=24 // every, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for frame in frames[::every]:
            picture = np.asarray(Image.fromarray(frame).resize(size))
            box.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        box.mux(stream.encode())
    return out.getvalue()
