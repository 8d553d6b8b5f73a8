"""The reference tensors hold, and each of them pins something: one thing made wrong, and its case fails.

Cases of other geometries are made from transformers' models, an implementation that shares no code with ours.
"""

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.model import positions
from vidssl.objective import objective, targets
from vidssl.pretrained import public
from vidssl.pretrained.key_maps import RenamedTensors, rename

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT.parent / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference tensors are not beside the repository")

spec = importlib.util.spec_from_file_location("check_parity", ROOT / "tools" / "check_parity.py")
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@golden
def test_every_reference_case_holds(capsys):
    tool.main([str(GOLDEN)])
    lines = capsys.readouterr().out.splitlines()
    names = {p.stem for p in GOLDEN.glob("*.safetensors")} | {"vjepa_mask_statistics"}
    assert {line.split()[0] for line in lines} == names
    assert not any("FAILED" in line or "not compared" in line for line in lines)


def test_a_folder_without_a_case_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no case in it"):
        tool.main([str(tmp_path)])


# Each makes one thing wrong: change(monkeypatch) -> None.


def weights(change: Callable[[str, Tensor], Tensor]) -> Callable:
    """Weights read wrongly: change(our name, tensor) -> tensor."""

    def apply(m: pytest.MonkeyPatch) -> None:
        def wrong(*args) -> RenamedTensors:
            r = rename(*args)
            return r._replace(tensors={k: change(k, v) for k, v in r.tensors.items()})

        m.setattr(public, "rename", wrong)

    return apply


