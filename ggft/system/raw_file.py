"""The bytes of a data file, with LF where lines end with CR alone."""

from __future__ import annotations

import io
from typing import Any, BinaryIO


class RawFile(io.RawIOBase):
    """A file that somebody else closes.

    Args:
        file: The file.
        lone_cr: Whether lines end with CR alone, as old spreadsheets write them; it becomes LF.
    """

    def __init__(self, file: BinaryIO, *, lone_cr: bool) -> None:
        self._file = file
        self._lone_cr = lone_cr

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, and return how many bytes there were."""
        data = self._file.read(len(buffer))
        data = data.replace(b"\r", b"\n") if self._lone_cr else data
        buffer[: len(data)] = data
        return len(data)
