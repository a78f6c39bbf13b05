"""Find, by construction, who writes which part of a rendered conversation.

A conversation is rendered twice: once with every content replaced by a marker that cannot occur
in text, which shows the fixed text between the contents; once as it is, which must equal the
fixed text with the contents put back. What the model is to produce begins where the rendering
of the messages before it, with the generation prompt, ends. A template for which one of these
does not hold is refused, with the reason; but thoughts, which templates open, close, move and
leave out, are put where the model would write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ggft.prompts.answers import AnswerFinder
from ggft.prompts.builtin import OTHER
from ggft.prompts.dialect import Dialect, RenderAll
from ggft.prompts.marks import (
    N_SLOTS,
    SHOWN_CHARS,
    Item,
    Side,
    Span,
    after_common,
    contents,
    cut,
    fill,
    is_filled,
    last_mark_end,
    mark,
    marked,
)
from ggft.prompts.messages import Message
from ggft.system.errors import InputError

N_ASKED = 8  # answers at either end of a conversation whose beginnings are found by rendering
MAX_SHAPES = 4096  # kept; rows with tools of their own have a shape each


@dataclass(frozen=True)
class Part:
    """A piece of a rendering: fixed text of the template, or the content of a message.

    Attributes:
        text: The text; empty for an end that no text of the template stands for.
        is_content: Whether it came from a message, so that nothing in it is a special token.
        side: Who produces it.
        learn: Whether the loss counts it, if the model produces it.
    """

    text: str
    is_content: bool
    side: Side
    learn: bool


@dataclass(frozen=True)
class _Shape:
    """What is fixed in conversations of one kind.

    Attributes:
        whole: The rendering of the whole, to compare with.
        items: What is trained, or asked; the same but for thoughts and the last end.
    """

    whole: tuple[Item, ...]
    items: tuple[Item, ...]


class UnstableError(InputError):
    """A template writes earlier answers otherwise than the last one; see `AssistantMask`."""


class AssistantMask:
    """Split renderings of one template into parts.

    Some templates write earlier turns otherwise than the last one (without its thought, or with
    another end). Of such a conversation only the last answer can be learned; the answers before it
    must be given as context (`learn` false), or `UnstableError` is raised.

    Args:
        render: Renders conversations, each with or without the generation prompt.
        dialect: How the template is spoken to.
        end_of: Returns where the end of an answer stands in the fixed text after its content, the
            second argument saying whether it calls tools; None if it has none.
        implied_end: The fixed text that ends a last answer which has none; may be empty.
    """

    def __init__(
        self,
        render: RenderAll,
        dialect: Dialect,
        end_of: Callable[[str, bool], int | None],
        implied_end: str,
    ) -> None:
        self._render_all = render
        self._dialect = dialect
        self._finder = AnswerFinder(self._render, dialect)
        self._end_of = end_of
        self._implied_end = implied_end
        self._shapes: dict[tuple[object, ...], _Shape] = {}

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

    def _render(self, requests: Sequence[tuple[Sequence[Message], bool]]) -> list[str | InputError]:
        write = self._dialect.write
        return self._render_all([(write(messages), prompt) for messages, prompt in requests])

    def _parts(
        self, messages: Sequence[Message], whole: str | InputError, asked: str | InputError | None
    ) -> list[Part]:
        """Return the parts of `whole`; `asked` is the prompt of its last answer, if it has one."""
        prompt = asked is None
        whole, asked = _text(whole), _text(asked or "")
        key = (prompt, *map(_kind, messages))
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            shape = self._shapes[key] = self._learn(messages, prompt)
        given = [text for m in messages for text in contents(m)]
        texts = fill(shape.whole, given, whole)
        if texts is not None and shape.items is not shape.whole:
            said = zip(shape.whole, texts, strict=True)
            known = {x.what: text for x, text in said if isinstance(x.what, int)}
            texts = [
                x.what if isinstance(x.what, str) else known.get(x.what, given[x.what].strip())
                for x in shape.items
            ]
        if texts is not None and not prompt:
            own = len(messages) - 1
            before = "".join(t for t, x in zip(texts, shape.items, strict=True) if x.turn != own)
            texts = texts if before == asked else None
        if texts is None:
            raise InputError(
                "the chat template changes this conversation's text in a way that cannot be split",
                hint=OTHER,
            )
        return [
            Part(
                text,
                isinstance(item.what, int),
                item.side,
                item.turn >= 0 and _is_learned(messages[item.turn]),
            )
            for text, item in zip(texts, shape.items, strict=True)
            if text or item.side is Side.END
        ]

    def _learn(self, messages: Sequence[Message], prompt: bool) -> _Shape:
        """Find the fixed text around the contents, and where each answer begins."""
        with_marks = [marked(m, i) for i, m in enumerate(messages)]
        if prompt:
            shape = cut(_text(self._render([(with_marks, True)])[0]), [])
            _check_shown(shape, messages)
            return _Shape(shape, shape)
        last = len(messages) - 1
        learned = [
            i for i, m in enumerate(messages)
            if m["role"] == "assistant" and (m.get("learn", True) or i == last)
        ]  # fmt: skip
        asked = learned
        if len(learned) > 2 * N_ASKED:
            asked = [*learned[:N_ASKED], *learned[-N_ASKED:]]
        befores, wholes = self._around(with_marks, asked)
        rest = self._finder.rest(last, messages, with_marks, befores[last], wholes[last])
        stop, ended = self._stop(rest, messages[last])
        _check_calls(messages[last], rest[:stop])
        full = befores[last] + rest[:stop]
        spans = [Span(len(befores[last]), len(full), last)]
        for i in asked[:-1]:
            spans.append(self._span(i, messages, with_marks, full, befores[i], wholes[i]))
        if asked != learned:
            for i in learned[N_ASKED:-N_ASKED]:
                known = self._alike(i, full, spans)
                if known is None:
                    before, whole = self._around(with_marks, [i])
                    known = self._span(i, messages, with_marks, full, before[i], whole[i])
                spans.append(known)
        items = cut(full, sorted(spans))
        if not ended:
            items = (*items, Item(self._implied_end, Side.END, last))
        _check_shown(items, messages)
        _check_sides(items, messages, {span.turn for span in spans})
        return _Shape(cut(wholes[last], []), items)

    def _around(
        self, with_marks: Sequence[Message], answers: Sequence[int]
    ) -> tuple[dict[int, str], dict[int, str]]:
        """Return the renderings before answers, and those that end with them."""
        requests = [(with_marks[:i], True) for i in answers]
        requests += [(with_marks[: i + 1], False) for i in answers]
        rendered = [_text(text) for text in self._render(requests)]
        n = len(answers)
        return dict(zip(answers, rendered[:n], strict=True)), dict(
            zip(answers, rendered[n:], strict=True)
        )

    def _stop(self, rest: str, message: Message) -> tuple[int, bool]:
        """Return where an answer ends within what follows its prompt, and whether it has an end."""
        place, calls = last_mark_end(rest), "tool_calls" in message
        stop = self._end_of(rest[place:], calls)
        if stop is None:
            return len(rest.rstrip()) if calls else place, False
        return place + stop, True

    def _span(
        self, i: int, messages: Sequence[Message], with_marks: Sequence[Message], full: str,
        before: str, whole: str,
    ) -> Span:  # fmt: skip
        """Return where an earlier answer stands in the whole.

        Raises:
            UnstableError: The whole has it otherwise than it would be as the last.
        """
        own = self._finder.rest(i, messages, with_marks, before, whole)
        stop, ended = self._stop(own, messages[i])
        _check_calls(messages[i], own[:stop])
        answer = before + own[:stop] + ("" if ended else self._implied_end)
        if not full.startswith(answer) or not (ended or self._implied_end):
            raise _unstable(i, answer, full)
        return Span(len(before), len(answer), i)

    def _alike(self, i: int, full: str, spans: Sequence[Span]) -> Span | None:
        """Return where one of many answers stands; to render what is before each takes too long.

        Where the fixed text in front of an answer is one that stands in front of another, too, the
        answer begins at the same place of it; and it ends as that one does.
        """
        front, place, tail = _surroundings(i, full)
        for start, stop, other in reversed(spans[1:]):
            other_front, other_place, other_tail = _surroundings(other, full)
            end = full[other_tail:stop]
            if place >= 0 and front == other_front and end and full.startswith(end, tail):
                return Span(place - (other_place - start), tail + len(end), i)
        return None


def _surroundings(i: int, full: str) -> tuple[str, int, int]:
    """Return the fixed text before an answer's content, where that stands, and where it ends."""
    content = mark(N_SLOTS * i)
    place = full.find(content)
    return full[last_mark_end(full[: max(place, 0)]) : max(place, 0)], place, place + len(content)


