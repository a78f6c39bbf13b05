from __future__ import annotations

import json
from pathlib import Path

import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.gguf.read import read_gguf
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.template import make_template
from tests.support import go_template as go
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, Tiny, write_model


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    tiny = write_model(tmp_path / "base model.gguf", Spec(chat_template=CHATML))
    template = make_template("alpaca", {}, LlamaTokenizer(tiny.path))
    random_adapter(
        tmp_path / "a.gguf", tiny, template="alpaca", template_sha256=template.source_hash
    )
    return tiny


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_for_ollama(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(tiny.path), str(out), "--to", "ollama", "--system", "Be brief."]
    assert run(cli, [*arguments, "--adapter", str(tmp_path / "a.gguf")]) == 0
    assert f"ollama create NAME -f {out}/Modelfile" in capsys.readouterr().out
    assert names(out) == ["Modelfile", "adapter.gguf"]
    assert (out / "adapter.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()
    said = go.read_modelfile((out / "Modelfile").read_text(encoding="utf-8"))
    assert said["FROM"] == [str(tiny.path)]
    assert said["ADAPTER"] == ["./adapter.gguf"]
    assert said["SYSTEM"] == ["Be brief."]
    assert 'stop "<|im_end|>"' in said["PARAMETER"]
    # The adapter's template, not the model's own.
    text = go.render(said["TEMPLATE"][0], [{"role": "user", "content": "Hi"}])
    assert text.endswith("### Instruction:\nHi\n\n### Response:\n")


def test_a_model_without_an_adapter_has_its_own_template(tiny: Tiny, tmp_path: Path) -> None:
    assert run(cli, ["export", str(tiny.path), str(tmp_path / "out"), "--to", "ollama"]) == 0
    said = go.read_modelfile((tmp_path / "out" / "Modelfile").read_text(encoding="utf-8"))
    assert "ADAPTER" not in said
    text = go.render(said["TEMPLATE"][0], [{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_merged_model_has_the_template_of_its_adapter(tiny: Tiny, tmp_path: Path) -> None:
    merged, out = tmp_path / "merged.gguf", tmp_path / "out"
    assert run(cli, ["merge", str(tiny.path), str(tmp_path / "a.gguf"), str(merged)]) == 0
    assert run(cli, ["export", str(merged), str(out), "--to", "ollama"]) == 0
    assert "### Response" in (out / "Modelfile").read_text(encoding="utf-8")


def test_a_folder_for_peft_and_back(tiny: Tiny, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back.gguf"
    adapter = str(tmp_path / "a.gguf")
    assert run(cli, ["export", str(tiny.path), str(out), "--to", "peft", "-a", adapter]) == 0
    assert names(out) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4
    assert run(cli, ["convert", str(out), str(back), "--base", str(tiny.path)]) == 0
    assert back.read_bytes() == (tmp_path / "a.gguf").read_bytes()
    assert read_gguf(back).get("ggft.template") == "alpaca"


WRONG = [
    (["export"], "Missing argument"),
    (["export", "{base}", "{out}"], "--to is required (expected ollama or peft)"),
    (["export", "{base}", "{out}", "--to", "x"], "ollama, peft"),
    (["export", "{base}", "{out}", "--to", "peft"], "there must be an adapter"),
    (["export", "{base}", "{full}", "--to", "ollama"], "the folder is not empty"),
    (["export", "{base}", "{base}", "--to", "ollama"], "the output is a file"),
    (["export", "{base}", "{out}/a/b", "--to", "ollama"], "mkdir -p"),
    (["export", "{base}", "{out}", "--to", "ollama", "--system", '"""'], "Modelfile"),
    (["export", "{adapter}", "{out}", "--to", "ollama"], "not a model"),
    (["export", "{base}", "{out}", "--to", "ollama", "-a", "{base}"], "not a LoRA adapter"),
    (["convert", "{peft}", "{out}"], "--base MODEL.gguf"),
    (["convert", "{base}", "{out}", "--base", "{base}"], "--base is for PEFT adapters"),
    (["generate", "hi", "-m", "{base}", "-a", "{peft}"], "ggft convert FOLDER"),
]


@pytest.mark.parametrize(("args", "says"), WRONG, ids=[" ".join(args) for args, _ in WRONG])
def test_wrong_input(
    args: list[str], says: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text("{}")
    places = {
        "base": tiny.path, "adapter": tmp_path / "a.gguf", "peft": peft, "full": tmp_path,
        "out": tmp_path / "out",
    }  # fmt: skip
    before = names(tmp_path)
    assert run(cli, [arg.format_map(places) for arg in args]) == 2
    assert says in capsys.readouterr().err
    assert names(tmp_path) == before


def test_an_older_export_is_replaced_when_asked_to(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "Modelfile").write_text("old")
    (out / "mine.txt").write_text("keep")
    arguments = ["export", str(tiny.path), str(out), "--to", "ollama", "--overwrite"]
    assert run(cli, [*arguments, "--system", '"""']) == 2
    assert (out / "Modelfile").read_text() == "old"
    assert run(cli, arguments) == 0
    assert names(out) == ["Modelfile", "mine.txt"]
    assert (out / "mine.txt").read_text() == "keep"


def test_an_adapter_may_be_where_it_goes(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (tmp_path / "a.gguf").rename(out / "adapter.gguf")
    arguments = ["export", str(tiny.path), str(out), "--to", "ollama", "--overwrite"]
    assert run(cli, [*arguments, "-a", str(out / "adapter.gguf")]) == 0
    assert names(out) == ["Modelfile", "adapter.gguf"]


def test_a_full_disk_leaves_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ["export", str(tiny.path), str(tmp_path / "out"), "--to", "ollama"]
    assert run(cli, [*arguments, "-a", str(tmp_path / "a.gguf")]) == 3
    assert not (tmp_path / "out").exists()
