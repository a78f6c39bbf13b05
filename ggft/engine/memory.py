"""Predict a run's memory from the model's header, and choose settings that fit the budget.

The parts mirror the buffers that the engine reports: what is predicted here is compared with what
was allocated in the report of every run. N is the number of tokens of a micro-batch; shapes are
those of the supported decoder, float32 unless said otherwise.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ggft.gguf.read import GGUFFile, ModelInfo
from ggft.system.errors import ResourceError
from ggft.system.machine import available_bytes
from ggft.system.text import format_bytes

F32 = 4
# Tokens per micro-batch beyond which larger ones no longer train faster.
MAX_TOKENS = 4096
# Bytes of logits that the engine makes at once; see native/engine/engine.cpp.
LOGIT_BYTES = 96 * 2**20
# The interpreter, NumPy, llama.cpp's libraries and the tokenizer's tables (measured: 70 MiB).
RUNTIME_BYTES = 90 * 2**20
# Measured on two cores of a Zen 3: what a micro-batch costs besides its tokens (dequantizing each
# matrix, mostly), in tokens, and with prepacked weights; and how much more tokens cost, as they
# leave the caches, in micro-batches twice as large. On two of a Zen 4: passes over the block,
# forward being one.
MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_PREPACKED = 40.0, 8.0
SMALL_TOKENS, MORE_PER_DOUBLING = 512, 0.01
PASSES_KEPT, PASSES_RECOMPUTED = 2.0, 2.6
# Values of a row that are packed together, and their bytes, padding included; see RowPacking in
# native/kernels/gemm/token_rows.cpp.
PACKED_VALUES, PACKED_BYTES = 512, 1120
# Bytes of a prepacked weight, for both directions, and of the largest direction that the engine
# keeps; see native/kernels/gemm/prepacked.h.
PREPACKED_BYTES, PREPACKED_MOST = 4.1, 128 * 2**20
# Shares of the weights that are prepacked. These take no more than this, and than all else does.
PREPACKED_SHARES, PREPACKED_LIMIT = (0.0, 0.25, 0.5, 0.75, 1.0), 768 * 2**20
# Of plans that are nearly as fast as the fastest, the smallest is taken.
NEARLY_BEST = 1.01
# Share of the free memory that a run takes unless told otherwise.
SAFE_SHARE = 0.8
WEIGHTS = "weights (mapped)"
PREPACKED = "prepacked weights"
LORA, ADAPTER = "LoRA, gradients, moments", "adapter"


@dataclass(frozen=True)
class Plan:
    """How a run will use the machine; `parts` are predicted bytes by name."""

    n_rows: int
    n_tokens: int
    keep: bool
    prepacked: float
    limits: Limits
    parts: Mapping[str, int]
    n_trained: int

    @property
    def prepacked_bytes(self) -> int:
        """Bytes of weights that are kept as the products read them."""
        return self.parts.get(PREPACKED, 0)

    @property
    def total_bytes(self) -> int:
        """Predicted peak, the mapped weights included."""
        return sum(self.parts.values())

    @property
    def warning(self) -> str | None:
        """What to know of a plan that fits only barely, else None."""
        if self.limits.hold(self.parts):
            return None
        return (
            f"the run needs {format_bytes(self.total_bytes)} and"
            f" {format_bytes(self.limits.free_bytes)} are free: weights may have to be read from"
            " the disk again and again; close other programs"
        )

    def record(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "micro_batch_rows": self.n_rows,
            "row_tokens": self.n_tokens,
            "keep": self.keep,
            "prepacked": self.prepacked,
            "trained_parameters": self.n_trained,
            "budget_bytes": self.limits.budget_bytes,
            "free_bytes": self.limits.free_bytes,
            "total_bytes": self.total_bytes,
            "parts_bytes": dict(self.parts),
        }

    def lines(self) -> list[str]:
        """Return the plan as lines for people."""
        width = max(map(len, self.parts))
        lines = [
            f"micro-batch  {self.n_rows} x {self.n_tokens} tokens, block internals "
            f"{'kept' if self.keep else 'recomputed'}",
            f"trained      {self.n_trained:,} parameters",
        ]
        lines += [f"  {name:<{width}}  {format_bytes(n):>10}" for name, n in self.parts.items()]
        lines.append(f"  {'total':<{width}}  {format_bytes(self.total_bytes):>10}")
        lines.append(f"  {'budget':<{width}}  {format_bytes(self.limits.budget_bytes):>10}")
        return lines


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What memory depends on, besides the micro-batch.

    `fused` says whether the CPU's fused kernels run, or the portable graph that GPUs run; `train`
    whether there is a backward pass.
    """

    model: ModelInfo
    weights_bytes: int
    targets: tuple[str, ...]
    layer_first: int
    layer_last: int
    rank: int
    fused: bool = True
    train: bool = True

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.model.n_head * self.model.n_embd_head

    @property
    def kv(self) -> int:
        """Width of the keys."""
        return self.model.n_head_kv * self.model.n_embd_head

    @property
    def n_blocks(self) -> int:
        """Blocks that the backward pass visits."""
        return self.model.n_layer - self.layer_first if self.train else 0

    def n_trained(self) -> int:
        """Return the number of LoRA parameters."""
        m = self.model
        widths = {
            "attn_q": m.n_embd + self.q,
            "attn_k": m.n_embd + self.kv,
            "attn_v": m.n_embd + self.kv,
            "attn_output": self.q + m.n_embd,
            "ffn_gate": m.n_embd + m.n_ff,
            "ffn_up": m.n_embd + m.n_ff,
            "ffn_down": m.n_ff + m.n_embd,
        }
        per_block = sum(widths[name] for name in self.targets)
        return (self.layer_last - self.layer_first) * per_block * self.rank

    def prepacked_bytes(self) -> int:
        """Return the bytes of all weights that can be prepacked."""
        if not self.fused:
            return 0
        m = self.model
        block = (self.q, self.kv, self.kv, self.q, m.n_ff, m.n_ff, m.n_ff)
        sizes = [(width * m.n_embd * PREPACKED_BYTES, m.n_layer) for width in block]
        sizes.append((m.n_vocab * m.n_embd * PREPACKED_BYTES, 1))
        directions = 2 if self.train else 1
        return (
            sum(int(size) * n for size, n in sizes if size / 2 <= PREPACKED_MOST) // 2 * directions
        )


