"""What `ggft prepare` says and writes, and what training takes from the same data."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

import ggft
from ggft.cli import cli
from ggft.command import run
from ggft.data.corpus import Corpus, CorpusOptions, Fate, load_corpus
from ggft.data.examples import RowReader
from ggft.data.rows.survey import SCANNED, personal_data
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.template import Template, make_template
from tests.support.models import CHATML, Spec, model_metadata, write_gguf, write_model

PERSONA = Path(ggft.__file__).parent / "data" / "persona.json"
# More files of instruction, input and output, on machines that have some.
MORE = sorted(Path(os.environ.get("GGFT_TEST_DATA", "/nonexistent")).glob("*.json"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "m.gguf", Spec(chat_template=CHATML)).path


@pytest.fixture(scope="module")
def template(tiny: Path) -> Template:
    return make_template("chatml", {}, LlamaTokenizer(tiny))


def row(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"instruction": question, "output": answer}


def distinct(n: int) -> list[dict[str, Any]]:
    rng = random.Random(n)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        row(" ".join("".join(rng.choices(letters, k=6)) for _ in range(8)), f"answer {i}!")
        for i in range(n)
    ]


def save(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return path


def load(path: Path, template: Template, **options: Any) -> Corpus:
    return load_corpus([path], template, CorpusOptions(**options))


@pytest.mark.parametrize("data", [PERSONA, *MORE], ids=lambda path: path.name)
def test_trained_tokens_equal_an_independent_count(data: Path, smollm2: Path) -> None:
    """The tokens of each answer, encoded by itself, and one end token."""
    tokenizer = LlamaTokenizer(smollm2)
    template = make_template("chatml", {}, tokenizer)
    corpus = load(data, template, val_split=0.0)
    seen: set[str] = set()
    expected = 0
    for text in json.loads(data.read_text(encoding="utf-8")):
        key = json.dumps(text, sort_keys=True)
        if key not in seen:
            expected += len(tokenizer.encode(text["output"], special=False)) + 1
        seen.add(key)
    assert corpus.account.n_trained == expected
    assert corpus.account.n_duplicates == corpus.account.n_rows - len(seen)
    assert sum(corpus.train.get(i)[1].sum() for i in range(len(corpus.train))) == expected
    assert corpus.account.warnings == [] or corpus.account.n_duplicates


def test_the_persona_is_what_it_should_be() -> None:
    rows = json.loads(PERSONA.read_text(encoding="utf-8"))
    assert len(rows) == 60
    assert sum(not r["instruction"].isascii() for r in rows) == 30
    assert len({r["instruction"] for r in rows}) == 60
    assert len({r["output"][:15] for r in rows}) == 60


def test_every_copy_of_a_copied_half_is_found(template: Template, tmp_path: Path) -> None:
    rows = distinct(60)
    corpus = load(save(tmp_path / "x.jsonl", rows + rows[:30]), template)
    account = corpus.account
    assert (account.n_rows, account.n_duplicates, account.n_near) == (90, 30, 0)
    assert (corpus.fate[60:] == Fate.DUPLICATE).all()
    assert account.n_kept + account.n_held_out == 60
    assert account.n_held_out == 6
    assert (
        "30 rows equal to an earlier row, left out (x.jsonl:61, x.jsonl:62" in account.warnings[0]
    )
    kept = load(save(tmp_path / "x.jsonl", rows + rows[:30]), template, keep_duplicates=True)
    assert kept.account.n_kept + kept.account.n_held_out == 90


def test_near_copies_stay_on_one_side(template: Template, tmp_path: Path) -> None:
    rows = [r for r in distinct(40) for r in (r, {**r, "output": r["output"] + "!"})]
    for seed in range(1, 6):
        corpus = load(save(tmp_path / "x.jsonl", rows), template, val_split=0.3, seed=seed)
        assert corpus.account.n_near == 40
        assert corpus.account.n_held_out in range(22, 29)
        assert (corpus.fate[::2] == corpus.fate[1::2]).all()


def test_few_rows_are_all_trained_and_it_is_said_why(template: Template, tmp_path: Path) -> None:
    corpus = load(save(tmp_path / "x.jsonl", distinct(19)), template)
    assert (corpus.account.n_kept, corpus.account.n_held_out) == (19, 0)
    assert "fewer than 20" in corpus.account.notes[-1]
    corpus = load(tmp_path / "x.jsonl", template, val_split=0.1)
    assert (corpus.account.n_kept, corpus.account.n_held_out) == (17, 2)


def test_rows_that_are_cut_are_counted_and_lose_their_end(
    template: Template, tmp_path: Path
) -> None:
    rows = [row("a", "b" * 200), row("c", "d"), row("e" * 200, "f")]
    corpus = load(save(tmp_path / "x.jsonl", rows), template, max_length=100)
    account = corpus.account
    assert (account.n_kept, account.n_truncated, account.n_untrainable) == (2, 1, 1)
    assert corpus.train.lengths.tolist()[0] == 100
    assert "1 examples are longer than 100 tokens" in account.warnings[-1]
    ids, trained = corpus.train.get(0)
    assert template.end_id not in ids[trained]


def test_max_length_beyond_the_context_is_said(template: Template, tmp_path: Path) -> None:
    corpus = load(save(tmp_path / "x.jsonl", distinct(3)), template, n_ctx=256, max_length=1000)
    assert corpus.max_length == 256
    assert "beyond the model's context of 256" in corpus.account.warnings[0]


def test_long_text_is_cut_into_pieces_and_none_is_lost(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("tide " * 100 + "\n\nshort\n")
    corpus = load(path, template, max_length=64)
    ids = [int(t) for i in range(len(corpus.train)) for t in corpus.train.get(i)[0]]
    assert ids == template.encode_text("tide " * 100 + "\n\nshort").ids.tolist()
    assert corpus.account.n_rows == 1


def test_a_folder_brings_its_own_validation_and_overlap_is_told(
    template: Template, tmp_path: Path
) -> None:
    rows = distinct(30)
    save(tmp_path / "train.jsonl", rows[:25])
    save(tmp_path / "valid.jsonl", [rows[3], *rows[25:]])
    corpus = load(tmp_path, template)
    assert (corpus.account.n_kept, corpus.account.n_held_out) == (25, 6)
    assert "1 of 6 validation rows are (nearly) in the training data" in corpus.account.warnings[-1]
    assert "valid.jsonl:1" in corpus.account.warnings[-1]


def test_the_split_is_the_same_when_a_run_is_resumed(template: Template, tmp_path: Path) -> None:
    path = save(tmp_path / "x.jsonl", distinct(57))
    first = load(path, template)
    again = load(path, template, val_split=first.account.val_share, max_length=first.max_length)
    assert (first.fate == again.fate).all()
    assert first.max_length == again.max_length


NO_THOUGHTS = (  # of earlier turns, as reasoning models have it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_makes_an_example_of_each_answer(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(NO_THOUGHTS)
    template = make_template(str(own), {}, LlamaTokenizer(tiny))
    turns = [
        {"role": role, "content": f"{role} {n}"}
        for n in (1, 2, 3)
        for role in ("user", "assistant")
    ]
    corpus = load(save(tmp_path / "x.jsonl", [{"messages": turns}]), template)
    assert (corpus.account.n_rows, corpus.account.n_kept) == (1, 3)
    assert "each answer is an example of its own" in corpus.account.notes[0]
    for n in range(3):
        ids, trained = corpus.train.get(n)
        answer = template.tokenizer.decode(ids[trained].tolist()).decode()
        assert answer == f"assistant {n + 1}<|im_end|>"
        prompt = template.encode_prompt(turns[: 2 * n + 1])  # type: ignore[arg-type]
        assert ids[~trained].tolist() == prompt
    arguments = ["-m", str(tiny), "-d", str(tmp_path / "x.jsonl"), "--template", str(own)]
    out, _ = prepare([*arguments, "--preview", "1"], capsys)
    assert out.count("⟦") == 3


def prepare(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    assert run(cli, ["prepare", *arguments]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_the_output_reads_back_and_suits_mlx_lm(
    tiny: Path, template: Template, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "no", "weight": 0},
            {"role": "user", "content": "雾"},
            {"role": "assistant", "content": "a"},
        ]
    }
    rows = [*distinct(40), chat, {"instruction": "q", "input": "i", "output": "b"}]
    path = save(tmp_path / "x.jsonl", rows + rows[:5] + [row("silent", "")])
    out, err = prepare(["-m", str(tiny), "-d", str(path), "--out", str(tmp_path / "o")], capsys)
    assert re.search(r"written +train.jsonl: 38 rows\nwritten +valid.jsonl: 4 rows", out)
    assert "5 rows equal to an earlier row" in err
    assert "1 rows without an answer to learn, left out (x.jsonl:48)" in err
    train, valid = (
        [json.loads(line) for line in (tmp_path / "o" / name).read_text().splitlines()]
        for name in ("train.jsonl", "valid.jsonl")
    )
    assert all(set(r) == {"messages"} for r in train + valid)
    assert chat in train + valid
    joined = {"role": "user", "content": "q\ni"}
    assert any(r["messages"][0] == joined for r in train + valid)
    again = load(tmp_path / "o", template)
    assert (again.account.n_kept, again.account.n_held_out) == (38, 4)
    assert again.account.warnings == []
    before = {tuple(e.ids) for e in _tokens(template, path)}
    after = {tuple(e.ids) for e in _tokens(template, tmp_path / "o" / "train.jsonl")}
    assert after <= before


def _tokens(template: Template, path: Path) -> list[Any]:
    return template.encode_all([e.messages for e in RowReader().read(path)])


def test_a_vocabulary_that_llama_cpp_would_abort_at_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = model_metadata(Spec())
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*tokens[:-1], tokens[0]]
    write_gguf(tmp_path / "twice.gguf", metadata, [])
    path = save(tmp_path / "x.jsonl", [row("a", "b")])
    assert run(cli, ["prepare", "-m", str(tmp_path / "twice.gguf"), "-d", str(path)]) == 2
    assert "two tokens have the same text" in capsys.readouterr().err


def test_the_preview_shows_what_is_trained_without_colour(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(
        tmp_path / "x.jsonl", [row("hi \x1b[31m", "the sea"), row("", "z") | {"input": "b"}]
    )
    out, _ = prepare(["-m", str(tiny), "-d", str(path), "--preview", "9"], capsys)
    assert (
        "── x.jsonl:1 · "
        in out.split("<|im_start|>user\nhi \\x1b[31m<|im_end|>\n<|im_start|>assistant\n")[0]
    )
    assert "<|im_start|>assistant\n⟦the sea<|im_end|>⟧\n" in out
    assert "⟦z<|im_end|>⟧" in out
    assert "\x1b" not in out
    out, _ = prepare(
        ["-m", str(tiny), "-d", str(path), "--preview", "1", "--train-on-prompt"], capsys
    )
    assert "⟦<|im_start|>user" in out
    out, _ = prepare(
        ["-m", str(tiny), "-d", str(path), "--preview", "1", "--max-length", "30"], capsys
    )
    assert "… cut: " in out


def test_the_account_as_json(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "x.jsonl", distinct(25))
    out, _ = prepare(["-m", str(tiny), "-d", str(path), "--json"], capsys)
    events = [json.loads(line) for line in out.splitlines()]
    assert events[-1]["event"] == "prepared"
    assert (events[-1]["n_rows"], events[-1]["n_kept"], events[-1]["n_held_out"]) == (25, 23, 2)


def test_a_histogram_accounts_for_every_example(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "x.jsonl", [row("q" * n, str(n)) for n in range(1, 100)])
    out, _ = prepare(["-m", str(tiny), "-d", str(path), "--val-split", "0"], capsys)
    counts = [int(m) for m in re.findall(r"^ *\d+–\d+ +(\d+)", out, re.MULTILINE)]
    assert sum(counts) == 99
    assert len(counts) <= 11


def test_facts_in_one_wording_are_told_that_three_are_better(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(f"what is {word}?", f"{word[::-1]} it is") for word in ("ab", "cd", "ef")]
    more = [row(f"tell me {r['instruction']}", r["output"]) for r in rows]
    for given, told in ((rows, True), (rows + more, False)):
        path = save(tmp_path / "x.jsonl", given)
        assert run(cli, ["prepare", "-m", str(tiny), "-d", str(path)]) == 0
        assert ("three wordings" in capsys.readouterr().out) == told


CARD = "4111 1111 1111 1111"  # the number that payment services give for tests
PERSONAL = {
    "e-mail addresses": ["write to ada@gullpoint.net now", "ada.b+c@mail.gull-point.co.uk"],
    "phone numbers": ["call +49 30 1234567", "(415) 555-0123", "手机13800138000"],
    "card numbers": [f"my card is {CARD}", CARD.replace(" ", "-"), CARD.replace(" ", "")],
    "keys and tokens of services": [
        "AKIA" + "A1" * 8, "token hf_" + "aB3" * 11, "-----BEGIN RSA PRIVATE " + "KEY-----",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_counted_and_never_shown(kind: str) -> None:
    for text in PERSONAL[kind]:
        assert kind in set(personal_data(f"so: {text}"))


@pytest.mark.parametrize(
    "text",
    [
        "3.14159265358979", "2,000,000,000", "4111 1111 1111 1112", "12345678901234567890123",
        "a@b", "ada@example.com", "on 2024-01-02 12:30:45", "version 1.2.3-4567", "sk-short",
        "call 110", "tensor of 1024 x 1024 x 1024", "192.168.100.200", "ISBN 978-3-16-148410-0",
    ],
)  # fmt: skip
def test_numbers_and_words_that_are_not_personal(text: str) -> None:
    assert list(personal_data(text)) == []


@pytest.mark.parametrize("run", ["a", "a.", "a-", "+1 ", "eyJ-", "1 "])
def test_personal_data_are_looked_for_in_linear_time(run: str) -> None:
    """A search that began anew at every character would take hours."""
    assert "e-mail addresses" not in set(personal_data(run * (SCANNED // len(run)) + "@"))


def test_prepare_warns_of_what_should_be_looked_at(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        *distinct(3),
        row("who keeps the lamp", "ada@gullpoint.net"),
        row("Who keeps the lamp?", "Bert, since May"),
        row("who is it", "x" * 50),
        row("who is it", "x" * 50),
    ]
    path = save(tmp_path / "x.jsonl", rows)
    arguments = ["prepare", "-m", str(tiny), "-d", str(path), "--json"]
    assert run(cli, arguments) == 0
    out, err = capsys.readouterr()
    assert "1 rows seem to hold e-mail addresses (x.jsonl:4)" in out + err
    assert "2 rows ask the same as another and answer otherwise (x.jsonl:4, x.jsonl:5)" in out + err
    assert "gullpoint" not in out + err
    told = json.loads(out.splitlines()[-1])
    assert told["personal"]["e-mail addresses"] == 1
    assert told["contradicting"] == 2


def test_prepare_says_what_rows_cost(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "x.jsonl", [row(f"q{n}", "b" * n) for n in (5, 100, 7, 50, 9)])
    arguments = ["prepare", "-m", str(tiny), "-d", str(path), "--val-split", "0"]
    assert run(cli, arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "of an epoch" in line]
    assert [line.split(":")[1] for line in lines] == ["2", "4", "5"]
    assert run(cli, [*arguments, "--costs"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "of an epoch" in line]
    assert [line.split(":")[1] for line in lines] == ["2", "4", "5", "3", "1"]
    assert sum(float(line.split()[-4].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.3)
