"""Adapter into base, row by row, finer types where the delta would be lost."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.adapters.adapter import Adapter, read_adapter
from ggft.adapters.calibrate import Fitted, can_fit
from ggft.adapters.carried import template_keys, template_of
from ggft.adapters.receipt import Losses, MergeReport, TensorReceipt, to_json
from ggft.engine.quants import can_quantize, dequantize_rows, quantize_rows, read_rows
from ggft.gguf.finite import check_and_hash
from ggft.gguf.read import GGMLType, GGUFFile, TensorInfo, Value, ValueType, read_array, read_gguf
from ggft.gguf.write import TensorSource, write_gguf
from ggft.settings.commands import MergeConfig
from ggft.system.errors import InputError, NumericError
from ggft.system.files import atomic_output, require_new

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

# Loss of a model (a path), with an adapter or None, under a template.
Measure = Callable[[str, "str | None", str], float]
# Fits the tensors of these types, by full name, to what they read; gives them in any order.
Fit = Callable[[Mapping[str, GGMLType], "Callable[[str], Floats]"], Iterator[Fitted]]
_CHUNK_ELEMENTS = 4 << 20
_SAMPLE_ROWS = 64
# Finer and finer types to which a tensor is promoted; 256-element blocks only where rows allow.
_LADDER = (
    GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q5_1, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.F16,
)  # fmt: skip


@dataclass(frozen=True)
class _Delta:
    """scale·B·A of one tensor, computed row by row; a is (R, C_in), b is (C_out, R)."""

    a: Floats
    b: Floats

    def rows(self, first: int, n_rows: int) -> Floats:
        """Return rows of the delta, shape (n_rows, C_in)."""
        return self.b[first : first + n_rows] @ self.a


@dataclass
class _Sums:
    """Running sums for the receipt of one tensor."""

    dd: float = 0.0
    cd: float = 0.0
    rr: float = 0.0
    ww: float = 0.0

    def add(self, old: Floats, delta: Floats, new: Floats) -> None:
        """Add some rows: W0, D and W1."""
        import numpy as np

        change = new - old
        rest = change - delta
        self.dd += float(np.vdot(delta, delta))
        self.cd += float(np.vdot(change, delta))
        self.rr += float(np.vdot(rest, rest))
        self.ww += float(np.vdot(old, old))

    @property
    def kept(self) -> float:
        """Return the share of the delta that survived; 1 where there is none."""
        return self.cd / self.dd if self.dd else 1.0


def merge(
    base_path: str | Path,
    adapter_path: str | Path,
    output: str | Path,
    config: MergeConfig | None = None,
    progress: Callable[[int], object] | None = None,
    measure: Measure | None = None,
    fit: Fit | None = None,
) -> MergeReport:
    """Write the base model with the adapter merged in, whole or not at all.

    Args:
        base_path: The base GGUF (or a shard of it); the output is one file.
        adapter_path: The adapter's GGUF.
        output: The GGUF to write.
        config: Types and strength.
        progress: Called with the number of bytes written so far.
        measure: Gives the loss on `config.data` of a model, an adapter or None, and a template.
        fit: Writes what can be fitted to its inputs; without, all is rounded.

    Raises:
        InputError: A file is bad, they do not fit, or the output cannot be used.
        ResourceError: The disk is full.
        NumericError: The sum has NaN or infinity in it.
    """
    config = config or MergeConfig()
    base = read_gguf(base_path)
    check_and_hash(base)
    adapter = read_adapter(adapter_path, base, check_hash=not config.any_base)
    inputs = [*base.paths, adapter.path]
    for path in (output, config.receipt):
        if path is not None:
            require_new(path, force=config.force, inputs=inputs)
    report = MergeReport(Path(output), 0, base.file_bytes)
    deltas = _deltas(adapter, config.scale)
    sources = [_plan(tensor, deltas, config, report) for tensor in base.tensors.values()]
    if fit is not None:
        sources = _fitted_sources(fit, base, deltas, sources, report)
    metadata, types = _metadata(base, adapter, sources)
    template = template_of(adapter.meta)
    losses: tuple[float, float] | None = None
    if config.data and measure is not None:
        # Before the merge, so that bad data leave no output.
        untuned = measure(str(base.path), None, template)
        losses = untuned, measure(str(base.path), str(adapter.path), "auto")
    with _receipt(config, Path(output), inputs) as receipt:
        write_gguf(output, metadata, sources, types=types, inputs=inputs, progress=progress)
        report.n_bytes = Path(output).stat().st_size
        if losses is not None and measure is not None:
            report.losses = Losses(*losses, measure(str(output), None, "auto"))
        if receipt is not None:
            receipt.write_text(to_json(report) + "\n", encoding="utf-8")
    return report


def _receipt(
    config: MergeConfig, output: Path, inputs: list[Path]
) -> contextlib.AbstractContextManager[Path | None]:
    """Open the receipt before the output, so that a place where it cannot be leaves neither."""
    if config.receipt is None:
        return contextlib.nullcontext()
    if Path(config.receipt).resolve() == output.resolve():
        raise InputError("the receipt is the output", path=config.receipt)
    return atomic_output(config.receipt, inputs=[*inputs, output])


def _deltas(adapter: Adapter, scale: float) -> dict[str, _Delta]:
    """Return the delta of each changed tensor, the scale of its own rank folded into b."""
    arrays = adapter.arrays()
    deltas = {}
    for name in adapter.base_names:
        a, b = arrays[f"{name}.lora_a"], arrays[f"{name}.lora_b"]
        deltas[name] = _Delta(a, b * (scale * adapter.meta.alpha / a.shape[0]))
    return deltas


def _metadata(
    base: GGUFFile, adapter: Adapter, sources: Sequence[TensorSource]
) -> tuple[dict[str, Value], dict[str, ValueType]]:
    """Return the base's keys, those about shards left out, and where the delta came from."""
    metadata = {k: v for k, v in base.metadata.items() if not k.startswith("split.")}
    metadata["ggft.merged_adapter"] = adapter.path.name
    metadata.update(template_keys(adapter.meta, base.metadata))
    changed = [s for s in sources if s.type is not base.tensors[s.name].type]
    if changed and "general.file_type" in metadata:
        sizes: Counter[GGMLType] = Counter()
        for source in sources:
            sizes[source.type] += math.prod(source.shape)
        metadata["general.file_type"] = _FILE_TYPES.get(sizes.most_common(1)[0][0], 0)
    types = {key: kind for key, kind in base.types.items() if key in metadata}
    return metadata, types


