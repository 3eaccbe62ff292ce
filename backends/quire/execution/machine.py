"""What this process may use of the machine: cores and memory, under the limits of its container.

Linux only. Limits of control groups of both versions count, those of enclosing groups too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Cores that this process may run on at the same time: its affinity, less what a CPU quota forbids."""
    cores = len(os.sched_getaffinity(0))
    for group in _groups("cpu"):
        quota = _cpu_quota(group)
        if quota is not None:
            cores = min(cores, math.ceil(quota))
    return max(1, cores)


def available_memory_bytes() -> int:
    """Bytes that can be allocated without swapping or passing the limit of a control group."""
    available = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    for group in _groups("memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _number(group / limit_file), _number(group / usage_file)
            if limit is not None and usage is not None:
                # Files in the page cache count as usage, but make room when memory is needed.
                reclaimable = _field(group / "memory.stat", "inactive_file")
                available = min(available, limit - usage + reclaimable)
    return max(0, available)


def _groups(controller: str) -> Iterator[Path]:
    """Folders of the groups that this process is in as far as a controller goes, innermost first."""
    for line in _own_groups():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controller if controllers else CGROUP_ROOT
        group = root / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _own_groups() -> list[str]:
    """What the kernel says about this process: lines of `hierarchy:controllers:path`."""
    try:
        return Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []


def _cpu_quota(group: Path) -> float | None:
    """Cores' worth of time that a group may use, or None if that is not limited."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    quota_us, period_us = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and quota_us > 0 and period_us else None


def _number(path: Path) -> int | None:
    """The number in a file, or None where there is no such file or no limit."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _field(path: Path, name: str) -> int:
    """The number after a name in a file of such lines, 0 if it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
