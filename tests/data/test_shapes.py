"""Nothing of a row is dropped without a word: used, listed, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.data.examples import Example, RowOptions, RowReader
from ggft.data.files import Row
from ggft.setup.inputs import open_vocabulary
from ggft.system.errors import InputError
from tests.data.shapes import READ, REFUSED, TREE
from tests.support.models import Spec, write_model


def first(row: Row, format_name: str = "auto") -> Example:
    """Return the first example of a row."""
    return next(iter(RowReader(RowOptions(format_name)).examples(row)))


# What this model's template does not write is refused.
RENDERED = [name for name in READ if name.startswith(("thoughts", "tools", "rag, documents"))]
ROLES = ("role", "from", "type")


def read(row: dict[str, Any], **options: Any) -> tuple[str, list[str]]:
    """Return all that is rendered of a row, and what is said of it."""
    reader = RowReader(RowOptions(**options))
    example = next(iter(reader.examples(Row(row, Path("x"), 1))))
    texts = [example.text] if example.text is not None else []
    for message in example.messages:
        texts.append(f"{message['content']}\n{message.get('input', '')}")
        more = ("reasoning", "tools", "tool_calls", "documents", "name", "tool_call_id")
        texts += [str(message[key]) for key in more if key in message]  # type: ignore[literal-required]
    return "\n".join(texts), reader.notes()


def leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield every text and number of a field but roles, with the column it stands in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ROLES:
                yield from leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    elif isinstance(value, str) and value[:1] in ("[", "{"):
        yield from leaves(json.loads(value), name)
    elif value not in (None, "", True, False):
        yield str(value), name


@pytest.mark.parametrize("name", READ)
def test_all_of_a_row_is_rendered_or_listed(name: str) -> None:
    rendered, notes = read(READ[name])
    for column, value in READ[name].items():
        for text, where in leaves(value, column):
            said = any(f" {where}" in note for note in notes)
            assert said or text in rendered, f"{column}: {text}"


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rendered_is_refused_by_name(name: str) -> None:
    row, named = REFUSED[name]
    with pytest.raises(InputError) as refused:
        read(row)
    assert named in str(refused.value)
    assert refused.value.hint


def test_sixty_shapes() -> None:
    assert len(READ) + len(REFUSED) >= 60


def test_prepare_lists_what_it_does_not_use(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "tiny.gguf", Spec()).path
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(READ[name]) + "\n" for name in READ if name not in RENDERED))
    arguments = ["prepare", "-m", str(model), "-d", str(data), "--val-split", "0", "--json"]
    assert run(cli, arguments) == 0
    out = capsys.readouterr().out
    unused = json.loads(out.splitlines()[-1])["unused"]
    assert unused["category"] == 4
    assert unused["prompt"] == 2
    assert unused["ctxs.id"] == unused["conversation.toxic"] == 1


@pytest.mark.parametrize(
    ("row", "options", "rendered"),
    [
        ({"q": "ask", "a": "say"}, {"columns": ["q=instruction", "a=output"]}, "ask\n\nsay\n"),
        ({"问": "ask", "答": "say"}, {}, "ask\n\nsay\n"),
        ({"question": "ask", "solution": "long", "answer": "say"},
         {"ignored": ["solution"]}, "ask\n\nsay\n"),
        ({"question": "ask", "solution": "long", "answer": "say"},
         {"columns": ["answer=output"]}, "ask\n\nsay\n"),
        ({"text": "whole", "label": "good"},
         {"columns": ["text=instruction", "label=output"]}, "whole\n\ngood\n"),
        ({"question": "ask", "choices": ["x"], "answer": "say"},
         {"columns": ["choices=ignore"]}, "ask\n\nsay\n"),
        ({"question": "ask", "choices": "x or y", "answer": "say"},
         {"columns": ["choices=input"]}, "ask\nx or y\nsay\n"),
    ],
)  # fmt: skip
def test_columns_are_what_the_user_says(
    row: dict[str, Any], options: dict[str, Any], rendered: str
) -> None:
    assert read(row, **options)[0] == rendered


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"columns": ["qestion=instruction"]}, "no row has a column"),
        ({"ignored": ["x"]}, "no row has a column"),
        ({"columns": ["question"]}, "NAME=ROLE"),
        ({"columns": ["question=ask"]}, "NAME=ROLE"),
        ({"columns": ["question=input", "question=output"]}, "twice"),
    ],
)
def test_columns_that_cannot_be_meant(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        read({"question": "ask", "answer": "say"}, **options)


def test_turns_in_a_table_are_json() -> None:
    text = json.dumps([{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}])
    assert read({"messages": text})[0] == "ask\n\nsay\n"


@pytest.mark.parametrize(
    ("mark", "trained"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"train": False}, False),
        ({"training": True}, True), ({"loss": False}, False), ({"loss_scale": 0.0}, False),
        ({"masked": True}, False), ({"masked": False}, True), ({"mask": 1}, False),
        ({"weight": None, "loss": None}, True), ({"learn": False, "masked": True}, False),
    ],
)  # fmt: skip
def test_marks_of_turns(mark: dict[str, Any], trained: bool) -> None:
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", **mark},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    example = first(Row({"messages": turns}, Path("x"), 1))
    assert example.messages[1].get("learn", True) is trained


@pytest.mark.parametrize(
    "mark", [{"weight": 0.5}, {"loss": "no"}, {"masked": 2}, {"weight": 1, "masked": True}]
)
def test_marks_that_are_neither(mark: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]
    with pytest.raises(InputError, match="turn 2: "):
        first(Row({"messages": turns}, Path("x"), 1))


MARKED = {
    "ChatML": "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nask<|im_end|>\n"
    "<|im_start|>assistant\nsay<|im_end|>\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nask<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nsay<|eot_id|><|end_of_text|>",
    "Gemma": "<bos><start_of_turn>system\nbe kind<end_of_turn>\n<start_of_turn>user\nask"
    "<end_of_turn>\n<start_of_turn>model\nsay<end_of_turn>\n",
    "Zephyr": "<|system|>\nbe kind</s>\n<|user|>\nask</s>\n<|assistant|>\nsay</s>\n",
    "Llama 2": "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nask [/INST] say </s>",
}


@pytest.mark.parametrize("name", MARKED)
def test_text_that_a_template_has_written_is_a_conversation(name: str) -> None:
    reader = RowReader()
    (example,) = reader.examples(Row({"text": MARKED[name]}, Path("x"), 1))
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "be kind"), ("user", "ask"), ("assistant", "say"),
    ]  # fmt: skip
    assert reader.notes()[0].startswith(f"1 texts are conversations in the markup of {name}")
    assert first(Row({"text": MARKED[name]}, Path("x"), 1), "plain").text == MARKED[name]


@pytest.mark.parametrize(
    "text",
    [
        "see <|im_start|> for yourself",
        "<|im_start|>user\nask<|im_end|>\nand more",
        "<|im_start|>robot\nask<|im_end|>",
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\n<tool_call>\n{}\n</tool_call><|im_end|>",
        "[INST] ask [/INST] say </s> tail",
    ],
)
def test_text_with_other_control_tokens_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="control tokens") as refused:
        first(Row({"text": text}, Path("x"), 1))
    assert "--format plain" in str(refused.value)


def test_turns_after_turns_and_an_answer_that_is_open() -> None:
    text = "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d</s>"
    messages = first(Row({"text": text}, Path("x"), 1)).messages
    assert [m["content"] for m in messages] == ["a", "b", "c", "d"]
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert [m["content"] for m in first(Row({"text": text}, Path("x"), 1)).messages] == ["a"]


@pytest.mark.parametrize(
    ("text", "read_as"),
    [
        ("once</s>", "once"), ("<s>once</s>", "once"), ("once<|endoftext|>\n", "once"),
        ("now <s>10</s>", "now <s>10</s>"), ("a > b", "a > b"), ("a <b>", "a <b>"),
    ],
)  # fmt: skip
def test_the_end_token_of_a_text_is_not_learned_as_letters(text: str, read_as: str) -> None:
    assert first(Row({"text": text}, Path("x"), 1)).text == read_as


def test_a_tree_is_a_conversation_for_each_leaf() -> None:
    examples = list(RowReader().examples(Row(TREE, Path("x"), 1)))
    said = [
        [(m["content"], m.get("learn", True)) for m in e.messages if m["role"] == "assistant"]
        for e in examples
    ]
    assert said == [
        [("ten metres", True), ("a hundred years", True)],
        [("as high as a house", True)],
    ]
    with pytest.raises(InputError, match="one turn of a conversation"):
        first(Row({"role": "prompter", "text": "a", "parent_id": "x"}, Path("x"), 1))


def test_answers_that_replies_share_are_learned_once() -> None:
    leaf = {"role": "assistant", "replies": []}
    asks = [{"role": "prompter", "text": x, "replies": [{**leaf, "text": x * 2}]} for x in "bc"]
    tree = {"role": "prompter", "text": "q", "replies": [
        {"role": "assistant", "text": "a", "replies": asks}]}  # fmt: skip
    examples = list(RowReader().examples(Row({"prompt": tree}, Path("x"), 1)))
    said = [[(m["content"], m.get("learn", True)) for m in e.messages] for e in examples]
    assert said == [
        [("q", True), ("a", True), ("b", True), ("bb", True)],
        [("q", True), ("a", False), ("c", True), ("cc", True)],
    ]


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"input_ids": [5, 6, 7]}, [1, 1, 1]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [0, 1, 1]),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, [0, 0, 1]),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "assistant_masks": [1, 1, 0]}, [0, 1, 0]),
        ({"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "position_ids": [0, 1, 2]}, [1, 1]),
    ],
)
def test_rows_that_are_tokens(row: dict[str, Any], trained: list[int]) -> None:
    tokens = first(Row(row, Path("x"), 1)).tokens
    assert tokens is not None
    assert list(tokens.trained) == trained
    assert tokens.ids.tolist() == row["input_ids"][: len(trained)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"input_ids": [5, 6], "labels": [6, -100]}, "labels are not those"),
        ({"input_ids": [5, 6], "labels": [5]}, "not as long"),
        ({"input_ids": [5, 6], "mask": [0, 2]}, "neither 0 nor 1"),
        ({"input_ids": [5, 6], "attention_mask": [0, 1]}, "holes"),
        ({"input_ids": [5, "6"]}, "list of ids"),
        ({"input_ids": [1 << 40]}, "no token ids"),
        ({"input_ids": [5], "images": ["x"]}, "'images' would be lost"),
    ],
)
def test_tokens_that_cannot_be_meant(row: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        first(Row(row, Path("x"), 1))


def test_documents_are_learned_in_parts_with_one_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "tiny.gguf", Spec()).path
    path = tmp_path / "book.md"
    path.write_text("".join(f"# Part {n}\n\n" + "a b c. " * 300 + "\n\n" for n in range(4)))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}\n')
    arguments = ["prepare", "-m", str(model), "-d", str(path), "-d", str(rows), "--preview", "9"]
    assert run(cli, [*arguments, "--val-split", "0", "--max-length", "100000"]) == 0
    out = capsys.readouterr().out
    assert out.count("<|im_end|>") == 2  # in the line of the template, too
    assert "rows.jsonl:1 · 3 tokens, 2 trained" in out
    rows.write_text('{"input_ids": [5, 999999]}\n')
    assert run(cli, arguments) == 2
    assert "rows.jsonl:1: input_ids are not of this model's vocabulary" in capsys.readouterr().err


def test_turns_of_trees_in_rows_are_joined(tmp_path: Path) -> None:
    def turn(name: str, parent: str | None, role: str, **more: Any) -> dict[str, Any]:
        return {"message_id": name, "parent_id": parent, "role": role, "text": f"t-{name}", **more}

    rows = [
        turn("b", "a", "assistant", rank=1, lang="en"),
        turn("a", None, "prompter"),
        turn("c", "a", "assistant", rank=0),
        turn("d", "c", "prompter"),
        turn("e", "d", "assistant"),
        turn("f", "nowhere", "assistant"),
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = RowReader()
    examples = list(reader.read(path))
    assert [[m["content"] for m in e.messages] for e in examples] == [
        ["t-a", "t-c", "t-d", "t-e"], ["t-a", "t-b"],
    ]  # fmt: skip
    assert examples[0].line == 2
    (note,) = reader.notes()
    assert "lang (1 rows), turns whose parent is not in the file (1 rows)" in note


def test_text_of_the_models_own_template_has_its_tokens(smollm2: Path) -> None:
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nAsk<|im_end|>\n"
        "<|im_start|>assistant\nAda does.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\nStill Ada.<|im_end|>\n"
    )
    _, template = open_vocabulary(smollm2)
    tokens = template.encode_example(first(Row({"text": text}, Path("x"), 1)).messages)
    expected = template.tokenizer.encode(text.removesuffix("\n"), special=True)
    assert tokens.ids.tolist() == expected
    learned = [i for i, trained in zip(tokens.ids, tokens.trained, strict=True) if trained]
    assert template.tokenizer.decode(learned) == b"Ada does.<|im_end|>Still Ada.<|im_end|>"
