"""Checkpoints: written beside and renamed into place, in the background; read weights-only.

A checkpoint is a folder `step-00000100`: model.safetensors, optimizer.safetensors, and state.json with everything that
is no tensor and the SHA-256 of the two files, so that a file that is damaged is never taken for a whole one.
"""

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import vidssl
from vidssl.core.errors import UserError
from vidssl.core.io import file_sha256, fsync_path, print_stderr
from vidssl.pretrained.files import write_tensors

LIBRARIES = ("torchvision", "accelerate", "numpy", "safetensors", "av", "decord2")
TENSOR_FILES = ("model", "optimizer")


def provenance(cfg: dict[str, Any], data: str) -> dict[str, Any]:
    """What a checkpoint is of: configuration, hash of the data's index, revision of the code, versions of libraries."""
    libraries = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "config": cfg,
        "data": data,
        "vidssl": vidssl.__version__,
        "revision": revision(),
        "libraries": libraries,
    }


def revision() -> str:
    """`git describe` of the checkout that runs (+ "-dirty"), or the version where there is none."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            return subprocess.run(
                asked, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git, another owner, a slow disk
            pass
    return vidssl.__version__


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int, keep_every: int = 0) -> None:
    """folder/step-00000100 with state["model"], state["optimizer"], and what else is in `state` as JSON.

    The `keep` newest stay, and those of every `keep_every` steps. OSError: it could not be written; what was there is
    as it was."""
    folder.mkdir(exist_ok=True)
    beside, place = folder / f"step-{step:08d}.tmp", folder / f"step-{step:08d}"
    for half in folder.glob("step-*.tmp"):  # of a process that was killed
        shutil.rmtree(half)
    try:
        beside.mkdir()
        optimizer, groups = flatten_optimizer(state["optimizer"])
        files = {"model": dict(state["model"]), "optimizer": optimizer}
        for name, tensors in files.items():
            write_tensors(beside / f"{name}.safetensors", tensors)
        plain = {k: v for k, v in state.items() if k not in TENSOR_FILES}
        sums = {name: file_sha256(beside / f"{name}.safetensors") for name in files}
        (beside / "state.json").write_text(
            json.dumps({"step": step, **plain, "groups": groups, "sha256": sums})
        )
        for path in (*beside.iterdir(), beside):
            fsync_path(path)
        beside.replace(place)
        fsync_path(folder)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        if not keep_every or int(old.name[-8:]) % keep_every:
            shutil.rmtree(old, ignore_errors=True)


def flatten_optimizer(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Splits an optimizer's state dict into tensors by "PARAMETER.exp_avg" (exp_avg_sq, step), and its groups."""
    tensors = {f"{name}.{kind}": t for name, state in optimizer["state"].items() for kind, t in state.items()}
    return tensors, optimizer["param_groups"]


def unflatten_optimizer(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of flatten_optimizer."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, kind = key.rsplit(".", 1)
        state.setdefault(name, {})[kind] = value
    return {"state": state, "param_groups": groups}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None if there is none at all. Says which ones it passes over."""
    found = list_checkpoints(folder)
    for place in reversed(found):
        try:
            return read_checkpoint(place)
        except (OSError, ValueError, KeyError, TypeError) as e:
            why = str(e).strip().splitlines()[0]
            print_stderr(f"warning: {place}: cannot be read ({why}); trying the one before")
    if found:
        raise UserError(
            f"{folder}: none of its {len(found)} checkpoints can be read; move it away to start anew"
        )
    return None


def read_checkpoint(place: Path) -> dict[str, Any]:
    """One checkpoint; OSError, ValueError, KeyError or TypeError if it is not whole."""
    state = json.loads((place / "state.json").read_text())
    for name in TENSOR_FILES:
        path = place / f"{name}.safetensors"
        if file_sha256(path) != state["sha256"][name]:
            raise ValueError(f"{path.name} is not what was written")
        try:
            state[name] = load_file(path)
        except SafetensorError as e:
            raise ValueError(f"{path.name}: {e}") from None
    state["optimizer"] = unflatten_optimizer(state["optimizer"], state.pop("groups"))
    if not {"step", "guard", "scaler", "provenance"} <= state.keys():
        raise ValueError("not a checkpoint of vidssl")
    return state


def quarantine(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, none of which could be read, so that new ones can take their places."""
    for place in list_checkpoints(folder):
        if int(place.name[-8:]) > step:
            number = sum(1 for _ in folder.glob(f"{place.name}.unreadable-*")) + 1
            place.rename(place.with_name(f"{place.name}.unreadable-{number}"))


class AsyncWriter:
    """Writes one thing at a time in a thread. What is written must be a copy; leaving it waits until it is written."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.failed: str | None = None  # why the last thing that was begun could not be written
        self._lines: list[str] = []

    def start(self, what: str, before: Callable[[], None], write: Callable[[], None]) -> None:
        """Do `before`, and begin to write, once what is being written is done."""
        self.wait()
        self.failed = None
        if self._tried(what, before):
            self.thread = threading.Thread(target=self._tried, args=(what, write), name="checkpoint")
            self.thread.start()

    def _tried(self, what: str, action: Callable[[], None]) -> bool:
        try:
            action()
        except OSError as e:
            self.failed = e.strerror or str(e)
            self._lines.append(f"{what} could not be written: {self.failed}")
        return self.failed is None

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def pop_errors(self) -> list[str]:
        """Lines about what could not be written since the last call."""
        lines, self._lines = self._lines, []
        return lines
