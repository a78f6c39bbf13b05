"""PEFT's form of an adapter: the same numbers under other names, in another order of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import AdapterMeta, read_adapter, write_adapter
from ggft.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, convert_peft, write_peft
from ggft.adapters.safetensors import read_safetensors, write_safetensors
from ggft.gguf.read import check_model, read_gguf
from ggft.system.errors import InputError
from tests.support.adapters import random_adapter
from tests.support.models import Spec, Tiny, write_model
from tests.support.reference import Array

PREFIX = "base_model.model.model."
META: dict[str, Any] = {
    "dropout": 0.1,
    "base_name": "tiny",
    "template": "chatml",
    "template_sha256": "ab" * 32,
}


def made(folder: Path, spec: Spec) -> tuple[Tiny, Path]:
    """Write a model, its adapter as GGUF, and as PEFT; return the model and PEFT's folder."""
    tiny = write_model(folder / "m.gguf", spec)
    base = read_gguf(tiny.path)
    meta = {**META, "base_sha256": base.sha256()}
    random_adapter(folder / "a.gguf", tiny, **meta)
    adapter = read_adapter(folder / "a.gguf")
    peft = folder / "peft"
    peft.mkdir()
    write_peft(peft, adapter, check_model(base))
    return tiny, peft


def hugging_face(weight: Array, heads: int) -> Array:
    """Return a weight of q or k as Hugging Face has it: halves where llama.cpp has pairs."""
    head = weight.reshape(heads, -1, weight.shape[1])
    return np.concatenate([head[:, 0::2], head[:, 1::2]], axis=1).reshape(weight.shape)


