"""A result that is there already is taken for one of this call only if it is: same arguments, same data."""

import json
import shutil

import pytest
import torch
import yaml
from shards_by_hand import write_shards

from vidssl.commands import quickstart
from vidssl.commands.quickstart import parse_quickstart, run_programs
from vidssl.config import load_config, to_tree
from vidssl.core.errors import UserError
from vidssl.data.loader import open_shards
from vidssl.data.shards import Shards
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.pretrained.files import save_weights
from vidssl.quickstart.programs import quickstart_jobs
from vidssl.training.schema import TrainConfig
from vidssl.zoo.config import ZooConfig
from vidssl.zoo.plan import PlannedRun
from vidssl.zoo.programs import check_finished, run_jobs_of


def labelled(folder, label: int):
    """A data set of one sample."""
    meta = {"labels": {"label": label}}
    return write_shards(folder, {folder.name: (b"x", meta)}, {"label": ["a", "b"]})


def finish(job) -> None:
    """Writes what a program leaves, as far as it is looked at."""
    arguments = job.command[4:]
    job.result.parent.mkdir(parents=True, exist_ok=True)
    if job.result.name == "probe.json":
        cfg = load_config(arguments, ProbeConfig)
        hashes = {part: Shards(getattr(cfg.data, part)).hash for part in ("train", "test")}
        job.result.write_text(json.dumps({"config": to_tree(cfg), "data": hashes}))
    else:
        cfg = load_config(arguments, TrainConfig)
        save_weights(job.result, {"w": torch.zeros(1)}, {"data": open_shards(cfg.data)[1]})
        (job.folder / "config.yaml").write_text(yaml.safe_dump(to_tree(cfg)))


@pytest.fixture
def zoo_jobs(tmp_path):
    for part in ("train", "test"):
        labelled(tmp_path / part, 0)
    files = ["configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml", "configs/run/smoke.yaml"]
    shared = [*files, "configs/data/quickstart.yaml", f"data.train={tmp_path / 'train'}"]
    data = [f"data.{part}={tmp_path / part}" for part in ("train", "test")]
    probes = {"linear": ["configs/probe/quickstart.yaml", *data]}
    zoo = ZooConfig(runs={"a": shared}, out=str(tmp_path / "zoo"), probes=probes)
    jobs = run_jobs_of(zoo, {"a": PlannedRun(4, 4, 8, 0, None, 0.0)})
    for job in jobs:
        finish(job)
    return jobs


def test_finished_programs_of_the_same_data_are_kept(zoo_jobs):
    check_finished(zoo_jobs)


@pytest.mark.parametrize("part, number", [("train", 0), ("train", 1), ("test", 1)])
def test_programs_of_data_that_were_packed_anew_are_not_done(part, number, zoo_jobs, tmp_path):
    """number: of the job, a training and a probe of it."""
    shutil.rmtree(tmp_path / part)
    labelled(tmp_path / part, 1)
    with pytest.raises(UserError, match=rf"data\.{part} has changed since it was made"):
        check_finished(zoo_jobs[number:])


def test_data_that_are_gone_are_not_compared(zoo_jobs, tmp_path):
    for part in ("train", "test"):
        shutil.rmtree(tmp_path / part)
    check_finished(zoo_jobs[1:])


@pytest.mark.parametrize("setting", ["probe.segments=2", "probe.seed=1", "probe.controls=[none]"])
def test_a_quickstart_shows_no_probes_of_other_settings(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "run_jobs", lambda jobs, *_, **__: {})
    out = tmp_path / "out"
    for part in ("train", "test"):
        labelled(out / "shards" / part, 0)
    same = parse_quickstart(["--out", str(out)])
    for job in quickstart_jobs(same, "label", 1)[2:4]:
        finish(job)
    run_programs(same, "label")
    with pytest.raises(UserError, match=rf"{setting.partition('=')[0]} is .* there"):
        run_programs(parse_quickstart(["--out", str(out), "--probe", setting]), "label")
