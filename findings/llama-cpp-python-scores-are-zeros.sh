#!/usr/bin/env bash
# `Llama.scores` is all zeros after `Llama.eval` unless the model was opened with
# `logits_all=True`, and so are the logits handed to a `stopping_criteria`. No error, no warning;
# the array has its usual shape.
#
# Expected by most, and said of `logits_all` ("Return logits for all tokens, not just the last
# token"): without it the last token's logits are there.
# Consequence: an argmax over them is token 0 for every prompt, a perplexity is that of a uniform
# guess, a criterion that waits for a sure end token never sees one.
#
# Seen with llama-cpp-python 0.3.36 (llama.py, Llama.eval). Prints the largest logit after the last
# token, as seen both ways, and exits 0 while that is so.
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
shapes = {"token_embd": (259, C), "output": (259, C), "output_norm": (C,)}
shapes |= {f"blk.0.attn_{x}": (C, C) for x in ("q", "k", "v", "output")}
shapes |= {f"blk.0.{x}": (F, C) for x in ("ffn_gate", "ffn_up")} | {"blk.0.ffn_down": (C, F)}
shapes |= {f"blk.0.{x}_norm": (C,) for x in ("attn", "ffn")}
w = gguf.GGUFWriter(path, "llama")
w.add_vocab_size(259); w.add_context_length(64); w.add_embedding_length(C); w.add_block_count(1)
w.add_feed_forward_length(F); w.add_head_count(2); w.add_layer_norm_rms_eps(1e-5)
w.add_tokenizer_model("llama"); w.add_token_list(TOKENS); w.add_token_scores([0.0] * 259)
w.add_token_types([2, 3, 3] + [6] * 256)
for name, shape in shapes.items():
    value = np.ones(shape) if len(shape) == 1 else rng.normal(size=shape)
    w.add_tensor(f"{name}.weight", value.astype(np.float32))
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()

prompt, seen = [1, 70, 80, 90], {}
for every in (True, False):
    llama = llama_cpp.Llama(path, n_ctx=64, logits_all=every, verbose=False)
    llama.eval(prompt)
    criterion = []

    def stop(_ids: np.ndarray, logits: np.ndarray) -> bool:
        criterion.append(float(np.abs(logits).max()))
        return True

    largest = float(np.abs(llama.scores[len(prompt) - 1]).max())
    llama(prompt, max_tokens=2, stopping_criteria=llama_cpp.StoppingCriteriaList([stop]))
    seen[every] = largest, criterion[0]
    print(f"logits_all={every}: largest in scores {largest:.2f}, in a criterion {criterion[0]:.2f}")
sys.exit(0 if min(seen[True]) > 1 and max(seen[False]) == 0 else 1)
PYTHON