def predict(
    shape: Shape, n_rows: int, n_tokens: int, *, keep: bool, prepacked: float = 0.0
) -> dict[str, int]:
    """Return the predicted bytes by part; `prepacked` is the share of the weights that are."""
    m, n = shape.model, n_rows * n_tokens
    # Queries, keys, values, attention with a number per head, x between, gate and up.
    internals = 2 * shape.q + 2 * shape.kv + m.n_head + m.n_embd + 2 * m.n_ff
    # The input of every block that is trained, the last one's output, and a gradient.
    saved = (shape.n_blocks + 1 + shape.train) * n * m.n_embd * F32
    # Values, gradients and two moments; or values in 16 bits, and a layer of them as float32.
    lora = 4 * F32 if shape.train else F32 // 2
    if keep:
        saved += shape.n_blocks * n * internals * F32
    parts = {
        WEIGHTS: shape.weights_bytes,
        LORA if shape.train else ADAPTER: lora * shape.n_trained(),
        "saved for the backward pass": saved,
        "scratch": _scratch(shape, n_rows, n_tokens, 0 if keep else internals),
        "program": RUNTIME_BYTES,
    }
    if prepacked:
        parts[PREPACKED] = int(prepacked * shape.prepacked_bytes())
    return parts


def _scratch(shape: Shape, n_rows: int, n_tokens: int, internals: int) -> int:
    """Return the bytes of the largest graph: a block's backward pass, or a chunk of the loss.

    The factors are upper bounds of what ggml's allocator needed over a range of shapes.
    """
    m, n = shape.model, n_rows * n_tokens
    again = internals + m.n_ff // 2 if internals else 0
    block = n * (again + 2 * m.n_ff + 2 * max(m.n_embd, shape.q) + 128) * F32
    chunk = min(n, max(16, LOGIT_BYTES // (m.n_vocab * F32)))
    head = chunk * (m.n_vocab + 4 * m.n_embd) * F32
    if shape.fused:
        block += _packed(m.n_ff, n) + _packed(m.n_embd, n)
        return max(block, head + _packed(m.n_vocab, chunk))
    # The portable graph holds attention's probabilities and gradients, dequantized matrices, twice
    # the logits, and a mask.
    matrix = m.n_embd * max(m.n_ff, shape.q)
    block += n * (3 * m.n_head * n_tokens + shape.q) * F32 + 2 * matrix * F32
    head = head * 2 + 3 * m.n_vocab * m.n_embd * F32 // 2
    mask = 2 * n * n_tokens
    return max(block, head) + mask + 8 * 2**20


def _packed(n_values: int, n_tokens: int) -> int:
    """Return the bytes of rows packed for products of 16-bit integers; other products need none."""
    return n_tokens * (-(-n_values // PACKED_VALUES) + 1) * PACKED_BYTES


@dataclass(frozen=True)
class Limits:
    """What memory there is.

    Attributes:
        budget_bytes: What the process may take.
        free_bytes: What was free on the host.
        total_bytes: What the host has.
        device_bytes: What is free on a GPU; None for the CPU.
        unified: Whether the GPU's memory is the host's.
        given: Whether the user gave the budget.
    """

    budget_bytes: int
    free_bytes: int
    total_bytes: int
    device_bytes: int | None = None
    unified: bool = True
    given: bool = False

    @staticmethod
    def of(device: Mapping[str, Any], memory_bytes: int | None) -> Limits:
        """Return the limits on this machine and device; the budget is a safe share if not given."""
        free = available_bytes()
        gpu = device["type"] != "cpu"
        return Limits(
            budget_bytes=int(free * SAFE_SHARE) if memory_bytes is None else memory_bytes,
            free_bytes=free,
            total_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            device_bytes=int(device["memory_free"]) if gpu else None,
            unified=not gpu or bool(device["host_pointer"]),
            given=memory_bytes is not None,
        )

    def hold(self, parts: Mapping[str, int]) -> bool:
        """Return whether predicted parts fit the device and the budget."""
        total, program = sum(parts.values()), parts["program"]
        if self.device_bytes is not None and total - program > SAFE_SHARE * self.device_bytes:
            return False
        return (total if self.unified else program) <= self.budget_bytes

    def hold_barely(self, parts: Mapping[str, int]) -> bool:
        """Return whether parts fit because mapped weights may leave memory and be read again."""
        if self.given or self.device_bytes is not None:
            return False
        others = sum(parts.values()) - parts[WEIGHTS]
        return others <= self.budget_bytes and sum(parts.values()) <= SAFE_SHARE * self.total_bytes


def make_plan(
    shape: Shape,
    limits: Limits,
    *,
    n_tokens: int,
    max_rows: int,
    joined_tokens: int | None = None,
    size: tuple[int, int] | None = None,
    keep: bool | None = None,
) -> Plan:
    """Choose the size of micro-batches and whether internals are kept: the fastest that fits.

    Args:
        shape: What memory depends on.
        limits: What memory there is.
        n_tokens: Tokens of the longest row.
        max_rows: Rows of the largest optimizer step; more are never needed.
        joined_tokens: Tokens of the largest step if its rows may be laid end to end as one, which
            pads nothing; None where each stays a row of its own.
        size: Rows and tokens per row of a micro-batch where they are given, or None.
        keep: Given by the user, or None.

    Raises:
        ResourceError: not even one row fits; says what would.
    """
    step_tokens = joined_tokens or max_rows * n_tokens
    sizes = [size] if size else _sizes(n_tokens, step_tokens, joined_tokens is not None)
    plans = [
        Plan(
            rows, tokens, keeps, share, limits,
            predict(shape, rows, tokens, keep=keeps, prepacked=share), shape.n_trained(),
        )
        for rows, tokens in sizes
        for keeps in ((True, False) if keep is None else (keep,))
        for share in (PREPACKED_SHARES if shape.prepacked_bytes() else (0.0,))
    ]  # fmt: skip
    plans = [p for p in plans if p.prepacked_bytes <= min(PREPACKED_LIMIT, p.total_bytes / 2)]
    fitting = [plan for plan in plans if limits.hold(plan.parts)]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.total_bytes)
        if limits.hold_barely(smallest.parts):
            return smallest
        raise _too_large(shape, n_tokens, smallest)
    best = min(_cost(plan, step_tokens) for plan in fitting)
    fast = [plan for plan in fitting if _cost(plan, step_tokens) <= best * NEARLY_BEST]
    return min(fast, key=lambda plan: (plan.total_bytes, -plan.n_rows * plan.n_tokens))


def _sizes(n_tokens: int, step_tokens: int, joined: bool) -> list[tuple[int, int]]:
    """Return the rows and tokens per row that micro-batches of a step may have."""
    most = max(1, min(-(-step_tokens // n_tokens), MAX_TOKENS // n_tokens))
    if joined:
        return [(1, max(n_tokens, min(n * n_tokens, step_tokens))) for n in range(1, most + 1)]
    return [(n, n_tokens) for n in range(1, most + 1)]


def _cost(plan: Plan, step_tokens: int) -> float:
    """Return the relative time of a step."""
    tokens = plan.n_rows * plan.n_tokens
    passes = PASSES_KEPT if plan.keep else PASSES_RECOMPUTED
    token = 1 + MORE_PER_DOUBLING * math.log2(max(tokens / SMALL_TOKENS, 1))
    saved = plan.prepacked * (MICRO_BATCH_TOKENS - MICRO_BATCH_TOKENS_PREPACKED)
    micro_batches = -(-step_tokens // tokens)
    return passes * (token * step_tokens + (MICRO_BATCH_TOKENS - saved) * micro_batches)


def _too_large(shape: Shape, n_tokens: int, smallest: Plan) -> ResourceError:
    limits = smallest.limits
    hint = f"use a smaller model, close other programs, or give --memory {_flag(smallest)}"
    shorter = n_tokens // 2
    while shorter >= 8:
        if limits.hold(predict(shape, 1, shorter, keep=False)):
            hint = f"use --max-length {shorter}, a smaller model, or --memory {_flag(smallest)}"
            break
        shorter //= 2
    expected = f"at most {format_bytes(limits.budget_bytes)}"
    expected += ", as --memory says" if limits.given else f", {SAFE_SHARE:.0%} of what is free"
    if limits.device_bytes is not None:
        expected += f"; {format_bytes(int(SAFE_SHARE * limits.device_bytes))} on the device"
    return ResourceError(
        f"rows of {n_tokens} tokens would not fit into memory",
        found=f"{format_bytes(smallest.total_bytes)} needed",
        expected=expected,
        hint=hint,
    )


def _flag(plan: Plan) -> str:
    return f"{-(-plan.total_bytes // 2**20)}M"


def weights_bytes(file: GGUFFile) -> int:
    """Return the bytes of a model's tensors."""
    return sum(tensor.n_bytes for tensor in file.tensors.values())
