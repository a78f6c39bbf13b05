#!/usr/bin/env bash
# mlx-lm's loss counts one token too many: after the last token of each row the model is trained to
# say token 0, which is only what the batch is padded with. Rows are always padded by one at least,
# so it is every row that is not cut at the maximal length.
#
# Expected by most: padding is masked; a row of n tokens has n - 1 targets.
# Consequence: the more, the shorter the answers are: of an answer of one word and its end token a
# third of the loss is about token 0, "!" in many vocabularies. Training and validation losses are
# not comparable with other trainers', and a model that runs on past its end token says it.
#
# Seen with mlx-lm 0.32.2 and mlx 0.32.4 (mlx_lm/tuner/trainer.py, default_loss). A row of tokens
# 5 6 7 8, the first two its prompt, goes through iterate_batches and default_loss with models that
# always say the same token. Prints
#   targets: 0 once, 7 once, 8 once; counted: 3
# and exits 0 while that is so.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 tqdm
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON' 2>"$work/warnings"
import sys

import mlx.core as mx
from mlx_lm.tuner.trainer import default_loss, iterate_batches

mx.set_default_device(mx.cpu)
ROW, PROMPT, VOCABULARY, SURE = [5, 6, 7, 8], 2, 10, 20.0
((tokens, spans),) = iterate_batches([(ROW, PROMPT)], batch_size=1, max_seq_length=256)
targets, counted = {}, 0
for token in range(VOCABULARY):
    logits = mx.where(mx.arange(VOCABULARY) == token, SURE, 0.0)
    same = lambda x: mx.broadcast_to(logits, (*x.shape, VOCABULARY))
    mean, count = default_loss(same, tokens, spans)
    counted = count.item()
    right = counted - round(mean.item() * counted / SURE)  # a wrong one costs SURE
    if right:
        targets[token] = right
print("targets:", ", ".join(f"{token} once" for token in targets), end="; ")
print(f"counted: {counted}")
sys.exit(0 if targets == {0: 1, 7: 1, 8: 1} and counted == 3 else 1)
PYTHON
