#!/usr/bin/env bash
# llama.cpp looks at `general.name` when it loads a vocabulary: a name with "phi3" or "phi-3" in it
# makes every control token swallow the blanks that follow. So the same tokens, merges and scores
# under another name give other ids, and a name with "phi3" in it makes a vocabulary without
# `<|endoftext|>`, `</s>`, `<s>` and `<unk>` unloadable.
#
# Expected by most: the name is for people. A merge, a requantization or a renamed fine-tune that
# writes its own name changes how prompts are tokenized.
#
# Seen with llama-cpp-python 0.3.36 (src/llama-vocab.cpp, "set attributes by model/tokenizer/
# architecture name"). Prints:
#   Mini:       [4, 262, 263] then the blanks stay
#   Phi-3 Mini: [4, 263]      the blanks are gone
# and exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36 gguf==0.19.0
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import llama_cpp

silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)


def ids(name: str) -> list[int]:
    path = str(Path(sys.argv[1]) / "vocabulary.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>"]
    kinds = [2, 3, 3, 3, 3]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁▁", "a"]
    kinds += [6] * 256 + [1, 1, 1]
    writer.add_name(name)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 261 + [-1.0, -2.0, -3.0])
    writer.add_token_types(kinds)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    return llama.tokenize(b"<|end|>  a", add_bos=False, special=True)


plain, phi = ids("Mini"), ids("Phi-3 Mini")
print("Mini:      ", plain)
print("Phi-3 Mini:", phi)
sys.exit(0 if len(plain) == 3 and phi == [plain[0], plain[2]] else 1)
PYTHON
