"""Train, measure and merge from Python: `python examples/train_api.py MODEL DATA FOLDER`.

MODEL is a GGUF file or a name that `ggft models` lists, DATA a file of rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ggft


class Losses(ggft.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_step(self, step: ggft.Step) -> None:
        """Note the loss."""
        self.losses.append(step.loss)


def main(name: str, rows: str, folder: str) -> None:
    """Do everything once."""
    out = Path(folder)
    model = ggft.open_model(name)
    data = ggft.load_data(model, rows, val_split=0.1)
    before = ggft.evaluate(model, data)
    losses = Losses()
    result = ggft.train(model, data, rank=4, epochs=3, callbacks=[losses], show="quiet")
    after = ggft.evaluate(model, data, adapter=result.adapter)
    print(f"{len(losses.losses)} steps, held-out loss {before.loss:.3f} → {after.loss:.3f}")
    print(result.verdict.text)
    result.adapter.save(out / "adapter.gguf")
    report = ggft.merge(model, result.adapter, out / "merged.gguf")
    print(f"merged {len(report.tensors)} tensors into {report.output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
