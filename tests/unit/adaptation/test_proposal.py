"""What is proposed for a checkpoint and a corpus, and why."""

import pytest

from vidssl.adaptation.corpus import CorpusFacts
from vidssl.adaptation.families import Continuation, continuation_of
from vidssl.adaptation.proposal import Machine, propose
from vidssl.core.errors import UserError
from vidssl.pretrained.infer_config import Checkpoint

CORPUS = CorpusFacts(1000, 3000.0, 60, 15.0, True, 112, 112 * 150.0, 45000, 40, {"action": 5})
MODEL = {"dim": 128, "depth": 4, "heads": 4, "patch": 16, "tubelet": 2, "positions": "rope"}
MODEL |= {"frames": 16, "height": 224, "width": 224}
CPU = Machine(False, None)


def continued(**changes) -> Continuation:
    method = {"target": {"kind": "ema", "momentum": [0.998, 1.0]}}
    fields = {
        "method": method,
        "model": {k: v for k, v in MODEL.items() if k not in ("frames", "height", "width")},
        "augment": None,
        "rate": 1e-3,
        "batch": 3200,
        "stride": None,
        "spacing_s": 4 / 30,
        "is_image": False,
        "has_predictor": True,
        "reasons": [],
    }
    return Continuation(**{**fields, **changes})


def proposed(corpus=CORPUS, source=None, given=None, videos=800, **model):
    return propose(corpus, videos, {**MODEL, **model}, 1e6, source or continued(), CPU, given or {})


def reason(proposal, key: str) -> str:
    (line,) = (line for line in proposal.reasons if line.startswith(key))
    return line


def test_the_clip_is_the_checkpoints_as_far_as_the_videos_allow():
    tree = proposed().tree
    # 4 frames of 30 a second are 2 of 15
    assert (tree["data"]["frames"], tree["data"]["stride"]) == (16, 2)
    assert tree["augment"]["size"] == 112
    assert proposed(CORPUS._replace(short_side=480)).tree["augment"]["size"] == 224
    short = proposed(CORPUS._replace(frames=20))
    assert short.tree["data"]["stride"] == 1 and "do not fit" in reason(short, "data.stride")
    shorter = proposed(CORPUS._replace(frames=7)).tree["data"]
    assert (shorter["frames"], shorter["stride"]) == (6, 1)
    several = proposed(CORPUS._replace(has_one_rate=False, frames=90)).tree["data"]
    assert several["fps"] == 7.5 and "stride" not in several


def test_rates_momentum_and_length_follow_from_the_batch():
    proposal = proposed()
    run, optim = proposal.tree["run"], proposal.tree["optim"]
    assert (run["batch"], run["steps"]) == (32, 1000)
    # a quarter of 1e-3 times the root of 32 / 3200
    assert optim["lr"] == pytest.approx(2.5e-5)
    assert optim["layer_lr_decay"] ** 5 == pytest.approx(0.1, rel=0.01)
    assert run["validate_every"] == run["save_every"] == 50 and optim["warmup"] == 50
    # 0.998 ** (32 / 3200) reaches back over 50,000 steps; a quarter of the run is 250
    assert proposal.tree["method"]["target"]["momentum"] == [0.996, 0.996]
    quick = continued(method={"target": {"kind": "ema", "momentum": [0.9, 1.0]}}, batch=64)
    assert proposed(source=quick).tree["method"]["target"]["momentum"][0] == pytest.approx(0.9**0.5, abs=1e-5)
    fresh = proposed(source=continued(has_predictor=False)).tree["optim"]
    assert fresh["warmup"] == 150


def test_what_is_given_is_followed():
    given = {"run": {"batch": 8, "steps": 400}, "data": {"frames": 8, "stride": 3}, "augment": {"size": 64}}
    tree = proposed(given=given).tree
    assert tree["run"]["batch"] == 8 and tree["optim"]["lr"] == pytest.approx(1.25e-5)
    assert tree["run"]["validate_every"] == 20 and tree["data"] == {"frames": 8}
    assert tree["augment"]["size"] == 64


@pytest.mark.parametrize(
    "videos, corpus, text", [(12, CORPUS, "12 videos are left to train on; at least 16")]
)
def test_too_few_videos(videos, corpus, text):
    with pytest.raises(UserError, match=text):
        proposed(corpus, videos=videos)


def test_videos_of_one_frame_make_no_clip():
    with pytest.raises(UserError, match="have 1 frames; 2 make a clip"):
        proposed(CORPUS._replace(frames=1))


@pytest.mark.parametrize(
    "family, tubelet, method, word",
    [
        ("V-JEPA", 2, "ema", "with which V-JEPA was trained"),
        ("V-JEPA 2", 2, "ema", "with which V-JEPA 2 was trained"),
        ("VideoMAE", 2, "pixels", "with which VideoMAE was trained"),
        ("MAE-ST", 2, "pixels", "with which MAE-ST was trained"),
        ("I-JEPA", 1, "ema", "inflated"),
        ("MAE", 1, "pixels", "inflated"),
        ("ViT", 1, "pixels", "plain ViT: pixels need no second encoder"),
    ],
)
def test_the_objective_is_that_of_the_family(family, tubelet, method, word):
    found = continuation_of(Checkpoint(family, {**MODEL, "tubelet": tubelet, "levels": ()}, {}), {})
    assert found.method["target"]["kind"] == method and word in found.reasons[0]
    assert not found.has_predictor and "drawn anew" in found.reasons[1]
    assert found.method["predictor"]["width"] == 64 and found.model["dim"] == 128


def test_a_published_predictor_is_taken():
    options = {"out": 128, "width": 64, "depth": 3, "heads": 2}
    found = continuation_of(Checkpoint("V-JEPA", MODEL, {}, predictor=options), {})
    assert found.has_predictor and found.method["predictor"]["depth"] == 3
    assert "out" not in found.method["predictor"] and found.method["mask"]["truncate_over"] is None
