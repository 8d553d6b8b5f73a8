"""How many of a clip's frames the encoder gets at once where a pretext task takes some of them; no torch."""

from collections.abc import Sequence

from vidssl.core.errors import UserError


def piece_length(frames: int, pieces: int, tubelet: int) -> int:
    """Frames of each of the pieces of a clip: whole tokens, together three quarters of it at most."""
    length = tubelet * (3 * frames // (4 * pieces * tubelet))
    if not length:
        raise UserError(
            f"method.pretext.pieces: {pieces} pieces of model.tubelet {tubelet} frames do not fit into three "
            f"quarters of data.frames {frames}: give {-(-4 * pieces * tubelet // 3)} frames or more"
        )
    return length


def paced_length(frames: int, paces: Sequence[int], tubelet: int) -> int:
    """Frames of a clip that is shown at one of the paces, as many as the fastest has."""
    unit = tubelet * max(paces)
    if frames % unit or not frames:
        near = -(-frames // unit) * unit
        raise UserError(
            f"method.pretext.paces: of data.frames {frames} the pace {max(paces)} leaves no whole tokens of "
            f"model.tubelet {tubelet} frames: give data.frames {near}"
        )
    return frames // max(paces)
