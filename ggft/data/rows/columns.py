"""What columns are for, by their names: one table, and what users say of theirs.

A column that is not in the table is not used, and is listed with the number of rows that have
something in it. One whose name says that a row means something else without it is never dropped
without a word: it is used, or the row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ggft.system.errors import InputError

GOES_ON = "text_goes_on"  # true of a part of a document that is not its last: no end token
# The names that each role goes by: small letters, `_` for blanks and hyphens.
NAMES: dict[str, tuple[str, ...]] = {
    "instruction": (
        "instruction", "prompt", "question", "query", "problem", "指令", "问题", "提问", "问",
        "提示", "提示词",
    ),
    "input": ("input", "输入"),
    "context": (
        "context", "contexts", "ctxs", "passage", "passages", "paragraph", "paragraphs",
        "background", "evidence", "knowledge", "retrieved_contexts", "上下文", "背景", "材料",
        "参考资料", "段落",
    ),
    "output": (
        "output", "response", "answer", "completion", "solution", "target", "输出", "答案", "回答",
        "回复", "答", "响应",
    ),
    "system": (
        "system", "system_prompt", "system_message", "system_instruction", "系统", "系统提示",
        "系统提示词",
    ),
    "history": ("history", "历史", "历史对话"),
    "messages": (
        "messages", "conversations", "conversation", "dialog", "dialogue", "contents", "对话",
        "会话", "消息",
    ),
    "text": ("text", "文本", "正文"),
    "goes on": (GOES_ON,),
    "reasoning": (
        "reasoning", "reasoning_content", "thinking", "thought", "thoughts", "think", "rationale",
        "chain_of_thought", "cot", "complex_cot", "思考", "推理", "思维链", "思考过程",
    ),
    "tools": ("tools", "functions", "工具"),
    "documents": ("documents", "docs", "文档"),
    "input_ids": ("input_ids",),
    "labels": ("labels",),
    "mask": (
        "mask", "masks", "loss_mask", "assistant_mask", "assistant_masks", "completion_mask",
    ),
    "attention_mask": ("attention_mask",),
    "derived from ids": ("special_tokens_mask", "token_type_ids", "position_ids"),
    "chosen": ("chosen", "preferred_output", "preferred"),
    "rejected": (
        "rejected", "non_preferred_output", "rejected_response", "rejected_messages",
        "non_preferred",
    ),
    "label": ("label", "kto_tag", "class", "标签", "类别"),
    "weight": ("weight", "weights", "sample_weight", "loss_weight", "loss_scale", "权重"),
    "media": (
        "image", "images", "video", "videos", "audio", "audios", "pixel_values", "image_url",
        "图片", "图像", "视频", "音频",
    ),
    "segments": ("segments",),
    "template arguments": ("chat_template_kwargs",),
    "choices": ("choices", "options", "选项"),
}  # fmt: skip
_ROLE_OF = {name: role for role, names in NAMES.items() for name in names}
# What `--columns` may say of a column.
GIVEN_ROLES = (
    "instruction", "input", "context", "output", "system", "history", "messages", "text",
    "reasoning", "tools", "documents",
)  # fmt: skip
# Of these a row may have one more that is not used: it is another spelling of what is.
_REPLACEABLE = {
    "instruction",
    "input",
    "output",
    "messages",
    "text",
    "attention_mask",
    "derived from ids",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words in the names of other columns that a row cannot do without, …
_TELLING = _words(
    "context contexts passage passages document documents evidence background knowledge"
    " reasoning thinking thought thoughts rationale cot system tool tools function functions"
    " image images video videos audio label labels mask masks weight weights history reference"
    " references choices options schema persona 上下文 背景 系统 思考 推理 工具 图片 标签"
)
# … unless the first or the last word says that the column is about it only.
_ABOUT = _words(
    "id ids uid idx index key name type kind source url uri link lang language n num number count"
    " len length size score scores hash date time timestamp version split title license parallel"
    " has is use uses with"
)


@dataclass(frozen=True)
class Plan:
    """What the columns of rows that have the same ones are for.

    Attributes:
        by_role: The columns of each role, in the row's order.
        telling: Columns that must not be dropped without a word.
        ignored: Columns that the user ignores.
    """

    by_role: Mapping[str, tuple[str, ...]]
    telling: frozenset[str]
    ignored: frozenset[str]


class Columns:
    """The table of names, with what a user says of some over it.

    Args:
        given: `NAME=ROLE` each.
        ignored: Names.

    Raises:
        InputError: Malformed, an unknown role, or a name given twice.
    """

    def __init__(self, given: Sequence[str] = (), ignored: Sequence[str] = ()) -> None:
        self._given: dict[str, str] = {}
        self._ignored = {name.strip() for name in ignored}
        for text in given:
            name, equals, role = (part.strip() for part in text.rpartition("="))
            if not equals or not name or role not in (*GIVEN_ROLES, "ignore"):
                raise InputError(
                    "--columns has a wrong value", found=repr(text),
                    expected="NAME=ROLE, ROLE one of " + ", ".join((*GIVEN_ROLES, "ignore")),
                )  # fmt: skip
            if name in self._given:
                raise InputError("--columns names a column twice", found=repr(name))
            if role == "ignore":
                self._ignored.add(name)
            else:
                self._given[name] = role
        self._unseen = self._ignored | set(self._given)
        self._plans: dict[tuple[str, ...], Plan] = {}

    def plan(self, names: tuple[str, ...]) -> Plan:
        """Return what the columns of a row are for."""
        plan = self._plans.get(names)
        if plan is None:
            plan = self._plans[names] = self._make(names)
        return plan

    def _make(self, names: tuple[str, ...]) -> Plan:
        self._unseen.difference_update(names)
        by_role: dict[str, list[str]] = {}
        telling: set[str] = set()
        ignored = self._ignored.intersection(names)
        taken = {self._given[name] for name in names if name in self._given}
        for name in names:
            role = self._given.get(name) or _ROLE_OF.get(plain_name(name))
            if name in ignored or (role in taken and name not in self._given):
                continue
            if role is not None:
                by_role.setdefault(role, []).append(name)
            if name in self._given or (role not in _REPLACEABLE and is_telling(name)):
                telling.add(name)
        return Plan(
            {role: tuple(columns) for role, columns in by_role.items()},
            frozenset(telling),
            frozenset(ignored),
        )

    def check_seen(self) -> None:
        """Raise InputError if the user named a column that no row had."""
        if self._unseen:
            known = sorted({name for names in self._plans for name in names})
            raise InputError(
                "no row has a column that --columns or --ignore-columns names",
                found=", ".join(sorted(self._unseen)),
                expected="of " + ", ".join(known[:20]),
            )


def plain_name(name: str) -> str:
    """Return a column's name as the table spells it."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\s\-]+", "_", words).casefold()


def is_telling(name: str) -> bool:
    """Whether a column's name says that a row means something else without it."""
    plain = plain_name(name)
    if plain in _ROLE_OF:
        return _ROLE_OF[plain] not in _REPLACEABLE
    words = [word for word in re.split(r"[\W_]+", plain) if word]
    if not words or words[0] in _ABOUT or words[-1] in _ABOUT:
        return False
    return not _TELLING.isdisjoint(words)
