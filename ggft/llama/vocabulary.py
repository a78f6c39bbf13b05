"""The vocabulary of a loaded model: text to token ids and back, through llama.cpp's C functions.

The functions are handed in, so that `ggft.llama.model` stays the only importer of `llama_cpp`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from ggft.system.errors import InputError

# Has every byte that UTF-8 can have, in characters of each length.
_TRIAL = "".join(
    chr(code)
    for some in ((0, 0xC0), (0xC0, 0x800, 63), (0x800, 0xD800, 997), (0xE000, 0x110000, 4099))
    for code in range(*some)
)


class Vocabulary:
    """Text to token ids and back.

    Args:
        api: llama.cpp's C functions, as `llama_cpp.llama_cpp` has them.
        model: A handle of theirs that outlives this object.
        path: The model's file, for messages.

    Raises:
        InputError: The model has no vocabulary.
    """

    def __init__(self, api: Any, model: Any, path: Path) -> None:
        self._api = api
        self._vocab = api.llama_model_get_vocab(model)
        self._path = path
        self._pieces: dict[int, bytes] = {}
        self.n_vocab = int(self._api.llama_vocab_n_tokens(self._vocab))
        if self.n_vocab <= 0:
            raise InputError("the file has no vocabulary", path=path)
        self.bos_id = self._special(self._api.llama_vocab_bos)
        self.eos_id = self._special(self._api.llama_vocab_eos)
        self.eot_id = self._special(self._api.llama_vocab_eot)
        self.add_bos = bool(self._api.llama_vocab_get_add_bos(self._vocab))

    def try_out(self) -> None:
        """Use everything once, so that what llama.cpp crashes at it crashes at here."""
        for special in (False, True):
            self.encode(_TRIAL, special=special)
        ids = (self._api.llama_token * self.n_vocab)(*range(self.n_vocab))
        # Writes nothing, says only how long the text is.
        self._api.llama_detokenize(self._vocab, ids, self.n_vocab, None, 0, False, True)

    def _special(self, getter: Any) -> int | None:
        token = int(getter(self._vocab))
        return token if token >= 0 else None

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Every token at which llama.cpp ends a generation (EOS, EOT and their like)."""
        is_end = self._api.llama_vocab_is_eog
        return frozenset(i for i in range(self.n_vocab) if is_end(self._vocab, i))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the token ids of `text`; BOS is never added. Several threads may call it.

        Args:
            text: Any Unicode text without lone surrogates.
            special: Whether names of special tokens in the text become those tokens.

        Raises:
            InputError: The text is not valid Unicode.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                "text is not valid Unicode", found=repr(text[error.start]),
                hint="replace or remove the lone surrogate",
            ) from None  # fmt: skip
        room = len(data) + 8  # a byte is at most one token, but for the space put in front
        while True:
            ids = (self._api.llama_token * room)()
            n = int(
                self._api.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
            )
            if n >= 0:
                return list(ids[:n])
            room = -n

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; a special token's are its name."""
        known = self._pieces.get(token)
        if known is None:
            if not 0 <= token < self.n_vocab:
                raise InputError(
                    "token id outside the vocabulary", path=self._path, found=token,
                    expected=f"0 to {self.n_vocab - 1}",
                )  # fmt: skip
            room = 64
            buffer = ctypes.create_string_buffer(room)
            n = self._api.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            if n < 0:
                buffer = ctypes.create_string_buffer(-n)
                n = self._api.llama_token_to_piece(self._vocab, token, buffer, -n, 0, True)
            known = self._pieces[token] = buffer.raw[:n]
        return known

    def is_control(self, token: int) -> bool:
        """Whether a token steers the model and stands for no text, such as `<|im_start|>`."""
        return bool(self._api.llama_vocab_is_control(self._vocab, token))

    def decode(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`, special tokens by name; may end within a character."""
        return b"".join(map(self.piece, ids))

    def token_text(self, token: int) -> str:
        """Return a token as the vocabulary writes it, such as `Ġthe` or `▁the`."""
        if not 0 <= token < self.n_vocab:
            raise InputError("token id outside the vocabulary", path=self._path, found=token)
        text: bytes = self._api.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")
