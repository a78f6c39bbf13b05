"""Processes that encode data give what this process gives, and never outlive or hide a failure."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.data import corpus
from ggft.data.corpus import Corpus, CorpusOptions, load_corpus
from ggft.data.encode import EncoderPool, encode_with
from ggft.gguf.read import read_gguf
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.messages import Message
from ggft.prompts.template import Template, make_template
from ggft.system.errors import InputError, ResourceError
from tests.recipes.test_prepare import NO_THOUGHTS, distinct, row, save
from tests.support.models import CHATML, Spec, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "m.gguf", Spec(chat_template=CHATML)).path


def bound(model: Path, name: str) -> Template:
    return make_template(name, read_gguf(model).metadata, LlamaTokenizer(model))


@pytest.fixture
def load(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def load(path: Path, name: str = "gguf", *, helped: bool, **options: Any) -> Corpus:
        monkeypatch.setattr(corpus, "LARGE_BYTES", 0 if helped else 1 << 40)
        helpers = partial(EncoderPool, model, name, train_on_prompt=False)
        return load_corpus([path], bound(model, name), CorpusOptions(**options), helpers=helpers)

    return load


def test_the_corpus_is_the_same(tmp_path: Path, load: Any) -> None:
    rows: list[Any] = [*distinct(300), row("雾", "海 😀"), row("silent", ""), *distinct(300)[:20]]
    turns = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a")) * 2]
    rows += [{"messages": turns}, {"text": "plain text " * 9}, row("What?  now"), row("what now")]
    path = save(tmp_path / "x.jsonl", rows)
    forgetful = tmp_path / "forgetful.jinja"
    forgetful.write_text(NO_THOUGHTS)
    for name in ("gguf", str(forgetful)):
        alone, helped = (load(path, name, helped=h, val_split=0.1) for h in (False, True))
        assert alone.account == helped.account
        assert alone.account.n_duplicates == 20
        for a, b in ((alone.train, helped.train), (alone.validation, helped.validation)):
            assert len(a) == len(b) > 0
            for i in range(len(a)):
                for x, y in zip(a.get(i), b.get(i), strict=True):
                    assert np.array_equal(x, y)
        for field in ("copy_of", "near", "group"):
            assert np.array_equal(
                getattr(alone.duplicates, field), getattr(helped.duplicates, field)
            )
        assert np.array_equal(alone.fate, helped.fate)
    assert any("each answer is an example of its own" in note for note in helped.account.notes)


def test_a_row_that_cannot_be_encoded_is_named(tmp_path: Path, load: Any) -> None:
    bad = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML
    )
    path = save(tmp_path / "x.jsonl", [*distinct(100), bad])
    errors = []
    for helped in (False, True):
        with pytest.raises(InputError, match="no tools") as caught:
            load(path, str(template), helped=helped)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "x.jsonl:101" in errors[0]


def test_a_template_that_is_gone_is_said(model: Path, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.jinja")
    with (
        pytest.raises(InputError, match="no such template"),
        EncoderPool(model, gone, train_on_prompt=False, n=1) as encode,
    ):
        encode(["text"])


def test_a_process_that_is_killed_is_said(model: Path) -> None:
    chat: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    pool = EncoderPool(model, "gguf", train_on_prompt=True, n=1)
    with pool as encode:
        expected = encode_with(bound(model, "gguf"), [chat, "text"], train_on_prompt=True)
        assert encode([chat, "text"])[0] == expected[0]
        os.kill(pool._members[0]._process.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"ended early.*SIGKILL"):
                encode([chat])


def test_no_process_is_left(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the reading ends."""
    monkeypatch.setattr(corpus, "LARGE_BYTES", 0)
    pools: list[EncoderPool] = []

    def helpers() -> EncoderPool:
        pools.append(EncoderPool(model, "gguf", train_on_prompt=False))
        return pools[-1]

    def stop() -> None:
        raise KeyboardInterrupt

    path = save(tmp_path / "x.jsonl", distinct(500))
    load_corpus([path], bound(model, "gguf"), CorpusOptions(), helpers=helpers)
    with pytest.raises(KeyboardInterrupt):
        load_corpus([path], bound(model, "gguf"), CorpusOptions(), stop, helpers)
    assert len(pools) == 2
    for pool in pools:
        assert [member._process.poll() for member in pool._members] == [-9, -9]


def test_small_data_starts_no_process(tmp_path: Path, model: Path) -> None:
    def helpers() -> EncoderPool:
        raise AssertionError

    path = save(tmp_path / "x.jsonl", distinct(50))
    load_corpus([path], bound(model, "gguf"), CorpusOptions(), helpers=helpers)
