"""Settings and data become a plan, and a plan an open engine, for every command that needs one.

What an engine holds besides the base weights is a `Lora`: matrices to train, or those of an
adapter. Every field of `EngineSettings` that a command's settings have by the same name is taken
from them, so that a new setting of the engine is declared once, as an option.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

from ggft.adapters.adapter import A_SUFFIX, B_SUFFIX, Adapter
from ggft.data.advice import MIX_SHARE, Suggestion, n_general, recipes, suggest
from ggft.data.batches import Steps, steps_per_epoch
from ggft.engine.engine import Cancelled, Engine, find_device
from ggft.engine.forecast import Forecast
from ggft.engine.memory import Limits, Plan, Shape, make_plan
from ggft.engine.settings import EngineSettings
from ggft.gguf.architectures import SUPPORTED_ARCHITECTURES
from ggft.gguf.linears import block_of, parse_layers, parse_targets
from ggft.gguf.read import DecoderInfo, GGUFFile, ModelInfo
from ggft.settings.training import FinetuneConfig, SettledConfig
from ggft.setup.inputs import Data
from ggft.system.errors import InputError, ResourceError
from ggft.system.machine import physical_cores
from ggft.system.signals import StopSignals
from ggft.system.text import parse_size

# Rows may be as long as this where examples are shorter, so that several share one.
ROW_TOKENS = 512
# Rows of a micro-batch when only the loss is measured.
EVALUATION_ROWS = 8
PATIENCE = 3
RSLORA_ALPHA = 16.0  # the usual factor at rank 16


class MachineSettings(Protocol):
    """How a command uses the machine; the fields of these names in its settings."""

    @property
    def precision(self) -> str:
        """Name of the number formats."""
        ...

    @property
    def device(self) -> str:
        """Name of the device."""
        ...

    @property
    def threads(self) -> int | None:
        """CPU threads; None for as many as there are physical cores."""
        ...

    @property
    def memory(self) -> str | None:
        """Memory that may be taken; None for a safe share of what is free."""
        ...


class TrainingSettings(MachineSettings, Protocol):
    """The same where an adapter is trained, and which linears of which blocks it changes."""

    @property
    def kernels(self) -> str:
        """Name of the CPU's kernels."""
        ...

    @property
    def recompute(self) -> bool | None:
        """Whether internals are recomputed; None: as memory allows."""
        ...

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Linears to train."""
        ...

    @property
    def layers(self) -> str:
        """Blocks to train."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lora:
    """LoRA matrices beside the base weights.

    Attributes:
        targets: Linears that have them.
        layer_first: First block that has them.
        layer_last: One past the last.
        rank: Their rank.
        alpha: The delta is scaled by alpha / rank.
        train: Whether they are trained, which takes gradients and moments.
    """

    targets: tuple[str, ...]
    layer_first: int
    layer_last: int
    rank: int
    alpha: float
    train: bool = True


def lora_to_train(config: TrainingSettings, info: ModelInfo, rank: int, factor: float) -> Lora:
    """Return the matrices that settings ask for, whose delta is scaled by `factor`."""
    first, last = parse_layers(config.layers, info.n_layer)
    return Lora(
        targets=parse_targets(config.target_modules, info.linears),
        layer_first=first,
        layer_last=last,
        rank=rank,
        alpha=factor * rank,  # as llama.cpp reads it: it scales by alpha / rank
    )


def lora_of(adapter: Adapter | None, info: ModelInfo) -> Lora:
    """Return matrices that hold an adapter's; the smallest there can be without one.

    Raises:
        InputError: The adapter changes tensors that the engine does not.
    """
    if adapter is None:
        targets = info.linears[:1] if isinstance(info, DecoderInfo) else info.linears
        return Lora(targets=targets, layer_first=0, layer_last=1, rank=1, alpha=1.0, train=False)
    changed, blocks = set(), set()
    for name in adapter.base_names:
        block, target = block_of(name)
        if block is None or target not in info.linears:
            raise InputError(
                "the engine cannot apply this part of the adapter",
                path=adapter.path,
                found=name,
                expected="the linears " + ", ".join(info.linears),
            )
        blocks.add(block)
        changed.add(target)
    return Lora(
        targets=tuple(name for name in info.linears if name in changed),
        layer_first=min(blocks),
        layer_last=max(blocks) + 1,
        rank=max(adapter.tensors[name + A_SUFFIX].shape[1] for name in adapter.base_names),
        alpha=adapter.meta.alpha,
        train=False,
    )


