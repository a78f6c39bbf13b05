#!/usr/bin/env bash
# llama-cpp-python's `repeat_penalty`, `frequency_penalty` and `presence_penalty` do not see the
# prompt: each call starts with a sampler that remembers nothing, and only tokens that it chooses
# itself are remembered.
#
# Expected by most: the last 64 tokens (`last_n_tokens_size`) count, wherever they came from, as in
# transformers and in llama.cpp's own programs.
# Consequence: a model that repeats the question, or its last answer in a chat, repeats it at any
# penalty; settings found with llama.cpp's server do something else here.
#
# Seen with llama-cpp-python 0.3.36 (llama.py, generate and _init_sampler). The model repeats its
# last token for ever; the prompt ends with A, and the penalty would make A the worst token of all.
# Prints
#   no penalty: AAAA
#   repeat_penalty: A, then others (and so for the other two)
# and exits 0 while the first token is an A in spite of the penalty.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install llama-cpp-python==0.3.36 gguf==0.19.0
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

llama_cpp.llama_log_set(silent := llama_cpp.llama_log_callback(lambda *_: None), None)
path, rng = str(Path(sys.argv[1]) / "model.gguf"), np.random.default_rng(0)
C, F = 64, 96
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
shapes = {"token_embd": (259, C), "output_norm": (C,)}  # the output is the embedding's transpose
shapes |= {f"blk.0.attn_{x}": (C, C) for x in ("q", "k", "v", "output")}
shapes |= {f"blk.0.{x}": (F, C) for x in ("ffn_gate", "ffn_up")} | {"blk.0.ffn_down": (C, F)}
shapes |= {f"blk.0.{x}_norm": (C,) for x in ("attn", "ffn")}
w = gguf.GGUFWriter(path, "llama")
w.add_vocab_size(259); w.add_context_length(64); w.add_embedding_length(C); w.add_block_count(1)
w.add_feed_forward_length(F); w.add_head_count(2); w.add_layer_norm_rms_eps(1e-5)
w.add_tokenizer_model("llama"); w.add_token_list(TOKENS); w.add_token_scores([0.0] * 259)
w.add_token_types([2, 3, 3] + [6] * 256)
for name, shape in shapes.items():
    value = np.ones(shape) if len(shape) == 1 else np.zeros(shape)  # blocks that add nothing
    value = rng.normal(size=shape) if name == "token_embd" else value
    w.add_tensor(f"{name}.weight", value.astype(np.float32))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

A = 3 + ord("A")
llama = llama_cpp.Llama(path, n_ctx=64, verbose=False)


def first_four(**penalty: float) -> list[int]:
    tokens = llama.generate([1, 3 + ord("x"), A, A], temp=0, **penalty)
    return [next(tokens) for _ in range(4)]


plain = first_four()
print("no penalty:", "".join(chr(t - 3) for t in plain))
punished = {
    name: first_four(**{name: 1e4})
    for name in ("repeat_penalty", "frequency_penalty", "presence_penalty")
}
for name, tokens in punished.items():
    rest = "others" if A not in tokens[1:] else "A again"
    print(f"{name}:", "A, then" if tokens[0] == A else "no A, then", rest)
seen = all(t[0] == A and A not in t[1:] for t in punished.values())
sys.exit(0 if plain == [A] * 4 and seen else 1)
PYTHON
