from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ggft.gguf.read import read_gguf
from ggft.llama.model import LlamaModel, LlamaTokenizer
from ggft.prompts.template import make_template
from ggft.recipes import generate as module
from ggft.recipes.generate import Chat, read_prompt
from ggft.settings.commands import GenerateConfig
from ggft.setup.answers import Speaker, checked_text
from ggft.system.errors import InputError
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, Tiny, write_model

QUESTION: Any = {"role": "user", "content": "the hen"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", Spec(chat_template=CHATML))


def config(tiny: Tiny, **changes: Any) -> GenerateConfig:
    settings = {"temperature": 0.0, "max_tokens": 8, "context": 256, "threads": 1, "device": "cpu"}
    return GenerateConfig(model=str(tiny.path), **{**settings, **changes})


class FakeTokens:
    """Stands in for `LlamaModel.generate`, and remembers what it was asked."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.prompts: list[list[int]] = []
        self.settings: list[dict[str, Any]] = []

    def __call__(self, model: LlamaModel, ids: list[int], **settings: Any) -> Iterator[int]:
        self.prompts.append(list(ids))
        self.settings.append(settings)
        return iter(self.tokens)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTokens:
    made = FakeTokens([])
    monkeypatch.setattr(LlamaModel, "generate", lambda *a, **k: made(*a, **k))
    return made


def test_the_prompt_is_the_one_of_training(tiny: Tiny, fake: FakeTokens) -> None:
    list(Speaker(config(tiny)).answer([QUESTION]))
    file = read_gguf(tiny.path)
    template = make_template("auto", file.metadata, LlamaTokenizer(tiny.path))
    example = template.encode_example([QUESTION, {"role": "assistant", "content": "hen"}])
    n_prompt = example.trained.index(True)
    assert fake.prompts == [example.ids[:n_prompt].tolist()]
    assert example.ids[-1] in fake.settings[0]["stop_ids"]  # the trained end token ends it


def test_settings_reach_the_model(tiny: Tiny, fake: FakeTokens) -> None:
    list(Speaker(config(tiny, seed=3, top_p=0.5, temperature=0.1)).answer([QUESTION]))
    fake.settings[0].pop("stop_ids")
    expected = {"max_tokens": 8, "temperature": 0.1, "top_p": 0.5, "seed": 3}
    assert fake.settings == [expected]


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        ("  hen", ["h", "e", "n"]),
        ("é", ["é"]),
        ("法国🙂", ["法", "国", "🙂"]),
        ("a\x1b[2Jb", ["a", "\\x1b", "[", "2", "J", "b"]),
        ("a\u009bb", ["a", "\\x9b", "b"]),
        ("a\tb\n", ["a", "\t", "b", "\n"]),
    ],
)
def test_pieces_are_whole_and_safe(
    answer: str, pieces: list[str], tiny: Tiny, fake: FakeTokens
) -> None:
    tokenizer = LlamaTokenizer(tiny.path)
    fake.tokens = [i for byte in answer.encode() for i in _byte_token(tokenizer, byte)]
    assert list(Speaker(config(tiny)).answer([QUESTION])) == pieces


def _byte_token(tokenizer: LlamaTokenizer, byte: int) -> list[int]:
    return [i for i in range(3, 259) if tokenizer.piece(i) == bytes([byte])]


def test_half_a_character_at_the_end_is_replaced(tiny: Tiny, fake: FakeTokens) -> None:
    fake.tokens = _byte_token(LlamaTokenizer(tiny.path), 0xE6)
    assert list(Speaker(config(tiny)).answer([QUESTION])) == ["\ufffd"]


def test_control_tokens_are_not_text(tiny: Tiny, fake: FakeTokens) -> None:
    fake.tokens = [1, *_byte_token(LlamaTokenizer(tiny.path), 0x61), 1]
    assert list(Speaker(config(tiny)).answer([QUESTION])) == ["a"]


def test_an_adapter_changes_the_answer(tiny: Tiny, tmp_path: Path) -> None:
    random_adapter(tmp_path / "a.gguf", tiny, size=1.0)

    def answer(**changes: Any) -> str:
        return "".join(Speaker(config(tiny, **changes)).answer([QUESTION]))

    plain = answer()
    assert answer() == plain
    assert answer(adapter=str(tmp_path / "a.gguf")) != plain
    assert answer(adapter=str(tmp_path / "a.gguf"), adapter_scale=0.0) == plain


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"base_sha256": "0" * 64}, "trained on another base model"),
        ({"template": "chatml", "template_sha256": "0" * 64}, "not the one that the adapter"),
        ({"template": "/no/such/file.jinja"}, "template from a file"),
    ],
)
def test_an_adapter_of_other_things_is_refused(
    meta: dict[str, Any], says: str, tiny: Tiny, tmp_path: Path
) -> None:
    random_adapter(tmp_path / "a.gguf", tiny, **meta)
    with pytest.raises(InputError, match=says):
        Speaker(config(tiny, adapter=str(tmp_path / "a.gguf")))


def test_the_adapters_template_is_used(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = read_gguf(tiny.path)
    trained = make_template("instruction", file.metadata, LlamaTokenizer(tiny.path))
    random_adapter(
        tmp_path / "a.gguf", tiny, template="instruction", template_sha256=trained.source_hash
    )
    adapter = str(tmp_path / "a.gguf")
    assert Speaker(config(tiny, adapter=adapter)).template.source == trained.source
    assert capsys.readouterr().err == ""
    other = Speaker(config(tiny, adapter=adapter, template="chatml"))
    assert other.template.name == "chatml"
    assert "trained with another template" in capsys.readouterr().err


def test_generate_prints_the_answer_alone(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    module.generate(config(tiny), "the hen")
    out, err = capsys.readouterr()
    expected = "".join(Speaker(config(tiny)).answer([QUESTION]))
    assert out == expected + "\n"
    assert err in ("", "(cut after 8 tokens; --max-tokens allows more)\n")


def test_generate_takes_system_and_input(tiny: Tiny, fake: FakeTokens) -> None:
    module.generate(config(tiny, system="be a hen"), "the hen", "the in")
    text = LlamaTokenizer(tiny.path).decode(fake.prompts[0]).decode()
    assert text.startswith("<|im_start|>system\nbe a hen<|im_end|>\n<|im_start|>user\nthe hen")
    assert "the in<|im_end|>" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("given", "piped", "expected"),
    [
        ("hi", "ignored", "hi"),
        (None, "from\na pipe\n", "from\na pipe"),
        ("-", "from a pipe", "from a pipe"),
    ],
)
def test_the_prompt_is_given_or_piped(given: str | None, piped: str, expected: str) -> None:
    assert read_prompt(given, io.StringIO(piped)) == expected


@pytest.mark.parametrize(
    ("given", "source", "says"),
    [
        (None, Terminal(), "no prompt"),
        (None, io.StringIO(""), "the prompt is empty"),
        ("", io.StringIO("x"), "the prompt is empty"),
        (None, io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"), "not valid UTF-8"),
        ("a\0", io.StringIO(""), "NUL"),
        ("a\udcff", io.StringIO(""), "not valid UTF-8"),
    ],
)
def test_bad_prompts(given: str | None, source: io.TextIOBase, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read_prompt(given, source)  # type: ignore[arg-type]


def chat(tiny: Tiny, typed: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    module.chat(config(tiny, **changes))


def test_chat_keeps_the_history(
    tiny: Tiny, fake: FakeTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = LlamaTokenizer(tiny.path)
    fake.tokens = tokenizer.encode("hen", special=False)
    typed = "one\n\n  \ntwo\n/reset\nthree\n/system be in\nfour\n/exit\nfive\n"
    chat(tiny, typed, monkeypatch, system="old")
    said = [tokenizer.decode(ids).decode() for ids in fake.prompts]
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    old = "<|im_start|>system\nold<|im_end|>\n"
    assert said == [
        old + turn.format("one"),
        old + turn.format("one") + "hen<|im_end|>\n" + turn.format("two"),
        old + turn.format("three"),
        "<|im_start|>system\nbe in<|im_end|>\n" + turn.format("four"),
    ]


def test_chat_commands(
    tiny: Tiny, fake: FakeTokens, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chat(tiny, "/help\n/system\n/nonsense\n/reset\n/quit\n", monkeypatch)
    out, err = capsys.readouterr()
    assert (out, fake.prompts) == ("", [])
    for text in ("/system TEXT", "system prompt: none", "no command /nonsense", "is forgotten"):
        assert text in err


def test_a_failed_turn_leaves_no_trace(tiny: Tiny) -> None:
    talk = Chat(Speaker(config(tiny, context=64)), None)
    with pytest.raises(InputError, match="longer than the context"):
        talk.say("hen " * 99)
    with pytest.raises(InputError, match="NUL"):
        talk.say("\0")
    assert talk.history == []


def test_piped_chat_stops_at_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="longer than the context"):
        chat(tiny, "hen " * 99 + "\nthe hen\n", monkeypatch, context=64)


def test_typed_chat_goes_on_after_an_error(
    tiny: Tiny, fake: FakeTokens, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lines = iter(["a\0b", "the hen"])

    def typed(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)
    module.chat(config(tiny))
    assert "NUL" in capsys.readouterr().err
    assert len(fake.prompts) == 1


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["the hen", "/exit"])
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda _prompt: next(lines))

    def interrupted(*_: Any, **__: Any) -> Iterator[int]:
        yield 5
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaModel, "generate", interrupted)
    module.chat(config(tiny))
    assert "(stopped)" in capsys.readouterr().err


def test_checked_text_keeps_the_text() -> None:
    assert checked_text(" 法国 ", "x") == " 法国 "
