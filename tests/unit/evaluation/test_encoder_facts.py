"""Encoders with the same weights are others where their models or the statistics of their pixels are."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.dense import dense_fingerprint
from vidssl.evaluation.dense.schema import DenseConfig
from vidssl.evaluation.embedding import open_embedding_folder
from vidssl.evaluation.model_card import read_probes
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probing import probe_fingerprint
from vidssl.evaluation.report import encoder_facts, is_same_encoder, weights_hash
from vidssl.model.vit import Encoder
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.load import LoadedEncoder

MODEL = {"frames": 4, "height": 16, "width": 16, "dim": 24, "depth": 1, "heads": 2, "patch": 8, "tubelet": 2}
PIXELS = {"mean": [0.5] * 3, "std": [0.25] * 3}
OTHERS: dict[str, dict[str, Any]] = {
    "heads": {"model": {**MODEL, "heads": 4}},
    "epsilon": {"model": {**MODEL, "eps": 1e-5}},
    "mean": {"pixels": {**PIXELS, "mean": [0.4] * 3}},
    "std": {"pixels": {**PIXELS, "std": [0.5] * 3}},
}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(**MODEL)


def loaded_as(encoder: Encoder, **changes: Any) -> LoadedEncoder:
    return LoadedEncoder(encoder, {"model": MODEL, "pixels": PIXELS, **changes})


def probe_key(loaded: LoadedEncoder) -> str:
    cfg = load_config(
        ["configs/probe/linear.yaml", "encoder=x", "data.train=y", "data.test=z", "out=o"], ProbeConfig
    )
    split = SimpleNamespace(shards=SimpleNamespace(hash="h"))
    return probe_fingerprint(cfg, SimpleNamespace(splits={"train": split, "test": split}), loaded, "fp32")


def dense_key(loaded: LoadedEncoder) -> str:
    cfg = load_config(["configs/dense/synthetic.yaml", "encoder=x", "data.test=y", "out=z"], DenseConfig)
    return dense_fingerprint(cfg, {"test": "h"}, loaded)


@pytest.mark.parametrize("key", [probe_key, dense_key])
def test_keys_of_results_name_the_model_and_its_pixels(key, encoder):
    loaded = [loaded_as(encoder), loaded_as(encoder), *(loaded_as(encoder, **v) for v in OTHERS.values())]
    assert len({key(each) for each in loaded}) == 1 + len(OTHERS)
    assert key(loaded[0]) == key(loaded[1])


@pytest.mark.parametrize("other", OTHERS)
def test_stored_facts_tell_encoders_apart(other, encoder):
    stored = json.loads(json.dumps(encoder_facts(*loaded_as(encoder))))
    tuples = {"pixels": {name: tuple(values) for name, values in PIXELS.items()}}
    assert is_same_encoder(stored, encoder_facts(*loaded_as(encoder, **tuples)))
    now = encoder_facts(*loaded_as(encoder, **OTHERS[other]))
    assert not is_same_encoder(stored, now)
    # of an earlier version
    assert is_same_encoder({"path": "x", "sha256": stored["sha256"]}, now)
    assert not is_same_encoder({"path": "x", "sha256": "0"}, now)


def test_the_name_of_a_library_is_no_part_of_the_model(encoder):
    keys = [
        encoder_facts(*loaded_as(encoder, model={**MODEL, "name": f"hf:{name}", "library": f"timm {name}"}))
        for name in "ab"
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("other", OTHERS)
def test_a_card_has_no_figures_of_another_model(other, encoder, tmp_path):
    facts = encoder_facts(*loaded_as(encoder, **OTHERS[other]))
    assert facts["sha256"] == weights_hash(encoder)
    report = {"results": [], "encoder": {"path": "other", **facts}}
    (tmp_path / "probe.json").write_text(json.dumps(report))
    checkpoint = Checkpoint("vidssl", MODEL, encoder.state_dict(), PIXELS)
    assert read_probes(tmp_path, [], checkpoint) == []
    with pytest.raises(UserError, match="evaluates another encoder, other; give a probe of"):
        read_probes(tmp_path, [tmp_path], checkpoint)
    report["encoder"] |= {"model": MODEL, "pixels": PIXELS}
    (tmp_path / "probe.json").write_text(json.dumps(report))
    assert read_probes(tmp_path, [], checkpoint) == read_probes(tmp_path, [tmp_path], checkpoint) == [report]


def test_an_embedding_knows_its_clips(tmp_path):
    """Encoders of equal weights that were trained at other rates see other clips of the same options."""
    encoder = {"sha256": "0", "model": {}, "pixels": {}}
    request = {"stride": None, "fps": None, "view": {"stride": 2, "fps": None}, "encoder": encoder}
    assert not open_embedding_folder(tmp_path, request)
    (tmp_path / "embedding.json").touch()
    assert open_embedding_folder(tmp_path, request)
    for view in ({"stride": 4, "fps": None}, {"stride": None, "fps": 8.0}):
        with pytest.raises(UserError, match="other options"):
            open_embedding_folder(tmp_path, {**request, "view": view})
    stored = json.loads((tmp_path / "plan.json").read_text())
    del stored["view"]  # as earlier versions wrote it
    (tmp_path / "plan.json").write_text(json.dumps(stored))
    assert open_embedding_folder(tmp_path, request)