# What llama.cpp calls a file by the type of most of its weights.
_FILE_TYPES = {
    GGMLType.F32: 0, GGMLType.F16: 1, GGMLType.Q4_0: 2, GGMLType.Q4_1: 3, GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8, GGMLType.Q5_1: 9, GGMLType.Q2_K: 10, GGMLType.Q3_K: 12, GGMLType.Q4_K: 15,
    GGMLType.Q5_K: 17, GGMLType.Q6_K: 18, GGMLType.BF16: 32,
}  # fmt: skip


def _plan(
    tensor: TensorInfo, deltas: dict[str, _Delta], config: MergeConfig, report: MergeReport
) -> TensorSource:
    """Choose a tensor's type in the output and say where its data will come from."""
    delta = deltas.get(tensor.name)
    if delta is None:
        return TensorSource(tensor.name, tensor.type, tensor.shape, partial(_copy, tensor))
    if len(tensor.shape) != 2:
        raise InputError(
            "an adapter for a tensor that is no matrix",
            path=tensor.path,
            offset=tensor.header_offset,
            found=f"{tensor.name} of shape {tensor.shape}",
        )
    target, kept_before = _choose_type(tensor, delta, config)
    receipt = TensorReceipt(tensor.name, tensor.type.name, target.name, kept_before)
    report.tensors.append(receipt)
    chunks = partial(_merge_rows, tensor, delta, target, receipt)
    return TensorSource(tensor.name, target, tensor.shape, chunks)


def _choose_type(tensor: TensorInfo, delta: _Delta, config: MergeConfig) -> tuple[GGMLType, float]:
    """Return the type to write, and the share that the base's own type keeps on sample rows."""
    import numpy as np

    n_rows = tensor.n_rows
    picked = np.unique(np.linspace(0, n_rows - 1, min(n_rows, _SAMPLE_ROWS)).astype(int))
    old = np.concatenate([read_rows(tensor, int(row), 1) for row in picked])
    change = np.concatenate([delta.rows(int(row), 1) for row in picked])

    def kept(candidate: GGMLType) -> float:
        sums = _Sums()
        sums.add(old, change, _round_trip(old + change, candidate))
        return sums.kept

    def survives(share: float) -> bool:
        # More than all of it is wrong, too: coarse codes can exaggerate a delta that they barely
        # resolve.
        return config.keep <= share <= 2.0 - config.keep

    before = kept(tensor.type) if can_quantize(tensor.type) else 0.0
    if config.type == "base" and can_quantize(tensor.type):
        return tensor.type, before
    if config.type not in ("auto", "base"):
        target = GGMLType[config.type]
        if tensor.shape[0] % target.block_size:
            raise InputError(
                f"{tensor.name} cannot be written as {target.name}",
                path=tensor.path,
                found=f"rows of {tensor.shape[0]}",
                expected=f"a multiple of {target.block_size}",
                hint="choose a type with 32-element blocks, such as Q8_0, or --type auto",
            )
        return target, before
    if can_quantize(tensor.type) and survives(before):
        return tensor.type, before
    bits = tensor.type.block_bytes / tensor.type.block_size
    finer = [
        t
        for t in _LADDER
        if t.block_bytes / t.block_size > bits and tensor.shape[0] % t.block_size == 0
    ]
    for candidate in finer:
        if survives(kept(candidate)):
            return candidate, before
    return (finer[-1] if finer else GGMLType.F32), before


