"""Errors that the user can fix: one line, no traceback, exit status 2."""

import sys
from collections.abc import Callable

from vidssl.core.log import configure_logging, logger

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: schedulers start the same command again


class UserError(Exception):
    """An error in the input. Its message names what is wrong, where, and the correction, in one line."""


class DecodeError(Exception):
    """A file cannot be decoded. `reason` is one of a few fixed words, which are counted and logged."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Preempted(Exception):
    """The process ends early, with its state saved; the same command continues it."""


def run_cli(main: Callable[[list[str]], None], about: str | None = None) -> None:
    """Runs main(argv). UserError: one line on stderr and exit status 2; Preempted: exit status EXIT_REQUEUE.

    about: printed for --help.
    """
    if about and {"-h", "--help"} & set(sys.argv[1:]):
        print(about)
        return
    configure_logging()
    try:
        main(sys.argv[1:])
    except UserError as e:
        # Raised in a loader worker, the message ends with the worker's traceback.
        last = str(e).strip().splitlines()[-1]
        print(f"error: {last.removeprefix('vidssl.core.errors.UserError: ')}", file=sys.stderr)
        sys.exit(2)
    except Preempted as e:
        logger.info(str(e))
        sys.exit(EXIT_REQUEUE)
    except KeyboardInterrupt:
        sys.exit(130)
