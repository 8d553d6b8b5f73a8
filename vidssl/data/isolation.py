"""Runs decoders in a child process, so that a hang, a crash or runaway memory costs one job and nothing else.

`Sandbox` owns one child process and supervises it: a job that makes no progress for too long, kills the
process or grows it too much returns a `Failure`, and the next job gets a fresh process. `SandboxPool` lets
several threads use sandboxes. The child answers jobs one by one over a pipe with (kind, value) messages, the
last of which is the result.

A child is started in one of two ways; all else is shared.

- "fork" (loader workers): the child inherits the data set, an index of up to 10^8 samples, without pickling
  it, and the arrays of a result come back through shared memory, since clips of several MB would wait in a
  pipe.
- "spawn" (data preparation): the jobs are given out by threads, and a fork of a process with threads may
  inherit a lock that nobody releases. Jobs and results are small and travel through the pipe.

Imports neither torch nor a decoder: a spawned child that only re-encodes does without them.
"""

import contextlib
import ctypes
import faulthandler
import math
import mmap
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, Pipe
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vidssl.core.errors import UserError

POLL_S = 0.1  # seconds between two checks of a busy child
START_TIMEOUT_S = 600.0  # seconds until a child must have imported its modules
# seconds that a child may take to exit after it closed its pipe (it may write a core dump)
EXIT_TIMEOUT_S = 10.0
SHARED_BYTES = 256 << 20  # bytes of shared memory per forked child; untouched pages cost nothing
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent ends

Kind = Literal["ready", "progress", "partial", "result", "out_of_memory", "user_error"]  # of a message


class Failure(NamedTuple):
    """A job that ended without a result. partial: the last value that it reported, or None."""

    reason: Literal["hang", "crash", "memory"]
    detail: str
    partial: Any = None


class Reporter:
    """Sends messages of a job to the parent before its result."""

    def __init__(self, conn: Connection):
        self._conn = conn

    def progress(self) -> None:
        """Restarts the deadline of the job."""
        self._conn.send(("progress", None))

    def partial(self, value: Any) -> None:
        """Keeps `value` as the result if the job fails later. Does not restart the deadline."""
        self._conn.send(("partial", value))


Work = Callable[..., Any]  # work(reporter, *job) -> result


class Sandbox:
    """Runs `work(reporter, *job)` in a child process, one job at a time. The first job starts the process.

    work: with "spawn" it is pickled. Its MemoryError becomes a Failure, its UserError is raised in the
        parent; any other exception ends the child with a traceback, which is a Failure by "crash".
    timeout_s: seconds that a job may take without progress.
    timed_from: "job": the deadline counts from the start of the job; "progress": from its first progress
        (reading remote data has timeouts of its own).
    memory_bytes: bytes by which a job may grow the resident memory of the child; None: no limit. A child that
        has grown by more since its start is replaced between two jobs.
    """

    def __init__(
        self,
        work: Work,
        timeout_s: float,
        *,
        start_method: Literal["fork", "spawn"],
        timed_from: Literal["job", "progress"] = "job",
        memory_bytes: int | None = None,
    ):
        self.work = work
        self.timeout_s = timeout_s
        self.start_method = start_method
        self.timed_from = timed_from
        self.memory_bytes = memory_bytes
        self._child: Child | None = None
        self._is_ended = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    @property
    def pid(self) -> int | None:
        """Process id of the child, if there is one."""
        return None if self._child is None else self._child.process.pid

    def start(self) -> None:
        """Starts the child before its first job: a process that forks should not have threads yet."""
        self._ready_child()

    def run(self, *job: Any, extra_bytes: int = 0) -> Any:
        """Returns the result of the job, or a Failure. Raises the job's UserError. extra_bytes: by which this
        job may grow the child beyond memory_bytes."""
        result = self._supervise(self._ready_child(), job, extra_bytes)
        if isinstance(result, Failure):
            self.close()
        return result

    def close(self) -> None:
        """Kills the child."""
        child, self._child = self._child, None
        if child is not None:
            child.end()

    def end(self) -> None:
        """Kills the child, also while another thread waits for it, and lets no further one start."""
        self._is_ended = True
        self.close()

    def _supervise(self, child: "Child", job: tuple, extra_bytes: int) -> Any:
        """Sends a job to the child and waits. Returns the result or a Failure; raises the job's UserError."""
        pid = child.process.pid
        growth = math.inf if self.memory_bytes is None else self.memory_bytes + extra_bytes
        limit = rss_bytes(pid) + growth
        deadline = math.inf if self.timed_from == "progress" else time.monotonic() + self.timeout_s
        memory_check = time.monotonic() + POLL_S
        partial = None
        try:
            child.conn.send(job)
            while True:
                if child.conn.poll(POLL_S):
                    kind, value = child.conn.recv()
                    if kind == "result":
                        return copy_arrays(value, child.memory)
                    if kind == "out_of_memory":
                        return Failure("memory", "out of memory", partial)
                    if kind == "user_error":
                        raise UserError(value)
                    if kind == "progress":
                        deadline = time.monotonic() + self.timeout_s
                    elif kind == "partial":
                        partial = value
                elif time.monotonic() > deadline:
                    return Failure("hang", f"no answer in {self.timeout_s:g} s", partial)
                if limit < math.inf and time.monotonic() > memory_check:
                    memory_check = time.monotonic() + POLL_S
                    if rss_bytes(pid) > limit:
                        return Failure("memory", f"grew by over {growth} bytes", partial)
        except (EOFError, OSError):
            child.process.join(EXIT_TIMEOUT_S)
            detail = f"the decoder's process ended with {child.process.exitcode}"
            return Failure("crash", detail, partial)

    def _ready_child(self) -> "Child":
        """Returns an idle child: the present one if it is alive, this process's own and not too large."""
        child = self._child
        if child is not None and child.owner == os.getpid():  # else a fork inherited the child of its parent
            if not child.conn.poll() and not self._has_grown(child):  # readable while idle: it has died
                return child
            self.close()
        self._child = child = start_child(self.work, self.start_method)
        try:
            if self._is_ended:
                raise UserError("decoding has been ended")
            child.wait_until_ready()
        except UserError:
            self.close()
            raise
        return child

    def _has_grown(self, child: "Child") -> bool:
        if self.memory_bytes is None:
            return False
        return rss_bytes(child.process.pid) - child.rss_at_start > self.memory_bytes


