"""What the measurements share: real text as batches, and each side as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.int32]]
ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = Path(os.environ.get("GGFT_PEER_PYTHON", ROOT / ".venv-peer" / "bin" / "python"))
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
# What a batch holds, and what stands for no token.
PADDING = {"tokens": 0, "positions": 0, "segments": -1, "targets": -1}
KEYS = tuple(PADDING)


def real_text(data: Path | None) -> str:
    """Return the text of a file (rows of instruction/input/output where it is JSON).

    Without a file it is the language reference that every CPython carries.
    """
    if data is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    text = data.read_text(encoding="utf-8")
    if data.suffix != ".json":
        return text
    rows = json.loads(text)
    return "\n\n".join(
        "\n".join(row[key] for key in ("instruction", "input", "output") if row.get(key))
        for row in rows
    )


def text_ids(model: Path, data: Path | None, n_ids: int) -> list[int]:
    """Return `n_ids` tokens of real text; a short text is repeated."""
    from ggft.llama.model import LlamaTokenizer

    tokenizer = LlamaTokenizer(model)
    # A token has at most about six characters of English: no need to tokenize a whole book.
    ids = tokenizer.encode(real_text(data)[: 8 * n_ids], special=False)
    return (ids * (-(-n_ids // len(ids))))[:n_ids]


def whole_rows(ids: Sequence[int], n_steps: int, n_rows: int, n_tokens: int) -> Arrays:
    """Return (steps, B, T) batches: each row one example, every next token trained."""
    shape = (n_steps, n_rows, n_tokens)
    n = n_steps * n_rows * n_tokens
    flat = np.asarray(ids[: n + 1], np.int32)
    return {
        "tokens": flat[:-1].reshape(shape),
        "targets": flat[1:].reshape(shape),
        "positions": np.broadcast_to(np.arange(n_tokens, dtype=np.int32), shape).copy(),
        "segments": np.zeros(shape, np.int32),
    }


def packed_rows(model: Path, data: Path | None, n_steps: int, n_rows: int, n_tokens: int) -> Arrays:
    """Return (steps, B, T) batches of packed examples of which only the second half is trained."""
    from ggft.data.batches import Batches
    from ggft.data.store import TokenStore

    ids = text_ids(model, data, 2 * n_steps * n_rows * n_tokens)
    rng, store, at = np.random.default_rng(0), TokenStore(), 0
    while at < len(ids):
        part = ids[at : at + int(rng.integers(16, n_tokens // 2))]
        store.add(part, [i >= len(part) // 2 for i in range(len(part))])
        at += len(part)
    epoch = Batches(store, rows=n_rows, n_tokens=n_tokens).epoch(0)
    batches = [batch for _, batch in zip(range(n_steps), epoch, strict=False)]
    longest = max(batch["tokens"].shape[1] for batch in batches)
    return {
        key: np.stack([_padded(batch[key], longest, PADDING[key]) for batch in batches])  # type: ignore[literal-required]
        for key in KEYS
    }


def _padded(rows: npt.NDArray[np.int32], n_tokens: int, value: int) -> npt.NDArray[np.int32]:
    return np.pad(rows, ((0, 0), (0, n_tokens - rows.shape[1])), constant_values=value)


def run_json(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Any:
    """Run a command and return the JSON of its last output line.

    Raises:
        RuntimeError: it failed; the message carries the end of its error output.
    """
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **(env or {})},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_peer(model: Path, batches: Path, *options: str | Path) -> dict[str, Any]:
    """Train with PEFT in its own environment and return its report.

    Raises:
        SystemExit: the environment is not there.
    """
    if not PEER_PYTHON.exists():
        sys.exit(f"{PEER_PYTHON} is missing: run `make bench-setup` first")
    script = ROOT / "bench" / "peer_peft.py"
    result = run_json(
        [PEER_PYTHON, script, "--model", model, "--batches", batches, *options],
        {"PYTHONPATH": ""},
    )
    return dict(result)
