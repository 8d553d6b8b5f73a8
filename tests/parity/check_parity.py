"""Compares our modules with tensors of the reference implementations.

python tests/parity/check_parity.py DIR [--device cuda] [--precision bf16]

Runs every case in DIR (NAME.json with its geometry and options, NAME.safetensors with the reference's state
dict, inputs, outputs and gradients; or the compact form in tests/parity/vectors) and prints one line for
each: the largest error of outputs and losses, absolute, and of gradients, relative. The kind of a case
follows from its tensors. A tensor that was compared with nothing is a failure. Exit status 0 only if every
case passes; cases of methods that are not implemented are listed and do not count. bf16: forward passes under
autocast, with the limits of BF16_LIMITS; training runs and mask statistics are left out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import check_agreement
import check_cross
import check_scores
import torch
import torch.nn.functional as F
from case import Case, Precision
from made_targets import check_hog
from torch import Tensor, nn

from vidssl.core.errors import UserError, run_cli
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder
from vidssl.objective.block_masks import MultiBlock3D
from vidssl.objective.ema_target import Ema, level_norm
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction, inverse_sqrt_distance
from vidssl.objective.masks import dual_mask, running_cell_maps
from vidssl.objective.schema import BlockGroup, ContextLoss
from vidssl.objective.target_base import Target
from vidssl.objective.targets import Pixels
from vidssl.objective.teachers import Teacher
from vidssl.pretrained import public
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.key_maps import ATTENTIVE, rename
from vidssl.training.optim import build_optimizer, schedule, schedule_progress, set_schedule
from vidssl.training.schema import OptimConfig

# vectors of methods that this project does not have yet
NOT_IMPLEMENTED: frozenset[str] = frozenset()
OWN_CHECKS = check_agreement.CHECKS | check_cross.CHECKS | check_scores.CHECKS
ONLY_FP32 = {"vjepa_run", "vjepa_mask_statistics"}  # training runs and draws of masks
MAX_STANDARD_ERRORS = 5.0
STATISTICS_DRAWS = 4000
INIT_SEEDS = 8


class FixedTarget(Target):
    """A target with given features."""

    def __init__(self, features: Tensor):
        super().__init__(features.shape[-1])
        self.features = features

    def forward(self, video: Tensor) -> Tensor:
        return self.features


class FixedMasks:
    """A masker that returns given masks."""

    def __init__(self, masks: list[Mask]):
        self.masks = masks

    def __call__(self, video: Tensor, grid: Grid, rng: KeyedRNG) -> list[Mask]:
        return self.masks


def rng_of_batch(batch: int) -> KeyedRNG:
    return KeyedRNG(0, 0, torch.arange(batch))


def compare_loss_and_gradients(case: Case, objective: MaskedPrediction, clips: Tensor) -> None:
    loss = objective(clips, rng_of_batch(len(clips)))["loss"]
    case.compare("loss", loss)
    loss.backward()
    case.compare_objective_gradients(objective)


def check_masked_pixels(case: Case) -> None:
    """VideoMAE, VideoMAE V2, MAE-ST and MAE."""
    checkpoint = public.checkpoint_from_state(case.state, case.name, case.overrides())
    encoder = case.place(checkpoint.build_encoder())
    predictor, query = map(case.place, checkpoint.build_predictor(encoder))
    clips = case.video
    grid = encoder.grid_of(clips)
    mask = pixel_mask(case)
    if checkpoint.format == "VideoMAE":
        target = Pixels(encoder)
    else:  # MAE and MAE-ST
        norm = "patch" if case.options.get("norm_pix_loss", True) else "none"
        frames = case.options.get("pred_t_dim")
        per_tubelet = frames and frames // encoder.grid.t
        target = Pixels(encoder, norm, "normalised", per_tubelet)  # type: ignore[arg-type]
    if "encoder_visible" in case:
        case.compare("encoder_visible", encoder(clips, mask.context))
    if "prediction" in case:
        case.compare("prediction", pixel_prediction(case, encoder, predictor, query, mask))
    if "target" in case:
        case.compare("target", gather_tokens(target(clips), mask.target[:, 0]))
    for key, module in (("encoder_pos_embed", encoder), ("decoder_pos_embed", predictor)):
        if key in case:
            case.compare(key, module.positions.table)
    if "all_running_cell_masks" in case:
        ratio = case["decode_mask"].float().mean().item()
        case.compare("all_running_cell_masks", running_cell_maps(grid, ratio).float())
    objective = MaskedPrediction(encoder, FixedMasks([mask]), target, query, predictor, ERRORS["l2"]())
    compare_loss_and_gradients(case, objective, clips)


def pixel_mask(case: Case) -> Mask:
    hidden = case["mask"].bool()
    if "decode_mask" in case:
        return dual_mask(hidden, case["decode_mask"].bool())
    if "ids_restore" in case:
        order = case["ids_restore"].argsort(1)
    else:
        order = hidden.int().argsort(dim=1, stable=True)
    num_context = int((~hidden[0]).sum())
    return Mask(order[:, :num_context], order[:, None, num_context:])


def pixel_prediction(
    case: Case, encoder: Encoder, predictor: JointPredictor, query: MaskToken, mask: Mask
) -> Tensor:
    """[B, Nt, K], or [B, N, K] in token order where the reference predicts at every token (MAE, MAE-ST)."""
    grid = encoder.grid_of(case.video)
    z = encoder(case.video, mask.context, return_levels=True)
    everywhere = case["prediction"].shape[1] == grid.n
    tokens = predictor.forward_tokens(z, mask, query.tokens[0], grid, include_context=everywhere)
    pred = predictor.proj(tokens[:, 0])
    if everywhere:
        pred = gather_tokens(pred, torch.cat([mask.context, mask.target[:, 0]], 1).argsort(1))
    return pred


def check_feature_prediction(case: Case) -> None:
    """V-JEPA, V-JEPA 2 and 2.1, and I-JEPA."""
    checkpoint = public.checkpoint_from_state(case.state, case.name, case.overrides())
    if checkpoint.model["positions"] == "learned":
        raise UserError(f"{case.name}: the reference's table of positions is none of ours")
    if "levels" in case.options and checkpoint.query is not None:
        checkpoint.query = checkpoint.query[:1]  # V-JEPA 2.1 uses its first mask token for every mask
    encoder = case.place(checkpoint.build_encoder(checkpoint.online))
    predictor, query = map(case.place, checkpoint.build_predictor(encoder))
    clips = case.video
    target = feature_target(case, checkpoint, encoder)
    masks = image_masks(case) if case.is_image else [case.mask(i) for i in range(case.count("context_ids."))]
    if case.is_image:  # the reference stacks the predictions block by block
        case.compare("target", gather_tokens(target(clips), masks[0].target).transpose(0, 1))
    else:
        case.compare("target_full", target(clips))
    compare_encoder_outputs(case, encoder)
    grid = encoder.grid_of(clips)
    for i, mask in enumerate(masks):
        suffix = "" if case.is_image else f".{i}"
        z = encoder(clips, mask.context, return_levels=True)
        pred = predictor(z, mask, query.of_mask(int(i)), grid)
        case.compare(f"context{suffix}", z)
        case.compare(f"prediction{suffix}", pred.target.transpose(0, 1) if case.is_image else pred.target)
        if f"prediction_context{suffix}" in case:
            case.compare(f"prediction_context{suffix}", pred.context)
            case.compare(f"context_weight{suffix}", inverse_sqrt_distance(mask, grid))
    if "init.encoder_proj_std" in case:
        check_initial_spread(case, checkpoint.model)
    context = ContextLoss(0.5) if "loss_context" in case else None
    error = ERRORS["smooth_l1" if case.is_image else "l1"]()
    objective = MaskedPrediction(encoder, FixedMasks(masks), target, query, predictor, error, context)
    if context is not None:
        parts = objective(clips, rng_of_batch(len(clips)))
        for key, part in (("loss_prediction", "loss"), ("loss_context", "context_loss")):
            case.compare(key, torch.stack([parts[f"{part}_{i}"] for i in range(len(masks))]).mean())
    compare_loss_and_gradients(case, objective, clips)


def feature_target(case: Case, checkpoint: Checkpoint, encoder: Encoder) -> Target:
    if "target_encoder.patch_embed.proj.weight" in case.state or case.is_image:
        return Ema(case.place(checkpoint.build_encoder()))
    teacher_state = {k: v for k, v in case.state.items() if k.startswith("teacher.")}
    width = case.geometry["teacher_dim"]
    if not teacher_state:  # the full case of the distilled model stores only the teacher's features
        return FixedTarget(level_norm(case["target_full"], width))
    state = {k.replace("teacher.", "encoder.", 1): v for k, v in teacher_state.items()}
    overrides = {**case.overrides(), "heads": case.geometry["teacher_heads"]}
    teacher = case.place(public.checkpoint_from_state(state, case.name, overrides).build_encoder())
    return Teacher(encoder, teacher, case.name)


def image_masks(case: Case) -> list[Mask]:
    """I-JEPA's one mask, whose target blocks are groups."""
    blocks = [case[f"target_ids.{i}"] for i in range(case.count("target_ids."))]
    return [Mask(case["context_ids"], torch.stack(blocks, 1))]