class SandboxPool:
    """Spawned sandboxes for jobs from several threads. `settings`: those of `Sandbox`."""

    def __init__(self, work: Work, timeout_s: float, **settings: Any):
        self._make = lambda: Sandbox(work, timeout_s, start_method="spawn", **settings)
        self._sandboxes: list[Sandbox] = []
        self._idle: queue.LifoQueue[Sandbox] = queue.LifoQueue()
        self._is_closed = False

    def run(self, *job: Any) -> Any:
        """Runs a job in an idle sandbox, or in a new one. Returns its result or a Failure."""
        try:
            sandbox = self._idle.get_nowait()
        except queue.Empty:
            sandbox = self._make()
            self._sandboxes.append(sandbox)
        if self._is_closed:
            sandbox.end()
        try:
            return sandbox.run(*job)
        finally:
            self._idle.put(sandbox)

    def map(self, jobs: Iterable[tuple], workers: int) -> Iterator[Any]:
        """Runs the jobs in `workers` processes; yields the results in the order of the jobs."""
        with ThreadPoolExecutor(workers) as threads:
            try:
                yield from threads.map(lambda job: self.run(*job), jobs)
            except BaseException:
                self.close()  # the threads, for which this waits, wait for the children
                raise

    def close(self) -> None:
        """Kills all children, also those that work for another thread. No job runs afterwards."""
        self._is_closed = True
        for sandbox in list(self._sandboxes):
            sandbox.end()


class Child:
    """A started child process.

    owner: id of the process that started it; a fork of that process must not use it.
    rss_at_start: its resident bytes when it was ready.
    """

    def __init__(self, process: "BaseProcess | ForkedProcess", conn: Connection, memory: mmap.mmap | None):
        self.process = process
        self.conn = conn
        self.memory = memory
        self.owner = os.getpid()
        self.rss_at_start = 0
        # Runs once: when called, when this object is collected, or when this process (no fork of it) exits.
        self.end = Finalize(self, end_process, (process, conn), exitpriority=10)

    def wait_until_ready(self) -> None:
        """Waits for the imports of a spawned child. They do not count as time of its first job."""
        try:
            ready = self.conn.poll(START_TIMEOUT_S) and self.conn.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.end()
            raise UserError("a process for decoding does not start: its own message is above")
        self.rss_at_start = rss_bytes(self.process.pid)


class ForkedProcess:
    """A fork, for daemons such as loader workers, to which multiprocessing.Process refuses children."""

    def __init__(self, target: Callable[[], None]):
        self.exitcode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                target()
                status = 0
            finally:  # nothing of the parent may run here: no exit handlers, no flushing of its files
                if status:
                    traceback.print_exc()
                os._exit(status)

    def kill(self) -> None:
        if self.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def join(self, timeout_s: float = math.inf) -> None:
        """Waits for the end of the process, at most timeout_s seconds, and sets `exitcode`."""
        give_up = time.monotonic() + timeout_s
        while self.exitcode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # somebody else has collected it
                return
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > give_up:
                return
            else:
                time.sleep(0.002)


