"""Old model to GGUF, streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ggft.gguf.cursor import read_bytes
from ggft.gguf.finite import first_bad_block
from ggft.gguf.kinds import HEAD_BYTES, identify
from ggft.gguf.read import GGMLType, Value, check_model, read_gguf
from ggft.gguf.write import TensorSource, write_gguf
from ggft.legacy.blocks import ScaleLoss, repack, to_blocks, unpack
from ggft.legacy.family import Inference, infer
from ggft.legacy.parse import LegacyTensor
from ggft.legacy.reader import JoinedTensor, LegacyFile, read_legacy
from ggft.legacy.vocabulary import SpmVocabulary, load_vocabulary, rebuild_vocabulary
from ggft.settings.commands import ConvertConfig
from ggft.system.errors import InputError
from ggft.system.files import require_new, require_regular_file

_CHUNK_BYTES = 8 << 20
_QUANTIZATION_VERSION = 2
# The number of a file's main type in general.file_type. Source: llama.h, enum llama_ftype.
_FILE_TYPES = {
    GGMLType.F32: 0,
    GGMLType.F16: 1,
    GGMLType.Q4_0: 2,
    GGMLType.Q4_1: 3,
    GGMLType.Q8_0: 7,
    GGMLType.Q5_0: 8,
    GGMLType.Q5_1: 9,
    GGMLType.Q2_K: 10,
    GGMLType.Q3_K: 12,
    GGMLType.Q4_K: 15,
    GGMLType.Q5_K: 17,
    GGMLType.Q6_K: 18,
}


@dataclass
class Repacking:
    """What happened to the tensors of one old type."""

    source: str
    target: str
    how: str
    n_tensors: int = 0


@dataclass
class ConvertReport:
    """What `convert_model` did.

    Attributes:
        scale_error: Largest relative error of a scale rounded to F16; 0 if none was.
        n_subnormal: Scales that became F16 subnormals or zero.
        refusal: Why ggft cannot train the result; None if it can.
    """

    source: LegacyFile
    output: Path
    inferences: list[Inference] = field(default_factory=list)
    repackings: dict[tuple[str, str], Repacking] = field(default_factory=dict)
    scale_error: float = 0.0
    n_subnormal: int = 0
    n_bytes: int = 0
    refusal: str | None = None

    def count(self, loss: ScaleLoss) -> None:
        """Add what rounding scales did to one piece of a tensor."""
        self.scale_error = max(self.scale_error, loss.worst)
        self.n_subnormal += loss.n_subnormal


def convert_model(
    old: str | Path,
    new: str | Path,
    config: ConvertConfig | None = None,
    progress: Callable[[int], object] | None = None,
) -> ConvertReport:
    """Convert an old GGML model to GGUF; the output is whole or not there.

    Args:
        old: The old file, or any part of a model in parts.
        new: The GGUF to write.
        config: Overrides.
        progress: Called with the number of bytes written so far.

    Raises:
        InputError: The old file is bad or no llama, an override contradicts it, or the output
            cannot be used.
        ResourceError: The disk is full.
    """
    config = config or ConvertConfig()
    file = _read_old(Path(old))
    require_new(new, force=config.force, inputs=file.paths)
    report = ConvertReport(source=file, output=Path(new))
    if config.vocab_dir is not None:
        vocabulary = load_vocabulary(config.vocab_dir, file.hparams.n_vocab)
    else:
        vocabulary = rebuild_vocabulary(file)
    tensors = [_source(tensor, config, report) for tensor in file.tensors]
    metadata = _metadata(file, config, vocabulary, tensors, report)
    inputs = list(file.paths)
    write_gguf(new, metadata, tensors, inputs=inputs, progress=progress)
    report.n_bytes = Path(new).stat().st_size
    try:
        check_model(read_gguf(new))
    except InputError as error:
        report.refusal = str(error)
    return report


def _read_old(path: Path) -> LegacyFile:
    """Read the old file, or say that there is nothing to convert."""
    require_regular_file(path)
    with path.open("rb") as file:
        kind = identify(file.read(HEAD_BYTES))
    if kind.name == "gguf":
        raise InputError(
            "already a GGUF file",
            path=path,
            expected="an old GGML file",
            hint="use it as it is; to change its type: ggft quantize",
        )
    return read_legacy(path)


def _metadata(
    file: LegacyFile,
    config: ConvertConfig,
    vocabulary: SpmVocabulary,
    tensors: list[TensorSource],
    report: ConvertReport,
) -> dict[str, Value]:
    """Return the keys of the GGUF, and note what they were inferred from."""
    hparams = file.hparams
    gqa = hparams.n_head // file.n_head_kv
    if config.gqa is not None and config.gqa != gqa:
        raise InputError(
            "--gqa contradicts the file",
            path=file.paths[0],
            found=f"--gqa {config.gqa}",
            expected=f"{gqa}: {hparams.n_head} query heads, {file.n_head_kv} in attention.wk",
        )
    if gqa > 1:
        report.inferences.append(
            Inference("key/value heads", str(file.n_head_kv), "the rows of attention.wk")
        )
    context, eps, rope_base = infer(
        file, report.inferences, context=config.context, eps=config.eps, rope_base=config.rope_base
    )
    report.inferences += [Inference("vocabulary", note, "") for note in vocabulary.notes]
    return {
        "general.architecture": "llama",
        "general.name": config.name or file.paths[0].name.removesuffix(".bin"),
        "general.file_type": _file_type(file, tensors),
        "general.quantization_version": _QUANTIZATION_VERSION,
        "llama.context_length": context,
        "llama.embedding_length": hparams.n_embd,
        "llama.block_count": hparams.n_layer,
        "llama.feed_forward_length": file.n_ff,
        "llama.rope.dimension_count": hparams.n_rot,
        "llama.rope.freq_base": rope_base,
        "llama.attention.head_count": hparams.n_head,
        "llama.attention.head_count_kv": file.n_head_kv,
        "llama.attention.layer_norm_rms_epsilon": eps,
        "llama.vocab_size": hparams.n_vocab,
        **vocabulary.metadata(),
    }


def _file_type(file: LegacyFile, tensors: list[TensorSource]) -> int:
    """Return general.file_type: the old number where it still holds, else of the main type."""
    sizes: Counter[GGMLType] = Counter()
    for tensor in tensors:
        sizes[tensor.type] += tensor.n_bytes
    main = sizes.most_common(1)[0][0]
    k_quants = 10 <= file.hparams.ftype <= 18
    return file.hparams.ftype if k_quants and not file.block_64 else _FILE_TYPES[main]


def _source(tensor: JoinedTensor, config: ConvertConfig, report: ConvertReport) -> TensorSource:
    """Plan one tensor: its type in the GGUF and where its data comes from."""
    layout = tensor.layout
    if len(tensor.shape) == 1:
        target, how = GGMLType.F32, "copied" if layout.target is GGMLType.F32 else "unpacked"
    elif layout.target is not None:
        target, how = layout.target, "copied" if layout.copies else "repacked"
    else:
        target, how = GGMLType[config.type], "unpacked"
        if tensor.parts[0].shape[0] % target.block_size:
            target = GGMLType.F16
    entry = report.repackings.setdefault(
        (layout.label, target.name), Repacking(layout.label, target.name, how)
    )
    entry.n_tensors += 1
    return TensorSource(
        tensor.name, target, tensor.shape, partial(_chunks, tensor, target, how, report)
    )


def _chunks(
    tensor: JoinedTensor, target: GGMLType, how: str, report: ConvertReport
) -> Iterator[memoryview]:
    """Yield the data of a tensor in its new type, some rows at a time."""
    import numpy as np

    first = tensor.parts[0]
    step = max(1, _CHUNK_BYTES // first.row_bytes)
    groups = [tensor.parts] if tensor.by_columns else [(part,) for part in tensor.parts]
    for group in groups:
        for row in range(0, first.n_rows, step):
            n_rows = min(step, first.n_rows - row)
            pieces = [_convert(part, row, n_rows, target, how, report) for part in group]
            data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
            yield data.reshape(-1).data


def _convert(
    tensor: LegacyTensor, row: int, n_rows: int, target: GGMLType, how: str, report: ConvertReport
) -> npt.NDArray[np.uint8]:
    """Read and convert rows of one piece of a tensor.

    Returns:
        Bytes, shape (n_rows, bytes per row in the new type).
    """
    import numpy as np

    offset = tensor.offset + row * tensor.row_bytes
    raw = read_bytes(tensor.path, offset, n_rows * tensor.row_bytes, tensor.name)
    blocks = to_blocks(raw.reshape(n_rows, tensor.row_bytes), tensor.layout)
    loss = ScaleLoss()
    # NaN and infinity are looked for in the result, where they can be named.
    with np.errstate(over="ignore", invalid="ignore"):
        if how == "unpacked":
            out = _pack(unpack(blocks, tensor.layout).reshape(n_rows, -1), target)
        else:
            out, loss = repack(blocks, tensor.layout)
            report.count(loss)
    block = loss.bad_block
    if block is None and (bad := first_bad_block(out, target)) is not None:
        block = bad * target.block_size // tensor.layout.block_size
    if block is not None:
        blocks_per_row = tensor.shape[0] // tensor.layout.block_size
        raise InputError(
            f"NaN, infinity or a number too large for F16 in {tensor.name}",
            path=tensor.path,
            offset=tensor.offset + row * tensor.row_bytes + block * tensor.layout.block_bytes,
            found=f"block {row * blocks_per_row + block}",
            expected="finite numbers",
            hint="the file is damaged; download it again",
        )
    return out.reshape(n_rows, -1)


def _pack(values: npt.NDArray[np.float32], target: GGMLType) -> npt.NDArray[np.uint8]:
    """Return numbers in one of the types that `--type` offers."""
    import numpy as np

    if target is GGMLType.F32:
        return values.view(np.uint8)
    if target is GGMLType.F16:
        return values.astype(np.float16).view(np.uint8)
    from gguf import GGMLQuantizationType, quants

    packed: npt.NDArray[np.uint8] = quants.quantize(values, GGMLQuantizationType(int(target)))
    return packed
