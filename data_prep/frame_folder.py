"""A folder of numbered images as a video file: MOV in memory, with the bytes of the images where it can hold
them."""

import io
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from data_prep.sources.frames import is_image
from data_prep.sources.names import frame_number, is_flow
from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import MAX_BYTES, check_size
from vidssl.data.decoding.image import ERRORS, open_image

CODECS = {"JPEG": "mjpeg", "PNG": "png"}  # formats that MOV holds; others are stored as PNG


def frame_files(folder: Path) -> list[tuple[int, Path]]:
    """Returns (number, file) of the images of a folder, ascending."""
    files = []
    for file in folder.iterdir():
        found = frame_number(file.name)
        if found and is_image(file.name) and not file.name.startswith(".") and not is_flow(file.name):
            files.append((found[1], file))
    return sorted(files)


def folder_bytes(folder: Path) -> int:
    """Returns the size of the images of a folder."""
    return sum(file.stat().st_size for _, file in frame_files(folder))


def folder_as_video(folder: Path, rate: str, on_progress: Callable[[], None]) -> io.BytesIO:
    """Returns a MOV file of the frames at `rate` a second. Missing numbers are pauses.

    Raises DecodeError if an image cannot be read, or has another size or format than the first.
    """
    files = frame_files(folder)
    if not files:
        raise DecodeError("empty")
    if sum(file.stat().st_size for _, file in files) > MAX_BYTES:
        raise DecodeError("too_large", f"more than {MAX_BYTES} bytes")
    numbers = [number for number, _ in files]
    step = min((b - a for a, b in pairwise(numbers)), default=1)
    if step == 0:
        same = next(b for a, b in pairwise(files) if a[0] == b[0])
        raise DecodeError(
            "frames_differ", f"two images have the number {same[0]}, one of them {same[1].name}"
        )
    out = io.BytesIO()
    first: tuple[str, tuple[int, int]] | None = None
    stream: Any = None
    tick = 1 / Fraction(rate)  # seconds; the muxer changes the time base of its stream
    with av.open(out, "w", format="mov") as container:
        for number, file in files:
            image_format, size, data = read_frame(file)
            if first is None:
                first = image_format, size
                stream = container.add_stream(CODECS[image_format], rate=Fraction(rate))
                stream.width, stream.height = size
                stream.pix_fmt = "rgb24" if image_format == "PNG" else "yuvj420p"
                stream.time_base = stream.codec_context.time_base = tick
            if (image_format, size) != first:
                raise DecodeError(
                    "frames_differ", f"{file.name} is {image_format} {size}, {files[0][1].name} {first}"
                )
            packet = av.Packet(data)
            packet.pts = packet.dts = (number - numbers[0]) // step
            packet.duration = 1
            packet.time_base = tick
            packet.stream = stream
            packet.is_keyframe = True
            container.mux(packet)
            on_progress()
    out.seek(0)
    return out


def read_frame(file: Path) -> tuple[str, tuple[int, int], bytes]:
    """Returns format, (width, height) and bytes of an image, as PNG if MOV does not hold its format."""
    try:
        with open_image(file) as image:
            check_size(*image.size)
            if image.format in CODECS:
                return image.format, image.size, file.read_bytes()
            out = io.BytesIO()
            image.convert("RGB").save(out, "png", compress_level=1)
            return "PNG", image.size, out.getvalue()
    except ERRORS as e:
        raise DecodeError("not_an_image", f"{file.name}: {type(e).__name__}") from e
