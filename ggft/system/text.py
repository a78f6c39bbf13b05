"""Text that came from a file or a model, made safe to print.

A model's answer or a GGUF's metadata may hold escape sequences that move the cursor, recolour or
retitle the terminal; they are shown, not obeyed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ggft.system.errors import InputError

# C0 without tab and newline, DEL, and C1: what a terminal may take for a command.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}


def printable(text: str) -> str:
    r"""Return `text` with control characters written out, such as `\x1b`; keeps \t and \n."""
    return text.translate(_CONTROLS)


MAX_SHOWN = 100


def one_line(text: str, limit: int = MAX_SHOWN) -> str:
    """Return text from a file as one harmless line."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def format_bytes(n_bytes: float) -> str:
    """Return a size of a file or of memory in the units that `--memory` takes: 93.9 MiB."""
    if n_bytes < 2**10:
        return f"{n_bytes:.0f} bytes"
    if n_bytes < 2**20:
        return f"{n_bytes / 2**10:.1f} KiB"
    return f"{n_bytes / 2**20:.1f} MiB" if n_bytes < 2**30 else f"{n_bytes / 2**30:.2f} GiB"


def finite(value: Any, shown: Callable[[float], object] = lambda _: None) -> Any:
    """Return a value with what `shown` makes of NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return shown(value)
    if isinstance(value, dict):
        return {key: finite(part, shown) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part, shown) for part in value]
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
