"""Rows that come on standard input, kept in a file without a name to be read twice."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, BinaryIO

from ggft.system.errors import InputError, ResourceError

STDIN = Path("<standard input>")  # stands for it in messages, too
MAX_BYTES = 4 << 30
_PIECE = 1 << 20


def open_stdin() -> BinaryIO:
    """Return what came on standard input, from its beginning.

    Raises:
        InputError: It is a terminal, or has no end.
        ResourceError: There is no room for it.
    """
    file = os.fdopen(os.dup(_kept().fileno()), "rb")
    file.seek(0)
    return file


def stdin_bytes() -> int:
    """Return how many bytes came."""
    return os.fstat(_kept().fileno()).st_size


@cache
def _kept() -> IO[bytes]:
    source = None if sys.stdin is None else sys.stdin.buffer
    if source is None or source.isatty():
        raise InputError(
            "no data comes on standard input", path=STDIN, expected="a pipe or a file",
            hint="for example: zcat rows.jsonl.gz | ggft finetune -d -",
        )  # fmt: skip
    try:
        kept = tempfile.TemporaryFile(prefix="ggft-stdin-")  # noqa: SIM115
        n_bytes = 0
        while piece := source.read(_PIECE):
            n_bytes += len(piece)
            free = shutil.disk_usage(tempfile.gettempdir()).free
            if n_bytes > MAX_BYTES or free < 4 * _PIECE:
                kept.close()
                raise InputError(
                    "more comes on standard input than can be kept", path=STDIN,
                    found=f"{n_bytes} bytes", hint="save the data in a file first",
                )  # fmt: skip
            kept.write(piece)
        kept.flush()
    except OSError as error:
        raise ResourceError(
            f"standard input cannot be kept: {error.strerror}", path=STDIN,
            hint="save the data in a file first",
        ) from None  # fmt: skip
    return kept
