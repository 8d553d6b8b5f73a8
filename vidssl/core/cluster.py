"""Jobs on a Ray cluster: the one at RAY_ADDRESS or on this machine, or a new one of this machine alone.

A job whose worker or node is lost is done again on another. What jobs read and write must be on a file system
that all nodes see under the same path.
"""

import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vidssl.core.errors import UserError, disk_error_line

MAX_RETRIES = 20  # of a job whose worker or node is lost
Job = TypeVar("Job")
Common = TypeVar("Common")
Result = TypeVar("Result")


class WorkerSize(NamedTuple):
    """What a job has for itself."""

    cpus: int = 1
    gpus: float = 0.0


def connect() -> Any:
    """Returns the module ray, connected to a cluster."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray: Ray is not installed; pip install 'vidssl[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False)
        except (ConnectionError, ValueError) as e:
            raise UserError(f"--engine ray: no cluster can be reached: {last_line(e)}") from e
        finally:
            # Ray's own handler would end the program with another status
            signal.signal(signal.SIGTERM, handler)
    return ray


def node_resources() -> list[dict[str, float]]:
    """What each living node has: CPU, GPU, ..."""
    return [node["Resources"] for node in connect().nodes() if node["Alive"]]


def room_for(size: WorkerSize, nodes: Iterable[dict[str, float]]) -> int:
    """Number of jobs that the nodes have room for at a time."""
    wanted = {name: share for name, share in (("CPU", size.cpus), ("GPU", size.gpus)) if share}
    return sum(min(int(node.get(name, 0) / share) for name, share in wanted.items()) for node in nodes)


def run_on_cluster(
    make_worker: Callable[[Common], Callable[[Job], Result]],
    common: Common,
    jobs: Iterable[Job],
    on_done: Callable[[Job, Result], object],
    name: Callable[[Job], str],
    size: WorkerSize = WorkerSize(),
    at_once: int | None = None,
) -> None:
    """Does the jobs in workers of the cluster, in any order.

    make_worker: a module-level function, called with `common` once in each worker; it returns the function
    that does a job. on_done: called with each job and its result. name: of a job, for errors. at_once: jobs
    at a time; None: what the cluster has room for, and as many that wait. Raises UserError for one in a
    worker, for an error of its disk, and for a job that has lost its worker too often."""
    ray = connect()
    from ray.exceptions import RayError, RayTaskError

    running: dict[Any, Job] = {}
    where = "the cluster"
    try:
        task = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_retries=MAX_RETRIES)(do_job)
        # In a list it stays a reference, which a worker resolves once
        shared = [ray.put(common)]
        waiting = iter(jobs)
        while True:
            slots = at_once or 2 * max(1, room_for(size, node_resources()))
            for job in islice(waiting, max(0, slots - len(running))):
                running[task.remote(make_worker, shared, job)] = job
            if not running:
                return
            for ready in ray.wait(list(running), timeout=10)[0]:
                job = running.pop(ready)
                where = name(job)
                on_done(job, ray.get(ready))
    except RayTaskError as e:
        line = user_error_line(e.cause)
        if line is None:
            raise
        raise UserError(f"{where}: {line} (call again: what is finished stays)") from e
    except SystemError as e:
        # So Ray's compiled code passes on what a handler of signals raises
        raise e.__cause__ or e from None
    except (RayError, ConnectionError) as e:
        raise UserError(f"{where}: {last_line(e)} (call again: what is finished stays)") from e
    finally:
        for ref in running:
            ray.cancel(ref)


def do_job(make_worker: Callable[[Any], Callable[[Any], Any]], shared: Sequence[Any], job: Any) -> Any:
    """Does a job in a worker of the cluster."""
    return _worker_of_process(make_worker, shared[0])(job)


@lru_cache(maxsize=1)
def _worker_of_process(make_worker: Callable[[Any], Callable[[Any], Any]], shared: Any) -> Any:
    import ray

    return make_worker(ray.get(shared))


def check_seen_by_node(paths: Iterable[Path]) -> None:
    """Raises UserError unless the node of this worker sees these files and folders."""
    for path in paths:
        if not path.exists():
            raise UserError(
                f"{path}: not there on node {socket.gethostname()}; all nodes must see it under this path"
            )


def user_error_line(error: BaseException | None) -> str | None:
    """One line about an error in a worker that somebody must mend; None for a fault of the program."""
    if isinstance(error, UserError):
        return last_line(error)
    return disk_error_line(error) if isinstance(error, OSError) else None


def last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
