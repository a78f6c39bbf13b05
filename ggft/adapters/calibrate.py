"""Weights of a whole model written on their types' grids, fitted to what they will read.

Block by block and stage by stage: x are the inputs of a stage in the model that is wanted, y those
that it gets behind the weights that are written already. The weights that make of y what the wanted
ones make of x are the target; error feedback and a sweep over the codes put it on the grid (see
native/calibrate). So each stage makes up for what the ones before it got wrong, and a model of four
bits follows one that is not on its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggft.engine.engine import Engine
from ggft.engine.quants import quantize_rows
from ggft.engine.stages import STAGES, Moments, Stream, can_calibrate
from ggft.gguf.linears import block_of
from ggft.gguf.types import GGMLType

if TYPE_CHECKING:
    from ggft.engine.engine import FloatArray, MicroBatch
    from ggft.engine.stages import ByteArray


@dataclass(frozen=True)
class Recipe:
    """How weights are fitted.

    Attributes:
        pull: How much the target is drawn to the wanted weights where the inputs say little: a
            share of the inputs' mean square that is added to their moments.
        damping: The same for error feedback and sweeps.
        sweeps: Passes over the codes after error feedback.
    """

    pull: float = 0.01
    damping: float = 0.003
    sweeps: int = 1


def can_fit(name: str, tensor_type: GGMLType) -> bool:
    """Say whether a tensor is a linear of a block, and of a type that has a grid."""
    block, target = block_of(name)
    known = {short for linears in STAGES for short in linears}
    return block is not None and target in known and can_calibrate(tensor_type)


@dataclass(frozen=True)
class Fitted:
    """A tensor that is written: its type, its blocks, and the weights that were wanted."""

    name: str
    type: GGMLType
    data: ByteArray
    wanted: FloatArray


class Calibration:
    """The pass through a model.

    Args:
        engine: Holds the model; computes.
        n_layer: Its blocks.
        batches: Micro-batches of tokens.
        used: Which of them the weights are fitted to; the others only come along.
        types: The type of each tensor that is to be written, by full name.
        wanted: Gives a tensor's wanted weights by full name, (C_out, C_in).
        recipe: How.
    """

    def __init__(
        self,
        engine: Engine,
        n_layer: int,
        batches: Sequence[MicroBatch],
        used: Sequence[bool],
        types: Mapping[str, GGMLType],
        wanted: Callable[[str], FloatArray],
        recipe: Recipe | None = None,
    ) -> None:
        self._engine = engine
        self._n_layer = n_layer
        self._batches = batches
        self._used = used
        self._types = types
        self._wanted = wanted
        self._recipe = recipe or Recipe()
        self.wanted_stream = Stream(engine, batches)
        self.written_stream = self.wanted_stream

    def run(self) -> Iterator[Fitted]:
        """Yield the tensors in the order of the blocks; afterwards both streams are at the end."""
        wanted: dict[str, tuple[GGMLType, ByteArray]] = {}
        written: dict[str, tuple[GGMLType, ByteArray]] = {}
        for layer in range(self._n_layer):
            for stage, linears in enumerate(STAGES):
                names = {short: f"blk.{layer}.{short}.weight" for short in linears}
                todo = {short: name for short, name in names.items() if name in self._types}
                moments = self._advance(layer, stage, wanted, written, bool(todo))
                wanted, written = {}, {}
                for short, fitted in self._fit(todo, moments):
                    wanted[short] = GGMLType.F32, fitted.wanted.view("u1")
                    written[short] = fitted.type, fitted.data
                    yield fitted
        self._advance(self._n_layer, 0, wanted, written, False)

    def _advance(
        self,
        layer: int,
        stage: int,
        wanted: Mapping[str, tuple[GGMLType, ByteArray]],
        written: Mapping[str, tuple[GGMLType, ByteArray]],
        gather: bool,
    ) -> Moments | None:
        """Take both streams to a stage; return its moments if they are needed."""
        if written and self.written_stream is self.wanted_stream:
            self.written_stream = self.wanted_stream.fork()
        moments = None
        for number in range(len(self._batches)):
            x = y = self.wanted_stream.advance(layer, stage, number, wanted)
            if self.written_stream is not self.wanted_stream:
                y = self.written_stream.advance(layer, stage, number, written)
            if gather and self._used[number]:
                moments = moments or Moments(x.shape[1], self._engine.settings.threads)
                moments.add(x, y)
        return moments

    def _fit(
        self, todo: Mapping[str, str], moments: Moments | None
    ) -> Iterator[tuple[str, Fitted]]:
        recipe = self._recipe
        wanted = {short: self._wanted(name) for short, name in todo.items()}
        grids = [short for short, name in todo.items() if can_calibrate(self._types[name])]
        targets = dict(wanted)
        if grids and moments is not None:
            moments.factor(recipe.pull)
            targets.update({short: moments.targets(wanted[short]) for short in grids})
            moments.factor(recipe.damping)
        for short, name in todo.items():
            kind = self._types[name]
            if short in grids and moments is not None:
                data, _ = moments.quantize(kind, targets[short], recipe.sweeps)
            else:
                data = quantize_rows(wanted[short], kind)
            yield short, Fitted(name, kind, data, wanted[short])
