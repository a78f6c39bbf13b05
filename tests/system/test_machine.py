"""Cores and free memory."""

from __future__ import annotations

import os
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


def test_a_container_limits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/sys/fs/cgroup/memory.max": "1000000\n",
        "/sys/fs/cgroup/memory.current": "700000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 200000\n",
    }
    real = Path.read_text

    def read_text(self: Path, *args: object) -> str:
        return files.get(str(self)) or real(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert available_bytes() == 500_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_bytes() > 500_000
