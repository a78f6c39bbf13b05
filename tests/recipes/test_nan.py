"""A base with NaN in it is refused by every command that would use its values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ggft.adapters.merge import merge
from ggft.gguf import finite
from ggft.gguf.read import TensorInfo, read_gguf
from ggft.recipes.export import export
from ggft.recipes.quantize import quantize
from ggft.settings.commands import ExportConfig, GenerateConfig, QuantizeConfig
from ggft.setup.answers import Speaker
from ggft.setup.inputs import open_model
from ggft.system.errors import InputError
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, write_model

USES: dict[str, Callable[[str, str, str], object]] = {
    "generate, chat": lambda m, a, out: Speaker(GenerateConfig(model=m, context=256)),
    "with an adapter": lambda m, a, out: Speaker(GenerateConfig(model=m, adapter=a, context=256)),
    "merge": merge,
    "quantize": lambda m, a, out: quantize(m, out, "Q8_0", QuantizeConfig(requantize=True)),
    "export": lambda m, a, out: export(m, out, ExportConfig(to="ollama", adapter=a)),
    "finetune, eval": lambda m, a, out: open_model(m),
}


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_refused(tmp_path: Path, use: Callable[[str, str, str], object]) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec(chat_template=CHATML))
    tensor = next(t for t in read_gguf(tiny.path).tensors.values() if t.type.name == "F32")
    data = bytearray(tiny.path.read_bytes())
    data[tensor.offset : tensor.offset + 4] = b"\0\0\xc0\x7f"
    tiny.path.write_bytes(data)
    random_adapter(tmp_path / "a.gguf", tiny)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match="NaN or infinity"):
        use(str(tiny.path), str(tmp_path / "a.gguf"), str(tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "m.gguf", Spec()).path
    read: list[TensorInfo] = []
    monkeypatch.setattr(finite, "check_tensor_values", read.append)
    finite.check_values(read_gguf(path))
    n = len(read)
    assert n
    finite.check_values(read_gguf(path))
    assert len(read) == n
    write_model(path, Spec(n_layer=3))
    finite.check_values(read_gguf(path))
    assert len(read) > 2 * n
