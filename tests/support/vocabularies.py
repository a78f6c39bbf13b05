"""Vocabulary-only GGUFs of the model families whose templates ggft knows, small and made here.

Each has every byte, a few pieces, and the family's special tokens with the family's quirks: a space
put before text or not, special tokens that swallow the blanks after them, BOS added or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggft.llama.model import LlamaTokenizer
from ggft.prompts.template import Template, make_template
from tests.support.models import Spec as ModelSpec
from tests.support.models import model_metadata, write_gguf


@dataclass(frozen=True)
class Family:
    """What sets a family's vocabulary apart.

    Args:
        kind: `spm` or `bpe`.
        specials: Control tokens appended to the vocabulary.
        extra: Further metadata; a token's text stands for its id.
    """

    kind: str
    specials: tuple[str, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()


ID = "tokenizer.ggml.{}_token_id"
FAMILIES = {
    "llama2": Family("spm"),
    "mistral": Family("spm", ("[INST]", "[/INST]", "[TOOL_RESULTS]")),
    "gemma": Family(
        "spm",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        (
            ("tokenizer.ggml.add_space_prefix", False),
            (ID.format("bos"), "<bos>"),
            (ID.format("eos"), "<eos>"),
        ),
    ),
    "llama3": Family(
        "bpe",
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        (
            ("tokenizer.ggml.pre", "llama-bpe"),
            ("tokenizer.ggml.add_bos_token", True),
            (ID.format("bos"), "<|begin_of_text|>"),
            (ID.format("eos"), "<|end_of_text|>"),
        ),
    ),
    "chatml": Family("bpe"),
    "phi3": Family(
        "spm",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"),
        (("general.name", "Phi-3-mini"), (ID.format("eos"), "<|endoftext|>")),
    ),
}


def metadata_of(family: Family) -> dict[str, Any]:
    """Return the metadata of a family's model."""
    metadata = model_metadata(ModelSpec(vocab=family.kind))
    tokens = metadata["tokenizer.ggml.tokens"] = [
        *metadata["tokenizer.ggml.tokens"],
        *family.specials,
    ]
    n = len(family.specials)
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [3] * n
    if family.kind == "spm":
        metadata["tokenizer.ggml.scores"] = metadata["tokenizer.ggml.scores"] + [-1000.0] * n
    for key, value in family.extra:
        metadata[key] = tokens.index(value) if key.endswith("_token_id") else value
    metadata["llama.vocab_size"] = len(tokens)
    return metadata


class Model:
    """A family's tokenizer, and templates bound to it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.metadata = metadata_of(FAMILIES[name])
        path = folder / f"{name}.gguf"
        write_gguf(path, self.metadata, [])
        self.tokenizer = LlamaTokenizer(path)

    def template(self, name: str, own: str | None = None) -> Template:
        """Return a template; `own` is the chat template that the model brings."""
        metadata = dict(self.metadata)
        if own is not None:
            metadata["tokenizer.chat_template"] = own
        return make_template(name, metadata, self.tokenizer)

    def text(self, token: int | None) -> str:
        """Return a token's text, empty for None."""
        return "" if token is None else self.tokenizer.token_text(token)
