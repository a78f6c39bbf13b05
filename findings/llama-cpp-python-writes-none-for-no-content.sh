#!/usr/bin/env bash
# A message whose content is null, as an assistant's is that only calls a tool, is the word "None"
# in a prompt of llama-cpp-python. transformers, with the same template and the same chat, leaves
# out keys that are null before the template sees them, and writes nothing.
#
# Expected by most: one template and one chat make one prompt; llama-cpp-python sets its Jinja up
# after transformers and says so.
# Consequence: a model that was fine-tuned through transformers meets "None" where it learnt an
# empty turn, in every conversation with tool calls.
#
# Seen with llama-cpp-python 0.3.36 (llama_chat_format.py, Jinja2ChatFormatter) and transformers
# 5.24.0 (apply_chat_template). Prints what follows the assistant's header in both:
#   transformers: '<|im_end|>', llama-cpp-python: 'None<|im_end|>'
# and exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36 transformers==5.24.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON' 2>"$work/warnings"
import sys

from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

template = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
chat = [
    {"role": "user", "content": "What is the weather?"},
    {"role": "assistant", "content": None, "tool_calls": [call]},
    {"role": "tool", "content": "Sunny.", "tool_call_id": "1"},
]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
formatter = Jinja2ChatFormatter(template, eos_token="", bos_token="", add_generation_prompt=False)
prompts = {
    "transformers": tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False),
    "llama-cpp-python": formatter(messages=chat).prompt,
}
header = "<|im_start|>assistant\n"
turns = {name: p.split(header)[1].split("\n")[0] for name, p in prompts.items()}
print(", ".join(f"{name}: {turn!r}" for name, turn in turns.items()))
sys.exit(0 if list(turns.values()) == ["<|im_end|>", "None<|im_end|>"] else 1)
PYTHON
