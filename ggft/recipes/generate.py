"""`ggft generate` and `ggft chat`: a base model and its adapter, asked the way they were trained.

The prompt's token ids come from the same template code as in training; the adapter says which
template that was. Answers go to stdout as they are made, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from ggft.prompts.messages import Message
from ggft.settings.commands import GenerateConfig
from ggft.setup.answers import Speaker, checked_text, stream_answer
from ggft.system.errors import GgftError, InputError
from ggft.system.progress import print_note
from ggft.system.text import printable

CHAT_HELP = """\
/reset          forget the conversation
/system TEXT    set the system prompt and begin anew; without TEXT, show it
/help           this list
/exit           leave (as does the end of input)"""


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
        stream_answer(speaker, messages)
    finally:
        speaker.close()


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
            answer = stream_answer(self._speaker, self.messages())
        except BaseException:
            self.history.pop()
            raise
        self.history.append(answer)

    def command(self, line: str) -> bool:
        """Obey a line that begins with a slash; return whether the chat goes on."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/reset":
            self.history.clear()
            print_note("(the conversation is forgotten)")
        elif word == "/system":
            if rest.strip():
                self.system = checked_text(rest.strip(), "the system prompt")
                self.history.clear()
            print_note(f"(system prompt: {printable(self.system) if self.system else 'none'})")
        elif word == "/help":
            print_note(CHAT_HELP)
        else:
            print_note(f"(there is no command {printable(word)}; /help lists them)")
        return True


def chat(config: GenerateConfig) -> None:
    """Talk until /exit or the end of input; on a terminal an error ends a turn, not the chat."""
    if sys.stdin is None:
        raise InputError("chat needs an input", hint="use ggft generate, or pipe lines in")
    with_person = sys.stdin.isatty()
    speaker = Speaker(config)
    talk = Chat(speaker, config.system and checked_text(config.system, "--system"))
    if with_person:
        print_note("Type a message; /help lists the commands, /exit leaves.")
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
                print_note("\n(stopped)")
            except GgftError as error:
                if not with_person:
                    raise
                print_note(f"ggft: {printable(str(error))}")
    finally:
        speaker.close()


def _lines(with_person: bool) -> Iterator[str]:
    """Yield what is typed or piped in, line by line, without its end."""
    try:
        if with_person:
            with contextlib.suppress(EOFError):
                while True:
                    yield input("> ")
            print_note("")
        else:
            for line in sys.stdin:
                yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError("the input is not valid UTF-8", offset=error.start) from None
