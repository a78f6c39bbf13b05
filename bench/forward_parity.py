"""Forward parity: mean nats of real text, from the engine and from llama.cpp's logits.

The model is requantized to each type by llama.cpp, and both sides read the same file. The bar is
0.5% of the mean negative log-likelihood, on each precision.

    python bench/forward_parity.py [--model FILE.gguf] [--data FILE] [--types F16,Q8_0,…]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import SMOLLM2, text_ids, whole_rows

TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K_M", "Q6_K", "Q2_K", "IQ4_NL")
BAR = 5e-3


def requantize(model: Path, type_name: str, out: Path) -> None:
    """Write `model` in another mix of types, as llama-quantize would.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.allow_requantize = True
    source, target = str(model).encode(), str(out).encode()
    if llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not make {type_name} of {model}")


def llama_nats(model: Path, ids: list[int], n_tokens: int, threads: int) -> float:
    """Return the mean nats from llama.cpp, over rows of `n_tokens` that start afresh."""
    from ggft.llama.model import LlamaModel

    total = 0.0
    with LlamaModel(model, n_ctx=n_tokens + 1, threads=threads, device="cpu") as llama:
        for at in range(0, len(ids) - 1, n_tokens):
            total += float(llama.nats(ids[at : at + n_tokens + 1]).sum())
    return total / (len(ids) - 1)


def engine_nats(
    model: Path, ids: list[int], n_tokens: int, threads: int, precision: str, kernels: str
) -> float:
    """Return the mean nats from ggft's engine over the same rows."""
    from ggft.engine.engine import Engine, mean_nats
    from ggft.engine.settings import EngineSettings

    n_rows = (len(ids) - 1) // n_tokens
    batches = whole_rows(ids, n_rows, 1, n_tokens)
    settings = EngineSettings(
        paths=[str(model)], targets=["attn_q"], layer_first=0, layer_last=1, rank=1, alpha=1.0,
        precision=precision, kernels=kernels, device="cpu", threads=threads, n_rows=1,
        n_tokens=n_tokens,
    )  # fmt: skip
    rows = ({key: array[i] for key, array in batches.items()} for i in range(n_rows))
    with Engine(settings) as engine:
        return mean_nats(engine, rows)[0]


def main() -> None:
    """Print the table, and exit with 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    ids = text_ids(args.model, args.data, args.rows * args.tokens + 1)
    print(f"{len(ids) - 1} tokens\ntype     llama.cpp   ggft F32      off  ggft fast      off")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name in args.types.split(","):
            model = Path(folder) / f"{name}.gguf"
            requantize(args.model, name, model)
            want = llama_nats(model, ids, args.tokens, args.threads)
            line = f"{name:8} {want:9.5f}"
            for precision in ("f32", "fast"):
                got = engine_nats(model, ids, args.tokens, args.threads, precision, args.kernels)
                worst = max(worst, abs(got / want - 1))
                line += f"  {got:9.5f}  {got / want - 1:+7.3%}"
            print(line, flush=True)
            model.unlink()
    print(f"worst {worst:.3%}, bar {BAR:.1%}")
    sys.exit(worst > BAR)


if __name__ == "__main__":
    main()
