"""What weights are fitted to when a model is written: rows of the fine-tune and general ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ggft.adapters.calibrate import Calibration, Fitted
from ggft.data.batches import Batch, Batches
from ggft.data.sources.find import is_here
from ggft.data.store import StoreView, Subset
from ggft.engine.engine import Cancelled, Engine
from ggft.engine.settings import EngineSettings
from ggft.gguf.linears import TARGETS
from ggft.gguf.types import GGMLType
from ggft.settings.option import make
from ggft.settings.training import FinetuneConfig
from ggft.setup.course import GENERAL
from ggft.setup.inputs import BaseModel, load_data, open_with_adapter
from ggft.system.errors import GgftError
from ggft.system.machine import physical_cores
from ggft.system.signals import StopSignals

if TYPE_CHECKING:
    from ggft.engine.engine import FloatArray

# Of the fine-tune's rows; more take longer and hardly help.
MAX_TOKENS = 6000
N_GENERAL = 24
ROW_TOKENS = 1024  # of a micro-batch


@dataclass(frozen=True)
class Rows:
    """Data, and how its rows are read, as `load_data` takes it."""

    data: tuple[str, ...] = ()
    format: str = "auto"
    columns: tuple[str, ...] = ()
    ignore_columns: tuple[str, ...] = ()


def rows_of_run(adapter: str | Path) -> Rows:
    """Return the data that the run around an adapter was trained on, if it is still there."""
    path = Path(adapter).parent / "config.yaml"
    try:
        config = make(FinetuneConfig, {}, path)
    except (GgftError, OSError):
        return Rows()
    if not all(map(is_here, config.data)):
        return Rows()
    return Rows(config.data, config.format, config.columns, config.ignore_columns)


class Fitter:
    """Fits a merged model's weights to what they read.

    Raises:
        InputError: The model or the rows cannot be used.
    """

    def __init__(
        self, base: str | Path, adapter: str | Path, rows: Rows, *, any_base: bool
    ) -> None:
        # An adapter of another base names a template that this one may lack.
        trained = None if any_base else adapter
        self._model = open_with_adapter(base, trained, check=False)[0]
        self._batches = _general_batches(self._model)
        if rows.data:
            self._batches = row_batches(self._model, rows, MAX_TOKENS) + self._batches

    def __call__(
        self, types: Mapping[str, GGMLType], wanted: Callable[[str], FloatArray]
    ) -> Iterator[Fitted]:
        """Yield the fitted tensors, block by block."""
        n_layer = self._model.info.n_layer
        settings = EngineSettings(
            paths=[str(path) for path in self._model.file.paths],
            targets=list(TARGETS[:1]), layer_first=0, layer_last=1, rank=1, alpha=1.0,
            train=False, device="cpu", threads=physical_cores(), n_rows=1,
            n_tokens=max(batch["tokens"].shape[1] for batch in self._batches),
        )  # fmt: skip
        used = [True] * len(self._batches)
        with StopSignals() as stop, Engine(settings) as engine:
            stop.on_stop(engine.cancel)
            try:
                run = Calibration(engine, n_layer, self._batches, used, types, wanted).run()
                for fitted in run:
                    stop.check()
                    yield fitted
            except Cancelled:
                stop.check()
                raise
            finally:
                stop.on_stop(None)


def _general_batches(model: BaseModel) -> list[Batch]:
    rows = load_data(model, GENERAL, val_split=0.0).train
    step = max(1, len(rows) // N_GENERAL)
    return _packed(rows, range(0, step * N_GENERAL, step))


def row_batches(model: BaseModel, source: Rows, max_tokens: int) -> list[Batch]:
    """Return micro-batches of rows drawn from data, of so many tokens at most, or of one row."""
    import numpy as np

    rows = load_data(model, **asdict(source), val_split=0.0).train
    order = np.random.default_rng(0).permutation(len(rows))
    tokens = np.cumsum(rows.lengths[order])
    n = max(1, int(np.searchsorted(tokens, max_tokens, side="right")))
    return _packed(rows, sorted(order[:n].tolist()))


def _packed(rows: StoreView, chosen: Sequence[int]) -> list[Batch]:
    import numpy as np

    indexes = np.asarray(chosen, dtype=np.int64)
    subset = Subset(rows, indexes, rows.lengths[indexes])
    longest = max(ROW_TOKENS, int(subset.lengths.max()))
    return list(Batches(subset, rows=1, n_tokens=longest, shuffle=False).epoch(0))
