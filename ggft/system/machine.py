"""What the machine has: physical cores and free memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def physical_cores() -> int:
    """Return the physical cores that this process may use, at least 1.

    Two hyper-threads of a core share its vector units, so more threads than cores train no faster;
    and on Apple's processors a slow core would hold up the fast ones.
    """
    if sys.platform == "linux":
        cores = _linux_cores(os.sched_getaffinity(0))
    else:
        cores = _macos_cores() or os.cpu_count() or 1
    return max(1, cores)


def _linux_cores(cpus: set[int]) -> int:
    """Return the number of cores that have one of these processors."""
    cores = set()
    for cpu in cpus:
        try:
            topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
            siblings = (topology / "thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings)
    return len(cores)


def _macos_cores() -> int:
    """Return the number of performance cores, or of all on Intel; 0 where sysctl does not say."""
    import subprocess

    for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
        command = ["/usr/sbin/sysctl", "-n", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return int(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):
            continue
    return 0


def available_bytes() -> int:
    """Return the memory that a new process may take without swapping."""
    free = _macos_available() if sys.platform == "darwin" else _linux_available()
    limit = _cgroup_available()
    return free if limit is None else min(free, limit)


def _linux_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _macos_available() -> int:
    """Return free, inactive, speculative and purgeable memory, as vm_stat counts it."""
    import re
    import subprocess

    try:
        text = subprocess.run(
            ["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=5, check=True
        ).stdout
        page = re.search(r"page size of (\d+) bytes", text)
        counts = dict(re.findall(r"^Pages ([a-z ]+):\s+(\d+)\.", text, re.MULTILINE))
        pages = sum(int(counts.get(k, 0)) for k in ("free", "inactive", "speculative", "purgeable"))
        return pages * int(page[1]) if page else 0
    except (OSError, subprocess.SubprocessError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _cgroup_available() -> int | None:
    """Return what a container's limit leaves, None without a limit; page cache does not count."""
    for limit_name, used_name, stat_name in (
        ("memory.max", "memory.current", "memory.stat"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
        ),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            limit = int((root / limit_name).read_text())
            used = int((root / used_name).read_text())
            stat = dict(line.split() for line in (root / stat_name).read_text().splitlines())
        except (OSError, ValueError):
            continue
        cache = int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))
        return max(0, limit - used + cache)
    return None


def peak_rss_bytes() -> int:
    """Return the largest resident size of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """Return this machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def process_seconds() -> float:
    """Return the seconds since this process began, 0 where the system does not say."""
    import os

    try:
        with open("/proc/self/stat", encoding="ascii") as stat:
            started = int(stat.read().rsplit(")", 1)[1].split()[19])
        with open("/proc/uptime", encoding="ascii") as uptime:
            return float(uptime.read().split()[0]) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
