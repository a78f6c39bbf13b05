"""What the linears of a model read, block by block, and weights that are fitted to it.

A *stage* is the linears of a block that read one input; a block has four. A stream of tokens goes
from stage to stage, and what lies in between is computed with the model's weights or with given
ones: so whoever decides the weights of a stage sees what they will read before they are decided.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ggft.engine.engine import Engine, load_native, native_errors
from ggft.gguf.types import GGMLType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ggft.engine.engine import FloatArray, MicroBatch

    ByteArray = npt.NDArray[np.uint8]

# By the name of the linear in its block, `attn_q` of `blk.0.attn_q.weight`.
Weights = Mapping[str, "tuple[GGMLType, ByteArray]"]
STAGES = (
    ("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",),
)  # fmt: skip


class Stream:
    """Micro-batches on their way through the blocks."""

    def __init__(self, engine: Engine, batches: Sequence[MicroBatch]) -> None:
        self._engine = engine
        self._batches = batches
        self._residuals = [engine.embed(batch) for batch in batches]
        self._inputs = [residual[:, :0] for residual in self._residuals]

    def advance(self, layer: int, stage: int, number: int, given: Weights) -> FloatArray:
        """Take a micro-batch to a stage and return the stage's input, (B*T, C_in).

        Stages are visited in order, each once. `given` are weights of the stage before.
        """
        self._residuals[number], self._inputs[number] = self._engine.advance(
            layer, stage, self._batches[number],
            {name: (int(kind), data) for name, (kind, data) in given.items()},
            self._inputs[number], self._residuals[number],
        )  # fmt: skip
        return self._inputs[number]

    def loss(self, number: int) -> tuple[float, int]:
        """Return (summed nats, trained tokens) of a micro-batch that is behind the last block."""
        return self._engine.loss_of(self._batches[number], self._residuals[number])

    def fork(self) -> Stream:
        """Return a stream at the same place that goes its own way."""
        other = copy.copy(self)
        other._residuals, other._inputs = list(self._residuals), list(self._inputs)
        return other


def can_calibrate(tensor_type: GGMLType) -> bool:
    """Say whether `Moments.quantize` can write a type."""
    return bool(load_native().can_calibrate(int(tensor_type)))


class Moments:
    """Second moments of a stage's inputs, and weights fitted to them.

    `x` are the inputs in the model that is wanted, `y` those that the written model gives.
    """

    def __init__(self, n_inputs: int, threads: int) -> None:
        self._native = load_native()
        with native_errors(self._native):
            self._moments: Any = self._native.Moments(n_inputs, threads)

    def add(self, x: FloatArray, y: FloatArray) -> None:
        """Add tokens, (N, C_in) each."""
        with native_errors(self._native):
            self._moments.add(x, y)

    def factor(self, damping: float) -> float:
        """Factor the moments, their diagonal raised by a share of its mean; return the share.

        Raises:
            NumericError: the inputs are not finite.
        """
        with native_errors(self._native):
            return float(self._moments.factor(damping))

    def targets(self, weights: FloatArray) -> FloatArray:
        """Return the weights (C_out, C_in) that make of `y` what `weights` make of `x`."""
        with native_errors(self._native):
            return self._moments.targets(weights)  # type: ignore[no-any-return]

    def quantize(
        self, tensor_type: GGMLType, targets: FloatArray, sweeps: int
    ) -> tuple[ByteArray, float]:
        """Return rows of blocks, and the squared error of their outputs, summed over rows."""
        with native_errors(self._native):
            data, _, error = self._moments.quantize(int(tensor_type), targets, sweeps)
        return data, float(error)

    def cancel(self) -> None:
        """Stop the running call; callable from any thread."""
        self._moments.cancel()
