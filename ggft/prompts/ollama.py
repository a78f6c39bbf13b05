"""A prompt template in Ollama's language, and the Modelfile around it.

What a template writes between one turn and the next is found by rendering conversations of known
turns. If that depends on the two roles alone, a short Go template says the same; if not, Ollama has
no equal of the template, and it is refused.

Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ggft.prompts.assistant_mask import Part
from ggft.prompts.encoding import Tokenizer
from ggft.prompts.messages import Message
from ggft.prompts.template import Template
from ggft.system.errors import InputError

START, ANSWER = "", "answer"  # where a conversation begins, and where the model is to go on
_ROLES = {"s": "system", "u": "user", "a": "assistant"}
# Conversations to learn from, a letter a turn. The first must work, those with a system message if
# the template takes one; of the rest, what works.
_NEEDED = ("u", "uau", "uauau")
_WITH_SYSTEM = ("su", "suau", "suauau")
_RARE = ("uasu", "au", "sau")
_NO_SYSTEM = "the template takes no system prompt: Ollama will leave one out"
_ELSE = (
    "merge the adapter and serve it with llama.cpp, which renders the model's own template,"
    " or train with --template chatml"
)
_SAMPLES: tuple[tuple[str, ...], ...] = (
    ("", "What is a lighthouse?"),
    ("", "灯塔是什么？\n  Two lines: <b>1</b>"),
    ("Be brief.", "What is a lighthouse?"),
    ("", "Hello", "Hi, how are you?", "Well. 你呢？"),
    ("Be brief.", "Hello", "Hi.", "Who are you?", "A lamp.", "Where?"),
)


@dataclass(frozen=True)
class Turns:
    """What a template writes around contents: the text between turns, by their two roles."""

    between: Mapping[tuple[str, str], str]
    notes: list[str] = field(default_factory=list)

    @property
    def takes_system(self) -> bool:
        """Whether a system message has a place."""
        return (START, "system") in self.between

    def render(self, messages: Sequence[Message]) -> str:
        """Return what Ollama renders for a conversation that ends with a question."""
        out, before = [], START
        for message in messages:
            out += [self.between[before, message["role"]], message["content"]]
            before = message["role"]
        return "".join(out) + self.between[before, ANSWER]


def learn_turns(template: Template) -> Turns:
    """Return what Ollama has to write around contents to give a template's prompts.

    Raises:
        InputError: It cannot; says why.
    """
    between: dict[tuple[str, str], str] = {}
    probes: list[list[Part]] = []
    for letters in _NEEDED:
        _learn(template, between, letters, template.prompt_parts(_turns(letters)))
    with contextlib.suppress(InputError):
        probes += [template.prompt_parts(_turns(letters)) for letters in _WITH_SYSTEM]
    for letters, parts in zip(_WITH_SYSTEM, probes, strict=False):
        _learn(template, between, letters, parts)
    for letters in _RARE:
        if letters[0] != "s" and "s" in letters and (START, "system") not in between:
            continue
        found = dict(between)
        with contextlib.suppress(InputError):
            _learn(template, found, letters, template.prompt_parts(_turns(letters)))
            between = found
    turns = Turns(_without_bos(between, template))
    if not turns.takes_system:
        turns.notes.append(_NO_SYSTEM)
    blank: list[Message] = [{"role": "user", "content": " a "}]
    if all(p.text == "a" for p in template.prompt_parts(blank) if p.is_content):
        turns.notes.append("the template strips blanks around messages, Ollama does not")
    _compare(template, turns)
    return turns


def _turns(letters: str) -> list[Message]:
    return [{"role": _ROLES[c], "content": f"turn {n}"} for n, c in enumerate(letters)]


def _learn(
    template: Template, known: dict[tuple[str, str], str], letters: str, parts: Sequence[Part]
) -> None:
    """Add the texts between the turns of a prompt to what is known.

    Raises:
        InputError: They contradict it.
    """

    def add(before: str, after: str, text: str) -> None:
        if known.setdefault((before, after), text) != text:
            where = f"between {before or 'the start'} and {after}"
            raise _refusal(
                template, "what it writes depends on more than the roles of two turns",
                f"{text!r} {where}, and elsewhere {known[before, after]!r}",
            )  # fmt: skip

    before, fixed, left = START, "", _turns(letters)
    for part in parts:
        if not part.is_content:
            fixed += part.text
            continue
        if not left or part.text != left[0]["content"]:
            raise _refusal(template, "it writes messages in another order", part.text)
        role = left.pop(0)["role"]
        add(before, role, fixed)
        before, fixed = role, ""
    if left:
        raise _refusal(template, "it leaves a message out", left[0]["role"])
    add(before, ANSWER, fixed)


def _refusal(template: Template, why: str, found: str) -> InputError:
    return InputError(
        f"Ollama has no equal of the template `{template.name}`: {why}",
        found=found[:300],
        hint=_ELSE,
    )


def _without_bos(
    between: Mapping[tuple[str, str], str], template: Template
) -> dict[tuple[str, str], str]:
    """Leave out the BOS that Ollama puts at the start."""
    t = template.tokenizer
    bos = t.token_text(t.bos_id) if t.add_bos and t.bos_id is not None else ""
    return {
        (before, after): text.removeprefix(bos) if before == START else text
        for (before, after), text in between.items()
    }


def _compare(template: Template, turns: Turns) -> None:
    """Compare token ids: ours, and those that Ollama makes of the whole text.

    Raises:
        InputError: They differ in a first turn, so that it differs from training.
    """
    tokenizer = template.tokenizer
    for system, *texts in _SAMPLES:
        if system and not turns.takes_system:
            continue
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for n, text in enumerate(texts):
            messages.append({"role": "assistant" if n % 2 else "user", "content": text})
        ids = ollama_ids(tokenizer, turns.render(messages))
        if ids == template.encode_prompt(messages):
            continue
        if len(texts) == 1:
            raise _refusal(
                template, "its prompts would become other tokens there",
                tokenizer.decode(ids).decode("utf-8", "replace"),
            )  # fmt: skip
        turns.notes.append("after earlier answers, the tokens at their borders may differ")
        return


def ollama_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids that Ollama makes of a rendered prompt: as llama.cpp does, BOS in front."""
    ids = tokenizer.encode(text, special=True)
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    return ids


