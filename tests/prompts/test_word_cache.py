"""Whatever the vocabulary and however text is cut first, cached words give llama.cpp's own ids."""

from __future__ import annotations

import contextlib
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggft.llama.model import LlamaTokenizer
from ggft.prompts.word_cache import MAX_WORD_CHARS, WordCache, find_cuts
from ggft.system.errors import InputError
from tests.support.models import Spec, byte_symbol, model_metadata, write_gguf

ROOT = Path(__file__).resolve().parents[2]
# Names of llama.cpp's ways to cut text first; one that it does not know is left out.
CUTTERS = re.findall(
    r"\S+",
    """
default llama3 llama-bpe deepseek-llm deepseek-coder deepseek-v3 falcon mpt starcoder gpt-2 refact
command-r qwen2 qwen35 stablelm2 olmo dbrx poro-chat chatglm-bpe viking jais jais2 smollm codeshell
bloom gpt3-finnish exaone exaone4 exaone-moe minerva-7b megrez gpt-4o llama4 superbpe trillion
granite-docling bailingmoe seed-coder hunyuan hunyuan-dense joyai-llm tekken kimi-k2 grok-2 afmoe
minimax-m2 solar-open youtu mellum midm-2.0 lfm2 a.x-4.0 phi-2 pixtral gigachat glm4 sarvam-moe
kormo tiny_aya whisper roberta-bpe jina-v2-code falcon3 falcon-h1 granite granite-4.0
""",
)
SAMPLES = [
    *(ROOT / "README.md").read_text(encoding="utf-8").split("\n\n"),
    *(ROOT / "README.zh-CN.md").read_text(encoding="utf-8").split("\n\n"),
    *(ROOT / "ggft" / "data" / "duplicates.py").read_text(encoding="utf-8").split("\n\n\n"),
    "It's 1234567.89 o'clock,\r\nDON'T you'LL we've\tsaid “ok” — e.g. \x02 naïve café\n\n  (yes)\n",
    'Übung macht\nden "Meister". ١٢٣ क्षत्रिय 한국어 日本語 👍🏽 <|im_end|></s> x= 1;\n\ty ++\n',
    " leading, and trailing \n ",
    "\n",
    "",
]
TRICKY = st.text(
    st.sampled_from(
        "  \n\t\rabtheAZ07中文é́👍\u200d🏽▁Ġ\u3000\xa0，。、۱ß\x02" + string.punctuation
    ),
    max_size=40,
)


def symbols(text: str) -> str:
    return "".join(byte_symbol(b) for b in text.encode())


def vocabulary(kind: str, texts: list[str]) -> dict[str, Any]:
    """Return metadata whose tokens are the commonest words of texts, with all their beginnings."""
    words = Counter(
        w for t in texts for w in re.findall(r" ?[^\W\d_]+| ?\d| ?[^\w\s]+\n*|\s+(?!\S)|\s", t)
    )
    common = [w for w, n in words.most_common(1500) if n > 1]
    metadata = model_metadata(Spec(vocab=kind))
    tokens = list(metadata["tokenizer.ggml.tokens"])
    known = set(tokens)
    merges: list[str] = []
    for word in common:
        spelled = symbols(word) if kind == "bpe" else word.replace(" ", "▁")
        for n in range(1 if kind == "spm" else 2, len(spelled) + 1):
            if spelled[:n] not in known:
                known.add(spelled[:n])
                tokens.append(spelled[:n])
                if n > 1:
                    merges.append(f"{spelled[: n - 1]} {spelled[n - 1]}")
    n_new = len(tokens) - len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"] + [1] * n_new
    metadata["tokenizer.ggml.tokens"] = tokens
    if kind == "spm":
        metadata["tokenizer.ggml.scores"] = [-float(i) for i in range(len(tokens))]
    else:
        metadata["tokenizer.ggml.merges"] = [*metadata["tokenizer.ggml.merges"], *merges]
    metadata["llama.vocab_size"] = len(tokens)
    return metadata


