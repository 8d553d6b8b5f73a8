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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import vidssl
from vidssl.errors import UserError
from vidssl.files import file_sha256, replace, say, sync
from vidssl.fsdp import whole

LIBRARIES = ("torchvision", "accelerate", "numpy", "safetensors", "av", "decord2")
TENSORS = ("model", "optimizer")


def provenance(cfg: dict[str, Any], data: str) -> dict[str, Any]:
    """What a checkpoint is of: configuration, hash of the data's index, revision of the code, versions of libraries."""
    libraries = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in LIBRARIES:
        try:
            libraries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"config": cfg, "data": data, "vidssl": vidssl.__version__, "revision": revision(), "libraries": libraries}


def revision() -> str:
    """`git describe` of the checkout that runs (+ "-dirty"), or the version where there is none."""
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git, another owner, a slow disk
            pass
    return vidssl.__version__


def copied(tree: Any, keep: bool = True) -> Any:
    """The same tree with every tensor whole and copied to the memory of the CPU. Of pieces (FSDP2), all processes must
    take part; without `keep` None is put in the place of every tensor."""
    if isinstance(tree, Tensor):
        full = whole(tree.detach())
        return full.to("cpu", copy=True).contiguous() if keep else None
    if isinstance(tree, dict):
        return {k: copied(v, keep) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(copied(v, keep) for v in tree)
    return tree


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
        optimizer, groups = flat(state["optimizer"])
        files = {"model": dict(state["model"]), "optimizer": optimizer}
        for name, tensors in files.items():
            write_tensors(beside / f"{name}.safetensors", tensors)
        plain = {k: v for k, v in state.items() if k not in TENSORS}
        sums = {name: file_sha256(beside / f"{name}.safetensors") for name in files}
        (beside / "state.json").write_text(json.dumps({"step": step, **plain, "groups": groups, "sha256": sums}))
        for path in (*beside.iterdir(), beside):
            sync(path)
        beside.replace(place)
        sync(folder)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    for old in found_in(folder)[:-keep]:
        if not keep_every or int(old.name[-8:]) % keep_every:
            shutil.rmtree(old, ignore_errors=True)


def flat(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimiser's state dict -> tensors by "NUMBER.NAME", and its groups."""
    tensors = {f"{i}.{k}": v for i, s in optimizer["state"].items() for k, v in s.items()}
    return tensors, optimizer["param_groups"]


def unflat(tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flat`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    return {"state": state, "param_groups": groups}


def found_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None if there is none at all. Says which ones it passes over."""
    found = found_in(folder)
    for place in reversed(found):
        try:
            return read_checkpoint(place)
        except (OSError, ValueError, KeyError, TypeError) as e:
            why = str(e).strip().splitlines()[0]
            say(f"warning: {place}: cannot be read ({why}); trying the one before")
    if found:
        raise UserError(f"{folder}: none of its {len(found)} checkpoints can be read; move it away to start anew")
    return None


def read_checkpoint(place: Path) -> dict[str, Any]:
    """One checkpoint; OSError, ValueError, KeyError or TypeError if it is not whole."""
    state = json.loads((place / "state.json").read_text())
    for name in TENSORS:
        path = place / f"{name}.safetensors"
        if file_sha256(path) != state["sha256"][name]:
            raise ValueError(f"{path.name} is not what was written")
        try:
            state[name] = load_file(path)
        except SafetensorError as e:
            raise ValueError(f"{path.name}: {e}") from None
    state["optimizer"] = unflat(state["optimizer"], state.pop("groups"))
    if not {"step", "guard", "health", "scaler", "provenance"} <= state.keys():
        raise ValueError("not a checkpoint of vidssl")
    return state


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, none of which could be read, so that new ones can take their places."""
    for place in found_in(folder):
        if int(place.name[-8:]) > step:
            number = sum(1 for _ in folder.glob(f"{place.name}.unreadable-*")) + 1
            place.rename(place.with_name(f"{place.name}.unreadable-{number}"))


class Writer:
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

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def news(self) -> list[str]:
        """Lines about what could not be written since the last call."""
        lines, self._lines = self._lines, []
        return lines


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """safetensors; OSError if it cannot be written."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as e:
        raise OSError(f"{path.name}: {e}") from None


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, Any]) -> None:
    """safetensors with `about` (JSON) in its header, so that the file alone says what it is."""
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    replace(path, lambda beside: write_tensors(beside, plain, {"vidssl": json.dumps(about, sort_keys=True)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> (weights, about)."""
    try:
        with safe_open(path, "pt") as f:
            about = (f.metadata() or {}).get("vidssl")
            weights = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({e})") from None
    if about is None:
        raise UserError(f"{path}: not an encoder written by vidssl (no description in its header)")
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"{path}: some of its weights are not finite: the run that wrote it had diverged")
    return weights, json.loads(about)
