"""What is known about a model file, as lines for people or JSON for programs.

All text from the file is made harmless for the terminal before it is printed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ggft.system.text import MAX_SHOWN, finite, format_bytes, one_line


@dataclass(frozen=True)
class TypeShare:
    """How much of a file is of one type."""

    type: str
    n_tensors: int
    n_elements: int
    n_bytes: int


@dataclass(frozen=True)
class TensorRow:
    """One line of `--tensors`; shape in ggml's order."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    offset: int
    file: str


@dataclass(frozen=True)
class Ability:
    """Whether ggft can do something with the file, and why not or how."""

    command: str
    possible: bool
    note: str = ""


@dataclass
class ModelDescription:
    """What `describe` found.

    Attributes:
        kind: "model", "adapter", "vocabulary" or "old GGML model".
        facts: What to print, in order: label and text, not yet made harmless.
        values: The same for programs: numbers as numbers.
    """

    path: Path
    kind: str
    format: str
    n_bytes: int
    facts: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    types: list[TypeShare] = field(default_factory=list)
    abilities: list[Ability] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    keys: list[tuple[str, str, Any]] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)

    def add(self, label: str, key: str, value: Any, text: str | None = None) -> None:
        """Note a fact for people and for programs; nothing where it is None."""
        if value is not None:
            self.facts.append((label, str(value) if text is None else text))
            self.values[key] = value


def render(description: ModelDescription, *, tensors: bool = False, keys: bool = False) -> str:
    """Return a description as lines for a terminal; no colours, nothing a terminal obeys."""
    lines = [
        f"{one_line(str(description.path), 500)}: {one_line(description.kind)},"
        f" {description.format}, {format_bytes(description.n_bytes)}"
    ]
    lines += [f"  {label:16} {one_line(text)}" for label, text in description.facts]
    total = sum(share.n_bytes for share in description.types)
    width = max((len(share.type) for share in description.types), default=0)
    for i, share in enumerate(description.types):
        label = "types" if i == 0 else ""
        percent = 100 * share.n_bytes / total if total else 0.0
        what = "tensor" if share.n_tensors == 1 else "tensors"
        lines.append(
            f"  {label:16} {share.type:{width}} {share.n_tensors:4} {what:7} {percent:5.1f}%"
        )
    for ability in description.abilities:
        answer = "yes" if ability.possible else "no"
        note = f": {one_line(ability.note, 300)}" if ability.note else ""
        lines.append(f"  {'can ' + ability.command + '?':16} {answer}{note}")
    lines += [f"  warning: {one_line(warning, 300)}" for warning in description.warnings]
    if keys:
        lines.append("keys")
        width = max((len(one_line(key)) for key, _, _ in description.keys), default=0)
        lines += [
            f"  {one_line(key):{width}}  {kind:8} {one_line(_shown(value))}"
            for key, kind, value in description.keys
        ]
    if tensors:
        lines.append("tensors")
        width = max((len(one_line(row.name)) for row in description.tensors), default=0)
        for row in description.tensors:
            shape = " × ".join(map(str, row.shape))
            lines.append(
                f"  {one_line(row.name):{width}}  {row.type:8} {shape:>15}  {row.n_bytes:>12} bytes"
                f" at {row.offset}"
            )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """Return a metadata value as text; of long lists the first few elements."""
    if isinstance(value, str):
        return repr(value[: 2 * MAX_SHOWN])
    if isinstance(value, Sequence):
        first = ", ".join(repr(x) for x in value[:4])
        return f"[{first}{', …' if len(value) > 4 else ''}] ({len(value)})"
    return str(value)


def to_json(description: ModelDescription, *, tensors: bool = False, keys: bool = False) -> str:
    """Return a description as JSON; ASCII only, so that no text reaches a terminal raw."""
    record: dict[str, Any] = {
        "path": str(description.path),
        "kind": description.kind,
        "format": description.format,
        "n_bytes": description.n_bytes,
        **description.values,
        "types": [asdict(share) for share in description.types],
        "can": {
            ability.command: {"possible": ability.possible, "note": ability.note}
            for ability in description.abilities
        },
        "warnings": description.warnings,
    }
    if keys:
        record["keys"] = {
            key: value if isinstance(value, (str, int, float)) else list(value)
            for key, _, value in description.keys
        }
    if tensors:
        record["tensors"] = [asdict(row) for row in description.tensors]
    return json.dumps(finite(record, str), indent=2)
