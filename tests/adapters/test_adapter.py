from __future__ import annotations

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import AdapterMeta, read_adapter, write_adapter
from ggft.gguf.read import GGUFFile, read_gguf
from ggft.llama.model import LlamaModel
from ggft.system.errors import InputError, NumericError
from tests.support.models import Spec, Tensor, write_gguf, write_model

R = 4
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return read_gguf(write_model(tmp_path_factory.mktemp("base") / "base.gguf", Spec()).path)


def arrays_for(base: GGUFFile, names: tuple[str, ...] = ("attn_q", "ffn_down")) -> Arrays:
    rng = np.random.default_rng(3)
    arrays: Arrays = {}
    for name in names:
        c_in, c_out = base.tensors[f"blk.0.{name}.weight"].shape
        arrays[f"blk.0.{name}.weight.lora_a"] = rng.normal(size=(R, c_in)).astype(np.float32)
        arrays[f"blk.0.{name}.weight.lora_b"] = rng.normal(size=(c_out, R)).astype(np.float32)
    return arrays


def meta_for(base: GGUFFile, **changes: Any) -> AdapterMeta:
    values: dict[str, Any] = {
        "architecture": "llama",
        "rank": R,
        "alpha": 8.0,
        "dropout": 0.1,
        "base_sha256": base.sha256(),
        "base_name": "tiny",
        "template": "chatml",
        "template_sha256": "ab" * 32,
    }
    return AdapterMeta(**{**values, **changes})


def write(path: Path, arrays: Arrays, meta: AdapterMeta) -> Path:
    shapes = {name: (array.shape[0], array.shape[1]) for name, array in arrays.items()}
    write_adapter(path, shapes, arrays.__getitem__, meta)
    return path


ALPHA = "adapter.lora.alpha"
METADATA = {
    "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora",
    ALPHA: 8.0,
}  # fmt: skip


def write_raw(path: Path, arrays: Arrays, metadata: dict[str, Any]) -> Path:
    """Write what `write_adapter` would refuse to."""
    tensors = [Tensor(name, "F32", array.shape, array.tobytes()) for name, array in arrays.items()]
    write_gguf(path, {k: v for k, v in metadata.items() if v is not None}, tensors)
    return path


def test_what_is_written_is_read(base: GGUFFile, tmp_path: Path) -> None:
    arrays, meta = arrays_for(base), meta_for(base)
    adapter = read_adapter(write(tmp_path / "a.gguf", arrays, meta), base)
    assert adapter.meta == AdapterMeta(**{**meta.__dict__, "dropout": pytest.approx(0.1)})
    assert set(adapter.base_names) == {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    got = adapter.arrays()
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array)


