"""`ggft info`: what a file is and what can be done with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.gguf.description import render, to_json
from ggft.gguf.read import Value
from ggft.gguf.write import write_gguf
from ggft.recipes.info import describe, info
from ggft.settings.commands import InfoConfig
from ggft.system.errors import InputError
from tests.gguf.test_read import write_shards
from tests.support.legacy_files import place
from tests.support.models import CHATML, Spec, write_model
from tests.support.raw_gguf import model, numbers, strings, text, u32


def ability(path: Path, command: str) -> tuple[bool, str]:
    found = next(a for a in describe(path).abilities if a.command == command)
    return found.possible, found.note


def test_a_model(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", Spec(types="Q4_1", chat_template=CHATML)).path
    shown = info(path, InfoConfig())
    for expected in (
        "model, GGUF v3",
        "llama",
        "blocks           2",
        "Q4_1",
        "can train?       yes",
    ):
        assert expected in shown
    record = json.loads(info(path, InfoConfig(json=True, tensors=True, keys=True)))
    assert record["can"]["train"]["possible"]
    assert record["has_chat_template"]
    assert record["n_vocab"] == len(record["keys"]["tokenizer.ggml.tokens"])
    assert sum(t["n_bytes"] for t in record["tensors"]) == sum(
        t["n_bytes"] for t in record["types"]
    )
    assert len(info(path, InfoConfig(tensors=True)).splitlines()) > len(record["tensors"])
    assert "tokenizer.chat_template" in info(path, InfoConfig(keys=True))


def test_shards(tmp_path: Path) -> None:
    description = describe(write_shards(tmp_path)[2])
    assert description.values["n_shards"] == 3
    assert len({row.file for row in description.tensors}) == 3


def test_a_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "vocab.gguf"
    metadata: dict[str, Value] = {
        "general.architecture": "gemma",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
    }
    write_gguf(path, metadata, [])
    assert describe(path).kind == "vocabulary"
    possible, why = ability(path, "train")
    assert not possible
    assert "a vocabulary without a model" in why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"general__architecture": text("general.architecture", "mamba")}, "mamba"),
        ({"llama__block_count": u32("llama.block_count", 2)}, "blk.1"),
        ({"tensors": {"blk.0.ffn_gate_exps.weight": ((8, 16, 4), 0)}}, "mixture-of-experts"),
    ],
)
def test_why_a_model_cannot_be_trained(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model(**changes).bytes())
    possible, note = ability(path, "train")
    assert not possible
    assert why in note


def test_an_adapter(tmp_path: Path) -> None:
    import numpy as np

    from ggft.adapters.adapter import AdapterMeta, write_adapter

    base = "blk.0.attn_q.weight"
    shapes = {f"{base}.lora_a": (4, 64), f"{base}.lora_b": (64, 4)}
    path = tmp_path / "adapter.gguf"
    meta = AdapterMeta(architecture="llama", rank=4, alpha=8.0, template="chatml", base_sha256="ab")
    write_adapter(path, shapes, lambda name: np.ones(shapes[name], np.float32), meta)
    shown = info(path, InfoConfig())
    for expected in ("adapter", "rank             4", "alpha            8", "attn_q (1)", "chatml"):
        assert expected in shown
    assert ability(path, "chat")[0]
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    assert not ability(path, "chat")[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ggml_q4_1_planar", ["ggml,", "Q4_1 (planar", "no scores"]),
        ("ggmf_v1_q4_0_2part", ["ggmf v1", "parts            2"]),
        ("ggjt_v3_qkk64_q2_k", ["ggjt v3", "64-element blocks", "warning"]),
    ],
)
def test_old_files(tmp_path: Path, name: str, expected: list[str]) -> None:
    description = describe(place(tmp_path, name))
    shown = render(description, tensors=True)
    for part in [*expected, "can convert?     yes", "layers.0.attention.wq.weight"]:
        assert part in shown
    assert json.loads(to_json(description))["kind"] == "old GGML model"


def test_nothing_from_the_file_reaches_the_terminal_raw(tmp_path: Path) -> None:
    """Fault 83: escape sequences, line breaks and broken UTF-8 are shown, not obeyed."""
    evil = b"\x1b]0;owned\x07\x1b[2J\n\r\x9b31m\xff\xe2\x80\xae"
    path = tmp_path / "m.gguf"
    raw = model(
        general__name=text("general.name", evil),
        general__architecture=text("general.architecture", evil),
        general__type=text("general.type", evil),
        tokenizer__chat_template=text("tokenizer.chat_template", evil * 100),
    )
    raw.kvs.append(strings("evil", ["\x1b[31m\u202e"]))
    raw.kvs.append(numbers("reals", 6, "f", [float("nan"), float("inf")]))
    path.write_bytes(raw.bytes())
    config = InfoConfig(keys=True, tensors=True)
    shown = info(path, config)
    as_json = info(path, InfoConfig(json=True, keys=True, tensors=True))
    for output in (shown, as_json):
        assert all(character == "\n" or character.isprintable() for character in output)
        output.encode("utf-8")
    json.loads(as_json)


def test_check_reads_the_data(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", Spec(types="Q8_0")).path
    info(path, InfoConfig(check=True))
    row = next(t for t in describe(path).tensors if t.name == "blk.1.ffn_up.weight")
    damaged = bytearray(path.read_bytes())
    at = row.offset + 3 * 34
    damaged[at : at + 2] = b"\x00\x7c"
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"'blk.1.ffn_up.weight', block 3") as caught:
        info(path, InfoConfig(check=True))
    assert caught.value.offset == at


@pytest.mark.parametrize("arguments", [["info"], ["convert"], ["convert", "none.bin"]])
def test_missing_arguments(arguments: list[str]) -> None:
    assert run(cli, arguments) == 2


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = place(tmp_path, "ggjt_v3_q4_0")
    new = tmp_path / "new.gguf"
    assert run(cli, ["convert", str(old), str(new), "--context", "512"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert run(cli, ["info", str(new), "--tensors"]) == 0
    output = capsys.readouterr().out
    assert "context          512" in output
    assert "blk.1.ffn_down.weight" in output
    assert run(cli, ["info", str(tmp_path)]) == 2
    assert "a folder" in capsys.readouterr().err
