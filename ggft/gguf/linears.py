"""Names of linear layers: llama.cpp's, Hugging Face's, groups, patterns."""

from __future__ import annotations

import difflib

from ggft.system.errors import InputError

TARGET_ALIASES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TARGETS = tuple(TARGET_ALIASES.values())
TARGET_GROUPS = {
    "all": TARGETS,
    "attention": TARGETS[:4],
    "mlp": TARGETS[4:],
}


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
