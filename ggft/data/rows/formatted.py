"""Text that a chat template has already written, read back as the conversation that it is.

Such text comes out of notebooks. Its control tokens would be trained as letters; as a conversation
it is written by the model's own template, with the answers alone trained.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ggft.data.rows.turns import ROLES
from ggft.prompts.messages import Message

CONTROL = re.compile(
    r"<\|[A-Za-z_][\w ]{0,40}\|>|<｜[^｜\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>"
    r"|</?tool_(?:call|response)>"
)
_BEGIN = re.compile(r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>)?\s*")
_END = re.compile(
    r"\s*(?:</s>|<eos>|<\|endoftext\|>|<\|end_of_text\|>|<\|im_end\|>|<\|eot_id\|>)\s*\Z"
)
_NEXT = r"(?=<\|(?:system|user|assistant)\|>)"


@dataclass(frozen=True)
class Markup:
    """How a family of templates writes a turn.

    Attributes:
        name: What messages call it.
        turn: Matches a turn; its groups are role and content.
        trimmed: Whether blanks around a content are the template's.
    """

    name: str
    turn: re.Pattern[str]
    trimmed: bool = False


MARKUPS = (
    Markup("ChatML", re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.S)),
    Markup(
        "Llama 3",
        re.compile(
            r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n(.*?)(?:<\|eot_id\|>|\Z)", re.S
        ),
    ),
    Markup(
        "Gemma", re.compile(r"<start_of_turn>(\w+)\n(.*?)(?:<end_of_turn>\n?|\Z)", re.S)
    ),
    Markup(
        "Zephyr",
        re.compile(
            r"<\|(system|user|assistant)\|>(.*?)"
            rf"(?:(?:<\|end\|>|</s>|<\|endoftext\|>)\n?|{_NEXT}|\Z)",
            re.S,
        ),
        trimmed=True,
    ),
)  # fmt: skip
_INST = re.compile(
    r"(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>(?P<system>.*?)<</SYS>>)?(?P<user>.*?)\[/INST\]"
    r"(?P<assistant>.*?)(?:</s>\s*|(?=\[INST\])|(?=<s>\s*\[INST\])|\Z)",
    re.S,
)


def is_marked(text: str) -> bool:
    """Whether a text holds control tokens of some template."""
    return CONTROL.search(text) is not None


def conversation_of(text: str) -> tuple[str, list[Message]] | None:
    """Return the name of a text's markup and its turns; None if it is no such text as a whole."""
    begin = _BEGIN.match(text)
    start = begin.end() if begin else 0
    if text.startswith("[INST]", start):
        turns = _inst_turns(text, start)
        return ("Llama 2", turns) if turns else None
    for markup in MARKUPS:
        turns = _turns(markup, text, start)
        if turns:
            return markup.name, turns
    return None


def without_ends(text: str) -> str:
    """Return plain text without the end token, and the one at the start, that it is spelled with.

    The vocabulary's own are put there.
    """
    if text.rstrip()[-1:] != ">":
        return text
    ended = _END.sub("", text)
    begin = _BEGIN.match(ended)
    bare = ended[begin.end() :] if begin and ended != text else ended
    return text if "<s>" in bare else bare  # of HTML


def _turns(markup: Markup, text: str, start: int) -> list[Message]:
    messages: list[Message] = []
    while start < len(text) and not (messages and _END.match(text, start)):
        match = markup.turn.match(text, start)
        role = ROLES.get(match[1].lower()) if match else None
        if match is None or role is None:
            return [] if text[start:].strip() or not messages else messages
        content = match[2].strip() if markup.trimmed else match[2]
        if CONTROL.search(content):
            return []
        start = match.end()
        if content or start < len(text):  # else the prompt of an answer that is not there
            messages.append({"role": role, "content": content})
    return messages


def _inst_turns(text: str, start: int) -> list[Message]:
    messages: list[Message] = []
    while start < len(text) and text[start:].strip():
        match = _INST.match(text, start)
        if match is None:
            return []
        for role in ("system", "user", "assistant"):
            content = (match[role] or "").strip()
            if CONTROL.search(content):
                return []
            if content or role == "user":
                messages.append({"role": role, "content": content})
        start = match.end()
    return messages
