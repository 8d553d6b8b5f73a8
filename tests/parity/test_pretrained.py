"""Public checkpoints in, Hugging Face out: the same outputs, every key accounted for, errors in one line."""

import argparse
import json
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import convert
import numpy as np
import pytest
import timm
import torch
from case import Case
from random_weights import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Mask, gather_tokens
from vidssl.model.heads import AttentiveHead, MeanHead
from vidssl.model.predictor import JointPredictor
from vidssl.model.vit import Encoder
from vidssl.objective.ema_target import level_norm
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.targets import Pixels
from vidssl.pretrained import public
from vidssl.pretrained.export_hf import floor_safe_ratio, save_hf
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.load import inflate_to_video, load_encoder, read_checkpoint_file

ROOT = Path(__file__).parents[2]
VECTORS = Path(__file__).parent / "vectors"

# Two clips of 4 frames of 24 px, patches of 2 x 8 x 8: 18 tokens. Two images of 9.
generator = torch.Generator().manual_seed(0)
CLIPS = torch.randn(2, 3, 4, 24, 24, generator=generator)
IMAGES = torch.randn(2, 3, 24, 24, generator=generator)
NOISE = torch.rand(2, 9, generator=generator)
IDS = torch.stack([torch.randperm(18, generator=generator) for _ in range(2)])
CONTEXT = IDS[:, :7].sort(1)[0]
TARGET = IDS[:, 7:16].sort(1)[0]
HIDDEN = torch.ones(2, 18, dtype=torch.bool).scatter(1, CONTEXT, False)
CLASSES = 7


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)


# transformers' models.


def videomae_config(**options):
    return hf().VideoMAEConfig(
        image_size=24, patch_size=8, num_frames=4, tubelet_size=2, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=80, layer_norm_eps=1e-6, decoder_hidden_size=32,
        num_labels=CLASSES,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=56, **options,
    )  # fmt: skip


def vjepa2_config(**options):
    return hf().VJEPA2Config(
        patch_size=8, crop_size=24, frames_per_clip=4, tubelet_size=2, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, mlp_ratio=2.5, layer_norm_eps=1e-6, pred_hidden_size=40,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=3, pred_num_mask_tokens=3, pred_mlp_ratio=3.0, num_labels=CLASSES, **options,
    )  # fmt: skip


def image_config(kind: str, **options):
    return getattr(hf(), kind)(
        image_size=24, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=80,
        layer_norm_eps=1e-6, **options,
    )  # fmt: skip


def hf():
    return pytest.importorskip("transformers")


def mae_config(**options):
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    return image_config("ViTMAEConfig", mask_ratio=0.5, decoder_intermediate_size=56, **decoder, **options)


MODELS = {  # class, configuration
    "VideoMAEModel": lambda: videomae_config(use_mean_pooling=False),
    "VideoMAEForPreTraining": lambda: videomae_config(use_mean_pooling=False),
    "VideoMAEForVideoClassification": lambda: videomae_config(use_mean_pooling=True),
    "VJEPA2Model": vjepa2_config,
    "VJEPA2ForVideoClassification": lambda: vjepa2_config(num_pooler_layers=2),
    "IJepaModel": lambda: image_config("IJepaConfig"),
    "ViTMAEModel": mae_config,
    "ViTMAEForPreTraining": lambda: mae_config(norm_pix_loss=True),
}


def random_hf(name: str) -> nn.Module:
    model = getattr(hf(), name)(MODELS[name]()).eval()
    randomise(model, 3)
    return official_eps(model)


def official_eps(model: nn.Module) -> nn.Module:
    """transformers gives VideoMAE's decoder a last norm with 1e-5, whatever its config says; official is
    1e-6."""
    if hasattr(model, "encoder_to_decoder"):
        model.decoder.norm.eps = model.config.layer_norm_eps
    return model


@torch.no_grad()
def of_hf(model: nn.Module) -> dict[str, Tensor]:
    """What a model of transformers says of CLIPS or IMAGES."""
    name = type(model).__name__
    video = CLIPS.transpose(1, 2)
    if name.startswith("VideoMAE"):
        base = getattr(model, "videomae", model)
        out = {"all": base(video).last_hidden_state, "visible": base(video, HIDDEN).last_hidden_state}
        if "PreTraining" in name:
            said = model(video, HIDDEN)
            out |= {"prediction": said.logits, "loss": said.loss}
    elif name.startswith("VJEPA2"):
        base = getattr(model, "vjepa2", model)
        said = base(video, context_mask=[CONTEXT], target_mask=[TARGET])
        out = {"all": said.last_hidden_state, "prediction": said.predictor_output.last_hidden_state}
    elif name.startswith("IJepa"):
        return {"all": model(IMAGES).last_hidden_state}
    else:
        out = {"visible": getattr(model, "vit", model)(IMAGES, noise=NOISE).last_hidden_state}
        if "PreTraining" in name:
            said = model(IMAGES, noise=NOISE)
            out |= {"prediction": said.logits, "loss": said.loss}
    return out | ({"logits": model(video).logits} if "Classification" in name else {})


