"""Find, by construction, who writes which part of a rendered conversation.

A conversation is rendered twice: once with every content replaced by a marker that cannot occur
in text, which shows the fixed text between the contents; once as it is, which must equal the
fixed text with the contents put back. What the model is to produce begins where the rendering
of the messages before it, with the generation prompt, ends. A template for which one of these
does not hold is refused, with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from ggft.prompts.messages import Message
from ggft.system.errors import InputError


class Side(IntEnum):
    """Who produces a part of the rendering."""

    PROMPT = 0  # given to the model
    ANSWER = 1  # produced by the model
    TAIL = 2  # fixed text right after an answer: the end token is in here


@dataclass(frozen=True)
class Part:
    """A piece of a rendering: fixed text of the template, or the content of a message.

    Attributes:
        text: The text.
        is_content: Whether it came from a message, so that nothing in it is a special token.
        side: Who produces it.
        learn: Whether the loss counts it, if the model produces it.
    """

    text: str
    is_content: bool
    side: Side
    learn: bool


@dataclass(frozen=True)
class _Item:
    """A part of a shape: fixed text, or the number of the content that stands there.

    Number 2i is the content of message i, 2i + 1 its input. `turn` is the message whose answer
    or tail this is, −1 for prompts.
    """

    what: str | int
    side: Side
    turn: int


class UnstableError(InputError):
    """A template writes a conversation otherwise than its prompts; see `AssistantMask`."""


RenderAll = Callable[[Sequence[tuple[Sequence[Message], bool]]], list[str | InputError]]

MARK_OPEN, MARK_CLOSE = "\ue0c5", "\ue0c6"  # private use; a template that has them is refused
_MARK = re.compile(f"{MARK_OPEN}(\\d+){MARK_CLOSE}")
# Answers at either end of a conversation whose beginnings are found by rendering what is before.
N_ASKED = 8
_OTHER = "choose another template, for example --template chatml"


def joined(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with `input` appended to the content."""
    return [
        {**m, "content": f"{m['content']}\n{m['input']}", "input": ""} if m.get("input") else m
        for m in messages
    ]