def _text(rendered: str | InputError) -> str:
    if isinstance(rendered, InputError):
        raise rendered
    return rendered


_SHAPING = frozenset(("tool_calls", "name", "tool_call_id", "tools", "documents", "reasoning"))


def _kind(message: Message) -> tuple[object, ...]:
    """Return what the fixed text around a message may depend on."""
    kind = (message["role"], message.get("learn", True), *map(is_filled, contents(message)))
    shaping = message.keys() & _SHAPING
    if not shaping:
        return kind
    extra = {k: v for k, v in message.items() if k in shaping and k != "reasoning"}
    return (*kind, "reasoning" in message, json.dumps(extra))


def _is_learned(answer: Message) -> bool:
    """Whether an answer is to be learned; an empty one would only teach to be silent."""
    return answer.get("learn", True) and (is_filled(answer["content"]) or "tool_calls" in answer)


def _unstable(i: int, before: str, whole: str) -> UnstableError:
    return UnstableError(
        f"the chat template cannot be split at message {i + 1}: it writes this answer otherwise"
        " once others follow",
        found=after_common(before, whole),
        expected=after_common(whole, before),
        hint=OTHER,
    )


def _check_sides(shape: tuple[Item, ...], messages: Sequence[Message], answers: set[int]) -> None:
    """Raise InputError unless answers are in their turns and only there."""
    for item in shape:
        if not isinstance(item.what, int):
            continue
        index = item.what // N_SLOTS
        if (index in answers) != (item.side is Side.ANSWER) or (
            item.side is Side.ANSWER and index != item.turn
        ):
            raise InputError(
                f"the chat template writes message {index + 1} where it does not belong",
                found=f"role {messages[index]['role']!r}",
                hint=OTHER,
            )


