"""The portable graph on a GPU backend of ggml: the same numbers as on the CPU, or it is wrong.

Runs on the first device that is not the CPU, or on the one that GGFT_TEST_DEVICE names; `make
test-gpu` brings Vulkan on the processor (lavapipe), so that this runs on any machine. Norms are
those of test_gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings
from ggft.recipes.finetune import finetune
from ggft.settings.option import make as make_config
from ggft.settings.training import FinetuneConfig
from ggft.system.progress import Progress
from tests.support.engines import (
    as_batch,
    gradient_errors,
    make_batch,
    open_engine,
    set_random_lora,
)
from tests.support.models import KINDS, Spec, Tiny, spec_for, write_model
from tests.support.reference import LINEARS

pytestmark = pytest.mark.gpu

BAR = 5e-3
"""A GPU's products may round their operands to half precision whatever is asked of them, as Metal's
and Vulkan's do: 2^-11 per factor, through two blocks and back."""

MODELS = {
    **KINDS,
    "mqa, tied, three layers": Spec(n_head_kv=1, n_layer=3, tied=True),
    "odd head count": Spec(n_embd=96, n_head=3, n_head_kv=1, n_ff=160),
    "k-quants": spec_for(
        "Q4_K",
        types={
            "attn_q": "Q2_K",
            "attn_k": "Q3_K",
            "attn_v": "Q6_K",
            "attn_output": "IQ4_XS",
            "ffn_gate": "Q4_K",
            "ffn_up": "Q5_K",
            "ffn_down": "Q6_K",
            "token_embd": "Q6_K",
        },
        tied=True,
    ),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Spec], Tiny]:
    return lambda spec: write_model(tmp_path / "tiny.gguf", spec)


@pytest.mark.parametrize("precision", ["f32", "fast"])
@pytest.mark.parametrize("model", MODELS)
def test_gradient(make: Callable[[Spec], Tiny], gpu: str, model: str, precision: str) -> None:
    tiny = make(MODELS[model])
    batch = make_batch(tiny.shape.n_vocab)
    with open_engine(tiny, device=gpu, precision=precision) as engine:
        lora = set_random_lora(engine)
        nats, count = engine.forward_backward(batch, 0)
        got = engine.get_all("grad")
        assert engine.info()["device"] == gpu
    want_nats, want = tiny.decoder(lora).gradients(as_batch(batch))
    assert count == (batch["targets"] >= 0).sum()
    assert nats == pytest.approx(want_nats, rel=BAR)
    errors = gradient_errors(got, want)
    assert max(errors.values()) <= BAR, errors


@pytest.mark.parametrize("keep", [False, True])
def test_every_node_runs_on_the_device(make: Callable[[Spec], Tiny], gpu: str, keep: bool) -> None:
    """The engine has one backend and no scheduler: what it does not support, it does not run."""
    with open_engine(make(MODELS["k-quants"]), device=gpu, keep=keep, dropout=0.1) as engine:
        report = engine.graph_report()
        assert engine.info()["kernels"] == "ggml"
    assert [node for node in report if not node["supported"]] == []
    assert not {node["family"] for node in report} & {"CUSTOM", "OUT_PROD"}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_recomputed_equals_kept(make: Callable[[Spec], Tiny], gpu: str, dropout: float) -> None:
    tiny, results = make(MODELS["mixed types"]), []
    for keep in (False, True):
        with open_engine(tiny, device=gpu, keep=keep, dropout=dropout) as engine:
            set_random_lora(engine)
            nats, _ = engine.forward_backward(make_batch(tiny.shape.n_vocab), 11)
            results.append((nats, engine.get_all("grad")))
    (nats, grads), (kept_nats, kept) = results
    assert nats == pytest.approx(kept_nats, rel=1e-5)
    assert max(gradient_errors(grads, kept).values()) <= 1e-4


