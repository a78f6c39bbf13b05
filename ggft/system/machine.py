"""What the machine has: physical cores and free memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
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
    """Return the memory that this process may take without swapping, and without being killed."""
    free = _macos_available() if sys.platform == "darwin" else _linux_available()
    return max(0, min([free, *_cgroups_available(), *_limits_available()]))


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


# Names of a group's limit, of what is used, and of the page cache among it, which does not count.
_CGROUP_V2 = ("memory.max", "memory.current", "inactive_file")
_CGROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroups_available() -> Iterator[int]:
    """Yield what the limits of this process's groups leave, from its own one up the tree."""
    for folder, (limit_name, used_name, cache_name) in _cgroups():
        try:
            limit = int((folder / limit_name).read_text())
            used = int((folder / used_name).read_text())
            lines = (folder / "memory.stat").read_text().splitlines()
            cache = int(dict(line.split() for line in lines).get(cache_name, 0))
        except (OSError, ValueError):  # no limit, or no such group seen from inside a container
            continue
        yield limit - used + cache


def _cgroups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _CGROUP_V1) if controllers else (root, _CGROUP_V2)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for n in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:n]), names


def _limits_available() -> Iterator[int]:
    """Yield what ulimit -v and ulimit -d leave."""
    import resource

    try:
        counts = [int(n) for n in Path("/proc/self/statm").read_text().split()]
        sizes = [count * resource.getpagesize() for count in (counts[0], counts[5])]
    except (OSError, ValueError, IndexError):
        sizes = [peak_rss_bytes()] * 2
    for kind, used in zip((resource.RLIMIT_AS, resource.RLIMIT_DATA), sizes, strict=True):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - used


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