def go_template(turns: Turns) -> str:
    """Return the Go template that renders `.Messages` as `turns` does."""
    lines = ['{{- $before := "" }}', "{{- range .Messages }}"]
    word = "if"
    for role in _ROLES.values():
        befores = {b: text for (b, after), text in turns.between.items() if after == role}
        if befores:
            lines.append(f'{{{{- {word} eq .Role "{role}" }}}}')
            lines.append(_choice(befores) + "{{ .Content }}")
            word = "else if"
    lines += ["{{- end }}", "{{- $before = .Role }}", "{{- end }}"]
    befores = {b: text for (b, after), text in turns.between.items() if after == ANSWER}
    lines.append(f'{{{{- if ne $before "assistant" }}}}{_text(befores["user"])}{{{{- end }}}}')
    return "\n".join(lines)


def _choice(texts: Mapping[str, str]) -> str:
    """Return Go that writes the text of the role before; the commonest one stands last."""
    groups: dict[str, list[str]] = {}
    for before, text in texts.items():
        groups.setdefault(text, []).append(before)
    *special, last = sorted(groups, key=lambda text: len(groups[text]))
    out, word = "", "if"
    for text in special:
        tests = [f'eq $before "{before}"' for before in groups[text]]
        test = tests[0] if len(tests) == 1 else "or " + " ".join(f"({test})" for test in tests)
        out += f"{{{{- {word} {test} }}}}{_text(text)}"
        word = "else if"
    return out + (f"{{{{- else }}}}{_text(last)}{{{{- end }}}}" if special else _text(last))


def _text(text: str) -> str:
    """Return Go that writes a text, as a quoted string: Go and JSON agree on its escapes."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def modelfile(
    model: str, template: str, *, adapter: str | None, system: str | None, stops: Sequence[str]
) -> str:
    """Return a Modelfile.

    Raises:
        InputError: A path or the system prompt cannot be written in one.
    """
    for what, text, bad in (
        ("the model's path", model, "\n"),
        ("the system prompt", system, '"""'),
    ):
        if text is not None and bad in text:
            raise InputError(f"{what} cannot stand in a Modelfile", found=ascii(text)[:80])
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{template}"""')
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"