@torch.no_grad()
def of_ours(found: Checkpoint) -> dict[str, Tensor]:
    """The same of a checkpoint in our modules."""
    encoder = found.build_encoder().eval()
    if found.format == "MAE":
        order = NOISE.argsort(1)
        mask = Mask(order[:, :4], order[:, None, 4:])
        clips = IMAGES[:, :, None]
        norm = ("patch", "normalised")
        out = {"visible": encoder(clips, mask.context, return_levels=True)}
    elif found.model["frames"] == 1:
        return {"all": encoder(IMAGES[:, :, None])}
    elif found.model["positions"] == "rope":
        mask = Mask(CONTEXT, TARGET[:, None])
        clips = CLIPS
        norm = None
        out = {"all": encoder(clips)}
    else:
        hidden = HIDDEN.nonzero()[:, 1].reshape(2, -1)
        mask = Mask(CONTEXT, hidden[:, None])
        clips = CLIPS
        norm = ("channel", "rgb")
        out = {"all": encoder(clips), "visible": encoder(clips, CONTEXT)}
    if found.predictor is not None:
        predictor, query = found.build_predictor(encoder)
        grid = encoder.grid_of(clips)
        if norm is None:  # transformers' index of the mask token is 1, and its encoder sees everything
            out["prediction"] = predictor(
                gather_tokens(encoder(clips), CONTEXT), mask, query.of_mask(1), grid
            ).target[:, 0]
        else:
            z = encoder(clips, mask.context, return_levels=True)
            whole = found.format == "MAE"
            said = predictor.proj(
                predictor.forward_tokens(z, mask, query.tokens[0], grid, include_context=whole)[:, 0]
            )
            out["prediction"] = gather_tokens(said, NOISE.argsort(1).argsort(1)) if whole else said
            target = Pixels(encoder, *norm)
            objective = MaskedPrediction(encoder, lambda *_: [mask], target, query, predictor, ERRORS["l2"]())
            out["loss"] = objective(clips, KeyedRNG(0, 0, torch.arange(2)))["loss"]
    return out | ({"logits": found.build_head().eval()(encoder(CLIPS))} if found.head else {})


def same(got: dict[str, Tensor], want: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key].shape == value.shape, key
        assert (got[key] - value).abs().max() <= limit, key
        assert value.ndim == 0 or value.std() > 0.05, f"{key} says nothing"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("names", ["as saved", "in memory"])
def test_outputs_of_transformers_models(name, names, tmp_path):
    model = random_hf(name)
    model.save_pretrained(tmp_path)
    if names == "in memory":  # the names of transformers 5; save_pretrained writes those of 4
        save_file(model.state_dict(), tmp_path / "model.safetensors")
    found, about = read_checkpoint_file(str(tmp_path))
    same(of_ours(found), of_hf(model))
    assert about == {"source": found.format}
    if found.head:  # transformers' mean head has torch's default, its attentive head the model's
        assert found.head_eps == (1e-5 if name.startswith("VideoMAE") else 1e-6)


def test_the_two_generations_of_names_differ(tmp_path):
    """Else the test above says less than it seems to."""
    for name in ("VideoMAEForPreTraining", "ViTMAEForPreTraining", "IJepaModel"):
        model = random_hf(name)
        model.save_pretrained(tmp_path / name)
        assert load_file(tmp_path / name / "model.safetensors").keys() != model.state_dict().keys(), name


def plain(path: Path) -> dict[str, Tensor]:
    """The weights of a folder; of a model without a head, the prefix is optional."""
    return {k.removeprefix("videomae."): v for k, v in load_file(path / "model.safetensors").items()}


@pytest.mark.parametrize("name", [name for name in MODELS if "ViT" not in name])
def test_round_trip_is_exact(name, tmp_path):
    random_hf(name).save_pretrained(tmp_path / "hf")
    first, _ = read_checkpoint_file(str(tmp_path / "hf"))
    (tmp_path / "native").mkdir()
    save_native(tmp_path / "native", first, {})
    second, _ = read_checkpoint_file(str(tmp_path / "native"))
    assert save_hf(tmp_path / "back", second) == name
    there, back = plain(tmp_path / "hf"), plain(tmp_path / "back")
    assert there.keys() == back.keys()
    assert all(there[k].equal(back[k]) for k in there)
    config, again = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hf", "back"))
    kept = (again.keys() & config.keys()) - {"id2label", "label2id"}  # names of classes are not carried
    assert {k: again[k] for k in kept} == {k: config[k] for k in kept}
    third, _ = read_checkpoint_file(str(tmp_path / "back"))
    assert third.model == first.model and third.predictor == first.predictor
    parts = ((third.encoder, first.encoder), (third.predictor_weights, first.predictor_weights))
    for got, want in (*parts, (third.head, first.head)):
        assert got.keys() == want.keys() and all(got[k].equal(want[k]) for k in want)


# Our models.

SIZE = {"frames": 4, "height": 24, "width": 24, "dim": 48, "depth": 2, "heads": 4, "patch": 8, "tubelet": 2}
SIZE |= {"mlp_ratio": 2.5, "final_norm": True, "eps": 1e-6}


def own(
    positions: str, head: nn.Module | None = None, predictor: dict[str, Any] | None = None, **options
) -> Checkpoint:
    """A checkpoint of ours, every weight random."""
    model = {**SIZE, "positions": positions, **options}
    encoder = Encoder(**model)
    randomise(encoder, 5)
    found = Checkpoint("vidssl", model, encoder.state_dict(), head_heads=4, head_eps=1e-5)
    if head:
        randomise(head, 6)
        found.head = head.state_dict()
    if predictor:
        out = encoder.dim if "rope" in positions else 3 * encoder.tubelet * encoder.patch**2
        found.predictor = {
            "out": out,
            "width": 32,
            "depth": 1,
            "heads": 2,
            "mlp_ratio": 1.5,
            "eps": 1e-6,
            **predictor,
        }
        joint = JointPredictor(encoder, **found.predictor)
        found.query = 0.3 * torch.randn(3 if "rope" in positions else 1, 32)
        randomise(joint, 7)
        found.predictor_weights = joint.state_dict()
    return found


