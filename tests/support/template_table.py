"""What becomes of rows under a template: each kind works, or is refused with a reason.

`python -m tests.support.template_table FOLDER` prints docs/templates.md from the archives that
`tests.support.template_files` has fetched there.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggft.prompts.assistant_mask import UnstableError
from ggft.prompts.builtin import TemplateChoice, asked_for
from ggft.prompts.jinja import render_here
from ggft.prompts.messages import Message
from ggft.prompts.template import Template, Tokens
from ggft.system.errors import InputError
from tests.support.fake_tokenizer import FakeTokenizer
from tests.support.template_files import llama_cpp, of_packages

THOUGHT = "Two and two make four."
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    }
]


def user(text: str = "What is 2+2?") -> Message:
    return {"role": "user", "content": text}


def answer(text: str = "Four, of course.") -> Message:
    return {"role": "assistant", "content": text}


ASKED: Message = {**user("Weather in Paris?"), "tools": TOOLS}
CALL: Message = {
    **answer(""),
    "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}],
}
RESULT: Message = {"role": "tool", "content": "21 degrees", "name": "get_weather"}
CASES: dict[str, list[Message]] = {
    "single": [user(), answer()],
    "system": [{"role": "system", "content": "Be brief."}, user(), answer()],
    "two turns": [user(), answer(), user("And 3+3?"), answer("Six it is.")],
    "thought in field": [user(), {**answer(), "reasoning": THOUGHT}],
    "thought in content": [user(), answer(f"<think>\n{THOUGHT}\n</think>\n\nFour, of course.")],
    "tool turn": [ASKED, CALL, RESULT, answer("It is 21 degrees.")],
}
WORKS = "works"


def bind(source: str, arguments: Sequence[str] = ()) -> Template:
    """Return a template on a vocabulary that has its control tokens."""
    given = asked_for("own", arguments).arguments
    choice = TemplateChoice("own", source, given)
    render = render_here(source, "<s>", "</s>", given)
    return Template(choice, {}, FakeTokenizer(source), render)


def outcomes(source: str) -> dict[str, str]:
    """Return what becomes of each case; a mask that is wrong raises AssertionError."""
    try:
        template = bind(source)
    except InputError as error:
        return dict.fromkeys(CASES, error.message)
    return {case: _outcome(template, source, messages) for case, messages in CASES.items()}


def _outcome(template: Template, source: str, messages: list[Message]) -> str:
    try:
        check(template, messages)
    except InputError as error:
        switch = re.search(r"--template-arg (\S+=\w+)", error.hint or "")
        if switch is None:
            return error.message
        check(bind(source, [switch[1]]), messages)
        return f"{WORKS} with {switch[1]}"
    return WORKS


def check(template: Template, messages: list[Message]) -> None:
    """Require that the answers alone are trained, each with one end, behind inference's prompt."""
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    try:
        whole = template.encode_example(messages)
        found = [(whole, answers)]
    except UnstableError:
        found = [(t, [n]) for t, n in zip(template.encode_turns(messages), answers, strict=True)]
    for tokens, own in found:
        spans = _trained(tokens)
        assert len(spans) == len(own)
        for (start, stop), n in zip(spans, own, strict=True):
            text = template.tokenizer.decode(tokens.ids[start:stop]).decode()
            _check_answer(template, messages[n], text, tokens.ids[stop - 1])
            prompt = template.encode_prompt(messages[:n])
            assert tokens.ids[:start].tolist() == prompt, "not the prompt of inference"


def _check_answer(template: Template, said: Message, text: str, end: int) -> None:
    assert said["content"].split("\n")[-1] in text
    if "reasoning" in said or "<think>" in said["content"]:
        assert THOUGHT in text
    for call in said.get("tool_calls", ()):
        assert call["name"] in text
        assert "Paris" in text
    assert end == template.end_id or end in template.tokenizer.end_ids
    for other in ("Weather in", "What is", "And 3", "Be brief"):
        assert other not in text


def _trained(tokens: Tokens) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(b"\x01+", tokens.trained)]


def page(folder: Path) -> str:
    """Return docs/templates.md."""
    own = {name: outcomes(source) for name, source in sorted(llama_cpp(folder).items())}
    others = [outcomes(source) for source in of_packages(folder).values()]
    lines = [
        "# Chat templates that were tried",
        "",
        "Made by `python -m tests.support.template_table`. ✓: exactly the answers and their ends",
        "are trained, behind the very prompt of inference; with an argument where the template",
        "needs one to open a thought. –: refused, with the reason. None is trained otherwise.",
        "",
        f"| template | {' | '.join(CASES)} |",
        f"|---|{'---|' * len(CASES)}",
    ]
    for name, found in own.items():
        cells = [
            text.replace(f"{WORKS} with", "✓ by").replace(WORKS, "✓").partition(":")[0]
            if text.startswith(WORKS) else "–" for text in found.values()
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Of {len(others)} more templates that packages on PyPI carry:", ""]
    for case in CASES:
        n = sum(found[case].startswith(WORKS) for found in others)
        reasons = Counter(_kind(f[case]) for f in others if not f[case].startswith(WORKS))
        why = "; ".join(f"{n} {reason}" for reason, n in reasons.most_common(6))
        lines.append(f"- {case}: {n} work. Refused: {why or 'none'}.")
    return "\n".join(lines) + "\n"


def _kind(reason: str) -> str:
    text = re.sub(r"^the (?:chat )?template('s)? |: .*", "", reason)
    text = re.sub(r"message \d+", "a message", " ".join(text.split()))
    return re.sub(r"(refuses this conversation).*", r"\1", text)


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
