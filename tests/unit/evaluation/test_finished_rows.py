"""Finished rows survive the end of a process at any moment."""

import errno
import os
import resource
import signal

import pytest

from vidssl.core.errors import UserError
from vidssl.evaluation.finished_rows import FILE, FinishedRows
from vidssl.evaluation.report import PredictionRow

A = ("x", "none", "", "")
B = ("x", "none", "0.5", "1")


def predictions(run: tuple[str, ...]) -> list[PredictionRow]:
    return [PredictionRow(*run, f"k{i}", "", "a", "b", "0.1 0.9") for i in range(2)]


def write(out) -> FinishedRows:
    finished = FinishedRows(out, "f")
    finished.add_scores("none", {"rankme": 1.5})
    for number, run in enumerate((A, B)):
        finished.add(run, {"value": number}, predictions(run))
    return finished


def contents(finished: FinishedRows) -> tuple:
    return finished.rows, finished.predictions, finished.scores


def test_rows_are_read_again(tmp_path):
    written = write(tmp_path / "out")
    assert contents(FinishedRows(tmp_path / "out", "f")) == contents(written)
    assert list(written.rows) == [A, B]
    written.remove()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_half_written_line_is_cut_off_by_the_next_row(cut, tmp_path):
    write(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-cut])
    found = FinishedRows(tmp_path, "f")
    assert list(found.rows) == [A]
    # Every process reads, and one writes.
    assert (tmp_path / FILE).read_bytes() == data[:-cut]
    found.add(B, {"value": 1}, predictions(B))
    assert (tmp_path / FILE).read_bytes() == data


@pytest.mark.parametrize("kept", [0, 10])
def test_a_half_written_fingerprint_is_no_row(kept, tmp_path):
    (tmp_path / FILE).write_bytes(b'{"fingerprint": "f"}\n'[:kept])
    assert contents(FinishedRows(tmp_path, "f")) == ({}, {}, {})
    assert contents(write(tmp_path)) == contents(FinishedRows(tmp_path, "f"))


def test_rows_of_another_probe_are_not_touched(tmp_path):
    write(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    with pytest.raises(UserError, match=r"finished.jsonl: holds 2 finished rows of another evaluation"):
        FinishedRows(tmp_path, "g")
    assert (tmp_path / FILE).read_bytes() == data


def test_a_file_that_grew_after_it_was_read_is_cut_to_what_was_read(tmp_path):
    write(tmp_path)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-5])
    found = FinishedRows(tmp_path, "f")
    with open(tmp_path / FILE, "ab") as f:
        f.write(b"more of a process that was killed")
    found.add(B, {"value": 1}, predictions(B))
    assert (tmp_path / FILE).read_bytes() == data


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_leaves_whole_lines(number, tmp_path, monkeypatch):
    finished = FinishedRows(tmp_path, "f")
    finished.add(A, {"value": 0}, predictions(A))
    data = (tmp_path / FILE).read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError):
            finished.add(B, {"value": 1}, predictions(B))
    assert (tmp_path / FILE).read_bytes() == data and list(finished.rows) == [A]
    finished.add(B, {"value": 1}, predictions(B))
    assert list(FinishedRows(tmp_path, "f").rows) == [A, B]


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="RLIMIT_FSIZE as on Linux")
def test_a_write_that_fails_again_at_the_close_leaves_whole_lines(tmp_path):
    """The buffer is written once more when the file is closed."""
    finished = FinishedRows(tmp_path, "f")
    finished.add(A, {"value": 0}, predictions(A))
    data = (tmp_path / FILE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) + 20, limits[1]))
        with pytest.raises(OSError):
            finished.add(B, {"value": 1}, predictions(B))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / FILE).read_bytes() == data