FLAT = {"positions": "sincos_flat", "embed_bias": False}
ROPE = {"positions": "rope"}
OURS = {
    "VideoMAEModel": lambda: own("sincos_flat"),
    "VideoMAEForPreTraining": lambda: own("sincos_flat", predictor=FLAT),
    "VideoMAEForVideoClassification": lambda: own(
        "sincos_flat", MeanHead(48, CLASSES, 1e-5), final_norm=False
    ),
    "VJEPA2Model": lambda: own("rope", predictor=ROPE),
    "VJEPA2ForVideoClassification": lambda: own("rope", AttentiveHead(48, 4, CLASSES, 3), ROPE, eps=1e-5),
    "IJepaModel": lambda: own("sincos_2d", frames=1, tubelet=1),
}


@pytest.mark.parametrize("name", OURS)
def test_outputs_in_transformers(name, tmp_path):
    found = OURS[name]()
    if found.predictor:
        found.predictor["eps"] = found.model["eps"]
    assert save_hf(tmp_path, found) == name
    model, info = getattr(hf(), name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(of_hf(official_eps(model.eval())), of_ours(found))
    again, _ = read_checkpoint_file(str(tmp_path))
    assert {k: again.model[k] for k in found.model} == found.model
    for key, value in again.encoder.items():
        if key.endswith("qkv.bias") and name.startswith("VideoMAE"):  # softmax takes the keys' bias away
            value, want = (torch.cat([x[:48], x[96:]]) for x in (value, found.encoder[key]))
            assert value.equal(want)
        else:
            assert value.equal(found.encoder[key])


def test_hidden_widths_that_transformers_rounds_down():
    """It takes the whole part of width times ratio: 11 / 1408 * 1408 would lose one."""
    assert any(int(1408 * (n / 1408)) != n for n in range(1408, 8000))
    for dim in (100, 384, 1280, 1408, 1664):
        for hidden in range(dim, 5 * dim, 7):
            assert (
                int(dim * floor_safe_ratio(hidden / dim, dim))
                == hidden
                == round(dim * floor_safe_ratio(hidden / dim, dim))
            )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: own("sincos_uniform"), "no model of transformers has positions 'sincos_uniform'"),
        (
            lambda: own("rope_interleaved", predictor={"positions": "rope_interleaved"}),
            "positions 'rope_interleaved'",
        ),
        (lambda: own("sincos_flat", class_token=True), "class token"),
        (lambda: own("rope_interleaved", levels=(0, 1)), "no V-JEPA 2.1"),
        (lambda: own("sincos_2d", frames=1, tubelet=1, final_norm=False), "a final norm"),
        (lambda: own("rope", frames=1, tubelet=1), "has none"),
        (lambda: own("rope", mlp="swiglu", predictor=ROPE), "SwiGLU"),
        (lambda: own("sincos_flat", width=32), "24 x 32 px"),
        (lambda: own("rope"), "this checkpoint has none"),
        (lambda: own("rope", predictor={**ROPE, "out": 96}), "this one gives 96"),
        (lambda: own("rope", predictor={"positions": "sincos_uniform"}), "positions rope"),
        (lambda: own("sincos_flat", predictor={**FLAT, "embed_bias": True}), "embed_bias False"),
        (lambda: own("sincos_flat", predictor={**FLAT, "out": 192}), "192 values"),
        (lambda: own("sincos_flat", AttentiveHead(48, 4, 3)), "by the mean of tokens"),
        (lambda: own("rope", MeanHead(48, 3), ROPE), "attentive head of 4 heads"),
    ],
)
def test_models_that_transformers_lacks(make, words, tmp_path):
    with pytest.raises(UserError, match=words):
        save_hf(tmp_path / "out", make())
    assert not (tmp_path / "out").exists()


# Public files, in the layout in which each project saves them.


