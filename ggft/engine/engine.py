"""The native engine, seen from Python: the only importer of `ggft._native`.

The engine holds the frozen base weights, the LoRA matrices with their gradients and AdamW moments,
and the graphs. It knows nothing of files other than the GGUF, of data, schedules or progress. This
module adds what a caller can get wrong: names, shapes, types, and errors with exit codes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ggft.engine.settings import EngineSettings
from ggft.system.errors import GgftError, InputError, NumericError, ResourceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ggft.data.batches import Batch

    IntArray = npt.NDArray[np.int32]
    FloatArray = npt.NDArray[np.float32]
    MicroBatch = Batch | Mapping[str, npt.NDArray[Any]]


class Cancelled(Exception):  # noqa: N818
    """A call was stopped by `cancel`; gradients are incomplete, everything else is untouched."""


def load_native() -> Any:
    """Import the native module.

    Raises:
        ResourceError: it was not built, or it does not fit the installed llama-cpp-python.
        InputError: GGFT_ISA names no instruction set that this machine runs.
    """
    try:
        from ggft import _native
    except ImportError as error:
        raise ResourceError(
            f"the native engine cannot be loaded: {error}",
            hint="build it for the installed llama-cpp-python with `make setup`",
        ) from None
    with native_errors(_native):
        _native.kernels()
    return _native


def find_device(name: str) -> dict[str, Any]:
    """Return what ggml says of the device that the engine would open.

    Raises:
        ResourceError: there is no such device.
    """
    devices: list[dict[str, Any]] = load_native().devices()
    if name == "auto":
        for kind in ("gpu", "igpu", "cpu"):
            for device in devices:
                if device["type"] == kind and device["trains"]:
                    return device
    wanted = name.lower()
    for device in devices:
        own = device["name"].lower()
        # Names are a backend and a number: Vulkan0; Metal's is called MTL0 in places.
        backend = own.rstrip("0123456789")
        if wanted in (own, backend) or (wanted == "metal" and backend == "mtl"):
            return device
    raise ResourceError(
        "there is no such device", found=repr(name),
        expected=", ".join(["auto", *(device["name"] for device in devices)]),
        hint="name one of these with --device",
    )  # fmt: skip


_MEMORY_HINT = "give less with --memory, or use a shorter --max-length or a smaller model"


@contextlib.contextmanager
def native_errors(native: Any) -> Iterator[None]:
    """Turn native errors into this project's, with their exit codes."""
    kinds: dict[str, type[GgftError]] = {
        "input": InputError,
        "resource": ResourceError,
        "numeric": NumericError,
    }
    try:
        yield
    except native.Error as error:
        kind, message = error.args
        if kind == "cancelled":
            raise Cancelled(message) from None
        hint = _MEMORY_HINT if kind == "resource" and "memory" in message else None
        raise kinds.get(kind, ResourceError)(message, hint=hint) from None
    except MemoryError:
        raise ResourceError("out of memory", hint=_MEMORY_HINT) from None


def kernel_set() -> dict[str, Any]:
    """Return the kernels' instruction set, what it multiplies fastest, and all that run here."""
    return dict(load_native().kernels())


