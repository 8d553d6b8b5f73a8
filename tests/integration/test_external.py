"""Encoders of timm and transformers: their own features in our token order, and probes of them in one
table."""

import csv
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from vidssl import probe
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.evaluation.report import weights_hash
from vidssl.pretrained.external import open_encoder
from vidssl.pretrained.load import load_encoder

ROOT = Path(__file__).parents[2]
transformers = pytest.importorskip("transformers", reason="needs transformers (pip install vidssl[hf])")
FRAMES, SIDE, PATCH = 4, 24, 8  # clips of 4 x 24 x 24 px, 3 x 3 places
CROP = {"height": SIDE, "width": SIDE}
SHORT = {"hidden_size": 24, "num_attention_heads": 2}
TINY = {**SHORT, "num_hidden_layers": 1, "intermediate_size": 48}
IMAGE = {"image_size": SIDE, "patch_size": PATCH}
VIDEO = {**IMAGE, "num_frames": FRAMES}
PRISM = {
    "num_spatial_layers": 1,
    "num_temporal_layers": 1,
    "intermediate_size": 48,
    "tubelet_size": [1, PATCH, PATCH],
}
JEPA = {
    "crop_size": SIDE,
    "patch_size": PATCH,
    "frames_per_clip": FRAMES,
    "num_hidden_layers": 1,
    "mlp_ratio": 2.0,
}
JEPA |= {"pred_hidden_size": 24, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2}
EXTRA = {
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 3,
    "siglip": 0,
    "clip": 1,
    "vit": 1,
    "ijepa": 0,
}
EXTRA |= {"videomae": 0, "timesformer": 1, "vivit": 1, "vjepa2": 0, "videoprism": 0}  # tokens without a place
CLIPS = ("videomae", "timesformer", "vivit", "vjepa2", "videoprism")
TUBELET = {"videomae": 2, "vivit": 2, "vjepa2": 2}


