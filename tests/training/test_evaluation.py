"""Training and evaluation on the real engine: what it learns, repeats, and agrees on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import AdapterMeta, read_adapter, write_adapter
from ggft.gguf.cursor import read_bytes
from ggft.gguf.read import read_gguf
from ggft.llama.model import LlamaModel
from ggft.recipes.evaluate import evaluate
from ggft.recipes.finetune import finetune
from ggft.settings.option import make
from ggft.settings.training import EvalConfig, FinetuneConfig
from ggft.setup.inputs import load_data, open_model
from ggft.system.errors import InputError
from ggft.system.progress import Progress
from tests.support.models import Spec, write_model

ROWS = [
    {"instruction": f"colour of {thing}?", "input": "", "output": colour}
    for thing, colour in [
        ("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red"),
        ("the sea", "blue"), ("a lemon", "yellow"), ("a plum", "purple"),
    ]
]  # fmt: skip


class Case:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "tiny.gguf", Spec()).path
        self.data = folder / "rows.json"
        self.data.write_text(json.dumps(ROWS))

    def train(self, output: str, **given: Any) -> Path:
        values = {
            "model": str(self.model), "data": [str(self.data)], "threads": 1, "val_split": 0,
            "output": str(self.folder / output), "lr": 3e-3, "dropout": 0.1, "save_steps": 5,
            "samples": 0, "ask": 0, "mix": "none", "vary": "none",
        }  # fmt: skip
        finetune(make(FinetuneConfig, {**values, **given}), Progress("quiet"))
        return self.folder / output

    def loss(self, adapter: Path | None, **given: Any) -> float:
        values = {"model": str(self.model), "data": [str(self.data)], "threads": 1}
        if adapter is not None:
            values["adapter"] = str(adapter)
        result = evaluate(make(EvalConfig, {**values, **given}), Progress("quiet"))
        return float(result["loss"])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def trained(case: Case) -> Path:
    return case.train("trained", epochs=30)


def test_seven_rows_are_learned(case: Case, trained: Path) -> None:
    before, after = case.loss(None), case.loss(trained / "adapter.gguf")
    assert before > 4
    assert after < before / 4


def test_the_loss_is_llama_cpps_loss(case: Case, trained: Path) -> None:
    """The adapter as llama.cpp applies it gives the loss that the engine evaluates."""
    base = open_model(case.model)
    data = load_data(base, case.data, max_length=512, val_split=0.0, keep_duplicates=True)
    for adapter in (None, trained / "adapter.gguf"):
        total, count = 0.0, 0
        with LlamaModel(case.model, adapter) as model:
            for index in range(len(data.train)):
                ids, mask = data.train.get(index)
                nats = model.nats(ids.tolist())
                total += float(nats[np.asarray(mask[1:])].sum())
                count += int(mask[1:].sum())
        # The bar of the adapter: half a percent, on the fast path.
        assert case.loss(adapter) == pytest.approx(total / count, rel=5e-3)
        assert case.loss(adapter, precision="f32") == pytest.approx(total / count, rel=2e-3)


def test_what_was_forgotten_is_measured_on_packaged_rows(case: Case, trained: Path) -> None:
    values = {"model": str(case.model), "threads": 1, "forgetting": True}
    adapter = str(trained / "adapter.gguf")
    found = evaluate(make(EvalConfig, {**values, "adapter": adapter}), Progress("quiet"))
    assert found["general_before"] > 1
    assert found["general_after"] != found["general_before"]
    assert found["ratio"] == found["general_after"] / found["general_before"]
    for wrong in ({}, {"adapter": adapter, "data": [str(case.data)]}):
        with pytest.raises(InputError, match="--forgetting"):
            evaluate(make(EvalConfig, {**values, **wrong}), Progress("quiet"))


def test_an_adapter_scaled_to_nothing_is_the_base(case: Case, trained: Path) -> None:
    adapter = trained / "adapter.gguf"
    base = case.loss(None)
    assert case.loss(adapter, adapter_scale=0.0) == pytest.approx(base, rel=1e-6)
    assert case.loss(adapter, adapter_scale=0.5) < base


def test_rslora_is_an_alpha_that_llama_cpp_reads(case: Case) -> None:
    """8 / sqrt(4) is 16 / 4: llama.cpp, which knows only alpha / rank, scales alike."""
    given = {"rank": 4, "epochs": 10}
    rslora = case.train("rslora", alpha=8, rslora=True, **given)
    plain = case.train("plain", alpha=16, **given)
    assert read_adapter(rslora / "adapter.gguf").meta.alpha == 16
    assert (rslora / "adapter.gguf").read_bytes() == (plain / "adapter.gguf").read_bytes()
    assert case.loss(rslora / "adapter.gguf") < case.loss(None)


def test_pairs_of_different_rank(case: Case, trained: Path, tmp_path: Path) -> None:
    """A pair that is split into two ranks in one file keeps its own factor alpha / rank."""
    arrays = read_adapter(trained / "adapter.gguf").arrays()
    names = [name for name in arrays if ".0.attn_q." in name or ".1.ffn_up." in name]
    some = {name: arrays[name] for name in names}
    for name in names:
        if "ffn_up" in name:
            some[name] = some[name][:2] if name.endswith("_a") else some[name][:, :2].copy()
    meta = AdapterMeta(architecture="llama", rank=8, alpha=32.0)
    shapes = {name: (array.shape[0], array.shape[1]) for name, array in some.items()}
    path = tmp_path / "mixed.gguf"
    write_adapter(path, shapes, some.__getitem__, meta)
    base = open_model(case.model)
    data = load_data(base, case.data, max_length=512, val_split=0.0, keep_duplicates=True)
    total, count = 0.0, 0
    with LlamaModel(case.model, path) as model:
        for index in range(len(data.train)):
            ids, mask = data.train.get(index)
            total += float(model.nats(ids.tolist())[np.asarray(mask[1:])].sum())
            count += int(mask[1:].sum())
    assert case.loss(path, precision="f32") == pytest.approx(total / count, rel=2e-3)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_s", "elapsed_s")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def test_a_run_is_repeatable_and_resumable_to_the_bit(case: Case, trained: Path) -> None:
    again = case.train("again", epochs=30)
    assert (again / "adapter.gguf").read_bytes() == (trained / "adapter.gguf").read_bytes()
    newest = max((again / "checkpoints").iterdir())
    shutil.rmtree(newest)
    (again / "adapter.gguf").unlink()
    case.train("again", epochs=30, resume=True)
    assert (again / "adapter.gguf").read_bytes() == (trained / "adapter.gguf").read_bytes()
    assert metrics(again) == metrics(trained)


def test_packing_and_micro_batches_do_not_change_the_course(case: Case) -> None:
    """Steps are the same examples; only the order of float32 sums differs."""
    runs = [
        case.train(name, epochs=3, precision="f32", dropout=0, lr=1e-3, **given)
        for name, given in (
            ("packed", {}),
            ("unpacked", {"packing": False}),
            ("kept", {"recompute": False}),
            ("recomputed", {"recompute": True}),
        )
    ]
    packed, unpacked, kept, recomputed = ([m["loss"] for m in metrics(run)] for run in runs)
    np.testing.assert_allclose(packed, unpacked, rtol=1e-4)
    assert kept == recomputed


def test_held_out_rows_choose_the_best_adapter(case: Case) -> None:
    run = case.train("held", epochs=40, val_split=0.3, patience=3, lr=1e-2)
    evaluations = [m for m in metrics(run) if "val_loss" in m]
    losses = [m["val_loss"] for m in evaluations[1:]]
    report = json.loads((run / "report.json").read_text())
    assert report["losses"]["val_best"] == min(losses)
    # Stopped by patience: three evaluations after the best one.
    assert len(losses) == losses.index(min(losses)) + 1 + 3
    state = report["state"]
    assert state["best_step"] == evaluations[1 + losses.index(min(losses))]["step"]
    assert "no better held-out loss" in state["ended"]
    assert read_adapter(run / "adapter.gguf", read_gguf(case.model)).meta.rank == 8


def test_some_linears_of_some_blocks(case: Case) -> None:
    run = case.train("some", epochs=30, target_modules="q_proj,v_proj", layers="1-1")
    adapter = read_adapter(run / "adapter.gguf", read_gguf(case.model))
    assert set(adapter.base_names) == {"blk.1.attn_q.weight", "blk.1.attn_v.weight"}
    assert case.loss(adapter.path) < case.loss(None)
    with LlamaModel(case.model, adapter.path) as tuned, LlamaModel(case.model) as plain:
        assert not np.allclose(tuned.nats([5, 6, 7, 8]), plain.nats([5, 6, 7, 8]))


def test_the_model_is_read_once(case: Case, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are checked and its SHA-256 is taken on one reading of the file."""
    n_read = 0

    def counted(path: Path, offset: int, n_bytes: int, what: str) -> Any:
        nonlocal n_read
        n_read += n_bytes * (path == case.model)
        return read_bytes(path, offset, n_bytes, what)

    def hashed(paths: Iterable[Path]) -> str:
        raise AssertionError(f"read once more: {list(paths)}")

    for module in ("finite", "read"):
        monkeypatch.setattr(f"ggft.gguf.{module}.read_bytes", counted)
    monkeypatch.setattr("ggft.gguf.types.sha256_of", hashed)
    monkeypatch.setattr("ggft.gguf.finite._sound", {})  # as in a new process
    case.loss(trained / "adapter.gguf")
    assert n_read == case.model.stat().st_size


def test_another_template_than_the_adapters_is_a_warning(
    case: Case, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"model": str(case.model), "data": [str(case.data)], "threads": 1}
    config = make(
        EvalConfig, {**values, "adapter": str(trained / "adapter.gguf"), "template": "chatml"}
    )
    evaluate(config)
    assert "warning: the adapter was trained with another template" in capsys.readouterr().err


def test_an_adapter_of_another_template_is_refused(case: Case, trained: Path) -> None:
    arrays = read_adapter(trained / "adapter.gguf")
    meta = AdapterMeta(
        architecture="llama", rank=8, alpha=32.0, template="instruction",
        template_sha256="00" * 32,
    )  # fmt: skip
    path = case.folder / "other.gguf"
    values = arrays.arrays()
    shapes = {name: (array.shape[0], array.shape[1]) for name, array in values.items()}
    write_adapter(path, shapes, values.__getitem__, meta)
    with pytest.raises(InputError, match="not the one"):
        case.loss(path)
    assert case.loss(path, template="instruction") > 0
