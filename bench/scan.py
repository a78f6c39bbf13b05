"""How speed and memory depend on one thing at a time, on random models in real shapes.

    python bench/scan.py types        base types, four blocks of Llama 3.2 1B
    python bench/scan.py rows         rows per step, the default model
    python bench/scan.py vocabulary   32,000 to 262,144 tokens, one block
    python bench/scan.py 7b           four blocks of Llama 2 7B Q4_0, all linears
    python bench/scan.py 7b-memory    all of it: memory above the file's size (3.8 GB of disk)

Each line is a process of its own (`ggft bench`). With --runs 5 the lines take turns, five times,
and the medians are printed with the range of the speeds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import ROOT, SMOLLM2, run_json

GGFT = "from ggft.__main__ import main; main()"


@dataclass
class Line:
    """One line of a scan: a model, how to measure it, and what came out."""

    name: str
    model: Path
    options: tuple[str, ...]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def measure(self) -> None:
        """Run `ggft bench` once more."""
        command = [sys.executable, "-c", GGFT, "bench", "--model", str(self.model)]
        command += ["--json", "--no-profile", *self.options]
        self.runs.append(dict(run_json(command, {"PYTHONPATH": str(ROOT)})))

    def row(self) -> str:
        """Return the medians as a row of the table."""
        speeds = [run["tokens_per_s"] for run in self.runs]
        peak = statistics.median(run["peak_rss_bytes"] for run in self.runs)
        above = peak - self.model.stat().st_size
        rates = [run["hardware_flops"] for run in self.runs]
        figures = f"{statistics.median(speeds):.1f} | {min(speeds):.1f}–{max(speeds):.1f}"
        figures += f" | {peak / 1e6:.0f} | {above / 1e6:.0f} | {statistics.median(rates) / 1e9:.0f}"
        return f"| {self.name} | {figures} |"


def make(folder: Path, shape: str, *options: str) -> Path:
    """Write a random model and return its path."""
    path = folder / f"{'-'.join((shape, *options)).replace('--', '')}.gguf"
    if not path.exists():
        script = ROOT / "bench" / "make_model.py"
        command = [sys.executable, str(script), shape, str(path), *options]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return path


def types(folder: Path) -> Iterator[Line]:
    """Yield base types, the same shapes and rows for all."""
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "Q2_K", "IQ4_XS", "F16", "BF16"):
        model = make(folder, "llama-3.2-1b", "--type", name, "--layers", "4", "--vocab", "32000")
        yield Line(name, model, ("--shape", "1x512", "--no-peak"))


def rows(folder: Path) -> Iterator[Line]:
    """Yield numbers of rows per optimizer step."""
    for n in (1, 4, 16, 64):
        options = ("--shape", f"{n}x512", "--memory", "1500M", "--no-peak")
        yield Line(f"{n} rows", SMOLLM2, options)


def vocabulary(folder: Path) -> Iterator[Line]:
    """Yield vocabulary sizes; what grows beyond the file is the loss head's."""
    for n in (32000, 128256, 262144):
        model = make(folder, "llama-3.2-1b", "--layers", "1", "--vocab", str(n))
        yield Line(f"{n} tokens", model, ("--shape", "1x512", "--no-peak"))


def seven_billion(folder: Path) -> Iterator[Line]:
    """Yield four of its blocks (speed does not depend on how many), kept and recomputed."""
    model = make(folder, "llama-2-7b", "--type", "Q4_0", "--layers", "4")
    for shape in ("1x512", "1x2048"):
        for how in ("--keep", "--recompute"):
            yield Line(f"{shape}, {how[2:]}", model, ("--shape", shape, how, "--no-peak"))


def seven_billion_memory(folder: Path) -> Iterator[Line]:
    """Yield the whole Llama 2 7B with two linears and with all, recomputing."""
    model = make(folder, "llama-2-7b", "--type", "Q4_0")
    for name, targets in (("q and v", "attn_q,attn_v"), ("all seven", "all")):
        options = ("--shape", "1x512", "--target-modules", targets, "--recompute", "--no-peak")
        yield Line(name, model, options)


SCANS = {
    "types": types,
    "rows": rows,
    "vocabulary": vocabulary,
    "7b": seven_billion,
    "7b-memory": seven_billion_memory,
}


def main() -> None:
    """Run one scan and print it as Markdown."""
    parser = argparse.ArgumentParser(description="Speed and memory, one thing at a time")
    parser.add_argument("scan", choices=SCANS)
    parser.add_argument("--steps", default="3", help="timed steps of each line")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "models") as folder:
        lines = list(SCANS[args.scan](Path(folder)))
        for run in range(args.runs):
            for line in lines:
                line.options += ("--steps", args.steps) if run == 0 else ()
                line.measure()
                print(line.row(), file=sys.stderr, flush=True)
        print("| | tokens/s | range | peak memory, MB | above the file, MB | hardware GFLOP/s |")
        print("|---|---|---|---|---|---|")
        for line in lines:
            print(line.row())


if __name__ == "__main__":
    main()
