"""From a request to RUN/adapt.yaml: the corpus is opened, the proposal made, and both are written."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from vidssl.adaptation.corpus import CorpusFacts, Folders, corpus_facts, packed_folders
from vidssl.adaptation.proposal import Machine, Proposal, propose
from vidssl.adaptation.request import Request
from vidssl.adaptation.start import Start
from vidssl.config import load_config, merge
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text
from vidssl.core.memory import free_memory
from vidssl.data.parts import hold_out, write_part
from vidssl.data.shards import Shards
from vidssl.training.schema import TrainConfig

RECIPE = "configs/recipe/adapt.yaml"
VAL_FRACTION = 0.1  # of the videos, for the held-out error
TEST_FRACTION = 0.2  # for the probes, where the corpus has no test part
SEED = 0  # of the split


class OwnVideos(NamedTuple):
    """The videos, and in which part each of `folders.train` is."""

    folders: Folders
    facts: CorpusFacts
    is_in: dict[str, np.ndarray]  # train, val, and test where the corpus has none: bool [n]
    labels: tuple[str, ...]  # label sets that are probed
    online_label: bool  # whether train and val have labels for an online probe

    @property
    def test(self) -> str | None:
        return self.folders.test


def open_corpus(request: Request, folders: Folders) -> OwnVideos:
    """Raises UserError if a label set that was asked for is not there, or no group can be held out."""
    shards = Shards([folders.train])
    samples = shards.list_samples()
    facts = corpus_facts(samples, shards.classes)
    for label in request.labels:
        if label not in facts.labels:
            there = ", ".join(facts.labels) or "none; see vidssl pack --help for how labels are given"
            raise UserError(f"--labels {label}: no such label in {request.videos}; there is {there}")
    labels = request.labels or tuple(facts.labels)
    is_in: dict[str, np.ndarray] = {}
    left = np.ones(len(samples), bool)
    fractions = {"val": VAL_FRACTION} if folders.test or not labels else {"test": TEST_FRACTION, "val": 0.125}
    for name, fraction in fractions.items():
        rest = np.flatnonzero(left)
        split = hold_out([samples[i] for i in rest], fraction, SEED)
        if not split.held_out.any():
            raise UserError(
                f"--videos {request.videos}: {facts.groups} groups of videos: none can be held out for "
                f"{name}; give videos of more groups (recordings, persons, places)"
            )
        is_in[name] = np.zeros(len(samples), bool)
        is_in[name][rest[split.held_out]] = True
        left &= ~is_in[name]
    is_in["train"] = left
    return OwnVideos(folders, facts, is_in, labels, bool(labels))


def find_folders(request: Request) -> Folders | None:
    """The packed folders of the videos; None: they are not packed yet, or not completely."""
    if found := packed_folders(Path(request.videos)):
        return found
    own = request.folder / "shards"
    is_packed = any((own / name / "index.json").is_file() for name in (".", "train"))
    return packed_folders(own) if is_packed else None


def make_proposal(request: Request, corpus: OwnVideos, start: Start, steps: int | None = None) -> Proposal:
    """steps: that fit into the time; None: no limit."""
    given = request.given()
    if steps is not None:
        given = {**given, "run": {**given.get("run", {}), "steps": steps}}
    machine = Machine(torch.cuda.is_available(), free_memory())
    videos = int(corpus.is_in["train"].sum())
    return propose(
        corpus.facts, videos, start.checkpoint.model, start.parameters, start.source, machine, given
    )


def config_tree(request: Request, corpus: OwnVideos, proposal: Proposal) -> dict[str, Any]:
    """The sections of the configuration: shipped defaults, proposal, and the user's settings. Raises
    UserError if they do not make one."""
    tree = {**proposal.tree}
    tree["data"] = {
        "train": [str(request.part("train"))],
        "val": [str(request.part("val"))],
        **tree["data"],
    }
    tree["run"] = {"out": str(request.run("adapted")), "init": str(request.start), **tree["run"]}
    if corpus.online_label:
        tree["online_probe"] = {
            "train": [str(request.part("train"))],
            "test": [str(request.part("val"))],
            "label": corpus.labels[0],
            "every": tree["run"]["validate_every"],
            "samples": 256,
        }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "proposal.yaml"
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        arguments = [RECIPE, str(file), *request.settings]
        load_config(arguments, TrainConfig)
        return merge(arguments)[0]


def write_config(path: Path, tree: dict[str, Any], reasons: Sequence[str]) -> None:
    """Writes a configuration that a person can read and run: vidssl train PATH."""
    head = "".join(
        f"# {line}\n" for line in ("Written by vidssl adapt; the reasons of its values:", *reasons)
    )
    text = head + yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=100)
    atomic_write_text(path, text)


def write_parts(request: Request, corpus: OwnVideos) -> None:
    """Writes the parts of the videos as folders that link to their shards."""
    for name, keep in corpus.is_in.items():
        write_part(corpus.folders.train, keep, request.part(name))
