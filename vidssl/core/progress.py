"""How far a long piece of work is: a line that moves on a terminal, a line a minute in a file or a pipe."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TypeVar

from tqdm import tqdm

from vidssl.core.log import logger

LINE_EVERY_S = 60.0
NOTHING: Mapping[str, str] = MappingProxyType({})
T = TypeVar("T")


class Progress:
    """Context of work on `total` units, of which `done` are done already.

    Processes that log nothing below a warning (all but the first of a run) show nothing, nor does quiet=True.
    A full disk behind stderr ends nothing. clock: replaces the time in tests, seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        done: int = 0,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.first = done
        self.clock = clock
        self.quiet = quiet or not logger.isEnabledFor(logging.INFO)
        self.start_s = self.line_s = clock()
        self.bar: tqdm | None = None
        if not self.quiet and sys.stderr.isatty():
            self.bar = tqdm(
                total=total,
                initial=done,
                desc=name,
                delay=0.1,
                mininterval=0.2,
                dynamic_ncols=True,
                bar_format="{desc} {n_fmt}/{total_fmt} "
                + unit
                + "{postfix} | {elapsed}, {remaining} left, ends {eta:%d %b %H:%M}",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1, shown: Mapping[str, str] = NOTHING) -> None:
        """Counts n more units. shown: names and values beside the count."""
        self.done += n
        if self.bar is not None:
            with contextlib.suppress(OSError):
                if shown:
                    self.bar.set_postfix(shown, refresh=False)
                self.bar.update(n)
        elif not self.quiet and self.clock() - self.line_s >= LINE_EVERY_S:
            self.line_s = self.clock()
            logger.info(self.line(shown))

    def line(self, shown: Mapping[str, str]) -> str:
        """What a file gets: count, values, remaining time."""
        parts = [f"{self.name}: {self.done} of {self.total} {self.unit}"]
        parts += [f"{name} {value}" for name, value in shown.items()]
        elapsed = self.line_s - self.start_s
        left = elapsed * (self.total - self.done) / max(self.done - self.first, 1)
        ends = datetime.now() + timedelta(seconds=left)
        parts.append(f"{tqdm.format_interval(left)} left, ends {ends:%d %b %H:%M}")
        return ", ".join(parts)

    def close(self) -> None:
        if self.bar is not None:
            with contextlib.suppress(OSError):
                self.bar.close()


def track(
    items: Iterable[T], name: str, unit: str, total: int | None = None, quiet: bool = False
) -> Iterator[T]:
    """Yields the items and shows the progress. total: their number, if they do not know it themselves."""
    if total is None:
        assert isinstance(items, Sized)
        total = len(items)
    with Progress(name, total, unit, quiet=quiet) as progress:
        for item in items:
            yield item
            progress.update()
