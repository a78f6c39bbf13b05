"""Render chat templates and find, by construction, who wrote which part of the rendering.

A conversation is rendered twice: once with every content replaced by a marker that cannot occur
in text, which shows the fixed text between the contents; once as it is, which must equal the
fixed text with the contents put back. What the model is to produce begins where the rendering
of the messages before it, with the generation prompt, ends. A template for which one of these
does not hold is refused, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypedDict

from .errors import InputError


class _RequiredKeys(TypedDict):
    role: str
    content: str


class Message(_RequiredKeys, total=False):
    """One turn of a conversation; roles are system, user, assistant and tool.

    `input` is the alpaca format's second field; templates that do not know it get it appended
    to the content by a newline.
    """

    input: str


class Side(IntEnum):
    """Who produces a part of the rendering."""

    PROMPT = 0  # given to the model
    ANSWER = 1  # produced by the model
    TAIL = 2  # fixed text right after an answer: the end token is in here


@dataclass(frozen=True)
class Part:
    """A piece of a rendering: fixed text of the template, or the content of a message."""

    text: str
    is_content: bool
    side: Side


@dataclass(frozen=True)
class _Shape:
    """The fixed structure of a rendering.

    Attributes:
        items: Fixed text (str), or the number of the content that stands there: 2i is the content
            of message i, 2i + 1 its input.
        sides: The side of each item.
    """

    items: tuple[str | int, ...]
    sides: tuple[Side, ...]


MARK_OPEN, MARK_CLOSE = "\ue0c5", "\ue0c6"  # private use: in no template and in no text we accept
MAX_RENDERED_CHARS = 1 << 20  # beyond four times the contents' size

Render = Callable[[Sequence[Message], bool], str]


def joined(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with `input` appended to the content."""
    return [
        {"role": m["role"], "content": f"{m['content']}\n{m['input']}"}
        if m.get("input")
        else {"role": m["role"], "content": m["content"]}
        for m in messages
    ]


