"""Every rule of the table by itself, against the operation's value in NumPy's float64.

The value comes from `tape_values`, on complex numbers: the derivative by one element is the
imaginary part of what a tiny imaginary step makes of the result, exact to rounding. Central
differences of the same value are compared, too. A rule without a case here fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from ggft.engine.engine import load_native
from tests.support.engines import relative
from tests.support.reference import Array
from tests.support.tape import STEP, Node
from tests.support.tape_values import UNARY, VALUES

Shape = tuple[int, int, int, int]
# ggml's CPU backend looks GELU up in a table of F16 values.
FROM_TABLE = ("GELU", "GELU_QUICK", "GEGLU", "GEGLU_QUICK")


@dataclass(frozen=True)
class Case:
    """How to try an operation.

    Attributes:
        shapes: Of the sources, in NumPy order.
        result: Shape of the result; None for the first source's.
        params: Of the operation by index, ints and floats.
        ids: Sources that are given, by index.
        frozen: Sources without a gradient.
        values: Makes a source's values of standard normal ones.
    """

    shapes: tuple[Shape, ...] = ((2, 3, 4, 5),)
    result: Shape | None = None
    params: tuple[tuple[int, int | float], ...] = ()
    ids: tuple[tuple[int, Any], ...] = ()
    frozen: tuple[int, ...] = ()
    values: Callable[[Array], Array] = lambda x: x


def positive(x: Array) -> Array:
    """Return numbers away from zero."""
    return np.abs(x) + 0.5


X: Shape = (2, 3, 4, 5)
TOKEN_IDS = np.array([[[[0, 2], [1, 0], [2, 1]]]])
PAIRS = (X, X)
ROPE = (
    (1, 4), (2, 2), (4, 64), (5, 10000.0), (6, 0.25), (7, 1.0), (8, 1.1), (9, 32.0), (10, 1.0),
)  # fmt: skip
POSITIONS = np.arange(5).reshape(1, 1, 1, 5) * 7
TURNED = Case(
    ((1, 5, 3, 6), (1, 1, 1, 5), (1, 1, 1, 2)), None, ROPE,
    ((1, POSITIONS), (2, [[[[1.5, 4.0]]]])), (2,),
)  # fmt: skip
ALL_TURNED = Case(TURNED.shapes[:2], None, ((1, 6), (5, 1e2), (6, 1.0), (8, 1.0)), TURNED.ids[:1])
MASK = np.triu(np.full((4, 5), -np.inf), 2).reshape(1, 1, 4, 5)
CASES: dict[str, tuple[Case, ...]] = {
    **{name: (Case(),) for name in UNARY if name not in ("SGN", "STEP", "ELU")},
    **{
        name: (Case(PAIRS), Case((X, (1, 1, 1, 5)), values=positive), Case((X, (2, 1, 4, 1))))
        for name in ("ADD", "SUB", "MUL")
    },
    "DIV": (Case(PAIRS, values=positive), Case((X, (1, 1, 4, 1)), values=positive)),
    "SQR": (Case(),),
    "SQRT": (Case(values=positive),),
    "LOG": (Case(values=positive),),
    "SCALE": (Case(params=((0, -1.5), (1, 0.25))),),
    "CLAMP": (Case(params=((0, -0.5), (1, 0.75))),),
    "XIELU": (Case(params=((1, 0.8), (2, 0.6), (3, 0.5), (4, -1e-6))),),
    **{
        name: (
            Case(PAIRS, params=((2, 1.7), (3, 0.9))),
            Case(((1, 2, 3, 8),), (1, 2, 3, 4), ((2, 1.7), (3, 0.9))),
            Case(((1, 2, 3, 8),), (1, 2, 3, 4), ((1, 1), (2, 1.7), (3, 0.9))),
        )
        for name in (
            "REGLU", "GEGLU", "SWIGLU", "GEGLU_ERF", "GEGLU_QUICK", "SWIGLU_OAI", "SWIGLU_CLAMP",
        )
    },
    "CONT": (Case(), Case((X,), (1, 2, 6, 10))),
    "CPY": (Case(), Case((X,), (1, 1, 24, 5))),
    "DUP": (Case(),),
    "GET_ROWS": (
        Case(((1, 1, 5, 4), (1, 1, 1, 3)), (1, 1, 3, 4), ids=((1, [[[[4, 0, 2]]]]),)),
        Case(((1, 3, 4, 1), (1, 1, 3, 2)), (1, 3, 2, 1), ids=((1, TOKEN_IDS),)),
    ),
    "CONCAT": (
        Case(PAIRS, (2, 3, 4, 10), ((0, 0),)),
        Case((X, (2, 3, 2, 5)), (2, 3, 6, 5), ((0, 1),)),
        Case((X, (2, 1, 4, 5)), (2, 4, 4, 5), ((0, 2),)),
    ),
    "REPEAT": (Case(((2, 1, 4, 1),), (2, 3, 4, 5)),),
    "SUM_ROWS": (Case((X,), (2, 3, 4, 1)),),
    "RMS_NORM": (Case(params=((0, 0.1),)),),
    "NORM": (Case(params=((0, 0.1),)),),
    "L2_NORM": (Case(params=((0, 0.1),)), Case(params=((0, 1.9),))),
    "SOFT_MAX": (
        Case(params=((0, 0.7),)),
        Case(((1, 2, 4, 5), (1, 1, 4, 5)), None, ((0, 0.7),), ((1, MASK),), (1,)),
    ),
    "ROPE": (TURNED, ALL_TURNED),
    "ROPE_BACK": (TURNED,),
    "MUL_MAT": (
        Case(((1, 2, 5, 6), (1, 4, 3, 6)), (1, 4, 3, 5)),
        Case(((1, 1, 5, 6), (1, 1, 3, 6)), (1, 1, 3, 5)),
    ),
    "MUL_MAT_ID": (
        Case(((1, 3, 5, 6), (1, 3, 1, 6), (1, 1, 3, 2)), (1, 3, 2, 5), (), ((2, TOKEN_IDS),), (0,)),
        Case(((1, 3, 5, 6), (1, 3, 2, 6), (1, 1, 3, 2)), (1, 3, 2, 5), (), ((2, TOKEN_IDS),), (0,)),
    ),
    "ADD_ID": (
        Case(((1, 3, 2, 5), (1, 1, 3, 5), (1, 1, 3, 2)), None, (), ((2, TOKEN_IDS),), (1,)),
    ),
}  # fmt: skip
TRIED = [(op, i) for op, cases in CASES.items() for i in range(len(cases))]


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == set(load_native().rule_names())


@pytest.mark.parametrize(("op", "number"), TRIED)
def test_a_rule_is_the_derivative(op: str, number: int) -> None:
    case, rng = CASES[op][number], np.random.default_rng(3)
    words = np.zeros(16, np.int32)
    for index, word in case.params:
        words[index] = np.float32(word).view(np.int32) if isinstance(word, float) else word
    sources = [case.values(rng.normal(size=shape)).astype(np.float32) for shape in case.shapes]
    for index, given in case.ids:
        whole = np.asarray(given)
        kind = np.int32 if whole.dtype.kind == "i" else np.float32
        sources[index] = whole.astype(kind)
    result = case.result or case.shapes[0]
    dy = rng.normal(size=result).astype(np.float32)
    name, kinds = full_name(op)
    given_words = words[1:].tolist() if kinds else words.tolist()
    y, gradients = load_native().try_rule(op, sources, list(case.frozen), given_words, dy)

    node = Node(name, op, 0, result, (0, 0, 0, 0), 0, 0, (), words)

    def value(moved: list[Any]) -> Any:
        return np.asarray(VALUES[name](node, moved)).reshape(result)

    wide: list[Any] = [s.astype(np.float64) if s.dtype == np.float32 else s for s in sources]
    tolerance = 1e-3 if op in FROM_TABLE else 3e-6
    assert relative(y.reshape(result), value(as_complex(wide)).real) <= tolerance
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        exact, by_differences = np.empty(wide[index].size), np.empty(wide[index].size)
        for i in range(wide[index].size):
            exact[i] = (dy * value(as_complex(wide, index, i, 1j * STEP)).imag).sum() / STEP
            ends = [value(as_complex(wide, index, i, step)).real for step in (1e-6, -1e-6)]
            by_differences[i] = (dy * (ends[0] - ends[1])).sum() / 2e-6
        assert relative(by_differences, exact) <= 1e-7
        assert relative(gradient, exact) <= tolerance


def full_name(op: str) -> tuple[str, bool]:
    """Return what an operation is called on a tape, and whether a kind begins its parameters."""
    for family in ("UNARY", "GLU"):
        if f"{family}.{op}" in VALUES:
            return f"{family}.{op}", True
    return op, False


def as_complex(wide: list[Any], index: int = -1, element: int = 0, step: complex = 0) -> list[Any]:
    """Return the sources as complex numbers, one element moved; integers stay."""
    moved = [s.astype(np.complex128) if s.dtype.kind == "f" else s for s in wide]
    if index >= 0:
        moved[index].flat[element] += step
    return moved
