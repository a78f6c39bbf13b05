"""An adapter as Hugging Face's PEFT keeps it: a folder with a configuration and safetensors.

PEFT calls the linears otherwise, and keeps the rows of q and k of llama models in another order:
Hugging Face rotates halves of a head, llama.cpp neighbouring pairs, so that the conversion of such
a model to GGUF interleaves the halves. The rows of a `lora_b` follow those of its linear.

Source: PEFT's LoraConfig and naming; `permute` in llama.cpp's conversion of llama models.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from ggft.adapters.adapter import A_SUFFIX, B_SUFFIX, Adapter, AdapterMeta, write_adapter
from ggft.adapters.safetensors import SafeTensor, read_safetensors, write_safetensors
from ggft.gguf.linears import HF_PATHS, TARGET_ALIASES, TARGETS, block_of
from ggft.gguf.read import DecoderInfo, GGUFFile, ModelInfo, as_decoder, check_decoder
from ggft.system.errors import InputError
from ggft.system.files import atomic_output, require_regular_file

if TYPE_CHECKING:
    from ggft.adapters.safetensors import FloatArray

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK, MAX_ALPHA = 1 << 20, 1e9

_PEFT_NAME = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)?layers\.(?P<block>\d+)\.(?:self_attn|mlp)\."
    r"(?P<target>\w+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
# Settings that change what the matrices mean, with what they must be.
_PLAIN: dict[str, tuple[Any, str]] = {
    "use_dora": (False, "DoRA"),
    "bias": ("none", "trained biases"),
    "lora_bias": (False, "biases in the LoRA"),
    "modules_to_save": (None, "modules trained whole"),
    "trainable_token_indices": (None, "trained tokens"),
    "rank_pattern": ({}, "ranks that differ by module"),
    "alpha_pattern": ({}, "alphas that differ by module"),
    "fan_in_fan_out": (False, "transposed weights"),
    "layer_replication": (None, "replicated layers"),
    "use_qalora": (False, "QALoRA"),
    "alora_invocation_tokens": (None, "activated LoRA"),
    "target_parameters": (None, "LoRA of bare parameters"),
}
# What our own adapters say beside the matrices travels in the metadata of the safetensors.
_KEPT = (
    "base_sha256", "base_name", "template", "template_sha256", "template_source",
    "template_arguments", "base_norms_sha256", "vocabulary_sha256",
)  # fmt: skip


def is_peft(path: Path) -> bool:
    """Return whether a path is a PEFT adapter's: its folder, or the safetensors in it."""
    folder = path.parent if path.suffix == ".safetensors" else path
    return (folder / CONFIG_FILE).is_file()


def write_peft(folder: Path, adapter: Adapter, info: ModelInfo) -> None:
    """Write an adapter into a folder as PEFT loads it.

    Raises:
        InputError: It changes tensors that PEFT's LoRA of linears cannot, or has several ranks.
        ResourceError: It cannot be written.
    """
    decoder = as_decoder(info, "PEFT's layout")
    arrays = adapter.arrays()
    ranks = {arrays[name + A_SUFFIX].shape[0] for name in adapter.base_names}
    if len(ranks) > 1:
        raise InputError(
            "the adapter has several ranks", path=adapter.path, found=sorted(ranks),
            expected="one",
        )  # fmt: skip
    out: dict[str, FloatArray] = {}
    modules: list[tuple[int, str]] = []
    for name, array in arrays.items():
        base_name, _, side = name.rpartition(".lora_")
        block, target = block_of(base_name)
        if block is None or target not in TARGETS:
            raise InputError(
                "PEFT has no place for this part of the adapter", path=adapter.path,
                found=base_name, expected="the linears " + ", ".join(TARGETS),
            )  # fmt: skip
        if side == "b":
            array = _to_halves(array, _n_heads(decoder, target))
            modules.append((block, target))
        module = f"layers.{block}.{HF_PATHS[target]}"
        out[f"base_model.model.model.{module}.lora_{side.upper()}.weight"] = array
    kept = {f"ggft.{key}": getattr(adapter.meta, key) for key in _KEPT}
    metadata = {"format": "pt", **{k: v for k, v in kept.items() if v is not None}}
    write_safetensors(folder / WEIGHTS_FILE, out, metadata)
    config = _config(adapter.meta, ranks.pop(), modules, info.n_layer)
    with atomic_output(folder / CONFIG_FILE) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(
    meta: AdapterMeta, rank: int, modules: list[tuple[int, str]], n_layer: int
) -> dict[str, Any]:
    """Return adapter_config.json; the base model is for the user to fill in."""
    blocks = sorted({block for block, _ in modules})
    targets = [name for name in TARGETS if any(name == target for _, target in modules)]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(meta.alpha) if meta.alpha.is_integer() else meta.alpha,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": [HF_PATHS[name].rpartition(".")[2] for name in targets],
    }
    if meta.dropout is not None:
        config["lora_dropout"] = meta.dropout
    if len(modules) != len(blocks) * len(targets):
        config["target_modules"] = [f"layers.{b}.{HF_PATHS[t]}" for b, t in modules]
    elif len(blocks) < n_layer:
        config |= {"layers_to_transform": blocks, "layers_pattern": "layers"}
    return config


def _n_heads(info: DecoderInfo, target: str) -> int:
    """Return the heads whose rows are in another order in GGUF; 0 where they are in the same."""
    if info.rope_kind != "normal":
        return 0
    return {"attn_q": info.n_head, "attn_k": info.n_head_kv}.get(target, 0)


