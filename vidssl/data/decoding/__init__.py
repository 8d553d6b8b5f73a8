"""Bytes -> frames: opens a video or an image with the decoder that is right for it.

PyAV counts the frames that come out of the decoder, which is right for any file. decord and torchcodec count
packets, which is wrong for some files, so they serve only files for which `data_prep.pack` has compared both.

Frames are RGB, 8 bit, 0..255, as a player shows them: turned, mirrored and cropped as the file says. Alpha is
dropped; pixels that are not square stay as stored; HDR is converted without tone mapping.
"""

import importlib
from typing import get_args

from vidssl.core.errors import DecodeError
from vidssl.data.decoding.base import MAX_BYTES, Video
from vidssl.data.decoding.image import ImageVideo
from vidssl.data.decoding.presentation import is_plain
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.schema import Decoder


def check_decoder(decoder: Decoder) -> None:
    """Raises ValueError for an unknown decoder, UserError for one that is not installed."""
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder {decoder!r}: expected auto, decord or pyav, or torchcodec")
    if decoder in ("decord", "torchcodec"):
        import torch  # noqa: F401  # before decord: see there

        importlib.import_module(f"vidssl.data.decoding.{decoder}")  # its UserError names what is missing


def select_decoder(ext: str, meta: dict | None, decoder: Decoder) -> str:
    """Returns which of image, decord, torchcodec and pyav opens a file. meta: what pack recorded, or None.

    decoder:
    - "auto": PyAV, unless pack found PyAV's seeking wrong and decord right;
    - "decord": decord for files that pack found it right for, and for files that pack has not measured; else
      PyAV (`open_video` opens mirrored and cropped files by PyAV, too: decord shows neither);
    - "torchcodec": for files that pack found decord right for (neither of the two mirrors frames, or counts
      the frames that an edit list hides); else PyAV;
    - "pyav": PyAV.
    """
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder {decoder!r}: expected auto, decord or pyav, or torchcodec")
    if ext.lower().lstrip(".") in IMAGE_EXTENSIONS:
        return "image"
    if meta is None or "frames" not in meta:  # not measured by pack
        return "decord" if decoder == "decord" else "pyav"
    if decoder == "auto":
        return meta.get("decoder", "pyav")
    return decoder if meta.get("decord") else "pyav"


def open_video(
    data: bytes,
    ext: str,
    meta: dict | None = None,
    decoder: Decoder = "auto",
    motion_vectors: bool = False,
) -> Video:
    """Opens a video or an image from memory. ext: without dot. meta, decoder: see `select_decoder`.
    motion_vectors: for `Video.motion`, which PyAV alone has.

    Opening is cheap with meta; without, PyAV decodes the file once to count its frames. Raises DecodeError
    with a reason for anything that does not decode, UserError if the decoder is not installed.
    """
    selected = select_decoder(ext, meta, decoder)
    if not data:
        raise DecodeError("empty")
    if len(data) > MAX_BYTES:
        raise DecodeError("too_large", f"{len(data)} bytes")
    if selected == "image":
        return ImageVideo(data)
    meta = meta if meta and "frames" in meta else None
    if selected == "decord" and (meta is not None or is_plain(data)):
        import torch  # noqa: F401  # before decord: see there

        from vidssl.data.decoding.decord import DecordVideo  # a package that some platforms lack

        return DecordVideo(data, meta)
    if selected == "torchcodec" and meta is not None:
        from vidssl.data.decoding.torchcodec import TorchCodecVideo  # an optional dependency

        return TorchCodecVideo(data, meta)
    return PyAVVideo(data, meta, motion_vectors)
