"""Errors that are the user's to mend: one line, no traceback, exit status 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Says what is wrong, where, and what would be right, in one line."""


class DecodeError(Exception):
    """A file cannot be decoded. `reason` is a short stable word that is counted and logged."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def run_cli(main: Callable[[list[str]], None], about: str | None = None) -> None:
    """Run main(argv); a UserError becomes one line on stderr and exit status 2. about: printed for --help."""
    if about and {"-h", "--help"} & set(sys.argv[1:]):
        print(about)
        return
    try:
        main(sys.argv[1:])
    except UserError as e:
        last = (
            str(e).strip().splitlines()[-1]
        )  # raised in a loader worker, it comes with the worker's traceback
        print(f"error: {last.removeprefix('vidssl.core.errors.UserError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