def compare_encoder_outputs(case: Case, encoder: Encoder) -> None:
    case.compare("encoder_full", encoder(case.video))
    for size in ("larger", "wide"):
        if f"clips_{size}" in case:
            case.compare(f"encoder_{size}", encoder(case[f"clips_{size}"]))
    if "encoder_image" in case:
        case.compare("encoder_image", encoder(case["images"]))
    if "encoder_full_levels" in case:
        case.compare("encoder_full_levels", encoder(case.video, return_levels=True))


def check_initial_spread(case: Case, model: dict[str, Any]) -> None:
    """The deviation of each layer's initial weights is within five standard errors of the reference's."""
    spreads = []
    for seed in range(INIT_SEEDS):
        torch.manual_seed(seed)
        blocks = Encoder(**{**model, "depth_rescale": True}).blocks
        rescaled = [b.mlp.fc1_x if hasattr(b.mlp, "fc1_x") else b.mlp.fc2 for b in blocks]
        attention = [b.attn.proj.weight.std().item() for b in blocks]
        spreads.append([attention, [layer.weight.std().item() for layer in rescaled]])
    ours = torch.tensor(spreads).mean(0)
    sizes = blocks[0].attn.proj.weight.numel(), rescaled[0].weight.numel()
    for i, key in enumerate(("init.encoder_proj_std", "init.encoder_fc_std")):
        standard_error = ((1 + 1 / INIT_SEEDS) / (2 * sizes[i])) ** 0.5
        deviation = ((case.tensors[key] / ours[i] - 1).abs().max() / standard_error).item()
        case.not_compared.discard(key)
        if deviation > MAX_STANDARD_ERRORS:
            case.record("output", float("inf"), f"{key} is {deviation:.1f} standard errors off")


