"""The programs of a quickstart: two pre-training runs, and probes of them and of an untrained encoder."""

from pathlib import Path
from typing import NamedTuple

from vidssl import config
from vidssl.config.yaml_text import list_argument
from vidssl.zoo.jobs import PYTHON, Job

METHOD_FILES = {"videomae": "videomae_tiny", "vjepa": "vjepa_layers_tiny"}
METHODS = tuple(METHOD_FILES)
# of the steps that are configured: a step of the second file costs 1.94 times the FLOPs of one of the first
SHARE_OF_STEPS = {"videomae": 1.0, "vjepa": 0.5}
NOT_TRAINED = "random_init"  # the name of the untrained encoder in the results


class Quickstart(NamedTuple):
    """What is asked for."""

    out: Path  # folder
    videos: Path | None  # the user's folder; None: a corpus is rendered
    train: int  # videos that are rendered for training
    test: int  # and for testing
    labelled: int  # of those for training
    settings: list[str]  # key=value for both trainings
    probe_settings: list[str]  # key=value for all probes

    @property
    def source(self) -> Path:
        return self.videos or self.out / "corpus"

    @property
    def kind(self) -> str:
        """The name of its files in configs/."""
        return "folder" if self.videos else "quickstart"

    def shards(self, split: str) -> Path:
        return self.out / "shards" / split

    @property
    def test_shards(self) -> Path:
        """The packed folder that probes are tested on: val where the videos have no test."""
        test, val = self.shards("test"), self.shards("val")
        return val if val.exists() and not test.exists() else test

    def run(self, method: str) -> Path:
        return self.out / method

    def probe(self, name: str) -> Path:
        return self.out / "probes" / name

    def lengths(self, method: str) -> dict[str, int]:
        """Steps of a training, between its checkpoints, and between measurements of the held-out error where
        they are given, by their keys in the section `run`."""
        files = [f"configs/run/{self.kind}.yaml", *self.settings]
        run = config.merge(files)[0]["run"]
        found = {key: max(1, round(SHARE_OF_STEPS[method] * run[key])) for key in ("steps", "save_every")}
        if run.get("validate_every"):
            # a multiple of save_every, as it was given
            found["validate_every"] = run["validate_every"] // run["save_every"] * found["save_every"]
        return found


def training_files(quick: Quickstart, method: str) -> list[str]:
    names = (f"method/{METHOD_FILES[method]}", "model/vit_micro", f"data/{quick.kind}", f"run/{quick.kind}")
    return [f"configs/{name}.yaml" for name in names]


def probe_file(quick: Quickstart) -> str:
    return f"configs/probe/{quick.kind}.yaml"


def quick_training(quick: Quickstart, method: str, threads: int) -> Job:
    """threads: for products of matrices."""
    own = [f"run.out={quick.run(method)}", f"data.train={quick.shards('train')}"]
    arguments = [*training_files(quick, method), *own, f"efficiency.threads={threads}"]
    lengths = [f"run.{key}={value}" for key, value in quick.lengths(method).items()]
    command = [*PYTHON, "vidssl.train", *arguments, *quick.settings, *lengths]
    log = quick.out / "logs" / f"{method}.txt"
    return Job(method, command, quick.run(method), log, None)


def quick_probe(quick: Quickstart, name: str, method: str, encoder: Path, *more: str) -> Job:
    """A probe of an encoder that the training of `method` leaves."""
    arguments = [probe_file(quick), f"encoder={encoder}", f"out={quick.probe(name)}"]
    arguments += [f"data.train={quick.shards('train')}", f"data.test={quick.test_shards}"]
    command = [*PYTHON, "vidssl.probe", *arguments, *more, *quick.probe_settings]
    log = quick.out / "logs" / f"probe_{name}.txt"
    return Job(f"probe {name}", command, quick.probe(name), log, quick.probe(name) / "probe.json", method)


def quickstart_jobs(quick: Quickstart, label: str, threads: int) -> list[Job]:
    """Two trainings that differ in method file and steps only, a probe of each and of an untrained encoder,
    and probes of `label` on the snapshots. The training of fewer steps ends first: its probes, and that of
    the untrained encoder, which is the same for both, run beside the other training."""
    longer, shorter = METHODS
    return [
        *(quick_training(quick, method, threads) for method in METHODS),
        quick_probe(quick, shorter, shorter, quick.run(shorter)),
        quick_probe(quick, NOT_TRAINED, shorter, quick.run(shorter), "random_init=true"),
        *snapshot_probes(quick, shorter, label),
        quick_probe(quick, longer, longer, quick.run(longer)),
        *snapshot_probes(quick, longer, label),
    ]


def snapshot_probes(quick: Quickstart, method: str, label: str) -> list[Job]:
    """Probes of one label set on the snapshots before the last."""
    run = quick.lengths(method)
    jobs = []
    for step in range(run["save_every"], run["steps"], run["save_every"]):
        snapshot = quick.run(method) / "snapshots" / f"step-{step:08d}.safetensors"
        only = ("probe.controls=[none]", list_argument("data.labels", [label]))
        jobs.append(quick_probe(quick, f"{method}@{step}", method, snapshot, *only))
    return jobs
