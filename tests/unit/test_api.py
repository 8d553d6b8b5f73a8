"""The public Python API: what `vidssl.__all__` names."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

import vidssl
from vidssl.core.pixels import normalise
from vidssl.data import clip_stream
from vidssl.data.decoding import open_video
from vidssl.data.decoding.in_memory import FramesInMemory
from vidssl.data.loader import Batch
from vidssl.evaluation.views import View, clips_of_video
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.training.micro_batches import make_part_maker
from vidssl.training.own_loop import Place

MODEL = {"frames": 4, "height": 16, "width": 16, "dim": 24, "depth": 1, "heads": 2, "patch": 8, "tubelet": 2}


def saved(folder: Path, **metadata: Any) -> vidssl.Encoder:
    """Writes an encoder with fresh weights."""
    encoder = vidssl.Encoder(**MODEL).eval()
    save_native(folder, Checkpoint("vidssl", MODEL, encoder.state_dict()), metadata)
    return encoder


def test_load_encoder(tmp_path):
    trained = saved(tmp_path, step=3)
    video = torch.randn(2, 3, 4, 16, 16)
    encoder = vidssl.load_encoder(tmp_path)
    assert isinstance(encoder.net, vidssl.Encoder) and not encoder.net.training
    assert encoder(video).equal(trained(video)) and encoder(video).shape == (2, 8, 24)
    assert encoder.metadata["step"] == 3 and encoder.metadata["model"] == MODEL
    assert encoder.metadata["pixels"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    first, again = (vidssl.load_encoder(tmp_path, random_init=1)(video) for _ in range(2))
    assert first.equal(again) and not first.equal(trained(video))


def test_load_encoder_of_another_file(tmp_path):
    with pytest.raises(vidssl.UserError, match="no such file"):
        vidssl.load_encoder(tmp_path / "nowhere")


def test_embed_is_the_encoder_on_the_clips_of_a_probe(tmp_path, tiny_corpus):
    """Of a file, of its frames in memory, and of each in a list; pooled, by slice and dense."""
    saved(tmp_path)
    encoder = vidssl.load_encoder(tmp_path)
    path = min(tiny_corpus.rglob("*.mp4"))
    with open_video(path.read_bytes(), "mp4") as video:
        frames = video.get(range(len(video)))
    view = View(frames=4, stride=2, fps=None, segments=2, crops=3, size=16)
    clips = clips_of_video(FramesInMemory(frames, 10), view)
    tokens = encoder(normalise(clips))
    options = {"stride": 2, "segments": 2}
    pooled = encoder.embed(path, crops=3, **options)
    assert torch.allclose(pooled, tokens.mean((0, 1)), atol=1e-6)
    assert encoder.embed(frames, crops=3, **options).equal(pooled)
    assert encoder.embed([path, torch.from_numpy(frames)], crops=3, **options).shape == (2, 24)
    dense = encoder.embed(path, "dense", **options)
    centre = encoder(normalise(clips[[2, 3]]))  # crop by crop: the middle one has the clips 2 and 3
    assert dense.shape == (4, 2, 2, 24) and torch.allclose(dense.view(2, 8, 24), centre, atol=1e-6)
    assert torch.allclose(encoder.embed(path, "slices", **options), dense.mean((1, 2)), atol=1e-6)


def test_mistakes_in_embed_are_one_line(tmp_path, tiny_corpus):
    saved(tmp_path)
    encoder = vidssl.load_encoder(tmp_path)
    (tmp_path / "text.mp4").write_text("no video")
    frames = torch.zeros(8, 20, 20, 3, dtype=torch.uint8)
    cases = [
        (lambda: encoder.embed(frames), "give stride or fps"),
        (lambda: encoder.embed(frames, fps=2), "give array_fps"),
        (lambda: encoder.embed(frames.float(), stride=1), r"u8 \[T, H, W, 3\]; these are float32"),
        (lambda: encoder.embed(frames, "all", stride=1), "expected one of pooled, class, slices, dense"),
        (lambda: encoder.embed(frames, "class", stride=1), "no class token"),
        (lambda: encoder.embed(frames, "dense", stride=1, crops=3), "give crops=1"),
        (
            lambda: encoder.embed(tmp_path / "text.mp4", stride=1),
            r"text.mp4: cannot be decoded \(not_a_video",
        ),
        (lambda: encoder.embed(tmp_path / "no.mp4", stride=1), r"no.mp4: cannot be decoded \(unreadable"),
        (lambda: encoder.embed([], stride=1), "an empty list"),
    ]
    for call, message in cases:
        with pytest.raises(vidssl.UserError, match=message):
            call()


def test_a_stream_of_clips_goes_on_where_it_was_on_other_processes(tiny_shards, monkeypatch):
    def positions(world: int, state: dict | None = None) -> tuple[list, dict]:
        found = []
        for rank in range(world):
            monkeypatch.setattr(clip_stream, "this_process", lambda rank=rank: (rank, world))
            stream = vidssl.open_dataset(tiny_shards, batch=4, frames=4, size=16, steps=3, workers=0)
            if state is not None:
                stream.load_state_dict(state)
            found += [
                (position, clip) for b in stream for position, clip in zip(b.position, b.video, strict=True)
            ]
        return sorted((int(position), clip.sum().item()) for position, clip in found), stream.state_dict()

    whole, end = positions(1)
    assert end["step"] == 3 and [position for position, _ in whole] == list(range(12))
    assert positions(2, {**end, "step": 1})[0] == whole[4:]
    with pytest.raises(vidssl.UserError, match="the state has batch 8, this one 4"):
        positions(1, {**end, "batch": 8})
    with pytest.raises(vidssl.UserError, match=r"unknown key 'data\.frame_rate'"):
        vidssl.open_dataset(tiny_shards, batch=4, frame_rate=3)


def test_a_stream_of_clips_takes_no_state_of_other_clips(tiny_shards, tmp_path, caplog):
    """What decides the clips is compared, also after JSON; where the data lie and how fast they come is
    not."""
    options: dict[str, Any] = {"batch": 4, "frames": 4, "size": 16, "workers": 0, "stride": [1, 2]}
    stream = vidssl.open_dataset(tiny_shards, **options, augment={"kind": "random_crop", "scale": [0.5, 1]})
    stream.step = 2
    state = json.loads(json.dumps(stream.state_dict()))
    options["augment"] = {"scale": [0.5, 1.0]}
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    speed = {"workers": 1, "steps": 9, "decode_timeout_s": 5, "max_decode_error_rate": 0.5}
    again = vidssl.open_dataset(moved, **{**options, **speed})
    again.load_state_dict(state)
    assert again.step == 2 and not caplog.records
    for change, line in (
        ({"seed": 1}, "seed 0, this one 1"),
        ({"lanes": 2}, "lanes 4, this one 2"),
        ({"frames": 2}, "data.frames 4, this one 2"),
        ({"stride": 1}, r"data.stride \[1, 2\], this one 1"),
        ({"stride": None, "fps": 5}, r"data.stride \[1, 2\], this one None"),
        ({"repeat": 2}, "lanes 4, this one 2"),
        ({"repeat": 2, "lanes": 4, "batch": 8}, "batch 4, this one 8"),
        ({"size": 8}, "augment.size 16, this one 8"),
        ({"augment": None}, r"augment.scale \[0.5, 1.0\], this one \[0.3, 1.0\]"),
        ({"augment": {"kind": "center_crop"}}, "augment.kind random_crop, this one center_crop"),
    ):
        other = vidssl.open_dataset(tiny_shards, **{**options, **change})
        with pytest.raises(vidssl.UserError, match=f"^open_dataset: the state has {line}$"):
            other.load_state_dict(state)
        assert other.step == 0
    earlier = {key: state[key] for key in ("step", "batch", "data_hash")}
    again.load_state_dict(earlier)
    assert [record.message for record in caplog.records] == [
        "open_dataset: the state does not name seed, lanes, data and augment: not checked"
    ]


def test_an_objective_of_ones_own_loop_computes_the_losses_of_a_run():
    """The same loss as a step of vidssl train, masks included, and a saved encoder that can be loaded."""
    arguments = (
        *("configs/method/vjepa_tiny.yaml", "configs/model/vit_micro.yaml", "model.depth=1"),
        *("data.frames=8", "augment.size=16", "run.seed=5"),
    )
    objective = vidssl.make_objective(*arguments)
    video = torch.randint(0, 256, (4, 3, 8, 16, 16), dtype=torch.uint8)
    position = torch.arange(8, 12)
    cfg = objective.cfg
    parts = make_part_maker(cfg, objective.objective, Place(0, 1))(
        0, [Batch(video, position, position, [], [])]
    )
    expected = objective.objective(normalise(video), parts[0].rng, parts[0].masks)
    losses = objective(video, position)
    assert losses.keys() == expected.keys() and losses["loss"].equal(expected["loss"])
    losses["loss"].backward()
    before = objective.eval_encoder.patch_embed.proj.weight.clone()
    with torch.no_grad():
        objective.encoder.patch_embed.proj.weight.add_(1)
    objective.update()
    assert not objective.eval_encoder.patch_embed.proj.weight.equal(before)
    again = vidssl.make_objective(*arguments)
    again.load_state_dict(objective.state_dict())
    assert (again.steps, again.clips) == (1, 4)
    assert again(video)["loss"].equal(objective(video)["loss"])
    # masks of another seed do not follow
    other = vidssl.make_objective(*arguments, "run.seed=6")
    with pytest.raises(vidssl.UserError, match=r"the state has run\.seed 5, this one 6"):
        other.load_state_dict(objective.state_dict())
    again.set_extra_state(torch.tensor([7, 28]))  # of an earlier version
    assert (again.steps, again.clips) == (7, 28)


def test_an_encoder_of_ones_own_loop_is_loaded(tmp_path):
    objective = vidssl.make_objective(
        *("configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml", "model.depth=1"),
        *("data.frames=8", "data.fps=5", "augment.size=16"),
    )
    objective.save_encoder(tmp_path)
    encoder = vidssl.load_encoder(tmp_path)
    frames = torch.randint(0, 256, (20, 16, 16, 3), dtype=torch.uint8)
    clip = frames[2:18:2].permute(3, 0, 1, 2)[None]  # 8 frames, 5 of 10 a second, from the middle
    expected = objective.eval_encoder(normalise(clip)).mean(1)[0]
    assert torch.allclose(encoder.embed(frames, array_fps=10), expected, atol=1e-6)


def test_version_is_the_installed_one():
    assert vidssl.__version__ == version("vidssl")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vidssl.nothing


def test_every_public_name_is_there_and_documented():
    assert set(vidssl.__all__) == set(dir(vidssl)) == {"__version__", *vidssl._PLACES}
    assert all(getattr(vidssl, name).__doc__ for name in vidssl.__all__)


def test_the_api_imports_neither_accelerate_nor_transformers():
    code = "import sys, vidssl; vidssl.load_encoder, vidssl.Encoder; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for name in ("accelerate", "transformers", "deepspeed", "av"):
        assert f"'{name}'" not in modules, name
