"""A small folder with everything that commands need, and a command line for each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ggft.recipes.finetune import finetune
from ggft.settings.training import FinetuneConfig
from ggft.system.progress import Progress
from tests.support.adapters import random_adapter
from tests.support.legacy_files import RawGGML
from tests.support.models import CHATML, Spec, write_model

ROWS = [{"instruction": f"question {i}", "output": f"answer {i * 7}"} for i in range(12)]
PROGRAM = [str(Path(sys.executable).with_name("ggft"))]
TIMEOUT_S = 120
"""A hang is told from work on a busy machine by this."""

# {folder} is the world's folder, {out} a place for output that is not there yet.
COMMANDS: dict[str, str] = {
    "finetune": "-m {folder}/m.gguf -d {folder}/rows.json -o {out} --max-steps 1 --mix none --json",
    "plan": "-m {folder}/m.gguf --json",
    "prepare": "-m {folder}/m.gguf -d {folder}/rows.json --out {out}",
    "eval": "-m {folder}/m.gguf -d {folder}/rows.json --adapter {folder}/a.gguf --json",
    "generate": "hello -m {folder}/m.gguf --adapter {folder}/a.gguf -n 2",
    "chat": "-m {folder}/m.gguf -n 2",
    "download": "smollm2-135m-instruct --to {out}",
    "models": "",
    "info": "{folder}/m.gguf --check",
    "convert": "{folder}/old.bin {out}",
    "merge": "{folder}/m.gguf {folder}/a.gguf {out}",
    "quantize": "{folder}/m.gguf {out} Q8_0",
    "export": "{folder}/m.gguf {out} --to ollama --adapter {folder}/a.gguf",
    "report": "{folder}/run",
    "doctor": "",
    "bench": "-m {folder}/m.gguf --steps 1 --shape 1x16 --no-peak",
}


def make_world(folder: Path) -> None:
    """Write the models, the data, and a finished run."""
    tiny = write_model(folder / "m.gguf", Spec(n_layer=1, chat_template=CHATML))
    random_adapter(folder / "a.gguf", tiny)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "old.bin").write_bytes(RawGGML().bytes())
    finetune(
        FinetuneConfig(
            model=str(tiny.path), data=(str(folder / "rows.json"),), output=str(folder / "run"),
            max_steps=1, samples=0, threads=1, mix="none",
        ),
        Progress("quiet"),
    )  # fmt: skip


def arguments(command: str, folder: Path, out: Path) -> list[str]:
    """Return a command's line in a world."""
    line = COMMANDS[command].format(folder=folder, out=out)
    return [command, *line.split()]


def run_program(
    line: list[str],
    *,
    cwd: Path,
    stdout: Any = subprocess.PIPE,
    environment: Mapping[str, str] = {},
    before: Callable[[], None] | None = None,
    program: list[str] = PROGRAM,
) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own, as a user would."""
    return subprocess.run(
        [*program, *line], cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True,
        input="hello\n", timeout=TIMEOUT_S, check=False, preexec_fn=before,
        env={**os.environ, **environment},
    )  # fmt: skip
