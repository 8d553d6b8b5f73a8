"""Pictures for the trackers of a run (TensorBoard, W&B, trackio), made while it trains: masks, predictions,
features as colours."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.log import logger
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.objective.objective import Objective
from vidssl.pictures.features import encode_on_grid, pca_videos
from vidssl.pictures.panels import PanelRow, VideoPanel, spread
from vidssl.pictures.predictions import mask_videos, predicted_videos
from vidssl.pictures.runs import draw_mask, masked_prediction_of
from vidssl.training.distributed import unsharded
from vidssl.training.feature_stats import Autocast
from vidssl.training.validation import unchanged_buffers

CLIPS = 4
SIDE = 96  # pixels, to which small frames are enlarged
# What a picture may fail by: none of it ends a run
PICTURE_ERRORS = (
    UserError, ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


class TrackedPictures:
    """Draws the first clips of the run since its start, always the same, and sends them to its trackers."""

    def __init__(self, accelerator: Any, seed: int, frames: int):
        """frames: of the encoder's clip; those that are loaded may be longer."""
        self.accelerator = accelerator
        self.seed = seed
        self.frames = frames
        self.clips: Tensor | None = None
        self.works = True

    def log(
        self, step: int, objective: Objective, video: Tensor, autocast: Autocast = contextlib.nullcontext
    ) -> dict[str, float]:
        """Sends the pictures after `step` steps; returns the seconds that it took, for the log. video: u8
        [B, 3, T, S, S], clips of the last step. An error ends the pictures and not the run."""
        if not self.works:
            return {}
        start_s = time.perf_counter()
        was_training = objective.training
        try:
            if self.clips is None:
                self.clips = video[:CLIPS, :, : self.frames].clone()
            objective.eval()
            with torch.no_grad(), unsharded(objective), unchanged_buffers(objective), autocast():
                pictures = draw_objective(objective, self.clips, self.seed)
            for tracker in self.accelerator.trackers:
                send_pictures(tracker, pictures, step)
        except PICTURE_ERRORS as e:
            self.works = False
            logger.warning(f"step {step}: no more pictures for trackers: {type(e).__name__}: {e}")
        finally:
            objective.train(was_training)
        return {"pictures_s": time.perf_counter() - start_s}


def draw_objective(objective: Objective, clips: Tensor, seed: int) -> dict[str, np.ndarray]:
    """Name -> picture u8 [H, W, 3] of clips u8 [B, 3, T, S, S]: frames from left to right."""
    device = next(objective.parameters()).device
    clips = clips.to(device)
    frames = list(rearrange(clips, "b c t h w -> b t h w c").cpu().numpy())
    video = normalise(clips)
    encoder = objective.eval_encoder
    features = encode_on_grid(encoder, video, encoder.grid_of(video)).cpu()
    colours = pca_videos(features, frames[0].shape[0], frames[0].shape[1])
    found = {"features": rows_of({"clip": frames, "features": colours})}
    part = masked_prediction_of(objective)
    if part is None:
        return found
    rng = KeyedRNG(seed, 0, torch.arange(len(clips)))
    mask = draw_mask(part, clips, rng)
    grid = part.encoder.grid_of(video)
    shown = [mask_videos(one, mask, grid, i) for i, one in enumerate(frames)]
    lines = {"clip": frames, **{name: [one[name] for one in shown] for name in shown[0]}}
    name, predicted = predicted_videos(part, clips, mask, rng, frames)
    return {"masks": rows_of(lines), "prediction": rows_of({"clip": frames, name: predicted}), **found}


def rows_of(lines: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """The videos of each clip below one another. lines: name -> a video u8 [T, S, S, 3] of each clip."""
    clips = range(len(next(iter(lines.values()))))
    rows = [PanelRow("", [VideoPanel(name, videos[i]) for name, videos in lines.items()]) for i in clips]
    return spread(rows, SIDE)


def send_pictures(tracker: Any, pictures: dict[str, np.ndarray], step: int) -> None:
    """Sends pictures u8 [H, W, 3] to a tracker of Accelerate."""
    named = {f"pictures/{name}": picture for name, picture in pictures.items()}
    if tracker.name == "tensorboard":
        batches = {name: picture[None] for name, picture in named.items()}
        tracker.log_images(batches, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio  # Accelerate has no images for it

        tracker.log({name: trackio.Image(picture) for name, picture in named.items()}, step=step)
    else:
        tracker.log_images({name: [picture] for name, picture in named.items()}, step=step)
