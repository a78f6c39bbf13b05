"""What model files and adapters say of themselves is data, whatever bytes it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggft.setup.inputs import open_model, open_with_adapter
from ggft.system.errors import InputError
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, write_model


def test_a_name_that_is_not_utf8_is_only_text(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", Spec()).path
    data = path.read_bytes()
    assert b"random" in data
    path.write_bytes(data.replace(b"random", b"ra\xff\x1bom"))
    model = open_model(path)
    assert model.name == "ra\ufffd\x1bom"
    model.name.encode()


def test_a_chat_template_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", Spec(chat_template=CHATML)).path
    data = path.read_bytes()
    path.write_bytes(data.replace(b"<|im_start|>' +", b"<|im_st\xffrt|>' +"))
    assert path.read_bytes() != data
    with pytest.raises(InputError, match="not UTF-8"):
        open_model(path)
    assert open_model(path, "chatml").template.name == "chatml"


def test_a_file_named_by_an_adapter_is_not_opened(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec())
    source = tmp_path / "mine.jinja"
    source.write_text(CHATML)
    random_adapter(tmp_path / "a.gguf", tiny, template=str(source))
    with pytest.raises(InputError, match="from a file") as caught:
        open_with_adapter(tiny.path, tmp_path / "a.gguf")
    assert "--template" in str(caught.value)
    model, _ = open_with_adapter(tiny.path, tmp_path / "a.gguf", str(source))
    assert model.template.source == CHATML