def _check_shown(shape: tuple[Item, ...], messages: Sequence[Message]) -> None:
    """Raise InputError unless all that is said is there; thoughts of earlier answers may be not."""
    seen = {item.what for item in shape}
    for index, message in enumerate(messages):
        said = contents(message)[:2]
        if any(is_filled(t) and N_SLOTS * index + n not in seen for n, t in enumerate(said)):
            raise InputError(
                f"the chat template leaves out message {index + 1}",
                found=f"role {message['role']!r}",
                hint="remove such messages from the data, or " + OTHER,
            )
    fixed = "".join(item.what for item in shape if isinstance(item.what, str))
    for key, text in _row_texts(messages):
        _require(text, fixed, f"does not show a row's {key}")


def _check_calls(answer: Message, text: str) -> None:
    """Raise InputError unless an answer's calls are in its text."""
    for call in answer.get("tool_calls", ()):
        _require(call["name"], text, "does not write tool_calls")


def _require(text: str, fixed: str, fault: str) -> None:
    if text not in fixed and json.dumps(text, ensure_ascii=False)[1:-1] not in fixed:
        raise InputError(
            f"the chat template {fault}",
            found=repr(text[:SHOWN_CHARS]),
            hint="remove them from the data, or " + OTHER,
        )


def _row_texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return what a rendering must hold of tools and documents."""
    if not messages:
        return []
    first = messages[0]
    found = []
    for tool in first.get("tools", ()):
        function = tool.get("function")
        told = function if isinstance(function, dict) else tool
        found.append(("tools", str(told.get("description") or told.get("name", ""))))
    for document in first.get("documents", ()):
        texts = [value for value in document.values() if isinstance(value, str)]
        found.append(("documents", max(texts, key=len, default="")))
    return found
