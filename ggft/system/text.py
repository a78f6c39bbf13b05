"""Text that came from a file or a model, made safe to print.

A model's answer or a GGUF's metadata may hold escape sequences that move the cursor, recolour or
retitle the terminal; they are shown, not obeyed.
"""

from __future__ import annotations

import math
from typing import Any

from ggft.system.errors import InputError

# C0 without tab and newline, DEL, and C1: what a terminal may take for a command.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}


def printable(text: str) -> str:
    r"""Return `text` with control characters written out, such as `\x1b`; keeps \t and \n."""
    return text.translate(_CONTROLS)


_MAX_SHOWN = 100


def _line(text: str, limit: int = _MAX_SHOWN) -> str:
    """Return text from a file as one harmless line."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_bytes(n_bytes: int) -> str:
    """Return a size as people say it: 98.4 MB."""
    if n_bytes >= 10**9:
        return f"{n_bytes / 1e9:.2f} GB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 10**6 else f"{n_bytes / 1e3:.1f} KB"


def _finite(value: Any) -> Any:
    """Return a value with NaN and infinity, which JSON does not have, as text."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def parse_size(text: str, flag: str = "--memory") -> int:
    """Return the bytes of a size such as `6G`, `750M`, `1.5GiB` (powers of 1024).

    Raises:
        InputError: not a positive number with an optional K, M, G or T.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = body[-1:] if body[-1:] in ("K", "M", "G", "T") else ""
    try:
        size = float(body.removesuffix(unit)) * units[unit]
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and 1 <= size < 2**63):
        raise InputError(f"{flag} is not a size", found=repr(text), expected="such as 6G or 750M")
    return int(size)
