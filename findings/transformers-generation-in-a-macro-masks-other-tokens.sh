#!/usr/bin/env bash
# `{% generation %}` marks what the assistant writes, for `return_assistant_tokens_mask`. Inside a
# macro or a `{% set %}` block transformers renders the same text and marks other tokens: the place
# of a span is counted from what the template has put out so far, and a macro puts out nothing
# before it ends. There is no warning.
#
# Expected by most: moving the turn of a chat into a macro changes neither text nor mask.
# Consequence: supervised fine-tuning learns the header of the answer, `<|im_start|>assistant`,
# or words of the user, in the place of the answer.
#
# Seen with transformers 5.24.0 and tokenizers 0.23.3 (utils/chat_template_utils.py,
# _generation_support). Prints what is marked:
#   inline: 'The answer.<|im_end|>'
#   macro:  '<|im_start|>assistant'
#   set:    '<|im_start|>assistant'
# and exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install transformers==5.24.0 tokenizers==0.23.3 jinja2==3.1.6
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON' 2>"$work/warnings"
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
model = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[]))
model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
model.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=model, additional_special_tokens=["<|im_start|>", "<|im_end|>"]
)
turn = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
)
loop = "{% for m in messages %}"
templates = {
    "inline": loop + turn + "{% endfor %}",
    "macro": "{% macro turn(m) %}" + turn + "{% endmacro %}" + loop + "{{ turn(m) }}{% endfor %}",
    "set": loop + "{% set text %}" + turn + "{% endset %}{{ text }}{% endfor %}",
}
chat = [
    {"role": "user", "content": "A question?"},
    {"role": "assistant", "content": "The answer."},
]
texts, marked = set(), {}
for name, template in templates.items():
    out = tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = [i for i, mask in zip(out["input_ids"], out["assistant_masks"]) if mask]
    texts.add(tokenizer.decode(out["input_ids"]))
    marked[name] = tokenizer.decode(kept)
    print(f"{name + ':':7} {marked[name]!r}")
answer = "The answer.<|im_end|>"
moved = marked["inline"] == answer and marked["macro"] == marked["set"] == "<|im_start|>assistant"
sys.exit(0 if len(texts) == 1 and moved else 1)
PYTHON
