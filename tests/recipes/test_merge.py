"""`ggft merge`: the base's own types and size, fitted to rows, and nothing else touched."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ggft.cli import cli
from ggft.command import run
from ggft.engine.quants import dequantize_rows, quantize_rows
from ggft.gguf.read import GGMLType, dequantize, read_array, read_gguf
from ggft.setup.calibration import MAX_TOKENS, Rows, row_batches, rows_of_run
from ggft.setup.inputs import open_model
from tests.support.adapters import random_adapter
from tests.support.engines import open_engine
from tests.support.models import Tiny, spec_for, write_model
from tests.support.reference import Array


def write_rows(path: Path) -> Path:
    words = ["the", "rain", "in", "spain", "there", "were", "others", "who", "told", "her", "so"]
    rows = [
        {"instruction": f"{a} {b}?", "input": "", "output": f"{b} {a} {a}."}
        for a in words[:6]
        for b in words[6:]
    ]
    path.write_text(json.dumps(rows))
    return path


def merged(folder: Path, tiny: Tiny, *flags: str) -> Path:
    out = folder / "out.gguf"
    assert run(cli, ["merge", str(tiny.path), str(folder / "a.gguf"), str(out), *flags]) == 0
    return out


def logits(path: Path, tiny: Tiny, rows: Path) -> Array:
    """Return a model's logits on the rows that the merge was fitted to."""
    batch = row_batches(open_model(tiny.path), Rows((str(rows),)), MAX_TOKENS)[0]
    model = Tiny(path, tiny.spec, tiny.shape, tiny.weights)
    n_tokens = batch["tokens"].shape[1]
    with open_engine(model, rank=1, n_rows=1, n_tokens=n_tokens) as engine:
        values: Array = engine.logits(batch).astype(np.float64)
    return values[batch["segments"] >= 0]


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q8_0", "IQ4_NL", "Q4_K", "Q6_K"])
def test_the_merged_file_keeps_the_size_and_follows_the_adapter(
    tmp_path: Path, type_name: str
) -> None:
    types = {"*": type_name, "token_embd": "Q8_0", "output": "Q8_0"}
    tiny = write_model(tmp_path / "m.gguf", spec_for(type_name, n_head=4, types=types))
    loras = random_adapter(tmp_path / "a.gguf", tiny, size=0.05)
    rows = write_rows(tmp_path / "rows.json")
    out = merged(tmp_path, tiny, "-d", str(rows))
    old, new = read_gguf(tiny.path), read_gguf(out)
    assert abs(out.stat().st_size - tiny.path.stat().st_size) < 4096  # the metadata differ
    for name, tensor in old.tensors.items():
        assert new.tensors[name].type is tensor.type
        if name not in loras:
            assert (read_array(tensor) == read_array(new.tensors[name])).all()
    wanted = write_model(tmp_path / "wanted.gguf", tiny.spec)
    plain = write_model(tmp_path / "plain.gguf", tiny.spec)
    put(wanted, old, loras, None)
    put(plain, old, loras, GGMLType[type_name])
    expected = logits(wanted.path, tiny, rows)
    fitted_error = np.square(logits(out, tiny, rows) - expected).mean()
    plain_error = np.square(logits(plain.path, tiny, rows) - expected).mean()
    assert fitted_error < 0.6 * plain_error
    first = out.read_bytes()
    assert merged(tmp_path, tiny, "-d", str(rows), "--force").read_bytes() == first


def put(model: Tiny, base: object, loras: object, kind: GGMLType | None) -> None:
    """Write the base with the adapter added: exactly as F32, or rounded to a type."""
    from ggft.gguf.write import TensorSource, write_gguf

    sources = []
    for name, tensor in base.tensors.items():  # type: ignore[attr-defined]
        values, written = dequantize(tensor), tensor.type
        if name in loras:  # type: ignore[operator]
            lora = loras[name]  # type: ignore[index]
            values = (values + lora.scale * lora.b @ lora.a).astype(np.float32)
            if kind is not None:
                values = dequantize_rows(quantize_rows(values, kind), kind, values.shape[1])
            written = GGMLType.F32
        data = (
            np.ascontiguousarray(values, np.float32).view(np.uint8)
            if written is GGMLType.F32
            else read_array(tensor)
        )
        pieces: list[memoryview] = [data.reshape(-1).data]
        sources.append(TensorSource(name, written, tensor.shape, partial(list, pieces)))
    write_gguf(model.path, base.metadata, sources, types=base.types)  # type: ignore[attr-defined]


def test_without_rows_it_says_so_and_takes_general_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = write_model(tmp_path / "m.gguf", spec_for("Q4_0"))
    random_adapter(tmp_path / "a.gguf", tiny)
    merged(tmp_path, tiny)
    assert "no rows of the fine-tune (--data gives some)" in capsys.readouterr().err


def test_the_rows_of_the_run_are_found(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    assert rows_of_run(tmp_path / "adapter.gguf") == Rows()
    (tmp_path / "config.yaml").write_text(f"data:\n- {rows}\ncolumns: [frage=instruction]\n")
    assert rows_of_run(tmp_path / "adapter.gguf") == Rows(
        (str(rows),), columns=("frage=instruction",)
    )
    rows.unlink()
    assert rows_of_run(tmp_path / "adapter.gguf") == Rows()
