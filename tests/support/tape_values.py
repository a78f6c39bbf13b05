"""What each ggml operation computes, in NumPy on complex numbers, one function an operation.

Each takes the recorded node and its sources in NumPy order (n3, n2, n1, n0) and returns the value
in the node's shape. Comparisons, maxima and orders look at real parts, so that a tiny imaginary
part is carried as a derivative; F16 tables and roundings of the CPU backend are left out, as no
derivative can follow them. Source: the CPU backend, ggml/src/ggml-cpu/ops.cpp and vec.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Values = Callable[[Any, list[Any]], Any]
VALUES: dict[str, Values] = {}


def value_of(*names: str) -> Callable[[Values], Values]:
    """Register a function as the value of operations."""

    def decorate(function: Values) -> Values:
        VALUES.update(dict.fromkeys(names, function))
        return function

    return decorate


def tiled(x: Any, shape: tuple[int, ...]) -> Any:
    """Repeat a tensor over `shape`, each dimension as a whole (index modulo its size)."""
    return (
        x if x.shape == shape else np.tile(x, [n // k for n, k in zip(shape, x.shape, strict=True)])
    )


def grouped(x: Any, like: Any) -> Any:
    """Repeat each slice of the two outer dimensions as often as `like` has more of them."""
    return x.repeat(like.shape[0] // x.shape[0], 0).repeat(like.shape[1] // x.shape[1], 1)


# ---- element by element ----------------------------------------------------------------------


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x)) without overflow."""
    e = np.exp(np.where(x.real > 0, -x, x))
    return np.where(x.real > 0, 1, e) / (1 + e)


def softplus(x: Any) -> Any:
    """Return log(1 + exp(x)); from 20 on that is x."""
    return np.where(x.real > 20, x, np.log(1 + np.exp(np.where(x.real > 20, 0, x))))


def gelu(x: Any) -> Any:
    """Return GELU by its tanh form."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)))


def gelu_erf(x: Any) -> Any:
    """Return GELU by the error function, to first order in the imaginary part."""
    real = np.vectorize(math.erf, otypes=[float])(x.real / math.sqrt(2))
    slope = math.sqrt(2 / math.pi) * np.exp(-x.real * x.real / 2)
    return 0.5 * x * (1 + real + 1j * x.imag * slope)


def clipped(x: Any, low: float, high: float) -> Any:
    """Return x within limits."""
    return np.where(x.real < low, low, np.where(x.real > high, high, x))


def relu(x: Any) -> Any:
    """Return x where it is positive."""
    return np.where(x.real > 0, x, 0)


UNARY: dict[str, Callable[[Any], Any]] = {
    "ABS": lambda x: np.where(x.real < 0, -x, x),
    "SGN": lambda x: np.sign(x.real),
    "NEG": lambda x: -x,
    "STEP": lambda x: np.where(x.real > 0, 1.0, 0.0),
    "TANH": np.tanh,
    "ELU": lambda x: np.where(x.real > 0, x, np.exp(np.where(x.real > 0, 0, x)) - 1),
    "RELU": relu,
    "SIGMOID": sigmoid,
    "SILU": lambda x: x * sigmoid(x),
    "GELU": gelu,
    "GELU_ERF": gelu_erf,
    "GELU_QUICK": lambda x: x * sigmoid(1.702 * x),
    "EXP": np.exp,
    "SOFTPLUS": softplus,
}


def _register(name: str, function: Callable[[Any], Any]) -> None:
    VALUES[f"UNARY.{name}"] = lambda node, s: function(s[0])


for _name, _function in UNARY.items():
    _register(_name, _function)

VALUES["ADD"] = lambda node, s: s[0] + tiled(s[1], s[0].shape)
VALUES["SUB"] = lambda node, s: s[0] - tiled(s[1], s[0].shape)
VALUES["MUL"] = lambda node, s: s[0] * tiled(s[1], s[0].shape)
VALUES["DIV"] = lambda node, s: s[0] / tiled(s[1], s[0].shape)
VALUES["SQR"] = lambda node, s: s[0] * s[0]
VALUES["LOG"] = lambda node, s: np.log(s[0])
VALUES["SQRT"] = lambda node, s: np.sqrt(s[0])
VALUES["SCALE"] = lambda node, s: s[0] * node.floats[0] + node.floats[1]
VALUES["CLAMP"] = lambda node, s: clipped(s[0], node.floats[0], node.floats[1])
VALUES["FILL"] = lambda node, s: np.full(node.shape, node.floats[0])
VALUES["ARANGE"] = lambda node, s: node.floats[0] + node.floats[2] * np.arange(node.shape[3])


@value_of("UNARY.XIELU")
def xielu(node: Any, s: list[Any]) -> Any:
    """xIELU: a parabola to the right, an exponential to the left."""
    alpha_n, alpha_p, beta, eps = node.floats[1:5]
    x = s[0]
    low = np.where(x.real < eps, x, eps)
    right = alpha_p * x * x + beta * x
    return np.where(x.real > 0, right, (np.exp(low) - 1 - x) * alpha_n + beta * x)


@value_of(
    "GLU.SWIGLU", "GLU.GEGLU", "GLU.REGLU", "GLU.GEGLU_ERF", "GLU.GEGLU_QUICK", "GLU.SWIGLU_OAI",
    "GLU.SWIGLU_CLAMP",
)  # fmt: skip
def glu(node: Any, s: list[Any]) -> Any:
    """A gate's activation times a value; one source holds both as the halves of its rows."""
    if len(s) > 1 and s[1] is not None:
        gate, value = s[0], s[1]
    else:
        halves = np.split(s[0], 2, -1)
        gate, value = halves[::-1] if node.ints[1] else halves
    kind, alpha, limit = node.op.removeprefix("GLU."), node.floats[2], node.floats[3]
    if kind in ("SWIGLU_OAI", "SWIGLU_CLAMP"):
        gate, value = clipped(gate, -math.inf, limit), clipped(value, -limit, limit)
    if kind == "SWIGLU_OAI":
        return gate * sigmoid(alpha * gate) * (value + 1)
    name = {"SWIGLU": "SILU", "SWIGLU_CLAMP": "SILU", "REGLU": "RELU"}.get(kind)
    return UNARY[name or kind.replace("GEGLU", "GELU")](gate) * value


