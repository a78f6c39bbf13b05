"""Predict a run's memory from the model's header, and choose settings that fit the budget.

The native engine says what it takes, by the code that allocates it; added are the program itself
and the choice among micro-batches. What is predicted here is compared with what was allocated in
the report of every run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ggft.engine.forecast import Forecast
from ggft.engine.settings import EngineSettings
from ggft.gguf.read import ModelInfo
from ggft.system.errors import ResourceError
from ggft.system.machine import available_bytes
from ggft.system.text import format_bytes

# Tokens per micro-batch beyond which larger ones no longer train faster.
MAX_TOKENS = 4096
# The interpreter, NumPy, llama.cpp's libraries, the tokenizer's tables and the kernels' working
# memory; measured by bench/memory.py.
RUNTIME_BYTES = 100 * 2**20
# The model in llama.cpp, which builds its graph: context and graph, and its vocabulary (measured).
TRACE_BYTES, TRACE_BYTES_PER_TOKEN = 16 * 2**20, 250
# Measured on two cores of a Zen 3: what a micro-batch costs besides its tokens (dequantizing each
# matrix, mostly), in tokens, and with prepacked weights; and how much more tokens cost, as they
# leave the caches, in micro-batches twice as large. On two of a Zen 4: passes over the block,
# forward being one.
MICRO_BATCH_TOKENS, MICRO_BATCH_TOKENS_PREPACKED = 40.0, 8.0
SMALL_TOKENS, MORE_PER_DOUBLING = 512, 0.01
PASSES_KEPT, PASSES_RECOMPUTED = 2.0, 2.6
# Shares of the weights that are prepacked. These take no more than this, and than all else does.
PREPACKED_SHARES, PREPACKED_LIMIT = (0.0, 0.25, 0.5, 0.75, 1.0), 768 * 2**20
# Beside its file a run on llama.cpp's own graph takes no more than this for speed alone.
TRACED_LIMIT = 400 * 10**6
# The engine takes memory for them in pages of this size.
LARGE_PAGE = 2 * 2**20
# Of plans that are nearly as fast as the fastest, the smallest is taken.
NEARLY_BEST = 1.01
# Share of the free memory that a run takes unless told otherwise.
SAFE_SHARE = 0.8
WEIGHTS, PROGRAM = "weights (mapped)", "program"
LORA, ADAPTER = "LoRA, gradients, moments", "adapter"
SAVED, SCRATCH, PREPACKED = "saved for the backward pass", "scratch", "prepacked weights"
BUFFERS = {
    WEIGHTS: ("weights",),
    LORA: ("lora",),
    ADAPTER: ("lora",),
    SAVED: ("saved",),
    SCRATCH: ("compute", "inputs"),
    PREPACKED: ("prepacked",),
}
"""The engine's buffers that a part of a plan consists of; what the program takes is none."""


