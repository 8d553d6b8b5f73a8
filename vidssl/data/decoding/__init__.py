"""Bytes -> frames: opens a video or picture with the decoder that is right for it."""

from typing import get_args

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import IMAGE_EXTENSIONS, MAX_BYTES, Decoder, Video
from vidssl.data.decoding.image import ImageVideo
from vidssl.data.decoding.pyav import PyAVVideo


def select_decoder(ext: str, meta: dict | None, decoder: Decoder) -> str:
    """Which of image, decord, torchcodec and pyav opens a file. meta: what pack wrote beside it. `decoder`:

    - "auto": PyAV, which seeks where pack found that to be right; decord where only that was;
    - "decord": where pack found its frames to be right, and files that pack has not measured; else PyAV;
    - "torchcodec": where pack found decord right (it does not mirror, and counts frames that an edit list hides);
    - "pyav": PyAV.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder {decoder!r}: expected auto, decord or pyav, or torchcodec")
    if ext.lower().lstrip(".") in IMAGE_EXTENSIONS:
        return "image"
    if meta is None or "frames" not in meta:  # written by others: nothing in it that was measured
        return "decord" if decoder == "decord" else "pyav"
    if decoder == "auto":
        return meta.get("decoder", "pyav")
    return decoder if meta.get("decord") else "pyav"


def open_video(data: bytes, ext: str, meta: dict | None = None, decoder: Decoder = "auto") -> Video:
    """Open a video or image from memory. `ext` is without dot; for `meta` and `decoder` see `served_by`.

    With meta opening is cheap; without it the file is decoded once by PyAV to be sure of its frames. Raises DecodeError
    with a reason for anything that does not decode.
    """
    kind = select_decoder(ext, meta, decoder)
    if not data:
        raise DecodeError("empty")
    if len(data) > MAX_BYTES:
        raise DecodeError("too_large", f"{len(data)} bytes")
    if kind == "image":
        return ImageVideo(data)
    meta = meta if meta and "frames" in meta else None
    if kind == "decord":
        from vidssl.data.decoding.decord import DecordVideo  # it builds on this module

        return DecordVideo(data, meta)
    if kind == "torchcodec" and meta is not None:
        from vidssl.data.decoding.torchcodec import TorchCodecVideo  # an optional dependency

        return TorchCodecVideo(data, meta)
    return PyAVVideo(data, meta)