def parts(
    state: dict[str, Tensor], prefix: str, rename: dict[str, str] | None = None
) -> dict[str, dict[str, Tensor]]:
    """encoder.x, predictor.y -> {"encoder": {prefix x}, "predictor": {prefix y}}."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, rest = key.split(".", 1)
        out.setdefault((rename or {}).get(name, name), {})[prefix + rest] = value
    return out


AROUND = {"opt": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "scaler": None, "epoch": 3, "loss": 0.5}
AROUND |= {"batch_size": 8, "world_size": 2, "lr": 6e-4}
ARGS = argparse.Namespace(
    model="pretrain_videomae_base", lr=1e-3, output_dir=Path("out"), best=np.float64(0.5)
)


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def read_case(name: str, wrap, path: Path, **more) -> tuple[Any, Checkpoint]:
    case = Case(VECTORS / f"{name}.json")
    return case, public.read_public(saved(path, wrap(dict(case.state))), **{**case.overrides(), **more})


def near(got: Tensor, want: Tensor) -> None:
    assert (got.reshape(want.shape) - want).abs().max() < 1e-4


def test_v_jepa(tmp_path):
    wrap = lambda s: {**parts(s, "module.backbone."), **AROUND}  # noqa: E731
    case, found = read_case("vjepa_sincos_uniform", wrap, tmp_path / "vitl16.pth.tar")
    assert (found.format, found.model["positions"], found.unused) == ("V-JEPA", "sincos_uniform", [])
    encoder = found.build_encoder(found.online)
    near(encoder(case.video), case["encoder_full"])
    near(level_norm(found.build_encoder()(case.video), case.geometry["dim"]), case["target_full"])
    predictor, query = found.build_predictor(encoder)
    got = predictor(
        encoder(case.video, case.mask(1).context),
        case.mask(1),
        query.of_mask(1),
        encoder.grid,
    ).target
    near(got, case["prediction.1"])


def test_v_jepa_2_with_unused_tables_and_ten_mask_tokens(tmp_path):
    def wrap(state):
        stale = {f"{p}.pos_embed": torch.randn(1, 64, 64) for p in ("encoder", "target_encoder")}
        stale["predictor.predictor_pos_embed"] = torch.randn(1, 64, 64)
        more = {f"predictor.mask_tokens.{i}": torch.randn(1, 1, 24) for i in range(2, 10)}
        return {**parts({**state, **stale, **more}, "module.backbone."), **AROUND}

    case = Case(VECTORS / "vjepa2_rope.json")
    given = {k: v for k, v in case.overrides().items() if k != "positions"}
    found = public.read_public(saved(tmp_path / "vitl.pt", wrap(case.state)), **given)
    assert (found.format, found.model["positions"]) == ("V-JEPA 2", "rope")
    unused = ["target_encoder.pos_embed", "encoder.pos_embed", "predictor.predictor_pos_embed"]
    assert {k.removeprefix("target_") for k in found.unused} == {k.removeprefix("target_") for k in unused}
    assert found.query is not None and found.query.shape == (10, 24)
    encoder = found.build_encoder(found.online)
    predictor, query = found.build_predictor(encoder)
    near(encoder(case["clips_wide"]), case["encoder_wide"])
    got = predictor(
        encoder(case.video, case.mask(1).context),
        case.mask(1),
        query.of_mask(1),
        encoder.grid,
    ).target
    near(got, case["prediction.1"])


def test_v_jepa_2_1_and_its_distilled_form(tmp_path):
    wrap = lambda s: {**parts(s, "module.backbone."), **AROUND}  # noqa: E731
    case, found = read_case("vjepa2_1", wrap, tmp_path / "vjepa2_1_vitg_384.pt")
    assert (found.format, found.model["positions"]) == ("V-JEPA 2.1", "rope_interleaved")
    assert len(found.model["levels"]) == 4 and found.unused == []
    near(found.build_encoder(found.online)(case.video), case["encoder_full"])
    near(
        level_norm(found.build_encoder()(case.video, return_levels=True), case.geometry["dim"]),
        case["target_full"],
    )

    def distilled(state):
        """The average of the student is evaluated; target_encoder is the teacher, of another size."""
        student = parts(state, "module.backbone.")
        other = {k: torch.zeros_like(v) for k, v in student["encoder"].items()}
        teacher = {"module.backbone.patch_embed.proj.weight": torch.zeros(64, 3, 2, 16, 16)}
        return {
            "ema_encoder": student.pop("encoder"),
            "encoder": other,
            "target_encoder": teacher,
            **student,
            **AROUND,
        }

    case, found = read_case("vjepa2_1_distilled", distilled, tmp_path / "vjepa2_1_vitb_dist_vitG_384.pt")
    assert found.format == "V-JEPA 2.1" and found.model["levels"] == ()
    near(found.build_encoder()(case.video), case["encoder_full"])
    assert found.online is not None and not found.online["norm.weight"].any()
    assert "target_encoder.patch_embed.proj.weight" in found.unused
    assert {k.split(".")[1] for k in found.unused} == {"patch_embed", "norms_block"}


PUBLISHED = {  # format, width: depth, heads, mlp_ratio, patch, layers of the levels
    ("V-JEPA 2", 1024): (1, 16, 4.0, 16, ()),
    ("V-JEPA 2", 1280): (1, 16, 4.0, 16, ()),
    ("V-JEPA 2", 1408): (1, 22, 48 / 11, 16, ()),
    ("V-JEPA 2.1", 1408): (40, 22, 48 / 11, 16, (9, 19, 29, 39)),
    ("V-JEPA 2.1", 1664): (48, 26, 64 / 13, 16, (11, 23, 37, 47)),
    ("VideoMAE", 384): (1, 6, 4.0, 16, ()),
    ("VideoMAE", 1408): (1, 16, 48 / 11, 14, ()),
}


@pytest.mark.parametrize("name, dim", PUBLISHED)
def test_published_sizes_need_no_overrides(name, dim):
    depth, heads, mlp_ratio, patch, levels = PUBLISHED[name, dim]
    kind = {"V-JEPA 2": "rope", "V-JEPA 2.1": "rope_interleaved", "VideoMAE": "sincos_flat"}[name]
    size = {
        "frames": 16,
        "height": 224,
        "width": 224,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "patch": patch,
    }
    more = {"image_tokenizer": bool(levels), "levels": levels, "final_norm": name != "VideoMAE"}
    with torch.device("meta"):
        state = Encoder(**size, mlp_ratio=mlp_ratio, positions=kind, **more).state_dict()
    if name == "VideoMAE":
        for key in [k for k in state if k.endswith("qkv.bias")]:
            q, _, v = state.pop(key).chunk(3)
            state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
    else:
        last = f"encoder.norms_block.{len(levels) - 1}." if levels else "encoder.norm."
        state = {f"encoder.{k}": v for k, v in state.items()}
        state = {
            k.replace("level_norms", "norms_block").replace("encoder.norm.", last): v
            for k, v in state.items()
        }
    found = public.checkpoint_from_state(state, "FILE", {})
    assert found.format == name
    want = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
        "patch": patch,
        "levels": levels,
    }
    assert {k: found.model[k] for k in want} == {**want, "mlp_ratio": pytest.approx(mlp_ratio)}
    assert found.model["positions"] == kind and found.model.get("rope_grid") == (16 if levels else None)


@pytest.mark.parametrize(
    "case, key, model",
    [
        ("videomae_pretrain", "model", "VideoMAE"),
        ("videomae_pretrain", "module", "VideoMAE"),
        ("videomaev2_pretrain", "module", "VideoMAE"),  # says nothing of its encoder but the predictions
        ("mae_st_sep_cls", "model_state", "MAE-ST"),
        ("mae_st_plain", "model", "MAE-ST"),
    ],
)
def test_masked_autoencoders(case, key, model, tmp_path):
    around = {"optimizer": {}, "epoch": 5, "scaler": {"scale": 1.0}, "args": ARGS, "cfg": "MODEL: mae"}
    case, found = read_case(case, lambda s: {key: s, **around}, tmp_path / "checkpoint.pth")
    assert (found.format, found.unused, found.online) == (model, [], None)
    encoder = found.build_encoder()
    predictor, query = found.build_predictor(encoder)
    context, hidden = ((m.nonzero()[:, 1].reshape(2, -1)) for m in (~case["mask"], case["mask"]))
    if "encoder_visible" in case:  # a sum over tokens: MAE-ST's are in the order of its noise
        near(encoder(case.video, context).sum(1), case["encoder_visible"].sum(1))
    if "decode_mask" in case:
        hidden = (~case["decode_mask"]).nonzero()[:, 1].reshape(2, -1)
    mask = Mask(context, hidden[:, None])
    got = predictor(
        encoder(case.video, context, return_levels=True), mask, query.tokens[0], encoder.grid
    ).target[:, 0]
    whole = case["prediction"].shape[1] == encoder.grid.n
    near(got, gather_tokens(case["prediction"], hidden) if whole else case["prediction"])


def test_fine_tuned_videomae_keeps_its_classifier(tmp_path):
    case, found = read_case("videomae_finetune", lambda s: {"model": s, "args": ARGS}, tmp_path / "ft.pth")
    near(found.build_head()(found.build_encoder()(case["clips"])), case["logits"])
    save_native(tmp_path, found, {})
    again, _ = read_checkpoint_file(str(tmp_path))
    near(again.build_head()(again.build_encoder()(case["clips"])), case["logits"])


def test_i_jepa(tmp_path):
    def wrap(state):
        whole = parts(state, "module.")
        return {**whole, "target_encoder": whole["encoder"], **AROUND}

    case, found = read_case("ijepa", wrap, tmp_path / "IN1K-vit.h.14-300e.pth.tar")
    assert (found.format, found.model["positions"], found.unused) == ("I-JEPA", "sincos_2d", [])
    near(found.build_encoder()(case.video), case["encoder_full"])


def official(found: Checkpoint, names: dict[str, str]) -> dict[str, Tensor]:
    """Our weights under other beginnings of their names."""
    ours = {f"encoder.{k}": v for k, v in found.encoder.items()}
    ours |= {f"predictor.{k}": v for k, v in found.predictor_weights.items()}
    ours |= {f"head.{k}": v for k, v in found.head.items()}
    for old, new in names.items():
        ours = {new + k[len(old) :] if k.startswith(old) else k: v for k, v in ours.items()}
    return ours


def test_videomae_v2_of_patch_14(tmp_path):
    found = own("sincos_flat", MeanHead(48, CLASSES), patch=14, height=28, width=42, final_norm=False)
    state = official(found, {"encoder.": "", "head.norm": "fc_norm", "head.linear": "head"})
    for i in range(2):
        q, k, v = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
        found.encoder[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, 0 * k, v])
    read = public.read_public(
        saved(tmp_path / "v2.pth", {"module": state}), heads=4, frames=4, height=28, width=42
    )
    assert (read.format, read.model["patch"]) == ("VideoMAE", 14)
    clips = torch.randn(1, 3, 4, 28, 42)
    found.head_eps = 1e-6
    assert read.build_encoder()(clips).equal(found.build_encoder()(clips))
    assert read.build_head()(read.build_encoder()(clips)).equal(
        found.build_head()(found.build_encoder()(clips))
    )


def test_mae(tmp_path):
    """Of images; the table's first row, zero, is the class token's."""
    image = {"tubelet": 1, "frames": 1}
    predictor = {"positions": "sincos_2d", "class_token": "encoder", "out": 192}
    found = own("sincos_2d", predictor=predictor, class_token=True, **image)
    names = {"encoder.class_token": "cls_token", "encoder.": "", "predictor.embed": "decoder_embed"}
    names |= {"predictor.proj": "decoder_pred", "predictor.": "decoder_"}
    state = official(found, names)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    encoder = found.build_encoder()
    joint, _ = found.build_predictor(encoder)
    for key, module in (("pos_embed", encoder), ("decoder_pos_embed", joint)):
        table = module.positions.table
        state[key] = torch.cat([0 * table[:1], table])[None]
    state["cls_token"] = state["cls_token"][None, None]
    state["mask_token"] = found.query[None]
    read = public.read_public(
        saved(tmp_path / "mae.pth", {"model": state, "args": ARGS}), heads=4, predictor_heads=2
    )
    read.format = "MAE"
    assert read.model == {**found.model, **{k: read.model[k] for k in read.model.keys() - found.model.keys()}}
    assert (read.predictor["positions"], read.predictor["class_token"]) == ("sincos_2d", "encoder")
    found.format = "MAE"
    same(of_ours(read), of_ours(found))
    del state["cls_token"]
    with pytest.raises(UserError, match=r"10 positions|pos_embed"):
        public.read_public(saved(tmp_path / "mae.pth", {"model": state}), heads=4, predictor_heads=2)


TIMM = {
    "vit_tiny_patch16_224": {"depth": 2, "img_size": 80},
    "vit_small_patch16_224": {"depth": 1, "init_values": 0.1, "img_size": 64},
    "vit_base_patch32_224": {"depth": 2, "embed_dim": 96, "num_heads": 4, "init_values": 0.3, "img_size": 96},
    "vit_tiny_patch16_384": {
        "depth": 1,
        "img_size": 48,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    },
}


@pytest.mark.parametrize("name", TIMM)
def test_vits_of_timm(name, tmp_path):
    net = timm.create_model(name, pretrained=False, num_classes=3, **TIMM[name]).eval()
    randomise(net, 9)
    for key, p in net.named_parameters():
        if "gamma" in key:
            p.data.uniform_(0.1, 0.6)
    side = net.patch_embed.img_size[0]
    images = torch.randn(2, 3, side, side)
    heads = {"heads": 4} if net.embed_dim == 96 else {}
    found = public.read_public(saved(tmp_path / "net.pth", net.state_dict()), **heads)
    assert found.format == "ViT" and set(found.unused) == {"head.weight", "head.bias"}
    with torch.no_grad():
        want = net.forward_features(images)[:, net.num_prefix_tokens :]
        near(found.build_encoder()(images[:, :, None]), want)
        video = inflate_to_video(found, 16, tubelet=2)
        encoder = video.build_encoder()
        near(encoder(images[:, :, None].repeat(1, 1, 2, 1, 1)), want)  # a still clip of one tubelet
        still = encoder(images[:, :, None].repeat(1, 1, 16, 1, 1))
        assert still.shape == (2, 8 * want.shape[1], net.embed_dim)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    about = {"architecture": name, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert public.read_public(str(tmp_path), **heads).pixels == {"mean": [0.5] * 3, "std": [0.25] * 3}


def test_fixed_tables_of_images_become_places_in_space(tmp_path):
    found = own("sincos_2d", tubelet=1, frames=1)
    images = IMAGES[:, :, None]
    want = found.build_encoder()(images)
    encoder = inflate_to_video(found, 4, tubelet=2).build_encoder()
    near(encoder(images.repeat(1, 1, 2, 1, 1)), want)
    with pytest.raises(UserError, match="5 frames are not a multiple of the tubelet of 2"):
        inflate_to_video(found, 5, tubelet=2)
    with pytest.raises(UserError, match="already a video model"):
        inflate_to_video(own("sincos_flat"), 16, tubelet=2)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4, "zip"])
def test_a_pickle_that_would_run_code_is_refused(protocol, tmp_path):
    content = {"args": Evil(tmp_path / "made"), "epoch": 3}
    path = tmp_path / "evil.pth"
    if protocol == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol))
    words = (
        "not a readable checkpoint" if protocol == 4 else r"refused, it would run code \((posix|nt).mkdir\)"
    )
    with (
        pytest.warns(UserWarning) if protocol == 4 else nullcontext(),
        pytest.raises(UserError, match=words) as e,
    ):
        public.read_public(str(path))
    assert "\n" not in str(e.value) and not (tmp_path / "made").exists()


# Errors.


def jepa_state(positions: str = "sincos_uniform", **options) -> dict[str, Tensor]:
    """A V-JEPA file of ours: encoder with its table, predictor, two mask tokens."""
    found = own(positions, predictor={"positions": positions, "out": 48}, **options)
    names = {"predictor.": "predictor.predictor_"}
    state = official(found, names)
    encoder = found.build_encoder()
    joint = JointPredictor(encoder, **found.predictor)
    if positions != "rope":
        state["encoder.pos_embed"] = encoder.positions.table[None]
        state["predictor.predictor_pos_embed"] = joint.positions.table[None]
    return state | {f"predictor.mask_tokens.{i}": torch.randn(1, 1, 32) for i in range(2)}


GIVEN = {"heads": 4, "predictor_heads": 2, "frames": 4}


def test_the_state_that_the_errors_below_start_from(tmp_path):
    found = public.read_public(saved(tmp_path / "x.pth", jepa_state()), **GIVEN)
    assert (found.format, found.model["positions"], found.unused) == ("V-JEPA", "sincos_uniform", [])
    half = public.read_public(
        saved(tmp_path / "x.pth", {k: v.bfloat16() for k, v in jepa_state().items()}), **GIVEN
    )
    assert all(half.encoder[k].equal(v.bfloat16().float()) for k, v in found.encoder.items())


# Each makes one thing wrong in a state and in what is given with it.


def without(key: str):
    return lambda s, g: s.pop(key)


def instead(key: str, change):
    return lambda s, g: s.update({key: change(s[key]) if key in s else change(None)})


FC1 = "encoder.blocks.0.mlp.fc1.weight"
WRONG = {
    "unexpected": (instead("encoder.extra", lambda _: torch.ones(1)), "unexpected 'encoder.extra'"),
    "cos_attn": (
        instead("encoder.blocks.0.attn.scale", lambda _: torch.ones(1)),
        "'encoder.blocks.0.attn.scale'",
    ),
    "missing": (without("encoder.blocks.1.norm2.bias"), r"no weight for encoder.blocks.1.norm2.bias \(48,\)"),
    "no norm": (without("encoder.norm.weight"), r"no weight for encoder.norm.weight"),
    "no block": (without(FC1), r"no weight for blocks.0.mlp.fc1.weight"),
    "no bias": (without("predictor.predictor_embed.bias"), r"no weight for predictor.embed.bias"),
    "no token": (
        without("predictor.mask_tokens.0"),
        r"'predictor.mask_tokens.1' is there, one before it is not",
    ),
    "no table": (without("encoder.pos_embed"), "no positions in the file"),
    "transposed": (instead(FC1, lambda x: x.T), r"fc1.weight' is \(48, 120\), .* asks for \(48, 48\)"),
    "flat": (
        instead("encoder.norm.bias", lambda x: x.reshape(6, 8)),
        r"norm.bias' is \(6, 8\), .* have 1 dim",
    ),
    "square": (
        instead("encoder.blocks.1.mlp.fc2.weight", lambda x: x.T.contiguous()),
        r"'encoder.blocks.1.mlp.fc2.weight' is \(120, 48\), the rest of the file asks for \(48, 120\)",
    ),
    "wide token": (
        instead("predictor.mask_tokens.1", lambda x: x.repeat(1, 1, 2)),
        r"mask_tokens.0' .* not one",
    ),
    "places": (instead("encoder.pos_embed", lambda x: x[:, 1:]), "17 positions are no square for 4 frames"),
    "heads": (lambda s, g: g.pop("heads"), "how many heads a model of width 48 has: give heads="),
    "predictor heads": (
        lambda s, g: (g.pop("predictor_heads"), g.update(positions="rope", height=24, width=24)),
        "predictor of width 32 has: give predictor_heads=",
    ),
    "7 heads": (lambda s, g: g.update(heads=7), "7 heads do not divide the width 48: give 6 or 8"),
    "unknown": (lambda s, g: g.update(head=4), "head= is no property of a model; known are heads,"),
    "no number": (lambda s, g: g.update(heads="many"), "heads=many: input should be a valid integer"),
    "frames": (lambda s, g: g.update(frames=1), "frames=1 are fewer than the tubelet of 2"),
    "other table": (lambda s, g: g.update(positions="sincos"), "positions is sincos_uniform, not sincos"),
    "no encoder": (lambda s, g: [s.pop(k) for k in list(s) if k.startswith("encoder.")], "no known format"),
    "nothing": (lambda s, g: s.clear(), "no weights in it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_error_for_wrong_file(name, tmp_path):
    change, words = WRONG[name]
    state = jepa_state()
    given = dict(GIVEN)
    change(state, given)
    path = saved(tmp_path / "x.pth", {**state, "epoch": 3})
    with pytest.raises(UserError, match=words) as e:
        public.read_public(path, **given)
    assert str(e.value).startswith(path) and "\n" not in str(e.value)


@pytest.mark.parametrize("case", ["videomae_pretrain", "videomae_finetune", "mae_st_sep_cls", "ijepa"])
def test_missing_or_misshapen_weight(case):
    case = Case(VECTORS / f"{case}.json")
    fine = (
        "predictor.mask_tokens.1",
        "predictor.predictor_pos_embed",
    )  # the last token; a table that is made again
    for key, value in case.state.items():
        longer = torch.cat([value, value], -1)
        shapes = [longer, longer.flatten()[: value.numel() - 1], value.flatten()[0]]
        turned = value.transpose(0, -1)
        shapes += [turned] if [n for n in turned.shape if n > 1] != [n for n in value.shape if n > 1] else []
        for wrong in [*shapes, *([] if key in fine else [None])]:
            state = {k: v for k, v in case.state.items() if k != key} | (
                {key: wrong} if wrong is not None else {}
            )
            with pytest.raises(UserError) as e:
                public.checkpoint_from_state(state, "FILE", case.overrides())
            assert str(e.value).startswith("FILE: ") and "\n" not in str(e.value)


def test_width_100_needs_its_heads(tmp_path):
    path = saved(tmp_path / "x.pth", jepa_state(dim=100, heads=5))
    with pytest.raises(UserError, match="width 100 has: give heads="):
        public.read_public(path, predictor_heads=2, frames=4)
    assert public.read_public(path, heads=5, predictor_heads=2, frames=4).model["heads"] == 5


def test_an_encoder_alone_with_a_table_is_of_v_jepa_or_of_v_jepa_2(tmp_path):
    state = {k: v for k, v in jepa_state().items() if k.startswith("encoder.")}
    path = saved(tmp_path / "x.pth", state)
    with pytest.raises(
        UserError, match=r"give positions=sincos_uniform \(V-JEPA\) or positions=rope \(V-JEPA 2\)"
    ):
        public.read_public(path, heads=4, frames=4)
    first = public.read_public(path, heads=4, frames=4, positions="sincos_uniform")
    second = public.read_public(path, heads=4, frames=4, height=24, width=24, positions="rope")
    assert (first.format, first.unused) == ("V-JEPA", [])
    assert (second.format, second.unused) == ("V-JEPA 2", ["encoder.pos_embed"])
    assert first.build_encoder()(CLIPS).equal(own("sincos_uniform").build_encoder()(CLIPS))
    assert second.build_encoder()(CLIPS).equal(own("rope").build_encoder()(CLIPS))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(suffix, tmp_path):
    state = jepa_state()
    path = tmp_path / f"x{suffix}"
    torch.save({"model": state}, path) if suffix == ".pth" else save_file(state, path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 9, 100, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"x{suffix}: not a readable checkpoint") as e:
            read_checkpoint_file(str(path))
        assert "\n" not in str(e.value)
    path.write_text("not a checkpoint\n" * 99)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        read_checkpoint_file(str(path))


@pytest.mark.parametrize(
    "content, words",
    [
        ([torch.ones(1)], "holds a list, not a dictionary"),
        ({"epoch": 3, "lr": 0.1}, "no weights in it; its keys are epoch, lr"),
        ({"model": {"epoch": 3}}, "no weights in it; its keys are epoch"),
        ({"pooler.query_tokens": torch.ones(1)}, "the head of a probe, without an encoder"),
        ({"predictor": {"module.mask_token": torch.ones(1)}}, "no known format"),
        (
            {"encoder": {"module.norm.weight": torch.ones(1)}, "predictor": None},
            "a predictor without an encoder",
        ),
        (
            {"vjepa2.encoder.embeddings.patch_embeddings.proj.bias": torch.ones(1)},
            "give its folder",
        ),
        (
            {"conv1.weight": torch.ones(1), "bn1.bias": torch.ones(1)},
            "no known format; its keys begin with conv1.weight",
        ),
    ],
)
def test_files_that_hold_something_else(content, words, tmp_path):
    with pytest.raises(UserError, match=words):
        public.read_public(saved(tmp_path / "x.pth", content))


def test_folders_of_hugging_face(tmp_path):
    save_hf(tmp_path, own("sincos_flat"))
    whole = load_file(tmp_path / "model.safetensors")
    clips = CLIPS[:1]
    want = own("sincos_flat").build_encoder()(clips)
    names = sorted(whole)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in shards.items():
        save_file({k: whole[k] for k in keys}, tmp_path / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"other": torch.ones(1)}, tmp_path / "model.fp16.safetensors")  # another form of the same model
    assert (public.read_public(str(tmp_path)).build_encoder()(clips) - want).abs().max() < 1e-5
    (tmp_path / "model.safetensors").unlink()
    assert (public.read_public(str(tmp_path)).build_encoder()(clips) - want).abs().max() < 1e-5
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"index.json names model-00002-of-00002.safetensors, which is not there"
    ):
        public.read_public(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors or pytorch_model.bin"):
        public.read_public(str(tmp_path))
    torch.save(whole, tmp_path / "pytorch_model.bin")
    assert (public.read_public(str(tmp_path)).build_encoder()(clips) - want).abs().max() < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = [
        ({"model_type": "bert"}, "model_type 'bert'; known are videomae, vjepa2"),
        ({"hidden_act": "relu"}, "'relu'"),
    ]
    for change, words in wrong:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            public.read_public(str(tmp_path))
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "num_attention_heads"})
    )
    with pytest.raises(UserError, match=r"config.json: 'num_attention_heads' is missing"):
        public.read_public(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: damaged"):
        public.read_public(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        public.read_public(str(tmp_path / "nowhere"))


# The command, and what it writes.


def test_command(tmp_path, capsys):
    source = saved(tmp_path / "x.pth", {**parts(jepa_state("rope"), "module.backbone."), **AROUND})
    given = ["positions=rope", "heads=4", "predictor_heads=2", "frames=4", "height=24", "width=24"]
    convert.main([source, str(tmp_path / "native"), *given])
    assert "native: V-JEPA 2, dim 48" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "native").iterdir()) == [
        "encoder.safetensors",
        "predictor.safetensors",
    ]
    loaded = load_encoder(str(tmp_path / "native"))
    assert loaded.metadata["source"] == "V-JEPA 2" and loaded.encoder(CLIPS).equal(
        own("rope").build_encoder()(CLIPS)
    )
    convert.main([str(tmp_path / "native"), str(tmp_path / "hf"), "--to", "hf"])
    assert "transformers.VJEPA2Model.from_pretrained" in capsys.readouterr().out
    assert (load_encoder(str(tmp_path / "hf")).encoder(CLIPS) - loaded.encoder(CLIPS)).abs().max() < 1e-5
    with pytest.raises(UserError, match="is there already; give a new folder"):
        convert.main([source, str(tmp_path / "hf"), *given])
    with pytest.raises(UserError, match="describes its own model; heads cannot be given"):
        convert.main([str(tmp_path / "native"), str(tmp_path / "again"), "heads=4"])
    assert not (tmp_path / "again").exists()


def test_command_inflates_images(tmp_path, capsys):
    net = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, depth=1, img_size=32, num_classes=2
    ).eval()
    source = saved(tmp_path / "net.pth", net.state_dict())
    convert.main([source, str(tmp_path / "video"), "--video", "16"])
    assert "not needed: head.weight, head.bias" in capsys.readouterr().out
    encoder, about = load_encoder(str(tmp_path / "video"))
    assert (about["model"]["frames"], about["model"]["tubelet"], encoder.grid) == (16, 2, (8, 2, 2))
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        near(encoder(image[:, :, None].repeat(1, 1, 2, 1, 1)), net.forward_features(image)[:, 1:])
    with pytest.raises(UserError, match="15 frames are not a multiple"):
        convert.main([source, str(tmp_path / "odd"), "--video", "15"])
    assert not (tmp_path / "odd").exists()


def test_command_error(tmp_path):
    source = saved(tmp_path / "x.pth", {"epoch": 1})
    run = [sys.executable, str(ROOT / "tools" / "convert.py"), source, str(tmp_path / "out")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == f"error: {source}: no weights in it; its keys are epoch\n"


def test_the_probe_reads_public_files(tmp_path):
    predictor = {"positions": "sincos_uniform", "out": 192, "heads": 3, "width": 48}
    found = own("sincos_uniform", predictor=predictor, dim=192, heads=3, frames=16)
    state = official(found, {"predictor.": "predictor.predictor_"})
    state["encoder.pos_embed"] = found.build_encoder().positions.table[None]
    state |= {f"predictor.mask_tokens.{i}": torch.zeros(1, 1, 48) for i in range(2)}
    path = saved(tmp_path / "x.pth.tar", parts(state, "module.backbone.", {"encoder": "target_encoder"}))
    encoder, about = load_encoder(path)
    clips = torch.randn(1, 3, 16, 24, 24)
    assert encoder(clips).equal(found.build_encoder()(clips))
    assert about["source"] == "V-JEPA" and about["pixels"]["mean"] == [0.485, 0.456, 0.406]
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    first, again, other = (load_encoder(path, seed).encoder(clips) for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


def test_a_run_of_ours_becomes_a_model_of_transformers(synthetic_shards, tmp_path):
    run = [sys.executable, "vidssl/train.py", "configs/method/videomae.yaml", "configs/model/vit_micro.yaml"]
    run += [
        "configs/data/quickstart.yaml",
        "configs/run/smoke.yaml",
        f"data.train={synthetic_shards / 'train'}",
    ]
    run += [f"run.out={tmp_path / 'run'}", "run.steps=2", "run.save_every=2", "model.depth=1"]
    run += ["method.predictor.width=96", "method.predictor.heads=4"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    convert.main([str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"])
    encoder, about = load_encoder(str(tmp_path / "run"))
    assert about["step"] == 2 and about["pixels"]["std"] == [0.229, 0.224, 0.225]
    m = about["model"]
    clips = torch.randn(1, 3, m["frames"], m["height"], m["width"])
    model, info = hf().VideoMAEForPreTraining.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        got = model.eval().videomae(clips.transpose(1, 2)).last_hidden_state
    assert (got - encoder(clips)).abs().max() <= 1e-5
