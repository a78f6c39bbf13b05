from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggft.engine import memory as planner
from ggft.engine.engine import Engine
from ggft.engine.forecast import Forecast
from ggft.engine.memory import BUFFERS, MAX_TOKENS, Limits, Shape, make_plan, predict
from ggft.engine.settings import EngineSettings
from ggft.gguf.linears import TARGETS
from ggft.gguf.read import check_decoder, read_gguf
from ggft.system.errors import ResourceError
from tests.support.engines import EACH_ISA, make_batch
from tests.support.models import Spec, Tensor, model_metadata, spec_for, write_gguf, write_model

pytestmark = EACH_ISA  # panels, and so memory, differ

GB = 10**9


@pytest.fixture
def shape(tmp_path: Path) -> Shape:
    return shape_of(tmp_path, Spec(n_layer=3))


def shape_of(folder: Path, spec: Spec, **changes: Any) -> Shape:
    file = read_gguf(write_model(folder / "m.gguf", spec).path)
    settings = EngineSettings(
        paths=[str(file.path)], targets=list(TARGETS), layer_first=0, layer_last=spec.n_layer,
        rank=4, alpha=8.0, device="cpu",
    )  # fmt: skip
    return Shape(model=check_decoder(file), settings=replace(settings, **changes))


class Heavy(Shape):
    """A shape whose weights take 4 GB."""

    def buffers(self, *args: Any, **keywords: Any) -> dict[str, int]:
        return {**super().buffers(*args, **keywords), "weights": 4 * GB}


def test_trained_parameters_are_counted(shape: Shape) -> None:
    # q 64+64, k and v 64+32, o 64+64, gate, up and down 64+96
    assert shape.n_trained == 3 * 4 * (128 + 96 + 96 + 128 + 3 * 160)


def test_more_tokens_and_kept_internals_cost_more(shape: Shape) -> None:
    def total(rows: int, tokens: int, keep: bool) -> int:
        return sum(predict(shape, rows, tokens, keep=keep).values())

    assert total(1, 64, False) < total(2, 64, False) < total(2, 64, True) < total(2, 128, True)


def test_blocks_below_the_trained_ones_save_nothing(tmp_path: Path) -> None:
    whole = shape_of(tmp_path, Spec(n_layer=3))
    top = replace(whole, settings=replace(whole.settings, layer_first=2))
    part = planner.SAVED
    assert predict(top, 1, 64, keep=True)[part] < predict(whole, 1, 64, keep=True)[part] / 1.5


def limits(budget: int = 100 * GB, **changes: Any) -> Limits:
    values: dict[str, Any] = {"free_bytes": budget, "total_bytes": budget, "given": True}
    return Limits(budget_bytes=budget, **{**values, **changes})


def test_the_budget_decides(shape: Shape) -> None:
    assert make_plan(shape, limits(), n_tokens=512, max_rows=64).keep
    floor = sum(predict(shape, 1, 512, keep=False).values())
    tight = make_plan(shape, limits(floor), n_tokens=512, max_rows=64)
    assert (tight.n_rows, tight.keep) == (1, False)
    assert tight.total_bytes <= floor
    assert tight.warning is None
    with pytest.raises(ResourceError) as caught:
        make_plan(shape, limits(floor - 1), n_tokens=512, max_rows=64)
    assert "--memory" in str(caught.value)
    assert "--max-length 256" in str(caught.value)


def test_nothing_fits(shape: Shape) -> None:
    with pytest.raises(ResourceError, match="smaller model"):
        make_plan(shape, limits(1 << 20), n_tokens=512, max_rows=4)