@dataclass(frozen=True)
class Plan:
    """How a run will use the machine; `parts` are predicted bytes by name."""

    n_rows: int
    n_tokens: int
    keep: bool
    prepacked: float
    limits: Limits
    parts: Mapping[str, int]
    shape: Shape = field(repr=False)

    @property
    def n_trained(self) -> int:
        """Number of LoRA parameters."""
        return self.shape.n_trained

    @property
    def prepacked_bytes(self) -> int:
        """Bytes of weights that are kept as the products read them."""
        return self.parts.get(PREPACKED, 0)

    @property
    def settings(self) -> EngineSettings:
        """What the engine is opened with."""
        return replace(
            self.shape.settings,
            n_rows=self.n_rows,
            n_tokens=self.n_tokens,
            keep=self.keep,
            prepacked_bytes=self.shape.prepacked_limit(self.prepacked),
        )

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

    Attributes:
        model: Hyper-parameters.
        settings: What the engine is to be opened with; those of the micro-batch are of no matter.
    """

    model: ModelInfo
    settings: EngineSettings

    @cached_property
    def _forecast(self) -> Forecast:
        return Forecast(self.settings)

    @cached_property
    def _known(self) -> dict[tuple[int, int, bool, int], dict[str, int]]:
        return {}

    @property
    def fused(self) -> bool:
        """Whether the CPU's fused kernels run, or the portable graph that GPUs run."""
        return self._forecast.kernels == "fused"

    @property
    def n_trained(self) -> int:
        """Number of LoRA parameters."""
        return self._forecast.n_parameters

    @property
    def ignored(self) -> list[str]:
        """Matrices among the targets that llama.cpp never applies an adapter to."""
        return self._forecast.ignored

    def close(self) -> None:
        """Let go of the model; what is known of it stays."""
        self._forecast.close()

    def prepacked_limit(self, share: float) -> int:
        """Return the bytes that a share of the weights takes when it is prepacked."""
        return -(-int(share * self._forecast.prepackable_bytes) // LARGE_PAGE) * LARGE_PAGE

    def buffers(
        self, n_rows: int, n_tokens: int, *, keep: bool, prepacked_bytes: int = 0
    ) -> dict[str, int]:
        """Return the bytes of the engine's buffers by name, as the engine will report them."""
        key = (n_rows, n_tokens, keep, prepacked_bytes)
        if key not in self._known:
            self._known[key] = self._forecast.buffers(*key)
        return self._known[key]


def predict(
    shape: Shape, n_rows: int, n_tokens: int, *, keep: bool, prepacked: float = 0.0
) -> dict[str, int]:
    """Return the predicted bytes by part; `prepacked` is the share of the weights that are."""
    buffers = shape.buffers(n_rows, n_tokens, keep=keep)
    parts = {
        part: sum(buffers[name] for name in BUFFERS[part])
        for part in (WEIGHTS, LORA if shape.settings.train else ADAPTER, SAVED, SCRATCH)
    }
    parts[PROGRAM] = RUNTIME_BYTES
    if shape.settings.traced:
        parts[PROGRAM] += TRACE_BYTES + shape.model.n_vocab * TRACE_BYTES_PER_TOKEN
    if prepacked:
        # The same whatever the micro-batch.
        limit = shape.prepacked_limit(prepacked)
        parts[PREPACKED] = shape.buffers(1, 2, keep=False, prepacked_bytes=limit)["prepacked"]
    return parts


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
        total, program = sum(parts.values()), parts[PROGRAM]
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
            predict(shape, rows, tokens, keep=keeps, prepacked=share), shape,
        )
        for rows, tokens in sizes
        for keeps in ((True, False) if keep is None else (keep,))
        for share in PREPACKED_SHARES
        if not share or 0 < shape.prepacked_limit(share) <= PREPACKED_LIMIT
    ]  # fmt: skip
    plans = [plan for plan in plans if is_modest(plan, keep_is_given=keep is not None)]
    fitting = [plan for plan in plans if limits.hold(plan.parts)]
    if not fitting:
        smallest = min(plans, key=lambda plan: plan.total_bytes)
        if limits.hold_barely(smallest.parts):
            return smallest
        raise _too_large(shape, n_tokens, smallest)
    best = min(_cost(plan, step_tokens) for plan in fitting)
    fast = [plan for plan in fitting if _cost(plan, step_tokens) <= best * NEARLY_BEST]
    return min(fast, key=lambda plan: (plan.total_bytes, -plan.n_rows * plan.n_tokens))


def is_modest(plan: Plan, *, keep_is_given: bool = False) -> bool:
    """Return whether what a plan takes for the sake of speed is within bounds."""
    beside = plan.total_bytes - plan.parts[WEIGHTS]
    for_speed = plan.prepacked or (plan.keep and not keep_is_given)
    if for_speed and plan.shape.settings.traced and beside > TRACED_LIMIT:
        return False
    return plan.prepacked_bytes <= plan.total_bytes / 2


def _sizes(n_tokens: int, step_tokens: int, joined: bool) -> list[tuple[int, int]]:
    """Return the rows and tokens per row that micro-batches of a step may have.

    Of sizes that divide a step into as many micro-batches, only the smallest is worth a thought.
    """
    most = max(1, min(-(-step_tokens // n_tokens), MAX_TOKENS // n_tokens))
    by_count: dict[int, tuple[int, int]] = {}
    for n in range(most, 0, -1):
        size = (1, max(n_tokens, min(n * n_tokens, step_tokens))) if joined else (n, n_tokens)
        by_count[-(-step_tokens // (size[0] * size[1]))] = size
    return list(by_count.values())


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
