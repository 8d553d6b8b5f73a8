"""Online probe: one or several labels per clip, undecodable clips, barriers while clips are decoded."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import reduce
from PIL import Image
from torch import nn

from data_prep import scan
from vidssl.core.errors import UserError
from vidssl.data.schema import DataConfig
from vidssl.training.online_probe import DECODE_BATCH, OnlineProbe
from vidssl.training.schema import OnlineProbeConfig

COLOURS = ("blue", "green", "red")


def write_shards(folder: Path, count: int, multi_label: bool = False) -> str:
    """Images whose channel i % 3 is bright, labelled with it; multi_label: with lists of class numbers."""
    folder.mkdir()
    with tarfile.open(folder / "part-0.tar", "w") as tar:
        for i in range(count):
            image = np.random.default_rng(i).integers(0, 60, (16, 16, 3), np.uint8)
            image[..., i % 3] += 150
            png = io.BytesIO()
            Image.fromarray(image).save(png, "PNG")
            meta: dict = {"label": i % 3, "class": COLOURS[i % 3]}
            if multi_label:
                meta["labels"] = {"label": [i % 3]}
            for ext, data in (("json", json.dumps(meta).encode()), ("png", png.getvalue())):
                info = tarfile.TarInfo(f"{folder.name}-{i:03d}.{ext}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    scan.main([str(folder)])
    return str(folder)


class MeanColour(nn.Module):
    """video [B, 3, T, H, W] -> tokens [B, T, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        return reduce(video, "b c t h w -> b t c", "mean") * self.scale


def make_probe(train: str, test: str, samples: int = 100, **options) -> OnlineProbe:
    data = DataConfig(train=[train], frames=2, stride=1)
    config = OnlineProbeConfig(train=[train], test=[test], samples=samples)
    return OnlineProbe(config, data, 8, **options)


def measure(probe: OnlineProbe) -> dict[str, float]:
    objective: Any = SimpleNamespace(eval_encoder=MeanColour(), trains_class_only=False)
    return probe.measure(objective)


@pytest.mark.parametrize("multi_label", [False, True])
def test_bright_channels_are_recognised(multi_label, tmp_path):
    train = write_shards(tmp_path / "train", 24, multi_label)
    test = write_shards(tmp_path / "test", 9, multi_label)
    probe = make_probe(train, test)
    assert probe.task.kind == ("tags" if multi_label else "class")
    assert measure(probe) == {"online_probe_knn": 100, "online_probe_linear": 100}


def test_decoding_in_child_processes_gives_the_same_clips(tmp_path):
    train, test = write_shards(tmp_path / "train", 6), write_shards(tmp_path / "test", 3)
    plain = make_probe(train, test)
    isolated = make_probe(train, test, isolate=True, workers=1)
    for part in ("train", "test"):
        assert plain.parts[part].clips.equal(isolated.parts[part].clips)
        assert plain.parts[part].labels == isolated.parts[part].labels


def test_samples_are_evenly_spaced_and_undecodable_ones_left_out(tmp_path):
    train, test = write_shards(tmp_path / "train", 9), write_shards(tmp_path / "test", 9)
    tar = tmp_path / "test" / "part-0.tar"
    data = bytearray(tar.read_bytes())
    start = data.index(b"\x89PNG")  # sample 0
    data[start : start + 64] = bytes(64)
    tar.write_bytes(data)
    probe = make_probe(train, test, samples=3)
    assert probe.parts["train"].labels == [0, 1, 2]  # samples 0, 4, 8
    assert probe.parts["test"].labels == [1, 2] and len(probe.parts["test"].clips) == 2


@pytest.mark.parametrize("loads_clips", [True, False])
def test_every_process_reaches_the_same_barriers(loads_clips, tmp_path):
    train, test = write_shards(tmp_path / "train", 9), write_shards(tmp_path / "test", 4)
    calls: list[int] = []
    probe = make_probe(train, test, loads_clips=loads_clips, barrier=lambda: calls.append(1))
    assert len(calls) == -(-9 // DECODE_BATCH) + -(-4 // DECODE_BATCH)
    assert len(probe.parts["train"].labels) == (9 if loads_clips else 0)


def test_clips_over_the_memory_limit_are_an_error(tmp_path):
    config = OnlineProbeConfig(train=["x"], test=["x"], samples=10**6)
    with pytest.raises(UserError, match=r"online_probe\.memory_mb is 512"):
        OnlineProbe(config, DataConfig(train=["x"], frames=16, stride=1), 224)


@pytest.mark.parametrize("loads_clips", [True, False])
def test_train_and_test_that_share_samples_are_an_error(loads_clips, tmp_path):
    """Also samples that the probe would not choose, and in processes that measure nothing."""
    both, other = write_shards(tmp_path / "both", 9), write_shards(tmp_path / "other", 4)
    data = DataConfig(train=[both], frames=2, stride=1)
    for test in ([both], [other, both]):
        config = OnlineProbeConfig(train=[both], test=test, samples=3)
        with pytest.raises(UserError, match=r"^online_probe: 9 sample.* both-000 first: .* must be disjoint"):
            OnlineProbe(config, data, 8, loads_clips=loads_clips)


def test_another_label_set_is_an_error(tmp_path):
    train = write_shards(tmp_path / "train", 3)
    config = OnlineProbeConfig(train=[train], test=[train], label="shape")
    with pytest.raises(UserError, match=r"no label 'shape'.*available: label"):
        OnlineProbe(config, DataConfig(train=[train], frames=2, stride=1), 8)