def _round_trip(values: Floats, tensor_type: GGMLType) -> Floats:
    """Return values as they come back from a type."""
    return dequantize_rows(quantize_rows(values, tensor_type), tensor_type, values.shape[1])


def _steps(tensor: TensorInfo) -> Iterator[tuple[int, int]]:
    """Yield first row and number of rows of each piece that is handled at once."""
    step = max(1, _CHUNK_ELEMENTS // max(1, tensor.shape[0]))
    for row in range(0, tensor.n_rows, step):
        yield row, min(step, tensor.n_rows - row)


def _copy(tensor: TensorInfo) -> Iterator[memoryview]:
    """Yield the data of a tensor that the adapter does not change."""
    for row, n_rows in _steps(tensor):
        yield read_array(tensor, row, n_rows).reshape(-1).data


class _Pending:
    """Fitted tensors, each kept from when it is there until it is asked for."""

    def __init__(self, fitted: Iterator[Fitted]) -> None:
        self._fitted = fitted
        self._kept: dict[str, Fitted] = {}

    def take(self, name: str) -> Fitted:
        """Return a tensor once."""
        while name not in self._kept:
            fitted = next(self._fitted)
            self._kept[fitted.name] = fitted
        return self._kept.pop(name)


def _fitted_sources(
    fit: Fit,
    base: GGUFFile,
    deltas: dict[str, _Delta],
    sources: list[TensorSource],
    report: MergeReport,
) -> list[TensorSource]:
    """Return the sources with those that can be fitted in place of the rounded ones."""
    types = {s.name: s.type for s in sources if s.name in deltas and can_fit(s.name, s.type)}
    receipts = {receipt.name: receipt for receipt in report.tensors}

    def wanted(name: str) -> Floats:
        import numpy as np

        tensor = base.tensors[name]
        values = read_rows(tensor, 0, tensor.n_rows) + deltas[name].rows(0, tensor.n_rows)
        if not np.isfinite(values).all():
            raise NumericError(f"NaN or infinity in {name} with the adapter", path=tensor.path)
        return np.ascontiguousarray(values, dtype=np.float32)

    pending = _Pending(fit(types, wanted)) if types else None

    def rows(name: str) -> Iterator[memoryview]:
        assert pending is not None
        data = pending.take(name).data
        yield from _account(base.tensors[name], deltas[name], data, types[name], receipts[name])

    return [
        TensorSource(s.name, s.type, s.shape, partial(rows, s.name)) if s.name in types else s
        for s in sources
    ]


def _account(
    tensor: TensorInfo,
    delta: _Delta,
    data: npt.NDArray[np.uint8],
    target: GGMLType,
    receipt: TensorReceipt,
) -> Iterator[memoryview]:
    """Yield the data of a fitted tensor, and fill in its receipt."""
    sums = _Sums()
    for row, n_rows in _steps(tensor):
        packed = data[row : row + n_rows]
        new = dequantize_rows(packed, target, tensor.shape[0])
        sums.add(read_rows(tensor, row, n_rows), delta.rows(row, n_rows), new)
        yield packed.reshape(-1).data
    _fill(receipt, sums)


def _merge_rows(
    tensor: TensorInfo, delta: _Delta, target: GGMLType, receipt: TensorReceipt
) -> Iterator[memoryview]:
    """Yield the data of a changed tensor, and fill in its receipt."""
    sums = _Sums()
    for row, n_rows in _steps(tensor):
        old = read_rows(tensor, row, n_rows)
        change = delta.rows(row, n_rows)
        packed = quantize_rows(old + change, target)
        sums.add(old, change, dequantize_rows(packed, target, tensor.shape[0]))
        yield packed.reshape(-1).data
    _fill(receipt, sums)


def _fill(receipt: TensorReceipt, sums: _Sums) -> None:
    receipt.kept = sums.kept
    scale = math.sqrt(sums.ww) or 1.0
    receipt.noise = math.sqrt(sums.rr) / scale
    receipt.delta = math.sqrt(sums.dd) / scale
