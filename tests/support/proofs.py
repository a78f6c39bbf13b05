"""What has to hold for an architecture to be called trainable, measured on a tiny model of it.

The logits are llama.cpp's own; the gradient is that of a reference without gradient rules (`tape`)
and the slope of llama.cpp's own loss with the adapter loaded; packing, recomputation, twenty steps
and the saved adapter do what they should.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings
from ggft.gguf.linears import matrices_of_blocks
from ggft.gguf.read import read_gguf
from tests.support.architectures import Tiny, metadata, write_tiny
from tests.support.engines import make_batch, relative, set_random_lora
from tests.support.models import Tensor, write_gguf
from tests.support.own_llama import OwnLlama
from tests.support.reference import Array
from tests.support.tape import Tape, nats, record, slope

N_TOKENS = 24  # three windows of a hard model
RANK, ALPHA = 4, 8.0
LEARNING_RATE = 1e-2

# What is demanded of each figure of a proof.
BARS = {
    "forward": 1e-8,
    "gradient": 1e-4,
    "slopes": 1e-2,
    "packed": 1e-4,
    "kept": 0.0,
    "saved": 5e-3,
    "fell": 0.9,
}


@dataclass(frozen=True)
class Proof:
    """Figures of one tiny model; each is to be below its bar.

    Attributes:
        forward: NMSE of the logits against llama.cpp's, the adapter applied in both.
        gradient: Largest distance of an adapter's matrix's gradient from the reference's, relative.
        slopes: The same of the gradient along a direction from the slope of llama.cpp's own loss.
        kept: Largest difference between the gradient when internals are kept and when they are
            recomputed.
        packed: Distance of two packed examples' gradient from the sum of each alone, relative.
        saved: Difference between the engine's loss and llama.cpp's with the saved adapter.
        fell: Loss after twenty steps, of what it was.
    """

    forward: float
    gradient: float
    slopes: float
    kept: float
    packed: float
    saved: float
    fell: float

    def failures(self) -> dict[str, float]:
        """Return the figures that are not below their bars."""
        return {name: x for name, x in vars(self).items() if not x <= BARS[name]}


def open_traced(path: Path, **changes: Any) -> Engine:
    """Open the traced engine on every matrix of every block: F32 path, one thread."""
    file = read_gguf(path)
    n_layer = file.get(f"{file.architecture}.block_count")
    assert isinstance(n_layer, int)
    defaults: dict[str, Any] = {
        "paths": [str(path)],
        "traced": True,
        "targets": list(matrices_of_blocks(file.tensors.values())),
        "layer_first": 0,
        "layer_last": n_layer,
        "rank": RANK,
        "alpha": ALPHA,
        "precision": "f32",
        "device": "cpu",
        "n_rows": 1,
        "n_tokens": N_TOKENS,
    }
    return Engine(EngineSettings(**{**defaults, **changes}))


def write_lora_values(path: Path, arch: str, values: Mapping[str, Array]) -> Path:
    """Write an adapter of these matrices; return its path."""
    head = {
        "general.architecture": arch, "general.type": "adapter",
        "adapter.type": "lora", "adapter.lora.alpha": ALPHA,
    }  # fmt: skip
    tensors = [
        Tensor(name, "F32", value.shape, value.astype(np.float32).tobytes())
        for name, value in values.items()
    ]
    write_gguf(path, head, tensors)
    return path


def one_example(n_vocab: int) -> dict[str, Array]:
    """Return a batch of one text, every token but the first predicted."""
    batch = make_batch(n_vocab, ((N_TOKENS,),), N_TOKENS, trained=1.0)
    batch["targets"][0, :-1] = batch["tokens"][0, 1:]
    batch["targets"][0, -1] = -1
    return batch


def prove(tiny: Tiny, folder: Path, *, brief: bool = False) -> Proof:
    """Measure everything of a tiny model.

    Args:
        tiny: The model; its matrices in F32.
        folder: For its files.
        brief: Whether one direction is enough where there are three or four otherwise.

    Raises:
        InputError: The architecture cannot be trained.
    """
    path = write_tiny(folder / "model.gguf", tiny)
    n_vocab = len(metadata(tiny)["tokenizer.ggml.tokens"])
    batch = one_example(n_vocab)
    tokens, targets = batch["tokens"][0].tolist(), batch["targets"][0].tolist()
    with open_traced(path) as engine, OwnLlama(path) as own:
        set_random_lora(engine)
        loss, _ = engine.forward_backward(batch, 0)
        gradient, values = engine.get_all("grad"), engine.get_all()
        adapter = write_lora_values(folder / "adapter.gguf", tiny.arch, values)
        want = own.logits(tokens, adapter)
        own_loss = float(nats(want.astype(complex), targets).real)
        got = engine.logits(batch)[0].astype(np.float64)
        tape = record(path, tokens, adapter=adapter)
        return Proof(
            forward=relative(got, want) ** 2,
            gradient=_against_tape(tape, values, gradient, targets, 1 if brief else 3),
            slopes=_against_own(
                own, folder / "moved.gguf", tape, batch, values, gradient, 1 if brief else 4
            ),
            kept=_kept(path, batch, values, gradient),
            packed=_packed(engine, n_vocab),
            saved=abs(loss - own_loss) / own_loss,
            fell=_twenty_steps(engine, batch),
        )


def _against_tape(
    tape: Tape,
    values: dict[str, Array],
    gradient: dict[str, Array],
    targets: list[int],
    n_ways: int,
) -> float:
    """Return how far the gradient is from the reference's, relative, over all matrices.

    The difference of the two along a direction of standard normal numbers is, as a root mean
    square, the norm of their difference; each matrix's share of the direction is divided by its
    gradient's norm, so that none hides behind another. Those whose gradient is nothing but rounding
    are measured by the largest of all.
    """
    rng = np.random.default_rng(7)
    largest = max(float(np.linalg.norm(g)) for g in gradient.values())
    sizes = {name: max(float(np.linalg.norm(g)), 1e-3 * largest) for name, g in gradient.items()}
    worst = 0.0
    for _ in range(n_ways):
        way = {name: rng.normal(size=g.shape) / sizes[name] for name, g in gradient.items()}
        got = sum(float((way[name] * g).sum()) for name, g in gradient.items())
        worst = max(worst, abs(got - slope(tape, values, way, targets)))
    return worst / float(np.sqrt(len(gradient)))


def _against_own(
    own: OwnLlama,
    scratch: Path,
    tape: Tape,
    batch: dict[str, Array],
    values: dict[str, Array],
    gradient: dict[str, Array],
    n_ways: int,
) -> float:
    """Return how far the gradient is from the slope of llama.cpp's own loss along some directions.

    A direction is the gradient with a random half of its numbers set to zero: along it the loss
    changes by far more than its rounding. Where the step is short enough for rounding, which GELU's
    table of 16-bit values in llama.cpp is too, a longer one is tried; where the loss bends or a
    token's experts change within the step, it is compared with the reference's at the same ends.
    """
    rng = np.random.default_rng(11)
    tokens, targets = batch["tokens"][0].tolist(), batch["targets"][0].tolist()

    def own_loss(moved: dict[str, Array]) -> float:
        path = write_lora_values(scratch, tape.architecture, moved)
        return float(nats(own.logits(tokens, path).astype(complex), targets).real)

    def difference(loss: Callable[[dict[str, Array]], float], step: float) -> float:
        ends = [{n: v + np.float32(s * step) * way[n] for n, v in values.items()} for s in (1, -1)]
        return (loss(ends[0]) - loss(ends[1])) / (2 * step)

    worst, here = 0.0, own_loss(values)
    for _ in range(n_ways):
        way = {name: g * rng.integers(0, 2, g.shape) for name, g in gradient.items()}
        want = sum(float((way[name] * g).sum()) for name, g in gradient.items())
        steps = [size * here / want for size in (1e-3, 5e-3)]
        got = [difference(own_loss, step) for step in steps]
        error = min(abs(x / want - 1) for x in got)
        if error > BARS["slopes"] / 2:
            bent = difference(lambda v: float(nats(tape.logits(v), targets).real), steps[0])
            error = min(error, abs(got[0] / bent - 1))
        worst = max(worst, error)
    return worst


def _kept(
    path: Path, batch: dict[str, Array], values: dict[str, Array], gradient: dict[str, Array]
) -> float:
    """Return how far the gradient is from that of an engine that keeps internals: not at all."""
    with open_traced(path, keep=True) as engine:
        engine.set_all("value", values)
        engine.forward_backward(batch, 0)
        return max(float(np.abs(engine.get(n, "grad") - g).max()) for n, g in gradient.items())


def _packed(engine: Engine, n_vocab: int) -> float:
    """Return how far two packed examples are from the sum of each alone."""
    whole = make_batch(n_vocab, ((15, 9),), N_TOKENS)
    engine.zero_grad()
    engine.forward_backward(whole, 0)
    want = engine.get_all("grad")
    engine.zero_grad()
    for part in (slice(0, 15), slice(15, 24)):
        engine.forward_backward({key: rows[:, part] for key, rows in whole.items()}, 0)
    got = engine.get_all("grad")
    return relative(*(np.concatenate([g[n].ravel() for n in want]) for g in (got, want)))


def _twenty_steps(engine: Engine, batch: dict[str, Array]) -> float:
    """Return the loss after twenty steps as a share of the first."""
    engine.zero_grad()
    engine.init_lora(seed=1)
    losses = []
    for _ in range(21):
        loss, count = engine.forward_backward(batch, 0)
        engine.optimizer_step(LEARNING_RATE, count)
        losses.append(loss)
    return losses[-1] / losses[0]
