"""`ggft generate` and `ggft chat`: a base model and its adapter, asked the way they were trained.

The prompt's token ids come from the same template code as in training; the adapter says which
template that was. Answers go to stdout as they are made, everything else to stderr.
"""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from ggft.common_options import (
    adapter_option,
    adapter_scale_option,
    model_option,
    system_option,
    template_option,
    threads_option,
)
from ggft.errors import GgftError, InputError
from ggft.options import option
from ggft.terminal import printable

if TYPE_CHECKING:
    from ggft.chat_template import Message

CHAT_HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt and begin anew; without TEXT, show it
/help           this list
/exit           leave (as does the end of input)"""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of `ggft generate` and `ggft chat`."""

    model: str = model_option()
    adapter: str | None = adapter_option()
    adapter_scale: float = adapter_scale_option()
    template: str = template_option(trained=True)
    system: str | None = system_option()
    max_tokens: int = option(
        "--max-tokens", "--max-new-tokens", "-n", default=200, minimum=1, maximum=1_000_000,
        help="Longest answer in tokens",
    )  # fmt: skip
    temperature: float = option(
        "--temperature", "--temp", default=0.7, minimum=0.0, maximum=100.0,
        help="Randomness of the answer; 0 takes the likeliest token each time",
    )  # fmt: skip
    top_p: float = option(
        "--top-p", default=0.95, above=0.0, maximum=1.0,
        help="Choose among the likeliest tokens that have this share of probability",
    )  # fmt: skip
    seed: int | None = option(
        "--seed", default=None, minimum=0, maximum=2**31 - 1, shown="random",
        help="Makes sampling repeatable",
    )  # fmt: skip
    context: int = option(
        "--context", "--n-ctx", "-c", default=2048, minimum=16, maximum=2**24,
        help="Tokens of prompt and answer together, at most the model's own context",
    )  # fmt: skip
    threads: int | None = threads_option("llama.cpp's choice")
    device: str = option(
        "--device", default="auto", choices=("auto", "cpu"),
        help="auto: the GPU where there is one; cpu: never the GPU",
    )  # fmt: skip


class Speaker:
    """A loaded model with its adapter and template, which answers conversations.

    Raises:
        InputError: A file that cannot be used, or an adapter made for another base or template.
        ResourceError: Not enough memory.
    """

    def __init__(self, config: GenerateConfig) -> None:
        from ggft.adapter import choose_template, read_adapter
        from ggft.gguf import check_model, read_gguf
        from ggft.llamacpp import LlamaModel

        self._config = config
        file = read_gguf(config.model)
        check_model(file)
        adapter = None if config.adapter is None else read_adapter(config.adapter, file)
        self._model = LlamaModel(
            config.model, config.adapter, adapter_scale=config.adapter_scale,
            n_ctx=config.context, threads=config.threads, device=config.device,
        )  # fmt: skip
        self._words = self._model.vocabulary
        self.template = choose_template(config.template, adapter, file, self._words, note)

    def answer(self, messages: Sequence[Message]) -> Iterator[str]:
        """Yield the answer to a conversation in printable pieces, whole characters only."""
        config = self._config
        ids = self.template.encode_prompt(messages)
        self.n_tokens = 0
        # Templates differ in which side of the border a blank stands on; answers begin without one.
        decoder, begun = codecs.getincrementaldecoder("utf-8")("replace"), False
        tokens = self._model.generate(
            ids, stop_ids=self.template.stop_ids, max_tokens=config.max_tokens,
            temperature=config.temperature, top_p=config.top_p, seed=config.seed,
        )  # fmt: skip
        for token in tokens:
            self.n_tokens += 1
            piece = b"" if self._words.is_control(token) else self._words.piece(token)
            text = decoder.decode(piece)
            text = text if begun else text.lstrip()
            if text:
                begun = True
                yield printable(text)
        if rest := decoder.decode(b"", final=True):
            yield printable(rest)

    @property
    def was_cut(self) -> bool:
        """Whether the last answer ended only because it reached the longest length."""
        return self.n_tokens >= self._config.max_tokens

    def close(self) -> None:
        """Give the model's memory back."""
        self._model.close()


