"""Memory of heads is planned: what autograd keeps, parts of a batch, shipped probes for known encoders."""

from pathlib import Path

import pytest
import torch

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.evaluation.features import StoredFeatures
from vidssl.evaluation.head_memory import HeadSize, attention_heads
from vidssl.evaluation.heads import Attentive, cross_attend_jointly
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.protocol import ProbeProtocol, TrainingSet
from vidssl.evaluation.tasks import Task
from vidssl.model.heads import AttentiveHead

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs/probe").glob("*.yaml"))
ENCODERS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 22, 1664: 26}  # width -> attention heads, published
TOKENS = (1568, 2048, 4608)  # of clips of 16 frames: 224 and 256 px by 16, 384 px by 16
BOUND_GB = 64  # of an accelerator with 80 GB, beside the encoder


def kept_bytes(size: HeadSize, examples: int) -> float:
    """Bytes per example that autograd keeps for the backward pass of heads of this size."""
    heads = [AttentiveHead(size.width, size.heads, 5, size.depth) for _ in range(size.settings)]
    weights = {p.untyped_storage().data_ptr() for head in heads for p in head.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randn(examples, size.tokens, size.width)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # one deep head at a time
        _ = list(cross_attend_jointly(heads, tokens)) if size.depth == 1 else heads[0](tokens)
    return sum(storage.nbytes() for storage in kept.values()) / examples


@pytest.mark.parametrize(
    "size",
    [
        HeadSize(width=64, tokens=200, heads=4, depth=1, settings=4),
        HeadSize(width=128, tokens=300, heads=8, depth=1, settings=20),
        HeadSize(width=64, tokens=200, heads=4, depth=2, settings=1),
        HeadSize(width=128, tokens=300, heads=2, depth=4, settings=1),
        HeadSize(width=48, tokens=100, heads=16, depth=3, settings=3),
    ],
)
def test_the_plan_covers_what_autograd_keeps(size):
    """It is larger by the tokens and by passing values of the backward pass, and not by more."""
    kept = kept_bytes(size, 2)
    assert kept <= size.example_bytes <= 4 * kept
    weights = sum(p.numel() for p in AttentiveHead(size.width, size.heads, 1, size.depth).parameters())
    assert size.state_bytes == pytest.approx(16 * weights * size.settings, rel=0.05)


def test_parts_of_a_batch_give_the_same_heads():
    torch.manual_seed(0)
    source = StoredFeatures(torch.randn(22, 2, 5, 16), torch.device("cpu"))
    labels = [n % 3 for n in range(22)]
    task = Task("x", "class", ["a", "b", "c"])
    data = TrainingSet(source, list(range(22)), labels, torch.tensor(labels))
    for depth in (1, 3):
        trained = []
        per_example = HeadSize(16, 10, 4, depth, 2).example_bytes
        for limit_gb in (16.0, 3.5e-9 * per_example):
            protocol = Attentive(
                segments=2, heads=4, depth=depth, batch=8, epochs=2, lr=(1e-3, 1e-2), head_memory_gb=limit_gb
            )
            assert protocol.examples_at_once(16, 10) == (8 if limit_gb == 16 else 3)
            heads = protocol.train(task, data, protocol.hyperparameters())
            trained.append([*heads, protocol.predict(heads, source, data.indices, task)])
        for a, b in zip(*(heads[:-1] for heads in trained), strict=True):
            for p, q in zip(a.parameters(), b.parameters(), strict=True):
                torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(trained[0][-1], trained[1][-1], atol=1e-3, rtol=1e-3)


def build(path: Path, *settings: str) -> ProbeProtocol:
    required = ["encoder=x", "out=x", "data.train=x", "data.test=x"]
    return load_config([str(path), *required, *settings], ProbeConfig).probe.build()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("width", ENCODERS)
def test_shipped_probes_fit_known_encoders(path, width):
    for tokens in TOKENS:
        protocol = build(path).fitted_to(width, tokens, ENCODERS[width])
        if isinstance(protocol, Attentive):
            size = protocol.head_size(width, protocol.clips_of_example * tokens)
            at_once = protocol.examples_at_once(size.width, size.tokens)
            assert width % size.heads == 0 and at_once >= 1
            assert size.state_bytes + at_once * size.example_bytes <= BOUND_GB * 1e9


def test_the_grid_of_vjepa2_is_divided():
    """Without parts, its batch would take 200 GB with a ViT-L."""
    protocol = build(ROOT / "configs/probe/attentive_vjepa2.yaml").fitted_to(1024, 1568, 16)
    size = protocol.head_size(1024, 2 * 1568)
    assert 150e9 < protocol.batch * size.example_bytes < 250e9
    assert 8 <= protocol.examples_at_once(size.width, size.tokens) < protocol.batch


def test_heads_are_those_of_the_encoder_where_they_divide_the_width():
    assert [attention_heads(width, heads) for width, heads in ENCODERS.items()] == [*ENCODERS.values()]
    assert [attention_heads(width, None) for width in (384, 768, 1024, 1408)] == [6, 12, 16, 22]
    # mean colours of patches
    assert [attention_heads(width, 22) for width in (48, 96)] == [16, 16]


@pytest.mark.parametrize(
    ("kind", "setting", "words"),
    [
        ("attentive", "probe.heads=12", "probe.heads: 12 heads do not divide features of width 1024"),
        ("attentive", "probe.head_memory_gb=0.1", "one example of 12544 tokens takes"),
        ("linear", "probe.temporal_bins=3", "3 does not divide a clip's 1568 tokens; 1, 2, 4, 7"),
        ("knn", "probe.temporal_bins=5", "5 does not divide a clip's 1568 tokens"),
        ("retrieval", "probe.temporal_bins=9", "9 does not divide a clip's 1568 tokens"),
        ("linear", "probe.tokens=both", "probe.tokens=both is for attentive heads"),
        ("knn", "probe.tokens=both", "give class or patches"),
        ("clip_set", "probe.tokens=both", "probe.tokens=both is for attentive heads"),
        (
            "linear",
            "probe.temporal_bins=2 probe.tokens=class",
            "a clip has one class token; give probe.temporal_bins",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_key(kind, setting, words):
    protocol = build(ROOT / f"configs/probe/{kind}.yaml", *setting.split())
    with pytest.raises(UserError) as e:
        protocol.fitted_to(1024, 1568, 16)
    assert words in str(e.value) and setting.split("=")[0] in str(e.value) and "\n" not in str(e.value)
