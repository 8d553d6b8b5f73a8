"""vidssl decode: the decoder learns what its condition says, goes on where it was, and its figures are those
of what it renders."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vidssl import config
from vidssl.commands import decode
from vidssl.config import SHIPPED, load_config
from vidssl.core.errors import Preempted, UserError
from vidssl.data.parts import group_of
from vidssl.model.grid import Grid
from vidssl.pictures.decode import DecoderTraining
from vidssl.pictures.decoded import decoder_verdict, errors, figures, psnr
from vidssl.pictures.flow_decoder import FlowDecoder, flow_loss, sample_patches
from vidssl.pictures.run_clips import RunClips
from vidssl.pictures.runs import open_run, predict_mask
from vidssl.pretrained.files import load_weights
from vidssl.training.checkpoint import save_checkpoint
from vidssl.training.schema import TrainConfig

GRID = Grid(1, 2, 2)


def test_the_decoder_learns_what_the_condition_says_and_is_unsure_without_it():
    torch.manual_seed(0)
    decoder = FlowDecoder(GRID, pixels=4, condition=2, width=32, depth=1, heads=2)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    ids = torch.arange(4).expand(64, 4)

    def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches of one level, -0.8 or 0.8, and a condition that says which."""
        sign = torch.randint(0, 2, (count, 1, 1)).float() * 2 - 1
        return (0.8 * sign).expand(count, 4, 4), sign.expand(count, 4, 2)

    decoder.set_statistics(data(64)[1])
    for _ in range(150):
        clean, values = data(64)
        given = torch.rand(64) > 0.3
        noise = torch.randn(64, 4, 4)
        t = torch.rand(64)
        loss = flow_loss(decoder, clean, values, ids, given, torch.ones(64, 4), noise, t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clean, values = data(16)
    noise = torch.randn(16, 8, 4, 4)
    draw = partial(sample_patches, decoder, values, ids[:16])
    told = draw(torch.ones(16, dtype=torch.bool), noise, 8)
    untold = draw(torch.zeros(16, dtype=torch.bool), noise, 8)
    truth = (clean + 1) / 2
    assert (told.mean(1) - truth).abs().mean() < 0.1 and told.std(1).mean() < 0.12
    # without the condition both levels are drawn
    assert untold.std(1).mean() > 0.25 and (untold.mean(1) - 0.5).abs().mean() < 0.2


def make_run(folder: Path, shards: Path, method: str) -> Path:
    """A run's folder with untrained weights."""
    files = [str(SHIPPED / f"{name}.yaml") for name in (f"method/{method}", "data/quickstart")]
    model = ["model.kind=vit", "model.dim=24", "model.depth=1", "model.heads=2", "model.patch=8"]
    small = ["method.predictor.width=24", "data.frames=6", "run.steps=1", "run.batch=8"]
    paths = [f"data.train={shards / 'train'}", f"run.out={folder}"]
    cfg = load_config([*files, *model, *small, *paths], TrainConfig)
    folder.mkdir()
    config.save(config.to_tree(cfg), folder / "config.yaml")
    state = {"model": cfg.build_objective().state_dict(), "optimizer": {"state": {}, "param_groups": []}}
    save_checkpoint(folder / "checkpoints", 1, {**state, "scaler": None, "provenance": {}}, keep=1)
    return folder


@pytest.fixture(scope="module")
def run(synthetic_shards, tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "pixels", synthetic_shards, "videomae_tiny")


def decoded(run: Path, out: Path, *more: str) -> dict:
    small = ["--clips", "3", "--samples", "2", "--shown", "2"]
    decode.main([str(run), "--out", str(out), "--steps", "3", *small, *more])
    return json.loads((out / "decoded.json").read_text())


@pytest.fixture(autouse=True)
def small_decoder(monkeypatch):
    """Few clips a step."""
    made = DecoderTraining.__init__

    def init(self, run, clips, settings, out):
        small = {**settings.__dict__, "batch": 4, "width": 32, "depth": 1}
        made(self, run, clips, type(settings)(**small), out)

    monkeypatch.setattr(DecoderTraining, "__init__", init)


def test_files_and_figures_of_a_run_that_predicts_pixels(run, tmp_path):
    report = decoded(run, tmp_path / "out")
    assert report["clips"]["number"] == 3 and report["decoder"]["steps"] == 3
    assert report["decoder"]["trained_on"] <= 60 - 3
    assert list(report["renderings"]) == [
        "prediction", "one_sample", "nothing", "other_clip", "last_frame", "own",
    ]  # fmt: skip
    for entry in report["renderings"].values():
        low, high = entry["psnr_db"]["ci95"]
        assert low <= entry["psnr_db"]["mean"] <= high
    assert len(decoder_verdict(report)) == 4
    image = Image.open(tmp_path / "out" / "decoded.webp")
    # two rows of truth, input, two samples, mean, deviation, given nothing, copied frame, own prediction
    assert image.n_frames == 6 and image.size[0] > 9 * 128 and image.size[1] > 2 * 128
    assert Image.open(tmp_path / "out" / "decoded.png").size == image.size
    items = json.loads((tmp_path / "out" / "decoded_clips.json").read_text())["items"]
    assert [len(item["rows"]) for item in items] == [9, 9] and items[0]["frames"] == 6


def test_a_training_that_was_cut_off_goes_on_as_if_it_were_not(run, tmp_path, monkeypatch):
    whole = decoded(run, tmp_path / "whole")
    take = DecoderTraining._take_step

    def cut(self):
        take(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DecoderTraining, "_take_step", cut)
    with pytest.raises(Preempted, match="saved after step 2"):
        decoded(run, tmp_path / "cut")
    monkeypatch.setattr(DecoderTraining, "_take_step", take)
    report = decoded(run, tmp_path / "cut")
    assert report == whole
    weights = [load_weights(tmp_path / name / "decoder.safetensors")[0] for name in ("whole", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    with pytest.raises(UserError, match="decoder with other context"):
        decoded(run, tmp_path / "cut", "--context")


def test_features_of_an_average_are_decoded_of_given_videos(synthetic_shards, synthetic_corpus, tmp_path):
    run = make_run(tmp_path / "features", synthetic_shards, "vjepa_tiny")
    videos = sorted(map(str, (synthetic_corpus / "videos").glob("test_*.mp4")))[:2]
    report = decoded(run, tmp_path / "out", "--clip", *videos, "--context")
    assert report["clip_keys"] == videos and report["clips"]["from"] == "given videos"
    assert "own" not in report["renderings"] and report["decoder"]["context"] is True


def test_held_out_samples_share_no_group_with_the_training(run):
    clips = RunClips(open_run(run).cfg)
    held = clips.hold_out(10)
    assert len(held) == 10 and len(clips.train) <= 50
    assert not {group_of(sample) for sample in held} & {group_of(sample) for sample in clips.train}
    assert torch.equal(clips.batch(3, 2), clips.batch(3, 2)) and clips.batch(3, 2).shape == (2, 3, 6, 32, 32)


def test_errors_are_those_behind_the_mask(run):
    from types import SimpleNamespace

    clean = torch.zeros(2, 3, 4)
    weight = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    patches = torch.full((2, 3, 4), 0.1)
    patches[:, 2] = 1  # has no weight
    batch = SimpleNamespace(
        clean=clean,
        prediction=SimpleNamespace(weight=weight),
        means={"prediction": patches, "nothing": 2 * patches},
        samples=torch.rand(2, 4, 3, 4),
        without=torch.rand(2, 4, 3, 4),
    )
    found = errors([batch])  # type: ignore[list-item]
    assert np.allclose(found["prediction"], 0.01) and np.allclose(psnr(found["prediction"]), 20)
    report = figures([batch], ["a", "b"], 0)  # type: ignore[list-item]
    gain = report["psnr_gain_of_prediction_over_db"]["nothing"]
    assert gain["mean"] == pytest.approx(6.0206, abs=1e-3) and gain["ci95"][0] > 6
    assert decoder_verdict(report)[0].endswith(
        "better than mean of the samples of the same decoder, given nothing"
    )


def test_the_prediction_is_that_of_the_training_step(run):
    opened = open_run(run)
    part = opened.prediction
    clips = RunClips(opened.cfg).batch(0, 2)
    from vidssl.core.pixels import normalise
    from vidssl.core.rng import KeyedRNG

    rng = KeyedRNG(0, 0, torch.arange(2))
    (mask,) = part.make_masks(normalise(clips), rng)[0]
    found = predict_mask(part, clips, mask, rng)
    video = normalise(clips)
    expected = part.predict(video, part.target(video), found.grid, 0, mask, rng, None)
    assert torch.allclose(found.values, expected.prediction.target.flatten(1, 2))
    assert found.features.shape[1] == mask.context.shape[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["docs"], "docs: no run folder"),
        (["RUN", "--clip", "none.mp4"], "--clip none.mp4: no such file"),
        (["RUN", "--data", "docs"], "--data docs: has no index.json"),
        (["RUN", "--samples", "1"], "--samples 1: give 2 or more"),
        (["RUN", "--minutes", "0"], "--minutes 0.0: give a number above 0"),
    ],
)
def test_mistakes(arguments, words, run, tmp_path):
    given = [str(run) if argument == "RUN" else argument for argument in arguments]
    with pytest.raises(UserError, match=words):
        decode.main([*given, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
