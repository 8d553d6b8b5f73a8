"""Checkpoint files: written in the background, renamed into place, read weights-only.

A checkpoint is a folder `step-00000100`: model.safetensors, optimizer.safetensors, and state.json with all
other state and the SHA-256 of the two files, so that a damaged file is never loaded.
"""

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import vidssl
from vidssl.core.errors import UserError
from vidssl.core.io import file_sha256, fsync_path
from vidssl.core.log import logger
from vidssl.core.versions import version_of
from vidssl.pretrained.files import encoder_file, write_tensors

LIBRARIES = ("torchvision", "accelerate", "numpy", "safetensors", "av", "decord2")
WEIGHTS = ("*.safetensors", "*.bin")  # files of a folder that hold weights
TENSOR_FILES = ("model", "optimizer")


def provenance(cfg: dict[str, Any], data: str) -> dict[str, Any]:
    """Origin of a checkpoint: configuration, hash of the data's index, code revision, library versions, and
    hashes of the networks that the method reads (a teacher, a tokenizer)."""
    libraries = {"python": platform.python_version(), "torch": str(torch.__version__)}
    libraries |= {name: version for name in LIBRARIES if (version := version_of(name)) is not None}
    networks = network_hashes(cfg.get("method", {}))
    return {
        "config": cfg,
        **({"networks": networks} if networks else {}),
        "data": data,
        "vidssl": vidssl.__version__,
        "revision": revision(),
        "libraries": libraries,
    }


def network_hashes(tree: Any) -> dict[str, str]:
    """Path -> SHA-256 of the files of each network that a tree of options names by `path`, `paths` or `flow`.
    Of a folder, its encoder, or all weight files."""
    if not isinstance(tree, dict):
        return {}
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= network_hashes(value)
        is_named = key == "path" or (key == "flow" and isinstance(value, str) and Path(value).exists())
        for path in [value] if is_named else value if key == "paths" else []:
            file = encoder_file(Path(path))
            files = [file] if file.is_file() else sorted(p for s in WEIGHTS for p in Path(path).glob(s))
            found[str(path)] = " ".join(file_sha256(name) for name in files)
    return found


def revision() -> str:
    """`git describe` of the checkout that runs (with "-dirty" if it was changed); else the version."""
    root = Path(vidssl.__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git, another owner, a slow disk
            pass
    return vidssl.__version__


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int, keep_every: int = 0) -> None:
    """Writes folder/step-00000100 with state["model"], state["optimizer"] and the rest of `state` as JSON.

    Keeps the `keep` newest checkpoints, and those of every `keep_every` steps (0: no others). Raises OSError
    if it cannot be written; earlier checkpoints are then untouched.
    """
    folder.mkdir(exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = final.with_name(f"{final.name}.tmp")
    for unfinished in folder.glob("step-*.tmp"):  # left by a process that was killed
        shutil.rmtree(unfinished)
    try:
        temporary.mkdir()
        optimizer, groups = flatten_optimizer(state["optimizer"])
        for name, tensors in (("model", dict(state["model"])), ("optimizer", optimizer)):
            write_tensors(temporary / f"{name}.safetensors", tensors)
        plain = {k: v for k, v in state.items() if k not in TENSOR_FILES}
        sums = {name: file_sha256(temporary / f"{name}.safetensors") for name in TENSOR_FILES}
        content = json.dumps({"step": step, **plain, "groups": groups, "sha256": sums})
        (temporary / "state.json").write_text(content)
        for path in (*temporary.iterdir(), temporary):
            fsync_path(path)
        temporary.replace(final)
        fsync_path(folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old, ignore_errors=True)


def flatten_optimizer(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Splits an optimizer's state dict into tensors by "PARAMETER.exp_avg" (exp_avg_sq, step), and its
    groups."""
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


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Reads the newest readable checkpoint into CPU memory; None if there is none. Warns of each unreadable
    one.

    Raises UserError if there are checkpoints, but none can be read.
    """
    found = list_checkpoints(folder)
    for checkpoint in reversed(found):
        try:
            return read_checkpoint(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = str(e).strip().splitlines()[0]
            logger.warning(f"{checkpoint}: cannot be read ({reason}); trying the one before")
    if found:
        raise UserError(
            f"{folder}: none of its {len(found)} checkpoints can be read; move it away to start anew"
        )
    return None


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Reads one checkpoint. Raises OSError, ValueError, KeyError or TypeError if it is damaged."""
    state = json.loads((checkpoint / "state.json").read_text())
    for name in TENSOR_FILES:
        path = checkpoint / f"{name}.safetensors"
        if file_sha256(path) != state["sha256"][name]:
            raise ValueError(f"{path.name} does not have the hash it was written with")
        try:
            state[name] = load_file(path)
        except SafetensorError as e:
            raise ValueError(f"{path.name}: {e}") from None
    state["optimizer"] = unflatten_optimizer(state["optimizer"], state.pop("groups"))
    if not {"step", "scaler", "provenance"} <= state.keys():
        raise ValueError("not a checkpoint of vidssl")
    return state


def quarantine(folder: Path, step: int) -> None:
    """Renames the checkpoints after `step`, which are unreadable, so that new ones can take their names."""
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            number = sum(1 for _ in folder.glob(f"{checkpoint.name}.unreadable-*")) + 1
            checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.unreadable-{number}"))


class AsyncWriter:
    """Writes one checkpoint at a time in a background thread; leaving the context waits for it.

    The thread ends with the write, so that after `wait` this process can fork.
    An OSError (a full disk) does not end the run: `failed` holds its reason until the next write starts, and
    pop_errors returns a line about it. The next method call raises any other exception, which ends the run.
    """

    def __init__(self) -> None:
        self.failed: str | None = None  # why the last write failed
        self._pool: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._name = ""
        self._errors: list[str] = []

    def start(self, name: str, before: Callable[[], None], write: Callable[[], None]) -> None:
        """Waits for the last write, calls `before`, then calls `write` in the background.

        name: used in error lines; write: may only use copies of what the run changes.
        """
        self.wait()
        self._name = name
        self.failed = None
        try:
            before()
        except OSError as e:
            self._record(e)
        else:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
            self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._pending is None or self._pool is None:
            return
        pending, self._pending = self._pending, None
        self._pool.shutdown()
        try:
            pending.result()
        except OSError as e:
            self._record(e)

    def pop_errors(self) -> list[str]:
        """Lines about failed writes since the last call."""
        if self._pending is not None and self._pending.done():
            self.wait()
        errors, self._errors = self._errors, []
        return errors

    def _record(self, error: OSError) -> None:
        self.failed = error.strerror or str(error)
        self._errors.append(f"{self._name} could not be written: {self.failed}")

    def __enter__(self) -> "AsyncWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
