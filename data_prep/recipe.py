"""How pack re-encodes: its options, and their checks, without PyAV."""

import argparse
from fractions import Fraction
from typing import NamedTuple

from vidssl.core.errors import UserError

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


class Recipe(NamedTuple):
    """How clips are cut and encoded. fps: frames per second, as the user wrote it; window, hop: seconds."""

    short_side: int | None = None
    fps: str | None = None
    keyframe_every: int = 8
    crf: int = 23
    preset: str = "medium"
    window: float | None = None
    hop: float | None = None
    scenes: bool = False


def add_encoding_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "re-encoding (on if any of these is given; else files keep their bytes)"
    ).add_argument
    add("--short-side", type=int, metavar="PIXELS", help="maximum short side; never enlarged")
    rates = "frames per second, such as 8 or 30000/1001; default: each file's own times"
    add("--fps", metavar="RATE", help=rates)
    add("--keyframe-every", type=int, metavar="FRAMES", help="distance of key frames; default 8")
    add("--crf", type=int, help="x264 quality: 1 (best) to 51; default 23")
    add("--preset", choices=PRESETS, help="x264 preset: slower ones write fewer bytes; default medium")
    add("--window", type=float, metavar="SECONDS", help="cut into clips of this length")
    add(
        "--hop",
        type=float,
        metavar="SECONDS",
        help="from one window's start to the next; default: no overlap",
    )
    add("--scenes", action="store_true", default=None, help="cut at abrupt changes of the picture")


def check_rate_option(option: str, rate: str) -> None:
    """Raises UserError unless `rate` is a number of frames per second."""
    try:
        if not 0 < Fraction(rate) <= 1000:
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{option} {rate}: expected a rate such as 8, 12.5 or 30000/1001") from None


def make_recipe(args: argparse.Namespace) -> Recipe | None:
    """Returns the recipe of the re-encoding options; None if there are none, so that files keep their
    bytes."""
    given = {name: getattr(args, name) for name in Recipe._fields if getattr(args, name) is not None}
    recipe = Recipe(**given)
    if (recipe.short_side is not None and recipe.short_side < 2) or recipe.keyframe_every < 1:
        raise UserError("--short-side must be at least 2 pixels, --keyframe-every at least 1 frame")
    if not 1 <= recipe.crf <= 51:
        raise UserError(f"--crf {recipe.crf}: expected 1 to 51")
    if recipe.fps is not None:
        check_rate_option("--fps", recipe.fps)
    is_short = any(seconds is not None and seconds < 0.01 for seconds in (recipe.window, recipe.hop))
    if is_short or (recipe.hop and not recipe.window):
        raise UserError("--window and --hop must be at least 0.01 s, and --hop needs --window")
    if recipe.window and recipe.scenes:
        raise UserError("--window or --scenes, not both")
    return recipe if given else None