_spawning = threading.Lock()  # multiprocessing's list of children is not made for several threads


def start_child(work: Work, start_method: Literal["fork", "spawn"]) -> Child:
    """Starts a process that serves jobs of `work`."""
    if start_method == "fork":
        ours, theirs = Pipe()
        memory = mmap.mmap(-1, SHARED_BYTES)
        parent = os.getpid()

        def run() -> None:
            ours.close()
            detach_from_parent(parent)
            serve(work, theirs, memory)

        forked = ForkedProcess(run)
        theirs.close()
        return Child(forked, ours, memory)
    context = multiprocessing.get_context("spawn")
    with _spawning:
        ours, theirs = context.Pipe()
        spawned = context.Process(target=serve_spawned, args=(work, theirs), daemon=True)
        resource_tracker.ensure_running()  # when it starts, it unblocks SIGINT
        # Ctrl-C goes to all processes of a terminal: `serve` ignores it, but the imports before take seconds
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            spawned.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
    return Child(spawned, ours, None)


def end_process(process: BaseProcess | ForkedProcess, conn: Connection) -> None:
    """Kills a child and collects it."""
    process.kill()
    process.join()
    conn.close()


def detach_from_parent(parent: int) -> None:
    """Makes a fresh fork end with its parent and drop the parent's signal handlers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(0)
    faulthandler.disable()
    for name in ("SIGSEGV", "SIGBUS", "SIGFPE", "SIGABRT", "SIGTERM", "SIGCHLD"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


def serve_spawned(work: Work, conn: Connection) -> None:
    # A stuck job does not notice that the parent is gone, and PR_SET_PDEATHSIG would follow the thread of the
    # parent that started this process
    threading.Thread(target=end_after_parent, daemon=True).start()
    serve(work, conn, None)


def end_after_parent() -> None:
    """Ends this process, whatever its other threads do, when the one that spawned it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def serve(work: Work, conn: Connection, memory: mmap.mmap | None) -> None:
    """The loop of the child: answers jobs until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    reporter = Reporter(conn)
    conn.send(("ready", None))
    while True:
        try:
            job = conn.recv()
        except (EOFError, OSError):
            return
        try:
            message: tuple[Kind, Any] = "result", share_arrays(work(reporter, *job), memory)
        except MemoryError:
            message = "out_of_memory", None
        except UserError as e:
            message = "user_error", str(e)
        conn.send(message)


class SharedArray(NamedTuple):
    """Replaces an array or tensor in a result while its content is in shared memory.

    start: its first byte there.
    """

    start: int
    shape: tuple[int, ...]
    dtype: str
    is_tensor: bool


def share_arrays(result: Any, memory: mmap.mmap | None) -> Any:
    """Moves the arrays and tensors of a result to `memory`, one after the other, as far as they fit."""
    if memory is None:
        return result
    torch = sys.modules.get("torch")  # not imported: then there are no tensors
    used = 0

    def share(value: Any) -> Any:
        nonlocal used
        is_tensor = torch is not None and isinstance(value, torch.Tensor)
        if not is_tensor and not isinstance(value, np.ndarray):
            return value
        array = value.numpy() if is_tensor else value
        if not array.size or used + array.nbytes > len(memory):
            return value
        shared = SharedArray(used, array.shape, array.dtype.str, is_tensor)
        shared_view(shared, memory)[...] = array
        used += array.nbytes
        return shared

    return map_leaves(result, share)


def copy_arrays(result: Any, memory: mmap.mmap | None) -> Any:
    """Reverts `share_arrays`. Copies, since the child writes its next result into the same memory."""
    if memory is None:
        return result

    def copy(value: Any) -> Any:
        if not isinstance(value, SharedArray):
            return value
        array = shared_view(value, memory).copy()
        return sys.modules["torch"].from_numpy(array) if value.is_tensor else array

    return map_leaves(result, copy)


def shared_view(array: SharedArray, memory: mmap.mmap) -> np.ndarray:
    count = math.prod(array.shape)
    return np.frombuffer(memory, np.dtype(array.dtype), count, array.start).reshape(array.shape)


def map_leaves(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Converts the values in nested tuples (named ones too), lists and dicts."""
    if isinstance(value, tuple) and not isinstance(value, SharedArray):
        items = [map_leaves(v, convert) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_leaves(v, convert) for v in value]
    if isinstance(value, dict):
        return {k: map_leaves(v, convert) for k, v in value.items()}
    return convert(value)


def rss_bytes(pid: int | None) -> int:
    """Bytes of physical memory that a process holds; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
    except (OSError, IndexError):
        return 0
