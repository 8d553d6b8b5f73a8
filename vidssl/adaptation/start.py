"""The weights from which an adaptation starts, as files of ours: RUN/start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vidssl.adaptation.families import INFLATED_TUBELET, Continuation, continuation_of
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.init import with_pixels
from vidssl.pretrained.load import inflate_to_video, read_checkpoint_file


class Start(NamedTuple):
    """A checkpoint, and what goes on from it."""

    checkpoint: Checkpoint
    metadata: dict[str, Any]
    source: Continuation

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.checkpoint.encoder.values())

    @property
    def line(self) -> str:
        """What was found, for the user."""
        model = self.checkpoint.model
        clip = f"{model['frames']} frames of {model['height']} pixels"
        kind = self.metadata.get("source", self.checkpoint.format)
        size = f"{self.parameters / 1e6:.2f} M parameters, patch {model['patch']}"
        return f"checkpoint: {kind}, {size}, clips of {clip}, positions {model['positions']}"


def read_start(source: str, facts: Mapping[str, Any]) -> Start:
    """facts: what a published file does not contain (see read_checkpoint_file)."""
    checkpoint, metadata = read_checkpoint_file(source, **facts)
    return Start(checkpoint, metadata, continuation_of(checkpoint, metadata))


def save_start(folder: Path, start: Start, frames: int, source: str) -> None:
    """Writes the checkpoint with the pixel statistics of training; an encoder of images as one of videos of
    `frames` frames."""
    checkpoint = with_pixels(start.checkpoint)
    if start.source.is_image:
        checkpoint = inflate_to_video(checkpoint, frames, INFLATED_TUBELET)
    folder.mkdir(exist_ok=True)
    save_native(folder, checkpoint, {**start.metadata, "adapted_from": source})
