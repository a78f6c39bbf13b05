"""The prompt templates that ggft brings, as Jinja sources, and the choice of one.

They follow what the model families were trained on, with two extensions: a system message goes
where the family has no place for it in front of the next question, and a tool's result is given
like a question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ggft.system.errors import InputError

MAX_SOURCE_BYTES = 1 << 20
OTHER = "choose another template with --template"
THINKING = ("keep", "drop", "empty")
# The tutorial's layout, for base models without a chat template.
INSTRUCTION = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'system' %}{{ m.content }}{{ '\\n\\n' }}"
    "{% else %}"
    "{% if (loop.previtem | default({})).role == 'assistant' %}{{ '\\n\\n' }}{% endif %}"
    "Instruction: {{ m.content }}\n{% if m.input %}Input: {{ m.input }}\n{% endif %}Output:"
    "{% endif %}{% endfor %}"
)

# Source: Stanford Alpaca, train.py.
ALPACA = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{{ '\\n\\n' }}"
    "{% elif m.role == 'system' %}{{ m.content }}{{ '\\n\\n' }}"
    "{% else %}{% if loop.first %}"
    "Below is an instruction that describes a task"
    "{% if m.input %}, paired with an input that provides further context{% endif %}"
    ". Write a response that appropriately completes the request.{{ '\\n\\n' }}{% endif %}"
    "### Instruction:\n{{ m.content }}\n\n"
    "{% if m.input %}### Input:\n{{ m.input }}\n\n{% endif %}### Response:\n"
    "{% endif %}{% endfor %}"
)

CHATML = (
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Source: Llama 2's chat template on Hugging Face; every question begins with BOS.
LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\\n' ~ (m.content | trim) ~ '\\n<</SYS>>\\n\\n' %}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ ns.system }}{{ m.content | trim }} [/INST]"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
)

# Source: Llama 3's chat template on Hugging Face; results of tools have the role ipython.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)

# Source: Gemma's chat template on Hugging Face.
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = (m.content | trim) ~ '\\n\\n' %}"
    "{% elif m.role == 'assistant' %}"
    "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n"
    "{% else %}<start_of_turn>user\n{{ ns.system }}{{ m.content | trim }}<end_of_turn>\n"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Source: Mistral 7B Instruct's chat template on Hugging Face.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = (m.content | trim) ~ '\\n\\n' %}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ ns.system }}{{ m.content | trim }} [/INST]"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
)

BUILTIN = {
    "instruction": INSTRUCTION,
    "alpaca": ALPACA,
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
KNOW_INPUT = frozenset({INSTRUCTION, ALPACA})  # these set `input` apart from the instruction

_NAME = re.compile(r"[A-Za-z_]\w*")
_RESERVED = frozenset(
    ("messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents")
)
_LLAMA2_CHAT = re.compile(r"llama[-_ ]?2.*chat", re.IGNORECASE)


@dataclass(frozen=True)
class TemplateChoice:
    """Which template is used, and how.

    Attributes:
        name: `auto` (the GGUF's own, else `instruction`), `gguf`, a built-in name, or a Jinja file.
        source: The template itself, where it is known; `name` is then only what it is called.
        arguments: Variables that it is given.
        thinking: What becomes of the rows' thoughts: one of `THINKING`.
    """

    name: str = "auto"
    source: str | None = None
    arguments: Mapping[str, object] = field(default_factory=dict)
    thinking: str = "keep"


def asked_for(name: str, arguments: Sequence[str] = (), thinking: str = "keep") -> TemplateChoice:
    """Return the choice that options make; arguments are `NAME=VALUE` each, values JSON or text.

    Raises:
        InputError: An argument is malformed, twice there, or is the caller's to give.
    """
    given: dict[str, object] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(key) or key in _RESERVED or key in given:
            raise InputError(
                "--template-arg has a wrong value", found=repr(text),
                expected="NAME=VALUE, each once, such as enable_thinking=false",
            )  # fmt: skip
        try:
            given[key] = json.loads(value)
        except (ValueError, RecursionError):
            given[key] = value
    return TemplateChoice(name, arguments=given, thinking=thinking)


def with_arguments(source: str, arguments: Mapping[str, object]) -> str:
    """Return a template that needs no arguments to be given: it sets them itself."""
    lines = [
        f"{{%- set {key} = {_literal(value)} -%}}\n" for key, value in sorted(arguments.items())
    ]
    return "".join(lines) + source


def _literal(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return {"null": "none"}.get(text, text)


def find_source(name: str, metadata: Mapping[str, object]) -> tuple[str, str]:
    """Return name and Jinja source of a template.

    Raises:
        InputError: There is no such template, or it is no text.
    """
    own = metadata.get("tokenizer.chat_template")
    usable = isinstance(own, str) and bool(own.strip())
    if name == "auto":
        chat = _LLAMA2_CHAT.search(str(metadata.get("general.name", "")))
        name = "gguf" if usable else "llama2" if chat else "instruction"
    if name == "gguf":
        if not usable:
            raise InputError(
                "this model has no chat template of its own", hint="choose one with --template"
            )
        if any("\ud800" <= c <= "\udfff" for c in str(own)):
            raise InputError("the model's chat template is not UTF-8", hint=OTHER)
        return name, str(own)
    if name in BUILTIN:
        return name, BUILTIN[name]
    path = Path(name)
    if not path.is_file():
        raise InputError(
            "no such template",
            found=repr(name),
            expected="auto, gguf, " + ", ".join(BUILTIN) + ", or a Jinja file",
        )
    try:
        with path.open("rb") as file:
            return name, file.read(MAX_SOURCE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the template: {e}", path=path) from None
