"""adaptation/programs.py: the arguments of its programs say what is meant, whatever the paths and rates."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from shards_by_hand import write_shards

from vidssl.adaptation.corpus import Folders
from vidssl.adaptation.flow import data_hashes
from vidssl.adaptation.plan import OwnVideos
from vidssl.adaptation.programs import encoders_of, probe_jobs
from vidssl.adaptation.request import Request, check_data, keep_request
from vidssl.config import load_config
from vidssl.core.errors import UserError
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


@pytest.mark.parametrize("changed", ["--videos", "--control"])
def test_an_adaptation_to_data_that_were_packed_anew_does_not_go_on(changed, tmp_path):
    folder = tmp_path / "control"
    for name in ("videos", "control/train", "control/test"):
        write_shards(tmp_path / name, {name[-1]: (b"x", {})}, {})
    request = Request("x", str(tmp_path / "videos"), str(tmp_path), control=str(folder))
    folders = Folders(str(tmp_path / "videos"), None)
    check_data(request, data_hashes(request, folders))
    keep_request(request, data_hashes(request, folders))
    check_data(request, data_hashes(request, folders))
    other = tmp_path / "videos" if changed == "--videos" else folder / "test"
    shutil.rmtree(other)
    write_shards(other, {"new": (b"y", {})}, {})
    with pytest.raises(UserError, match=f"those of {changed} have changed since"):
        check_data(request, data_hashes(request, folders))
