"""Errors to inject into our code, one at a time: each must make its parity case fail.

A mutation is a function of pytest's monkeypatch. MUTATIONS: name: (case, mutation).
"""

from collections.abc import Callable
from functools import partial

import check_agreement
import check_parity
import check_scores
import pytest
import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor

from vidssl.model import positions
from vidssl.objective import ema_target, hog, loss_score, masked_prediction, targets
from vidssl.objective.scored_mask import Scored
from vidssl.pretrained import public
from vidssl.pretrained.key_maps import RenamedTensors, rename

Patch = pytest.MonkeyPatch
Mutation = Callable[[Patch], None]


def converted_weights(change: Callable[[str, Tensor], Tensor]) -> Mutation:
    """Converts checkpoints wrongly; change: (our name, tensor) to the wrong tensor."""

    def mutate(patch: Patch) -> None:
        def wrong(*args) -> RenamedTensors:
            renamed = rename(*args)
            return renamed._replace(tensors={k: change(k, v) for k, v in renamed.tensors.items()})

        patch.setattr(public, "rename", wrong)

    return mutate


def zero_query_bias(name: str, value: Tensor) -> Tensor:
    if not name.endswith("qkv.bias"):
        return value
    third = len(value) // 3
    return torch.cat([0 * value[:third], value[third:]])


def swap_key_and_value(name: str, value: Tensor) -> Tensor:
    if "attn.qkv." not in name:
        return value
    q, k, v = value.chunk(3)
    return torch.cat([q, v, k])


