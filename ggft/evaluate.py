"""`ggft eval`: the loss of data under a base model and an adapter, through the training engine."""

from __future__ import annotations

import math
from typing import Any

from ggft.adapter import A_SUFFIX, B_SUFFIX, Adapter, check_template_hash, read_adapter
from ggft.base import Base, Data, load_data, open_base
from ggft.batching import Batches
from ggft.config import TARGETS, EvalConfig, parse_size
from ggft.engine import Cancelled, Engine, EngineSettings, find_device, mean_nats
from ggft.errors import InputError
from ggft.interrupt import StopSignals
from ggft.machine import physical_cores
from ggft.planner import Limits, Plan, Shape, make_plan, weights_bytes
from ggft.progress import Progress

MAX_ROWS = 8


def evaluate(config: EvalConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Print and return the mean loss in nats per token and the perplexity.

    Raises:
        GgftError: a file, a setting or the memory does not serve.
    """
    progress = progress or Progress("json" if config.json else "auto")
    with StopSignals() as stop:
        base = open_base(config.model, "auto" if config.adapter else config.template)
        adapter = None
        if config.adapter is not None:
            adapter = read_adapter(config.adapter, base.file)
            base = with_template(config, adapter)
        data = load_data(
            config.data,
            base,
            form=config.format,
            max_length=config.max_length,
            train_on_prompt=config.train_on_prompt,
            check=stop.check,
        )
        stop.check()
        plan = plan_evaluation(config, base, data)
        with Engine(engine_settings(config, base, adapter, plan)) as engine:
            stop.on_stop(engine.cancel)
            try:
                put_adapter(engine, adapter, config.adapter_scale)
                batches = Batches(
                    data.train, rows=plan.n_rows, n_tokens=plan.n_tokens, shuffle=False
                )
                loss, count = mean_nats(engine, batches.epoch(0), stop.check)
            except Cancelled:
                stop.check()
                raise
            finally:
                stop.on_stop(None)
    result = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": count,
        "examples": len(data.train),
    }
    progress.event("evaluation", **result)
    progress.result(
        f"loss {loss:.4f} nats per token, perplexity {result['perplexity']:.3f} "
        f"({count} tokens of {len(data.train)} examples)"
    )
    return result


def with_template(config: EvalConfig, adapter: Adapter) -> Base:
    """Open the base with the template that the adapter was trained with, or the one asked for.

    Raises:
        InputError: the adapter's template is not what its name stands for here.
    """
    name = config.template
    if name == "auto":
        name = adapter.meta.template or "auto"
    base = open_base(config.model, name)
    if config.template == "auto":
        check_template_hash(base.template, adapter.path, adapter.meta.template_sha256)
    return base


def plan_evaluation(config: EvalConfig, base: Base, data: Data) -> Plan:
    """Choose the micro-batch; nothing is kept, as there is no backward pass."""
    device = find_device(config.device)
    shape = Shape(
        model=base.info,
        weights_bytes=weights_bytes(base.file),
        targets=TARGETS,
        layer_first=0,
        layer_last=base.info.n_layer,
        rank=1,
        fused=device["type"] == "cpu",
    )
    lengths = data.train.lengths
    all_tokens = -(-int(lengths.sum()) // 32) * 32
    n_tokens = max(min(data.max_length, all_tokens), int(lengths.max()))
    return make_plan(
        shape,
        Limits.of(device, None if config.memory is None else parse_size(config.memory)),
        n_tokens=n_tokens,
        max_rows=MAX_ROWS,
        joined_tokens=min(MAX_ROWS * n_tokens, all_tokens) if shape.fused else None,
        keep=False,
    )


def engine_settings(
    config: EvalConfig, base: Base, adapter: Adapter | None, plan: Plan
) -> EngineSettings:
    """Return the settings that hold the adapter's matrices.

    Raises:
        InputError: the adapter changes tensors that the engine does not.
    """
    targets, layers, rank = {"attn_q"}, {0}, 1
    if adapter is not None:
        rank = max(adapter.tensors[name + A_SUFFIX].shape[1] for name in adapter.base_names)
        targets, layers = set(), set()
        for name in adapter.base_names:
            block, number, target = [*name.split("."), "", ""][:3]
            if block != "blk" or target not in TARGETS:
                raise InputError(
                    "the engine cannot apply this part of the adapter",
                    path=adapter.path,
                    found=name,
                    expected="the linears " + ", ".join(TARGETS),
                )
            targets.add(target)
            layers.add(int(number))
    return EngineSettings(
        paths=[str(path) for path in base.file.paths],
        targets=[name for name in TARGETS if name in targets],
        layer_first=min(layers),
        layer_last=max(layers) + 1,
        rank=rank,
        alpha=adapter.meta.alpha if adapter else 1.0,
        precision=config.precision,
        device=config.device,
        threads=config.threads or physical_cores(),
        prepacked_bytes=plan.prepacked_bytes,
        n_rows=plan.n_rows,
        n_tokens=plan.n_tokens,
    )


def put_adapter(engine: Engine, adapter: Adapter | None, scale: float) -> None:
    """Fill the engine's matrices; what the adapter lacks is zero.

    A pair of smaller rank than the engine's is padded, and its factor alpha / rank made up for.
    """
    import numpy as np

    arrays = {} if adapter is None else adapter.arrays()
    for name, shape in engine.parameters.items():
        value = np.zeros(shape, dtype=np.float32)
        array = arrays.get(name)
        if array is not None:
            value[: array.shape[0], : array.shape[1]] = array
            if name.endswith(B_SUFFIX):
                value *= np.float32(scale * shape[1] / array.shape[1])
        engine.set(name, "value", value)
