"""What is left out of a long conversation changes none of the tokens that are kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from ggft.prompts import assistant_mask, shorten
from ggft.prompts.assistant_mask import AssistantMask
from ggft.prompts.builtin import BUILTIN
from ggft.prompts.dialect import learn_dialect
from ggft.prompts.jinja import render_here
from ggft.prompts.messages import Message
from ggft.prompts.shorten import Shortener
from ggft.prompts.template import make_template
from ggft.system.errors import InputError
from tests.support.vocabularies import FAMILIES, Model

N_TOKENS = 50
MARGIN = 500  # far less than in use, so that whole texts are tokenized soon
LETTERS = random.Random(5).choices("abcdeé中\n ,.", k=6 * MARGIN)
TEXTS = {
    "words": "the hen is on a hill, " * 300,
    "one letter": "a" * 6 * MARGIN,
    "two letters": "th" * 3 * MARGIN,
    "one word": "thehenin" * MARGIN,
    "anything": "".join(LETTERS),
    "blanks within": "the" + " " * 6 * MARGIN + "hen",
    "blanks before": " \n" * 3 * MARGIN + "hen " * 2 * MARGIN,
    "line breaks": "\n\n" * 3 * MARGIN,
    "beyond ASCII": "中é" * 3 * MARGIN,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("vocabularies")
    return {family: Model(family, folder) for family in FAMILIES}


@pytest.fixture(autouse=True)
def _small_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shorten, "MARGIN", MARGIN)


def pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_that_are_kept_are_the_same(
    models: dict[str, Model], family: str, text: str
) -> None:
    model = models[family]
    template = make_template("chatml", model.metadata, model.tokenizer)
    # An answer that is only context: some of these vocabularies have no end for it.
    before: list[Any] = [{**m, "learn": False} for m in pair("q", "a")]
    for messages in (pair("q", text), pair(text, "yes"), [*before, *pair(text, text)]):
        short = template.shorten(messages, N_TOKENS)
        whole, cut = template.encode_example(messages), template.encode_example(short)
        assert cut.ids[:N_TOKENS] == whole.ids[:N_TOKENS]
        assert cut.trained[:N_TOKENS] == whole.trained[:N_TOKENS]
        assert (len(cut.ids) > N_TOKENS) == (len(whole.ids) > N_TOKENS)


def test_a_long_text_is_cut_and_a_short_one_is_not() -> None:
    shortener = Shortener({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "abcd"]})
    long, short = pair("q", TEXTS["words"]), pair("q", "yes")
    assert len(shortener.shorten(long, 10)[1]["content"]) < MARGIN + 200
    assert shortener.shorten(short, 10) is short
    turns = pair("q", "yes") * 500
    assert 10 <= len(shortener.shorten(turns, 10)) <= 14
    assert shortener.shorten(turns, 10)[-1]["role"] == "assistant"


def test_vocabularies_whose_tokens_are_not_bounded_are_left_alone() -> None:
    messages = pair("q", TEXTS["words"])
    for metadata in ({}, {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["a"]}):
        assert Shortener(metadata).shorten(messages, 10) is messages


@pytest.mark.parametrize("name", ["chatml", "instruction", "alpaca", "llama2", "gemma"])
def test_many_turns_are_split_as_each_by_itself(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where most answers begin is inferred, and what is rendered grows only as the turns do."""
    rng = random.Random(3)
    roles: Any = rng.choices(["user", "assistant", "tool", "system"], k=120)
    messages: list[Message] = [{"role": role, "content": rng.choice("abc ")} for role in roles]
    messages += pair("q", "a")
    render = render_here(BUILTIN[name], "<s>", "</s>", {})
    dialect = learn_dialect(render, BUILTIN[name])
    end = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>"}.get(name, "</s>")
    n_rendered = 0

    def counted(requests: Sequence[Any]) -> Any:
        nonlocal n_rendered
        n_rendered += len(requests)
        return render(requests)

    def end_of(tail: str, _: bool) -> int | None:
        return tail.find(end) + len(end) if end in tail else None

    def split(n_asked: int) -> tuple[Any, int]:
        nonlocal n_rendered
        n_rendered = 0
        monkeypatch.setattr(assistant_mask, "N_ASKED", n_asked)
        try:
            mask = AssistantMask(counted, dialect, end_of, "")
            parts: Any = mask.split(messages, prompt=False)
        except InputError as error:
            parts = str(error)
        return parts, n_rendered

    (parts, few), (wanted, many) = split(2), split(1000)
    assert parts == wanted
    assert few < many / 2
