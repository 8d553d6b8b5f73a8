"""A checkpoint of each family becomes a run that takes its weights: encoder, average, predictor."""

import pytest
import torch

from vidssl.adaptation.corpus import CorpusFacts
from vidssl.adaptation.proposal import Machine, propose
from vidssl.adaptation.start import read_start, save_start
from vidssl.config import from_tree
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.init import pretrained_weights
from vidssl.pretrained.load import read_checkpoint_file
from vidssl.training.schema import TrainConfig

CORPUS = CorpusFacts(400, 800.0, 40, 30.0, True, 64, 64 * 80.0, 16000, 40, {})
SIZE = {"frames": 8, "height": 64, "width": 64}
SHAPE = {
    "dim": 48,
    "depth": 2,
    "heads": 4,
    "patch": 16,
    "tubelet": 2,
    "mlp_ratio": 4.0,
}  # heads that rotary positions can divide
FAMILIES = {  # further options of the encoder, and of its predictor (None: the file has none)
    "V-JEPA": ({"positions": "sincos_uniform"}, {"positions": "sincos_uniform"}),
    "V-JEPA 2": ({"positions": "rope"}, {"positions": "rope"}),
    "V-JEPA 2.1": (
        {"positions": "rope_interleaved", "rope_grid": 16, "image_tokenizer": True, "levels": (0, 1)},
        {"positions": "rope_interleaved", "rope_grid": 16, "modality": True, "context_head": True},
    ),
    "VideoMAE": ({"positions": "sincos_flat"}, {"positions": "sincos_flat", "embed_bias": False}),
    "VideoMAE fine-tuned": ({"positions": "sincos_flat", "final_norm": False}, None),
    "MAE-ST": (
        {"positions": "learned_separable", "class_token": True},
        {"positions": "learned_separable", "class_token": "own"},
    ),
    "I-JEPA": ({"positions": "sincos_2d", "tubelet": 1, "frames": 1}, None),
    "MAE": ({"positions": "sincos_2d", "tubelet": 1, "frames": 1, "class_token": True}, None),
    "ViT": ({"positions": "learned", "tubelet": 1, "frames": 1, "class_token": True}, None),
}
LOSS_OF_PIXELS = 2 * 16 * 16 * 3


def made_checkpoint(family: str) -> Checkpoint:
    options, of_predictor = FAMILIES[family]
    model = {**SHAPE, **SIZE, **options}
    encoder = Encoder(**model)
    checkpoint = Checkpoint(family, model, encoder.state_dict())
    if of_predictor is not None:
        of_features = family.startswith("V-JEPA")
        out = encoder.feature_width if of_features else LOSS_OF_PIXELS // (2 if family == "MAE-ST" else 1)
        predictor = {"out": out, "width": 24, "depth": 1, "heads": 2, **of_predictor}
        checkpoint.predictor = predictor
        checkpoint.predictor_weights = JointPredictor(encoder, **predictor).state_dict()
        checkpoint.query = MaskToken(24, groups=2).tokens.data
    if family.startswith("V-JEPA"):
        checkpoint.online = Encoder(**model).state_dict()
    return checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_the_file_is_taken(family, tmp_path):
    torch.manual_seed(0)
    checkpoint = made_checkpoint(family)
    save_native(tmp_path, checkpoint, {"source": family})
    start = read_start(str(tmp_path), {})
    proposal = propose(
        CORPUS, 300, start.checkpoint.model, start.parameters, start.source, Machine(False, None), {}
    )
    tree = {**proposal.tree, "data": {"train": ["shards"], **proposal.tree["data"]}}
    tree["run"] = {"out": "run", **tree["run"]}
    cfg = from_tree(tree, TrainConfig, family)
    save_start(tmp_path / "start", start, cfg.data.frames, "file")
    objective = cfg.build_objective()
    again = read_checkpoint_file(str(tmp_path / "start"))[0]
    weights = pretrained_weights(objective, again, cfg.model, cfg.method, family)
    assert weights["encoder.blocks.1.mlp.fc1.weight"].equal(
        (checkpoint.online or checkpoint.encoder)["blocks.1.mlp.fc1.weight"]
    )
    has_average = any(name.startswith("target.encoder.") for name in weights)
    assert has_average == (family.startswith("V-JEPA") or family == "I-JEPA")
    assert any(name.startswith("predictor.") for name in weights) == (checkpoint.predictor is not None)
    objective.load_state_dict(weights, strict=False)
