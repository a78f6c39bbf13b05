#!/usr/bin/env bash
# GGUF metadata may hold arrays of arrays. gguf's reader gives them back as one flat list, and
# gguf-new-metadata, asked to change a model's name, writes that flat list in the place of every
# nested array that it was to leave alone.
#
# Expected by most: an editor of one key copies the others as they are, or refuses.
# Consequence: an edited copy of a valid file has other metadata, and the lengths of the inner
# arrays are lost: [[1, 2], [3]] and [[1], [2, 3]] become the same.
#
# Seen with gguf 0.19.0 (gguf_reader.py, _get_field_parts; scripts/gguf_new_metadata.py). Prints
# the array's types before and after the name is changed, and exits 0 while they differ.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install gguf==0.19.0
"$work/venv/bin/python" - "$work" <<'PYTHON'
import subprocess
import sys
from pathlib import Path

import gguf

folder = Path(sys.argv[1])
editor = folder / "venv" / "bin" / "gguf-new-metadata"


def seen(path: Path) -> tuple[str, list[int]]:
    field = gguf.GGUFReader(path).fields["example.nested"]
    return " of ".join(t.name for t in field.types), field.contents()


after = []
for number, value in enumerate(([[1, 2], [3]], [[1], [2, 3]])):
    source, copy = folder / f"{number}.gguf", folder / f"{number}-renamed.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_array("example.nested", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    subprocess.run([editor, "--general-name", "Renamed", source, copy], check=True, stderr=-3)
    before = seen(source)
    after.append(seen(copy))
    print(f"written {value}: {before[0]}; renamed: {after[-1][0]}, {after[-1][1]}")
    if before[0] != "ARRAY of ARRAY of INT32":
        sys.exit(1)
sys.exit(0 if after == [("ARRAY of INT32", [1, 2, 3])] * 2 else 1)
PYTHON
