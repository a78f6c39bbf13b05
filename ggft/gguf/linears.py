"""Names of linear layers: llama.cpp's, Hugging Face's, groups, patterns."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

from ggft.gguf.types import TensorInfo
from ggft.system.errors import InputError

# The linear layers of a block in order: where Hugging Face's models have each, and its shape in the
# letters of `ArchitectureTraits`.
_LINEARS = {
    "attn_q": ("self_attn.q_proj", "CQ"),
    "attn_k": ("self_attn.k_proj", "CK"),
    "attn_v": ("self_attn.v_proj", "CK"),
    "attn_output": ("self_attn.o_proj", "QC"),
    "ffn_gate": ("mlp.gate_proj", "CF"),
    "ffn_up": ("mlp.up_proj", "CF"),
    "ffn_down": ("mlp.down_proj", "FC"),
}
TARGETS = tuple(_LINEARS)
SHAPES = {name: shape for name, (_, shape) in _LINEARS.items()}
HF_PATHS = {name: path for name, (path, _) in _LINEARS.items()}
TARGET_ALIASES = {path.rpartition(".")[2]: name for name, path in HF_PATHS.items()}
_IN_BLOCK = re.compile(r"blk\.(?P<block>\d+)\.(?P<name>\w+)\.weight")
TARGET_GROUPS = {"all": "", "all-linear": "", "attention": "attn_", "mlp": "ffn_"}
# Where a model has several matrices as one.
_FUSED = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}


def block_of(name: str) -> tuple[int, str] | tuple[None, str]:
    """Return the block of a tensor and its name there; None and the whole name outside blocks."""
    match = _IN_BLOCK.fullmatch(name)
    return (None, name) if match is None else (int(match["block"]), match["name"])


def matrices_of_blocks(tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Return the names in their blocks of all matrices, in the order of the file."""
    found = [block_of(t.name) for t in tensors if len(t.shape) == 2 and min(t.shape) > 1]
    return tuple(dict.fromkeys(name for block, name in found if block is not None))


def parse_targets(names: tuple[str, ...], linears: tuple[str, ...] = TARGETS) -> tuple[str, ...]:
    """Return which of a model's linears to train, in their order.

    A name is llama.cpp's, Hugging Face's (of several matrices that the model has as one: that one),
    a group, or a pattern with `*`.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    chosen: set[str] = set()
    for name in names:
        matches = _matches(name, linears)
        if not matches:
            known = [*TARGET_GROUPS, *linears, *TARGET_ALIASES]
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                "unknown target module", found=repr(name), expected=", ".join(known),
                hint=f"did you mean `{near[0]}`?" if near else None,
            )  # fmt: skip
        chosen.update(matches)
    if not chosen:
        raise InputError("--target-modules names no linear")
    return tuple(name for name in linears if name in chosen)


def _matches(name: str, linears: tuple[str, ...]) -> list[str]:
    if name in TARGET_GROUPS:
        return [linear for linear in linears if linear.startswith(TARGET_GROUPS[name])]
    wanted = TARGET_ALIASES.get(name, name)
    if wanted not in linears and name in TARGET_ALIASES:
        wanted = _FUSED.get(wanted, wanted)
    return fnmatch.filter(linears, wanted)


def parse_layers(text: str, n_layer: int) -> tuple[int, int]:
    """Return (first, one past the last) of the blocks to train.

    Raises:
        InputError: not `all`, a count or `FIRST-LAST`, or outside the model's blocks.
    """
    if text == "all":
        return 0, n_layer
    first_text, dash, last_text = text.partition("-")
    try:
        if dash:
            first, end = int(first_text), int(last_text) + 1
        else:
            first, end = n_layer - int(first_text), n_layer
    except ValueError:
        first, end = -1, -1
    if not 0 <= first < end <= n_layer:
        raise InputError(
            "--layers names blocks that do not exist", found=repr(text),
            expected=f"all, 1 to {n_layer} for the last ones, or a range within 0-{n_layer - 1}",
        )  # fmt: skip
    return first, end