def no_query_bias(name: str, value: Tensor) -> Tensor:
    return (
        torch.cat([0 * value[: len(value) // 3], value[len(value) // 3 :]])
        if name.endswith("qkv.bias")
        else value
    )


def key_and_value_swapped(name: str, value: Tensor) -> Tensor:
    if "attn.qkv." not in name:
        return value
    q, k, v = value.chunk(3)
    return torch.cat([q, v, k])


def head_key_and_value_swapped(m: pytest.MonkeyPatch) -> None:
    def wrong(*args) -> RenamedTensors:
        r = rename(*args)
        return r._replace(
            tensors={k: v.roll(len(v) // 2, 0) if ".kv." in k else v for k, v in r.tensors.items()}
        )

    m.setattr(public, "rename", wrong)


def eps(value: float) -> Callable:
    def apply(m: pytest.MonkeyPatch) -> None:
        given = tool.Case.given
        m.setattr(tool.Case, "given", lambda case: {**given(case), "eps": value})

    return apply


def other_rotary_layout(m: pytest.MonkeyPatch) -> None:
    right = positions.rotary_table
    m.setattr(positions, "rotary_table", lambda g, d, interleaved, *rest: right(g, d, not interleaved, *rest))


def no_rope_grid(m: pytest.MonkeyPatch) -> None:
    right = positions.rotary_table
    m.setattr(
        positions,
        "rotary_table",
        lambda grid, dim, interleaved, _, device: right(grid, dim, interleaved, None, device),
    )


def rope_height_and_width_swapped(m: pytest.MonkeyPatch) -> None:
    right = positions.rotary_table

    def wrong(grid, dim, *rest):
        part = 2 * (dim // 6)
        out = []
        for x in right(grid, dim, *rest):
            t, h, w, left = x.split([part, part, part, dim - 3 * part], 1)
            out.append(torch.cat([t, w, h, left], 1))
        return tuple(out)

    m.setattr(positions, "rotary_table", wrong)


def flat_table_in_halves(m: pytest.MonkeyPatch) -> None:
    def wrong(grid, dim):
        return torch.cat(
            [positions.sincos_flat(grid, dim)[:, 0::2], positions.sincos_flat(grid, dim)[:, 1::2]], 1
        )

    m.setitem(positions.FIXED_TABLES, "sincos_flat", wrong)


def pixels_normed_by(norm: str) -> Callable:
    def apply(m: pytest.MonkeyPatch) -> None:
        right = targets.Pixels
        m.setattr(tool, "Pixels", lambda encoder, _="", *rest: right(encoder, norm, *rest))  # type: ignore[arg-type]

    return apply


def colours_apart(m: pytest.MonkeyPatch) -> None:
    right = targets.Pixels.forward
    m.setattr(targets.Pixels, "forward", lambda self, v: right(self, v).unflatten(-1, (-1, 3)).mT.flatten(-2))


def columns_before_rows(m: pytest.MonkeyPatch) -> None:
    right = targets.patchify
    m.setattr(targets, "patchify", lambda *a: right(*a).mT)


def norm_over_all_levels(m: pytest.MonkeyPatch) -> None:
    for module in (targets, tool):
        m.setattr(module, "level_norm", lambda x, dim: F.layer_norm(x, x.shape[-1:]))


def every_distance_counts_the_same(m: pytest.MonkeyPatch) -> None:
    m.setattr(tool, "ContextLoss", lambda weight: objective.ContextLoss(weight, by_distance=False))


def context_weight(m: pytest.MonkeyPatch) -> None:
    m.setattr(tool, "ContextLoss", lambda weight: objective.ContextLoss(0.9 * weight))


def nearness_without_root(m: pytest.MonkeyPatch) -> None:
    right = objective.inverse_sqrt_distance
    for module in (objective, tool):
        m.setattr(module, "inverse_sqrt_distance", lambda mask, grid: right(mask, grid) ** 2)


def momentum_a_step_late(m: pytest.MonkeyPatch) -> None:
    right = tool.schedule

    def wrong(o, step, steps):
        return {**right(o, step, steps), "momentum": right(o, step + 1, steps)["momentum"]}

    m.setattr(tool, "schedule", wrong)


def rates_a_step_late(m: pytest.MonkeyPatch) -> None:
    right = tool.schedule

    def wrong(o, step, steps):
        return {**right(o, step + 1, steps), "momentum": right(o, step, steps)["momentum"]}

    m.setattr(tool, "schedule", wrong)


def tokens_not_decayed(m: pytest.MonkeyPatch) -> None:
    m.setattr(tool, "OptimConfig", partial(tool.OptimConfig, decay_tokens=False))


def everything_decayed(m: pytest.MonkeyPatch) -> None:
    right = tool.build_optimizer

    def wrong(*args):
        optimizer = right(*args)
        for group in optimizer.param_groups:
            group["decay"] = True
        return optimizer

    m.setattr(tool, "build_optimizer", wrong)


def target_of_the_online_encoder(m: pytest.MonkeyPatch) -> None:
    m.setattr(
        tool.Ema, "update", lambda self, encoder, momentum: self.encoder.load_state_dict(encoder.state_dict())
    )


def mask_tokens_swapped(m: pytest.MonkeyPatch) -> None:
    right = tool.Objective.__init__

    def wrong(self, encoder, mask, target, query, *rest):
        query.tokens.data = query.tokens.data.flip(0)
        right(self, encoder, mask, target, query, *rest)

    m.setattr(tool.Objective, "__init__", wrong)


MUTATIONS = {
    "rotary layout, tiled": ("vjepa2_rope", other_rotary_layout),
    "rotary layout, interleaved": ("vjepa2_1", other_rotary_layout),
    "rotary axes": ("vjepa2_rope", rope_height_and_width_swapped),
    "rope_grid": ("vjepa2_1", no_rope_grid),
    "q bias, packed": ("vjepa_sincos", weights(no_query_bias)),
    "q bias, VideoMAE": ("videomae_pretrain", weights(no_query_bias)),
    "q bias, separate": ("mae_st_plain", weights(no_query_bias)),
    "k and v, packed": ("ijepa", weights(key_and_value_swapped)),
    "k and v, VideoMAE": ("videomae_finetune", weights(key_and_value_swapped)),
    "k and v, separate": ("mae_st_sep_cls", weights(key_and_value_swapped)),
    "k and v, probe": ("vjepa_attentive_classifier_depth1", head_key_and_value_swapped),
    "eps 1e-5, MAE-ST": ("mae_st_plain", eps(1e-5)),
    "eps 1e-5, V-JEPA 2.1": ("vjepa2_1", eps(1e-5)),
    "eps 1e-5, training": ("vjepa_run", eps(1e-5)),
    "sincos_flat": ("videomae_pretrain", flat_table_in_halves),
    "channel, not patch": ("videomae_pretrain", pixels_normed_by("patch")),
    "patch, not channel": ("mae_st_plain", pixels_normed_by("channel")),
    "colours": ("videomae_pretrain", colours_apart),
    "rows": ("mae_st_plain", columns_before_rows),
    "level norm": ("vjepa2_1", norm_over_all_levels),
    "nearness": ("vjepa2_1", nearness_without_root),
    "by distance": ("vjepa2_1", every_distance_counts_the_same),
    "context weight": ("vjepa2_1_distilled", context_weight),
    "mask tokens": ("vjepa_sincos", mask_tokens_swapped),
    "momentum": ("vjepa_run", momentum_a_step_late),
    "lr and decay": ("vjepa_run", rates_a_step_late),
    "tokens decayed": ("vjepa_run", tokens_not_decayed),
    "biases not decayed": ("vjepa_run", everything_decayed),
    "momentum encoder": ("vjepa_run", target_of_the_online_encoder),
}


@golden
@pytest.mark.parametrize("name", MUTATIONS)
def test_one_thing_wrong_and_its_case_fails(name, monkeypatch, capsys):
    case, change = MUTATIONS[name]
    change(monkeypatch)
    assert not tool.check(GOLDEN / f"{case}.safetensors")
    assert "FAILED" in capsys.readouterr().out


def worst(case: str, capsys) -> float:
    """The largest error of a gradient; of an output, where the case has no gradients."""
    tool.check(GOLDEN / f"{case}.safetensors")
    words = capsys.readouterr().out.split()
    return float(words[words.index("gradient") + 1]) or float(words[words.index("output") + 1])


@golden
@pytest.mark.parametrize(
    "case", ["videomae_pretrain", "videomae_finetune", "vjepa_sincos", "vjepa2_rope", "ijepa"]
)
def test_eps_is_1e_6_in_the_families_whose_limits_are_too_wide_to_see_1e_5(case, monkeypatch, capsys):
    right = worst(case, capsys)
    eps(1e-5)(monkeypatch)
    assert worst(case, capsys) > 20 * right


# Fixed tables that a file holds: a wrong table of ours would be read as a learned one, with the same outputs.


def kinds(case: str) -> tuple[str, str]:
    """Positions of encoder and predictor, as read."""
    found = tool.Case(GOLDEN / f"{case}.safetensors")
    read = public.read_state(found.state, case, found.given())
    assert read.predictor is not None
    return read.model["positions"], read.predictor["positions"]


TABLES = {
    "vjepa_sincos": "sincos",
    "vjepa_sincos_uniform": "sincos_uniform",
    "vjepa2_sincos_uniform": "sincos_uniform",
    "ijepa": "sincos_2d",
    "mae_st_plain": "learned",
    "mae_st_sep_cls": "learned_separable",
}


@golden
@pytest.mark.parametrize("case, kind", TABLES.items())
def test_tables_are_recognised(case, kind):
    assert kinds(case) == (kind, kind)


@golden
@pytest.mark.parametrize("case, kind", [item for item in TABLES.items() if item[1].startswith("sincos")])
def test_another_table_is_not_recognised(case, kind, monkeypatch):
    right = positions.FIXED_TABLES[kind]
    for wrong in (lambda t: t.roll(t.shape[1] // 2, 1), lambda t: t.flip(1), lambda t: t.roll(1, 0)):
        monkeypatch.setitem(
            positions.FIXED_TABLES, kind, lambda grid, dim, wrong=wrong: wrong(right(grid, dim))
        )
        assert kinds(case) == ("learned", "learned")


# Cases of other geometries, of transformers' models.


def scatter_parameters(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, so that no zero hides a term; the outputs stay near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                draw = torch.randn(p.shape, generator=generator)
                is_norm = "norm" in name and name.endswith("weight")
                p.copy_(
                    1 + 0.2 * draw if is_norm else draw * (p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.2)
                )


def official_videomae(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> VideoMAE's."""
    names = {
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    names |= {"layernorm_before": "norm1", "layernorm_after": "norm2", "videomae.embeddings.": "encoder."}
    names |= {"patch_embeddings.projection": "patch_embed.proj", "videomae.encoder.layer": "encoder.blocks"}
    names |= {"decoder_layers": "blocks", "videomae.layernorm": "encoder.norm"}
    names |= {
        "attention.attention.query.bias": "attn.q_bias",
        "attention.attention.value.bias": "attn.v_bias",
    }
    return packed(values, names, "attention.attention.{}.weight", "attn.qkv.weight")


def official_vjepa2(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> V-JEPA 2's."""
    names = {"encoder.embeddings.patch_embeddings": "encoder.patch_embed", "attention.proj": "attn.proj"}
    names |= {"predictor.embeddings.predictor_embeddings": "predictor.predictor_embed"}
    names |= {"predictor.layer.": "predictor.predictor_blocks.", "encoder.layer.": "encoder.blocks."}
    names |= {"predictor.layernorm": "predictor.predictor_norm", "encoder.layernorm": "encoder.norm"}
    names |= {"predictor.proj": "predictor.predictor_proj"}
    values = dict(values)
    tokens = values.pop("predictor.embeddings.mask_tokens")
    out = packed(values, names, "attention.{}.weight", "attn.qkv.weight")
    out = packed(out, {}, "attention.{}.bias", "attn.qkv.bias")
    return out | {f"predictor.mask_tokens.{i}": token for i, token in enumerate(tokens)}


def packed(values: dict[str, Tensor], names: dict[str, str], parts: str, whole: str) -> dict[str, Tensor]:
    out = {}
    q, k, v = (parts.format(part) for part in ("query", "key", "value"))
    for key, value in values.items():
        if key.endswith(q):
            out[key.replace(q, whole)] = torch.cat([values[key.replace(q, part)] for part in (q, k, v)])
        elif not key.endswith((k, v)):
            out[key] = value
    for old, new in names.items():
        out = {key.replace(old, new): value for key, value in out.items()}
    return out


def write_case(path: Path, tensors: dict[str, Tensor], about: dict) -> Path:
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in model.named_parameters() if p.grad is not None}


def videomae_case(path: Path, g: SimpleNamespace) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        image_size=g.img, patch_size=g.patch, num_frames=g.frames, tubelet_size=g.tub, hidden_size=g.dim,
        num_hidden_layers=g.depth, num_attention_heads=g.heads, intermediate_size=3 * g.dim, layer_norm_eps=1e-6,
        use_mean_pooling=False, decoder_hidden_size=g.ddim, decoder_num_hidden_layers=g.ddepth,
        decoder_num_attention_heads=g.dheads, decoder_intermediate_size=5 * g.ddim,
    )  # fmt: skip
    model = transformers.VideoMAEForPreTraining(config).eval()
    model.decoder.norm.eps = 1e-6  # as in the official code; transformers' default is 1e-5
    scatter_parameters(model, 1)
    clips = torch.randn(g.B, 3, g.frames, *g.img)
    n = model.videomae.embeddings.num_patches
    mask = torch.stack([torch.rand(n).argsort() < n * 2 // 3 for _ in range(g.B)])
    out = model(clips.transpose(1, 2), mask)
    out.loss.backward()
    tensors = {"clips": clips, "mask": mask, "prediction": out.logits, "loss": out.loss[None]}
    tensors["encoder_visible"] = model.videomae(clips.transpose(1, 2), mask).last_hidden_state
    tensors |= {f"state.{k}": v for k, v in official_videomae(dict(model.named_parameters())).items()}
    tensors |= {f"grad.{k}": v for k, v in official_videomae(gradients(model)).items()}
    return write_case(path, tensors, {"geometry": vars(g)})


def hidden_encoder(encoder: torch.nn.Module, clips: Tensor, ids: Tensor) -> Tensor:
    """transformers' encoder of V-JEPA 2 on some of the tokens, which its own forward pass never does."""
    x = encoder.embeddings(clips.transpose(1, 2)).gather(
        1, ids[..., None].expand(-1, -1, encoder.config.hidden_size)
    )
    for layer in encoder.layer:
        x = layer(x, ids)[0]
    return encoder.layernorm(x)


def vjepa2_case(path: Path, g: SimpleNamespace) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.VJEPA2Config(
        patch_size=g.patch, crop_size=g.img, frames_per_clip=g.frames, tubelet_size=g.tub, hidden_size=g.dim,
        num_attention_heads=g.heads, num_hidden_layers=g.depth, mlp_ratio=3.0, layer_norm_eps=1e-6,
        pred_hidden_size=g.ddim, pred_num_attention_heads=g.dheads, pred_num_hidden_layers=g.ddepth,
        pred_num_mask_tokens=3, pred_mlp_ratio=5.0,
    )  # fmt: skip
    model, teacher = transformers.VJEPA2Model(config).eval(), transformers.VJEPA2Model(config).eval()
    scatter_parameters(model, 1)
    scatter_parameters(teacher, 2)
    clips = torch.randn(g.B, 3, g.frames, g.img, g.img)
    full = teacher.encoder(clips.transpose(1, 2)).last_hidden_state
    target = F.layer_norm(full, (g.dim,)).detach()
    n = target.shape[1]
    tensors: dict[str, Tensor] = {
        "clips": clips,
        "target_full": target,
        "encoder_full": model.encoder(clips.transpose(1, 2)).last_hidden_state,
    }
    losses = []
    forward = model.predictor.embeddings.forward
    for i, (kept, hidden) in enumerate([(n // 3, n // 2), (n // 4, n // 4), (n // 5, n // 3)]):
        ids = torch.stack([torch.randperm(n)[: kept + hidden] for _ in range(g.B)])
        context, out = ids[:, :kept].sort(1)[0], ids[:, kept:].sort(1)[0]
        z = hidden_encoder(model.encoder, clips, context)
        everywhere = torch.zeros(g.B, n, g.dim).scatter(1, context[..., None].expand_as(z), z)
        model.predictor.embeddings.forward = partial(forward, mask_index=i)
        prediction = model.predictor(everywhere, [context], [out]).last_hidden_state
        wanted = target.gather(1, out[..., None].expand(-1, -1, g.dim))
        losses.append((prediction - wanted).abs().mean())
        assert (prediction - wanted).abs().min() > 2e-5, "an error at the kink of |x|: choose another seed"
        tensors |= {
            f"context_ids.{i}": context,
            f"target_ids.{i}": out,
            f"context.{i}": z,
            f"prediction.{i}": prediction,
        }
    loss = torch.stack(losses).mean()
    loss.backward()
    tensors["loss"] = loss[None]
    state = official_vjepa2(dict(model.named_parameters()))
    target_state = {
        k: v for k, v in official_vjepa2(dict(teacher.named_parameters())).items() if k.startswith("encoder.")
    }
    tensors |= {f"state.{k}": v for k, v in state.items()} | {
        f"state.target_{k}": v for k, v in target_state.items()
    }
    tensors |= {f"grad.{k}": v for k, v in official_vjepa2(gradients(model)).items()}
    return write_case(path, tensors, {"geometry": vars(g), "options": {"use_rope": True}})


def geometry(
    img, patch: int, frames: int, tub: int, dim: int, depth: int, heads: int, B: int
) -> SimpleNamespace:
    """Widths of the predictor follow from the encoder's: another head width and one layer more or less."""
    return SimpleNamespace(
        img=img, patch=patch, frames=frames, tub=tub, dim=dim, depth=depth, heads=heads, B=B,
        ddim=36, ddepth=4 - depth, dheads=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "g",
    [
        geometry([28, 42], 14, 4, 2, 40, 1, 5, B=3),
        geometry([20, 8], 4, 3, 1, 24, 3, 2, B=1),
    ],
    ids=["patch 14, 2 x 3", "patch 4, 5 x 2, tubelet 1"],
)
def test_videomae_of_another_geometry(g, tmp_path, capsys):
    torch.manual_seed(0)
    path = videomae_case(tmp_path / "case.safetensors", g)
    assert tool.check(path), capsys.readouterr().out
    tensors = load_file(path)
    tensors["prediction"][0, 0, 0] += 1e-3
    save_file(tensors, path)
    assert not tool.check(path)


@pytest.mark.parametrize(
    "g",
    [
        geometry(42, 14, 4, 2, 40, 1, 4, B=3),
        geometry(20, 4, 4, 1, 56, 3, 2, B=1),
    ],
    ids=["patch 14, head 10", "patch 4, tubelet 1, head 28"],
)
def test_vjepa2_of_another_geometry(g, tmp_path, capsys):
    torch.manual_seed(2)
    path = vjepa2_case(tmp_path / "case.safetensors", g)
    assert tool.check(path), capsys.readouterr().out
    tensors = load_file(path)
    tensors["grad.predictor.mask_tokens.2"] *= 1.01
    save_file(tensors, path)
    assert not tool.check(path)
