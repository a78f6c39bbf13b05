"""A loaded model that answers conversations."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

from ggft.adapters.adapter import read_adapter
from ggft.gguf.finite import check_and_hash, check_values
from ggft.gguf.read import check_model, read_gguf
from ggft.hub.download import find_model
from ggft.llama.model import LlamaModel
from ggft.prompts.messages import Message
from ggft.settings.commands import GenerateConfig
from ggft.settings.declared import asked_template
from ggft.setup.inputs import choose_template, print_warning
from ggft.system.errors import InputError
from ggft.system.progress import print_note
from ggft.system.text import printable


class Speaker:
    """A loaded model with its adapter and template, which answers conversations.

    Raises:
        InputError: A file that cannot be used, or an adapter made for another base or template.
        ResourceError: Not enough memory.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self._config = config
        file = read_gguf(find_model(config.model))
        check_model(file)
        # An adapter asks for the SHA-256 of its base: it comes of the same reading.
        (check_values if config.adapter is None else check_and_hash)(file)
        adapter = None if config.adapter is None else read_adapter(config.adapter, file)
        self._model = LlamaModel(
            file.path, config.adapter, adapter_scale=config.adapter_scale,
            n_ctx=config.context, threads=config.threads, device=config.device,
        )  # fmt: skip
        self._words = self._model.vocabulary
        self.template = choose_template(
            asked_template(config), adapter, file, self._words, print_warning
        )

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the answer to a conversation in printable pieces, whole characters only."""
        config = self._config
        ids = self.template.encode_prompt(messages)
        self.n_tokens = 0
        self._written = b""  # with control tokens, by which thoughts are told from answers
        # Templates differ in which side of the border a blank stands on; answers begin without one.
        decoder, begun = codecs.getincrementaldecoder("utf-8")("replace"), False
        tokens = self._model.generate(
            ids, stop_ids=self.template.stop_ids, max_tokens=config.max_tokens,
            temperature=config.temperature, top_p=config.top_p, seed=config.seed,
        )  # fmt: skip
        for token in tokens:
            self.n_tokens += 1
            piece = self._words.piece(token)
            self._written += piece
            piece = b"" if self._words.is_control(token) else piece
            text = decoder.decode(piece)
            text = text if begun else text.lstrip()
            if text:
                begun = True
                yield printable(text)
        if rest := decoder.decode(b"", final=True):
            yield printable(rest)

    @property
    def turn(self) -> Message:
        """The last answer as a turn of the conversation, its thought apart."""
        return self.template.read_answer(printable(self._written.decode("utf-8", "replace")))

    @property
    def was_cut(self) -> bool:
        """Whether the last answer ended only because it reached the longest length."""
        return self.n_tokens >= self._config.max_tokens

    def close(self) -> None:
        """Give the model's memory back."""
        self._model.close()


def checked_text(text: str, what: str) -> str:
    """Return `text` if a model can read it.

    Raises:
        InputError: It is empty, or holds NUL or half a character.
    """
    if not text.strip():
        raise InputError(f"{what} is empty")
    if "\0" in text:
        raise InputError(f"{what} holds a NUL character", offset=text.index("\0"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{what} is not valid UTF-8", found=f"half a character after {error.start} characters"
        ) from None
    return text


def stream_answer(speaker: Speaker, messages: Sequence[Message]) -> Message:
    """Stream an answer to stdout, and return its turn."""
    for piece in speaker.answer(messages):
        print(piece, end="", flush=True)
    print(flush=True)
    if speaker.was_cut:
        print_note(f"(cut after {speaker.n_tokens} tokens; --max-tokens allows more)")
    return speaker.turn
