"""Errors a user can cause or meet: one message, one remedy, one exit code.

Every module raises these and nothing else on purpose; the command line prints them without a
traceback. A message says what is wrong, where (file, byte offset or line), what was found, what
was expected, and what to do next.
"""

from __future__ import annotations

from pathlib import Path

EXIT_OK = 0
EXIT_INPUT = 2
EXIT_RESOURCE = 3
EXIT_NETWORK = 4
EXIT_NUMERIC = 5
EXIT_SIGINT = 130
EXIT_SIGTERM = 143


class GgftError(Exception):
    """Base of all deliberate errors.

    Args:
        message: What is wrong, in one clause without a final period.
        path: The file or folder concerned.
        offset: Byte offset in `path`.
        line: 1-based line in `path`.
        found: What is there.
        expected: What should be there.
        hint: What to do next.
    """

    exit_code = EXIT_INPUT

    def __init__(
        self,
        message: str,
        *,
        path: str | Path | None = None,
        offset: int | None = None,
        line: int | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = None if path is None else str(path)
        self.offset = offset
        self.line = line
        self.found = found
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        """Return the whole message: `where: what (found …, expected …)`, then the hint."""
        where = self.path or ""
        if self.line is not None:
            where += f":{self.line}"
        if self.offset is not None:
            where += f" at byte {self.offset}" if where else f"byte {self.offset}"
        text = f"{where}: {self.message}" if where else self.message
        details = [
            f"{name} {value}"
            for name, value in (("found", self.found), ("expected", self.expected))
            if value is not None
        ]
        if details:
            text += f" ({', '.join(details)})"
        if self.hint:
            text += f"\n  → {self.hint}"
        return text


class InputError(GgftError):
    """A file, value or flag that cannot be used; exit code 2."""


class ResourceError(GgftError):
    """Memory, disk, device or a lock that is unavailable; exit code 3."""

    exit_code = EXIT_RESOURCE


class NetworkError(GgftError):
    """A download that failed; exit code 4."""

    exit_code = EXIT_NETWORK


class NumericError(GgftError):
    """NaN or infinity in loss, gradient or weights; exit code 5."""

    exit_code = EXIT_NUMERIC


class Interrupted(GgftError):  # noqa: N818
    """The user or the system asked to stop; what was done is saved; exit code 130 or 143."""

    exit_code = EXIT_SIGINT

    def __init__(self, message: str, *, signal_number: int = 2, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number
