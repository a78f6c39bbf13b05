"""Settings and data become a plan, and a plan an open engine, for every command that needs one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ggft.adapters.adapter import A_SUFFIX, B_SUFFIX, Adapter
from ggft.data.advice import MIX_SHARE, Suggestion, n_general, suggest
from ggft.data.batches import Steps, steps_per_epoch
from ggft.engine.engine import Engine, EngineSettings, find_device
from ggft.engine.memory import Limits, Plan, Shape, make_plan, weights_bytes
from ggft.gguf.linears import TARGETS, parse_layers, parse_targets
from ggft.gguf.read import GGUFFile, ModelInfo
from ggft.settings.training import EvalConfig, FinetuneConfig, SettledConfig
from ggft.setup.inputs import BaseModel, Data
from ggft.system.errors import InputError, ResourceError
from ggft.system.machine import physical_cores
from ggft.system.signals import StopSignals
from ggft.system.text import parse_size

MAX_ROWS = 8


def evaluation_shape(config: EvalConfig, base: BaseModel, adapter: Adapter | None) -> Shape:
    """Return what memory depends on: the linears and the rank of the adapter, nothing trained.

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
    return Shape(
        model=base.info,
        weights_bytes=weights_bytes(base.file),
        targets=tuple(name for name in TARGETS if name in targets),
        layer_first=min(layers),
        layer_last=max(layers) + 1,
        rank=rank,
        fused=find_device(config.device)["type"] == "cpu",
        train=False,
    )