def check_fine_tuned(case: Case) -> None:
    """VideoMAE's classifier on the mean of the tokens."""
    checkpoint = public.checkpoint_from_state(case.state, case.name, case.overrides())
    head = case.place(checkpoint.build_head())  # type: ignore[arg-type]
    tokens = case.place(checkpoint.build_encoder())(case["clips"])
    case.compare("features", head.features(tokens))  # type: ignore[union-attr, operator]
    case.compare("logits", head(tokens))


def check_attentive_head(case: Case) -> None:
    """A probe head: logits, cross-entropy with the labels 0, 1, 2, ..., gradients."""
    head = case.place(public.read_attentive_head(case.state, case.about["num_heads"], case.name))
    logits = head(case["features"])
    case.not_compared.discard("features")
    case.compare("logits", logits)
    labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    loss = F.cross_entropy(logits, labels)
    case.compare("loss", loss)
    loss.backward()
    ours = {f"head.{k}": p.grad for k, p in head.named_parameters()}
    case.compare_gradients(lambda state: rename(state, ATTENTIVE, case.name), ours)


def check_training_run(case: Case) -> None:
    """The reference's training loop: schedules, weight decay groups, EMA encoder, and the final weights."""
    overrides = case.overrides()
    checkpoint = public.checkpoint_from_state(case.state, case.name, overrides)
    encoder = case.place(checkpoint.build_encoder(checkpoint.online))
    predictor, query = map(case.place, checkpoint.build_predictor(encoder))
    target = Ema(case.place(checkpoint.build_encoder()))
    masks = FixedMasks([])
    objective = MaskedPrediction(encoder, masks, target, query, predictor, ERRORS["l1"]())
    trace = train_as_reference(case, objective, masks)
    for key, values in trace.items():
        case.compare(f"trace.{key}", torch.tensor(values), "trace")
    if case.is_compact:
        tokens = {f"query.{k}": v for k, v in query.state_dict().items()}
        networks = {
            "encoder": {f"encoder.{k}": v for k, v in encoder.state_dict().items()},
            "target_encoder": {f"encoder.{k}": v for k, v in target.encoder.state_dict().items()},
            "predictor": {f"predictor.{k}": v for k, v in predictor.state_dict().items()} | tokens,
        }
        case.compare_final(networks)
        return
    final = case.subtree("final")
    reference = public.checkpoint_from_state(final, case.name, overrides)
    assert reference.online is not None and reference.query is not None
    for name, module, weights in (
        ("encoder", encoder, reference.online),
        ("target", target.encoder, reference.encoder),
        ("predictor", predictor, reference.predictor_weights),
        ("query", query, {"tokens": reference.query}),
    ):
        for key, value in module.state_dict().items():
            case.record("final", (value.cpu() - weights[key]).abs().max().item(), f"{name}.{key}")
    case.not_compared -= {f"final.{k}" for k in final}


