"""Runs a program and signals its process group at an exact event, so that no watcher races with it.

    python tests/signal_at.py SIGNAL EVENT COUNT PROGRAM ARGUMENTS ...

EVENT: "row", the program has written COUNT rows of log.jsonl; or the end of a path: the program opens it, or
renames a file to it, for the COUNT-th time. PROGRAM: a file (vidssl/train.py) or a module (data_prep.pack).
"""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path


def signalled(number: str, event: str, count: int, program: str, *arguments: str) -> int:
    """Exit status of a program whose process group gets the signal at that event."""
    call = [sys.executable, __file__, number, event, str(count), program, *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(call, cwd=root, stderr=subprocess.DEVNULL, start_new_session=True, timeout=600)
    return done.returncode


def signalling(number: signal.Signals, count: int):
    """Returns a function whose call number `count` signals the process group."""
    calls = 0

    def happened() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.killpg(0, number)

    return happened


def watch_rows(happened) -> None:
    from vidssl.training.metrics_log import JsonlWriter

    add = JsonlWriter.add

    def add_and_tell(self, *rows):
        reason = add(self, *rows)
        for _ in rows:
            happened()
        return reason

    JsonlWriter.add = add_and_tell


def watch_path(end: str, happened) -> None:
    """The audit event of a call precedes it: the signal comes with the file not yet there."""

    def hook(event: str, args: tuple) -> None:
        path = {"open": 0, "os.rename": 1}.get(event)
        if path is not None and str(args[path]).endswith(end):
            happened()

    sys.addaudithook(hook)


def main(number: str, event: str, count: str, program: str, *arguments: str) -> None:
    sys.path[0] = os.getcwd()
    happened = signalling(signal.Signals[number], int(count))
    if event == "row":
        watch_rows(happened)
    else:
        watch_path(event, happened)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
