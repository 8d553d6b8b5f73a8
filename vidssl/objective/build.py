"""Builds the objective that a configuration describes."""

from collections.abc import Callable, Sequence

import torch

from vidssl.config import Spec
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder
from vidssl.objective.masks import needs_video
from vidssl.objective.objective import Objective
from vidssl.objective.schema import MethodConfig


def build_objective(
    method: MethodConfig,
    model: Spec,
    frames: Sequence[int],
    size: int,
    seed: int,
    load_teacher: Callable[[str], Encoder],
) -> Objective:
    """The method with fresh weights drawn from `seed`.

    frames: of the encoder's native clip, then of the streams' clips. size: pixels of a clip's side.
    load_teacher: reads the frozen encoder of method.target.kind=teacher from its path
    (pretrained.load.load_teacher).
    """
    torch.manual_seed(seed)
    encoder = model.build(frames=frames[0], height=size, width=size)
    given = {"encoder": encoder}
    if method.target.kind == "teacher":
        given["teacher"] = load_teacher(method.target.arguments["path"])
    target = method.target.build(**given)
    predictor = method.predictor.build(encoder=encoder, out=target.width)
    query = method.query.build(width=predictor.width)
    mask = method.mask.build()
    for count in frames:  # raises UserError if a stream's clip does not suit the target or the mask
        target.check_clip(count, size)
        device = "cpu" if needs_video(mask) else "meta"
        blank = torch.zeros(1, 3, count, size, size, device=device)
        mask(blank, encoder.grid_of(blank), KeyedRNG(0, 0, torch.zeros(1, dtype=torch.int64)))
    return Objective(encoder, mask, target, query, predictor, method.error.build(), method.context)
