"""An adapter that a run goes on from, on new data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ggft.adapters.adapter import A_SUFFIX, B_SUFFIX, Adapter, read_adapter
from ggft.engine.engine import Engine
from ggft.settings.training import FinetuneConfig
from ggft.setup.inputs import BaseModel
from ggft.system.errors import InputError


def with_initial(
    config: FinetuneConfig, model: BaseModel, warn: Callable[[str], None]
) -> tuple[FinetuneConfig, Adapter | None]:
    """Return the adapter that a run begins with, and settings of its rank and alpha.

    Raises:
        InputError: It is not one of this model, or of a higher rank than is asked for.
    """
    if config.init_adapter is None:
        return config, None
    adapter = read_adapter(config.init_adapter, model.file)
    rank = max(adapter.tensors[name + A_SUFFIX].shape[1] for name in adapter.base_names)
    if config.rank is not None and config.rank < rank:
        raise InputError(
            "the adapter that the run begins with has a higher rank", path=adapter.path,
            found=rank, expected=f"at most --rank {config.rank}",
            hint="leave out --rank to have the adapter's",
        )  # fmt: skip
    if adapter.meta.template_sha256 not in (None, model.template.source_hash):
        warn("the adapter that the run begins with was trained with another template")
    alpha = config.alpha
    if alpha is None and config.rank is None and not config.rslora:
        alpha = adapter.meta.alpha
    return replace(config, rank=config.rank or rank, alpha=alpha), adapter


def put_initial(engine: Engine, adapter: Adapter) -> None:
    """Fill the engine's matrices with the adapter's, whose delta stays what it is.

    What the adapter has not, as it is of fewer linears or a smaller rank, stays as drawn: its
    lora_b is zero.

    Raises:
        InputError: The adapter changes what the run does not train, and would lose it.
    """
    lost = sorted(set(adapter.tensors) - set(engine.parameters))
    if lost:
        raise InputError(
            "the adapter that the run begins with changes more than is trained",
            path=adapter.path, found=lost[0],
            hint="choose --target-modules and --layers that have all of it",
        )  # fmt: skip
    for name in adapter.tensors:
        array, value = adapter.array(name), engine.get(name)
        if name.endswith(B_SUFFIX):
            # The delta is scaled by alpha / rank, here by the engine's.
            factor = adapter.meta.alpha / array.shape[1]
            array = array * (factor * value.shape[1] / engine.settings.alpha)
        value[: array.shape[0], : array.shape[1]] = array
        engine.set(name, "value", value)