def losses(tiny: Tiny, n_steps: int, **settings: Any) -> list[float]:
    """Return the mean loss of each step of a short training with dropout."""
    result = []
    with open_engine(tiny, kernels="ggml", dropout=0.1, weight_decay=0.01, **settings) as engine:
        engine.init_lora(seed=3)
        for step in range(n_steps):
            lengths, n_tokens = ((9, 6), (16,)), 16 + step % 2 * 8
            batch = make_batch(tiny.shape.n_vocab, lengths, n_tokens, seed=step % 3)
            nats, count = engine.forward_backward(batch, 100 + step)
            engine.optimizer_step(1e-2, count)
            result.append(nats / count)
    return result


def test_twenty_steps_follow_the_cpu(make: Callable[[Spec], Tiny], gpu: str) -> None:
    """Dropout draws the same masks; each loss is within 1% of the F32 path's on the CPU."""
    tiny = make(MODELS["k-quants"])
    want = losses(tiny, 20, device="cpu", precision="f32")
    got = losses(tiny, 20, device=gpu, precision="fast")
    assert want[-1] < want[0] - 0.5
    assert got == pytest.approx(want, rel=1e-2)


def test_evaluation_and_logits(make: Callable[[Spec], Tiny], gpu: str) -> None:
    tiny = make(MODELS["bias"])
    batch = make_batch(tiny.shape.n_vocab)
    results = []
    for device in ("cpu", gpu):
        with open_engine(tiny, device=device, kernels="ggml") as engine:
            set_random_lora(engine)
            nats = engine.token_nats(batch)
            total = np.array(engine.evaluate(batch)[0])
            results.append((total, nats, engine.logits(batch)))
    for got, want in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(got, want, rtol=BAR, atol=BAR)


def test_a_whole_run_follows_the_cpu(tmp_path: Path, gpu: str) -> None:
    """Plan, train and save as `ggft finetune` does; the losses are the CPU's within 1%."""
    model = write_model(tmp_path / "tiny.gguf", Spec(types="Q4_0")).path
    rows = [{"instruction": f"question {i}", "output": f"answer {i * 7}"} for i in range(20)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    results = []
    for device in ("cpu", gpu):
        config = make_config(
            FinetuneConfig,
            {
                "model": str(model), "data": [str(tmp_path / "rows.json")], "val_split": 0,
                "output": str(tmp_path / device), "device": device, "samples": 0, "lr": 1e-2,
                "max_steps": 20, "batch_size": 4, "dropout": 0.0, "threads": 1,
            },
        )  # fmt: skip
        finetune(config, Progress("quiet"))
        assert (tmp_path / device / "adapter.gguf").stat().st_size > 0
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        results.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(results[0]) >= 20
    assert results[0][-1] < results[0][0]
    assert results[1] == pytest.approx(results[0], rel=1e-2)


def smollm2_losses(path: Path, device: str, n_steps: int, text: str) -> list[float]:
    """Train on four rows of 16 tokens in turn; return the mean loss of each step."""
    from ggft.llama.model import LlamaTokenizer

    ids = np.array(LlamaTokenizer(path).encode(text, special=False), np.int32)
    settings = EngineSettings(
        paths=[str(path)], targets=list(LINEARS), layer_first=0, layer_last=30, rank=8, alpha=32.0,
        precision="f32", device=device, threads=2, n_rows=1, n_tokens=16,
    )  # fmt: skip
    result = []
    with Engine(settings) as engine:
        engine.init_lora(seed=1)
        for step in range(n_steps):
            row = ids[step % 4 * 16 :][:17]
            batch = {
                "tokens": row[None, :-1],
                "targets": row[None, 1:],
                "positions": np.arange(16, dtype=np.int32)[None],
                "segments": np.zeros((1, 16), np.int32),
            }
            nats, count = engine.forward_backward(batch, 0)
            engine.optimizer_step(5e-4, count)
            result.append(nats / count)
    return result


def test_smollm2_follows_the_cpu(smollm2: Path, gpu: str) -> None:
    """Each loss of 22 steps is within 1% of the CPU's F32 path; all linears of all blocks learn."""
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_text(encoding="utf-8")
    want = smollm2_losses(smollm2, "cpu", 22, text)
    got = smollm2_losses(smollm2, gpu, 22, text)
    assert want[20] < want[0] - 0.5, "the same row, five rounds later"
    assert got == pytest.approx(want, rel=1e-2)
