"""Pictures for trackers: the same clips at each save; a run is neither changed nor ended by them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidssl import train
from vidssl.config import SHIPPED, load_config
from vidssl.pictures import tracked
from vidssl.pictures.tracked import TrackedPictures, send_pictures
from vidssl.training.schema import TrainConfig

FRAMES, SIZE = 8, 16


class StubTracker:
    """A tracker of Accelerate that keeps what it is sent."""

    def __init__(self, name="stub"):
        self.name = name
        self.sent = []

    def log_images(self, values, step=None, **options):
        self.sent.append((step, values, options))

    def log(self, values, step=None):
        self.sent.append((step, values, {}))


def config_of(method, *more):
    files = [
        str(SHIPPED / f"{name}.yaml") for name in (f"method/{method}", "model/vit_micro", "data/quickstart")
    ]
    small = ["data.train=x", f"data.frames={FRAMES}", f"augment.size={SIZE}", "model.depth=1"]
    return load_config([*files, *small, "run.out=x", "run.steps=2", "run.batch=2", *more], TrainConfig)


def random_clips(seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (6, 3, FRAMES, SIZE, SIZE), dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize(
    "method, names",
    [
        ("videomae_tiny", ["masks", "prediction", "features"]),
        ("vjepa_tiny", ["masks", "prediction", "features"]),
        ("simclr", ["features"]),
    ],
)
def test_the_same_clips_are_sent_and_nothing_of_the_run_changes(method, names):
    objective = config_of(method).build_objective().train()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    tracker = StubTracker()
    pictures = TrackedPictures(SimpleNamespace(trackers=[tracker]), seed=0, frames=FRAMES)
    state = torch.get_rng_state()
    for step in (1, 10):
        assert pictures.log(step, objective, random_clips(step))["pictures_s"] > 0
    assert pictures.works and torch.equal(torch.get_rng_state(), state)
    assert objective.training and all(one.training for one in objective.children())
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    (first, sent, _), (second, again, _) = tracker.sent
    assert (first, second) == (1, 10) and list(sent) == [f"pictures/{name}" for name in names]
    for name, (picture,) in sent.items():
        # The weights are the same, and so are the clips
        assert picture.dtype == np.uint8 and picture.ndim == 3
        assert np.array_equal(picture, again[name][0])


def test_an_error_ends_the_pictures_and_not_the_run(monkeypatch):
    objective = config_of("videomae_tiny").build_objective().train()
    pictures = TrackedPictures(SimpleNamespace(trackers=[StubTracker()]), seed=0, frames=FRAMES)

    def fail(*_):
        raise ConnectionError("the tracker's server is away")

    monkeypatch.setattr(tracked, "send_pictures", fail)
    pictures.log(5, objective, random_clips(0))
    assert objective.training and not pictures.works
    assert pictures.log(6, objective, random_clips(0)) == {}


def test_each_tracker_gets_pictures_as_it_takes_them(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(Image=lambda picture: ("image", picture.shape))
    )
    picture = {"masks": np.zeros((4, 6, 3), np.uint8)}
    sent = {}
    for name in ("tensorboard", "wandb", "trackio"):
        tracker = StubTracker(name)
        send_pictures(tracker, picture, 3)
        ((step, values, options),) = tracker.sent
        assert step == 3
        sent[name] = (values["pictures/masks"], options)
    assert sent["tensorboard"][0].shape == (1, 4, 6, 3) and sent["tensorboard"][1] == {"dataformats": "NHWC"}
    assert [one.shape for one in sent["wandb"][0]] == [(4, 6, 3)] and sent["wandb"][1] == {}
    assert sent["trackio"] == (("image", (4, 6, 3)), {})


def test_without_trackers_nothing_is_imported(monkeypatch):
    # An import of it would fail
    monkeypatch.setitem(sys.modules, "vidssl.pictures.tracked", None)
    alone = SimpleNamespace(is_main=True, saves_alone=True, world=1)
    objective = SimpleNamespace(couples_clips=True)
    cfg = config_of("videomae_tiny")
    assert train.picture_log(cfg, objective, alone) is None
    monkeypatch.undo()
    cfg = config_of("videomae_tiny", "run.trackers=[tensorboard]")
    made = [
        train.picture_log(cfg, objective, SimpleNamespace(**{**vars(alone), "accelerator": None, **other}))
        for other in ({}, {"is_main": False}, {"saves_alone": False}, {"world": 2})
    ]
    assert [one is not None for one in made] == [True, False, False, False]
