"""Messages of a running process: the logger "vidssl" of the standard library, one line each on stderr."""

import contextlib
import logging
import sys

from tqdm import tqdm

logger = logging.getLogger("vidssl")
RESULT = logging.INFO + 5  # level of the line that says what a program leaves


class Shown:
    """What the first process of a program shows: messages of this level and above."""

    level = logging.INFO


class StderrHandler(logging.Handler):
    """Writes lines on stderr, above a progress bar. A full disk behind stderr does not end a run."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError):
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def configure_logging(quiet: bool = False) -> None:
    """Sends messages of level INFO and above to stderr; quiet: only warnings, and a program's last line."""
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
    Shown.level = RESULT if quiet else logging.INFO
    logger.setLevel(Shown.level)
    logger.propagate = False


def set_log_level(is_main: bool) -> None:
    """Of several processes the first one logs everything, the others only warnings."""
    logger.setLevel(Shown.level if is_main else logging.WARNING)


def show(text: str) -> None:
    """Prints a line on stdout where messages of level INFO are shown."""
    if logger.isEnabledFor(logging.INFO):
        print(text, flush=True)
