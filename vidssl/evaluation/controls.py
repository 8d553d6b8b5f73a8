"""Names of the controls of an evaluation, without torch."""

from typing import Literal, get_args

FrameOrder = Literal["none", "shuffled", "reversed", "still"]  # reordering of the frames of each clip
EncoderControl = Literal["none", "random_init", "pixels"]  # untrained weights, or mean colours as features
Control = Literal[FrameOrder, "single", EncoderControl]  # "single": the middle frame alone, as an image
CONTROLS: tuple[Control, ...] = get_args(Control)


def control_name(control: str) -> str:
    """What a person reads: the control "none" is the encoder on unchanged clips."""
    return "unchanged clips" if control == "none" else control
