"""Cores and free memory."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ggft.system.machine import available_bytes, physical_cores


@pytest.mark.parametrize(
    ("answers", "cores"),
    [({"hw.perflevel0.physicalcpu": "4\n"}, 4), ({"hw.physicalcpu": "2\n"}, 2), ({}, 7)],
)
def test_cores_of_a_mac(
    answers: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apple's fast cores, an Intel's physical ones, or what Python says."""

    def sysctl(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if command[-1] not in answers:
            raise subprocess.CalledProcessError(1, command)
        return subprocess.CompletedProcess(command, 0, answers[command[-1]])

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    monkeypatch.setattr(subprocess, "run", sysctl)
    assert physical_cores() == cores


def test_this_machine() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_bytes() <= total


# (what /proc/self/cgroup says, the folder with the limit, the names of v1 or v2)
GROUPS = [
    ("0::/\n", "", "memory.max memory.current inactive_file"),
    ("0::/a.slice/b.scope\n", "/a.slice/b.scope", "memory.max memory.current inactive_file"),
    ("0::/a.slice/b.scope\n", "/a.slice", "memory.max memory.current inactive_file"),
    ("5:cpu:/\n4:memory:/docker/1\n0::/\n", "/memory/docker/1",
     "memory.limit_in_bytes memory.usage_in_bytes total_inactive_file"),
    ("4:hugetlb,memory:/docker/1\n", "/memory",
     "memory.limit_in_bytes memory.usage_in_bytes total_inactive_file"),
]  # fmt: skip


@pytest.mark.parametrize(("own", "place", "names"), GROUPS)
def test_a_container_limits_memory(
    monkeypatch: pytest.MonkeyPatch, own: str, place: str, names: str
) -> None:
    limit, used, cache = names.split()
    folder = f"/sys/fs/cgroup{place}"
    files = {
        "/proc/self/cgroup": own,
        f"{folder}/{limit}": "1000000\n",
        f"{folder}/{used}": "700000\n",
        f"{folder}/memory.stat": f"anon 1\n{cache} 200000\n",
    }
    real = Path.read_text

    def read_text(self: Path, *args: object) -> str:
        return files.get(str(self)) or real(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_bytes() == 500_000
    files[f"{folder}/{limit}"] = "max\n"
    assert available_bytes() > 500_000


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_of_the_shell_counts(kind: int) -> None:
    before = resource.getrlimit(kind)
    free = available_bytes()
    resource.setrlimit(kind, (8 << 30, before[1]))
    try:
        assert available_bytes() < min(8 << 30, free + (1 << 20))
    finally:
        resource.setrlimit(kind, before)
