#!/usr/bin/env bash
# A LoRA adapter whose `adapter.lora.alpha` is 0 is not switched off in llama.cpp: it is applied at
# factor 1, as if alpha were the rank. The same file in PEFT, where the factor is alpha / rank,
# changes nothing.
#
# Expected by most: the factor is alpha / rank, so alpha 0 is no change.
#
# Seen with llama-cpp-python 0.3.36 (src/llama-adapter.h, get_scale). Prints how far the logits
# move for alpha 0, alpha = rank and alpha = 2 · rank, and exits 0 while the first two are equal.
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
folder, rng = Path(sys.argv[1]), np.random.default_rng(0)
C, F, RANK = 64, 96, 4
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]


def write(name: str, tensors: dict[str, np.ndarray], alpha: float | None = None) -> str:
    path = str(folder / name)
    w = gguf.GGUFWriter(path, "llama")
    if alpha is not None:
        w.add_string("general.type", "adapter")
        w.add_string("adapter.type", "lora")
        w.add_float32("adapter.lora.alpha", alpha)
    else:
        w.add_vocab_size(len(TOKENS)); w.add_context_length(64); w.add_embedding_length(C)
        w.add_block_count(1); w.add_feed_forward_length(F); w.add_head_count(2)
        w.add_head_count_kv(2); w.add_layer_norm_rms_eps(1e-5); w.add_tokenizer_model("llama")
        w.add_token_list(TOKENS); w.add_token_scores([0.0] * 259)
        w.add_token_types([2, 3, 3] + [6] * 256)
    for key, value in tensors.items():
        w.add_tensor(key, value.astype(np.float32))
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return path


def matrix(rows: int, columns: int) -> np.ndarray:
    return rng.normal(size=(rows, columns)) / np.sqrt(columns)


block = {f"blk.0.attn_{x}.weight": matrix(C, C) for x in ("q", "k", "v", "output")}
block |= {"blk.0.ffn_gate.weight": matrix(F, C), "blk.0.ffn_up.weight": matrix(F, C)}
block |= {"blk.0.ffn_down.weight": matrix(C, F), "blk.0.attn_norm.weight": np.ones(C)}
block |= {"blk.0.ffn_norm.weight": np.ones(C), "output_norm.weight": np.ones(C)}
base = write("base.gguf", {**block, "token_embd.weight": matrix(259, C), "output.weight": matrix(259, C)})
pair = {"blk.0.ffn_down.weight.lora_a": matrix(RANK, F), "blk.0.ffn_down.weight.lora_b": matrix(C, RANK)}


def logits(adapter: str | None) -> np.ndarray:
    llama = llama_cpp.Llama(base, lora_path=adapter, logits_all=True, n_ctx=64, verbose=False)
    llama.eval([1, 70, 80, 90])
    return np.array(llama.scores[3])


plain = logits(None)
moved = {a: np.abs(logits(write(f"{a}.gguf", pair, a)) - plain).max() for a in (0.0, 4.0, 8.0)}
for alpha, distance in moved.items():
    print(f"rank {RANK}, alpha {alpha:g}: logits move by {distance:.4f}")
sys.exit(0 if moved[0.0] > 0.01 and moved[0.0] == moved[4.0] != moved[8.0] else 1)
PYTHON
