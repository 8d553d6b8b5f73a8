"""Which files a picture can be written to; without libraries, so that a mistake is answered at once."""

from pathlib import Path

from vidssl.core.errors import UserError

ANIMATED = (".webp", ".gif")
STILL = (".png",)


def is_animated(out: Path) -> bool:
    return out.suffix in ANIMATED


def check_picture_name(out: Path) -> None:
    """Raises UserError unless the file's name ends as a picture's does."""
    if out.suffix not in (*STILL, *ANIMATED):
        raise UserError(
            f"{out}: give a file name that ends in .png (still), or in .webp or .gif (which play)"
        )
