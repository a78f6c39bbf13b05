"""Model files that are well formed and mean nonsense, given to every command that reads models.

`python -m tests.support.semantic FOLDER SEED COUNT` changes one thing in a tiny model: a metadata
key becomes 0, 1, -1, 2^31, NaN, another type, or goes; keys of other kinds of models appear; the
kind of tokenizer, a token's type or a tensor's shape changes. COUNT mutants, or all (0), go through
COMMANDS, each in a fork of this process. One that ends by a signal, or takes long, is given to the
program itself, which must refuse it: a crash of llama.cpp is caught there. A mutant is made in
memory from its number alone; none is kept.
"""

from __future__ import annotations

import json
import math
import os
import random
import select
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ggft.cli import cli
from ggft.command import run
from ggft.engine.engine import load_native
from ggft.gguf.read import GGUFFile, read_array, read_gguf
from ggft.gguf.types import ValueType
from ggft.gguf.write import TensorSource, write_gguf
from ggft.llama.library import load
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, model_metadata, write_model
from tests.support.world import ROWS, run_program

LIMIT_S = 60
COMMANDS = {
    "info": "{model}",
    "plan": "-m {model}",
    "prepare": "-m {model} -d {folder}/rows.json",
    "finetune": "-m {model} -d {folder}/rows.json -o {out} --max-steps 1 --samples 1 --mix none",
    "generate": "hi -m {model} -n 2 -c 64",
    "eval": "-m {model} -d {folder}/rows.json",
    "merge": "{model} {folder}/a.gguf {out} --any-base",
}
MODELS = {
    "llama": Spec(n_layer=1, chat_template=CHATML),
    "spm": Spec(n_layer=1, vocab="spm", chat_template=CHATML),
    "qwen3": Spec(arch="qwen3", n_layer=1, chat_template=CHATML),
}
# Keys that llama.cpp reads of these architectures and ggft does not.
OTHER_KEYS = (
    "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count",
    "nextn_predict_layers", "attention.sliding_window", "attention.max_alibi_bias",
    "attention.clamp_kqv", "logit_scale", "residual_scale", "embedding_scale", "rope.scaling.type",
    "rope.scaling.factor", "attention.scale", "pooling_type", "attention.causal",
)  # fmt: skip
TOKENIZERS = ("llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "whitespace", "no_vocab", "none")
VALUES: tuple[tuple[ValueType, Any], ...] = (
    (ValueType.UINT32, 0), (ValueType.UINT32, 1), (ValueType.INT32, -1),
    (ValueType.UINT32, 1 << 31), (ValueType.FLOAT32, float("nan")), (ValueType.STRING, "text"),
    (ValueType.BOOL, True), (ValueType.UINT64, 1 << 40),
)  # fmt: skip
Mutant = tuple[str, str, Any]  # the model, what is changed, and to what


def mutants() -> Iterator[Mutant]:
    """Yield all of them, in a fixed order."""
    for model, spec in MODELS.items():
        file_keys = _keys(spec)
        for key in (*file_keys, *(f"{spec.arch}.{name}" for name in OTHER_KEYS)):
            yield from ((model, key, value) for value in VALUES)
            yield model, key, None
        for kind in TOKENIZERS:
            yield model, "tokenizer.ggml.model", (ValueType.STRING, kind)
        for token_type in (0, 2, 3, 4, 5, 6, 7, -1):
            yield model, "token types", token_type
        for name in ("blk.0.attn_q.weight", "output_norm.weight", "token_embd.weight"):
            for shape in ((1,), (64, 1), (32, 64), (64, 64, 1), (64, 0)):
                yield model, f"shape of {name}", shape


def _keys(spec: Spec) -> list[str]:
    return [key for key in model_metadata(spec) if key != "general.architecture"]


def write_mutant(original: GGUFFile, path: Path, what: str, value: Any) -> None:
    """Write a copy with one thing changed."""
    metadata, types = dict(original.metadata), dict(original.types)
    shapes = {name: tensor.shape for name, tensor in original.tensors.items()}
    if what == "token types":
        tokens: Any = metadata["tokenizer.ggml.tokens"]
        metadata["tokenizer.ggml.token_type"] = [value] * len(tokens)
    elif what.startswith("shape of "):
        shapes[what.removeprefix("shape of ")] = value
    elif value is None:
        metadata.pop(what, None)
        types.pop(what, None)
    else:
        types[what], metadata[what] = value
    sources = []
    for name, tensor in original.tensors.items():
        data = read_array(tensor).tobytes()
        data = (data * 4)[: math.prod(shapes[name]) * 4]
        sources.append(TensorSource(name, tensor.type, shapes[name], partial(iter, [data])))
    write_gguf(path, metadata, sources, types=types)


def line_of(command: str, folder: Path, model: Path) -> list[str]:
    """Return a command line; its output is not there yet."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    return [command, *COMMANDS[command].format(model=model, folder=folder, out=out).split()]


def in_a_fork(line: list[str], folder: Path) -> int:
    """Run a command in a fork; return its exit code, negative by a signal, or 99 if it is late."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 98
        try:
            words = os.open(folder / "words", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(words, descriptor)
            code = run(cli, line)
        finally:
            os._exit(code)
    os.close(writer)
    is_late = not select.select([reader], [], [], LIMIT_S)[0]
    os.close(reader)
    if is_late:
        os.kill(pid, 9)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return 99 if is_late else code


def main(folder: Path, seed: int, count: int) -> None:
    """Try mutants; print what became of them, and fail for the first that is not refused well."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    originals = {}
    for name, spec in MODELS.items():
        tiny = write_model(folder / f"{name}.gguf", spec)
        originals[name] = read_gguf(tiny.path)
        if name == "llama":
            random_adapter(folder / "a.gguf", tiny)
    load(), load_native()
    chosen = list(mutants())
    n_all = len(chosen)
    if count:
        chosen = random.Random(seed).sample(chosen, count)
    counts: Counter[str] = Counter()
    failures = []
    started_s = time.monotonic()
    for model, what, value in chosen:
        path = folder / "mutant.gguf"
        try:
            write_mutant(originals[model], path, what, value)
        except (ValueError, TypeError, OverflowError):
            counts["cannot be written"] += 1
            continue
        for command in COMMANDS:
            code = in_a_fork(line_of(command, folder, path), folder)
            if code < 0 or code == 99:
                counts[f"caught by the supervisor: {command}"] += 1
                done = run_program(line_of(command, folder, path), cwd=folder)
                code = done.returncode
                (folder / "words").write_text(done.stderr)
            counts[f"exit code {code}"] += 1
            if code not in (0, 2, 3, 5):
                words = (folder / "words").read_text(errors="replace")[-500:]
                failures.append(f"{model}, {what} = {value}, {command}: {code}\n{words}")
    print(f"{len(chosen)} of {n_all} mutants in {time.monotonic() - started_s:.0f} s", dict(counts))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