def with_tokens(metadata: dict[str, Any], tokens: list[str], kind: int) -> dict[str, Any]:
    """Return the metadata with tokens appended."""
    more: dict[str, list[Any]] = {
        "tokens": tokens,
        "token_type": [kind] * len(tokens),
        "scores": [-1e4] * len(tokens),
    }
    changed = dict(metadata)
    for name, values in more.items():
        if (key := f"tokenizer.ggml.{name}") in metadata:
            changed[key] = [*metadata[key], *values]
    return changed


class Counting:
    """A tokenizer that counts calls and bytes."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self._tokenizer = tokenizer
        self.n_calls = self.n_chars = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, *, special: bool) -> list[int]:
        self.n_calls += 1
        self.n_chars += len(text)
        return self._tokenizer.encode(text, special=special)


class Case:
    """A vocabulary in a file, and a cache for it that is used from the first text on."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        write_gguf(path, metadata, [])
        self.tokenizer = LlamaTokenizer(path)
        self.counting = Counting(self.tokenizer)
        spm = metadata["tokenizer.ggml.model"] == "llama"
        prefix = spm and metadata.get("tokenizer.ggml.add_space_prefix", True)
        self.cache = WordCache(self.counting, metadata, space_prefix=prefix)
        self.cache._n_direct = 1

    def check(self, texts: list[str]) -> None:
        expected = [self.tokenizer.encode(text, special=False) for text in texts]
        for _ in range(2):  # words are new, then known
            for text, ids, right in zip(texts, self.cache.encode_all(texts), expected, strict=True):
                assert ids.tolist() == right, text


@pytest.fixture(scope="module")
def bpe() -> dict[str, Any]:
    return vocabulary("bpe", SAMPLES)


@pytest.fixture(scope="module")
def spm() -> dict[str, Any]:
    return vocabulary("spm", SAMPLES)


