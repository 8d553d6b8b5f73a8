"""How a program ends: exit statuses, and errors that are for the user: one line, no traceback."""

import codecs
import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vidssl.core.log import configure_logging

QUIET = "--quiet"  # warnings, errors and the last line alone
EXIT_USER_ERROR = 2  # somebody must mend something: the same command would fail again
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: schedulers start the same command again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count it
EXIT_TERMINATED = 143  # 128 + SIGTERM
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader of the output has gone, as in `... | head`
# Environment variable: the file into which a process of several writes why it ends, so that who started them
# prints it once
ERROR_FILE = "VIDSSL_ERROR_FILE"
# The disk or its rights, not a fault of the program
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENFILE,
}


class UserError(Exception):
    """An error in the input. Its message names what is wrong, where, and the correction, in one line."""


class DecodeError(Exception):
    """A file cannot be decoded. `reason` is one of a few fixed words, which are counted and logged."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Preempted(BaseException):
    """The process ends early, with its state saved; the same command continues it.

    Raised by signal handlers, too, so in the middle of libraries: no Exception, which these catch."""


class Terminated(BaseException):
    """SIGTERM, in a program that has no state to save."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved. Its message says what was kept."""


def disk_error_line(error: OSError) -> str | None:
    """One line about an error of the disk (full, read-only, no rights, ...); None for any other error."""
    number = error.errno
    if number is None:  # raised again for a loader worker, or by a library of another language, as text
        found = re.findall(r"(?:\[Errno |os error )(\d+)", str(error))
        number = int(found[-1]) if found else None
    if number not in DISK_ERRORS:
        return None
    quoted = re.findall(r"\[Errno \d+\][^\n]*: '([^\n]*)'", str(error))
    name = error.filename or (quoted[-1] if quoted else None)
    where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes)) else ""
    advice = {
        errno.ENOSPC: "free some space and start the same command again",
        errno.EDQUOT: "free some space and start the same command again",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.EROFS: "choose another place",
    }
    correction = f"; {advice[number]}" if number in advice else ""
    return f"{where}{os.strerror(number)}{correction}"


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line has -h or --help."""
    return bool({"-h", "--help"} & set(argv))


def print_last_line(line: str) -> None:
    """Prints why a program ends on stderr, or leaves that to who has started this process."""
    try:
        Path(os.environ[ERROR_FILE]).write_text(line, errors="backslashreplace")  # as stderr does
    except (KeyError, OSError):
        print(line, file=sys.stderr)


def let_stdout_take_any_name() -> None:
    """Lets stdout take names of files that are not UTF-8, and what its encoding does not have."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        is_utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf8 else "backslashreplace")


@contextlib.contextmanager
def raise_at_sigterm(error: BaseException) -> Iterator[None]:
    """Context in which SIGTERM raises `error`, so that temporary files are removed and child processes end.
    Launchers repeat the signal: only the first one counts. Forks of this process end as if this were not."""
    owner = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_IGN)
        raise error

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, previous)


def is_sigterm_free() -> bool:
    """Whether SIGTERM ends this process at once, and this thread may change that."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def run_cli(main: Callable[[list[str]], Any], about: str | None = None) -> None:
    """Runs main(argv) and ends the process with the exit status of its outcome.

    UserError and errors of the disk: one line on stderr, EXIT_USER_ERROR. Preempted: EXIT_REQUEUE. Ctrl-C:
    EXIT_INTERRUPTED. SIGTERM, where main does not handle it: EXIT_TERMINATED. Any other exception, in any
    thread, is a fault of the program: a traceback and 1.
    about: printed for --help. --quiet, which every program has, is no part of argv.
    """
    argv = [word for word in sys.argv[1:] if word != QUIET]
    if about and asks_for_help(argv):
        print(about)
        return
    configure_logging(quiet=QUIET in sys.argv[1:])
    let_stdout_take_any_name()
    failed_threads: list[str] = []
    report = threading.excepthook

    def record(failure: threading.ExceptHookArgs) -> None:
        failed_threads.append(failure.thread.name if failure.thread else "a thread")
        report(failure)

    threading.excepthook = record
    try:
        with raise_at_sigterm(Terminated()) if is_sigterm_free() else contextlib.nullcontext():
            main(argv)
            sys.stdout.flush()
        if failed_threads:
            print(f"error: {failed_threads[0]} has failed: its traceback is above", file=sys.stderr)
            sys.exit(1)
    except UserError as e:
        # Raised in a loader worker, the message ends with the worker's traceback.
        last = str(e).strip().splitlines()[-1]
        print_last_line(f"error: {last.removeprefix('vidssl.core.errors.UserError: ')}")
        sys.exit(EXIT_USER_ERROR)
    except Preempted as e:
        print_last_line(f"warning: {e}")
        sys.exit(EXIT_REQUEUE)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except OSError as e:
        line = disk_error_line(e)
        if line is None:
            raise
        print_last_line(f"error: {line}")
        sys.exit(EXIT_USER_ERROR)
    except Terminated:
        print_last_line("terminated")
        sys.exit(EXIT_TERMINATED)
    except KeyboardInterrupt as e:
        print_last_line(str(e) or "interrupted")
        sys.exit(EXIT_INTERRUPTED)
    finally:
        threading.excepthook = report