def test_weights_that_barely_fit_are_a_warning(shape: Shape) -> None:
    """Mapped weights can leave memory; what the run itself needs cannot."""
    large = Heavy(model=shape.model, settings=shape.settings)
    others = sum(predict(shape, 1, 512, keep=False).values())
    small = {"free_bytes": 3 * GB, "total_bytes": 8 * GB, "given": False}
    plan = make_plan(large, limits(int(2.4 * GB), **small), n_tokens=512, max_rows=4)
    assert plan.warning is not None
    assert "close other programs" in plan.warning
    for changes in ({"given": True}, {"total_bytes": 4 * GB}):
        with pytest.raises(ResourceError):
            make_plan(
                large, limits(int(2.4 * GB), **{**small, **changes}), n_tokens=512, max_rows=4
            )
    with pytest.raises(ResourceError):
        make_plan(large, limits(others // 2, **small), n_tokens=512, max_rows=4)


def test_a_gpu_has_limits_of_its_own(shape: Shape) -> None:
    need = sum(predict(shape, 1, 512, keep=False).values())
    for unified in (True, False):
        with pytest.raises(ResourceError, match="on the device"):
            make_plan(
                shape, limits(device_bytes=1 << 20, unified=unified), n_tokens=512, max_rows=4
            )
    # Memory of its own: the host needs to hold the program only.
    own = limits(need - 1, device_bytes=100 * GB, unified=False)
    assert make_plan(shape, own, n_tokens=512, max_rows=1).n_rows == 1
    shared = limits(need - 1, device_bytes=100 * GB, unified=True)
    with pytest.raises(ResourceError):
        make_plan(shape, shared, n_tokens=512, max_rows=1)


def test_limits_of_devices() -> None:
    cpu = {"type": "cpu", "memory_free": 5, "host_pointer": True}
    assert Limits.of(cpu, None).device_bytes is None
    assert Limits.of(cpu, None).budget_bytes < Limits.of(cpu, None).free_bytes
    assert Limits.of(cpu, 7).budget_bytes == 7
    assert Limits.of(cpu, 7).given
    gpu = {"type": "gpu", "memory_free": 5, "host_pointer": False}
    assert Limits.of(gpu, None).device_bytes == 5
    assert not Limits.of(gpu, None).unified


@pytest.mark.parametrize("keep", [True, False])
def test_the_user_decides_about_recomputation(shape: Shape, keep: bool) -> None:
    assert make_plan(shape, limits(), n_tokens=64, max_rows=4, keep=keep).keep is keep


def test_rows_of_a_micro_batch(shape: Shape) -> None:
    assert make_plan(shape, limits(), n_tokens=64, max_rows=1).n_rows == 1
    given = make_plan(shape, limits(), n_tokens=64, max_rows=9, size=(3, 48))
    assert (given.n_rows, given.n_tokens) == (3, 48)


def test_rows_that_may_be_joined_are_one(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the step where memory allows, shorter where it does not, never below a row."""
    monkeypatch.setattr(planner, "PREPACKED_SHARES", (0.0,))
    whole = make_plan(shape, limits(), n_tokens=512, max_rows=4, joined_tokens=904)
    assert (whole.n_rows, whole.n_tokens) == (1, 904)
    floor = sum(predict(shape, 1, 512, keep=False).values())
    tight = make_plan(shape, limits(floor), n_tokens=512, max_rows=4, joined_tokens=904)
    assert (tight.n_rows, tight.n_tokens) == (1, 512)
    short = make_plan(shape, limits(), n_tokens=64, max_rows=1, joined_tokens=56)
    assert (short.n_rows, short.n_tokens) == (1, 64)
    long = make_plan(shape, limits(), n_tokens=512, max_rows=64, joined_tokens=64 * 512)
    assert long.n_rows == 1
    assert long.n_tokens <= MAX_TOKENS


LARGE = Spec(n_layer=3, n_embd=512, head_size=128, n_ff=1024)


def test_weights_are_prepacked_where_memory_allows(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, LARGE)
    bare = make_plan(shape, limits(), n_tokens=64, max_rows=1, size=(1, 64), keep=True)
    assert bare.prepacked_bytes > 0
    need = bare.total_bytes - bare.prepacked_bytes
    tight = make_plan(shape, limits(need), n_tokens=64, max_rows=1, size=(1, 64), keep=True)
    assert tight.prepacked_bytes == 0
    assert tight.total_bytes == need
    portable = replace(shape, settings=replace(shape.settings, kernels="ggml"))
    assert make_plan(portable, limits(), n_tokens=64, max_rows=1).prepacked_bytes == 0


@pytest.mark.parametrize("limit", [planner.PREPACKED_LIMIT, 20 << 20])
@pytest.mark.parametrize("program", [planner.RUNTIME_BYTES, 1 << 20])
def test_prepacked_weights_take_no_more_than_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, program: int
) -> None:
    monkeypatch.setattr(planner, "PREPACKED_LIMIT", limit)
    monkeypatch.setattr(planner, "RUNTIME_BYTES", program)
    shape = shape_of(tmp_path, LARGE)
    assert shape.prepacked_limit(1.0) > 20 << 20
    plan = make_plan(shape, limits(), n_tokens=64, max_rows=1)
    assert 0 < plan.prepacked_bytes <= min(limit, plan.total_bytes / 2)


def test_large_output_matrices_are_not_prepacked(tmp_path: Path) -> None:
    taken = []
    for n_vocab in (1000, 50_000, 200_000):
        spec = replace(LARGE, tied=True)
        path = write_model(tmp_path / "m.gguf", spec).path
        tensors = [
            Tensor(name, "F32", tensor.shape[::-1], bytes(tensor.n_bytes))
            for name, tensor in read_gguf(path).tensors.items()
            if name != "token_embd.weight"
        ]
        data = bytes(n_vocab * spec.n_embd // 32 * 18)
        tensors.append(Tensor("token_embd.weight", "Q4_0", (n_vocab, spec.n_embd), data))
        write_gguf(path, model_metadata(spec, n_vocab), tensors)
        settings = EngineSettings(
            paths=[str(path)], targets=["attn_q"], layer_first=2, layer_last=3, rank=1, alpha=1.0
        )
        taken.append(Forecast(settings).prepackable_bytes)
    small, large, larger = taken
    assert large > small + 50_000 * 512 * 2
    assert larger < large


def test_every_plan_keeps_to_its_budget(shape: Shape) -> None:
    for megabytes in (95, 100, 110, 130, 150, 200, 400):
        for rows in (1, 3, 16):
            try:
                plan = make_plan(shape, limits(megabytes << 20), n_tokens=256, max_rows=rows)
            except ResourceError:
                continue
            assert plan.total_bytes <= megabytes << 20
            assert 1 <= plan.n_rows <= rows


def test_the_record_and_the_lines_say_the_same(shape: Shape) -> None:
    plan = make_plan(shape, limits(), n_tokens=64, max_rows=4)
    assert plan.record()["total_bytes"] == sum(plan.record()["parts_bytes"].values())
    assert any("budget" in line for line in plan.lines())
    assert any(f"{plan.n_trained:,}" in line for line in plan.lines())


def test_what_is_planned_is_what_the_engine_takes(tmp_path: Path) -> None:
    """Each part of a plan, from the settings that the plan gives to the engine."""
    for changes in ({}, {"kernels": "ggml"}, {"train": False}):
        shape = shape_of(tmp_path, LARGE, **changes)
        plan = make_plan(shape, limits(), n_tokens=64, max_rows=3)
        with Engine(plan.settings) as engine:
            buffers = engine.info()["buffers"]
        for part, n_bytes in plan.parts.items():
            if part in BUFFERS:
                assert n_bytes == sum(buffers[name] for name in BUFFERS[part]), part
        assert bool(plan.prepacked_bytes) == shape.fused


def test_a_larger_adapter_costs_an_evaluation_little(smollm2: Path) -> None:
    """At rank 64 no more than 40 MiB beyond rank 8: its values, in 16 bits."""
    info = check_decoder(read_gguf(smollm2))
    totals = []
    for rank in (8, 64):
        settings = EngineSettings(
            paths=[str(smollm2)], targets=list(TARGETS), layer_first=0, layer_last=info.n_layer,
            rank=rank, alpha=32.0, device="cpu", train=False,
        )  # fmt: skip
        shape = Shape(model=info, settings=settings)
        totals.append(make_plan(shape, limits(), n_tokens=512, max_rows=8, keep=False).total_bytes)
    assert 30 << 20 < totals[1] - totals[0] <= 40 << 20


MODELS = {
    "plain": Spec(),
    "wide heads": Spec(n_head=8, head_size=16, n_head_kv=4),
    "tied, bias": Spec(tied=True, bias=True),
    "qwen2": Spec(arch="qwen2", qkv_bias=True),
    "qwen3": Spec(arch="qwen3", tied=True, head_size=32),
    "large heads": Spec(head_size=320, n_head=2, n_head_kv=1),
    "mix": spec_for(
        "Q4_K", n_layer=3, tied=True,
        types={"*": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q8_0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("precision", ["fast", "f32"])
@pytest.mark.parametrize("kernels", ["auto", "ggml"])
@pytest.mark.parametrize("name", MODELS)
def test_the_forecast_is_what_the_engine_takes(
    tmp_path: Path, name: str, kernels: str, precision: str, train: bool
) -> None:
    """To the byte, when it is open and after a step; for a file of holes behind the header, too."""
    spec = MODELS[name]
    path = write_model(tmp_path / "m.gguf", spec).path
    settings = EngineSettings(
        paths=[str(path)], targets=["attn_q", "attn_v", "ffn_down"], layer_first=1,
        layer_last=spec.n_layer, rank=5, alpha=8.0, dropout=0.1, device="cpu", kernels=kernels,
        precision=precision, train=train,
    )  # fmt: skip
    header = tmp_path / "header.gguf"
    header.write_bytes(path.read_bytes()[: read_gguf(path).data_offset])
    os.truncate(header, path.stat().st_size)
    forecast = Forecast(replace(settings, paths=[str(header)]))
    for n_rows, n_tokens, keep, share in ((1, 160, True, 0.5), (3, 24, False, 1.0)):
        n_bytes = int(share * forecast.prepackable_bytes)
        opened = replace(
            settings, n_rows=n_rows, n_tokens=n_tokens, keep=keep, prepacked_bytes=n_bytes
        )
        with Engine(opened) as engine:
            taken = engine.info()["buffers"]
            assert forecast.buffers(n_rows, n_tokens, keep, n_bytes) == taken
            assert forecast.kernels == engine.info()["kernels"]
            assert forecast.n_parameters == sum(a * b for a, b in engine.parameters.values())
            batch = make_batch(forecast.n_vocab, ((n_tokens,),) * n_rows, n_tokens)
            if train:
                engine.forward_backward(batch, 1)
                engine.optimizer_step(1e-3, 1)
            engine.evaluate(batch)
            assert engine.info()["buffers"] == taken
