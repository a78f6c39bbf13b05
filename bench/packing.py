"""What packing brings: examples per second of the same optimizer steps, laid out in three ways.

    python bench/packing.py --data rows.json [--model FILE.gguf] [--steps 12] [--runs 5]

"packed" is what `ggft finetune` does, "own row" gives each example a row padded to the longest of
the micro-batch (`--no-packing`), and "own row of T" pads each to --max-length. The layouts take
turns, each on its own engine with its own plan; the medians over the runs are printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import SMOLLM2
from ggft.engine.engine import Engine
from ggft.settings.training import FinetuneConfig
from ggft.setup.inputs import BaseModel, Data, load_data, open_model
from ggft.setup.open import (
    choose_settings,
    factor_of,
    lora_to_train,
    make_shape,
    open_engine,
    plan_run,
)
from ggft.system.signals import StopSignals

if TYPE_CHECKING:
    from ggft.data.batches import Batch


@dataclass
class Layout:
    """A way to lay the examples out, and the seconds that it took."""

    name: str
    engine: Engine
    steps: list[list[Batch]]
    n_examples: int
    seconds: list[float] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """Return the positions of all rows, padding included."""
        return sum(batch["tokens"].size for step in self.steps for batch in step)

    def run(self) -> None:
        """Train all steps once."""
        start = time.perf_counter()
        for i, step in enumerate(self.steps):
            count = sum(self.engine.forward_backward(batch, 1 + i)[1] for batch in step)
            self.engine.optimizer_step(1e-4, count)
        self.seconds.append(time.perf_counter() - start)


def widen(batch: Batch, n_tokens: int) -> Batch:
    """Return the batch with its rows padded to `n_tokens`."""
    more = ((0, 0), (0, n_tokens - batch["tokens"].shape[1]))
    return {
        "tokens": np.pad(batch["tokens"], more),
        "positions": np.pad(batch["positions"], more),
        "segments": np.pad(batch["segments"], more, constant_values=-1),
        "targets": np.pad(batch["targets"], more, constant_values=-1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Examples per second, packed and padded")
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of each run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    base = open_model(args.model)
    with StopSignals() as stop:
        data = load_data(
            base, args.data, max_length=args.max_length, val_split=0.0, keep_duplicates=True,
            check=stop.check,
        )  # fmt: skip
        measure(args, base, data, stop)


def measure(args: argparse.Namespace, base: BaseModel, data: Data, stop: StopSignals) -> None:
    """Lay out the same steps in each way, time them in turns, print a table."""

    def layout(name: str, packing: bool, change: Callable[[Batch], Batch]) -> Layout:
        config = FinetuneConfig(
            model=str(args.model), data=(args.data,), packing=packing, val_split=0.0
        )
        settled = choose_settings(config, data)
        lora = lora_to_train(settled, base.info, settled.rank, factor_of(settled))
        shape = make_shape(settled, lora, base.file, base.info)
        steps, plan = plan_run(settled, data, shape)
        engine = engines.enter_context(open_engine(plan, stop))
        engine.init_lora(seed=1)
        made = [steps.step(0, i, plan.n_rows, plan.n_tokens) for i in range(args.steps)]
        laid_out = [[change(batch) for batch in step] for step in made]
        return Layout(name, engine, laid_out, args.steps * steps.examples_per_step)

    with ExitStack() as engines:
        layouts = [
            layout("packed", True, lambda batch: batch),
            layout("own row", False, lambda batch: batch),
            layout(f"own row of {args.max_length}", False, lambda b: widen(b, args.max_length)),
        ]
        for _ in range(1 + args.runs):  # the first warms up
            for one in layouts:
                one.run()
    print("| | positions | examples/s | packed is faster by |")
    print("|---|---|---|---|")
    packed = layouts[0].seconds[1:]
    for one in layouts:
        ratios = [a / b for a, b in zip(one.seconds[1:], packed, strict=True)]
        speed = one.n_examples / statistics.median(one.seconds[1:])
        print(f"| {one.name} | {one.slots} | {speed:.2f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