def swap_key_and_value_of_head(name: str, value: Tensor) -> Tensor:
    return value.roll(len(value) // 2, 0) if ".kv." in name else value


def eps(value: float) -> Mutation:
    def mutate(patch: Patch) -> None:
        right = Case.overrides
        patch.setattr(Case, "overrides", lambda case: {**right(case), "eps": value})

    return mutate


def other_rotary_layout(patch: Patch) -> None:
    right = positions.rotary_table
    patch.setattr(
        positions, "rotary_table", lambda g, d, interleaved, *rest: right(g, d, not interleaved, *rest)
    )


def no_rope_grid(patch: Patch) -> None:
    right = positions.rotary_table

    def wrong(grid, dim, interleaved, rope_grid, device):
        return right(grid, dim, interleaved, None, device)

    patch.setattr(positions, "rotary_table", wrong)


def swap_rotary_rows_and_columns(patch: Patch) -> None:
    right = positions.rotary_table

    def wrong(grid, dim, *rest):
        axis = 2 * (dim // 6)
        swapped = []
        for table in right(grid, dim, *rest):
            t, h, w, left = table.split([axis, axis, axis, dim - 3 * axis], 1)
            swapped.append(torch.cat([t, w, h, left], 1))
        return tuple(swapped)

    patch.setattr(positions, "rotary_table", wrong)


def flat_table_in_halves(patch: Patch) -> None:
    def wrong(grid, dim):
        table = positions.sincos_flat(grid, dim)
        return torch.cat([table[:, 0::2], table[:, 1::2]], 1)

    patch.setitem(positions.FIXED_TABLES, "sincos_flat", wrong)


def pixel_norm(norm: str) -> Mutation:
    def mutate(patch: Patch) -> None:
        right = targets.Pixels

        def wrong(encoder, _="", *rest):
            return right(encoder, norm, *rest)

        patch.setattr(check_parity, "Pixels", wrong)

    return mutate


def colour_first(patch: Patch) -> None:
    right = targets.Pixels.forward
    patch.setattr(
        targets.Pixels, "forward", lambda self, v: right(self, v).unflatten(-1, (-1, 3)).mT.flatten(-2)
    )


def columns_before_rows(patch: Patch) -> None:
    right = targets.patchify
    patch.setattr(targets, "patchify", lambda *args: right(*args).mT)


def norm_over_all_levels(patch: Patch) -> None:
    for module in (ema_target, check_parity):
        patch.setattr(module, "level_norm", lambda x, dim: F.layer_norm(x, x.shape[-1:]))


def no_distance_weights(patch: Patch) -> None:
    patch.setattr(
        check_parity, "ContextLoss", lambda weight: masked_prediction.ContextLoss(weight, by_distance=False)
    )


def smaller_context_weight(patch: Patch) -> None:
    patch.setattr(check_parity, "ContextLoss", lambda weight: masked_prediction.ContextLoss(0.9 * weight))


def inverse_distance_without_root(patch: Patch) -> None:
    right = masked_prediction.inverse_sqrt_distance
    for module in (masked_prediction, check_parity):
        patch.setattr(module, "inverse_sqrt_distance", lambda mask, grid: right(mask, grid) ** 2)


def momentum_a_step_late(patch: Patch) -> None:
    right = check_parity.schedule

    def wrong(o, step, steps, ema):
        return {**right(o, step, steps, ema), "ema": right(o, step + 1, steps, ema)["ema"]}

    progress = check_parity.schedule_progress
    patch.setattr(check_parity, "schedule", wrong)
    patch.setattr(check_parity, "schedule_progress", lambda o, step, steps: progress(o, step + 1, steps))


def rates_a_step_late(patch: Patch) -> None:
    right = check_parity.schedule

    def wrong(o, step, steps, ema):
        return {**right(o, step + 1, steps, ema), "ema": right(o, step, steps, ema)["ema"]}

    patch.setattr(check_parity, "schedule", wrong)


def tokens_not_decayed(patch: Patch) -> None:
    patch.setattr(check_parity, "OptimConfig", partial(check_parity.OptimConfig, decay_tokens=False))


def everything_decayed(patch: Patch) -> None:
    right = check_parity.build_optimizer

    def wrong(*args):
        optimizer = right(*args)
        for group in optimizer.param_groups:
            group["has_weight_decay"] = True
        return optimizer

    patch.setattr(check_parity, "build_optimizer", wrong)


def target_copies_online_encoder(patch: Patch) -> None:
    patch.setattr(
        targets.Ema,
        "update",
        lambda self, encoder, momentum: self.encoder.load_state_dict(encoder.state_dict()),
    )


def swap_mask_tokens(patch: Patch) -> None:
    right = check_parity.MaskedPrediction.__init__

    def wrong(self, encoder, mask, target, query, *rest):
        query.tokens.data = query.tokens.data.flip(0)
        right(self, encoder, mask, target, query, *rest)

    patch.setattr(check_parity.MaskedPrediction, "__init__", wrong)


def swap_gradients(patch: Patch) -> None:
    right = hog.sobel
    patch.setattr(hog, "sobel", lambda images: right(images)[::-1])


def fewer_points(patch: Patch) -> None:
    right = check_agreement.sigreg
    patch.setattr(check_agreement, "sigreg", lambda *args, **options: right(*args, points=16, **options))


def sinkhorn_of_scores(patch: Patch) -> None:
    patch.setattr(Tensor, "log_softmax", lambda x, dim: x)


def embedding_apart_from_sampler(patch: Patch) -> None:
    patch.setattr(check_scores, "Sampler", partial(check_scores.Sampler, detach=True))


def change_of_pixels(patch: Patch) -> None:
    patch.setattr(check_scores, "Change", partial(check_scores.Change, of="pixels"))


def ranks_upside_down(patch: Patch) -> None:
    right = loss_score.rank_loss
    patch.setattr(loss_score, "rank_loss", lambda predicted, error: right(-predicted, error))


def highest_hidden(patch: Patch) -> None:
    patch.setattr(check_scores, "Scored", lambda ratio, rule: Scored(ratio, "hide"))


MUTATIONS: dict[str, tuple[str, Mutation]] = {
    "rotary layout, tiled": ("vjepa2_rope", other_rotary_layout),
    "rotary layout, interleaved": ("vjepa2_1", other_rotary_layout),
    "rotary axes": ("vjepa2_rope", swap_rotary_rows_and_columns),
    "rope_grid": ("vjepa2_1", no_rope_grid),
    "q bias, packed": ("vjepa_sincos", converted_weights(zero_query_bias)),
    "q bias, VideoMAE": ("videomae_pretrain", converted_weights(zero_query_bias)),
    "q bias, separate": ("mae_st_plain", converted_weights(zero_query_bias)),
    "k and v, packed": ("ijepa", converted_weights(swap_key_and_value)),
    "k and v, VideoMAE": ("videomae_finetune", converted_weights(swap_key_and_value)),
    "k and v, separate": ("mae_st_sep_cls", converted_weights(swap_key_and_value)),
    "k and v, probe": ("vjepa_attentive_classifier_depth1", converted_weights(swap_key_and_value_of_head)),
    "eps 1e-5, MAE-ST": ("mae_st_plain", eps(1e-5)),
    "eps 1e-5, V-JEPA 2.1": ("vjepa2_1", eps(1e-5)),
    "eps 1e-5, training": ("vjepa_run", eps(1e-5)),
    "sincos_flat": ("videomae_pretrain", flat_table_in_halves),
    "channel, not patch": ("videomae_pretrain", pixel_norm("patch")),
    "patch, not channel": ("mae_st_plain", pixel_norm("channel")),
    "colours": ("videomae_pretrain", colour_first),
    "rows": ("mae_st_plain", columns_before_rows),
    "level norm": ("vjepa2_1", norm_over_all_levels),
    "distance": ("vjepa2_1", inverse_distance_without_root),
    "by distance": ("vjepa2_1", no_distance_weights),
    "context weight": ("vjepa2_1_distilled", smaller_context_weight),
    "mask tokens": ("vjepa_sincos", swap_mask_tokens),
    "momentum": ("vjepa_run", momentum_a_step_late),
    "lr and decay": ("vjepa_run", rates_a_step_late),
    "tokens decayed": ("vjepa_run", tokens_not_decayed),
    "biases not decayed": ("vjepa_run", everything_decayed),
    "HOG, angle": ("maskfeat_hog", swap_gradients),
    "points of SIGReg": ("sigreg", fewer_points),
    "rows before Sinkhorn": ("msn", sinkhorn_of_scores),
    "patch embedding, AdaMAE": ("adamae", embedding_apart_from_sampler),
    "pixels, EVEREST": ("everest", change_of_pixels),
    "ranks, HPM": ("hpm", ranks_upside_down),
    "visible, ColorMAE": ("colormae", highest_hidden),
    "EMA encoder": ("vjepa_run", target_copies_online_encoder),
}
