"""--quiet leaves warnings, errors and the line that says what a program leaves."""

import logging
import sys

import pytest

from vidssl.core.errors import UserError, run_cli
from vidssl.core.log import configure_logging, logger, set_log_level, show
from vidssl.core.progress import Progress
from vidssl.training.run_summary import RunEnd


@pytest.fixture(autouse=True)
def loud_again():
    yield
    configure_logging()


def program(argv):
    assert argv == ["a=1"]
    set_log_level(is_main=True)
    logger.info("machine: one")
    show("attentive 50")
    with Progress("mine", 2, "steps", clock=iter((0, 100, 100, 100)).__next__) as progress:
        progress.update()
    logger.warning("careful")
    RunEnd("OUT").log("2 steps are done", "next: probe it")


def test_only_warnings_and_the_last_line_are_left(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "a=1", "--quiet"])
    run_cli(program)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["warning: careful", "OUT: 2 steps are done (00:00)"]
    monkeypatch.setattr(sys, "argv", ["x", "a=1"])
    run_cli(program)
    out, err = capsys.readouterr()
    assert out == "attentive 50\n"
    assert [line.split(",")[0] for line in err.splitlines()] == [
        "machine: one",
        "mine: 1 of 2 steps",
        "warning: careful",
        "OUT: 2 steps are done (00:00)",
        "next: probe it",
    ]


def test_errors_are_shown_and_other_processes_stay_silent(capsys, monkeypatch):
    def failing(argv):
        set_log_level(is_main=False)
        logger.log(logging.INFO + 5, "result")
        raise UserError("wrong")

    monkeypatch.setattr(sys, "argv", ["x", "--quiet"])
    with pytest.raises(SystemExit):
        run_cli(failing)
    assert capsys.readouterr().err == "error: wrong\n"
