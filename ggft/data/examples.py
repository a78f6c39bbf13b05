"""Turn rows into examples: conversations, or plain text, whatever the fields are called.

The shape is found row by row from the columns' names (`rows.columns`). A column is used, or counted
and listed; one that the row would mean something else without is an error with file and line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggft.data.files import Row, read_rows
from ggft.data.rows.columns import NAMES, Columns
from ggft.data.rows.fields import Fields
from ggft.data.rows.formatted import CONTROL, conversation_of, is_marked, without_ends
from ggft.data.rows.tokens import tokens_of
from ggft.data.rows.tools import add_row_fields
from ggft.data.rows.trees import conversations_of, is_tree, joined
from ggft.data.rows.turns import Turns
from ggft.data.rows.values import (
    any_of,
    content_of,
    is_empty,
    keys_of,
    kind_of,
    list_of,
    passages_of,
    text_of,
    wrong,
)
from ggft.prompts.encoding import Tokens
from ggft.prompts.messages import Message
from ggft.system.errors import InputError

SHORT_CHARS = 4000
FORMATS = ("auto", "alpaca", "chat", "sharegpt", "completion", "text", "plain", "tokens")
N_LISTED = 20  # columns that are not used, in a note


@dataclass(frozen=True)
class Example:
    """A row of training data and where it came from.

    Attributes:
        messages: The conversation, or empty for plain text.
        text: Plain text, or None for a conversation.
        path: The file.
        line: 1-based line at which the row begins.
        tokens: What was tokenized already; messages and text are empty then.
        ends: Whether plain text ends here, and is not a part of a longer one.
    """

    messages: list[Message]
    text: str | None
    path: Path
    line: int
    tokens: Tokens | None = None
    ends: bool = True

    def short_conversation(self) -> list[Message] | None:
        """Return the conversation if it is short enough to be kept; None for plain text."""
        n_chars = sum(len(m["content"]) + len(m.get("input", "")) for m in self.messages)
        return self.messages if self.messages and n_chars <= SHORT_CHARS else None


@dataclass(frozen=True)
class RowOptions:
    """How rows are read.

    Attributes:
        format_name: One of `FORMATS`.
        columns: What columns are for, `NAME=ROLE` each.
        ignored: Columns that are left out.
    """

    format_name: str = "auto"
    columns: Sequence[str] = ()
    ignored: Sequence[str] = ()


AS_FOUND = RowOptions()


class RowReader:
    """Turns rows into examples, and keeps an account of what is not used.

    Args:
        options: How rows are read.

    Attributes:
        unused: How many rows have something in a column that is not used.
        ignored: The same of the columns that the user ignores.

    Raises:
        InputError: No such format, or `--columns` is malformed.
    """

    def __init__(self, options: RowOptions = AS_FOUND) -> None:
        if options.format_name not in FORMATS:
            raise InputError(
                "no such format", found=repr(options.format_name), expected=", ".join(FORMATS)
            )
        self.unused: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()
        self._format = options.format_name
        self._columns = Columns(options.columns, options.ignored)
        self._turns = Turns(self.unused)
        self._written: Counter[str] = Counter()  # conversations in text, by their markup
        self._n_marked = 0
        self._n_ended = 0

    def read(
        self, path: Path, moved: Callable[[int], object] = lambda _: None
    ) -> Iterator[Example]:
        """Yield the examples of one file; `moved` is told now and then how many bytes are read."""
        rows = read_rows(path, moved)
        for row in joined(rows, self.unused) if self._format == "auto" else rows:
            yield from self.examples(row)

    def examples(self, row: Row) -> Iterable[Example]:
        """Return the examples that a row holds: one, or several of a tree."""
        value = row.value
        if isinstance(value, str):
            return (self._part_of_text(row, value),)
        fields = Fields(row, value, self._columns.plan(tuple(value)))
        made = _READERS[self._format if self._format != "auto" else _detect(fields)](self, fields)
        if isinstance(made, list) and made and isinstance(made[0], dict):
            add_row_fields(row, value, fields.any, made)
        goes_on = isinstance(made, str) and fields.any("goes on")
        if len(fields.used) != len(value):
            self._account(fields)
        if isinstance(made, str):
            return (Example([], made, row.path, row.line, ends=not goes_on),)
        if isinstance(made, Tokens):
            return (Example([], None, row.path, row.line, made),)
        if made and isinstance(made[0], list):
            return [Example(messages, None, row.path, row.line) for messages in made]
        return (Example(made, None, row.path, row.line),)

    def _part_of_text(self, row: Row, text: str) -> Example:
        """Return the example that a document's part is; it is plain text, whatever it holds."""
        if self._format not in ("auto", "text", "plain"):
            raise wrong(row, "plain text is not of this format", "a text", self._format)
        self._n_marked += self._format != "plain" and is_marked(text)
        return Example([], text_of(row, text, "the text"), row.path, row.line, ends=row.ends)

    def _account(self, fields: Fields) -> None:
        """Count what of a row was not used; refuse the row if it cannot do without."""
        for name, value in fields.value.items():
            if name in fields.used or is_empty(value):
                continue
            if name in fields.plan.ignored:
                self.ignored[name] += 1
            elif value == 1 and name in fields.plan.by_role.get("weight", ()):
                continue  # as every other row
            elif name in fields.plan.telling:
                raise wrong(
                    fields.row, f"{name!r} would be lost, and changes what the row means",
                    kind_of(value), "columns that are rendered",
                    f"say what it is with --columns {name}=ROLE, or leave it out with"
                    f" --ignore-columns {name}",
                )  # fmt: skip
            else:
                self.unused[name] += 1

    def notes(self) -> list[str]:
        """Return what to say of columns that were not used.

        Raises:
            InputError: The user named a column that no row had.
        """
        self._columns.check_seen()
        notes: list[str] = []
        for counts, what, remedy in (
            (self.unused, "not used", "; --columns NAME=ROLE uses one"),
            (self.ignored, "ignored as asked", ""),
        ):
            if counts:
                shown = [f"{name} ({n} rows)" for name, n in counts.most_common(N_LISTED)]
                more = [f"and {len(counts) - N_LISTED} more"] if len(counts) > N_LISTED else []
                notes.append(f"columns {what}: {', '.join(shown + more)}{remedy}")
        for name, n in self._written.items():
            notes.append(
                f"{n} texts are conversations in the markup of {name}: only their answers are"
                " learned, written by this model's template (--format plain learns the letters)"
            )
        if self._n_ended:
            notes.append(f"{self._n_ended} texts spell the end token: the vocabulary's own is put")
        if self._n_marked:
            notes.append(
                f"{self._n_marked} parts of documents hold control tokens of a template: they are"
                " learned as letters"
            )
        return notes

    def pair(self, fields: Fields) -> list[Message]:
        """Read a question, what it is about, and its answer; or prompt and completion."""
        row = fields.row
        asked, answered = fields.one("instruction"), fields.one("output")
        if answered is None:
            names = fields.plan.by_role.get("output", ())
            if not names:
                raise wrong(
                    row, "a row without an answer", keys_of(fields.value), any_of(NAMES["output"])
                )
            answered = fields.take(names[0])
        given = [
            passages_of(row, fields.value[fields.take(name)], name, self.unused)
            for name in fields.filled("context", "input")
        ]
        about = "\n\n".join(text for text in given if text.strip())
        messages = self._before(fields)
        question = fields.value[asked] if asked is not None else ""
        if isinstance(question, list) and asked is not None:
            messages += self._turns.read(row, question, asked)
            if about:
                raise wrong(
                    row, "a list of turns and a text beside it", keys_of(fields.value), "one"
                )
        else:
            text = text_of(row, question or "", asked or "the question")
            if not text.strip() and not about:
                raise wrong(
                    row, "a row without a question", keys_of(fields.value),
                    any_of(NAMES["instruction"]),
                )  # fmt: skip
            user: Message = {"role": "user", "content": text or about}
            if text and about:
                user["input"] = about
            messages.append(user)
        answer = fields.value[answered]
        if isinstance(answer, list):
            return messages + self._turns.read(row, answer, answered)
        said: Message = {"role": "assistant", "content": text_of(row, answer, answered)}
        if thought := fields.one("reasoning"):
            said["reasoning"] = text_of(row, fields.value[thought], thought)
        return [*messages, said]

    def _before(self, fields: Fields) -> list[Message]:
        """Return what stands before the question: system text and earlier turns."""
        row, messages = fields.row, _system(fields)
        name = fields.any("history")
        for pair in list_of(row, fields.value[name], name) if name else ():
            if not isinstance(pair, list) or len(pair) != 2:
                raise wrong(row, f"{name} is malformed", kind_of(pair), "pairs [question, answer]")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                messages.append({"role": role, "content": text_of(row, text, str(name))})
        return messages

    def chat(self, fields: Fields) -> list[Message]:
        """Read a list of turns."""
        row, name = fields.row, fields.any("messages")
        if name is None:
            names = fields.plan.by_role.get("messages", ())
            if not names or fields.value[names[0]] is None:
                raise wrong(
                    row, "a row without a conversation", keys_of(fields.value),
                    any_of(NAMES["messages"]),
                )  # fmt: skip
            name = fields.take(names[0])
        messages = self._turns.read(row, list_of(row, fields.value[name], name), name)
        if messages[0]["role"] == "system":
            return messages
        return _system(fields) + messages

    def plain(self, fields: Fields) -> str:
        """Read plain text, whatever it holds."""
        name = fields.any("text")
        if name is None:
            return text_of(fields.row, fields.value.get("text"), "text")
        return text_of(fields.row, fields.value[name], name)

    def text(self, fields: Fields) -> str | list[Message]:
        """Read plain text, or a conversation that a template has written."""
        text = self.plain(fields)
        bare = without_ends(text)
        if not is_marked(bare):
            self._n_ended += bare != text
            return bare
        found = conversation_of(text)
        if found is None:
            raise wrong(
                fields.row, "the text holds control tokens, and is no conversation of a known kind",
                repr(CONTROL.findall(text)[:3]), "plain text, or turns as a template writes them",
                "give the row as messages, or learn the letters with --format plain",
            )  # fmt: skip
        self._written[found[0]] += 1
        return found[1]

    def tree(self, fields: Fields) -> list[list[Message]]:
        """Read a tree of replies."""
        name = fields.take(fields.filled("instruction")[0])
        return list(conversations_of(fields.row, fields.value[name]))

    def tokens(self, fields: Fields) -> Tokens:
        """Read token ids with labels or masks."""
        ids, labels, attention = (
            None if name is None else fields.value[name]
            for name in map(fields.any, ("input_ids", "labels", "attention_mask"))
        )
        masks = [fields.value[fields.take(name)] for name in fields.filled("mask")]
        return tokens_of(fields.row, ids, labels, masks, attention)


