#!/usr/bin/env bash
# A model card that says `language: no`, Norwegian, says `language: false` after huggingface_hub's
# ModelCard has read and written it, whatever was to be changed; a version 1.10 becomes 1.1. The
# header is read as YAML 1.1, where these are no strings. ModelCardData(language="no") is right.
#
# Expected by most: what is not touched stays as it is; a language code is text.
# Consequence: adding a tag with this library takes the language from every Norwegian model.
#
# Seen with huggingface_hub 2.4.0 and PyYAML 6.0.4 (repocard.py). Prints the header before and after
# a license is set, and exits 0 while the language changes.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install huggingface_hub==2.4.0 pyyaml==6.0.4
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

from huggingface_hub import ModelCard

path = Path(sys.argv[1]) / "README.md"
path.write_text("---\nlanguage:\n- no\n- en\nmodel_version: 1.10\n---\n# A model\n")
before = path.read_text()
card = ModelCard.load(path)
card.data.license = "mit"
card.save(path)
after = path.read_text()
print(before.split("---")[1].strip(), after.split("---")[1].strip(), sep="\n-- becomes --\n")
sys.exit(0 if "- no\n" in before and "- false\n" in after and "version: 1.1\n" in after else 1)
PYTHON
