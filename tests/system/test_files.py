"""Files on file systems that cannot do everything."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from ggft.system.errors import ResourceError
from ggft.system.files import atomic_output


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM])
def test_a_folder_that_cannot_be_flushed_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with atomic_output(tmp_path / "out") as temporary:
        temporary.write_bytes(b"whole")
    assert (tmp_path / "out").read_bytes() == b"whole"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ResourceError), atomic_output(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
