"""What a call of `vidssl adapt` asks for, and the files of its output folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vidssl.config import merge
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, read_json_object

OPTIONS = {"source": "--from", "settings": "key=value", "facts": "key=value"}  # how they are given
DECIDED = {  # keys of the configuration that an option decides
    "run.out": "--out",
    "run.init": "--from",
    "data.train": "--videos",
    "data.val": "--videos",
}
ProbeKind = Literal["linear", "attentive"]


@dataclass(frozen=True)
class Request:
    """The arguments of a call."""

    source: str  # checkpoint
    videos: str  # folder
    out: str  # folder
    labels: tuple[str, ...] = ()  # label sets that are probed; (): all
    minutes: float | None = None  # for everything; None: no limit
    control: str | None = None  # folder with packed, labelled train and test
    probe: ProbeKind = "linear"
    settings: tuple[str, ...] = ()  # key=value of the configuration
    facts: tuple[str, ...] = ()  # key=value of a published file that it does not contain

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def config_file(self) -> Path:
        """The configuration of the run; it is there once everything is planned."""
        return self.folder / "adapt.yaml"

    @property
    def start(self) -> Path:
        """The checkpoint as files of ours."""
        return self.folder / "start"

    def part(self, name: str) -> Path:
        """A part of the videos: train, val, test."""
        return self.folder / "corpus" / name

    def run(self, name: str) -> Path:
        return self.folder / name

    def given(self) -> dict[str, Any]:
        """The settings as sections."""
        return merge(list(self.settings))[0]


def split_settings(items: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(settings of the configuration, facts about the checkpoint): a key with a section, or without."""
    for item in items:
        if "=" not in item:
            raise UserError(f"'{item}' is not key=value")
        key = item.removeprefix("--").partition("=")[0]
        if key in DECIDED:
            raise UserError(f"{key}: is decided by {DECIDED[key]}")
    dotted = {item: "." in item.removeprefix("--").partition("=")[0] for item in items}
    return tuple(i for i in items if dotted[i]), tuple(i for i in items if not dotted[i])


def check_request(request: Request) -> None:
    """Raises UserError if the folder is of another request."""
    stored = _stored(request)
    for key, value in _asked(request).items() if stored else ():
        if stored.get(key) != value:
            raise UserError(
                f"{request.out} holds another adaptation: {OPTIONS.get(key, f'--{key}')} was "
                f"{stored.get(key)}, not {value}; give the same, or another --out"
            )


def check_data(request: Request, hashes: Mapping[str, str]) -> None:
    """Raises UserError if the folder is of other data. hashes: option that names data -> their hash."""
    for option, before in _stored(request).get("data", {}).items():
        if before != hashes.get(option):
            raise UserError(
                f"{request.out} holds an adaptation to other data: those of {option} have changed since "
                "(their hash differs); give another --out"
            )


def keep_request(request: Request, hashes: Mapping[str, str]) -> None:
    """Writes the request beside its results, for check_request and check_data."""
    text = json.dumps({**_asked(request), "data": hashes}, indent=1) + "\n"
    atomic_write_text(request.folder / "adapt.json", text)


def _stored(request: Request) -> dict[str, Any]:
    """What an earlier call has kept; {} if there is none."""
    path = request.folder / "adapt.json"
    return read_json_object(path, f"remove {request.out} and start again") if path.exists() else {}


def _asked(request: Request) -> dict[str, Any]:
    """What decides the results, as JSON holds it."""
    return json.loads(json.dumps({k: v for k, v in asdict(request).items() if k != "out"}))
