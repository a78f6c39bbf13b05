"""Says what a model file is and what ggft can do with it: `ggft info`.

Takes any GGUF (model, adapter, bare vocabulary, one shard of several) or old GGML file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ggft.adapters.adapter import read_adapter
from ggft.gguf.description import Ability, ModelDescription, TensorRow, TypeShare, render, to_json
from ggft.gguf.finite import check_values
from ggft.gguf.kinds import GGML_MAGICS, HEAD_BYTES
from ggft.gguf.read import (
    GGUFFile,
    StringArray,
    TensorInfo,
    Value,
    check_model,
    read_gguf,
)
from ggft.legacy.reader import LegacyFile, read_legacy
from ggft.settings.commands import InfoConfig
from ggft.setup.open import check_trainable
from ggft.system.errors import InputError
from ggft.system.files import require_regular_file


def describe(path: str | Path, *, check: bool = False) -> ModelDescription:
    """Read a model file and say what it is.

    Args:
        path: The file, or one shard or part of it.
        check: Also read all data and refuse NaN and infinity.

    Raises:
        InputError: The file is bad, or not a model file; says where and what was found.
    """
    path = Path(path)
    require_regular_file(path)
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head[:4] in GGML_MAGICS:
        return _describe_legacy(read_legacy(path))
    gguf = read_gguf(path)
    if check:
        check_values(gguf)
    return _describe_gguf(gguf)


def _describe_gguf(file: GGUFFile) -> ModelDescription:
    """Describe a GGUF file."""
    kind = _text(file.get("general.type")) or "model"
    if kind == "model" and not file.tensors:
        kind = "vocabulary"
    result = ModelDescription(
        path=file.path,
        kind=kind,
        format=f"GGUF v{file.version}",
        n_bytes=file.file_bytes,
        warnings=list(file.warnings),
    )
    if len(file.paths) > 1:
        result.add("shards", "n_shards", len(file.paths))
    result.add("name", "name", _text(file.get("general.name")))
    result.add("architecture", "architecture", file.architecture or None)
    result.types = _mix((t.type.name, t.n_elements, t.n_bytes) for t in file.tensors.values())
    if kind == "adapter":
        _add_adapter(result, file)
    else:
        _add_sizes(result, file)
        _add_vocabulary(result, file)
    _add_abilities(result, file)
    result.keys = [
        (key, file.types[key].name.lower(), value) for key, value in file.metadata.items()
    ]
    result.tensors = [_row(tensor) for tensor in file.tensors.values()]
    return result


def _text(value: Value | None) -> str | None:
    return value if isinstance(value, str) else None


def _row(tensor: TensorInfo) -> TensorRow:
    return TensorRow(
        tensor.name,
        tensor.type.name,
        tensor.shape,
        tensor.n_bytes,
        tensor.offset,
        tensor.path.name,
    )


def _mix(tensors: Any) -> list[TypeShare]:
    """Return the share of each type, the largest first, of (type, elements, bytes) triples."""
    n_tensors: Counter[str] = Counter()
    n_elements: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for name, elements, size in tensors:
        n_tensors[name] += 1
        n_elements[name] += elements
        n_bytes[name] += size
    return [
        TypeShare(name, n_tensors[name], n_elements[name], size)
        for name, size in n_bytes.most_common()
    ]


def _add_sizes(result: ModelDescription, file: GGUFFile) -> None:
    """Note parameter count and hyper-parameters."""
    n_params = sum(share.n_elements for share in result.types)
    if n_params:
        bits = 8 * sum(share.n_bytes for share in result.types) / n_params
        result.add("parameters", "n_params", n_params, f"{_amount(n_params)}, {bits:.2f} bits each")
        result.values["bits_per_weight"] = bits
    for label, key in (
        ("blocks", "block_count"),
        ("width", "embedding_length"),
        ("feed-forward", "feed_forward_length"),
        ("heads", "attention.head_count"),
        ("key/value heads", "attention.head_count_kv"),
        ("experts", "expert_count"),
        ("context", "context_length"),
        ("rope base", "rope.freq_base"),
        ("rope scaling", "rope.scaling.type"),
        ("norm epsilon", "attention.layer_norm_rms_epsilon"),
    ):
        value = file.get(f"{file.architecture}.{key}")
        if isinstance(value, float):
            result.add(label, key, value, f"{value:g}")
        elif isinstance(value, (int, str)):
            result.add(label, key, value)
        elif value is not None and len(value):
            numbers = [x for x in value if isinstance(x, (int, float))]
            shown = f"{min(numbers)} to {max(numbers)}, by block" if numbers else "not numbers"
            result.add(label, key, numbers[:1024], shown)
    if file.tensors and file.architecture:
        result.values["tied_output"] = "output.weight" not in file.tensors


def _add_vocabulary(result: ModelDescription, file: GGUFFile) -> None:
    """Note tokenizer, special tokens and chat template."""
    tokens = file.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray):
        kind = _text(file.get("tokenizer.ggml.model")) or "unknown kind"
        result.add("vocabulary", "n_vocab", len(tokens), f"{len(tokens)} tokens, {kind}")
        result.values["tokenizer"] = kind
        for name in ("bos", "eos", "eot", "padding"):
            index = file.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(index, int) and 0 <= index < len(tokens):
                label = f"{name} token"
                result.add(label, f"{name}_token_id", index, f"{index} {tokens[index]!r}")
    template = _text(file.get("tokenizer.chat_template"))
    if file.tensors:
        text = "none" if template is None else f"yes, {len(template)} characters"
        result.add("chat template", "has_chat_template", template is not None, text)


def _add_adapter(result: ModelDescription, file: GGUFFile) -> None:
    """Note what an adapter changes, and for which base."""
    result.add("adapter type", "adapter_type", _text(file.get("adapter.type")))
    pairs = [t for name, t in file.tensors.items() if name.endswith(".lora_a")]
    ranks = sorted({t.shape[1] if len(t.shape) > 1 else 1 for t in pairs})
    if ranks:
        result.add("rank", "ranks", ranks, ", ".join(map(str, ranks)))
    alpha = file.get("adapter.lora.alpha")
    if isinstance(alpha, (int, float)):
        result.add("alpha", "alpha", alpha, f"{alpha:g}")
    targets = Counter(t.name.removesuffix(".weight.lora_a").split(".")[-1] for t in pairs)
    if targets:
        text = ", ".join(f"{name} ({count})" for name, count in targets.items())
        result.add("changes", "targets", dict(targets), text)
    for label, key in (
        ("base model", "general.base_model.0.name"),
        ("base SHA-256", "ggft.base_sha256"),
        ("prompt template", "ggft.template"),
        ("ggft version", "ggft.version"),
    ):
        result.add(label, key, _text(file.get(key)))


def _add_abilities(result: ModelDescription, file: GGUFFile) -> None:
    """Note what ggft can do with a GGUF file."""
    if result.kind == "adapter":
        refusal = _adapter_refusal(file)
        note = refusal or "ggft chat -m BASE --adapter FILE; ggft merge BASE FILE OUT"
        result.abilities = [
            Ability("chat", refusal is None, note),
            Ability("train", False, "an adapter is trained on its base model"),
        ]
        return
    try:
        check_trainable(file, check_model(file))
    except InputError as error:
        result.abilities = [Ability("train", False, _reason(error))]
    else:
        result.abilities = [
            Ability("train", True, "ggft finetune -m FILE -d DATA"),
            Ability("chat", True, "ggft chat -m FILE"),
        ]


def _adapter_refusal(file: GGUFFile) -> str | None:
    """Return why an adapter cannot be used, or None."""
    try:
        read_adapter(file.path)
    except InputError as error:
        return _reason(error)
    return None


def _reason(error: InputError) -> str:
    """Return an error without its path, which is known here."""
    details = [
        f"{name} {value}"
        for name, value in (("found", error.found), ("expected", error.expected))
        if value is not None
    ]
    return error.message + (f" ({', '.join(details)})" if details else "")


def _describe_legacy(file: LegacyFile) -> ModelDescription:
    """Describe an old GGML model."""
    hparams = file.hparams
    version = f" v{file.version}" if file.version else ""
    result = ModelDescription(
        path=file.paths[0],
        kind="old GGML model",
        format=f"{file.container}{version}",
        n_bytes=file.file_bytes,
    )
    if len(file.paths) > 1:
        result.add("parts", "n_parts", len(file.paths))
    result.add("architecture", "architecture", "llama")
    pieces = [
        (tensor, part.n_bytes, part.shape[0] * part.n_rows)
        for tensor in file.tensors
        for part in tensor.parts
    ]
    result.types = _mix((tensor.layout.label, size, n_bytes) for tensor, n_bytes, size in pieces)
    n_params = sum(share.n_elements for share in result.types)
    result.add("parameters", "n_params", n_params, _amount(n_params))
    result.add("blocks", "block_count", hparams.n_layer)
    result.add("width", "embedding_length", hparams.n_embd)
    result.add("feed-forward", "feed_forward_length", file.n_ff)
    result.add("heads", "attention.head_count", hparams.n_head)
    result.add("key/value heads", "attention.head_count_kv", file.n_head_kv)
    stored = "with scores" if file.tokens and file.tokens[0].score is not None else "no scores"
    text = f"{hparams.n_vocab} tokens, {stored}"
    result.add("vocabulary", "n_vocab", hparams.n_vocab, text)
    if file.block_64:
        result.warnings.append("K-quants with 64-element blocks, which llama.cpp no longer reads")
    result.abilities = [
        Ability("convert", True, "ggft convert FILE NEW.gguf"),
        Ability("train", False, "convert it first"),
    ]
    result.tensors = [
        TensorRow(
            part.name, tensor.layout.label, part.shape, part.n_bytes, part.offset, part.path.name
        )
        for tensor in file.tensors
        for part in tensor.parts
    ]
    return result


def _amount(number: int) -> str:
    """Return a count as people say it: 134.5 M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.4g} {letter}"
    return str(number)


def info(path: str | Path, config: InfoConfig) -> str:
    """Return what `ggft info` prints."""
    description = describe(path, check=config.check)
    show = to_json if config.json else render
    return show(description, tensors=config.tensors, keys=config.keys)