class Engine:
    """Forward, backward and optimizer over one model. Shapes are (B, T); ids are int32."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self._native = load_native()
        native = self._native.TracedEngine if settings.traced else self._native.Engine
        with native_errors(self._native):
            self._engine: Any = native(settings.for_native())
        self._parameters: dict[str, tuple[int, int]] = {
            name: (int(shape[0]), int(shape[1])) for name, shape in self._engine.parameters()
        }

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of the LoRA matrices: lora_a (R, C_in), lora_b (C_out, R)."""
        return dict(self._parameters)

    @property
    def step(self) -> int:
        """Optimizer steps done, AdamW's t."""
        return int(self._engine.step)

    @step.setter
    def step(self, value: int) -> None:
        self._engine.step = value

    def forward_backward(self, batch: MicroBatch, seed: int) -> tuple[float, int]:
        """Add the gradient of the summed loss of a micro-batch.

        `seed` draws the dropout masks, 0 is no dropout. Returns (summed nats, trained tokens).
        Where the batch has `weights`, float32 of any sign, each target's loss counts by its own.

        Raises:
            NumericError: NaN or infinity, with the tensor's name.
            Cancelled: `cancel` was called.
        """
        given = *self._check(batch), seed, batch.get("weights")
        with self._naming_the_tensor():
            nats, count = self._engine.forward_backward(*given)
            if not math.isfinite(nats):
                raise NumericError("the loss is not finite", found=nats)
        return float(nats), int(count)

    @contextlib.contextmanager
    def _naming_the_tensor(self) -> Iterator[None]:
        """Turn native errors into ours; say which matrix is not finite, where the loss is not."""
        try:
            with native_errors(self._native):
                yield
        except NumericError as error:
            raise NumericError(f"{error.message}; {self._first_not_finite()}") from None

    def _first_not_finite(self) -> str:
        import numpy as np

        for name in self._parameters:
            if not np.isfinite(self.get(name)).all():
                return f"{name} holds a value that is not finite"
        return "the adapter's matrices are finite, so an activation or a base weight is not"

    def evaluate(self, batch: MicroBatch) -> tuple[float, int]:
        """Return what `forward_backward` does, without dropout and gradient; raise its errors."""
        with self._naming_the_tensor():
            nats, count = self._engine.evaluate(*self._check(batch), batch.get("weights"))
        return float(nats), int(count)

    def token_nats(self, batch: MicroBatch) -> FloatArray:
        """Return each position's loss in nats, (B, T); 0 where nothing is trained."""
        arrays = self._check(batch)
        with native_errors(self._native):
            return self._engine.token_nats(*arrays)  # type: ignore[no-any-return]

    def logits(self, batch: MicroBatch) -> FloatArray:
        """Return all logits, (B, T, V); for small inputs."""
        tokens, positions, segments, _ = self._check(batch)
        with native_errors(self._native):
            return self._engine.logits(tokens, positions, segments)  # type: ignore[no-any-return]

    def optimizer_step(self, lr: float, n_targets: int) -> float:
        """Divide the gradients by `n_targets`, clip, update, zero; return the norm before clipping.

        Raises:
            NumericError: a gradient or an updated weight is not finite, with the tensor's name.
        """
        with native_errors(self._native):
            norm = float(self._engine.optimizer_step(lr, n_targets))
        if not math.isfinite(norm):
            raise NumericError("the gradient is not finite", found=norm)
        return norm

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        with native_errors(self._native):
            self._engine.zero_grad()

    def cancel(self) -> None:
        """Stop the running call at the next block border; callable from any thread."""
        if self._engine is not None:
            self._engine.cancel()

    def get(self, name: str, which: str = "value") -> FloatArray:
        """Return a copy of a matrix; `which` is value, grad, m or v."""
        with native_errors(self._native):
            return self._engine.get_tensor(name, which)  # type: ignore[no-any-return]

    def set(self, name: str, which: str, array: FloatArray) -> None:
        """Set a matrix; the shape must be the parameter's."""
        import numpy as np

        if name not in self._parameters:
            raise InputError(f"the engine has no matrix `{name}`")
        if array.shape != self._parameters[name]:
            raise InputError(
                f"`{name}` has another shape", found=array.shape, expected=self._parameters[name]
            )
        with native_errors(self._native):
            self._engine.set_tensor(name, which, np.ascontiguousarray(array, dtype=np.float32))

    def get_all(self, which: str = "value") -> dict[str, FloatArray]:
        """Return copies of all matrices by name."""
        return {name: self.get(name, which) for name in self._parameters}

    def set_all(self, which: str, arrays: Mapping[str, FloatArray]) -> None:
        """Set all matrices.

        Raises:
            InputError: a name is missing or unknown, or a shape differs.
        """
        for name in self._parameters:
            if name not in arrays:
                raise InputError(f"matrix `{name}` is missing")
        for name, array in arrays.items():
            self.set(name, which, array)

    def init_lora(self, seed: int) -> None:
        """Fill lora_a with U(-1/sqrt(C_in), 1/sqrt(C_in)) and lora_b with zeros.

        Source: PEFT's default, kaiming_uniform with a = sqrt(5), which has this bound. Each matrix
        draws from its own stream, so that a matrix does not depend on which others are trained.
        """
        import zlib

        import numpy as np

        for name, shape in self._parameters.items():
            if name.endswith(".lora_a"):
                bound = 1.0 / math.sqrt(shape[1])
                rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
                array = rng.uniform(-bound, bound, shape).astype(np.float32)
            else:
                array = np.zeros(shape, dtype=np.float32)
            self.set(name, "value", array)

    def embed(self, batch: MicroBatch) -> FloatArray:
        """Return the residual before block 0, (B*T, C)."""
        tokens, positions, segments, _ = self._check(batch)
        with native_errors(self._native):
            return self._engine.embed(tokens, positions, segments)  # type: ignore[no-any-return]

    def advance(
        self,
        layer: int,
        stage: int,
        batch: MicroBatch,
        given: Mapping[str, tuple[int, Any]],
        read: FloatArray,
        residual: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the residual and the input of a stage, from the input of the one before.

        `given` are weights of the stage before to be used in place of the model's, a type's number
        and bytes by the linear's name. See `ggft.engine.stages`.
        """
        tokens, positions, segments, _ = self._check(batch)
        with native_errors(self._native):
            sums, out = self._engine.advance(
                layer, stage, tokens, positions, segments, dict(given), read, residual
            )
        return sums, out

    def loss_of(self, batch: MicroBatch, residual: FloatArray) -> tuple[float, int]:
        """Return (summed nats, trained tokens) from the residual behind the last block."""
        with native_errors(self._native):
            nats, count = self._engine.loss_of(*self._check(batch), residual)
        return float(nats), int(count)

    def info(self) -> dict[str, Any]:
        """Return device, kernels, precision, threads, ggml_version, base_bytes, buffers, …."""
        return dict(self._engine.info())

    def graph_report(self, *, gpu: bool = False) -> list[dict[str, Any]]:
        """Return every distinct node of the graphs.

        A node has op, family (ggml's operation), type, shapes (for people), result and sources
        (type, ne, nb), count and supported. `gpu` asks for the graphs that a GPU would get, which
        an engine on the CPU can tell when it was opened with kernels "ggml".
        """
        with native_errors(self._native):
            return list(self._engine.graph_report(gpu))

    def set_profiling(self, on: bool) -> None:
        """Begin or end timing each node of the graphs by itself, which is slower as a whole."""
        self._engine.set_profiling(on)

    def profile(self) -> dict[str, float]:
        """Return seconds by kind of node since `set_profiling(True)`."""
        return dict(self._engine.profile())

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
        self._engine = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, batch: MicroBatch) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Return the four arrays, C-contiguous int32 of one shape within the engine's bounds."""
        import numpy as np

        tokens, positions, segments, targets = (
            np.ascontiguousarray(array, dtype=np.int32)
            for array in (
                batch["tokens"],
                batch["positions"],
                batch["segments"],
                batch["targets"],
            )
        )
        shape = tokens.shape
        if len(shape) != 2 or {positions.shape, segments.shape, targets.shape} != {shape}:
            raise InputError(
                "a micro-batch's arrays must have one shape (B, T)",
                found=[tokens.shape, positions.shape, segments.shape, targets.shape],
            )
        if shape[0] > self.settings.n_rows or shape[1] > self.settings.n_tokens:
            raise InputError(
                "a micro-batch is larger than the engine was opened for",
                found=shape,
                expected=(self.settings.n_rows, self.settings.n_tokens),
            )
        return tokens, positions, segments, targets


def mean_nats(
    engine: Engine, batches: Iterable[MicroBatch], check: Callable[[], None] = lambda: None
) -> tuple[float, int]:
    """Return (mean nats per trained token, trained tokens) over micro-batches.

    `check` is called before each one and may raise to stop.
    """
    total, count = 0.0, 0
    for batch in batches:
        check()
        nats, trained = engine.evaluate(batch)
        total += nats
        count += trained
    return (total / count if count else math.nan), count
