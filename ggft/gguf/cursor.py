"""Reads numbers, strings and bytes of a file, each read checked against the file's end.

Shared by the parsers of GGUF and of the older GGML containers. Plain reads into a growing window,
never a mapping: a file that shrinks meanwhile gives an error and not a SIGBUS.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.gguf.types import StringArray
from ggft.system.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_READ_BYTES = 1 << 26
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def read_bytes(path: Path, offset: int, n_bytes: int, what: str) -> npt.NDArray[np.uint8]:
    """Read a stretch of a file.

    Reads rather than maps: a file cut off meanwhile is an error and not a SIGBUS.

    Args:
        path: The file.
        offset: Where to start, bytes.
        n_bytes: How much to read.
        what: What stands there, for messages.

    Raises:
        InputError: The file became shorter, or cannot be read.
    """
    import numpy as np

    data = np.empty(n_bytes, dtype=np.uint8)
    done = 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < n_bytes:
                read = file.readinto(data[done : done + _READ_BYTES].data)
                if not read:
                    raise InputError(
                        f"the file ends inside {what}; it became shorter",
                        path=path,
                        offset=offset + done,
                        found=f"{done} bytes",
                        expected=f"{n_bytes} bytes",
                    )
                done += read
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", path=path) from None
    return data


class Cursor:
    """Reads a file front to back.

    Args:
        path: For messages.
        file_bytes: The file's size.
        read: Gives at most so many bytes from a position on, as os.pread of an open file does.
        window_bytes: How much to read ahead at first.
    """

    def __init__(
        self,
        path: Path,
        file_bytes: int,
        read: Callable[[int, int], bytes],
        window_bytes: int = 1 << 20,
    ) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.pos = 0
        self._read = read
        self._window_bytes = window_bytes
        # The window: bytes of the file from _base on.
        self._base = 0
        self._loaded = bytearray()

    def fail(
        self,
        message: str,
        *,
        offset: int | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> InputError:
        """Return the error for something wrong at `offset`, by default here."""
        return InputError(
            message,
            path=self.path,
            offset=self.pos if offset is None else offset,
            found=found,
            expected=expected,
            hint=hint,
        )

    def skip_to(self, pos: int) -> None:
        """Go forward to `pos` and forget what lies before it.

        Args:
            pos: A position within the file.
        """
        self.pos = pos
        if pos < self._base + len(self._loaded):
            del self._loaded[: pos - self._base]
        else:
            self._loaded.clear()
        self._base = pos

    def _load(self, end: int) -> None:
        """Have all bytes from the window's start to `end` in memory."""
        ahead = max(end, self._base + max(2 * len(self._loaded), self._window_bytes))
        wanted = min(self.file_bytes, ahead) - self._base
        while len(self._loaded) < wanted:
            at = self._base + len(self._loaded)
            chunk = self._read(min(wanted - len(self._loaded), _READ_BYTES), at)
            if not chunk:
                raise self.fail(
                    "the file became shorter while it was read",
                    offset=at,
                    found=f"{at} bytes",
                    expected=f"{self.file_bytes} bytes",
                )
            self._loaded += chunk

    def need(self, n_bytes: int, what: str) -> None:
        """Refuse the file unless `n_bytes` more bytes are there."""
        left = self.file_bytes - self.pos
        if n_bytes > left:
            raise self.fail(
                f"the file ends inside {what}",
                found=f"{left} bytes left",
                expected=f"{n_bytes} bytes",
                hint="the file is cut off or damaged; download it again",
            )
        if self.pos + n_bytes > self._base + len(self._loaded):
            self._load(self.pos + n_bytes)

    def take(self, n_bytes: int, what: str) -> bytes:
        """Read bytes."""
        self.need(n_bytes, what)
        at = self.pos - self._base
        data = bytes(memoryview(self._loaded)[at : at + n_bytes])
        self.pos += n_bytes
        return data

    def u32(self, what: str) -> int:
        """Read an unsigned 32-bit number."""
        self.need(4, what)
        (value,) = _U32.unpack_from(self._loaded, self.pos - self._base)
        self.pos += 4
        return int(value)

    def u64(self, what: str) -> int:
        """Read an unsigned 64-bit number."""
        self.need(8, what)
        (value,) = _U64.unpack_from(self._loaded, self.pos - self._base)
        self.pos += 8
        return int(value)

    def string(self, what: str, limit: int) -> bytes:
        """Read a length and as many bytes."""
        at = self.pos
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise self.fail(
                f"{what} is too long", offset=at, found=f"{length} bytes", expected=f"≤ {limit}"
            )
        return self.take(length, what)

    def strings(self, count: int, what: str) -> StringArray:
        """Read an array of strings without decoding it."""
        self.skip_to(self.pos)
        start = self.pos
        ends = array("Q")
        append = ends.append
        unpack = _U64.unpack_from
        loaded = self._loaded
        end = 0
        for i in range(count):
            if end + 8 > len(loaded):
                self.pos = start + end
                self.need(8, f"string {i} of {what}")
            (length,) = unpack(loaded, end)
            end += 8 + length
            if end > len(loaded):
                self.pos = start + end - length
                self.need(length, f"string {i} of {what}")
            append(end)
        self.pos = start + end
        return StringArray(bytes(memoryview(loaded)[:end]), ends)
