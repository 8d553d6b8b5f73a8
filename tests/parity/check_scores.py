"""Masks made from scores, and the methods that use them, compared with the references."""

from collections.abc import Callable

import torch
from case import Case
from einops import reduce
from torch import Tensor, nn

from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask
from vidssl.model.vit import Encoder
from vidssl.objective.change_score import Change
from vidssl.objective.errors import ERRORS
from vidssl.objective.loss_score import PredictedLoss
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.sampler_score import Sampler
from vidssl.objective.score_base import Score
from vidssl.objective.scored_mask import Scored
from vidssl.objective.selection import indices_of, other_ids
from vidssl.objective.targets import Pixels, Target
from vidssl.objective.warp_score import gaussian_map, warp_from_middle
from vidssl.pretrained import public
from vidssl.pretrained.key_maps import MAE, VIDEOMAE, Rules, rename

SAMPLER: Rules = [
    (r"encoder\.get_token_probs\.0\.mlp\.fc2\.bias", None),
    (r"encoder\.get_token_probs\.0\.(.*)", r"score.blocks.0.\1"),
    (r"encoder\.get_token_probs\.1\.weight", "score.proj.weight"),
    (r"encoder\.get_token_probs\.1\.bias", None),
    (r"encoder\.pos_embed_probs", "score.table"),
]
LOSS_PREDICTOR: Rules = [
    (r"decoder_blocks_losspred\.(.*)", r"score.predictor.blocks.\1"),
    (r"decoder_norm_losspred\.(.*)", r"score.predictor.norm.\1"),
    (r"decoder_pred_losspred\.(.*)", r"score.predictor.proj.\1"),
]


class GivenMask:
    """A masker that returns a given mask, whatever the scores."""

    def __init__(self, mask: Mask):
        self.mask = mask

    def from_scores(self, scores: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return [self.mask]


def build_networks(case: Case, own: Rules) -> tuple[Encoder, nn.Module, nn.Module, dict[str, Tensor]]:
    """Encoder, predictor and query, and the weights of the score by our names."""
    scored = rename({k: v for k, v in case.state.items() if is_known(k, own)}, own, case.name).tensors
    others = {k: v for k, v in case.state.items() if not is_known(k, own)}
    checkpoint = public.checkpoint_from_state(others, case.name, case.overrides())
    encoder = case.place(checkpoint.build_encoder())
    predictor, query = map(case.place, checkpoint.build_predictor(encoder))
    return encoder, predictor, query, {k.removeprefix("score."): v for k, v in scored.items()}


def is_known(key: str, rules: Rules) -> bool:
    return (
        bool(rename({key: torch.zeros(1)}, [*rules, (r".*", None)], "").tensors) or "get_token_probs" in key
    )


def compare_steps(
    case: Case, networks: tuple, mask: Mask, target: Target, score: Score, pixels: str = "loss"
) -> tuple[MaskedPrediction, dict[str, Tensor]]:
    """Compares predictions, targets and losses. Returns the objective, with gradients, and its losses."""
    encoder, predictor, query, _ = networks
    objective = MaskedPrediction(
        encoder, GivenMask(mask), target, query, predictor, ERRORS["l2"](), score=score
    )
    video = case.video
    rng = KeyedRNG(0, 0, torch.arange(len(video)))
    features = target(video)
    predicted = objective.predict(video, features, encoder.grid, 0, mask, rng, None)
    case.compare("prediction", predicted.prediction.target)
    if "target" in case:
        case.compare("target", predicted.target)
    for name in ("loss_tokens", "loss_matrix"):
        if name in case:
            case.compare(name, predicted.error)
    losses = objective(video, rng)
    if pixels in case:
        case.compare(pixels, losses["loss_0"])
    case.compare("loss", losses["loss"])
    losses["loss"].backward()
    return objective, losses


def gradients(objective: MaskedPrediction) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in objective.named_parameters()}