def train_as_reference(case: Case, objective: MaskedPrediction, masks: FixedMasks) -> dict[str, list[float]]:
    """Trains for the steps of the trace. Returns loss, gradient norms and schedules of every step."""
    h = case.about["hyperparameters"]
    steps = h["iterations_per_epoch"] * h["num_epochs"]
    optim = OptimConfig(
        lr=h["ref_lr"],
        warmup_lr=h["start_lr"],
        final_lr=h["final_lr"],
        warmup=int(h["warmup"] * h["iterations_per_epoch"]),
        weight_decay=h["wd"],
        final_weight_decay=h["final_wd"],
        betas=tuple(h["betas"]),
        eps=h["eps"],
        ipe_scale=h["ipe_scale"],
    )
    objective.target.momentum = tuple(h["ema"])
    optimizer = build_optimizer(objective, optim)
    num_batches = case.count("clips.")
    trace: dict[str, list[float]] = {key: [] for key in case.subtree("trace")}
    for step in range(len(case["trace.loss"])):
        batch = step % num_batches
        masks.masks = [case.mask(f"{batch}.{i}") for i in range(case.count(f"context_ids.{batch}."))]
        hparams = schedule(optim, step, steps, tuple(h["ema"]))
        set_schedule(optimizer, hparams)
        optimizer.zero_grad()
        loss = objective(case[f"clips.{batch}"], rng_of_batch(1))["loss"]
        loss.backward()
        values = {
            "loss": loss.item(),
            "lr": hparams["lr"],
            "wd": hparams["weight_decay"],
            "momentum": hparams["ema"],
            "grad_norm_encoder": gradient_norm(objective.encoder),
            "grad_norm_predictor": gradient_norm(objective.predictor, objective.query),
        }
        optimizer.step()
        objective.update(schedule_progress(optim, step, steps))
        for key, value in values.items():
            trace[key].append(value)
    return trace


