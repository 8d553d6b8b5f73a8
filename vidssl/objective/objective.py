"""What training asks of every objective, whichever its formula: masked_prediction.py has the first."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.core.schedules import linear
from vidssl.model.grid import Grid, Mask
from vidssl.model.vit import Encoder

Masker = Callable[[Tensor, Grid, KeyedRNG], list[Mask]]
Masks = (
    Any  # of a step: list[Mask], or None where they are drawn in the forward pass; of a sum, a list of such
)

FIXED = (1.0, 1.0)  # momentum of what no EMA follows


class Objective(nn.Module):
    """Maps (video f32 [B, 3, T, H, W], rng, masks) to {"loss": scalar, and parts for the log}. Accelerate
    prepares this module."""

    encoder: Encoder
    # whether the class token is all that is trained of the encoder's output
    trains_class_only = False
    takes_windows = False  # whether it compares the windows of a clip (data.windows)
    reads_levels = True  # whether it trains on what the encoder returns with return_levels
    reads_class = False  # whether it trains on the encoder's output at the class token
    windows: Mapping[int, int] = {}  # frames of a stream's clips -> data.windows; others have one
    mask: Masker | None  # which tokens the encoder sees; None: all

    def __init__(self) -> None:
        super().__init__()
        self.mask = None

    @property
    def parts(self) -> list[nn.Module]:
        """The modules of which it is made; each may say of itself what the properties below ask."""
        return list(self.children())

    @property
    def ema_encoder(self) -> Encoder | None:
        """The EMA encoder; None where there is none."""
        return next((e for p in self.parts if (e := getattr(p, "ema_encoder", None)) is not None), None)

    @property
    def eval_encoder(self) -> Encoder:
        """The encoder that is evaluated: the EMA encoder where there is one (as in V-JEPA), else the
        trained one."""
        return self.ema_encoder or self.encoder

    @property
    def momentum(self) -> tuple[float, float]:
        """Of the first part with an EMA, at the first and at the last step, linear between them; for the
        log."""
        return next((m for p in self.parts if (m := own_momentum(p)) != FIXED), FIXED)

    @property
    def couples_clips(self) -> bool:
        """Whether the loss compares the clips of a step with one another, so that they cannot be divided into
        micro-batches. A part that does so says it."""
        return any(getattr(p, "couples_clips", False) for p in self.parts)

    @property
    def varying_parts(self) -> list[nn.Module]:
        """The parts whose numbers of tokens differ from step to step."""
        return []

    def start_averages(self, loaded: Sequence[str]) -> None:
        """Called after weights were loaded into a fresh run, by their dotted names: averages of the encoder
        that were not among them start from the encoder."""
        if not any(".average_encoder." in name for name in loaded):
            for part in self.parts:
                if hasattr(part, "start_from"):
                    part.start_from(self.encoder)  # type: ignore[operator]

    @torch.no_grad()
    def update(self, progress: float, taken: Tensor | bool = True) -> None:
        """Called after every optimizer step. progress: of the schedules, 0 at the first step and 1 at the
        last, with which the momentum of each part goes along its own line; taken: whether the step was taken,
        perhaps as bool [] on the device, for which the host does not wait."""
        for part in self.parts:
            if not hasattr(part, "update") or taken is False:
                continue
            momentum: Any = linear(*own_momentum(part), progress)
            if taken is True:
                part.update(self.encoder, momentum)  # type: ignore[operator]
                continue
            before = [buffer.clone() for buffer in part.buffers()]
            momentum = torch.where(taken, torch.tensor(momentum, dtype=torch.float64), 1.0)
            part.update(self.encoder, momentum)  # type: ignore[operator]
            for buffer, old in zip(part.buffers(), before, strict=True):
                buffer.copy_(torch.where(taken, buffer, old))

    def target_features(self, video: Tensor) -> Tensor | None:
        """[B, N, K]: what is predicted at each token; None where tokens have no target."""
        return None

    @property
    def needs_motion(self) -> bool:
        """Whether a part asks for the motion vectors of the clips (data.motion_vectors)."""
        return any(getattr(p, "needs_motion", False) for p in self.parts)

    def windows_of(self, video: Tensor) -> tuple[Tensor, ...]:
        """The windows (data.windows) of clips [B, 3, T, H, W]."""
        return video.chunk(self.windows.get(video.shape[2], 1), 2)

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG, motion: Tensor | None = None) -> Masks:
        """Draws the masks of clips of this shape on the device of `rng`: on the host, ahead of the forward
        pass. None: there are none, or they are drawn in the forward pass. motion: f16 [B, 2, T, h, w], of
        the clips, for a part that needs it."""
        return None

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        """masks: of draw_masks, on the device of the video."""
        raise NotImplementedError


def own_momentum(part: nn.Module) -> tuple[float, float]:
    """Of a part's `update`, at the first and at the last step."""
    return getattr(part, "momentum", FIXED)  # type: ignore[return-value]
