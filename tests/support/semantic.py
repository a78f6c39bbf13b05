"""Model files that are well formed and mean nonsense, given to every command that reads models.

`python -m tests.support.semantic FOLDER SEED COUNT` changes one thing in a tiny model that has the
keys of SmolLM2, of Qwen3 or of a SentencePiece Llama: a metadata key becomes 0, 1, -1, 2^31, NaN,
another type, or goes; keys of other kinds of models appear; the architecture, the kind of
tokenizer, a token, its type, or a tensor's shape or type changes. COUNT mutants, or all (0), go
through COMMANDS, each in a fork of this process. One that ends by a signal, or takes long, is given
to the program itself, which must refuse it: a crash of llama.cpp is caught there. A mutant is made
from its name alone; none is kept. FOLDER/log has a line for each one that was tried, which is not
tried again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import math
import os
import pkgutil
import random
import select
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ggft
from ggft.cli import cli
from ggft.command import run
from ggft.engine.engine import load_native
from ggft.gguf.read import read_array, read_gguf
from ggft.gguf.types import GGMLType
from ggft.llama.library import load
from ggft.prompts import jinja, template
from tests.support.adapters import random_adapter
from tests.support.models import CHATML, Spec, model_metadata, value_bytes, write_model
from tests.support.raw_gguf import string
from tests.support.world import ROWS, run_program

LIMIT_S = 60
ALLOWED = (0, 2, 3, 5)
COMMANDS = {
    "info": "{model}",
    "plan": "-m {model}",
    "prepare": "-m {model} -d {folder}/rows.json",
    "finetune": "-m {model} -d {folder}/rows.json -o {out} --max-steps 1 --samples 0 --ask 1 "
    "--mix none --threads 1 --device cpu",
    "generate": "hi -m {model} -n 2 -c 64 --threads 1",
    "eval": "-m {model} -d {folder}/rows.json --threads 1 --device cpu",
    "merge": "{model} {adapter} {out} --any-base",
}
_NAMES = {
    "general.type": "model", "general.organization": "Nobody", "general.finetune": "instruct",
    "general.basename": "random", "general.size_label": "1M", "general.license": "apache-2.0",
    "general.languages": ["en"], "general.file_type": 3,
    "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.padding_token_id": 2,
}  # fmt: skip
_QUANTIZED = {
    "general.base_model.count": 1, "general.base_model.0.name": "random",
    "general.base_model.0.repo_url": "https://example.org/random", "general.tags": ["chat"],
    "general.quantized_by": "Nobody", "quantize.imatrix.file": "imatrix.dat",
    "quantize.imatrix.entries_count": 7, "tokenizer.ggml.add_eos_token": False,
}  # fmt: skip
MODELS = {
    "smollm2": Spec(n_layer=1, tied=True, chat_template=CHATML, extra=_NAMES),
    "qwen3": Spec(arch="qwen3", n_layer=1, chat_template=CHATML, extra=_NAMES | _QUANTIZED),
    "spm": Spec(n_layer=1, vocab="spm", chat_template=CHATML),
}
# Keys that llama.cpp reads of these architectures and ggft does not.
OTHER_KEYS = (
    "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count",
    "nextn_predict_layers", "attention.sliding_window", "attention.max_alibi_bias",
    "attention.clamp_kqv", "logit_scale", "residual_scale", "embedding_scale", "rope.scaling.type",
    "rope.scaling.factor", "attention.scale", "pooling_type", "attention.causal",
)  # fmt: skip
ARCHITECTURES = (
    "llama4", "qwen2", "qwen2moe", "qwen3moe", "gemma2", "phi3", "bert", "mamba", "rwkv6", "t5",
    "deepseek2", "clip",
)  # fmt: skip
TOKENIZERS = ("llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "whitespace", "no_vocab", "none")
TOKENS = ("", "<0xZZ>", "<0x41>", "<|im_end|>", "\x00", "\ud800", "a" * 5000)
TOKEN_TYPES = (0, 1, 2, 3, 4, 5, 6, 7, -1)
SHAPES = ((1,), (64, 1), (32, 64), (64, 64, 1), (64, 0), (128, 64), (64, 64, 2, 1))
TENSOR_TYPES = (GGMLType.F16, GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.I32, GGMLType.Q4_K)
VALUES = {
    "0": struct.pack("<II", 4, 0),
    "1": struct.pack("<II", 4, 1),
    "-1": struct.pack("<Ii", 5, -1),
    "2^31": struct.pack("<II", 4, 1 << 31),
    "2^40": struct.pack("<IQ", 10, 1 << 40),
    "NaN": struct.pack("<If", 6, math.nan),
    "0.0": struct.pack("<If", 6, 0.0),
    "inf": struct.pack("<If", 6, math.inf),
    "true": struct.pack("<I?", 7, True),
    "text": value_bytes("text"),
    "empty text": value_bytes(""),
    "no numbers": struct.pack("<IIQ", 9, 5, 0),
    "numbers": struct.pack("<IIQII", 9, 4, 2, 0, 1 << 31),
    "texts": value_bytes(["a"]),
    "missing": None,
}
Mutant = tuple[str, str, Any]  # the model, what is changed, and to what


@dataclass
class Original:
    """A tiny model in pieces: metadata as bytes, tensors as type, shape and data."""

    metadata: dict[str, bytes]
    tensors: dict[str, tuple[GGMLType, tuple[int, ...], bytes]]
    tokens: list[str]
    token_types: list[int]


def read_original(path: Path, spec: Spec) -> Original:
    """Take a written model to pieces."""
    metadata = model_metadata(spec)
    return Original(
        {key: value_bytes(value) for key, value in metadata.items()},
        {
            tensor.name: (tensor.type, tensor.shape, read_array(tensor).tobytes())
            for tensor in read_gguf(path).tensors.values()
        },
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.token_type"],
    )


def mutants(originals: dict[str, Original]) -> Iterator[Mutant]:
    """Yield all of them, each once, in a fixed order."""
    for model, original in originals.items():
        arch = MODELS[model].arch
        keys = list(original.metadata)
        if model == "spm":  # its other keys are those of smollm2
            keys = [key for key in keys if key.startswith("tokenizer")]
        else:
            keys += [f"{arch}.{name}" for name in OTHER_KEYS]
        for key in keys:
            for name, value in VALUES.items():
                if value != original.metadata.get(key):
                    yield model, key, name
        yield from ((model, "architecture", name) for name in ARCHITECTURES if model != "spm")
        own = MODELS[model].vocab
        yield from ((model, "tokenizer", kind) for kind in TOKENIZERS if kind != own)
        yield from ((model, "token types", number) for number in TOKEN_TYPES)
        for place in (0, 1, 2, 3, 260, len(original.tokens) - 1):
            yield from ((model, f"token {place}", text) for text in TOKENS)
            for number in TOKEN_TYPES:
                if number != original.token_types[place]:
                    yield model, f"type of token {place}", number
        for name, (_, shape, _) in original.tensors.items():
            yield from ((model, f"shape of {name}", s) for s in SHAPES if s != shape)
            yield from ((model, f"type of {name}", t.name) for t in TENSOR_TYPES)
            yield model, f"shape of {name}", None


def write_mutant(original: Original, path: Path, what: str, value: Any) -> None:
    """Write a copy with one thing changed."""
    metadata, tensors = dict(original.metadata), dict(original.tensors)
    kind, _, name = what.rpartition(" ")
    if what in ("architecture", "tokenizer"):
        key = "general.architecture" if what == "architecture" else "tokenizer.ggml.model"
        metadata[key] = value_bytes(value)
    elif what == "token types":
        metadata["tokenizer.ggml.token_type"] = value_bytes([value] * len(original.tokens))
    elif kind in ("token", "type of token"):
        key = "tokenizer.ggml.tokens" if kind == "token" else "tokenizer.ggml.token_type"
        values: list[Any] = [*(original.tokens if kind == "token" else original.token_types)]
        values[int(name)] = value.encode("utf-8", "surrogatepass") if kind == "token" else value
        metadata[key] = value_bytes(values)
    elif kind == "shape of":
        tensors.pop(name)
        if value is not None:
            tensors[name] = original.tensors[name][0], value, original.tensors[name][2]
    elif kind == "type of":
        tensors[name] = GGMLType[value], *original.tensors[name][1:]
    elif (replaced := VALUES[value]) is None:
        metadata.pop(what, None)
    else:
        metadata[what] = replaced
    path.write_bytes(_file(metadata, tensors))


def _file(
    metadata: dict[str, bytes], tensors: dict[str, tuple[GGMLType, tuple[int, ...], bytes]]
) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    head += b"".join(string(key) + value for key, value in metadata.items())
    body = b""
    for name, (tensor_type, shape, data) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", tensor_type, len(body))
        n_bytes = math.prod(shape) // tensor_type.block_size * tensor_type.block_bytes
        body += (data * (n_bytes // len(data) + 1))[:n_bytes]
        body += bytes(-len(body) % 32)
    return head + bytes(-len(head) % 32) + body


def line_of(command: str, folder: Path, model: str, file: str = "mutant") -> list[str]:
    """Return a command line for the mutant of a model."""
    out = folder / "out"
    line = COMMANDS[command].format(
        model=folder / f"{file}.gguf", adapter=folder / f"{model}.lora", folder=folder, out=out
    )
    return [command, *line.split()]


def in_a_fork(lines: dict[str, list[str]], folder: Path) -> dict[str, int]:
    """Run commands in a fork; return their exit codes, as far as it came.

    The last one is negative if a signal ended the fork, or it was late and had to be killed.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for command, line in lines.items():
                words = os.open(folder / command, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                for descriptor in (1, 2):
                    os.dup2(words, descriptor)
                os.close(words)
                remove(folder / "out")
                os.write(writer, bytes([run(cli, line)]))
        finally:
            os._exit(0)
    os.close(writer)
    codes = {}
    for command in lines:
        is_late = not select.select([reader], [], [], LIMIT_S)[0]
        code = b"" if is_late else os.read(reader, 1)
        if not code:
            os.kill(pid, 9)
            codes[command] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or -1
            break
        codes[command] = code[0]
    else:
        os.waitpid(pid, 0)
    os.close(reader)
    return codes


def try_mutant(folder: Path, model: str) -> dict[str, Any]:
    """Give a mutant to all commands; return their exit codes and what should not have been said."""
    lines = {command: line_of(command, folder, model) for command in COMMANDS}
    codes: dict[str, int] = {}
    caught, wrong = {}, {}
    while rest := {command: line for command, line in lines.items() if command not in codes}:
        codes.update(in_a_fork(rest, folder))
        *_, (command, code) = codes.items()
        if code < 0:
            caught[command] = code
            remove(folder / "out")
            started_s = time.monotonic()
            done = run_program(lines[command], cwd=folder)
            took_s = time.monotonic() - started_s
            codes[command] = done.returncode
            (folder / command).write_text(done.stderr)
            if took_s > LIMIT_S + 10:  # of which the supervisor waits most
                wrong[command] = f"took {took_s:.0f} s"
    for command, code in codes.items():
        words = (folder / command).read_text(errors="replace")
        if code not in ALLOWED or "Traceback" in words:
            wrong[command] = words[-500:]
    return {"codes": codes, "caught": caught, "wrong": wrong}


def remove(path: Path) -> None:
    """Remove what a command has written."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prepare_process() -> None:
    """Import all that commands use, once for all forks, and let these render templates themselves.

    The process for that is not what is tested here, and starting it takes longer than a command.
    """
    os.environ["GGML_NO_BACKTRACE"] = "1"
    for module in pkgutil.walk_packages(ggft.__path__, "ggft."):
        if module.name != "ggft.__main__":
            importlib.import_module(module.name)
    for name in ("gguf", "jinja2.ext", "jinja2.sandbox", "numpy.ma", "tqdm", "yaml"):
        importlib.import_module(name)
    load(), load_native()
    setattr(template, "JinjaProcess", jinja.render_here)  # noqa: B010


def warm_up(folder: Path) -> None:
    """Run commands in this process, which compiles what the forks then need not compile.

    Those of one thread: a fork does not inherit OpenMP's others.
    """
    remove(folder / "out")
    words = io.StringIO()
    with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
        codes = [
            run(cli, line_of(c, folder, "smollm2", "smollm2")) for c in COMMANDS if c != "merge"
        ]
    if any(codes):
        sys.exit(f"{codes}\n{words.getvalue()}")
    remove(folder / "out")
    gc.freeze()


def main(folder: Path, seed: int, count: int) -> None:
    """Try mutants; print what became of them, and fail where one is not refused well."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    prepare_process()
    originals = {}
    for name, spec in MODELS.items():
        tiny = write_model(folder / f"{name}.gguf", spec)
        originals[name] = read_original(tiny.path, spec)
        random_adapter(folder / f"{name}.lora", tiny)
    warm_up(folder)
    everything = list(mutants(originals))
    chosen = random.Random(seed).sample(everything, count) if count else everything
    log = folder / "log"
    tried = {}
    if log.exists():
        tried = {entry["mutant"]: entry for entry in map(json.loads, log.open())}
    with log.open("a") as file:
        for model, what, value in chosen:
            mutant = f"{model}, {what} = {value!a:.40}"
            if mutant in tried:
                continue
            write_mutant(originals[model], folder / "mutant.gguf", what, value)
            tried[mutant] = {"mutant": mutant, **try_mutant(folder, model)}
            file.write(json.dumps(tried[mutant]) + "\n")
            file.flush()
    report(list(tried.values()), len(everything))


def report(entries: list[dict[str, Any]], n_all: int) -> None:
    """Print the totals; fail for what went wrong."""
    codes = Counter(code for entry in entries for code in entry["codes"].values())
    caught = Counter(command for entry in entries for command in entry["caught"])
    print(f"{len(entries)} of {n_all} mutants through {len(COMMANDS)} commands")
    print(", ".join(f"exit code {code}: {number}" for code, number in sorted(codes.items())))
    print(f"crashes of a fork that the program itself caught: {dict(caught)}")
    wrong = [(e["mutant"], *item) for e in entries for item in e["wrong"].items()]
    if wrong:
        sys.exit("\n".join(f"{mutant}, {command}: {words}" for mutant, command, words in wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
