"""Names of linear layers: llama.cpp's, Hugging Face's, groups, patterns."""

from __future__ import annotations

import difflib
import re

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
TARGET_GROUPS = {
    "all": TARGETS,
    "attention": TARGETS[:4],
    "mlp": TARGETS[4:],
}


def block_of(name: str) -> tuple[int, str] | tuple[None, str]:
    """Return the block of a tensor and its name there; None and the whole name outside blocks."""
    match = _IN_BLOCK.fullmatch(name)
    return (None, name) if match is None else (int(match["block"]), match["name"])


def parse_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return llama.cpp's names of the linears to train, in the order of the block.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    chosen: set[str] = set()
    for name in names:
        if name in TARGET_GROUPS:
            chosen.update(TARGET_GROUPS[name])
        elif name in TARGET_ALIASES:
            chosen.add(TARGET_ALIASES[name])
        elif name in TARGETS:
            chosen.add(name)
        else:
            known = [*TARGET_GROUPS, *TARGETS, *TARGET_ALIASES]
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                "unknown target module", found=repr(name), expected=", ".join(known),
                hint=f"did you mean `{near[0]}`?" if near else None,
            )  # fmt: skip
    if not chosen:
        raise InputError("--target-modules names no linear")
    return tuple(name for name in TARGETS if name in chosen)


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
