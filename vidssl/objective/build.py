"""Builds the objective that a configuration describes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from vidssl.config import Spec, declarations
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder
from vidssl.objective.corruptions import Corruption
from vidssl.objective.feature_losses import OF_TARGET
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.masks import needs_video
from vidssl.objective.objective import Objective
from vidssl.objective.schema import MethodConfig
from vidssl.objective.targets import Target
from vidssl.objective.weighted_sum import WeightedSum


def build_objective(
    method: MethodConfig,
    model: Spec,
    frames: Sequence[int],
    size: int,
    seed: int,
    load_teacher: Callable[[str], Encoder],
    windows: Mapping[int, int],
) -> Objective:
    """The method with fresh weights drawn from `seed`.

    frames: of the encoder's native clip, then of the streams' clips. size: pixels of a clip's side.
    load_teacher: reads the frozen encoder of method.target.kind=teacher from its path
    (pretrained.load.load_teacher). windows: frames of a stream's clips -> windows of which they are joined.
    """
    torch.manual_seed(seed)
    encoder = model.build(
        frames=method.encoder_frames(frames[0], model.arguments["tubelet"]), height=size, width=size
    )
    terms: list[tuple[float, Objective]] = []
    is_sum = method.predicts + (not method.agree.is_absent) + (not method.pretext.is_absent) > 1
    clips = dict.fromkeys(frames if is_sum else frames[1:])  # a term of a sum may see single windows
    if method.predicts:
        prediction = build_masked_prediction(method, encoder, load_teacher)
        for count in clips:
            check_clip(prediction, count, size)
        terms.append((method.weight, prediction))
    for other in (method.agree, method.pretext):
        if not other.is_absent:
            term = other.build(encoder=encoder)
            term.windows = windows
            for count in clips:
                term.check_clip(count, size)
            terms.append((1.0, term))
    check_all_is_read(encoder, [term for _, term in terms])
    if len(terms) == 1:
        return terms[0][1]
    both = WeightedSum(encoder, terms)
    both.windows = windows
    return both


def build_masked_prediction(
    method: MethodConfig, encoder: Encoder, load_teacher: Callable[[str], Encoder]
) -> MaskedPrediction:
    given: dict[str, Any] = {"encoder": encoder}
    if method.target.kind == "teacher":
        given["teacher"] = load_teacher(method.target.arguments["path"])
    elif method.target.kind == "teachers":
        given["teachers"] = [load_teacher(path) for path in method.target.arguments["paths"]]
    target = method.target.build(**given)
    predictor = method.predictor.build(encoder=encoder, out=target.width)
    target.bind(predictor)
    needs_query = getattr(predictor, "needs_query", True)
    if needs_query == method.query.is_absent:
        wanted = "needs one: give its kind" if needs_query else "has none: leave it out"
        raise UserError(f"method.query: predictor {method.predictor.kind} {wanted}")
    if (method.mask.kind == "scored") == method.score.is_absent:
        raise UserError("method.mask.kind=scored and method.score go together: give both or neither")
    corruption = supply(method.corrupt, encoder=encoder)
    check_parts(method, target, predictor, corruption)
    query: Any = supply(method.query, width=predictor.width, encoder=encoder) if needs_query else None
    if query is not None and hasattr(query, "check_predictor"):
        query.check_predictor(predictor)
    aux = [supply(spec, encoder=encoder, target_width=target.width) for spec in method.aux]
    for module, spec in zip(aux, method.aux, strict=True):
        module.kind = spec.kind
        if getattr(module, "tokens", None) in OF_TARGET and not target.has_gradients:
            raise UserError(
                f"method.aux: {spec.kind} of tokens {module.tokens} moves nothing, as target "
                f"{method.target.kind} has no gradients; give tokens: prediction or tokens: context"
            )
    return MaskedPrediction(
        encoder,
        method.mask.build(),
        target,
        query,
        predictor,
        supply(method.error, width=target.width),
        method.context,
        corruption,
        method.score.build(encoder=encoder),
        aux,
        method.target_fraction,
        method.masks_per_clip,
    )


def supply(spec: Spec, **offered: Any) -> Any:
    """Builds a part with those of the offered arguments that it takes."""
    taken = declarations(spec.factory)
    return spec.build(**{name: value for name, value in offered.items() if name in taken})


def check_all_is_read(encoder: Encoder, terms: Sequence[Objective]) -> None:
    """Raises UserError if layers on the encoder's output, or its class token, would get no gradients, which
    ends a run of several processes."""
    layers = {"model.levels": encoder.level_norms, "model.head_depth": encoder.output_head}
    unread = [key for key, module in layers.items() if list(module.children())]
    if unread and not any(term.reads_levels for term in terms):
        raise UserError(
            f"{', '.join(unread)}: method.pretext and predictor cross with memory: mix do not read these "
            "layers, so that they would not be trained: leave them out"
        )
    hides_class = encoder.class_token is not None and encoder.attention != "full"
    if hides_class and not any(term.reads_class for term in terms):
        raise UserError(
            f"model.class_token: with model.attention={encoder.attention} no other token sees the class "
            "token, and no loss of this method reads it, so that it would not be trained: give "
            "model.class_token=false or model.attention=full"
        )


def check_parts(
    method: MethodConfig, target: Target, predictor: nn.Module, corruption: Corruption | None
) -> None:
    """Raises UserError if parts that belong together are not."""
    if target.weighted != (method.error.kind == "weighted_l2"):
        needed = "needs" if target.weighted else "has no weights for"
        raise UserError(
            f"method.error.kind: {method.error.kind}, but target {method.target.kind} {needed} weighted_l2"
        )
    if getattr(predictor, "needs_all_tokens", False) and not (corruption and corruption.sees_all):
        raise UserError(
            f"method.predictor.kind {method.predictor.kind}: the encoder must see hidden tokens, too: give a "
            "method.corrupt with which it does (kind token, or sees=all)"
        )


def check_clip(objective: MaskedPrediction, frames: int, size: int) -> None:
    """Raises UserError if clips of so many frames of size x size pixels do not suit the target or the
    mask."""
    objective.target.check_clip(frames, size)
    looks = needs_video(objective.mask if objective.score is None else objective.score)
    blank = torch.zeros(1, 3, frames, size, size, device="cpu" if looks else "meta")
    objective.make_masks(blank, KeyedRNG(0, 0, torch.zeros(1, dtype=torch.int64)))
