"""Where each row of the data stands."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class RowTable:
    """Where each row is, in 12 bytes a row."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._file = array("i")
        self._line = array("q")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._file)

    def add(self, file: int, line: int) -> None:
        """Append a row of file number `file`."""
        self._file.append(file)
        self._line.append(line)

    def files(self) -> npt.NDArray[np.int32]:
        """Return the number of each row's file, (N,)."""
        import numpy as np

        return np.array(self._file, np.int32)

    def where(self, row: int) -> str:
        """Return `file:line` of a row."""
        return f"{self.paths[self._file[row]].name}:{self._line[row]}"