@pytest.fixture(scope="module")
def cases(
    bpe: dict[str, Any], spm: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("cases")
    every = {
        "spm": spm,
        "spm without prefix": {**spm, "tokenizer.ggml.add_space_prefix": False},
        **{name: {**bpe, "tokenizer.ggml.pre": name} for name in CUTTERS},
    }
    made: dict[str, Case] = {}
    for name, metadata in every.items():
        with contextlib.suppress(InputError):
            made[name] = Case(metadata, folder / f"{name}.gguf")
    assert len(made) > 50
    return made


def test_every_way_to_cut_text_first(cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        case.check(SAMPLES)
        assert case.cache._cuts is not None, name
        assert len(case.cache._known) > 300


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(TRICKY, min_size=1, max_size=8))
def test_any_texts(cases: dict[str, Case], texts: list[str]) -> None:
    for case in cases.values():
        case.check(texts)


def test_known_words_are_not_tokenized_again(cases: dict[str, Case]) -> None:
    for name in ("spm", "spm without prefix", "llama-bpe", "qwen2"):
        case = cases[name]
        text = "Every word, of these lines,\nis met (one time) after the other.\n" * 30
        case.check([text])
        before = case.counting.n_calls
        case.cache.encode_all([text] * 50)
        assert case.counting.n_calls == before
        new = [f"brand new{letter}" for letter in "abcdefgh"]
        case.cache.encode_all([f"Every word, of {word}, is new." for word in new])
        assert case.counting.n_calls == before + 1


def test_long_words_are_not_kept(cases: dict[str, Case]) -> None:
    case = cases["llama-bpe"]
    case.check([f"short {'long' * MAX_WORD_CHARS} short"])
    assert max(map(len, case.cache._known)) <= MAX_WORD_CHARS


def test_the_first_texts_cost_no_look_at_the_vocabulary(
    bpe: dict[str, Any], tmp_path: Path
) -> None:
    case = Case(bpe, tmp_path / "x.gguf")
    case.cache._n_direct = 5
    case.cache.encode_all(["one two"] * 4)
    assert case.cache._cuts is None
    case.cache.encode_all(["one two"] * 4)
    assert case.cache._cuts is not None


def test_tokens_that_reach_over_a_space_forbid_to_cut_there(
    bpe: dict[str, Any], spm: dict[str, Any]
) -> None:
    def cuts(metadata: dict[str, Any], tokens: list[str], kind: int = 1) -> Any:
        prefix = metadata["tokenizer.ggml.model"] == "llama"
        return find_cuts(with_tokens(metadata, tokens, kind), space_prefix=prefix)

    assert cuts(bpe, ["sĠt"]) is None
    assert cuts(spm, ["s▁t"]) is None
    assert cuts(bpe, ["two words"], 4) is None
    assert cuts(spm, [" added"], 4) is None
    assert cuts(spm, ["added"], 4) is None
    assert cuts(spm, ["  ", "<b>"], 4) is not None
    for text, joined, cut in (
        (", x", ",Ġ", False),
        ("; x", ",Ġ", True),
        ("。 x", "\u0124Ġ", False),  # a byte of a character beyond ASCII
        ("。 x", ",Ġ", True),
        ("a\nx", "Ċx", False),
        ("a\nx", "Ċ-", True),
        ("a\n-", "Ċ-", False),
        ("a\n中", "Ċä", False),
        ("a\n中", "Ċ-", True),
        ("a\u3000 x", ",Ġ", False),
    ):
        assert (len(cuts(bpe, [joined]).words(text)) == 2) is cut, (text, joined)
    assert len(cuts(spm, []).words("a\nx")) == 1
    assert len(cuts(spm, []).words("。 x")) == 2
    assert len(cuts(spm, ["。▁"]).words("。 x")) == 1
    assert find_cuts({"tokenizer.ggml.model": "t5"}, space_prefix=False) is None
    assert find_cuts({}, space_prefix=False) is None


def test_tokens_over_spaces_are_still_found(bpe: dict[str, Any], tmp_path: Path) -> None:
    """What cutting would have missed."""
    metadata = with_tokens({**bpe, "tokenizer.ggml.pre": "superbpe"}, ["eĠc"], 1)
    metadata["tokenizer.ggml.merges"] = ["e Ġ", "eĠ c", *metadata["tokenizer.ggml.merges"]]
    metadata = with_tokens(metadata, ["eĠ"], 1)
    metadata["llama.vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    case = Case(metadata, tmp_path / "x.gguf")
    case.check(["the cat, the cow"])
    ids = case.cache.encode_all(["the cat"])[0].tolist()
    pieces = [metadata["tokenizer.ggml.tokens"][i] for i in ids]
    assert "eĠc" in pieces


def test_a_vocabulary_with_added_tokens(bpe: dict[str, Any], tmp_path: Path) -> None:
    added = ["<tool>", "  ", "\n\n", "[x]"]
    metadata = with_tokens(bpe, added, 4)
    metadata["llama.vocab_size"] = len(metadata["tokenizer.ggml.tokens"])
    case = Case(metadata, tmp_path / "x.gguf")
    case.check([*SAMPLES, "call <tool> now\n\nor  [x] then<tool>. And\nso [x]on"])


def test_text_that_is_not_unicode(cases: dict[str, Case]) -> None:
    for text in ("a \ud800 b", "one two\ud800"):
        with pytest.raises(InputError, match="not valid Unicode"):
            cases["llama-bpe"].cache.encode_all(["fine words", text])
    cases["llama-bpe"].check(["a NUL \0 in text", "fine words"])


def test_a_real_vocabulary(smollm2: Path) -> None:
    from ggft.gguf.read import read_gguf

    tokenizer = LlamaTokenizer(smollm2)
    cache = WordCache(tokenizer, read_gguf(smollm2).metadata, space_prefix=False)
    cache._n_direct = 1
    texts = [*SAMPLES, *(p.read_text(encoding="utf-8") for p in (ROOT / "ggft").rglob("*.py"))]
    for text, ids in zip(texts, cache.encode_all(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text, special=False)
