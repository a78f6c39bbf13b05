"""Rows of Parquet files, through the extra `ggft[parquet]`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ggft.system.errors import InputError

MAGIC = b"PAR1"
BATCH_ROWS = 256


def parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the rows of a Parquet file, each with its number, counted from 1.

    Raises:
        InputError: The extra is not installed, or the file is damaged.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            "this is a Parquet file, and pyarrow is not installed", path=path, expected="the extra",
            hint='pip install "ggft[parquet]", or convert the file to JSONL',
        ) from None  # fmt: skip
    number = 0
    try:
        for batch in ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield row, number
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(
            f"damaged Parquet file: {str(error).splitlines()[0]}", path=path, line=number or None,
            expected="a complete one",
            hint="download or write the file again",
        ) from None  # fmt: skip
