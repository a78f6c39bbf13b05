"""Training parity: ggft against PEFT on torch F32, step by step.

Both start from the same lora_a, see the same packed batches with the same masks, and use AdamW
without dropout. The bar is 0.2% of each step's loss on the F32 path and 1% on the fast path.

    python bench/training_parity.py [--model FILE.gguf] [--data rows.json] [--steps 20]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import SMOLLM2, Arrays, packed_rows, run_peer
from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings
from ggft.gguf.linears import TARGETS

BARS = {"f32": 2e-3, "fast": 1e-2}
RANK, ALPHA = 8, 32.0


def open_engine(model: Path, batches: Arrays, precision: str, threads: int) -> Engine:
    """Open ggft's engine with the peer's settings."""
    from ggft.gguf.read import check_model, read_gguf

    _, rows, tokens = batches["tokens"].shape
    settings = EngineSettings(
        paths=[str(model)], targets=list(TARGETS), layer_first=0,
        layer_last=check_model(read_gguf(model)).n_layer, rank=RANK, alpha=ALPHA,
        precision=precision, device="cpu", threads=threads, keep=True, n_rows=rows,
        n_tokens=tokens, max_grad_norm=0.0,
    )  # fmt: skip
    return Engine(settings)


def train(engine: Engine, batches: Arrays, lr: float) -> list[float]:
    """Return each step's mean loss."""
    losses = []
    for step in range(len(batches["tokens"])):
        batch = {key: array[step] for key, array in batches.items()}
        nats, count = engine.forward_backward(batch, 0)
        engine.optimizer_step(lr, count)
        losses.append(nats / count)
    return losses


def main() -> None:
    """Train both sides, print the losses, and exit with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    batches = packed_rows(args.model, args.data, args.steps, args.rows, args.tokens)
    print("trained tokens per step:", (batches["targets"] >= 0).sum((1, 2)).tolist())
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        lora, archive = Path(folder) / "lora.npz", Path(folder) / "batches.npz"
        np.savez(archive, **batches)  # type: ignore[arg-type]
        for precision in BARS:
            with open_engine(args.model, batches, precision, args.threads) as engine:
                engine.init_lora(seed=1)
                start = engine.get_all()
                losses[precision] = train(engine, batches, args.lr)
        a = {name: x for name, x in start.items() if name.endswith(".lora_a")}
        np.savez(lora, **a)  # type: ignore[arg-type]
        options = ["--lora", str(lora), "--rank", str(RANK), "--alpha", str(ALPHA)]
        options += ["--lr", str(args.lr), "--threads", str(args.threads)]
        losses["peft"] = run_peer(args.model, archive, *options)["losses"]
    print("step    PEFT F32    ggft F32        off   ggft fast        off")
    worst = dict.fromkeys(BARS, 0.0)
    for step, want in enumerate(losses["peft"]):
        line = f"{step:4}  {want:10.6f}"
        for precision in BARS:
            off = abs(losses[precision][step] / want - 1)
            worst[precision] = max(worst[precision], off)
            line += f"  {losses[precision][step]:10.6f}  {off:9.2e}"
        print(line)
    for precision, bar in BARS.items():
        print(f"{precision}: worst {worst[precision]:.2e}, bar {bar:.0e}")
    sys.exit(any(worst[precision] > bar for precision, bar in BARS.items()))


if __name__ == "__main__":
    main()