class AssistantMask:
    """Split renderings of one template into parts.

    Some templates write earlier turns otherwise than the last one (without its reasoning, or with
    the system message moved). Of such a conversation only the last answer can be learned; the
    answers before it must be given as context (`learn` false), or `UnstableError` is raised.

    Args:
        render: Renders conversations, each with or without the generation prompt.
    """

    def __init__(self, render: RenderAll) -> None:
        self._render = render
        self._shapes: dict[tuple[object, ...], tuple[_Item, ...]] = {}

    def split(self, messages: Sequence[Message], *, prompt: bool) -> list[Part]:
        """Return the parts of the rendering of `messages`.

        Args:
            messages: The conversation. Unless `prompt`, it ends with an assistant's turn.
            prompt: Whether to add the generation prompt.

        Raises:
            InputError: The template fails, or treats these contents as more than opaque text.
        """
        parts = self.split_all([messages], prompt=prompt)[0]
        if isinstance(parts, InputError):
            raise parts
        return parts

    def split_all(
        self, conversations: Sequence[Sequence[Message]], *, prompt: bool
    ) -> list[list[Part] | InputError]:
        """Split many conversations; one that cannot be split gives its error instead."""
        wanted = [(messages, prompt) for messages in conversations]
        if not prompt:
            wanted += [(messages[:-1], True) for messages in conversations]
        rendered = self._render(wanted)
        results: list[list[Part] | InputError] = []
        for n, messages in enumerate(conversations):
            asked = None if prompt else rendered[len(conversations) + n]
            try:
                results.append(self._parts(messages, rendered[n], asked))
            except InputError as error:
                results.append(error)
        return results

    def _parts(
        self, messages: Sequence[Message], whole: str | InputError, asked: str | InputError | None
    ) -> list[Part]:
        """Return the parts of `whole`; `asked` is the prompt of its last answer, if it has one."""
        for text in (whole, asked):
            if isinstance(text, InputError):
                raise text
        prompt = asked is None
        key = (
            prompt,
            *((m["role"], m.get("learn", True), *map(is_filled, _texts(m))) for m in messages),
        )
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = self._learn(messages, prompt)
        contents = [text for m in messages for text in _texts(m)]
        texts = _fill(shape, contents, str(whole))
        if asked is not None and texts is not None:
            own = len(messages) - 1
            before = "".join(t for t, x in zip(texts, shape, strict=True) if x.turn != own)
            texts = texts if before == asked else None
        if texts is None:
            raise InputError(
                "the chat template changes this conversation's text in a way that cannot be split",
                hint=_OTHER,
            )
        return [
            Part(
                text,
                isinstance(item.what, int),
                item.side,
                item.turn >= 0 and _is_learned(messages[item.turn]),
            )
            for text, item in zip(texts, shape, strict=True)
            if text
        ]

    def _learn(self, messages: Sequence[Message], prompt: bool) -> tuple[_Item, ...]:
        """Find the fixed text around the contents, and where each answer begins."""
        marked = [_marked(m, 2 * i) for i, m in enumerate(messages)]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        asked = answers
        if len(answers) > 2 * N_ASKED:
            asked = [*answers[:N_ASKED], *answers[-N_ASKED:]]
        whole, *befores = self._render([(marked, prompt), *((marked[:i], True) for i in asked)])
        starts: dict[int, int] = {}
        for i, before in zip(asked, befores, strict=True):
            for text in (whole, before):
                if isinstance(text, InputError):
                    raise text
            if str(whole).startswith(str(before)):
                starts[len(str(before))] = i
            elif not prompt and messages[i].get("learn", True):
                raise _unstable(i, str(before), str(whole))
        if isinstance(whole, InputError):
            raise whole
        if asked != answers:
            self._start_between(whole, marked, answers[N_ASKED:-N_ASKED], starts)
        shape = _cut(whole, starts)
        _check(shape, messages, set(starts.values()))
        return shape

    def _start_between(
        self, whole: str, marked: Sequence[Message], answers: Sequence[int], starts: dict[int, int]
    ) -> None:
        """Add to `starts` those of many answers; to render what is before each takes too long.

        Where the fixed text in front of an answer is one that stands in front of others, too, the
        answer begins at the same place of it.
        """
        marks = list(_MARK.finditer(whole))
        ends = [0, *(mark.end() for mark in marks)]
        places = {
            int(mark[1]): (mark.start(), whole[end : mark.start()])
            for mark, end in zip(marks, ends, strict=False)
        }
        left: dict[str, int] = {}  # characters of a fixed text that are the answer's
        for start, i in starts.items():
            place, fixed = places.get(2 * i, (start, ""))
            left[fixed] = place - start
        for i in answers:
            place, fixed = places.get(2 * i, (0, ""))
            if fixed not in left:
                before = self._render([(marked[:i], True)])[0]
                if isinstance(before, InputError):
                    raise before
                if not whole.startswith(before):
                    raise _unstable(i, before, whole)
                left[fixed] = place - len(before)
            starts[place - left[fixed]] = i


def _unstable(i: int, before: str, whole: str) -> UnstableError:
    return UnstableError(
        f"the chat template cannot be split at message {i + 1}: the prompt that it writes before an"
        " answer is not how the whole conversation begins",
        found=_after_common(before, whole),
        expected=_after_common(whole, before),
        hint=_OTHER,
    )


def _texts(message: Message) -> tuple[str, str]:
    return message["content"], message.get("input", "")


def _is_learned(answer: Message) -> bool:
    """Whether an answer is to be learned; an empty one would only teach to be silent."""
    return answer.get("learn", True) and is_filled(answer["content"])


def is_filled(text: str) -> bool:
    """Return whether there is more than blanks in a text."""
    return bool(text) and not text.isspace()


