"""adaptation/programs.py: the arguments of its programs say what is meant, whatever the paths and rates."""

from pathlib import Path

import numpy as np
import pytest

from vidssl.adaptation.corpus import Folders
from vidssl.adaptation.plan import OwnVideos
from vidssl.adaptation.programs import encoders_of, probe_jobs
from vidssl.adaptation.request import Request
from vidssl.config import load_config
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.schema import TrainConfig
from vidssl.zoo.jobs import PYTHON

FILES = ["method/vjepa_tiny", "model/vit_micro", "data/quickstart", "run/smoke"]
NAMES = (
    "my videos, 2024",
    "a #1",
    "key: value",
    "{draft}",
    "[old]",
    "q\"uo'te",
    "Tür 🚪",
    "null",
    "2024",
    "- x",
)


def probes_of(request: Request, labels: tuple[str, ...], *settings: str) -> list[ProbeConfig]:
    """The configurations of all probes, as the probes read them."""
    files = [f"configs/{name}.yaml" for name in FILES]
    cfg = load_config([*files, "data.train=x", "run.out=x", *settings], TrainConfig)
    corpus = OwnVideos(Folders("x", None), None, {"train": np.ones(1, bool)}, labels, True)
    jobs = probe_jobs(request, corpus, cfg, list(encoders_of(request)))
    return [load_config(job.command[len(PYTHON) + 1 :], ProbeConfig) for job in jobs]


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_reads_the_paths_and_labels_that_were_meant(name):
    request = Request(name, name, f"{name}/run", control=f"{name}/control")
    own, *_, forgotten = probes_of(request, (name, "verb, noun"))
    assert own.data.train == [f"{name}/run/corpus/train", f"{name}/run/corpus/val"]
    assert own.data.test == [f"{name}/run/corpus/test"] and own.data.labels == [name, "verb, noun"]
    assert own.encoder == f"{name}/run/start" and Path(own.out).is_relative_to(f"{name}/run/probes")
    assert forgotten.data.train == [f"{name}/control/train"]
    assert forgotten.data.test == [f"{name}/control/test"]


@pytest.mark.parametrize(
    "given, stride, fps",
    [
        ("data.stride=3", 3, None),
        ("data.stride=[1,2]", 2, None),
        ("data.stride=[4,48]", 26, None),
        ("data.fps=[4,9]", None, 6.5),
    ],
)
def test_a_probe_has_the_middle_of_a_range(given, stride, fps):
    settings = [given, *["data.stride=null"] * (fps is not None)]
    for probe in probes_of(Request("x", "x", "run", control="c"), ("motion",), *settings):
        assert (probe.data.stride, probe.data.fps) == (stride, fps)
