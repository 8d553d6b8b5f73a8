"""Decoding in a child process: a hang, a crash or a memory blow-up costs the sample that made it, and nothing else.

Each loader worker (without workers: the training process) forks a child that holds the data set and answers "position,
attempt" with a clip, or with why there is none. The clip comes back through shared memory. A child that is late, dies
or grows too much is killed and replaced by a fresh fork, and the attempt counts as one that could not be decoded: the
next one is what the position's rule says, as if the file had been found to be damaged.
"""

import contextlib
import ctypes
import faulthandler
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidssl.core.errors import UserError
from vidssl.data.dataset import DecodeFailure, Example, first_decodable

POLL_S = 0.1  # seconds between looks at the child
HEADER = (
    64  # bytes of the shared memory before the clip: when decoding began, f64 seconds; 0: still being read
)
SHM_BYTES = 256 << 20  # bytes of it; untouched pages cost nothing; a larger clip goes through the pipe
PR_SET_PDEATHSIG = 1  # prctl(2): a signal to this process when its parent ends


class Work(Protocol):
    """What is done in the child; a data set of positions. It calls `on_decode` when a sample's bytes have been read."""

    on_decode: Any

    def attempt(self, position: int, attempt: int) -> Example | DecodeFailure: ...

    def key(self, position: int, attempt: int) -> str: ...


class Child(NamedTuple):
    pid: int
    parent: int  # process that made it; a fork of that has no child of its own
    conn: Connection
    memory: mmap.mmap
    start: int  # its resident bytes at the start
    stop: Finalize  # ends and collects it, once: when asked to, with the data set, or with this process


class IsolatedDataset(Dataset[Example]):
    """`work`, position by position, in a child process."""

    def __init__(self, work: Work, deadline: float, memory: int, kept: int = 0):
        """deadline: seconds an attempt may decode (reading has time limits of its own). memory: bytes by which the
        child may grow in one attempt; it is also replaced, without blame, when it has grown by `memory` + `kept` (what
        it caches) since its start."""
        self.work, self.deadline, self.memory, self.kept = work, deadline, memory, kept
        self._child: Child | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __getitem__(self, position: int) -> Example:
        return first_decodable(position, self.attempt)

    def attempt(self, position: int, attempt: int) -> Example | DecodeFailure:
        child = self._ready()
        before = rss_bytes(child.pid)
        child.memory[:8] = bytes(8)
        try:
            child.conn.send((position, attempt))
            reason = self._wait(child, before)
            answer, shape = child.conn.recv() if reason is None else (None, None)
        except (EOFError, OSError):
            reason, answer, shape = "crash", None, None
        if answer is None:
            self.close()
            return DecodeFailure(self.work.key(position, attempt), str(reason))
        if isinstance(answer, str):
            raise UserError(answer)
        return (
            answer if shape is None else answer._replace(video=shared_clip_view(child.memory, shape).clone())
        )

    def _wait(self, child: Child, before: int) -> str | None:
        """Until it answers: None; or why it is not to be waited for."""
        while not child.conn.poll(POLL_S):
            (began,) = struct.unpack_from("d", child.memory)
            if began and time.monotonic() - began > self.deadline:
                return "hang"
            if rss_bytes(child.pid) - before > self.memory:
                return "memory"
        return None

    def _ready(self) -> Child:
        child = self._child
        if child is not None and child.parent == os.getpid():  # readable now: it ended after its last answer
            if not child.conn.poll() and rss_bytes(child.pid) - child.start <= self.memory + self.kept:
                return child
            self.close()
        self._child = self._fork()
        return self._child

    def _fork(self) -> Child:
        ours, theirs = Pipe()
        memory, parent = mmap.mmap(-1, SHM_BYTES), os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                ours.close()
                settle(parent)
                serve(self.work, theirs, memory)
                status = 0
            finally:  # nothing of the parent's may run here: no exit handlers, no flushing of its files
                if status:
                    traceback.print_exc()
                os._exit(status)
        theirs.close()
        return Child(
            pid, parent, ours, memory, rss_bytes(pid), Finalize(self, stop, (pid, parent), exitpriority=10)
        )

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.stop()
            self._child.conn.close()
            self._child = None


def stop(pid: int, parent: int) -> None:
    """Kill a child and collect it."""
    if parent == os.getpid():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def settle(parent: int) -> None:
    """What a fresh fork does first: end with its parent, drop the parent's handlers, use one thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)
    faulthandler.disable()
    for number in (
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGABRT,
        signal.SIGTERM,
        signal.SIGCHLD,
    ):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    torch.set_num_threads(1)


def serve(work: Work, conn: Connection, memory: mmap.mmap) -> None:
    """The child: answers until the parent is gone. What else is raised here ends it, with a traceback."""
    work.on_decode = lambda: struct.pack_into("d", memory, 0, time.monotonic())
    while True:
        try:
            position, attempt = conn.recv()
        except (EOFError, OSError):
            return
        answer: Example | DecodeFailure | str
        shape = None
        try:
            answer = work.attempt(position, attempt)
        except MemoryError:
            answer = DecodeFailure(work.key(position, attempt), "memory")
        except UserError as e:
            answer = str(e)
        if isinstance(answer, Example) and answer.video.numel() <= SHM_BYTES - HEADER:
            shape = answer.video.shape
            shared_clip_view(memory, shape).copy_(answer.video)
            answer = answer._replace(video=torch.empty(0))
        conn.send((answer, shape))


def shared_clip_view(memory: mmap.mmap, shape: torch.Size) -> Tensor:
    """The clip u8 in the shared memory."""
    return torch.frombuffer(memory, dtype=torch.uint8, count=shape.numel(), offset=HEADER).view(shape)


def rss_bytes(pid: int) -> int:
    """Bytes of physical memory that a process holds; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError):
        return 0
