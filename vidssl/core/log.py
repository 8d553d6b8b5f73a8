"""Messages of a running process: the logger "vidssl" of the standard library, one line each on stderr."""

import contextlib
import logging
import sys

from tqdm import tqdm

logger = logging.getLogger("vidssl")


class StderrHandler(logging.Handler):
    """Writes lines on stderr, above a progress bar. A full disk behind stderr does not end a run."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError):
            tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def configure_logging() -> None:
    """Sends messages of level INFO and above to stderr."""
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False


def set_log_level(is_main: bool) -> None:
    """Of several processes the first one logs everything, the others only warnings."""
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
