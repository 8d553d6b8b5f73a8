"""How a player shows the frames of a video: turned, mirrored and cropped. Both are applied; what is not is
named: pixels that are not square stay as stored, and other angles are turned to the nearest right one."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import av

from vidssl.data.decoding.crop import NO_CROP, Crop
from vidssl.data.decoding.rotation import QUARTER_TURNS, Rotation, rotation_of
from vidssl.data.decoding.video_stream import VideoStream

SQUARE = 0.01  # a pixel's width may differ from its height by this share: sizes are rounded
# What is not applied
ASPECT = "pixels that are not square, as stored"
TURN = "a turn that is no multiple of 90 degrees, taken to the nearest"
OUTSIDE = "a crop beyond the picture, not applied"


class Presentation(NamedTuple):
    """stored_crop: of a frame as it is stored; crop: as it is displayed, after `rotation`. size: (height,
    width) as displayed. not_applied: what else the file asks for -> its value, for people."""

    rotation: Rotation
    stored_crop: Crop
    size: tuple[int, int]
    not_applied: dict[str, str]

    @property
    def crop(self) -> Crop:
        return self.rotation.turn_crop(self.stored_crop)


def presentation_of(stream: VideoStream, frame: av.VideoFrame) -> Presentation:
    """How the frames of a stream are shown, by its container and its first frame."""
    not_applied = {}
    rotation = rotation_of(frame)
    if frame.rotation % 90 not in (0, 1, 89):  # rounded degrees
        not_applied[TURN] = f"{-frame.rotation % 360} degrees clockwise"
    crop = stream.read_crop()
    if crop is None or not crop.fits((frame.height, frame.width)):
        not_applied[OUTSIDE] = "not within the picture"
        crop = NO_CROP
    aspect = stream.pixel_aspect
    if abs(aspect - 1) > SQUARE:
        not_applied[ASPECT] = f"{aspect.numerator}:{aspect.denominator}"
    size = rotation.turn_crop(crop).shown_size(rotation.displayed_size(frame))
    return Presentation(rotation, crop, size, not_applied)


def is_plain(data: bytes) -> bool:
    """Whether the frames of a file are shown whole, and turned by quarters of a turn at most. True for a file
    without a frame."""
    stream = VideoStream(io.BytesIO(data))
    try:
        frame = next(stream.decode(), None)
        if frame is None:
            return True
        shown = presentation_of(stream, frame)
        is_turned = shown.rotation in QUARTER_TURNS.values() or shown.rotation == Rotation()
        return is_turned and TURN not in shown.not_applied and shown.stored_crop == NO_CROP
    finally:
        stream.close()


def display_facts(crop: Crop, not_applied: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a sample's metadata: "crop" (top, bottom, left, right; pixels as displayed) and
    "not_applied"; none of a video that is shown whole and as it is stored."""
    facts = {"crop": list(crop) if crop != NO_CROP else None, "not_applied": dict(not_applied)}
    return {name: fact for name, fact in facts.items() if fact}