# ---- rows -------------------------------------------------------------------------------------


@value_of("RMS_NORM", "NORM", "L2_NORM")
def norm(node: Any, s: list[Any]) -> Any:
    """Rows over their size; NORM takes the mean away first, L2_NORM has no mean in its size."""
    x, eps = s[0], node.floats[0]
    if node.op == "L2_NORM":
        size = np.sqrt((x * x).sum(-1, keepdims=True))
        return x / np.where(size.real > eps, size, eps)
    if node.op == "NORM":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def slopes(max_bias: float, n_head: int) -> Any:
    """Return ALiBi's factor of each head, 1 without it. Source: Press et al. 2022."""
    if max_bias <= 0:
        return 1.0
    n = 2 ** math.floor(math.log2(n_head))
    powers = [(h + 1) / n if h < n else (2 * (h - n) + 1) / (2 * n) for h in range(n_head)]
    return np.exp2(-max_bias * np.array(powers))[:, None, None]


def probabilities(z: Any, sinks: Any) -> Any:
    """Return the softmax of rows; a head's sink takes its share and has no column."""
    top = z.real.max(-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.ravel()[:, None, None]
        top = np.maximum(top, sinks.real)
    e = np.exp(z - top)
    return e / (e.sum(-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top)))


def masked(z: Any, mask: Any, max_bias: float) -> Any:
    """Add a mask, which may have more rows than `z`, to scores."""
    if mask is None:
        return z
    mask = mask[:, :, : z.shape[2]].real
    return z + slopes(max_bias, z.shape[1]) * tiled(mask, z.shape)


def source(s: list[Any], index: int) -> Any:
    """Return a source that may be missing."""
    return s[index] if len(s) > index else None


@value_of("SOFT_MAX")
def soft_max(node: Any, s: list[Any]) -> Any:
    """softmax(scale · x + slope · mask)."""
    scores = masked(s[0] * node.floats[0], source(s, 1), node.floats[1])
    return probabilities(scores, source(s, 2))


@value_of("FLASH_ATTN_EXT")
def attention(node: Any, s: list[Any]) -> Any:
    """Attention of (heads, tokens, d); the result is (tokens, heads, d)."""
    q, k, v = s[0], grouped(s[1], s[0]), grouped(s[2], s[0])
    scale, max_bias, cap = node.floats[:3]
    scores = q @ k.swapaxes(2, 3) * scale
    if cap:
        scores = cap * np.tanh(scores / cap)
    weights = probabilities(masked(scores, source(s, 3), max_bias), source(s, 4))
    return (weights @ v).swapaxes(1, 2)


