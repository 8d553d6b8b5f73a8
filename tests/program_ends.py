"""What ends a program from outside, called in its process at a point that a test chooses."""

import errno
import os
import signal


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def disk_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
