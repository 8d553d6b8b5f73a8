"""Our modules against tensors of the reference implementations.

python tools/check_parity.py DIR

Runs every case found in DIR (NAME.safetensors with the reference's state dict, inputs, outputs and gradients;
NAME.json with its geometry and options) and prints a line for each: the largest absolute error of outputs and
losses (limit 1e-4) and the largest error of a gradient, relative to that gradient's largest entry (limit
1e-3). What a case is, is seen from what it holds; a tensor that nothing was compared with is a failure. Exit
status 0 only if all hold.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from parity_case import Case
from torch import Tensor, nn

from vidssl.core.errors import UserError, run_cli
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.model.vit import Encoder
from vidssl.objective.block_masks import BlockGroup, MultiBlock3D
from vidssl.objective.masks import dual_mask, running_cell_maps
from vidssl.objective.objective import ERRORS, ContextLoss, Objective, inverse_sqrt_distance
from vidssl.objective.targets import Ema, Pixels, level_norm
from vidssl.pretrained import public
from vidssl.pretrained.key_maps import ATTENTIVE, rename
from vidssl.training.optim import OptimConfig, build_optimizer, schedule, set_schedule

OUTPUT, GRADIENT = 1e-4, 1e-3  # limits


class Given(nn.Module):
    """A target, or a masker, that says what the case says."""

    def __init__(self, value: Any, width: int = 0):
        super().__init__()
        self.value, self.width = value, width

    def forward(self, *_: Any) -> Any:
        return self.value


def start(values: int) -> KeyedRNG:
    return KeyedRNG(0, 0, torch.arange(values))


def masked_pixels(case: Case) -> None:
    """VideoMAE, VideoMAE V2, MAE-ST and MAE."""
    found = public.read_state(case.state, case.name, case.given())
    encoder = found.build_encoder()
    predictor, query = found.build_predictor(encoder)
    clips = case.video
    hidden = case["mask"]
    if "decode_mask" in case:
        mask = dual_mask(hidden, case["decode_mask"])
    else:
        order = (
            case["ids_restore"].argsort(1)
            if "ids_restore" in case
            else hidden.int().argsort(dim=1, stable=True)
        )
        mask = Mask(order[:, : int((~hidden[0]).sum())], order[:, None, int((~hidden[0]).sum()) :])
    if found.format == "VideoMAE":
        target = Pixels(encoder)
    else:  # MAE and MAE-ST
        count = case.options.get("pred_t_dim")
        norm = "patch" if case.options.get("norm_pix_loss", True) else "none"
        target = Pixels(encoder, norm, "normalised", count and count // encoder.grid.t)  # type: ignore[arg-type]
    objective = Objective(encoder, Given([mask]), target, query, predictor, ERRORS["l2"]())
    grid = encoder.grid_of(clips)
    if "encoder_visible" in case:
        case.compare("encoder_visible", encoder(clips, mask.context))
    if "prediction" in case:
        z = encoder(clips, mask.context, return_levels=True)
        whole = case["prediction"].shape[1] == grid.n
        said = predictor.proj(predictor.forward_tokens(z, mask, query(0), grid, include_context=whole)[:, 0])
        if whole:  # MAE-ST predicts at every token
            said = gather_tokens(said, torch.cat([mask.context, mask.target[:, 0]], 1).argsort(1))
        case.compare("prediction", said)
    if "target" in case:
        case.compare("target", gather_tokens(target(clips), mask.target[:, 0]))
    for key, module in (("encoder_pos_embed", encoder), ("decoder_pos_embed", predictor)):
        if key in case:
            case.compare(key, module.positions.table)
    if "all_running_cell_masks" in case:
        ratio = case["decode_mask"].float().mean().item()
        case.compare("all_running_cell_masks", running_cell_maps(grid, ratio).float())
    finish(case, objective, clips)


def finish(case: Case, objective: Objective, clips: Tensor) -> None:
    """Loss and gradients."""
    parts = objective(clips, start(len(clips)))
    case.compare("loss", parts["loss"])
    parts["loss"].backward()
    case.gradients(objective)


def features(case: Case) -> None:
    """V-JEPA, V-JEPA 2 and 2.1, and I-JEPA: predictions of features."""
    found = public.read_state(case.state, case.name, case.given())
    encoder = found.build_encoder(found.online)
    if found.model["positions"] == "learned":
        raise UserError(f"{case.name}: the reference's table of positions is none of ours")
    if "levels" in case.options and found.query is not None:
        found.query = found.query[:1]  # V-JEPA 2.1 uses its first mask token for every mask
    predictor, query = found.build_predictor(encoder)
    image, clips = case.image, case.video
    grid = encoder.grid_of(clips)
    target: nn.Module = Ema(found.build_encoder())
    if image:
        groups = [
            case[f"target_ids.{i}"]
            for i in range(len([k for k in case.tensors if k.startswith("target_ids.")]))
        ]
        masks = [Mask(case["context_ids"], torch.stack(groups, 1))]
        names = [("context", "prediction", "")]
        case.compare(
            "target", gather_tokens(target(clips), masks[0].target).transpose(0, 1)
        )  # stacked block by block there
    else:
        count = len([k for k in case.tensors if k.startswith("context_ids.")])
        masks = [case.ids(i) for i in range(count)]
        names = [(f"context.{i}", f"prediction.{i}", f".{i}") for i in range(count)]
        if (
            "target_encoder.patch_embed.proj.weight" not in case.state
        ):  # distilled: only the teacher's features are given
            target = Given(
                level_norm(case["target_full"], case.geometry["teacher_dim"]), case.geometry["teacher_dim"]
            )
        case.compare("target_full", target(clips))
    for m, (context, prediction, i) in zip(masks, names, strict=True):
        z = encoder(clips, m.context, return_levels=True)
        got = predictor(z, m, query(int(i[1:] or 0)), grid)
        case.compare(context, z)
        case.compare(prediction, got.target.transpose(0, 1) if image else got.target)
        if f"prediction_context{i}" in case:
            case.compare(f"prediction_context{i}", got.context)
            case.compare(f"context_weight{i}", inverse_sqrt_distance(m, grid))
    case.compare("encoder_full", encoder(clips))
    for shape in ("larger", "wide"):
        if f"clips_{shape}" in case:
            case.compare(f"encoder_{shape}", encoder(case[f"clips_{shape}"]))
    if "encoder_image" in case:
        case.compare("encoder_image", encoder(case["images"]))
    if "encoder_full_levels" in case:
        case.compare("encoder_full_levels", encoder(clips, return_levels=True))
    if "init.encoder_proj_std" in case:
        start_values(case, found.model)
    context = ContextLoss(0.5) if "loss_context" in case else None
    error = ERRORS["smooth_l1" if image else "l1"]()
    objective = Objective(encoder, Given(masks), target, query, predictor, error, context)
    if context:
        parts = objective(clips, start(len(clips)))
        for key, part in (("loss_prediction", "loss"), ("loss_context", "context")):
            case.compare(key, torch.stack([parts[f"{part}_{i}"] for i in range(len(masks))]).mean())
    finish(case, objective, clips)


def start_values(case: Case, model: dict[str, Any]) -> None:
    """Spread of the weights at the start, layer by layer: within five standard errors of the reference's."""
    spreads = []
    for seed in range(8):
        torch.manual_seed(seed)
        blocks = Encoder(**{**model, "depth_rescale": True}).blocks
        second = [b.mlp.fc1_x if hasattr(b.mlp, "fc1_x") else b.mlp.fc2 for b in blocks]
        spreads.append(
            [[b.attn.proj.weight.std().item() for b in blocks], [m.weight.std().item() for m in second]]
        )
    ours = torch.tensor(spreads).mean(0)
    sizes = blocks[0].attn.proj.weight.numel(), second[0].weight.numel()
    for i, key in enumerate(("init.encoder_proj_std", "init.encoder_fc_std")):
        off = ((case[key] / ours[i] - 1).abs().max() / (1.125 / (2 * sizes[i])) ** 0.5).item()
        case.left.discard(key)
        if off > 5:
            case.note("output", float("inf"), f"{key} is {off:.1f} standard errors off")