def check_adamae(case: Case) -> None:
    networks = build_networks(case, SAMPLER)
    encoder, weights = networks[0], networks[3]
    score = case.place(Sampler(encoder, heads=case.options["sampler_heads"]))
    weights["positions.table"] = weights.pop("table")[0]
    score.load_state_dict(weights)
    rng = KeyedRNG(0, 0, torch.arange(len(case.video)))
    case.compare("probabilities", score(case.video, encoder.grid, rng, encoder))
    context = case["visible_ids"]
    mask = Mask(context, other_ids(context, encoder.grid.n)[:, None])
    objective, losses = compare_steps(case, networks, mask, Pixels(encoder), score, "loss_reconstruction")
    case.compare("loss_sampling", losses["aux_sampler_0"])
    case.compare_gradients(lambda s: rename(s, [*SAMPLER, *VIDEOMAE], case.name), gradients(objective))


def check_everest(case: Case) -> None:
    networks = build_networks(case, [])
    encoder = networks[0]
    score = Change(encoder)
    scores = score(case.video, encoder.grid, KeyedRNG(0, 0, torch.arange(len(case.video))), encoder)
    case.compare("scores", scores)
    scores = case["scores"].flatten(1)
    options = case.options
    masker = Scored(options["masking_ratio"], neither=options["motion_centric_masking_ratio"], share=(0, 0))
    chosen = scores.argsort(1, descending=True).gather(1, case["selection_order"])
    noise = torch.ones_like(scores).scatter(
        1, chosen, torch.linspace(0, 0.9, chosen.shape[1], device=scores.device).expand(len(scores), -1)
    )
    context, target = masker.select(scores, noise, noise, 0)
    everything = torch.ones_like(scores)
    case.compare("hidden", everything.scatter(1, context, 0.0))
    case.compare("not_predicted", everything.scatter(1, target, 0.0))
    mask = Mask(context, target[:, None])
    objective, _ = compare_steps(case, networks, mask, Pixels(encoder), score)
    case.compare_objective_gradients(objective)


def check_hpm(case: Case) -> None:
    networks = build_networks(case, LOSS_PREDICTOR)
    encoder, predictor, query, weights = networks
    g = case.geometry
    score = PredictedLoss(
        encoder, g["ddim"], g["ddepth"], g["dheads"], positions="sincos_2d", class_token="encoder"
    )
    # The mean of all outputs is the output of the mean weights.
    outputs = len(weights["predictor.proj.bias"])
    for kind in ("weight", "bias"):
        weights[f"predictor.proj.{kind}"] = weights[f"predictor.proj.{kind}"].mean(0, keepdim=True)
        weights[f"predictor.embed.{kind}"] = getattr(predictor.embed, kind).detach()
    # Two biases only add a constant to all predictions.
    constant = weights.pop("predictor.proj.bias") + weights["predictor.proj.weight"] @ weights.pop(
        "predictor.norm.bias"
    )
    weights["query.tokens"] = query.tokens.detach()
    averages = {
        k.replace("predictor.", "average_predictor.", 1): v
        for k, v in weights.items()
        if k.startswith("predictor.")
    }
    averages |= {f"average_encoder.{k}": v for k, v in encoder.state_dict().items()}
    score.load_state_dict(weights | averages)
    score = case.place(score)
    hidden = case["mask"]
    count = int(hidden[0].sum())
    mask = Mask(indices_of(~hidden, hidden.shape[1] - count), indices_of(hidden, count)[:, None])
    rng = KeyedRNG(0, 0, torch.arange(len(hidden)))
    scores = score(case.video, encoder.grid, rng, encoder)
    case.compare("loss_prediction_whole", scores + constant.to(scores.device))
    compare_surely_hidden(case, case["loss_prediction_whole"])
    z = encoder(case.video, mask.context, return_levels=True)
    predicted = score.predictor(z, mask, score.query.tokens[0], encoder.grid).target
    case.compare("loss_prediction", predicted + constant.to(scores.device))
    norm = "patch" if case.options["norm_pix_loss"] else "none"
    target = Pixels(encoder, norm, "normalised")  # type: ignore[arg-type]
    objective, losses = compare_steps(case, networks, mask, target, score, "loss_pixels")
    case.compare("loss_learning", losses["aux_rank_0"])
    ours = gradients(objective)
    for name in ("predictor.embed.weight", "predictor.embed.bias", "query.tokens"):  # one of each there
        ours[name] = ours[name] + ours[f"score.{name}"]  # type: ignore[operator]
    mean = ours["score.predictor.proj.weight"]
    assert mean is not None
    ours["score.predictor.proj.weight"] = mean.expand(outputs, -1) / outputs
    ours["score.predictor.proj.bias"] = torch.zeros(outputs)
    ours["score.predictor.norm.bias"] = torch.zeros(mean.shape[1])
    case.compare_gradients(lambda s: rename(s, [*LOSS_PREDICTOR, *MAE], case.name), ours)


