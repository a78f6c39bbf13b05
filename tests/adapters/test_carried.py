"""The template goes with the adapter, and with the file that it is merged into.

What other programs render is what was trained: answers are those of llama-cpp-python.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from ggft.adapters.adapter import read_adapter
from ggft.adapters.base import base_record
from ggft.adapters.merge import merge
from ggft.gguf.read import read_gguf
from ggft.llama.model import LlamaModel
from ggft.prompts.builtin import BUILTIN, INSTRUCTION, asked_for, with_arguments
from ggft.prompts.messages import Message
from ggft.settings.commands import MergeConfig
from ggft.setup.inputs import open_model, open_with_adapter
from ggft.system.errors import InputError
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, Tiny, write_model

OWN = "{% if loud %}LOUD {% endif %}" + CHATML.replace("<|im_start|>' +", "<|im_start|>a ' +")
QUESTION: list[Message] = [{"role": "user", "content": "the hen is in"}]
# (what it is called, itself, its arguments)
CASES = [
    ("instruction", INSTRUCTION, {}),
    ("alpaca", BUILTIN["alpaca"], {}),
    ("chatml", BUILTIN["chatml"], {}),
    ("/gone/mine.jinja", OWN, {}),
    ("gguf", CHATML, {}),
    ("/gone/mine.jinja", OWN, {"loud": True}),
]


def trained(folder: Path, name: str, source: str, arguments: dict[str, Any]) -> Tiny:
    """Write a model and an adapter that was trained on it with a template."""
    tiny = write_model(folder / "m.gguf", Spec(types="F32", vocab="bpe", chat_template=CHATML))
    random_adapter(
        folder / "a.gguf", tiny, template=name, template_source=source,
        template_sha256=hashlib.sha256(source.encode()).hexdigest(),
        template_arguments=json.dumps(arguments),
    )  # fmt: skip
    return tiny


@pytest.mark.parametrize(("name", "source", "arguments"), CASES)
def test_a_merged_file_answers_alike_in_other_programs(
    tmp_path: Path, name: str, source: str, arguments: dict[str, Any]
) -> None:
    tiny = trained(tmp_path, name, source, arguments)
    with_adapter = open_with_adapter(tiny.path, tmp_path / "a.gguf")[0].template
    prompt = with_adapter.encode_prompt(QUESTION)
    out = tmp_path / "out.gguf"
    merge(tiny.path, tmp_path / "a.gguf", out, MergeConfig())
    assert open_model(out).template.encode_prompt(QUESTION) == prompt
    with LlamaModel(out, n_ctx=256, device="cpu") as model:
        words = model.vocabulary
        ids = list(model.generate(prompt, max_tokens=24, temperature=0))
        said = [words.piece(i) for i in ids if not words.is_control(i)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = llama_cpp.Llama(str(out), n_ctx=256, verbose=False, n_gpu_layers=0)
        asked: Any = QUESTION
        reply: Any = other.create_chat_completion(
            asked,
            temperature=0,
            max_tokens=24,
            repeat_penalty=1.0,
        )
        other.close()
    # Random models write bytes that are no characters; both leave these out.
    assert reply["choices"][0]["message"]["content"] == b"".join(said).decode("utf-8", "ignore")
    assert ids


def test_arguments_are_given_again_and_others_are_told(tmp_path: Path) -> None:
    tiny = trained(tmp_path, "/gone/mine.jinja", OWN, {"loud": True})
    told: list[str] = []
    asked = asked_for("auto", ["loud=false"])
    for choice, loud in (("auto", True), (asked, False)):
        template = open_with_adapter(tiny.path, tmp_path / "a.gguf", choice, warn=told.append)[0]
        text = template.template.prompt_parts(QUESTION)[0].text
        assert text.startswith("LOUD") is loud
    assert len(told) == 1
    assert "other template arguments" in told[0]


def test_arguments_are_json_or_text() -> None:
    asked = asked_for("auto", ["a=true", "b=high", "c=3", "d=null"])
    assert asked.arguments == {"a": True, "b": "high", "c": 3, "d": None}
    assert with_arguments("x", asked.arguments).startswith("{%- set a = true -%}\n")
    assert "{%- set d = none -%}" in with_arguments("x", asked.arguments)
    for bad in (["messages=1"], ["a"], ["a=1", "a=2"], ["a b=1"]):
        with pytest.raises(InputError, match="--template-arg"):
            asked_for("auto", bad)


def test_a_llama_2_chat_model_without_a_template(tmp_path: Path) -> None:
    names = {"general.name": "llama-2-7b-chat"}
    template = open_model(write_model(tmp_path / "m.gguf", Spec(extra=names)).path).template
    assert template.name == "llama2"
    assert any("llama2 is used" in note for note in template.notes)


def test_an_adapter_on_another_quantization(tmp_path: Path) -> None:
    """The same weights in another type: a note. Other weights: refused."""
    one = write_model(tmp_path / "one.gguf", Spec(types="Q8_0"))
    two = write_model(tmp_path / "two.gguf", Spec(types="Q4_1"))
    other = write_model(tmp_path / "other.gguf", Spec(types="Q4_1", seed=5))
    record: dict[str, Any] = {**base_record(read_gguf(one.path))}
    random_adapter(tmp_path / "a.gguf", one, **record)
    assert read_adapter(tmp_path / "a.gguf", read_gguf(one.path)).note is None
    note = read_adapter(tmp_path / "a.gguf", read_gguf(two.path)).note
    assert note is not None
    assert "another quantization" in note
    merge(two.path, tmp_path / "a.gguf", tmp_path / "merged.gguf", MergeConfig())
    for wrong in (other.path, tmp_path / "merged.gguf"):
        with pytest.raises(InputError, match="another base model"):
            read_adapter(tmp_path / "a.gguf", read_gguf(wrong))


def test_a_merged_file_says_what_types_it_holds(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec(types="Q4_0", extra={"general.file_type": 2}))
    random_adapter(tmp_path / "a.gguf", tiny)
    for type_name, number in (("base", 2), ("Q8_0", 7)):
        out = tmp_path / f"{type_name}.gguf"
        merge(tiny.path, tmp_path / "a.gguf", out, MergeConfig(type=type_name))
        assert read_gguf(out).get("general.file_type") == number
    assert np.isfinite(read_gguf(out).file_bytes)