def fine_tuned(case: Case) -> None:
    """VideoMAE's classifier on the mean of the tokens."""
    found = public.read_state(case.state, case.name, case.given())
    encoder, head = found.build_encoder(), found.build_head()
    tokens = encoder(case["clips"])
    case.compare("features", head.features(tokens))  # type: ignore[union-attr, operator]
    case.compare("logits", head(tokens))


def attentive(case: Case) -> None:
    """A probe head: logits, cross-entropy with the labels 0, 1, 2, ..., gradients."""
    head = public.read_attentive(case.state, case.about["num_heads"], case.name)
    logits = head(case["features"])
    case.left.discard("features")
    case.compare("logits", logits)
    labels = torch.arange(len(logits)) % logits.shape[1]
    loss = nn.functional.cross_entropy(logits, labels)
    case.compare("loss", loss)
    loss.backward()
    theirs = {k.removeprefix("grad."): v for k, v in case.tensors.items() if k.startswith("grad.")}
    ours = {f"head.{k}": p.grad for k, p in head.named_parameters()}
    case.compare_gradients(rename(theirs, ATTENTIVE, case.name).tensors, ours)
    case.left -= {f"grad.{k}" for k in theirs}


def run(case: Case) -> None:
    """The reference's training loop: schedules, decay groups, momentum, and where the weights end."""
    given = case.given()
    found = public.read_state(case.state, case.name, given)
    encoder = found.build_encoder(found.online)
    predictor, query = found.build_predictor(encoder)
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
    target = Ema(found.build_encoder())
    masks = Given([])
    objective = Objective(encoder, masks, target, query, predictor, ERRORS["l1"]())
    optimizer = build_optimizer(objective, optim)
    batches = len([k for k in case.tensors if k.startswith("clips.")])
    trace: dict[str, list[float]] = {
        k.removeprefix("trace."): [] for k in case.tensors if k.startswith("trace.")
    }
    for step in range(len(case["trace.loss"])):
        b = step % batches
        count = len([k for k in case.tensors if k.startswith(f"context_ids.{b}.")])
        masks.value = [case.ids(f"{b}.{i}") for i in range(count)]  # type: ignore[arg-type]
        now = schedule(optim, step, steps, tuple(h["ema"]))
        set_schedule(optimizer, now)
        optimizer.zero_grad()
        loss = objective(case[f"clips.{b}"], start(1))["loss"]
        loss.backward()
        norms = {
            "grad_norm_encoder": [p.grad.norm() for p in encoder.parameters()],  # type: ignore[union-attr]
            "grad_norm_predictor": [p.grad.norm() for m in (predictor, query) for p in m.parameters()],  # type: ignore[union-attr]
        }
        optimizer.step()
        target.update(encoder, now["ema"])
        values = {
            "loss": loss.item(),
            "lr": now["lr"],
            "wd": now["weight_decay"],
            "momentum": now["ema"],
        }
        for key, value in {**values, **{k: torch.stack(v).norm().item() for k, v in norms.items()}}.items():
            trace[key].append(value)
    for key, values in trace.items():
        case.compare(f"trace.{key}", torch.tensor(values))
    final = {k.removeprefix("final."): v for k, v in case.tensors.items() if k.startswith("final.")}
    want = public.read_state(final, case.name, given)
    ours = {"encoder": encoder, "target": target.encoder, "predictor": predictor, "query": query}
    theirs = {
        "encoder": want.online,
        "target": want.encoder,
        "predictor": want.predictor_weights,
        "query": {"tokens": want.query},
    }
    for part, module in ours.items():
        for key, value in module.state_dict().items():
            case.note("output", (value - theirs[part][key]).abs().max().item(), f"final {part}.{key}")  # type: ignore[index]
    case.left -= {f"final.{k}" for k in final}