def note(text: str) -> None:
    """Print a line for people, on stderr."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(text, file=sys.stderr, flush=True)


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


def read_prompt(given: str | None, source: TextIO | None = None) -> str:
    """Return the prompt of `ggft generate`: the argument, or else what comes in by a pipe.

    Raises:
        InputError: No prompt, or one that is not text.
    """
    if given is not None and given != "-":
        return checked_text(given, "the prompt")
    source = source or sys.stdin
    if source is None or (given is None and source.isatty()):
        raise InputError(
            "no prompt", hint='give one: ggft generate "What is a llama?", or pipe one in'
        )
    try:
        text = source.read()
    except UnicodeDecodeError as error:
        raise InputError("the prompt is not valid UTF-8", offset=error.start) from None
    return checked_text(text.removesuffix("\n"), "the prompt")


def generate(config: GenerateConfig, prompt: str, extra: str | None = None) -> None:
    """Answer one prompt on stdout.

    Args:
        config: The settings.
        prompt: The user's turn, or the instruction.
        extra: The instruction's input, as in the `input` field of a data set's rows.
    """
    messages: list[Message] = []
    if config.system:
        messages.append({"role": "system", "content": checked_text(config.system, "--system")})
    turn: Message = {"role": "user", "content": prompt}
    if extra:
        turn["input"] = checked_text(extra, "--input")
    messages.append(turn)
    speaker = Speaker(config)
    try:
        _say(speaker, messages)
    finally:
        speaker.close()


def _say(speaker: Speaker, messages: Sequence[Message]) -> str:
    """Stream an answer to stdout, and return it."""
    pieces = []
    for piece in speaker.answer(messages):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    if speaker.was_cut:
        note(f"(cut after {speaker.n_tokens} tokens; --max-tokens allows more)")
    return "".join(pieces)


class Chat:
    """A conversation: its history, and what the user can do to it."""

    def __init__(self, speaker: Speaker, system: str | None) -> None:
        self._speaker = speaker
        self.system = system
        self.history: list[Message] = []

    def messages(self) -> list[Message]:
        """Return the conversation so far, system prompt first."""
        if self.system:
            return [{"role": "system", "content": self.system}, *self.history]
        return list(self.history)

    def say(self, text: str) -> None:
        """Take the user's turn and stream the answer; a turn that fails leaves no trace."""
        self.history.append({"role": "user", "content": checked_text(text, "the message")})
        try:
            answer = _say(self._speaker, self.messages())
        except BaseException:
            self.history.pop()
            raise
        self.history.append({"role": "assistant", "content": answer})

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; return whether the chat goes on."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/reset":
            self.history.clear()
            note("(the conversation is forgotten)")
        elif word == "/system":
            if rest.strip():
                self.system = checked_text(rest.strip(), "the system prompt")
                self.history.clear()
            note(f"(system prompt: {printable(self.system) if self.system else 'none'})")
        elif word == "/help":
            note(CHAT_HELP)
        else:
            note(f"(there is no command {printable(word)}; /help lists them)")
        return True


def chat(config: GenerateConfig) -> None:
    """Talk until /exit or the end of input; on a terminal an error ends a turn, not the chat."""
    if sys.stdin is None:
        raise InputError("chat needs an input", hint="use ggft generate, or pipe lines in")
    with_person = sys.stdin.isatty()
    speaker = Speaker(config)
    talk = Chat(speaker, config.system and checked_text(config.system, "--system"))
    if with_person:
        note("Type a message; /help lists the commands, /exit leaves.")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing for input()
    try:
        for line in _lines(with_person):
            try:
                if line.startswith("/"):
                    if not talk.command(line):
                        return
                elif line.strip():
                    talk.say(line)
            except KeyboardInterrupt:
                if not with_person:
                    raise
                note("\n(stopped)")
            except GgftError as error:
                if not with_person:
                    raise
                note(f"ggft: {printable(str(error))}")
    finally:
        speaker.close()


def _lines(with_person: bool) -> Iterator[str]:
    """Yield what is typed or piped in, line by line, without its end."""
    try:
        if with_person:
            with contextlib.suppress(EOFError):
                while True:
                    yield input("> ")
            note("")
        else:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError("the input is not valid UTF-8", offset=error.start) from None