def plan_evaluation(config: EvalConfig, shape: Shape, data: Data) -> Plan:
    """Choose the micro-batch; nothing is kept, as there is no backward pass."""
    lengths = data.train.lengths
    all_tokens = -(-int(lengths.sum()) // 32) * 32
    n_tokens = max(min(data.max_length, all_tokens), int(lengths.max()))
    memory = None if config.memory is None else parse_size(config.memory)
    return make_plan(
        shape,
        Limits.of(find_device(config.device), memory),
        n_tokens=n_tokens,
        max_rows=MAX_ROWS,
        joined_tokens=min(MAX_ROWS * n_tokens, all_tokens) if shape.fused else None,
        keep=False,
    )


def engine_settings(
    config: EvalConfig, base: BaseModel, adapter: Adapter | None, shape: Shape, plan: Plan
) -> EngineSettings:
    """Return the settings that hold the adapter's matrices and train nothing."""
    return EngineSettings(
        paths=[str(path) for path in base.file.paths],
        targets=list(shape.targets),
        layer_first=shape.layer_first,
        layer_last=shape.layer_last,
        rank=shape.rank,
        alpha=adapter.meta.alpha if adapter else 1.0,
        train=False,
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

    for name, shape in engine.parameters.items():
        value = np.zeros(shape, dtype=np.float32)
        if adapter is not None and name in adapter.tensors:
            array = adapter.array(name)
            value[: array.shape[0], : array.shape[1]] = array
            if name.endswith(B_SUFFIX):
                value *= np.float32(scale * shape[1] / array.shape[1])
        engine.set(name, "value", value)


MAX_LENGTH = 512
BATCH_SIZE = 4
# Rows may be as long as this where examples are shorter, so that several share one.
ROW_TOKENS = 512
RANK = 8
PATIENCE = 3


def plan_run(
    config: SettledConfig,
    data: Data,
    shape: Shape,
    micro_batch: tuple[int, int] | None = None,
) -> tuple[Steps, Plan]:
    """Divide the data into steps and choose how they use memory.

    Rows are long, so that short examples share one, unless only shorter ones fit into memory. The
    fused kernels pay for an example whatever row it is in, so there a micro-batch is one row. A run
    that is continued keeps its micro-batches.
    """
    lengths = sorted({max(data.max_length, min(ROW_TOKENS, shape.model.n_ctx)), data.max_length})
    while True:
        steps = make_steps(config, data, lengths.pop())
        try:
            return steps, make_plan(
                shape,
                limits_of(config),
                n_tokens=steps.row_tokens,
                max_rows=steps.max_rows,
                joined_tokens=steps.largest_step_tokens if joins(config, shape) else None,
                size=micro_batch,
                keep=None if config.recompute is None else not config.recompute,
            )
        except ResourceError:
            if not lengths:
                raise


def joins(config: FinetuneConfig, shape: Shape) -> bool:
    """Return whether the rows of a micro-batch are laid end to end as one."""
    return config.packing and shape.fused


def limits_of(config: FinetuneConfig) -> Limits:
    """Return what memory the run may take."""
    memory = None if config.memory is None else parse_size(config.memory)
    return Limits.of(find_device(config.device), memory)


def choose_settings(config: FinetuneConfig, data: Data) -> SettledConfig:
    """Fill what the user left open."""
    n_rows = len(data.train)
    advice = suggest(n_rows, data.account.n_trained, batch_size=config.batch_size)
    mix_share = choose_mix_share(config, advice)
    rank = config.rank or advice.rank
    batch_size = config.batch_size or advice.batch_size
    epochs = config.epochs or advice.epochs
    if config.epochs is None and config.max_steps is not None:
        n_examples = n_rows + n_general(n_rows, mix_share)
        per_epoch = steps_per_epoch(n_examples, batch_size * config.grad_accum)
        epochs = -(-config.max_steps // per_epoch)
    chosen = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": config.lr or advice.lr,
        "rank": rank,
        "alpha": config.alpha or 4.0 * rank,
        "dropout": advice.dropout if config.dropout is None else config.dropout,
        "max_length": data.max_length,
        "mix_share": mix_share,
        "val_split": data.account.val_share,
        "patience": PATIENCE if config.patience is None else config.patience,
        "threads": config.threads or physical_cores(),
    }
    return SettledConfig(**{**vars(config), **chosen})


def choose_mix_share(config: FinetuneConfig, advice: Suggestion) -> float:
    """Return the share of general rows in an epoch: a file that is given is mixed in in any case.

    Raises:
        InputError: `--mix none` together with a share.
    """
    if config.mix == "none":
        if config.mix_share:
            raise InputError(
                "--mix none and --mix-share contradict each other",
                found=f"--mix-share {config.mix_share:g}",
                hint="leave one of them out",
            )
        return 0.0
    if config.mix_share is not None:
        return config.mix_share
    return advice.mix_share if config.mix == "auto" else advice.mix_share or MIX_SHARE


def make_shape(config: FinetuneConfig, rank: int, file: GGUFFile, info: ModelInfo) -> Shape:
    """Return what memory depends on."""
    first, last = parse_layers(config.layers, info.n_layer)
    device = find_device(config.device)
    return Shape(
        model=info,
        weights_bytes=weights_bytes(file),
        targets=parse_targets(config.target_modules),
        layer_first=first,
        layer_last=last,
        rank=rank,
        fused=device["type"] == "cpu" and config.kernels != "ggml",
    )


def make_steps(config: SettledConfig, data: Data, n_tokens: int) -> Steps:
    """Divide the data into optimizer steps of rows of at most `n_tokens`."""
    return Steps(
        data.course,
        examples_per_step=config.batch_size * config.grad_accum,
        n_tokens=n_tokens,
        packing=config.packing,
        seed=config.seed,
    )


@contextlib.contextmanager
def open_engine(
    config: SettledConfig, base: BaseModel, shape: Shape, plan: Plan, stop: StopSignals
) -> Iterator[Engine]:
    """Open the engine as planned; a signal cancels its calls."""
    settings = EngineSettings(
        paths=[str(path) for path in base.file.paths],
        targets=list(shape.targets),
        layer_first=shape.layer_first,
        layer_last=shape.layer_last,
        rank=shape.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        precision=config.precision,
        device=config.device,
        kernels=config.kernels,
        threads=config.threads,
        keep=plan.keep,
        prepacked_bytes=plan.prepacked_bytes,
        n_rows=plan.n_rows,
        n_tokens=plan.n_tokens,
        weight_decay=config.weight_decay,
        beta1=config.beta1,
        beta2=config.beta2,
        eps=config.eps,
        max_grad_norm=config.max_grad_norm,
    )
    with Engine(settings) as engine:
        stop.on_stop(engine.cancel)
        try:
            yield engine
        finally:
            stop.on_stop(None)
