"""What an old file leaves out, as its model family has it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ggft.legacy.reader import LegacyFile


@dataclass(frozen=True)
class Inference:
    """A value that the old file does not say: what, how much, and why."""

    what: str
    value: str
    why: str


def infer(
    file: LegacyFile,
    inferences: list[Inference],
    *,
    context: int | None,
    eps: float | None,
    rope_base: float | None,
) -> tuple[int, float, float]:
    """Return context length, norm epsilon and rope base: given, or those of the model's family.

    Where each came from is appended to `inferences`.
    """
    family, why, own_context, own_eps, own_rope_base = _family(file)
    inferences.append(Inference("family", family, why))
    for what, given, inferred in (
        ("context length", context, own_context),
        ("norm epsilon", eps, own_eps),
        ("rope base", rope_base, own_rope_base),
    ):
        value = inferred if given is None else given
        reason = f"as {family}" if given is None else "given"
        inferences.append(Inference(what, f"{value:g}", reason))
    return (
        own_context if context is None else context,
        own_eps if eps is None else eps,
        own_rope_base if rope_base is None else rope_base,
    )


def _family(file: LegacyFile) -> tuple[str, str, int, float, float]:
    """Return the family, why, and its context length, norm epsilon and rope base."""
    name = file.paths[0].name
    llama_1 = ("Llama 1", 2048, 1e-6, 10000.0)
    llama_2 = ("Llama 2", 4096, 1e-5, 10000.0)
    code_llama = ("Code Llama", 16384, 1e-5, 1e6)
    if file.container != "ggjt" or file.version < 3:
        found, why = llama_1, "the container is older than Llama 2"
    elif re.search(r"code[-_ ]?llama", name, re.IGNORECASE):
        found, why = code_llama, "the file's name"
    elif file.hparams.n_vocab == 32016:
        found, why = code_llama, "32016 tokens"
    elif file.n_head_kv < file.hparams.n_head:
        found, why = llama_2, "grouped-query attention"
    elif re.search(r"llama[-_ ]?2|llama[-_ ]?v2", name, re.IGNORECASE):
        found, why = llama_2, "the file's name"
    else:
        found, why = llama_1, "nothing says Llama 2; if it is, give --context 4096 --eps 1e-5"
    family, context, eps, rope_base = found
    return family, why, context, eps, rope_base