def product(a: Any, b: Any) -> Any:
    """Return a · b; where one is real, by two real products, which BLAS does faster.

    BLAS wants numbers side by side, which the parts of complex ones are not.
    """
    if np.iscomplexobj(a) and np.iscomplexobj(b):
        return a @ b
    parts = np.ascontiguousarray
    y = np.empty((*a.shape[:-1], b.shape[-1]), np.complex128)
    if np.iscomplexobj(b):
        y.real, y.imag = a @ parts(b.real), a @ parts(b.imag)
    else:
        y.real, y.imag = parts(a.real) @ b, parts(a.imag) @ b
    return y


@value_of("MUL_MAT")
def mul_mat(node: Any, s: list[Any]) -> Any:
    """B · aᵀ; slices of a serve groups of slices of b."""
    return product(s[1], grouped(s[0], s[1]).swapaxes(2, 3))


@value_of("MUL_MAT_ID")
def mul_mat_id(node: Any, s: list[Any]) -> Any:
    """The product of each token with each of its experts' matrices."""
    experts, tokens, ids = s[0][0], s[1][0], s[2][0, 0]
    y = np.zeros(node.shape[1:], np.complex128)
    for expert in np.unique(ids):
        t, used = np.nonzero(ids == expert)
        y[t, used] = product(tokens[t, used % tokens.shape[1]], experts[expert].T)
    return y


@value_of("ADD_ID")
def add_id(node: Any, s: list[Any]) -> Any:
    """Add to each token's expert the row of that expert."""
    return s[0] + s[1][0, 0][s[2][0, 0]]


# ---- places -----------------------------------------------------------------------------------


@value_of("CONT", "CPY", "DUP")
def copied(node: Any, s: list[Any]) -> Any:
    """The same elements in the same order, in another shape or type."""
    return s[0].reshape(node.shape)


@value_of("CONCAT")
def concat(node: Any, s: list[Any]) -> Any:
    """One after the other along a dimension."""
    return np.concatenate(s, 3 - int(node.ints[0]))


@value_of("REPEAT")
def repeat(node: Any, s: list[Any]) -> Any:
    """Repeat the whole."""
    return tiled(s[0], node.shape)


@value_of("PAD")
def pad(node: Any, s: list[Any]) -> Any:
    """Zeros on either side of each dimension."""
    sides = [(int(node.ints[2 * i]), int(node.ints[2 * i + 1])) for i in range(4)]
    return np.pad(s[0], sides[::-1])


@value_of("SUM_ROWS")
def sum_rows(node: Any, s: list[Any]) -> Any:
    """The sum of each row."""
    return s[0].sum(-1, keepdims=True)


@value_of("GET_ROWS")
def get_rows(node: Any, s: list[Any]) -> Any:
    """Rows by index, slice by slice."""
    y = np.empty(node.shape, np.complex128 if s[0].dtype.kind != "i" else np.int64)
    for n3, n2 in np.ndindex(*s[1].shape[1:3]):
        y[n3, n2] = s[0][n3, n2][s[1][0, n3, n2]]
    return y


@value_of("ARGSORT", "TOP_K")
def order(node: Any, s: list[Any]) -> Any:
    """Indices by value; TOP_K gives the largest ones."""
    descending = node.op == "TOP_K" or node.ints[0]
    keys = -s[0].real if descending else s[0].real
    return np.argsort(keys, -1, kind="stable")[..., : node.shape[3]]


@value_of("ROPE", "ROPE_BACK")
def rope(node: Any, s: list[Any]) -> Any:
    """Rotary positions of every kind. Source: ggml_rope_ext, ggml.h; YaRN, Peng et al. 2023."""
    n_dims, mode, n_ctx, first = (int(node.ints[i]) for i in (1, 2, 4, 15))
    base, scale, ext, magnitude, fast, slow = node.floats[5:11]
    x, positions = s[0], s[1].ravel()
    n = n_dims if mode == 24 else n_dims // 2
    pairs = np.arange(n)
    positions, powers = _rope_positions(node, positions, x.shape[1], pairs)
    theta = positions * base ** (-2.0 / n_dims * powers)
    if source(s, 2) is not None:
        theta = theta / s[2].ravel()[:n].real
    angle = scale * theta
    if ext:
        low, high = (
            n_dims * math.log(n_ctx / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (fast, slow)
        )
        low, high = max(0, math.floor(low)), min(n_dims - 1, math.ceil(high))
        own = ext * (1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1))
        angle = angle * (1 - own) + theta * own
        magnitude *= 1 + 0.1 * math.log(1 / scale)
    cos = magnitude * np.cos(angle)[:, None]
    sin = magnitude * np.sin(angle)[:, None] * (-1 if node.op == "ROPE_BACK" else 1)
    one = first + (2 * pairs if mode == 0 else pairs)
    other = one + (1 if mode == 0 else n)
    y = x.copy()
    y[..., one] = x[..., one] * cos - x[..., other] * sin
    y[..., other] = x[..., one] * sin + x[..., other] * cos
    return y


