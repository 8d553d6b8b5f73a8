"""Which threads run in this process when it forks."""

import contextlib
import os
import threading
from collections.abc import Iterator

records: list[list[str]] = []
before_the_test: set[threading.Thread] = set()


def _record() -> None:
    records.append([t.name for t in threading.enumerate() if t not in before_the_test])


# A hook cannot be removed
os.register_at_fork(before=_record)


@contextlib.contextmanager
def threads_at_forks() -> Iterator[list[list[str]]]:
    """Yields a list that gets the names of the threads that were started in this context, at each fork."""
    before_the_test.update(threading.enumerate())
    records.clear()
    yield records
