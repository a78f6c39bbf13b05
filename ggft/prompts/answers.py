"""Where an answer begins in a rendering, and what the model writes from there on.

Most renderings begin with the prompt. Some templates open a thought in the prompt, close it, move
it or leave it out; then the answer is put together from what the prompt has and what stands in the
rendering: as the model would write it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ggft.prompts.builtin import OTHER
from ggft.prompts.dialect import Dialect, Thoughts
from ggft.prompts.marks import (
    N_SLOTS,
    SHOWN_CHARS,
    after_common,
    in_words,
    is_filled,
    last_mark_end,
    mark,
)
from ggft.prompts.messages import Message
from ggft.prompts.thoughts import closed, closes, closing, empty_at_start, opened, without_empty
from ggft.system.errors import InputError

MIN_COMMON = 8  # characters of a prompt's end that show where an answer begins
Render = Callable[[Sequence[tuple[Sequence[Message], bool]]], list[str | InputError]]


class AnswerFinder:
    """Finds answers in marked renderings of one template.

    Args:
        render: Renders conversations, each with or without the generation prompt.
        dialect: How the template is spoken to.
    """

    def __init__(self, render: Render, dialect: Dialect) -> None:
        self._render = render
        self._dialect = dialect

    def rest(
        self, i: int, messages: Sequence[Message], with_marks: Sequence[Message],
        before: str, whole: str,
    ) -> str:  # fmt: skip
        """Return what follows an answer's prompt: the answer as the model would write it."""
        thought = mark(N_SLOTS * i + 2)
        said = messages[i].get("reasoning")
        if said is not None and is_filled(said):
            if closed(before):
                raise _closed(i, before, self._dialect.switch)
            return self._with_thought(i, thought, before, whole, with_marks)
        opening = opened(before)
        if opening or (said is not None and not closed(before)):
            if self._dialect.thoughts in (Thoughts.FIELD, Thoughts.PART):
                other: list[Message] = [*with_marks[:i], {**with_marks[i], "reasoning": thought}]
                text = self._render([(other, False)])[0]
                if isinstance(text, str) and thought in text:
                    rest = self._with_thought(i, thought, before, text, with_marks)
                    return rest.replace(thought, "")
            elif said is not None and self._dialect.thoughts is Thoughts.BUILT:
                return self._with_thought(i, "", before, whole, with_marks)
        return self._without_thought(i, before, whole, with_marks)

    def _with_thought(
        self, i: int, thought: str, before: str, whole: str, with_marks: Sequence[Message]
    ) -> str:
        """Return a thought and its answer, the thought where the model would write it."""
        place = whole.find(thought) if thought else -1
        opening = opened(before)
        border = self._border(i, before, before.removesuffix(opening), whole, with_marks)
        if place >= border:
            return whole[len(before) :] if whole.startswith(before) else whole[place:]
        body = whole[border:]
        if opening:
            body = body.removeprefix(opening)
            return thought + closing(opening) + without_empty(body)
        pair = empty_at_start(body)
        if pair:
            return pair[0] + thought + pair[1] + body[len("".join(pair)) :]
        return self._dialect.mark + thought + closing(self._dialect.mark) + body

    def _without_thought(
        self, i: int, before: str, whole: str, with_marks: Sequence[Message]
    ) -> str:
        """Return an answer without a thought; one that the prompt has opened is closed."""
        opening = opened(before)
        rest = whole[len(before) :]
        if whole.startswith(before) and (not opening or closes(rest)):
            return rest
        ending = opening or closed(before)
        border = self._border(i, before, before.removesuffix(ending), whole, with_marks)
        body = whole[border:].removeprefix(opening)
        body = without_empty(body) if ending else body
        return closing(opening) + body if opening else body

    def _border(
        self, i: int, before: str, core: str, whole: str, with_marks: Sequence[Message]
    ) -> int:
        """Return where an answer begins in a rendering; `core` is its prompt without a thought.

        Some templates write a prompt otherwise than the whole up to there. Then the answer begins
        behind what stands behind the last content of the prompt, or before its own content.
        """
        if whole.startswith(core):
            return len(core)
        if last_mark_end(core) < len(core.rstrip()) and whole.startswith(core.rstrip()):
            return len(core.rstrip())  # but for blanks, which only prompts end with
        places = [whole.find(mark(N_SLOTS * i + n)) for n in (0, 2)]
        own = min((place for place in places if place >= 0), default=len(whole))
        start = last_mark_end(whole[:own])
        between = whole[start:own]
        behind = core[last_mark_end(core) :]
        if behind and between.startswith(behind):
            return start + len(behind)
        without = self._render([(with_marks[:i], False)])[0]
        if isinstance(without, str) and core.startswith(without):
            asking = core[len(without) :]
            if asking and asking in between:
                return start + between.rindex(asking) + len(asking)
        n = 0
        while n < min(len(between), len(core)) and between[-1 - n] == core[-1 - n]:
            n += 1
        if n < MIN_COMMON:
            raise _unsplit(i, before, whole)
        return own


def _unsplit(i: int, before: str, whole: str) -> InputError:
    return InputError(
        f"the chat template cannot be split at message {i + 1}: the prompt that it writes before"
        " an answer is not how the whole conversation begins",
        found=after_common(before, whole),
        expected=after_common(whole, before),
        hint=OTHER,
    )


def _closed(i: int, before: str, switch: str) -> InputError:
    opens = f"let the template open one with --template-arg {switch}, or " if switch else ""
    return InputError(
        f"message {i + 1} has a thought, but the template's prompt closes it before the model"
        " writes",
        found=repr(in_words(before)[-SHOWN_CHARS:]),
        hint=f"{opens}leave thoughts out with --thinking drop",
    )
