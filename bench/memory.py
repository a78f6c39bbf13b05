"""Predicted and measured peak memory of short runs, in as many ways as memory differs.

    python bench/memory.py --data rows.json [--model FILE.gguf] [--only TEXT] [--isa NAME ...]

Each run is a process of its own. The plan should never be more than 5% below the peak and within
10% of it; the parts that the engine allocates are equal by construction (tests/engine/test_memory).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.common import SMOLLM2

SHORT = "--max-steps 1 --samples 0 --ask 0 --val-split 0 --mix none"
CONFIGURATIONS = {
    "as it comes": "",
    "recomputed": "--recompute",
    "kept": "--keep",
    "rank 64": "--rank 64",
    "rank 2, two linears": "--rank 2 --target-modules q_proj,v_proj",
    "upper blocks": "--layers 20-29",
    "f32": "--precision f32",
    "short rows, not packed": "--no-packing --max-length 128 --batch-size 8",
    "long rows": "--max-length 2048",
    "large batch": "--batch-size 32 --recompute",
    "portable": "--kernels ggml",
    "portable, recomputed": "--kernels ggml --recompute --max-length 256",
    "little memory": "--memory 420MiB",
    "one thread": "--threads 1",
}


def main() -> None:
    """Run each configuration and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SMOLLM2)
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--isa", nargs="+", default=[""], help="instruction sets to force")
    args = parser.parse_args()
    print("| configuration | instruction set | planned MiB | peak MiB | planned / peak |")
    print("|---|---|---|---|---|")
    for isa, (name, options) in itertools.product(args.isa, CONFIGURATIONS.items()):
        if args.only in name:
            planned, peak = measure(args.model, args.data, options.split(), isa)
            ratio = planned / peak
            verdict = "" if 0.95 <= ratio <= 1.10 else " **out of bounds**"
            print(
                f"| {name} | {isa or 'best'} | {planned / 2**20:.0f} | {peak / 2**20:.0f} |"
                f" {ratio:.3f}{verdict} |",
                flush=True,
            )


def measure(model: Path, data: Path, options: list[str], isa: str) -> tuple[int, int]:
    """Return the planned and the measured peak of a run of one step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "ggft", "finetune", "-m", str(model), "-d", str(data)]
        subprocess.run(
            [*command, "-o", str(run), *SHORT.split(), *options], check=True, capture_output=True,
            env={**os.environ, "GGFT_ISA": isa},
        )  # fmt: skip
        report: dict[str, Any] = json.loads((run / "report.json").read_text())
    return int(report["plan"]["total_bytes"]), int(report["peak_bytes"])


if __name__ == "__main__":
    main()