def mask_statistics(path: Path) -> tuple[float, str]:
    """The multi-block sampler at a batch of one -> the largest deviation in standard errors (limit 5), and of
    what."""
    worst = (0.0, "-")
    for name, want in json.loads(path.read_text()).items():
        frames, side = (int(part.rstrip("fpx")) for part in name.split("_")[:2])
        grid = Grid(frames // 2, side // 16, side // 16)
        draws = 4000
        group = BlockGroup(want["num_blocks"], want["block_scale"])
        masker = MultiBlock3D((group,), tuple(want["aspect"]), truncate="raster")
        context = torch.zeros(draws, grid.n, dtype=torch.bool)
        for step in range(draws):
            context[step, masker(None, grid, KeyedRNG(0, step, torch.tensor([step])))[0].context[0]] = True  # type: ignore[arg-type]
        share = context.float().mean(1)
        hidden = 1 - context[:, : grid.h * grid.w].float().mean(0).reshape(grid.h, grid.w)
        both = (1 / draws + 1 / want["draws"]) ** 0.5
        spread = want["context_ratio_std"]
        centre = hidden[grid.h // 2, grid.w // 2].item()
        off = {
            "mean": (share.mean().item() - want["context_ratio_mean"]) / (spread * both),
            "spread": (share.std().item() / spread - 1) / (both / 2**0.5),
            "target": (1 - share.mean().item() - want["target_ratio_mean"]) / (spread * both),
        }
        for key, got in (("masked_prob_centre", centre), ("masked_prob_corner", hidden[0, 0].item())):
            p = want[key]
            off[key] = (got - p) / (max(p * (1 - p), 1e-3) ** 0.5 * both)
        for key, value in off.items():
            worst = max(worst, (abs(value), f"{name} {key}"))
    return worst


def check(path: Path) -> bool:
    """Run one case and print its line."""
    if path.suffix == ".json":
        off, what = mask_statistics(path)
        print(f"{path.stem:40s} {off:.1f} standard errors ({what}){'' if off < 5 else '  FAILED'}")
        return off < 5
    case = Case(path)
    if "trace.loss" in case:
        run(case)
    elif any("query_tokens" in k for k in case.state):
        attentive(case)
    elif "fc_norm.weight" in case.state:
        fine_tuned(case)
    elif "mask" in case:
        masked_pixels(case)
    elif "context_ids.0" in case or "context_ids" in case:
        features(case)
    else:
        raise UserError(f"{path}: not a case of a known kind")
    (output, where), (gradient, which) = case.worst["output"], case.worst["gradient"]
    good = output <= OUTPUT and gradient <= GRADIENT and not case.left
    told = f"output {output:.1e} ({where})  gradient {gradient:.1e} ({which})"
    missed = f"  not compared: {', '.join(sorted(case.left))}" if case.left else ""
    print(f"{case.name:40s} {told}{missed}{'' if good else '  FAILED'}")
    return good


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("give one folder: python tools/check_parity.py DIR")
    folder = Path(argv[0])
    paths = sorted(folder.glob("*.safetensors"))
    paths += [p for p in sorted(folder.glob("*.json")) if not p.with_suffix(".safetensors").exists()]
    if not paths:
        raise UserError(f"{folder}: no case in it")
    results = [check(p) for p in paths]
    if not all(results):
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main, __doc__)
