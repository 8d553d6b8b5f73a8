"""core/progress.py: a line that moves on a terminal, a line a minute elsewhere."""

import io
import sys

import pytest

from vidssl.core.log import set_log_level
from vidssl.core.progress import Progress, track


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def advance(progress, clock, seconds, **shown):
    clock.now += seconds
    progress.update(shown=shown)


def test_a_file_gets_a_line_a_minute_with_the_remaining_time(capsys):
    clock = Clock()
    with Progress("mine", 100, "steps", done=10, clock=clock) as progress:
        for i in range(24):  # 4 minutes
            advance(progress, clock, 10, loss=f"{i}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("mine: 16 of 100 steps, loss 5, 14:00 left, ends ")  # 84 steps of 10 s
    assert lines[3].startswith("mine: 34 of 100 steps, loss 23, 11:00 left, ends ")


def test_work_of_less_than_a_minute_leaves_nothing_in_a_file(capsys):
    assert list(track(range(5), "quick", "items")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_total_and_remaining_time(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("mine", 3, "steps") as progress:
        progress.bar.delay = 0.0
        progress.bar.mininterval = 0.0
        for _ in range(3):
            progress.update(shown={"loss": "0.5"})
    last = screen.getvalue().split("\r")[-1]
    assert last.startswith("mine 3/3 steps, loss=0.5 | ") and " left, ends " in last


@pytest.mark.parametrize("quiet, is_main", [(True, True), (False, False)])
def test_other_processes_and_quiet_work_show_nothing(quiet, is_main, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    set_log_level(is_main)
    clock = Clock()
    with Progress("mine", 3, "steps", quiet=quiet, clock=clock) as progress:
        assert progress.bar is None
        advance(progress, clock, 100)
    assert screen.getvalue() == ""
    set_log_level(True)


def test_a_full_disk_behind_stderr_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    for tty in (True, False):
        clock = Clock()
        monkeypatch.setattr(Full, "isatty", lambda self, tty=tty: tty)
        monkeypatch.setattr(sys, "stderr", Full())
        with Progress("mine", 2, "steps", clock=clock) as progress:
            advance(progress, clock, 100, loss="1")
            advance(progress, clock, 100)
        assert progress.done == 2
