"""Child processes that decode files: a file that hangs or crashes its process is rejected, nothing else."""

import errno
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from data_prep.filters import Rejected
from vidssl.core.errors import DecodeError, UserError
from vidssl.core.progress import track
from vidssl.data.isolation import Failure, Reporter, SandboxPool

# Of the machine and not of the file, which is not rejected for them
MACHINE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)
# By which a job may grow its process: 8 GiB, the largest file that is decoded, and 4 GiB, the most frames of
# one request (see data/decoding/base.py).
MEMORY_BYTES = 12 << 30
REASONS = {"hang": "timeout", "crash": "decoder_crash", "memory": "too_large"}  # Failure -> Rejected


class WorkerPool:
    """A SandboxPool whose failures are `Rejected`.

    work: module-level function or partial of one, work(reporter, *job) -> result. A DecodeError, OSError or
        MemoryError in it rejects the file.
    timeout_s: seconds without progress. memory_bytes: by which a job may grow its process.
    """

    def __init__(self, work: Callable[..., Any], timeout_s: float, memory_bytes: int = MEMORY_BYTES):
        self._pool = SandboxPool(partial(reject_on_error, work), timeout_s, memory_bytes=memory_bytes)

    def run(self, *job: Any) -> Any:
        """Returns the result of the job, or its last report before it failed, or Rejected."""
        result = self._pool.run(*job)
        return rejected_or_partial(result) if isinstance(result, Failure) else result

    def map(self, jobs: list[tuple], workers: int, title: str, unit: str) -> list[Any]:
        """Runs the jobs in `workers` processes, and shows how far they are. Returns the results in order."""
        results = self._pool.map(jobs, workers)
        return [
            rejected_or_partial(r) if isinstance(r, Failure) else r
            for r in track(results, title, unit, len(jobs))
        ]

    def close(self) -> None:
        self._pool.close()


def rejected_or_partial(failure: Failure) -> Any:
    if failure.partial is not None:
        return failure.partial
    return Rejected(REASONS[failure.reason], failure.detail)


def reject_on_error(work: Callable[..., Any], report: Reporter, *job: Any) -> Any:
    """Runs a job in the child. Returns its result, or Rejected if the file cannot be read or decoded."""
    try:
        return work(report, *job)
    except DecodeError as e:
        return Rejected(e.reason, str(e).removeprefix(e.reason).removeprefix(": "))
    except OSError as e:
        if e.errno in MACHINE_ERRORS:
            raise UserError(f"{e.filename or tempfile.gettempdir()}: {e.strerror or e}") from e
        return Rejected("unreadable", e.strerror or "")
    except MemoryError:
        return Rejected("too_large", "out of memory")