def test_llama_cpp_applies_it_as_the_formula_says(base: GGUFFile, tmp_path: Path) -> None:
    """Merging alpha / R * B @ A into the base by hand gives the logits that the adapter gives."""
    arrays = arrays_for(base)
    path = write(tmp_path / "a.gguf", arrays, meta_for(base))
    tiny = write_model(tmp_path / "base.gguf", Spec())
    for name in ("attn_q", "ffn_down"):
        full = f"blk.0.{name}.weight"
        delta = arrays[f"{full}.lora_b"] @ arrays[f"{full}.lora_a"]
        tiny.weights[full] += 8.0 / R * delta
    tokens = []
    file = read_gguf(tiny.path)
    for name, values in tiny.weights.items():
        data = values.astype(np.float32).tobytes()
        tokens.append(Tensor(name, "F32", values.shape, data))
    merged = tmp_path / "merged.gguf"
    metadata = {
        k: v if isinstance(v, int | float | str) else list(v) for k, v in file.metadata.items()
    }
    write_gguf(merged, metadata, tokens)
    ids = [5, 100, 42, 7, 200]
    with LlamaModel(tiny.path, path) as with_adapter, LlamaModel(merged) as with_merge:
        got, want = with_adapter.logits(ids), with_merge.logits(ids)
    with LlamaModel(tiny.path) as plain:
        assert np.abs(plain.logits(ids) - want).max() > 0.1
    # llama.cpp's F32 products on the CPU differ in the order of summation only.
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def bad_arrays(base: GGUFFile, case: str) -> Arrays:
    arrays = arrays_for(base)
    a, b = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
    if case == "no counterpart":
        del arrays[b]
    elif case == "rank":
        arrays[b] = arrays[b][:, :2].copy()
    elif case == "input width":
        arrays[a] = arrays[a][:, :32].copy()
    elif case == "output width":
        arrays[b] = arrays[b][:32].copy()
    elif case == "unknown base tensor":
        arrays["blk.9.attn_q.weight.lora_a"] = arrays[a]
        arrays["blk.9.attn_q.weight.lora_b"] = arrays[b]
    elif case == "stray":
        arrays["blk.0.attn_q.weight"] = arrays[a]
    elif case == "nan":
        arrays[b][1, 2] = math.nan
    elif case == "inf":
        arrays[a][0, 0] = math.inf
    elif case == "empty":
        arrays.clear()
    return arrays


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("no counterpart", ["attn_q.weight.lora_a", "no counterpart", "at byte"]),
        ("rank", ["another rank", "4 and 2"]),
        ("input width", ["does not fit", "(32, 64)", "(64, 64)"]),
        ("output width", ["does not fit", "(64, 32)", "(64, 64)"]),
        ("unknown base tensor", ["blk.9.attn_q.weight", "lacks"]),
        ("stray", ["not part of a LoRA pair", ".lora_a"]),
        ("nan", ["lora_b", "nan at row 1, column 2"]),
        ("inf", ["lora_a", "inf at row 0, column 0"]),
        ("empty", ["no matrices"]),
    ],
)
def test_bad_matrices(base: GGUFFile, tmp_path: Path, case: str, parts: list[str]) -> None:
    path = write_raw(tmp_path / "a.gguf", bad_arrays(base, case), METADATA)
    with pytest.raises(InputError) as caught:
        read_adapter(path, base)
    for part in ["a.gguf", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"general.type": "model"}, ["not a LoRA adapter", "'model'"]),
        ({"adapter.type": "control"}, ["not a LoRA adapter", "'control'"]),
        ({ALPHA: None}, ["alpha is missing", "factor 1", "4.0", "ggft convert"]),
        ({ALPHA: 0.0}, ["alpha is 0", "factor 1", "gguf-set-metadata", "alpha 4"]),
        ({ALPHA: math.nan}, ["alpha is not usable", "nan"]),
        ({ALPHA: -1.0}, ["alpha is not usable", "above 0"]),
        ({ALPHA: "8"}, ["wrong type", "STRING", "FLOAT32", "at byte"]),
        ({ALPHA: 8}, ["wrong type", "FLOAT32"]),
        ({ALPHA: np.float64(8)}, ["wrong type", "FLOAT64"]),
        ({"general.architecture": "gemma"}, ["another architecture", "gemma", "llama"]),
        ({"ggft.base_sha256": "00" * 32}, ["another base model", "0000", "--model"]),
        ({"ggft.rank": 0}, ["rank"]),
    ],
)
def test_bad_metadata(
    base: GGUFFile, tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    path = write_raw(tmp_path / "a.gguf", arrays_for(base), {**METADATA, **changes})
    with pytest.raises(InputError) as caught:
        read_adapter(path, base)
    for part in ["a.gguf", *parts]:
        assert part in str(caught.value)


def test_three_dimensions_are_refused(base: GGUFFile, tmp_path: Path) -> None:
    zeros = np.zeros((2, R, 64), np.float32).tobytes()
    a = Tensor("blk.0.attn_q.weight.lora_a", "F32", (2, R, 64), zeros)
    b = Tensor("blk.0.attn_q.weight.lora_b", "F32", (2, 64, R), zeros)
    write_gguf(tmp_path / "a.gguf", METADATA, [a, b])
    with pytest.raises(InputError, match="not a matrix"):
        read_adapter(tmp_path / "a.gguf", base)


def test_another_base_may_be_accepted_on_request(base: GGUFFile, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", arrays_for(base), meta_for(base, base_sha256="00" * 32))
    assert read_adapter(path, base, check_hash=False).meta.rank == R


def test_a_pickle_is_named_and_not_loaded(tmp_path: Path) -> None:
    import pickle

    path = tmp_path / "adapter_model.bin"
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="pickle"):
        read_adapter(path)


@pytest.mark.parametrize("case", ["nan", "inf"])
def test_what_is_not_finite_is_not_written(base: GGUFFile, tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "a.gguf", arrays_for(base), meta_for(base))
    before = path.read_bytes()
    with pytest.raises(NumericError, match=r"attn_q\.weight\.lora_.*not finite"):
        write(path, bad_arrays(base, case), meta_for(base))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_remedy_for_alpha_0_works(base: GGUFFile, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "it's a.gguf", arrays_for(base), {**METADATA, ALPHA: 0.0})
    with pytest.raises(InputError) as caught:
        read_adapter(path, base)
    (command,) = re.findall(r"gguf-set-metadata (.*)$", str(caught.value))
    script = Path(sys.executable).with_name("gguf-set-metadata")
    subprocess.run([script, *shlex.split(command)], check=True, capture_output=True)
    assert read_adapter(path, base).meta.alpha == R


def test_no_memory_of_a_failed_write(base: GGUFFile, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", arrays_for(base), meta_for(base))
    before = path.read_bytes()

    def fail(name: str) -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        write_adapter(path, {"x.lora_a": (1, 1)}, fail, meta_for(base))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(InputError, match="safetensors"):
        read_adapter(path)