def test_there_and_back_is_bit_for_bit(tmp_path: Path) -> None:
    _, peft = made(tmp_path, Spec())
    back = tmp_path / "back.gguf"
    for source in (peft, peft / WEIGHTS_FILE):
        convert_peft(source, back, read_gguf(tmp_path / "m.gguf"))
        assert back.read_bytes() == (tmp_path / "a.gguf").read_bytes()


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (2, 1)])
def test_the_delta_is_that_of_hugging_face(tmp_path: Path, heads: tuple[int, int]) -> None:
    spec = Spec(n_head=heads[0], n_head_kv=heads[1])
    _, peft = made(tmp_path, spec)
    adapter = read_adapter(tmp_path / "a.gguf").arrays()
    tensors, _ = read_safetensors(peft / WEIGHTS_FILE)
    for block in range(spec.n_layer):
        for ours, theirs, n in (
            ("attn_q", "self_attn.q_proj", heads[0]),
            ("attn_k", "self_attn.k_proj", heads[1]),
            ("attn_v", "self_attn.v_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
        ):
            name = f"{PREFIX}layers.{block}.{theirs}"
            a, b = (tensors[f"{name}.lora_{side}.weight"].read() for side in "AB")
            full = f"blk.{block}.{ours}.weight"
            delta = adapter[f"{full}.lora_b"] @ adapter[f"{full}.lora_a"]
            want = hugging_face(delta.astype(float), n) if n else delta
            # The same products, rows in another order.
            np.testing.assert_allclose(b @ a, want, rtol=1e-5, atol=1e-7)


def test_qwen_keeps_its_rows(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec(arch="qwen2", qkv_bias=True))
    random_adapter(tmp_path / "llama.gguf", tiny)
    source = read_adapter(tmp_path / "llama.gguf")
    arrays = source.arrays()
    shapes = {name: (a.shape[0], a.shape[1]) for name, a in arrays.items()}
    meta = AdapterMeta(architecture="qwen2", rank=4, alpha=8.0)
    write_adapter(tmp_path / "a.gguf", shapes, arrays.__getitem__, meta)
    base = read_gguf(tiny.path)
    write_peft(tmp_path, read_adapter(tmp_path / "a.gguf", base), check_model(base))
    tensors, _ = read_safetensors(tmp_path / WEIGHTS_FILE)
    for block, ours, theirs in ((0, "attn_q", "q_proj"), (1, "attn_k", "k_proj")):
        got = tensors[f"{PREFIX}layers.{block}.self_attn.{theirs}.lora_B.weight"].read()
        np.testing.assert_array_equal(got, arrays[f"blk.{block}.{ours}.weight.lora_b"])


def write_part(folder: Path, names: list[str], **meta: Any) -> dict[str, Any]:
    """Export an adapter of some linears of a tiny model; return the configuration."""
    tiny = write_model(folder / "m.gguf", Spec(n_layer=3))
    random_adapter(folder / "a.gguf", tiny)
    arrays = read_adapter(folder / "a.gguf").arrays()
    kept = {n: a for n, a in arrays.items() if n.removeprefix("blk.").split(".weight")[0] in names}
    write_adapter(
        folder / "a.gguf", {n: (a.shape[0], a.shape[1]) for n, a in kept.items()},
        kept.__getitem__, AdapterMeta(architecture="llama", rank=4, alpha=meta.pop("alpha", 8.0)),
    )  # fmt: skip
    write_peft(folder, read_adapter(folder / "a.gguf"), check_model(read_gguf(tiny.path)))
    return dict(json.loads((folder / CONFIG_FILE).read_text()))


def test_the_configuration(tmp_path: Path) -> None:
    config = write_part(tmp_path, [f"{n}.{t}" for n in range(3) for t in ("attn_q", "ffn_up")])
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["base_model_name_or_path"] is None
    assert "layers_to_transform" not in config
    config = write_part(tmp_path, ["1.attn_q", "2.attn_q"], alpha=2.5)
    assert config["layers_to_transform"] == [1, 2]
    assert config["lora_alpha"] == 2.5
    config = write_part(tmp_path, ["1.attn_q", "2.ffn_up"])
    assert config["target_modules"] == ["layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]


Change = Callable[[dict[str, Any], dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "DoRA": (lambda c, t: c.update(use_dora=True), "DoRA cannot be converted"),
    "bias": (lambda c, t: c.update(bias="all"), "trained biases"),
    "saved": (lambda c, t: c.update(modules_to_save=["lm_head"]), "modules trained whole"),
    "ranks": (lambda c, t: c.update(rank_pattern={"q_proj": 2}), "ranks that differ"),
    "alphas": (lambda c, t: c.update(alpha_pattern={"q_proj": 2}), "alphas that differ"),
    "kind": (lambda c, t: c.update(peft_type="IA3"), "not a LoRA adapter"),
    "r": (lambda c, t: c.update(r=0), "r is not a rank"),
    "r as text": (lambda c, t: c.update(r="8"), "r is not a rank"),
    "other r": (lambda c, t: c.update(r=8), "does not fit the base and r"),
    "alpha": (lambda c, t: c.update(lora_alpha=float("nan")), "lora_alpha is not usable"),
    "large alpha": (lambda c, t: c.update(lora_alpha=1e300), "lora_alpha is not usable"),
    "dropout": (lambda c, t: c.update(lora_dropout=1e300), "lora_dropout is not a share"),
    "magnitude": (
        lambda c, t: t.update({"layers.0.self_attn.q_proj.lora_magnitude_vector": t.popitem()[1]}),
        "not a matrix of a LoRA",
    ),
    "half": (lambda c, t: t.popitem(), "has no counterpart"),
    "nothing": (lambda c, t: t.clear(), "holds no matrices"),
    "block": (
        lambda c, t: t.update({n.replace("layers.1.", "layers.7."): t.pop(n) for n in list(t)}),
        "the base lacks",
    ),
    "width": (
        lambda c, t: t.update({n: a[:, :3].copy() if "lora_A" in n else a for n, a in t.items()}),
        "does not fit the base",
    ),
    "NaN": (lambda c, t: next(iter(t.values())).fill(np.nan), "NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_converted(tmp_path: Path, case: str) -> None:
    _, peft = made(tmp_path, Spec())
    config = json.loads((peft / CONFIG_FILE).read_text())
    tensors = {n: t.read() for n, t in read_safetensors(peft / WEIGHTS_FILE)[0].items()}
    change, says = BAD[case]
    change(config, tensors)
    (peft / CONFIG_FILE).write_text(json.dumps(config))
    write_safetensors(peft / WEIGHTS_FILE, tensors, {})
    with pytest.raises(InputError, match=says):
        convert_peft(peft, tmp_path / "new.gguf", read_gguf(tmp_path / "m.gguf"))
    assert not [p for p in tmp_path.iterdir() if "new.gguf" in p.name]


def test_a_pickled_adapter_is_not_opened(tmp_path: Path) -> None:
    _, peft = made(tmp_path, Spec())
    (peft / WEIGHTS_FILE).rename(peft / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        convert_peft(peft, tmp_path / "new.gguf", read_gguf(tmp_path / "m.gguf"))


@pytest.mark.parametrize("name", ["m.gguf", "peft/adapter_model.safetensors"])
def test_an_input_is_never_the_output(tmp_path: Path, name: str) -> None:
    _, peft = made(tmp_path, Spec())
    before = (tmp_path / name).read_bytes()
    with pytest.raises(InputError, match="the output is the input"):
        convert_peft(peft, tmp_path / name, read_gguf(tmp_path / "m.gguf"))
    assert (tmp_path / name).read_bytes() == before


def test_rank_stabilized_lora(tmp_path: Path) -> None:
    _, peft = made(tmp_path, Spec())
    config = json.loads((peft / CONFIG_FILE).read_text())
    (peft / CONFIG_FILE).write_text(json.dumps({**config, "use_rslora": True}))
    meta = convert_peft(peft, tmp_path / "new.gguf", read_gguf(tmp_path / "m.gguf"))
    assert meta.alpha == pytest.approx(8.0 * 4**0.5)


def test_several_ranks(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "m.gguf", Spec())
    random_adapter(tmp_path / "a.gguf", tiny)
    arrays = read_adapter(tmp_path / "a.gguf").arrays()
    first, second = list(arrays)[:2]
    arrays[first], arrays[second] = arrays[first][:2], arrays[second][:, :2].copy()
    write_adapter(
        tmp_path / "a.gguf", {n: (a.shape[0], a.shape[1]) for n, a in arrays.items()},
        arrays.__getitem__, AdapterMeta(architecture="llama", rank=4, alpha=8.0),
    )  # fmt: skip
    with pytest.raises(InputError, match="several ranks"):
        write_peft(tmp_path, read_adapter(tmp_path / "a.gguf"), check_model(read_gguf(tiny.path)))
