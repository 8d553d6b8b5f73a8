"""How many CPUs a process may use."""

import os
from pathlib import Path


def available_cpus(root: str = "/") -> int:
    """Cores that this process may run on, within the quota of its container; at least 1. root: of the file
    system that is read."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _container_quota(Path(root))
    return cores if quota is None else max(1, min(cores, int(quota)))


def _container_quota(root: Path) -> float | None:
    """CPU seconds a second that the container gets: cgroup version 2, then version 1. None: no limit."""
    group = root / "sys/fs/cgroup"
    files = ([group / "cpu.max"], [group / f"cpu/cpu.cfs_{name}_us" for name in ("quota", "period")])
    for paths in files:
        try:
            numbers = " ".join(path.read_text() for path in paths).split()
        except OSError:
            continue
        # "max" or -1: no limit
        return int(numbers[0]) / int(numbers[1]) if all(n.isdecimal() for n in numbers) else None
    return None
