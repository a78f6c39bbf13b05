"""`ggft bench`: how fast a model trains here, what it takes, and how near that is to the machine.

The figures are those of the whole training step. N is the number of parameters in matrix products
(seven linears per block and the output matrix), so that a trained token costs 4·N floating-point
operations: 2·N forward and 2·N for the gradient of the activations. *Model* utilisation counts
these against the machine's peak in matrix products; *hardware* utilisation also counts the forward
that is done again where block internals are recomputed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ggft.engine.engine import Engine
from ggft.engine.memory import Plan
from ggft.engine.peak import measure_peak
from ggft.gguf.read import DecoderInfo, ModelInfo, check_model, read_gguf
from ggft.hub.download import find_model
from ggft.settings.training import BenchConfig
from ggft.setup.open import lora_to_train, make_shape, open_engine, plan_rows, usual_factor
from ggft.system.errors import InputError
from ggft.system.machine import peak_rss_bytes, process_seconds
from ggft.system.signals import StopSignals
from ggft.system.text import format_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

PARTS = {
    "dequantize": ("dequantize", "GET_ROWS"),
    "matrix products": ("matmul", "MUL_MAT"),
    "attention": ("attention", "SOFT_MAX"),
    "loss head": ("loss", "cross_entropy"),
    "LoRA": ("lora", "dropout"),
    "norms, rope, SwiGLU": ("rms", "rope", "swiglu", "RMS_NORM", "ROPE", "SWIGLU", "SILU"),
    "rest": ("",),
}
"""Parts of a step, by how the names of their nodes begin; the first that fits counts."""


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure, print, and return the figures.

    Raises:
        GgftError: a bad file or setting, or not enough memory.
    """
    n_rows, n_tokens = parse_shape(config.shape)
    file = read_gguf(find_model(config.model))
    info = check_model(file)
    by_hand = isinstance(info, DecoderInfo)  # else nodes cannot be timed one by one
    lora = lora_to_train(config, info, config.rank, usual_factor())
    shape = make_shape(config, lora, file, info)
    plan = plan_rows(config, shape, n_tokens=n_tokens, max_rows=n_rows)
    result: dict[str, Any] = {"model": file.path.name, "rows": n_rows, "row_tokens": n_tokens}
    with StopSignals() as stop, open_engine(plan, stop) as engine:
        engine.init_lora(seed=1)
        result |= time_steps(engine, plan, n_rows, info.n_vocab, config.steps)
        result["engine"] = engine.info()
        if config.profile and by_hand:
            result["profile_s"] = profile_step(engine, plan, n_rows, info.n_vocab)
    result["plan"] = plan.record()
    if config.peak and isinstance(info, DecoderInfo):
        threads = result["engine"]["threads"]
        result["gemm_flops"] = measure_peak(block_matrices(info), plan.n_rows * n_tokens, threads)
    result |= utilisation(result, info, plan)
    print_json(result) if config.json else print_table(result)
    return result


def parse_shape(text: str) -> tuple[int, int]:
    """Return (rows, tokens) of a shape such as 4x512.

    Raises:
        InputError: not two whole numbers of at least 1 and 2.
    """
    rows, _, tokens = text.lower().replace("×", "x").partition("x")
    if not (rows.isdecimal() and tokens.isdecimal() and int(rows) >= 1 and int(tokens) >= 2):
        raise InputError(
            "--shape is not rows by tokens", found=repr(text), expected="such as 4x512"
        )
    return int(rows), int(tokens)


def micro_batches(
    plan: Plan, n_rows: int, n_vocab: int, seed: int
) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
    """Yield a step of random tokens; each row is one example, every position is trained."""
    import numpy as np

    rng = np.random.default_rng(seed)
    for first in range(0, n_rows, plan.n_rows):
        shape = (min(plan.n_rows, n_rows - first), plan.n_tokens)
        ids = rng.integers(0, n_vocab, (shape[0], shape[1] + 1), dtype=np.int32)
        yield {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            "segments": np.zeros(shape, np.int32),
        }


class StepSeconds(NamedTuple):
    """Where an optimizer step's time goes, seen from outside."""

    gradient: float
    optimizer: float


def run_step(engine: Engine, plan: Plan, n_rows: int, n_vocab: int, seed: int) -> StepSeconds:
    """Run one optimizer step and return its seconds."""
    batches = list(micro_batches(plan, n_rows, n_vocab, seed))
    start, count = time.perf_counter(), 0
    for batch in batches:
        count += engine.forward_backward(batch, 0)[1]
    middle = time.perf_counter()
    engine.optimizer_step(1e-4, count)
    return StepSeconds(middle - start, time.perf_counter() - middle)


