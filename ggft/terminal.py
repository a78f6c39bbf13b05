"""Text that came from a file or a model, made safe to print.

A model's answer or a GGUF's metadata may hold escape sequences that move the cursor, recolour or
retitle the terminal; they are shown, not obeyed.
"""

from __future__ import annotations

# C0 without tab and newline, DEL, and C1: what a terminal may take for a command.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code not in (9, 10)
}


def printable(text: str) -> str:
    r"""Return `text` with control characters written out, such as `\x1b`; keeps \t and \n."""
    return text.translate(_CONTROLS)
