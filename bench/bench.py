"""ggft beside PEFT on this machine: speed, memory, utilisation. `make bench` runs it.

Every measurement is a process of its own, and the variants take turns, so that a slow minute of the
machine hits all of them; the medians over the runs are reported. A peer that is HOPELESS times
slower than the fastest of its shape, as BF16 is on a machine that has to emulate it, is measured
once and at one shape only. Writes results/NAME.json and NAME.svg, the name saying what ggft's fast
path multiplies on this processor: bf16, int16 or f32.

    python bench/bench.py [--runs 5] [--model FILE.gguf] [--no-peer] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.chart import Bar, draw
from bench.common import PEER_PYTHON, ROOT, SMOLLM2, run_json, run_peer, text_ids, whole_rows
from ggft.engine.peak import measure_peak
from ggft.gguf.read import check_decoder, read_gguf
from ggft.recipes.bench import block_matrices

GGFT = "from ggft.__main__ import main; main()"
SHAPES = ((1, 512), (4, 512))
HOPELESS = 4.0
NAMES = {"BF16": "bf16", "16-bit integers": "int16", "F32": "f32"}
OURS = {
    "ggft fast": ("--memory", "1500M"),
    "ggft fast, ≤ 600 MB": ("--memory", "600M"),
    "ggft F32": ("--precision", "f32"),
}
PEERS = {
    "PEFT F32": ("--dtype", "f32"),
    "PEFT BF16": ("--dtype", "bf16"),
    "PEFT BF16, recompute": ("--dtype", "bf16", "--recompute"),
}


@dataclass
class Variant:
    """One row of the table: how to measure it, and what came out."""

    name: str
    rows: int
    tokens: int
    ours: bool
    measure: Callable[[], dict[str, Any]]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def median(self, key: str) -> float:
        """Return the median of a figure over the runs."""
        return statistics.median(float(run[key]) for run in self.runs)


def our_variants(args: argparse.Namespace) -> list[Variant]:
    """Return ggft's variants, each run by its own command line."""
    found = []
    for rows, tokens in SHAPES:
        for name, options in OURS.items():
            command: list[str | Path] = [
                sys.executable, "-c", GGFT, "bench", "--model", args.model, "--json",
                "--shape", f"{rows}x{tokens}", "--steps", str(args.steps), "--no-peak",
                "--no-profile", "--threads", str(args.threads), *options,
            ]  # fmt: skip

            def measure(command: list[str | Path] = command) -> dict[str, Any]:
                return dict(run_json(command, {"PYTHONPATH": str(ROOT)}))

            found.append(Variant(name, rows, tokens, True, measure))
    return found


def peer_variants(args: argparse.Namespace, folder: Path) -> list[Variant]:
    """Return PEFT's variants on batches of real text."""
    found = []
    for rows, tokens in SHAPES:
        n_steps = args.steps + 1
        ids = text_ids(args.model, args.data, n_steps * rows * tokens + 1)
        batches = folder / f"{rows}x{tokens}.npz"
        np.savez(batches, **whole_rows(ids, n_steps, rows, tokens))  # type: ignore[arg-type]
        for name, options in PEERS.items():

            def measure(
                batches: Path = batches, options: tuple[str, ...] = options
            ) -> dict[str, Any]:
                limits = ("--threads", str(args.threads), "--enough", "60")
                return run_peer(args.model, batches, *limits, *options)

            found.append(Variant(name, rows, tokens, False, measure))
    return found