def _to_halves(rows: FloatArray, n_heads: int) -> FloatArray:
    """Undo `_to_pairs`: rows (heads · D, R) in Hugging Face's order."""
    import numpy as np

    if not n_heads:
        return rows
    pairs = rows.reshape(n_heads, -1, 2, rows.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _to_pairs(rows: FloatArray, n_heads: int) -> FloatArray:
    """Interleave the halves of each head: rows (heads · D, R) in GGUF's order."""
    import numpy as np

    if not n_heads:
        return rows
    halves = rows.reshape(n_heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def convert_peft(source: Path, output: Path, base: GGUFFile) -> AdapterMeta:
    """Write a PEFT adapter as GGUF, whole or not at all; return what it says about itself.

    Args:
        source: The folder, or the safetensors in it.
        output: The GGUF to write.
        base: The model in GGUF, for its shapes and the order of its rows.

    Raises:
        InputError: Not a plain LoRA of the base's linears; the message says what else.
        ResourceError: It cannot be written.
    """
    import numpy as np

    info = check_decoder(base, "PEFT's layout")
    folder = source if source.is_dir() else source.parent
    rank, alpha, dropout = _read_config(folder / CONFIG_FILE)
    path = _weights_path(source)
    tensors, metadata = read_safetensors(path)
    sources: dict[str, tuple[SafeTensor, int]] = {}
    for name, tensor in tensors.items():
        match = _PEFT_NAME.fullmatch(name)
        target = TARGET_ALIASES.get(match["target"]) if match else None
        if match is None or target is None:
            raise InputError(
                "not a matrix of a LoRA on a linear", path=path, found=f"tensor {name!a}",
                expected="lora_A and lora_B of " + ", ".join(TARGET_ALIASES),
            )  # fmt: skip
        side, heads = (A_SUFFIX, 0) if match["side"] == "A" else (B_SUFFIX, _n_heads(info, target))
        sources[f"blk.{int(match['block'])}.{target}.weight{side}"] = (tensor, heads)
    if not sources:
        raise InputError("the adapter holds no matrices", path=path)
    _check_pairs(sources, base, rank)

    def get(name: str) -> FloatArray:
        tensor, heads = sources[name]
        array = tensor.read()
        if not np.isfinite(array).all():
            raise InputError(f"tensor {tensor.name!a} holds NaN or infinity", path=path)
        return _to_pairs(array, heads)

    kept = {key: metadata.get(f"ggft.{key}") for key in _KEPT}
    meta = AdapterMeta(
        architecture=base.architecture, rank=rank, alpha=alpha, dropout=dropout, **kept
    )
    shapes = {name: (t.shape[0], t.shape[1]) for name, (t, _) in sources.items()}
    write_adapter(output, shapes, get, meta, inputs=[path, *base.paths])
    return meta


def _read_config(path: Path) -> tuple[int, float, float | None]:
    """Return rank, alpha and dropout of a plain LoRA."""
    hint = "give the folder with it, as PEFT saves it"
    if require_regular_file(path, hint=hint) > MAX_CONFIG_BYTES:
        raise InputError("not the configuration of an adapter: too large", path=path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"the configuration cannot be read: {error}", path=path) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else "no JSON object"
        raise InputError("not a LoRA adapter", path=path, found=ascii(found), expected="'LORA'")
    for key, (plain, what) in _PLAIN.items():
        if config.get(key) and config[key] != plain:
            raise InputError(
                f"{what} cannot be converted", path=path, found=f"{key} {config[key]!a}"[:80],
                expected=ascii(plain), hint="merge it into its model with PEFT, then convert that",
            )  # fmt: skip
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_number(rank) or rank != int(rank) or not 1 <= rank <= MAX_RANK:
        raise InputError("r is not a rank", path=path, found=ascii(rank))
    if not _is_number(alpha) or not 0 < alpha <= MAX_ALPHA:
        raise InputError("lora_alpha is not usable", path=path, found=ascii(alpha))
    # Rank-stabilized LoRA divides by the root of the rank.
    factor = math.sqrt(rank) if config.get("use_rslora") else 1.0
    dropout = config.get("lora_dropout")
    if dropout is not None and not (_is_number(dropout) and 0 <= dropout <= 1):
        raise InputError("lora_dropout is not a share", path=path, found=ascii(dropout))
    return int(rank), float(alpha) * factor, None if dropout is None else float(dropout)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _weights_path(source: Path) -> Path:
    """Return the safetensors of an adapter."""
    path = source / WEIGHTS_FILE if source.is_dir() else source
    pickled = path.with_name("adapter_model.bin")
    if not path.exists() and pickled.exists():
        raise InputError(
            "a Python pickle, which is never opened here", path=pickled,
            expected=WEIGHTS_FILE, hint="save the adapter again with a current PEFT",
        )  # fmt: skip
    return path


def _check_pairs(sources: Mapping[str, tuple[SafeTensor, int]], base: GGUFFile, rank: int) -> None:
    """Check that every matrix has its counterpart, the rank, and the base's width."""
    for name, (tensor, _) in sources.items():
        stem, _, side = name.rpartition(".")
        other = stem + (B_SUFFIX if side == "lora_a" else A_SUFFIX)
        if other not in sources:
            raise _bad(tensor, "has no counterpart", name, other)
        linear = base.tensors.get(stem)
        if linear is None:
            raise _bad(tensor, "is for a linear that the base lacks", stem, f"as {base.path}")
        c_in, c_out = linear.shape[:2]
        expected = (rank, c_in) if side == "lora_a" else (c_out, rank)
        if tensor.shape != expected:
            raise _bad(tensor, "does not fit the base and r", tensor.shape, str(expected))


def _bad(tensor: SafeTensor, what: str, found: object, expected: str) -> InputError:
    return InputError(
        f"tensor {tensor.name!a} {what}", path=tensor.path, found=found, expected=expected
    )
