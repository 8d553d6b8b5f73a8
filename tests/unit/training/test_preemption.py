"""Signals, lost peers and the limit of requeues."""

import multiprocessing
import os
import signal
import socket
from datetime import timedelta

import pytest
import torch

from vidssl.core.errors import Preempted, UserError
from vidssl.core.launch import free_port
from vidssl.training.preemption import (
    PreemptionHandler,
    exit_on_lost_peer,
    exit_on_sigterm,
    is_lost_peer,
    limited_requeues,
)

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"


@pytest.mark.parametrize(
    "error, lost",
    [
        (torch.distributed.DistNetworkError("The client socket has timed out"), True),
        (torch.distributed.DistStoreError("wait timeout after 3000ms"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclRemoteError: a call failed"), True),
        (torch.distributed.DistBackendError("NCCL error: ncclInvalidUsage: same device twice"), False),
        (RuntimeError(GLOO + "pair.cc:547] Connection closed by peer [127.0.0.1]:51"), True),
        (RuntimeError(GLOO + "unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation"), True),
        (RuntimeError("Detected mismatch between collectives on ranks (backend gloo)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"), False),
    ],
)
def test_only_lost_connections_and_timeouts_are_requeued(error, lost):
    assert is_lost_peer(error) is lost


def join_alone(rank: int, port: int) -> None:
    """Joins a run of two processes, of which the other one does not come."""
    timeout = timedelta(seconds=1)
    where = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", where, rank=rank, world_size=2, timeout=timeout)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_come_is_a_lost_one(rank):
    with (
        pytest.raises(Preempted, match=r"is gone or does not answer \(.*[Tt]imed out"),
        exit_on_lost_peer(),
    ):
        join_alone(rank, int(free_port()))


def test_a_port_in_use_is_for_the_user():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"{port}.*in use.*; set MASTER_PORT"), exit_on_lost_peer():
            join_alone(0, port)


@pytest.fixture
def handlers_restored():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
@pytest.mark.parametrize("alone", [True, False])
def test_a_signal_ends_the_wait_for_data_of_a_process_that_is_alone(number, alone, handlers_restored):
    def loader():
        yield 0
        os.kill(os.getpid(), number)  # comes while the loop waits for item 1
        yield 1
        yield 2

    with PreemptionHandler() as preemption:
        got = []
        for item in preemption.until_requested(loader(), alone):
            got.append((item, preemption.requested))
    assert preemption.signal == number
    assert got == ([(0, False)] if alone else [(0, False), (1, True), (2, True)])


def test_a_signal_in_a_step_lets_the_step_end(handlers_restored):
    with PreemptionHandler() as preemption:
        for item in preemption.until_requested(iter(range(5)), alone=True):
            if item == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            last = item
    assert last == 2 and preemption.signal == signal.SIGTERM


def test_a_child_that_is_stuck_outlives_signals_and_not_the_run(handlers_restored):
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def get_stuck() -> None:
        started.set()
        signal.pause()

    with PreemptionHandler():
        child = context.Process(target=get_stuck, daemon=True)
        child.start()
        assert started.wait(60)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid, number)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def test_sigterm_before_the_loop_asks_for_a_requeue(handlers_restored):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM: saved steps stay"), exit_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    with exit_on_sigterm():
        pass
    assert signal.getsignal(signal.SIGTERM) in (before, signal.SIG_IGN)


def end_run(out, step: int, error: Exception) -> str:
    (out / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    try:
        with limited_requeues(out):
            raise error
    except (Preempted, UserError) as e:
        return type(e).__name__


def test_requeues_without_progress_are_bounded(tmp_path):
    assert [end_run(tmp_path, 4, Preempted("SIGTERM")) for _ in range(3)] == ["Preempted"] * 2 + ["UserError"]
    assert [end_run(tmp_path, s, Preempted("SIGTERM")) for s in (5, 6, 7, 8)] == ["Preempted"] * 4
    assert end_run(tmp_path, 8, UserError("bad data")) == "UserError"
    assert end_run(tmp_path, 8, Preempted("lost")) == "Preempted"
    assert end_run(tmp_path, 8, Preempted("lost")) == "UserError"


def test_an_unreadable_count_is_started_anew(tmp_path):
    (tmp_path / "requeues.json").write_text("{")
    assert end_run(tmp_path, 4, Preempted("SIGTERM")) == "Preempted"


def test_a_run_that_wrote_nothing_is_not_counted(tmp_path):
    with pytest.raises(Preempted), limited_requeues(tmp_path / "absent"):
        raise Preempted("SIGTERM")