def _rope_positions(node: Any, positions: Any, n_tokens: int, pairs: Any) -> tuple[Any, Any]:
    """Return the position of each token and pair, and the power that each pair's speed has."""
    mode, sections = int(node.ints[2]), node.ints[11:15].astype(int)
    if not mode & 8:
        return positions[:n_tokens, None], pairs
    borders, place = np.cumsum(sections), pairs % sections.sum()
    which = np.searchsorted(borders[:3], place, side="right")
    powers = pairs
    if mode == 24:  # vision: each section begins anew
        powers = place - np.concatenate([[0], borders[:3]])[which]
    if mode == 40:  # interleaved: time, height, width take turns as long as they last
        turn = place % 3
        which = np.where(place < 3 * sections[turn], turn, 3)
    return positions.reshape(4, n_tokens)[which].T, powers


@value_of("SSM_CONV")
def ssm_conv(node: Any, s: list[Any]) -> Any:
    """A causal convolution of each channel over time."""
    x, kernel, n = s[0][0], s[1][0, 0], node.shape[2]
    taps = (x[:, :, j : j + n] * kernel[:, j, None] for j in range(kernel.shape[1]))
    return sum(taps).swapaxes(1, 2)


@value_of("SSM_SCAN")
def ssm_scan(node: Any, s: list[Any]) -> Any:
    """Mamba's selective scan; states follow the output. Source: Gu and Dao 2023, 2024."""
    before, x, dt, decay, b, c, ids = s
    n_seq, n_tokens, n_head, _ = x.shape
    step = softplus(dt.reshape(n_seq, n_tokens, n_head))
    per_group = n_head // b.shape[2]
    b, c, decay = b.repeat(per_group, 2), c.repeat(per_group, 2), decay[0, 0]
    state = before[ids.ravel()[:n_seq]].astype(np.complex128)
    y, states = np.empty(x.shape, np.complex128), [state]
    for t in range(n_tokens):
        state = state * np.exp(step[:, t, :, None] * decay)[:, :, None]
        state = state + (x[:, t] * step[:, t, :, None])[..., None] * b[:, t, :, None]
        y[:, t] = (state * c[:, t, :, None]).sum(-1)
        states.append(state)
    return _with_states(node, y, states)


@value_of("GATED_DELTA_NET")
def gated_delta_net(node: Any, s: list[Any]) -> Any:
    """The gated delta rule; states follow the output. Source: Yang et al. 2024."""
    q, k, v, gate, beta, before = s
    n_seq, n_tokens, n_head, d = v.shape
    q, k = (x.repeat(n_seq // x.shape[0], 0)[:, :, np.arange(n_head) % x.shape[2]] for x in (q, k))
    state = before.reshape(n_seq, n_head, d, d).astype(np.complex128)
    y, states = np.empty(v.shape, np.complex128), [state]
    for t in range(n_tokens):
        state = state * np.exp(gate[:, t, :, None])
        wrong = (v[:, t] - (state * k[:, t, :, None]).sum(-1)) * beta[:, t]
        state = state + wrong[..., None] * k[:, t, :, None]
        y[:, t] = (state * q[:, t, :, None]).sum(-1) / math.sqrt(d)
        states.append(state)
    return _with_states(node, y, states)


def _with_states(node: Any, y: Any, states: list[Any]) -> Any:
    """Return the output followed by the last states, newest first, as the node lays them out."""
    n_states = int(node.ints[0])
    kept = states[::-1][:n_states]
    kept += [np.zeros_like(states[0])] * (n_states - len(kept))
    return np.concatenate([y.ravel(), *(state.ravel() for state in kept)]).reshape(node.shape)