def gradient_norm(*modules: nn.Module) -> float:
    norms = [p.grad.norm() for module in modules for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item()


def mask_deviation(path: Path) -> tuple[float, str]:
    """V-JEPA's multi-block sampler at a batch of one. Returns the largest deviation from the published
    sampler's statistics in standard errors, and the quantity that has it."""
    largest = (0.0, "-")
    for name, reference in json.loads(path.read_text()).items():
        frames, side = (int(part.rstrip("fpx")) for part in name.split("_")[:2])
        grid = Grid(frames // 2, side // 16, side // 16)
        group = BlockGroup(reference["num_blocks"], reference["block_scale"])
        masker = MultiBlock3D((group,), tuple(reference["aspect"]), truncate="raster")
        context = torch.zeros(STATISTICS_DRAWS, grid.n, dtype=torch.bool)
        for draw in range(STATISTICS_DRAWS):
            rng = KeyedRNG(0, draw, torch.tensor([draw]))
            context[draw, masker(torch.empty(0), grid, rng)[0].context[0]] = True
        ratio = context.float().mean(1)
        hidden = 1 - context[:, : grid.h * grid.w].float().mean(0).reshape(grid.h, grid.w)
        # Standard error of a difference of two means with deviation 1.
        error = (1 / STATISTICS_DRAWS + 1 / reference["draws"]) ** 0.5
        spread = reference["context_ratio_std"]
        deviations = {
            "mean": (ratio.mean().item() - reference["context_ratio_mean"]) / (spread * error),
            "spread": (ratio.std().item() / spread - 1) / (error / 2**0.5),
            "target": (1 - ratio.mean().item() - reference["target_ratio_mean"]) / (spread * error),
        }
        places = {"centre": hidden[grid.h // 2, grid.w // 2], "corner": hidden[0, 0]}
        for place, probability in places.items():
            p = reference[f"masked_prob_{place}"]
            deviations[place] = (probability.item() - p) / (max(p * (1 - p), 1e-3) ** 0.5 * error)
        for key, value in deviations.items():
            largest = max(largest, (abs(value), f"{name} {key}"))
    return largest


def compare_with_reference(case: Case) -> None:
    """The comparison for the kind of the case, which its tensors tell."""
    if case.name in OWN_CHECKS:
        OWN_CHECKS[case.name](case)
    elif "trace.loss" in case:
        check_training_run(case)
    elif "hog" in case:
        check_hog(case)
    elif any("query_tokens" in k for k in case.state):
        check_attentive_head(case)
    elif "fc_norm.weight" in case.state:
        check_fine_tuned(case)
    elif "mask" in case:
        check_masked_pixels(case)
    elif "context_ids.0" in case or "context_ids" in case:
        check_feature_prediction(case)
    else:
        raise UserError(f"{case.name}: not a case of a known kind")


def check(path: Path, device: str = "cpu", precision: Precision = "fp32") -> bool:
    """Runs one case and prints its line. Returns whether it passes. path: NAME.json."""
    if path.stem == "vjepa_mask_statistics":
        deviation, what = mask_deviation(path)
        passes = deviation < MAX_STANDARD_ERRORS
        print(f"{path.stem:40s} {deviation:.1f} standard errors ({what}){'' if passes else '  FAILED'}")
        return passes
    case = Case(path, device, precision)
    with case.autocast():
        compare_with_reference(case)
    errors = [
        f"{kind} {error:.1e} ({what})" for kind, (error, what) in case.largest_error.items() if what != "-"
    ]
    missing = f"  not compared: {', '.join(sorted(case.not_compared))}" if case.not_compared else ""
    print(f"{case.name:40s} {'  '.join(errors)}{missing}{'' if case.passes else '  FAILED'}")
    return case.passes


def case_paths(folder: Path) -> list[Path]:
    """The .json files of all cases of implemented methods in a folder."""
    paths = [p for p in sorted(folder.glob("*.json")) if p.stem not in NOT_IMPLEMENTED | {"mask_statistics"}]
    if not paths:
        raise UserError(f"{folder}: no case in it")
    return paths


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="check_parity", description="Compares our modules with references.")
    p.add_argument("folder", type=Path)
    p.add_argument("--device", default="cpu")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    a = p.parse_args(argv)
    folder = a.folder
    paths = case_paths(folder)
    if a.precision == "bf16":
        paths = [path for path in paths if path.stem not in ONLY_FP32]
    results = [check(path, a.device, a.precision) for path in paths]
    if skipped := sorted(p.stem for p in folder.glob("*.json") if p.stem in NOT_IMPLEMENTED):
        print(f"not implemented: {', '.join(skipped)}")
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, __doc__)
