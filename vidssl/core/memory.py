"""How much memory of this machine is free."""

from pathlib import Path

# Limit, use and statistics of a container's memory, and the name of its reclaimable file pages there: cgroup
# version 2, then version 1.
CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(root: str = "/") -> int | None:
    """Bytes that this process may still take, within the limit of its container; None if the system does not
    say. root: of the file system that is read."""
    free = [n for n in (_machine_free(Path(root)), _container_free(Path(root))) if n is not None]
    return min(free) if free else None


def _machine_free(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _container_free(root: Path) -> int | None:
    for folder, limit_name, use_name, reclaimable_name in CGROUPS:
        group = root / folder.lstrip("/")
        try:
            limit = (group / limit_name).read_text().strip()
            use = int((group / use_name).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if not limit.isdecimal():  # "max": no limit
            return None
        return max(0, int(limit) - use + int(statistics.get(reclaimable_name, 0)))
    return None