def make(kind: str) -> nn.Module:
    t = transformers
    model, settings = {
        "dinov2": (t.Dinov2Model, t.Dinov2Config(**IMAGE, **SHORT, num_hidden_layers=1)),
        "dinov2_with_registers": (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**IMAGE, **SHORT, num_hidden_layers=1),
        ),
        "dinov3_vit": (t.DINOv3ViTModel, t.DINOv3ViTConfig(**IMAGE, **TINY, num_register_tokens=2)),
        "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(**IMAGE, **TINY)),
        "clip": (
            t.CLIPModel,  # with its text tower
            t.CLIPConfig(
                vision_config={**IMAGE, **TINY}, text_config={**TINY, "vocab_size": 9, "eos_token_id": 2}
            ),
        ),
        "vit": (t.ViTForImageClassification, t.ViTConfig(**IMAGE, **TINY)),  # with a head
        "ijepa": (t.IJepaModel, t.IJepaConfig(**IMAGE, **TINY)),
        "videomae": (t.VideoMAEModel, t.VideoMAEConfig(**VIDEO, **TINY, use_mean_pooling=False)),
        "timesformer": (t.TimesformerModel, t.TimesformerConfig(**VIDEO, **TINY)),
        "vivit": (t.VivitModel, t.VivitConfig(**VIDEO, **TINY, tubelet_size=[2, PATCH, PATCH])),
        "vjepa2": (t.VJEPA2Model, t.VJEPA2Config(**JEPA, **SHORT)),
        "videoprism": (
            t.VideoPrismVisionModel,
            t.VideoPrismVisionConfig(image_size=SIDE, num_frames=FRAMES, **PRISM, **SHORT),
        ),
        "vit_mae": (t.ViTMAEModel, t.ViTMAEConfig(**IMAGE, **TINY)),
    }[kind]
    torch.manual_seed(0)
    net = model(settings).eval()
    for parameter in net.parameters():  # a fresh model has much that is zero
        nn.init.normal_(parameter, std=0.1)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], str]:
    """A function of the kind of model that returns its folder, made once."""
    root = tmp_path_factory.mktemp("models")

    def make_folder(kind: str) -> str:
        if not (root / kind).exists():
            make(kind).save_pretrained(root / kind)
            preprocessor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "size": CROP}
            (root / kind / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        return str(root / kind)

    return make_folder


def video(frames: int = FRAMES, side: int = SIDE) -> Tensor:
    return torch.randn(2, 3, frames, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", EXTRA)
def test_features_equal_those_of_the_library(kind, folder):
    """Compared with transformers, frame by frame or clip by clip."""
    loaded = open_encoder(f"hf:{folder(kind)}", frames=FRAMES)
    net = make(kind)
    clips = video()
    net = getattr(net, "vision_model", getattr(net, "vit", net))
    with torch.no_grad():
        if kind in CLIPS:
            more = {"skip_predictor": True} if kind == "vjepa2" else {}
            want = net(clips.transpose(1, 2), **more).last_hidden_state[:, EXTRA[kind] :]
            if kind == "timesformer":  # counts times first
                want = torch.stack(
                    [want[:, place * FRAMES + t] for t in range(FRAMES) for place in range(9)], 1
                )
        else:
            frames = [net(clips[:, :, t]).last_hidden_state[:, EXTRA[kind] :] for t in range(FRAMES)]
            want = torch.cat(frames, 1)
        got = loaded.encoder(clips)
    assert got.shape == (2, FRAMES // TUBELET.get(kind, 1) * 9, 24)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    model = loaded.metadata["model"]
    assert [model[k] for k in ("frames", "height", "tubelet", "patch")] == [
        FRAMES,
        SIDE,
        TUBELET.get(kind, 1),
        PATCH,
    ]


@pytest.mark.parametrize("kind", EXTRA)
def test_tokens_are_ordered_by_time_row_and_column(kind, folder):
    """With layers that add nothing, a token depends on its own patch alone."""
    encoder = open_encoder(f"hf:{folder(kind)}", frames=FRAMES).encoder
    for layers in [m for m in encoder.modules() if isinstance(m, nn.ModuleList)]:
        for p in layers.parameters():
            nn.init.zeros_(p)
    clips = video()
    tubelet = TUBELET.get(kind, 1)
    for t, row, column in ((0, 0, 1), (3, 2, 1)):
        other = clips.clone()
        other[:, :, t, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 1
        moved = (encoder(other) - encoder(clips)).abs().amax((0, 2)) > 1e-4
        assert moved.nonzero().flatten().tolist() == [t // tubelet * 9 + row * 3 + column]


@pytest.mark.parametrize("kind", ["videomae", "vjepa2"])
def test_native_loader_reads_the_same_model(kind, folder):
    ours = load_encoder(folder(kind))
    theirs = open_encoder(f"hf:{folder(kind)}")
    torch.testing.assert_close(ours.encoder(video()), theirs.encoder(video()), atol=1e-5, rtol=1e-5)
    for value, other in zip(
        ours.metadata["pixels"].values(), theirs.metadata["pixels"].values(), strict=True
    ):
        assert value == pytest.approx(other)


@pytest.mark.parametrize(
    "processor, kind, settings",
    [
        ("VideoMAEImageProcessor", "videomae", {"crop_size": CROP}),
        ("VJEPA2VideoProcessor", "vjepa2", {"crop_size": SIDE}),
        ("VivitImageProcessor", "vivit", {"crop_size": CROP}),
        ("VivitVideoProcessor", "vivit", {"crop_size": CROP}),
        ("SiglipImageProcessor", "siglip", {"size": CROP}),
        (
            "BitImageProcessor",
            "dinov2",
            {"crop_size": {"height": 32, "width": 32}},
        ),  # not the size of its table
    ],
)
def test_pixels_and_size_equal_the_processors(processor, kind, settings, tmp_path):
    make(kind).save_pretrained(tmp_path)
    tool = getattr(transformers, processor)(**settings)
    tool.save_pretrained(tmp_path)
    loaded = open_encoder(f"hf:{tmp_path}", frames=FRAMES)
    assert loaded.metadata["model"]["height"] == (32 if kind == "dinov2" else SIDE)
    u8 = torch.randint(0, 256, (1, 3, FRAMES, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    frames = list(u8[0].transpose(0, 1))
    given = torch.stack(frames) if processor.endswith("VideoProcessor") else frames
    want = next(iter(tool(given, return_tensors="pt", do_resize=False, do_center_crop=False).values()))
    got = normalise(u8, tuple(loaded.metadata["pixels"].values()))[0].transpose(0, 1)
    torch.testing.assert_close(got, want.reshape(FRAMES, 3, SIDE, SIDE).float(), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights of timm's smallest ViT."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("timm") / "vit.pth"
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), path)
    return path


def test_timm_encodes_each_frame_alone(weights):
    net = timm.create_model("test_vit", pretrained=False).eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    loaded = open_encoder("timm:test_vit", file=str(weights), frames=3)
    clips = video(3, 160)
    with torch.no_grad():
        want = torch.cat([net.forward_features(clips[:, :, t])[:, 1:] for t in range(3)], 1)
        torch.testing.assert_close(loaded.encoder(clips), want, atol=1e-5, rtol=1e-5)
    about = loaded.metadata
    assert about["pixels"] == {"mean": list(net.default_cfg["mean"]), "std": list(net.default_cfg["std"])}
    assert (about["model"]["height"], about["model"]["patch"], about["model"]["tubelet"]) == (160, 16, 1)
    small = open_encoder("timm:test_vit", file=str(weights), frames=3, size=32)
    assert small.encoder(video(3, 32)).shape == (2, 3 * 4, 64) and small.metadata["model"]["height"] == 32


def test_feature_maps_become_tokens():
    loaded = open_encoder("timm:test_resnet", 0, frames=2, size=64)
    maps = loaded.encoder.net.forward_features(video(2, 64)[:, :, 1])  # [2, D, 2, 2]
    torch.testing.assert_close(loaded.encoder(video(2, 64))[:, 4 + 1], maps[:, :, 0, 1])
    assert loaded.metadata["model"]["patch"] == 32


@pytest.mark.parametrize("kind", ["timm", "hf"])
def test_random_init_is_repeatable(kind, weights, folder):
    where, more = ("timm:test_vit", {"file": str(weights)}) if kind == "timm" else (f"hf:{folder('vit')}", {})
    trained, again, first, second, third = (
        weights_hash(open_encoder(where, seed, frames=1, **more).encoder) for seed in (None, None, 0, 0, 1)
    )
    assert trained == again and first == second and len({trained, first, third}) == 3


@pytest.mark.parametrize(
    "where, more, words",
    [
        ("timm:vit_gigantissimo", {"frames": 2}, "no model 'vit_gigantissimo'"),
        ("timm:test_vit", {"frames": 2, "file": "nowhere.pth"}, "encoder_file=nowhere.pth: no such file"),
        ("timm:test_vit", {"random_init": 0}, "data.frames"),
        ("hf:no/such/folder", {"frames": 2}, "no/such/folder"),
        ("hf:videomae", {"frames": 8}, "clips of 4 frames, not data.frames=8"),
        ("hf:vjepa2", {"frames": 3}, "not a multiple of the tubelet of 2"),
        ("hf:videomae", {"size": 32}, "encoder=hf:"),
        ("hf:vit_mae", {"frames": 1}, "no square of patches"),
        ("hf:vit", {"frames": 1, "file": "x.pth"}, "encoder_file is for encoder=timm:NAME"),
        ("runs/mine", {"file": "x.pth"}, "encoder_file is for encoder=timm:NAME"),
    ],
)
def test_wrong_calls(where, more, words, folder):
    if where.startswith("hf:v"):
        where = f"hf:{folder(where[3:])}"
    with pytest.raises(UserError) as e:
        open_encoder(where, **more)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_missing_weights_are_an_error(folder, weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"Missing key.*norm\.bias"):
        open_encoder("timm:test_vit", file=str(tmp_path / "vit.pth"), frames=1)
    net = make("vit")
    state = net.state_dict()
    del state[next(k for k in state if "layer" in k and "norm" in k)]
    net.save_pretrained(tmp_path, state_dict=state)
    (tmp_path / "preprocessor_config.json").write_text(
        (Path(folder("vit")) / "preprocessor_config.json").read_text()
    )
    with pytest.raises(UserError, match="weights are not in its files"):
        open_encoder(f"hf:{tmp_path}", frames=1)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config\.json is missing"):
        open_encoder(f"hf:{tmp_path}", 0, frames=1)


def test_probes_of_three_libraries_in_one_table(
    weights, folder, synthetic_shards, tmp_path, monkeypatch, capsys
):
    """timm's, transformers' and ours under the same data and heads, with controls; the same model read by
    transformers and by our loader gives the same predictions."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    compare = importlib.import_module("compare")
    data = [f"data.{side}={synthetic_shards / side}" for side in ("train", "test")]
    data += ["data.labels=appearance", "data.stride=4", "probe.workers=0", "probe.segments=1"]
    calls = {
        "timm": ["encoder=timm:test_vit", f"encoder_file={weights}", "data.frames=2", "data.size=32"],
        "hf": [f"encoder=hf:{folder('videomae')}"],
        "ours": [f"encoder={folder('videomae')}"],
    }
    controls = {
        "timm": "[none,shuffled,still,single,random_init,pixels]",
        "hf": "[none,shuffled,random_init]",
    }
    for name, call in calls.items():
        more = [f"out={tmp_path / name}", f"probe.controls={controls.get(name, '[none]')}"]
        probe.main([str(ROOT / "configs/probe/knn.yaml"), *data, *call, *more])
    table = tmp_path / "table.csv"
    compare.main([*(str(tmp_path / name) for name in ("ours", "hf", "timm")), f"--csv={table}", "--rank"])
    with open(table, newline="") as f:
        rows = {(r["name"], r["control"]): r for r in csv.DictReader(f)}
    assert len(rows) == 1 + 3 + 6
    assert (
        rows["hf", "none"]["value"] == rows["ours", "none"]["value"]
        and float(rows["hf", "none"]["difference"]) == 0
    )
    assert rows["hf", "none"]["rankme"] == pytest.approx(rows["ours", "none"]["rankme"])
    assert float(rows["timm", "none"]["rankme"]) > 1
    assert float(rows["timm", "none"]["value"]) == float(
        rows["timm", "shuffled"]["value"]
    )  # a mean over frames
    assert "rankme against top1 of appearance: rho" in capsys.readouterr().out
