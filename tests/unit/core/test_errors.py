"""How programs end: one line and an exit status for what the user can mend, a traceback for faults."""

import errno
import inspect
import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from vidssl.core import errors
from vidssl.core.errors import DISK_ERRORS, Interrupted, Preempted, UserError, disk_error_line, run_cli
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import save_native, write_tensors
from vidssl.pretrained.infer_config import Checkpoint

ROOT = Path(__file__).parents[3]


def raise_error(error: BaseException):
    def main(_: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, words",
    [
        (UserError("data.train: no such folder"), 2, "error: data.train: no such folder"),
        (Preempted("run: SIGTERM"), 75, "run: SIGTERM"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("run: ended after step 3"), 130, "run: ended after step 3"),
        *(
            (OSError(number, os.strerror(number), "out/file"), 2, f"error: out/file: {os.strerror(number)}")
            for number in sorted(DISK_ERRORS)
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:40],
)
def test_each_outcome_has_a_status_and_a_line(error, status, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as exit_:
        run_cli(raise_error(error))
    assert exit_.value.code == status
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "error", [ValueError("fault"), FileNotFoundError(errno.ENOENT, "gone"), OSError("fault")]
)
def test_a_fault_of_the_program_is_raised(error, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(type(error)):
        run_cli(raise_error(error))


@pytest.mark.parametrize(
    "error", [ValueError("fault"), MemoryError(), OSError(errno.ENOSPC, "full"), UserError("x")]
)
def test_a_failed_thread_does_not_end_with_status_0(error, monkeypatch, capsys):
    def main(_: list[str]) -> None:
        thread = threading.Thread(target=raise_error(error), args=([],), name="metrics")
        thread.start()
        thread.join()

    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(threading, "excepthook", lambda failure: None)
    with pytest.raises(SystemExit) as exit_:
        run_cli(main)
    assert exit_.value.code == 1 and "error: metrics has failed" in capsys.readouterr().err


class FullDisk(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache/shard.tar")


def from_a_loader_worker() -> None:
    list(DataLoader(FullDisk(), num_workers=1))


def from_safetensors() -> None:
    """The limit of the size of a file stands in for a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        write_tensors(Path("/tmp") / f"vidssl-full-{os.getpid()}", {"x": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        Path(f"/tmp/vidssl-full-{os.getpid()}").unlink(missing_ok=True)


@pytest.mark.parametrize("fail", [from_a_loader_worker, from_safetensors], ids=lambda f: f.__name__)
def test_errors_that_arrive_as_text_are_recognised(fail):
    with pytest.raises(OSError) as caught:
        fail()
    assert disk_error_line(caught.value)


LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_limited(limit: int, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of the project with a limit on the size of its files."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *map(str, command)],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def save_encoder(folder: Path) -> Path:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(Encoder).parameters.items()
        if parameter.default is not parameter.empty
    }
    shape = {"frames": 4, "height": 32, "width": 32, "dim": 48, "depth": 1, "heads": 2}
    model = {**defaults, **shape, "positions": "sincos_flat"}
    folder.mkdir()
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    save_native(folder, Checkpoint("vidssl", model, Encoder(**model).state_dict(), pixels), {})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("program", ["synthetic", "native", "hf"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(program, tmp_path):
    # bytes that a file may have: the videos and most of a checkpoint do not fit
    limit = 3000
    out = tmp_path / "out"
    if program == "synthetic":
        command: list[object] = [ROOT / "data_prep/synthetic.py", out, "--train", 2, "--test", 1]
    else:
        command = [ROOT / "tools/convert.py", save_encoder(tmp_path / "run"), out, "--to", program]
    ended = run_limited(limit, *command)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "File too large" in last and "Traceback" not in ended.stderr
    assert not list(out.glob("*.tmp")) and not (out / "labels.csv").exists()
    assert not list(out.glob("*.safetensors"))


def test_the_table_of_exit_statuses_has_all_that_a_program_may_end_with():
    table = (ROOT / "docs/running.md").read_text().split("## Exit statuses")[1].split("\n## ")[0]
    listed = {int(status) for status in re.findall(r"^\| (\d+)", table, re.MULTILINE)}
    own = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert own | {0, 1, 128 + signal.SIGTERM} <= listed


PROGRAMS = sorted(path for folder in ("vidssl", "data_prep", "tools") for path in ROOT.glob(f"{folder}/*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_every_program_ends_through_run_cli(path):
    text = path.read_text()
    if "__name__ ==" in text and path.stem != "check_architecture":
        assert re.search(r"run_cli\(main", text), f"{path.name}: its errors are not one line"


@pytest.mark.parametrize("encoding, printed", [("utf-8", b"caf\xe9\n"), ("ascii", b"caf\\udce9\n")])
def test_stdout_takes_names_that_are_not_utf_8(encoding, printed, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "argv", ["program"])
    run_cli(lambda _: print("caf\udce9"))
    assert raw.getvalue() == printed
