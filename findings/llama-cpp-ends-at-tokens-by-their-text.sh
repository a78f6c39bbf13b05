#!/usr/bin/env bash
# llama.cpp ends a generation not only at the file's end tokens: it looks through the vocabulary for
# texts that it knows (<|im_end|>, <|end|>, <end_of_turn>, <EOT>, …), makes such a token a control
# token whatever its type in the file, and stops at each of them.
#
# Expected by most: `tokenizer.ggml.eos_token_id` and `eot_token_id` say where an answer ends, and a
# token of the type NORMAL is text.
# Consequence: a vocabulary that uses one of these as a separator within answers gets them cut off
# there, and the separator is missing from detokenized text; another text for the same token id,
# and the answer goes on. transformers stops where `eos_token_id` says.
#
# Seen with llama-cpp-python 0.3.36 (src/llama-vocab.cpp, "maintain a list of tokens that cause
# end-of-generation"). All tokens below are NORMAL and </s> is the end token. Prints
#   <|end|> ends, is ''
#   <|fin|> goes on, is '<|fin|>'
# and so on, and exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36 gguf==0.19.0
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import llama_cpp

llama_cpp.llama_log_set(silent := llama_cpp.llama_log_callback(lambda *_: None), None)
known = ["<|end|>", "<|im_end|>", "<end_of_turn>", "<EOT>"]
others = ["<|fin|>", "<|section|>"]
path = str(Path(sys.argv[1]) / "vocabulary.gguf")
tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
first = len(tokens)
writer = gguf.GGUFWriter(path, "llama")
writer.add_tokenizer_model("llama")
writer.add_token_list(tokens + known + others)
writer.add_token_scores([0.0] * (first + 6))
writer.add_token_types([2, 3, 3] + [6] * 256 + [gguf.TokenType.NORMAL] * 6)
writer.add_vocab_size(first + 6)
writer.add_eos_token_id(2)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
seen = {}
for token, text in enumerate(known + others, first):
    ends = llama_cpp.llama_vocab_is_eog(vocabulary, token)
    seen[text] = ends, llama.detokenize([token]).decode()
    print(f"{text} {'ends' if ends else 'goes on'}, is {seen[text][1]!r}")
cut = all(seen[text] == (True, "") for text in known)
sys.exit(0 if cut and all(seen[text] == (False, text) for text in others) else 1)
PYTHON
