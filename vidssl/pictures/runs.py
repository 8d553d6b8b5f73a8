"""A training run on the disk: its configuration, its newest weights, what it predicts behind a mask."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.core.io import check_run_folder
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.objective import Objective
from vidssl.training.checkpoint import load_checkpoint
from vidssl.training.schema import TrainConfig


def masked_prediction_of(objective: Objective) -> MaskedPrediction | None:
    """The part of an objective that predicts behind a mask; None: there is none."""
    return next((m for m in objective.modules() if isinstance(m, MaskedPrediction)), None)


class TrainedRun(NamedTuple):
    """A run with the weights of its newest checkpoint, frozen."""

    folder: Path
    cfg: TrainConfig
    objective: Objective
    step: int

    @property
    def prediction(self) -> MaskedPrediction:
        """The part that predicts behind a mask. Raises UserError if the method has none."""
        part = masked_prediction_of(self.objective)
        if part is None:
            raise UserError(f"{self.folder}: its method predicts nothing behind a mask (no method.target)")
        return part


def open_run(folder: Path) -> TrainedRun:
    """Loads the newest checkpoint of a run's folder."""
    check_run_folder(folder)
    cfg = load_config([str(folder / "config.yaml")], TrainConfig)
    saved = load_checkpoint(folder / "checkpoints")
    if saved is None:
        raise UserError(f"{folder}: has no checkpoint yet (the first is written after run.save_every steps)")
    objective = cfg.build_objective()
    objective.load_state_dict(saved["model"])
    return TrainedRun(folder, cfg, objective.eval().requires_grad_(False), saved["step"])


class MaskPrediction(NamedTuple):
    """What a run predicts for the clips of a batch behind one mask, its groups joined."""

    video: Tensor  # f32 [B, 3, T, S, S], normalised
    grid: Grid
    context: Tensor  # i64 [B, Nc], the visible tokens
    ids: Tensor  # i64 [B, n], the hidden tokens that are predicted
    weight: Tensor  # f32 [B, n], 0: the prediction has no part in the loss
    values: Tensor  # f32 [B, n, K], the prediction
    features: Tensor  # f32 [B, Ns, D], of the encoder
    seen: Tensor  # i64 [B, Ns], the tokens that it was given: the visible ones, or all in corrupted form


def draw_mask(part: MaskedPrediction, clips: Tensor, rng: KeyedRNG, number: int = 0) -> Mask:
    """Mask `number` (modulo the masks that there are) of clips u8 [B, 3, T, S, S], on their device."""
    masks = part.make_masks(normalise(clips), rng)[0]
    return masks[number % len(masks)].to(clips.device)


@torch.no_grad()
def predict_mask(
    part: MaskedPrediction, clips: Tensor, mask: Mask, rng: KeyedRNG, number: int = 0
) -> MaskPrediction:
    """Predicts behind mask `number` of the method of clips u8 [B, 3, T, S, S]."""
    video = normalise(clips)
    grid = part.encoder.grid_of(video)
    encoded, prediction = part.predict_hidden(video, grid, number, mask, rng.to(video.device))
    weight = torch.ones_like(mask.target, dtype=torch.float32) if mask.weight is None else mask.weight
    z = encoded.z
    seen = encoded.mask.context
    return MaskPrediction(
        video,
        grid,
        mask.context,
        mask.target.flatten(1),
        weight.flatten(1),
        prediction.target.flatten(1, 2).float(),
        z[:, z.shape[1] - seen.shape[1] :].float(),
        seen,
    )
