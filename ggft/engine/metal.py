"""Whether ggml's Metal backend computes a node, known without a Mac.

`metal_ops.json` holds the backend's rules for one version of llama.cpp; this module judges the
nodes of `Engine.graph_report` by them. A rule is a set of conditions, all of which must hold:
`src0`, `src1`, …, `dst` list types or groups of types; `op` lists variants; `contiguous`,
`contiguous_1` (over the dimensions from the second on), `contiguous_rows`, `same_type` and
`same_shape` list operands. A condition on a source that a node does not have holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ggft.gguf.types import GGMLType

Operand = Mapping[str, Any]
Node = Mapping[str, Any]
Rule = Mapping[str, Any]

SIZES = {"I8": (1, 1), "I16": (1, 2), "I32": (1, 4), "I64": (1, 8)} | {
    t.name: (t.block_size, t.block_bytes) for t in GGMLType
}
"""Elements and bytes of a block of each type."""


@dataclass(frozen=True)
class MetalRules:
    """The table, and the version of llama-cpp-python whose Metal backend it describes."""

    llama_cpp_python: str
    types: Mapping[str, frozenset[str]]
    ops: Mapping[str, tuple[Rule, ...]]

    def supports(self, node: Node) -> bool:
        """Return whether Metal computes a node of a graph report."""
        return any(self._meets(node, rule) for rule in self.ops.get(node["family"], ()))

    def unsupported(self, report: Iterable[Node]) -> list[str]:
        """Return a line for each node of a report that Metal lacks."""
        return [f"{n['op']}: {n['shapes']}" for n in report if not self.supports(n)]

    def _meets(self, node: Node, rule: Rule) -> bool:
        sources = node["sources"]

        def operands(places: Iterable[int | str]) -> list[Operand]:
            found = [node["result"] if p == "dst" else sources[int(p) : int(p) + 1] for p in places]
            return [o for one in found for o in (one if isinstance(one, list) else [one])]

        for condition, value in rule.items():
            if condition == "op":
                holds = node["op"] in value
            elif condition == "dst" or condition.startswith("src"):
                allowed = self._expand(value)
                place = "dst" if condition == "dst" else int(condition[3:])
                holds = all(o["type"].upper() in allowed for o in operands([place]))
            elif condition in ("same_type", "same_shape"):
                key = "type" if condition == "same_type" else "ne"
                holds = len({o[key] for o in operands(value)}) == 1
            else:
                holds = all(CONDITIONS[condition](o) for o in operands(value))
            if not holds:
                return False
        return True

    def _expand(self, names: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(self.types.get(name, frozenset({name})) for name in names))


@cache
def metal_rules() -> MetalRules:
    """Return the rules that ggft carries."""
    path = Path(__file__).with_name("metal_ops.json")
    table = json.loads(path.read_text(encoding="utf-8"))
    return MetalRules(
        llama_cpp_python=table["llama_cpp_python"],
        types={name: frozenset(types) for name, types in table["types"].items()},
        ops={name: tuple(rules) for name, rules in table["ops"].items()},
    )


def contiguous(operand: Operand, loose: int = 0) -> bool:
    """Return whether a tensor is dense, its first `loose` dimensions above the row excepted.

    Source: ggml_is_contiguous_0 and _1 in ggml.h of the pinned llama.cpp.
    """
    block, size = SIZES[operand["type"].upper()]
    ne, nb = operand["ne"], operand["nb"]
    if ne[0] != block and nb[0] != size:
        return False
    step = size * ne[0] // block
    for i in range(1, 4):
        if ne[i] == 1:
            continue
        if i > loose and nb[i] != step:
            return False
        step = (nb[i] if i <= loose else step) * ne[i]
    return True


def contiguous_rows(operand: Operand) -> bool:
    """Return whether the elements of each row are neighbours. Source: ggml_is_contiguous_rows."""
    block, size = SIZES[operand["type"].upper()]
    return bool(operand["ne"][0] == block or operand["nb"][0] == size)


CONDITIONS = {
    "contiguous": contiguous,
    "contiguous_1": lambda operand: contiguous(operand, loose=1),
    "contiguous_rows": contiguous_rows,
}