def gemm_peaks(args: argparse.Namespace) -> dict[str, float]:
    """Return FLOP/s by library and type at the model's shapes."""
    matrices = block_matrices(check_decoder(read_gguf(args.model)))
    n_tokens = max(rows * tokens for rows, tokens in SHAPES)
    peaks = {f"ggml {k}": v for k, v in measure_peak(matrices, n_tokens, args.threads).items()}
    if not args.no_peer:
        shapes = [f"{n_out}x{n_in}x{count}" for (n_out, n_in), count in matrices.items()]
        script = ROOT / "bench" / "peer_gemm.py"
        command = [str(PEER_PYTHON), str(script), str(n_tokens), str(args.threads), *shapes]
        peaks |= {f"torch {k}": v for k, v in run_json(command, {"PYTHONPATH": ""}).items()}
    return peaks


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Measure everything and return the whole record."""
    with tempfile.TemporaryDirectory() as folder:
        variants = our_variants(args)
        if not args.no_peer:
            variants += peer_variants(args, Path(folder))
        peaks: dict[str, list[float]] = {}
        for run in range(args.runs):
            for name, flops in gemm_peaks(args).items():
                peaks.setdefault(name, []).append(flops)
            for variant in variants:
                if is_hopeless(variant, variants):
                    continue
                variant.runs.append(variant.measure())
                speed = variant.runs[-1]["tokens_per_s"]
                print(f"run {run + 1}: {variant.name} {variant.rows}x{variant.tokens}: {speed:.0f}",
                      file=sys.stderr)  # fmt: skip
    variants = [variant for variant in variants if variant.runs]
    best = max(statistics.median(values) for values in peaks.values())
    rows = [summary(variant, best, n_params(variants)) for variant in variants]
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "products": next(v.runs[0]["engine"]["products"] for v in variants if v.ours),
        "threads": args.threads,
        "runs": args.runs,
        "model": args.model.name,
        "n_params_matmul": n_params(variants),
        "gemm_flops": {name: statistics.median(values) for name, values in peaks.items()},
        "variants": rows,
    }


def is_hopeless(variant: Variant, variants: list[Variant]) -> bool:
    """Return whether the same peer was far slower than another one at some shape."""
    if variant.ours:
        return False
    measured = [other for other in variants if other.runs and not other.ours]
    for same in measured:
        if same.name == variant.name:
            shape = [other for other in measured if other.rows == same.rows]
            fastest = max(other.median("tokens_per_s") for other in shape)
            if same.median("tokens_per_s") * HOPELESS < fastest:
                return True
    return False


def n_params(variants: list[Variant]) -> int:
    """Return N, as ggft reports it."""
    return int(next(v.runs[0]["n_params_matmul"] for v in variants if v.ours))


def summary(variant: Variant, peak: float, n: int) -> dict[str, Any]:
    """Return a row: medians, spread and utilisation.

    Model utilisation counts 4·N operations a token; hardware utilisation adds the forward pass that
    recomputation does again, for which PEFT's layers are credited with all of N.
    """
    speed = variant.median("tokens_per_s")
    speeds = [run["tokens_per_s"] for run in variant.runs]
    again = 2.0 * n if "recompute" in variant.name else 0.0
    row = {
        "name": variant.name,
        "shape": f"{variant.rows}x{variant.tokens}",
        "runs": len(variant.runs),
        "ours": variant.ours,
        "tokens_per_s": speed,
        "tokens_per_s_range": [min(speeds), max(speeds)],
        "peak_rss_bytes": variant.median("peak_rss_bytes"),
        "model_utilisation": 4.0 * n * speed / peak,
        "hardware_utilisation": (4.0 * n + again) * speed / peak,
    }
    if variant.ours:
        model = variant.median("model_flops")
        row["hardware_utilisation"] = (
            variant.median("hardware_flops") / model * 4.0 * n * speed / peak
        )
        row["start_to_first_step_s"] = variant.median("start_to_first_step_s")
    return row


def machine() -> str:
    """Return the processor's name and its cores."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def print_table(record: dict[str, Any]) -> None:
    """Print the record as Markdown."""
    print(f"{record['model']} on {record['machine']}, {record['runs']} runs\n")
    print("| | rows | tokens/s | range | peak memory, MB | model FLOPs | hardware FLOPs |")
    print("|---|---|---|---|---|---|---|")
    for row in record["variants"]:
        low, high = row["tokens_per_s_range"]
        print(
            f"| {row['name']} | {row['shape']} | {row['tokens_per_s']:.0f} | {low:.0f}–{high:.0f} "
            f"| {row['peak_rss_bytes'] / 1e6:.0f} | {row['model_utilisation']:.0%} "
            f"| {row['hardware_utilisation']:.0%} |"
        )
    peaks = ", ".join(f"{k} {v / 1e9:.0f}" for k, v in record["gemm_flops"].items())
    print(f"\nMatrix products at this model's shapes, GFLOP/s: {peaks}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--data", type=Path, help="text for the peer's batches")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each run")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-peer", action="store_true", help="ggft and ggml only")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    record = collect(args)
    print_table(record)
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    name = NAMES[record["products"]]
    (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    bars = [
        Bar(
            f"{row['name']}, {row['shape']}",
            row["ours"],
            row["tokens_per_s"],
            row["peak_rss_bytes"],
        )
        for row in sorted(record["variants"], key=lambda row: -row["tokens_per_s"])
    ]
    title = f"LoRA on {args.model.stem}, rank 8, seven linears"
    (args.out / f"{name}.svg").write_text(draw(title, bars, record["machine"]), encoding="utf-8")


if __name__ == "__main__":
    main()