class Splitter:
    """Split renderings of one template into parts.

    Args:
        render: Renders messages, with or without the generation prompt.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._shapes: dict[tuple[object, ...], _Shape] = {}

    def split(self, messages: Sequence[Message], *, prompt: bool) -> list[Part]:
        """Return the parts of the rendering of `messages`.

        Args:
            messages: The conversation. Unless `prompt`, it ends with an assistant's turn.
            prompt: Whether to add the generation prompt.

        Raises:
            InputError: The template fails, or treats these contents as more than opaque text.
        """
        whole = self._render(messages, prompt)
        key = (prompt, *((m["role"], *map(_filled, _texts(m))) for m in messages))
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = self._learn(messages, prompt)
        parts = _fill(shape, [text for m in messages for text in _texts(m)], whole)
        if parts is None:
            raise InputError(
                "the chat template changes this conversation's text in a way that cannot be split",
                hint="choose another template, for example --template chatml",
            )
        return parts

    def _learn(self, messages: Sequence[Message], prompt: bool) -> _Shape:
        """Find the fixed text around the contents, and where each answer begins."""
        marked = [_marked(m, 2 * i) for i, m in enumerate(messages)]
        whole = self._render(marked, prompt)
        starts: list[int] = []
        for i, m in enumerate(messages):
            if m["role"] != "assistant":
                continue
            before = self._render(marked[:i], True)
            if not whole.startswith(before):
                raise InputError(
                    f"the chat template cannot be split at message {i + 1}: the prompt it writes"
                    " before an answer is not the beginning of the whole conversation",
                    found=_after_common(before, whole),
                    expected=_after_common(whole, before),
                    hint="choose another template, for example --template chatml",
                )
            starts.append(len(before))
        return _cut(whole, starts, messages)


def _texts(message: Message) -> tuple[str, str]:
    return message["content"], message.get("input", "")


def _filled(text: str) -> bool:
    return bool(text.strip())


def _marked(message: Message, number: int) -> Message:
    """Return the message with markers `number` and `number + 1` for its texts, unless blank."""
    content, extra = (
        f"{MARK_OPEN}{number + n}{MARK_CLOSE}" if _filled(text) else text
        for n, text in enumerate(_texts(message))
    )
    marked: Message = {"role": message["role"], "content": content}
    if extra:
        marked["input"] = extra
    return marked


def _after_common(text: str, other: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), len(other))
    return repr(text[n : n + 40])


def _cut(whole: str, starts: list[int], messages: Sequence[Message]) -> _Shape:
    """Cut a marked rendering into items at the markers and at the starts of answers."""
    items: list[str | int] = []
    sides: list[Side] = []
    seen: set[int] = set()
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    turn_of = dict(zip(starts, answers, strict=True))
    side, turn, pos = Side.PROMPT, -1, 0
    marks = sorted(turn_of)
    while pos < len(whole) or marks:
        if marks and marks[0] == pos:
            turn, side = turn_of[marks.pop(0)], Side.ANSWER
            continue
        if whole[pos] == MARK_OPEN:
            end = whole.index(MARK_CLOSE, pos)
            index = int(whole[pos + 1 : end])
            if (side is Side.ANSWER and index != 2 * turn) or (
                side is not Side.ANSWER and index // 2 in answers
            ):
                raise _misplaced(index // 2)
            items.append(index)
            sides.append(side)
            seen.add(index)
            if side is Side.ANSWER:
                side = Side.TAIL
            pos = end + 1
            continue
        stop = whole.find(MARK_OPEN, pos)
        stop = min([stop if stop >= 0 else len(whole), *marks[:1]])
        items.append(whole[pos:stop])
        sides.append(side)
        if side is Side.TAIL:
            side = Side.PROMPT
        pos = stop
    for i, m in enumerate(messages):
        if any(_filled(text) and 2 * i + n not in seen for n, text in enumerate(_texts(m))):
            raise InputError(
                f"the chat template leaves out message {i + 1}, of role {m['role']!r}",
                hint="remove such messages, or choose another template (--template chatml)",
            )
    return _Shape(tuple(items), tuple(sides))


def _misplaced(index: int) -> InputError:
    return InputError(
        f"the chat template writes the answer of message {index + 1} in a place that is not its"
        " own turn",
        hint="choose another template, for example --template chatml",
    )


def _fill(shape: _Shape, contents: list[str], whole: str) -> list[Part] | None:
    """Put the contents, as they are or stripped, into the shape; None if that is not `whole`."""
    texts = [item if isinstance(item, str) else contents[item] for item in shape.items]
    if "".join(texts) != whole:
        stripped = _fill_stripped(shape, contents, whole)
        if stripped is None:
            return None
        texts = stripped
    return [
        Part(text, isinstance(item, int), side)
        for text, item, side in zip(texts, shape.items, shape.sides, strict=True)
        if text
    ]


def _fill_stripped(shape: _Shape, contents: list[str], whole: str) -> list[str] | None:
    """Find for each content whether it stands in `whole` as it is or stripped, item by item.

    Of several ways that fit so far, the one is taken after which the next fixed text follows.
    """
    texts: list[str] = []
    pos = 0
    for n, item in enumerate(shape.items):
        if isinstance(item, str):
            options = [item]
        else:
            c = contents[item]
            options = list(dict.fromkeys((c, c.strip(), c.lstrip(), c.rstrip())))
        after = shape.items[n + 1] if n + 1 < len(shape.items) else None
        after = after if isinstance(after, str) else ""
        for text in options:
            if whole.startswith(text, pos) and whole.startswith(after, pos + len(text)):
                break
        else:
            return None
        texts.append(text)
        pos += len(text)
    return texts if pos == len(whole) else None


def compile_template(source: str, *, bos: str, eos: str) -> Render:
    """Return a renderer of a Jinja template, sandboxed, as llama-cpp-python sets Jinja up.

    The date is fixed, so that training and inference see the same prompt on any day.

    Raises:
        InputError: The template does not compile; later, from the renderer: it fails.
    """
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class PassGeneration(jinja2.ext.Extension):
        """Ignore Hugging Face's `{% generation %}` tags."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[PassGeneration, "jinja2.ext.loopcontrols"],
    )
    env.filters["tojson"] = _tojson
    try:
        template = env.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise InputError(
            f"the chat template does not compile: {e.message}", path="chat template", line=e.lineno
        ) from None

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(str(message))

    def render(messages: Sequence[Message], prompt: bool) -> str:
        limit = MAX_RENDERED_CHARS + 4 * sum(len(m["content"]) for m in messages)
        out: list[str] = []
        try:
            for chunk in template.generate(
                messages=[dict(m) for m in messages],
                add_generation_prompt=prompt,
                bos_token=bos,
                eos_token=eos,
                raise_exception=raise_exception,
                strftime_now=lambda f: "26 Jul 2024",
                tools=None,
            ):
                out.append(chunk)
                limit -= len(chunk)
                if limit < 0:
                    raise InputError("the chat template's output exceeds the limit")
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as e:
            raise InputError(f"the chat template refuses this conversation: {e}") from None
        except RecursionError:
            raise InputError("the chat template calls itself without end") from None
        return "".join(out)

    return render


def _tojson(x: object, ensure_ascii: bool = False, indent: int | None = None, **_: object) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent)