def usual_factor() -> float:
    """Return what a delta is scaled by, whatever its rank, unless the user gives an alpha."""
    return float(recipes()["scale"]["alpha_per_rank"])


def factor_of(config: SettledConfig) -> float:
    """Return what the delta is scaled by.

    Source: Kalajdzievski, "A rank stabilization scaling factor for fine-tuning with LoRA" (2023).
    """
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def make_shape(config: MachineSettings, lora: Lora, file: GGUFFile, info: ModelInfo) -> Shape:
    """Return what memory depends on: what the engine will be opened with but the micro-batch."""
    names = {item.name for item in fields(EngineSettings)}
    given = {
        name: value for name, value in vars(config).items() if name in names and value is not None
    }
    chosen = {
        "paths": [str(path) for path in file.paths],
        "traced": file.architecture not in SUPPORTED_ARCHITECTURES,
        "threads": config.threads or physical_cores(),
        "targets": list(lora.targets),
    }
    return Shape(model=info, settings=EngineSettings(**{**given, **vars(lora), **chosen}))


def check_trainable(file: GGUFFile, info: ModelInfo) -> None:
    """Refuse a model whose graph cannot be trained; as a run would, before it begins.

    Raises:
        InputError: Names the operation that stands in the way, or says what llama.cpp says.
    """
    if not isinstance(info, DecoderInfo):
        config = FinetuneConfig()
        lora = lora_to_train(config, info, 1, usual_factor())
        Forecast(make_shape(config, lora, file, info).settings)


def limits_of(config: MachineSettings) -> Limits:
    """Return what memory a command may take."""
    memory = None if config.memory is None else parse_size(config.memory)
    return Limits.of(find_device(config.device), memory)


def plan_rows(
    config: TrainingSettings,
    shape: Shape,
    *,
    n_tokens: int,
    max_rows: int,
    joined_tokens: int | None = None,
    size: tuple[int, int] | None = None,
) -> Plan:
    """Choose how steps of rows use memory; as `make_plan`, with what the settings leave open."""
    return make_plan(
        shape,
        limits_of(config),
        n_tokens=n_tokens,
        max_rows=max_rows,
        joined_tokens=joined_tokens,
        size=size,
        keep=None if config.recompute is None else not config.recompute,
    )


@dataclass(frozen=True)
class Assumed:
    """What a plan without data is for; with data, these follow from it unless they are given."""

    max_length: int = 512
    batch_size: int = 4
    rank: int = 8


def plan_header(config: FinetuneConfig, file: GGUFFile, info: ModelInfo) -> tuple[Assumed, Plan]:
    """Choose for a model of which only the header is known, without data."""
    given = {
        item.name: value
        for item in fields(Assumed)
        if (value := getattr(config, item.name)) is not None
    }
    assumed = Assumed(**given)
    lora = lora_to_train(config, info, assumed.rank, usual_factor())
    shape = make_shape(config, lora, file, info)
    n_tokens = min(assumed.max_length, info.n_ctx)
    max_rows = assumed.batch_size * config.grad_accum
    joined = max_rows * n_tokens if joins(config, shape) else None
    planned = plan_rows(config, shape, n_tokens=n_tokens, max_rows=max_rows, joined_tokens=joined)
    return replace(assumed, max_length=n_tokens), planned


