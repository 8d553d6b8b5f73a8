"""The first process decides for all, its errors reach all, and SIGTERM ends an evaluation at any time."""

import errno
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vidssl import dense, probe
from vidssl.config import load_config
from vidssl.core.errors import Preempted, UserError
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probing import probe_fingerprint
from vidssl.evaluation.processes import Processes
from vidssl.pretrained.load import LoadedEncoder
from vidssl.training.peers import claim_for_all

ROOT = Path(__file__).parents[3]
FIRST, SECOND = (Processes(rank, 2) for rank in range(2))


@pytest.fixture
def broadcast(monkeypatch) -> list:
    """What the first process has sent; the second one receives it."""
    sent: list = []

    def exchange(values: list, device: torch.device) -> None:
        if sent:
            values[:] = sent
        sent[:] = values

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", exchange)
    return sent


def test_the_first_process_decides_for_all(broadcast):
    assert FIRST.run_on_main(lambda: "disk") == "disk"
    assert SECOND.run_on_main(lambda: pytest.fail("the first one decides")) == "disk"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("holder"), "holder"),
        (OSError(errno.EROFS, "Read-only file system", "out"), "out.*Read-only file system"),
        (OSError(errno.ENOLCK, "No locks available"), "No locks available"),
    ],
)
def test_no_process_waits_for_a_first_one_that_cannot_claim_the_folder(
    error, line, broadcast, tmp_path, monkeypatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("vidssl.training.peers.claim_folder", fail)
    for processes in (FIRST, SECOND):
        with pytest.raises(UserError, match=line), claim_for_all(tmp_path, "probe", processes):
            pass


@pytest.mark.parametrize(
    ("program", "loading", "arguments"),
    [
        (probe, "open_probe_splits", ["configs/probe/knn.yaml", "data.train=x"]),
        (dense, "read_sequences", ["configs/dense/propagation.yaml"]),
    ],
)
def test_sigterm_while_an_evaluation_loads_asks_for_a_requeue(
    program, loading, arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(program, loading, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    path, *more = arguments
    try:
        with pytest.raises(Preempted, match="SIGTERM"):
            program.main([str(ROOT / path), "encoder=x", "data.test=x", f"out={tmp_path / 'out'}", *more])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_unfinished_probe_goes_on_if_its_rows_would_be_the_same():
    def fingerprint(*more: str) -> str:
        path = str(ROOT / "configs/probe/knn.yaml")
        cfg = load_config([path, "encoder=x", "data.train=x", "data.test=x", "out=x", *more], ProbeConfig)
        loaded = LoadedEncoder(torch.nn.Identity(), {"model": {}, "pixels": {}})
        return probe_fingerprint(cfg, SimpleNamespace(splits={}), loaded, "fp32")

    assert fingerprint("out=y") == fingerprint() != fingerprint("probe.k=3")