def compare_surely_hidden(case: Case, scores: Tensor) -> None:
    """The tokens that the scores hide, whatever the random numbers."""
    share = 0.5 * (case.options["epoch"] + 1) / case.options["epochs"]
    masker = Scored(case.options["mask_ratio"], share=(0.0, share))
    always = torch.ones_like(scores, dtype=torch.bool)
    rng = KeyedRNG(0, 0, torch.arange(len(scores))).to(scores.device)
    for _ in range(50):
        noise = rng.rand(scores.shape[1])
        always &= torch.zeros_like(always).scatter(1, masker.select(scores, noise, noise, 0)[1], True)
    count = case["surely_hidden"].shape[1]
    case.tensors["surely_hidden"] = case.tensors["surely_hidden"].sort(1)[0]
    case.compare("surely_hidden", indices_of(always, count))


def check_colormae(case: Case) -> None:
    scores = case["windows"].flatten(1)
    grid = Grid(1, *case["windows"].shape[1:])
    rng = KeyedRNG(0, 0, torch.arange(len(scores))).to(scores.device)
    (mask,) = Scored(case.options["mask_ratio"], "show").from_scores(scores, grid, rng)
    case.tensors["visible_ids"] = case.tensors["visible_ids"].sort(1)[0]
    case.compare("visible_ids", mask.context)
    case.compare("mask", torch.ones_like(scores).scatter(1, mask.context, 0.0))


def check_mgmae(case: Case) -> None:
    g = case.geometry
    side = g["img"] // g["patch"]
    grid = Grid(g["frames"] // g["tub"], side, side)
    first = gaussian_map(case["base_ids"], grid, g["patch"])
    case.compare("first_map", first)
    flows = case["flow_forward"], case["flow_backward"]
    maps = warp_from_middle(first, g["frames"], lambda a, b: flows[a > b][:, min(a, b)], as_published=True)
    pattern = "b (t u) (h p) (w q) -> b (t h w)"
    scores = reduce(maps, pattern, "sum", t=grid.t, h=grid.h, w=grid.w)
    # A sum over pixels: its error is relative.
    case.record("output", (scores.cpu() / case.tensors["scores"].flatten(1) - 1).abs().max().item(), "scores")
    case.not_compared.discard("scores")
    masker = Scored(case.options["mask_ratio"], "show", per_slice=True)
    rng = KeyedRNG(0, 0, torch.arange(len(scores))).to(scores.device)
    (mask,) = masker.from_scores(case["scores"].flatten(1), grid, rng)
    case.compare("mask", torch.ones_like(scores).scatter(1, mask.context, 0.0))


CHECKS: dict[str, Callable[[Case], None]] = {
    "adamae": check_adamae,
    "everest": check_everest,
    "hpm": check_hpm,
    "colormae": check_colormae,
    "mgmae": check_mgmae,
}