def plan_run(
    config: SettledConfig,
    data: Data,
    shape: Shape,
    micro_batch: tuple[int, int] | None = None,
) -> tuple[Steps, Plan]:
    """Divide the data into steps and choose how they use memory.

    Rows are long, so that short examples share one, unless only shorter ones fit into memory. The
    fused kernels pay for an example whatever row it is in, so there a micro-batch is one row. A run
    that is resumed keeps its micro-batches, (rows, tokens per row).
    """
    lengths = sorted({max(data.max_length, min(ROW_TOKENS, shape.model.n_ctx)), data.max_length})
    while True:
        steps = make_steps(config, data, lengths.pop())
        joined = steps.largest_step_tokens if joins(config, shape) else None
        try:
            return steps, plan_rows(
                config,
                shape,
                n_tokens=steps.row_tokens,
                max_rows=steps.max_rows,
                joined_tokens=joined,
                size=micro_batch,
            )
        except ResourceError:
            if not lengths:
                raise


def plan_evaluation(config: MachineSettings, shape: Shape, data: Data) -> Plan:
    """Choose the micro-batch; nothing is kept, as there is no backward pass."""
    lengths = data.to_evaluate.lengths
    all_tokens = -(-int(lengths.sum()) // 32) * 32
    n_tokens = max(min(data.max_length, all_tokens), int(lengths.max()))
    return make_plan(
        shape,
        limits_of(config),
        n_tokens=n_tokens,
        max_rows=EVALUATION_ROWS,
        joined_tokens=min(EVALUATION_ROWS * n_tokens, all_tokens) if shape.fused else None,
        keep=False,
    )


def joins(config: FinetuneConfig, shape: Shape) -> bool:
    """Return whether the rows of a micro-batch are laid end to end as one."""
    return config.packing and shape.fused


def choose_settings(config: FinetuneConfig, data: Data) -> SettledConfig:
    """Fill what the user left open."""
    n_rows = len(data.train)
    advice = suggest(
        n_rows, data.account.n_trained, data.account.row_kind, batch_size=config.batch_size
    )
    mix_share = choose_mix_share(config, advice)
    rank = config.rank or advice.rank
    batch_size = config.batch_size or advice.batch_size
    epochs = config.epochs or advice.epochs
    if config.epochs is None and config.max_steps is not None:
        n_examples = n_rows + n_general(n_rows, mix_share)
        per_epoch = steps_per_epoch(n_examples, batch_size * config.grad_accum)
        epochs = -(-config.max_steps // per_epoch)
    patience = PATIENCE if data.account.row_kind == "task" else 0
    chosen = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": config.lr or advice.lr,
        "rank": rank,
        "alpha": config.alpha or (RSLORA_ALPHA if config.rslora else usual_factor() * rank),
        "dropout": advice.dropout if config.dropout is None else config.dropout,
        "max_length": data.max_length,
        "mix_share": mix_share,
        "vary": config.vary if config.vary != "auto" else "questions" if advice.vary else "none",
        "val_split": data.account.val_share,
        "patience": patience if config.patience is None else config.patience,
        "threads": config.threads or physical_cores(),
    }
    return SettledConfig(**{**vars(config), **chosen})


def choose_mix_share(config: FinetuneConfig, advice: Suggestion) -> float:
    """Return the share of general rows in an epoch: a file that is given is mixed in in any case.

    Raises:
        InputError: `--mix none` together with a share, or with what is done to general rows.
    """
    if config.mix == "none":
        flags = {"--mix-share": config.mix_share, "--mix-as-base": config.mix_as_base}
        if given := [flag for flag, value in flags.items() if value]:
            raise InputError(
                f"--mix none and {given[0]} contradict each other", hint="leave one of them out"
            )
        return 0.0
    if config.mix_share is not None:
        return config.mix_share
    return advice.mix_share if config.mix == "auto" else advice.mix_share or MIX_SHARE


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
def open_engine(plan: Plan, stop: StopSignals) -> Iterator[Engine]:
    """Open the engine as planned; a signal cancels its calls, and is what they then raise.

    Raises:
        Interrupted: A signal cancelled a call, and whoever made the call did not expect it.
    """
    with Engine(plan.settings) as engine:
        plan.shape.close()  # not before: what is open is opened once
        stop.on_stop(engine.cancel)
        try:
            yield engine
        except Cancelled:
            stop.check()
            raise
        finally:
            stop.on_stop(None)


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