def _marked(message: Message, number: int) -> Message:
    """Return the message with markers `number` and `number + 1` for its texts.

    Blank texts stay as they are, for templates ask whether there is text; but an answer's place
    must be known even if it is empty.
    """
    always = message["role"] == "assistant"
    content, extra = (
        f"{MARK_OPEN}{number + n}{MARK_CLOSE}" if is_filled(text) or (always and not n) else text
        for n, text in enumerate(_texts(message))
    )
    return {"role": message["role"], "content": content, "input": extra}


def _after_common(text: str, other: str) -> str:
    """Return the first characters of `text` that `other` does not have in the same place."""
    n = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
    n = min(len(text), len(other)) if n is None else n
    return repr(text[n : n + 40]) if text[n:] else "nothing more"


def _cut(whole: str, starts: dict[int, int]) -> tuple[_Item, ...]:
    """Cut a marked rendering at its markers and where answers start.

    Args:
        whole: The rendering.
        starts: Position of each answer's first character → index of its message.
    """
    items: list[_Item] = []
    side, turn, pos = Side.PROMPT, -1, 0
    left = sorted(starts)
    while pos < len(whole) or left:
        if left and left[0] == pos:
            side, turn = Side.ANSWER, starts[left.pop(0)]
            continue
        if whole[pos] == MARK_OPEN:
            end = whole.index(MARK_CLOSE, pos)
            number = int(whole[pos + 1 : end])
            if side is Side.TAIL:
                side, turn = Side.PROMPT, -1
            items.append(_Item(number, side, turn))
            pos = end + 1
            if side is Side.ANSWER and number == 2 * turn:
                side = Side.TAIL
            continue
        stop = whole.find(MARK_OPEN, pos)
        stop = min([stop if stop >= 0 else len(whole), *left[:1]])
        items.append(_Item(whole[pos:stop], side, turn))
        pos = stop
        if side is Side.TAIL:
            side, turn = Side.PROMPT, -1
    return tuple(items)


def _check(shape: tuple[_Item, ...], messages: Sequence[Message], answers: set[int]) -> None:
    """Raise InputError unless every content is there, answers in their turns and only there."""
    seen: set[int] = set()
    for item in shape:
        if not isinstance(item.what, int):
            continue
        index = item.what // 2
        seen.add(item.what)
        is_answer = index in answers
        if is_answer != (item.side is Side.ANSWER) or (is_answer and index != item.turn):
            raise InputError(
                f"the chat template writes message {index + 1} where it does not belong",
                found=f"role {messages[index]['role']!r}",
                hint=_OTHER,
            )
    for index, message in enumerate(messages):
        if any(is_filled(t) and 2 * index + n not in seen for n, t in enumerate(_texts(message))):
            raise InputError(
                f"the chat template leaves out message {index + 1}",
                found=f"role {message['role']!r}",
                hint="remove such messages from the data, or " + _OTHER,
            )


def _fill(shape: tuple[_Item, ...], contents: list[str], whole: str) -> list[str] | None:
    """Put the contents, as they are or stripped, into the shape; None if that is not `whole`."""
    texts = [x.what if isinstance(x.what, str) else contents[x.what] for x in shape]
    if "".join(texts) == whole:
        return texts
    texts, pos = [], 0
    for n, item in enumerate(shape):
        after = shape[n + 1].what if n + 1 < len(shape) else None
        options = [item.what] if isinstance(item.what, str) else _stripped(contents[item.what])
        for text in options:
            end = pos + len(text)
            if whole.startswith(text, pos) and (
                not isinstance(after, str) or whole.startswith(after, end)
            ):
                break
        else:
            return None
        texts.append(text)
        pos = end
    return texts if pos == len(whole) else None


def _stripped(text: str) -> list[str]:
    return list(dict.fromkeys((text, text.strip(), text.lstrip(), text.rstrip())))