def _system(fields: Fields) -> list[Message]:
    name = fields.any("system")
    if name is None:
        return []
    value = fields.value[name]
    parts = value["parts"] if isinstance(value, dict) and "parts" in value else value
    return [{"role": "system", "content": content_of(fields.row, parts, name)}]


def _detect(fields: Fields) -> str:
    """Return the format that a row's columns show."""
    has, value = fields.has, fields.value
    if any(value[name] is not None for name in fields.plan.by_role.get("messages", ())):
        return "chat"
    if has("input_ids"):
        return "tokens"
    if any(is_tree(value[name]) for name in fields.filled("instruction")):
        return "tree"
    if has("chosen") and has("rejected"):
        raise wrong(
            fields.row, "preference pairs cannot be trained on", "chosen and rejected",
            "one answer a row",
        )  # fmt: skip
    asked = [name for role in ("instruction", "input", "context")
             for name in fields.plan.by_role.get(role, ())]  # fmt: skip
    if has("output") and asked:
        return "alpaca"
    if has("text"):
        if "role" in value:
            raise wrong(
                fields.row, "a row that is one turn of a conversation", keys_of(value),
                "a whole conversation or tree",
                "give the file of trees, or join the turns of each conversation in messages",
            )  # fmt: skip
        return "text"
    if asked:
        raise wrong(
            fields.row, f"{asked[0]!r} without an answer", keys_of(value), any_of(NAMES["output"])
        )
    raise wrong(
        fields.row, "these fields are of no known format", keys_of(value),
        "instruction and output, messages, conversations, prompt and completion, or text",
        "say what the columns are with --columns NAME=ROLE; ROLE is instruction, input, output, …",
    )  # fmt: skip


_READERS: dict[str, Callable[[RowReader, Fields], Any]] = {
    "alpaca": RowReader.pair,
    "chat": RowReader.chat,
    "sharegpt": RowReader.chat,
    "completion": RowReader.pair,
    "text": RowReader.text,
    "plain": RowReader.plain,
    "tokens": RowReader.tokens,
    "tree": RowReader.tree,
}
