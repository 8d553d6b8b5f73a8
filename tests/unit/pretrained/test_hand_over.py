"""Encoders handed over: folders for transformers with a model card, programs of torch.export and ONNX."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vidssl.commands import convert
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.data.augment import CenterCrop
from vidssl.evaluation.report import weights_hash
from vidssl.model.predictor import JointPredictor
from vidssl.model.vit import Encoder
from vidssl.pretrained import export_program
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.load import load_encoder

SHAPE = {"frames": 4, "height": 32, "width": 32, "dim": 36, "depth": 1, "heads": 3, "patch": 16, "tubelet": 2}
SHAPE |= {"mlp_ratio": 2.0, "final_norm": True, "eps": 1e-6}
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
KINDS = {
    "videomae": {"positions": "sincos_flat"},
    "vjepa2": {"positions": "rope"},
    "ijepa": {"positions": "sincos_2d", "frames": 1, "tubelet": 1},
}


def save_run(folder: Path, **options) -> Path:
    """A run folder with random weights."""
    torch.manual_seed(0)
    model = {**SHAPE, **options}
    encoder = Encoder(**model, init="xavier")
    checkpoint = Checkpoint("vidssl", model, encoder.state_dict(), PIXELS)
    if options.get("positions") == "rope":
        checkpoint.predictor = {"out": 36, "width": 32, "depth": 1, "heads": 2, "mlp_ratio": 2.0}
        checkpoint.predictor |= {"positions": "rope", "eps": 1e-6}
        predictor = JointPredictor(encoder, **checkpoint.predictor)
        checkpoint.predictor_weights = predictor.state_dict()
        checkpoint.query = torch.zeros(2, 32)
    config = {
        "data": {"train": ["/secret/place/corpus/train"], "frames": 4, "stride": 2},
        "method": {"mask": {"kind": "tube"}},
        "run": {"batch": 8, "steps": 20, "out": "/secret/place/run"},
    }
    header = {"config": config, "step": 10, "data": "abc", "vidssl": "0.1.0"}
    folder.mkdir()
    save_native(folder, checkpoint, header)
    return folder


def save_probe(folder: Path, rows: list[tuple[str, str, float, list[float]]], sha256: str) -> Path:
    """A probe.json. rows: label, control, value, interval."""
    folder.mkdir(parents=True)
    common = {"protocol": "attentive", "metric": "top1", "chance": 10.0, "n_test": 200}
    report = {
        "results": [
            {"label": label, "control": control, "value": value, "ci95": interval, **common}
            for label, control, value, interval in rows
        ],
        "encoder": {"path": "runs/other", "sha256": sha256},
        "data": {},
        "config": {"data": {"train": ["/secret/place/corpus/train"], "test": ["/secret/place/corpus/test"]}},
    }
    (folder / "probe.json").write_text(json.dumps(report))
    return folder


def hash_of(run: Path) -> str:
    return weights_hash(load_encoder(run).encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_the_snippet_of_the_card_gives_our_features(kind, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    run = save_run(tmp_path / "run", **KINDS[kind])
    convert.main([str(run), str(tmp_path / "hf"), "--to", "hf", "--license", "mit"])
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "hf" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "hf")
    said: dict = {}
    exec(code, said)
    frames = said["frames"] if kind != "ijepa" else said["frames"][None]
    assert frames.shape[1:3] == (240, 320)
    clip = CenterCrop(32)(frames)
    with torch.no_grad():
        ours = load_encoder(run).encoder(normalise(clip[None], PIXELS.values()))
    assert said["tokens"].shape == ours.shape and ours.std() > 0.1
    assert (said["tokens"] - ours).abs().max() < 1e-5
    (pixels,) = said["processor"](said["square"], return_tensors="pt").values()
    pixels = pixels[:, None] if kind == "ijepa" else pixels
    assert (pixels[0].transpose(0, 1) - normalise(clip, PIXELS.values())).abs().max() < 1e-6


ROWS = [
    ("motion", "none", 60.0, [56.5, 63.5]),
    ("motion", "shuffled", 30.0, [27.0, 33.0]),
    ("appearance", "none", 90.0, [88.0, 92.0]),
    ("appearance", "random_init", 89.0, [87.0, 91.0]),
]


def test_the_card_has_data_recipe_figures_and_limitations(tmp_path, capsys):
    run = save_run(tmp_path / "run", **KINDS["videomae"])
    save_probe(run / "probe", ROWS, hash_of(run))
    save_probe(run / "of_an_older_step", [("stale", "none", 1.0, [0.0, 2.0])], "other")
    arguments = ["--license", "apache-2.0", "--dataset", "owner/corpus"]
    convert.main([str(run), str(tmp_path / "hf"), "--to", "hf", *arguments])
    assert "the model card, with 1 probes" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["self-supervised-learning", "video", "videomae", "vidssl"],
        "datasets": ["owner/corpus"],
    }
    assert "Videos of `corpus/train` (SHA-256 of the index: `abc`), 10 steps of 8 clips: 80 clips." in card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert yaml.safe_load(recipe) == {
        "method": {"mask": {"kind": "tube"}},
        "data": {"frames": 4, "stride": 2},
        "run": {"steps": 20, "batch": 8},
    }
    row = "| attentive | motion | corpus/train (all) | shuffled | top1 | 30 [27, 33] | 10 | 200 |"
    assert row in card and "stale" not in card and "secret" not in card
    line = (
        "- motion (attentive): 60 [56.5, 63.5], with the frames of each clip shuffled 30 [27, 33]: here the"
    )
    assert f"{line} features use the order of frames." in card
    assert "with untrained weights 89 [87, 91]: this does not show that training has helped." in card


@pytest.mark.parametrize(
    "other", [{"data": {"test": "h"}}, {"probe": {"segments": 3}}, {"data": {"train": "h"}}]
)
def test_a_control_is_compared_with_the_probe_that_it_belongs_to(other, tmp_path):
    """Of two probes with the same labels, on other data or by other clips."""
    run = save_run(tmp_path / "run", **KINDS["videomae"])
    controls = [("label", "none", 50.0, [48.0, 52.0]), ("label", "random_init", 50.0, [48.0, 52.0])]
    save_probe(run / "a", controls, hash_of(run))
    folder = save_probe(run / "b", [("label", "none", 90.0, [88.0, 92.0])], hash_of(run))
    report = json.loads((folder / "probe.json").read_text())
    report["config"] |= {key: value for key, value in other.items() if key != "data"}
    report["data"] = other.get("data", {})
    (folder / "probe.json").write_text(json.dumps(report))
    convert.main([str(run), str(tmp_path / "hf"), "--to", "hf"])
    card = (tmp_path / "hf" / "README.md").read_text()
    line = "50 [48, 52], with untrained weights 50 [48, 52]: this does not show that training has helped."
    assert f"- label (attentive): {line}" in card


def test_a_card_without_licence_and_figures_says_so(tmp_path, capsys):
    run = save_run(tmp_path / "run", **KINDS["videomae"])
    convert.main([str(run), str(tmp_path / "hf"), "--to", "hf"])
    assert "its licence is not set" in capsys.readouterr().out
    card = (tmp_path / "hf" / "README.md").read_text()
    front = card.split("---")[1]
    assert yaml.safe_load(front)["license"] == "other" and "# set the licence before" in front
    assert "The licence is not set yet" in card and "nothing is known of what its features" in card


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--to", "hf", "--probe", "PROBE"], "evaluates another encoder, runs/other"),
        (["--to", "hf", "--probe", "run/encoder.safetensors"], "is no report of vidssl probe"),
        (["--to", "hf", "--probe", "nowhere"], "nowhere: no such file"),
        (["--to", "onnx"], "--to onnx needs onnx, onnxscript, onnxruntime: pip install 'vidssl"),
    ],
)
def test_what_cannot_be_handed_over_leaves_nothing(arguments, words, tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", **KINDS["videomae"])
    save_probe(tmp_path / "PROBE", ROWS, "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export_program, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        convert.main([str(run), "out", *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--license", "mit"], "--license is for the model card"),
        (["--to", "torch", "--probe", "x"], "--probe is for the model card"),
        (["--to", "hf", "--license", "Apache 2"], "such as apache-2.0"),
    ],
)
def test_options_of_the_card_are_checked(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        convert.main([str(tmp_path), str(tmp_path / "out"), *arguments])
    assert ended.value.code == 2 and words in capsys.readouterr().err


CLIPS = torch.randn(5, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


def exported(kind: str, folder: Path, **options) -> tuple[Path, torch.Tensor]:
    """Exports an encoder by the command. Returns the file, and the features of CLIPS."""
    run = save_run(folder / "run", **options)
    convert.main([str(run), str(folder / "out"), "--to", kind])
    about = json.loads((folder / "out" / "encoder.json").read_text())
    assert about["input"]["shape"] == ["batch", 3, 4, 32, 32] and about["output"]["shape"] == ["batch", 8, 36]
    assert about["pixels"]["mean"] == PIXELS["mean"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["encoder.json", about["file"]]
    with torch.no_grad():
        return folder / "out" / about["file"], load_encoder(run).encoder(CLIPS)


def test_a_program_of_torch_export_takes_any_number_of_clips(tmp_path):
    file, expected = exported("torch", tmp_path, positions="rope_interleaved", class_token=True)
    program = torch.export.load(file).module()
    for clips in (1, 5):
        assert (program(CLIPS[:clips]) - expected[:clips]).abs().max() < 1e-5  # processors round differently


def test_an_onnx_program_takes_any_number_of_clips(tmp_path):
    for name in export_program.ONNX_PACKAGES:
        pytest.importorskip(name, reason="pip install 'vidssl[export]'")
    import onnxruntime

    file, expected = exported("onnx", tmp_path, positions="rope")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for clips in (1, 5):
        (features,) = session.run(None, {"video": CLIPS[:clips].numpy()})
        assert np.abs(features - expected[:clips].numpy()).max() < 1e-5


def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", positions="sincos_uniform")
    monkeypatch.setattr(export_program, "_run_torch", lambda path, video: torch.zeros(len(video), 8, 36))
    with pytest.raises(UserError, match=r"encoder.pt2 differs from PyTorch by .* more than rounding"):
        convert.main([str(run), str(tmp_path / "out"), "--to", "torch"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