def time_steps(
    engine: Engine, plan: Plan, n_rows: int, n_vocab: int, n_steps: int
) -> dict[str, Any]:
    """Return speed and peak memory of `n_steps` steps, after a first one of one micro-batch."""
    run_step(engine, plan, min(n_rows, plan.n_rows), n_vocab, 0)
    start_s = process_seconds()
    seconds = [sum(run_step(engine, plan, n_rows, n_vocab, 1 + i)) for i in range(n_steps)]
    return {
        "start_to_first_step_s": start_s,
        "step_s": seconds,
        "tokens_per_s": n_rows * plan.n_tokens / statistics.median(seconds),
        "peak_rss_bytes": peak_rss_bytes(),
    }


def profile_step(engine: Engine, plan: Plan, n_rows: int, n_vocab: int) -> dict[str, float]:
    """Return the seconds of one step by part; each node runs alone, which costs extra.

    Our kernels dequantize weights inside the products: what the first thread spends on that counts
    as a part of its own, the loss head's share included.
    """
    engine.set_profiling(True)
    seconds = run_step(engine, plan, n_rows, n_vocab, 99)
    nodes = engine.profile()
    engine.set_profiling(False)
    parts = dict.fromkeys((*PARTS, "optimizer"), 0.0)
    for node, spent in nodes.items():
        names = (name for name, starts in PARTS.items() if node.startswith(starts))
        parts[next(names, "rest")] += spent
    parts["optimizer"] = seconds.optimizer
    parts["rest"] += max(0.0, seconds.gradient - sum(nodes.values()))
    return parts


def block_matrices(info: DecoderInfo) -> dict[tuple[int, int], int]:
    """Return how often each (C_out, C_in) occurs in a block."""
    q, kv = info.n_head * info.n_embd_head, info.n_head_kv * info.n_embd_head
    shapes = [(q, info.n_embd), (kv, info.n_embd), (kv, info.n_embd), (info.n_embd, q)]
    shapes += [(info.n_ff, info.n_embd)] * 2 + [(info.n_embd, info.n_ff)]
    return {shape: shapes.count(shape) for shape in shapes}


def utilisation(result: dict[str, Any], info: ModelInfo, plan: Plan) -> dict[str, Any]:
    """Return N, the FLOP rate, and the two utilisations where the peak was measured."""
    n_params = int(result["engine"]["n_params_matmul"])
    block = (n_params - info.n_vocab * info.n_embd) / info.n_layer
    per_token = 4.0 * n_params
    again = 0.0 if plan.keep else 2.0 * block * (info.n_layer - plan.settings.layer_first)
    rate = float(result["tokens_per_s"])
    figures: dict[str, Any] = {
        "n_params_matmul": n_params,
        "model_flops": per_token * rate,
        "hardware_flops": (per_token + again) * rate,
    }
    if "gemm_flops" in result:
        peak = max(result["gemm_flops"].values())
        figures["model_utilisation"] = figures["model_flops"] / peak
        figures["hardware_utilisation"] = figures["hardware_flops"] / peak
    return figures


def print_json(result: dict[str, Any]) -> None:
    """Print one line of JSON."""
    import json

    print(json.dumps(result))


def print_table(result: dict[str, Any]) -> None:
    """Print the figures for people."""
    engine, plan = result["engine"], result["plan"]
    print(f"model        {result['model']}, {result['n_params_matmul'] / 1e6:.1f} M in products")
    print(f"engine       {engine['precision']}: products of {engine['products']}, ", end="")
    isa = f" for {engine['isa']}" if engine["isa"] else ""
    print(f"{engine['kernels']} kernels{isa}, {engine['device']}")
    print(f"             {engine['threads']} threads, ggml {engine['ggml_version']}")
    print(f"step         {result['rows']} x {result['row_tokens']} tokens, in micro-batches of")
    print(
        f"             {plan['micro_batch_rows']} rows, block internals "
        + ("kept" if plan["keep"] else "recomputed")
    )
    print(f"tokens/s     {result['tokens_per_s']:.1f}")
    print(f"peak memory  {format_bytes(result['peak_rss_bytes'])}, mapped weights included")
    print(f"first step   {result['start_to_first_step_s']:.2f} s after the start of the process")
    for name, flops in result.get("gemm_flops", {}).items():
        print(f"GEMM {name:8}{flops / 1e9:.0f} GFLOP/s")
    if "model_utilisation" in result:
        print(f"utilisation  model {result['model_utilisation']:.1%}, ", end="")
        print(f"hardware {result['hardware_utilisation']:.1%} of the best GEMM")
    parts = result.get("profile_s", {})
    for name, seconds in parts.items():
        print(f"  {name:24}{seconds:8.3f} s  {seconds / sum(parts.values()):6.1%}")
