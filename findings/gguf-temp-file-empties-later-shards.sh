#!/usr/bin/env bash
# gguf's writer can split a model into shards and can keep tensors in a temporary file meanwhile.
# Both together write every tensor's data into the first shard: the others say where their tensors
# lie, and end there.
#
# Expected by most: the two options have nothing to do with each other; a writer that finishes
# without an error has written its data.
# Consequence: a conversion with `--use-temp-file` and `--split-max-size` leaves shards that hold
# names and no weights. All data is there, behind the first shard's own, where nothing looks for it.
#
# Seen with gguf 0.19.0 (gguf_writer.py, write_tensors_to_file). Prints the sizes of three shards of
# one tensor each, in memory and through a temporary file, and exits 0 while the latter's second
# and third cannot be read.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install gguf==0.19.0
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import numpy as np

TENSORS, VALUES = 3, 4096


def shards(name: str, temporary: bool) -> list[Path]:
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    writer = gguf.GGUFWriter(
        folder / "model.gguf", "llama", use_temp_file=temporary, split_max_tensors=1
    )
    for i in range(TENSORS):
        writer.add_tensor(f"tensor.{i}", np.full(VALUES, i + 1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def content(path: Path) -> str:
    try:
        tensor = gguf.GGUFReader(path).tensors[0]
    except ValueError as error:
        return f"unreadable, {error}"
    return f"{tensor.name} = {tensor.data[0]:g}"


found = {name: shards(name, name == "temporary file") for name in ("memory", "temporary file")}
for name, paths in found.items():
    for path in paths:
        print(f"{name}: {path.name} {path.stat().st_size:6} bytes, {content(path)}")
whole = [content(p) == f"tensor.{i} = {i + 1}" for i, p in enumerate(found["memory"])]
sizes = [p.stat().st_size for p in found["temporary file"]]
empty = sizes[0] > TENSORS * VALUES * 4 and max(sizes[1:]) < VALUES * 4
sys.exit(0 if all(whole) and len(whole) == len(sizes) == TENSORS and empty else 1)
PYTHON
