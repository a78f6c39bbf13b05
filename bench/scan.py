"""How speed and memory depend on one thing at a time, on random models in real shapes.

    python bench/scan.py types        base types, four blocks of Llama 3.2 1B
    python bench/scan.py rows         rows per step, the default model
    python bench/scan.py vocabulary   32,000 to 262,144 tokens, one block
    python bench/scan.py 7b           Llama 2 7B Q4_0: memory above the file's size (3.8 GB of disk)

Each line is a process of its own (`ggft bench`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import ROOT, SMOLLM2, run_json

GGFT = "from ggft.cli import main; main()"


def make(folder: Path, shape: str, *options: str) -> Path:
    """Write a random model and return its path."""
    import subprocess

    path = folder / "model.gguf"
    script = ROOT / "bench" / "make_model.py"
    subprocess.run([sys.executable, script, shape, path, *options], check=True, stdout=sys.stderr)
    return path


def measure(model: Path, *options: str) -> dict[str, Any]:
    """Return the report of `ggft bench`, the model's size added."""
    command = [sys.executable, "-c", GGFT, "bench", "--model", str(model), "--json", "--no-profile"]
    result = dict(run_json([*command, *options], {"PYTHONPATH": str(ROOT)}))
    return {**result, "file_bytes": model.stat().st_size}


def types(folder: Path, steps: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield base types, the same shapes and rows for all."""
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "F16", "BF16"):
        model = make(folder, "llama-3.2-1b", "--type", name, "--layers", "4", "--vocab", "32000")
        yield name, measure(model, "--shape", "4x512", "--steps", steps, "--no-peak")


def rows(folder: Path, steps: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield numbers of rows per optimizer step."""
    for n in (1, 4, 16, 64):
        options = ("--shape", f"{n}x512", "--steps", steps, "--memory", "1500M", "--no-peak")
        yield f"{n} rows", measure(SMOLLM2, *options)


def vocabulary(folder: Path, steps: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield vocabulary sizes; what grows beyond the file is the loss head's."""
    for n in (32000, 128256, 262144):
        model = make(folder, "llama-3.2-1b", "--layers", "1", "--vocab", str(n))
        yield f"{n} tokens", measure(model, "--shape", "1x512", "--steps", steps, "--no-peak")


def seven_billion(folder: Path, steps: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield Llama 2 7B with two linears and with all, recomputing."""
    model = make(folder, "llama-2-7b", "--type", "Q4_0")
    for name, targets, shape in (
        ("q and v, 1x512", "attn_q,attn_v", "1x512"),
        ("all seven, 1x512", "all", "1x512"),
        ("all seven, 1x2048", "all", "1x2048"),
    ):
        options = ("--shape", shape, "--target-modules", targets, "--steps", steps, "--recompute")
        yield name, measure(model, *options)


SCANS = {"types": types, "rows": rows, "vocabulary": vocabulary, "7b": seven_billion}


def main() -> None:
    """Run one scan and print it as Markdown."""
    parser = argparse.ArgumentParser(description="Speed and memory, one thing at a time")
    parser.add_argument("scan", choices=SCANS)
    parser.add_argument("--steps", default="3", help="timed steps of each line")
    args = parser.parse_args()
    print("| | tokens/s | peak memory, MB | above the file, MB | of peak FLOPs |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=ROOT / "models") as folder:
        for name, result in SCANS[args.scan](Path(folder), args.steps):
            peak, above = result["peak_rss_bytes"], result["peak_rss_bytes"] - result["file_bytes"]
            used = result.get("hardware_utilisation")
            share = "" if used is None else f"{used:.0%}"
            figures = f"{result['tokens_per_s']:.0f} | {peak / 1e6:.0f} | {above / 1e6:.0f}"
            print(f"| {name} | {figures} | {share} |", flush=True)


if __name__ == "__main__":
    main()
