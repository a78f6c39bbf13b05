"""The peer: LoRA fine-tuning with PEFT on torch (CPU), on the same GGUF dequantized at load.

Runs in its own environment (`make bench-setup`), never imports ggft, and reads what a run needs
from two NumPy archives, so that both sides train on the same numbers:

    --batches FILE.npz   tokens, positions, segments, targets: (steps, B, T) integers; a target is
                         the token to predict at its position, -1 is not trained
    --lora FILE.npz      optional: initial lora_a by llama.cpp's name, (R, C_in)

Prints one JSON line: each step's mean loss and seconds, tokens/s (the first of several steps left
out), peak RSS.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batches", required=True)
    parser.add_argument("--lora")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=32.0)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--max-grad-norm", type=float, default=0.0, help="0 is off")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--enough", type=float, default=float("inf"), metavar="SECONDS",
                        help="no further step after one of this length")  # fmt: skip
    return parser.parse_args()


def load_model(args: argparse.Namespace) -> Any:
    """Return the PEFT model, its lora_a set from `--lora` where given."""
    folder, name = os.path.split(os.path.abspath(args.model))
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        target_modules=[module.split(".")[1] for module in MODULES.values()],
    )
    model = get_peft_model(base, config)
    if args.recompute:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if args.lora:
        with np.load(args.lora) as arrays, torch.no_grad():
            for name, array in arrays.items():
                _, layer, linear = name.split(".")[:3]
                path = f"base_model.model.model.layers.{layer}.{MODULES[linear]}"
                weight = model.get_submodule(path).lora_A["default"].weight
                weight.copy_(torch.from_numpy(array))
    model.train()
    return model


def inputs(positions: Any, segments: Any) -> dict[str, Any]:
    """Return what the model needs beside tokens: nothing for whole rows, else a 4-D mask."""
    if (segments == segments[:, :1]).all():
        return {}
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    same = segments[:, :, None] == segments[:, None, :]
    return {"attention_mask": (causal & same)[:, None], "position_ids": positions}


def main() -> None:
    """Train on every batch once and report."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = load_model(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    with np.load(args.batches) as arrays:
        batches = {key: torch.from_numpy(arrays[key].astype(np.int64)) for key in arrays}
    losses, seconds = [], []
    for step in range(len(batches["tokens"])):
        start = time.perf_counter()
        targets = batches["targets"][step]
        more = inputs(batches["positions"][step], batches["segments"][step])
        logits = model(input_ids=batches["tokens"][step], use_cache=False, **more).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1
        )
        loss.backward()
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
        del logits, loss
        if seconds[-1] > args.enough:
            break
    n_tokens = batches["tokens"][0].numel()
    timed = seconds[1:] or seconds
    result = {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_s": n_tokens * len(timed) / sum(timed),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
