"""A tokenizer for any template: its control tokens are those that the template's text names."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|\[/?[A-Z_]{2,30}\]|</?s>|<(?:start|end)_of_\w+>|<bos>"
    r"|<eos>|<\|\w+>|<\w+\|>|\[e~\[|\]~[!b]\]|<seed:\w+>|<SPECIAL_\d+>|<sep>|<(?:start|end)_\w+>"
    r"|<(?:beginning|end)_of_sentence>|</assistant>|<extra_id_\d>|<\|_\w+_\|>"
)
# As llama.cpp's vocabularies know them, and those of templates that it does not know.
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>", "</s>", "<eos>",
    "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<seed:eos>", "<|eot|>", "[e~[", "<|role_end|>",
    "<|end_of_msg|>", "<|assistant_end|>", "<|message_sep|>", "<SPECIAL_12>", "</assistant>",
    "<end_of_sentence>", "<sep>", "[EOS]", "<|EOT|>", "<|endofturn|>", "<|calls|>",
    "<|tool_response>",
)  # fmt: skip
_BYTES = 256


class FakeTokenizer:
    """Bytes, and control tokens; no text is merged, so that a text's ids say all of it."""

    add_bos = False
    bos_id: int | None = _BYTES
    eos_id: int | None = _BYTES + 1
    eot_id: int | None = None

    def __init__(self, source: str) -> None:
        own = [text for text in _CONTROL.findall(source) if text != "</s>"]
        self.specials = list(dict.fromkeys(["<s>", "</s>", *own]))
        self.n_vocab = _BYTES + len(self.specials)
        ends = (*ENDS, "<|user|>", "<|observation|>") if "[gMASK]" in source else ENDS
        self._end_ids = frozenset(_BYTES + i for i, t in enumerate(self.specials) if t in ends)
        longest = sorted(self.specials, key=len, reverse=True)
        self._find = re.compile("(" + "|".join(map(re.escape, longest)) + ")")

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a generation."""
        return self._end_ids

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return ids; control tokens are found only if `special`."""
        ids: list[int] = []
        for n, piece in enumerate(self._find.split(text) if special else [text]):
            ids += [_BYTES + self.specials.index(piece)] if n % 2 else piece.encode()
        return ids

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the text of ids."""
        return b"".join(self.token_text(i).encode() if i >= _BYTES else bytes([i]) for i in ids)

    def token_text(self, token: int) -> str:
        """Return a control token's text, a byte as a character."""
        return self.specials[token - _BYTES] if token >= _BYTES else chr(token)
