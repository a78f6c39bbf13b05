"""Damaged model files by the thousand, fed to everything that reads model files.

`python -m tests.support.mutants FOLDER SEED COUNT` makes COUNT mutants of tiny GGUF and GGML files
and gives each to `ggft info`, to the reader and its checks, and, when these accept it, to
llama.cpp, the engine or the converter. Only InputError and its kin may come out. A mutant is a
function of its seed alone: the last one tried stands in FOLDER/current.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ggft.adapters.adapter import AdapterMeta, read_adapter, write_adapter
from ggft.engine.engine import Engine
from ggft.engine.settings import EngineSettings
from ggft.gguf.finite import check_values
from ggft.gguf.read import check_model, read_gguf
from ggft.legacy.convert import convert_model
from ggft.legacy.reader import read_legacy
from ggft.llama.model import LlamaModel
from ggft.recipes.info import info
from ggft.settings.commands import InfoConfig
from ggft.system.errors import GgftError
from tests.gguf.test_read import DATA, TENSORS, some_kvs
from tests.support.legacy_files import RawGGML, content
from tests.support.models import Spec, write_model
from tests.support.raw_gguf import RawGGUF, model

LIMIT_S = 5
LIMIT_BYTES = 64 << 20
NUMBERS = [0, 1, 2, 3, 4, 5, 8, 13, 31, 32, 33, 255, 256, 257, 0x7FFF, 0xFFFF, 1 << 16, 1 << 20,
           (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 42) + 1, (1 << 63) - 1, 1 << 63,
           (1 << 64) - 1, (1 << 64) - 16]  # fmt: skip


def originals(folder: Path) -> dict[str, bytes]:
    """Return the whole files that mutants are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "raw": model().bytes(),
        "values": RawGGUF(some_kvs(), TENSORS, DATA).bytes(),
        "ggjt": RawGGML().bytes(),
        "ggmf": RawGGML("ggmf", 1).bytes(),
        "ggml": RawGGML("ggml").bytes(),
        "ggjt_q4_0": content("ggjt_v3_q4_0.bin"),
        "ggjt_k64": content("ggjt_v3_qkk64_q2_k.bin"),
    }
    for name, spec in (
        ("spm", Spec(types="Q4_0", vocab="spm", n_layer=1)),
        ("bpe", Spec(types="Q8_0", n_layer=1, tied=True, rope_freqs=True, bias=True)),
    ):
        files[name] = write_model(folder / f"{name}.gguf", spec).path.read_bytes()
    base = "blk.0.attn_q.weight"
    shapes = {f"{base}.lora_a": (4, 64), f"{base}.lora_b": (64, 4)}
    meta = AdapterMeta(architecture="llama", rank=4, alpha=8.0)
    adapter = folder / "adapter.gguf"
    write_adapter(adapter, shapes, lambda name: np.ones(shapes[name], np.float32), meta)
    files["adapter"] = adapter.read_bytes()
    return files


def header_bytes(data: bytes) -> int:
    """Return about how long the part before the tensor data is; most mutations go there."""
    if data[:4] == b"GGUF":
        at = data.rfind(b".weight")
        return min(len(data), at + 200 if at > 0 else len(data))
    return min(len(data), 4000)


def mutate(data: bytes, rng: random.Random, files: list[bytes]) -> bytes:
    """Return `data` with one to four things wrong."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        end = header_bytes(bytes(out)) if rng.random() < 0.9 else len(out)
        at = rng.randrange(max(1, end))
        rng.choice(MUTATIONS)(out, at, rng, files)
        if not out:
            return bytes(out)
    return bytes(out)


def _flip(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    out[at] ^= 1 << rng.randrange(8)


def _number(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    size = rng.choice((4, 8))
    value = rng.choice((*NUMBERS, len(out), len(out) - at)) & ((1 << 8 * size) - 1)
    out[at : at + size] = value.to_bytes(size, "little")


def _nudge(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    """Change what looks like a length, a count, a type or an offset by a little."""
    for pos in range(at, min(at + 64, len(out) - 4)):
        (value,) = struct.unpack_from("<I", out, pos)
        if 0 < value < 1 << 16:
            value += rng.choice((-32, -8, -1, 1, 8, 32, 256))
            struct.pack_into("<I", out, pos, value & 0xFFFFFFFF)
            return


def _truncate(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    del out[at if rng.random() < 0.5 else rng.randrange(len(out)) :]


def _append(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    out += rng.randbytes(rng.choice((1, 4, 31, 100)))


def _delete(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    del out[at : at + rng.choice((1, 4, 8, 32))]


def _insert(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    out[at:at] = bytes(rng.choice((1, 4, 8, 32)))


def _repeat(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    out[at:at] = out[at : at + rng.choice((8, 40, 200))]


def _splice(out: bytearray, at: int, rng: random.Random, files: list[bytes]) -> None:
    other = rng.choice(files)
    begin = rng.randrange(len(other))
    piece = other[begin : begin + rng.choice((4, 16, 64, 256))]
    out[at : at + len(piece)] = piece


def _text(out: bytearray, at: int, rng: random.Random, _: list[bytes]) -> None:
    piece = rng.choice((b"\x1b[2J", b"\xff\xfe", b"\0\0\0\0", b"<0xZZ>", b"llama", b"\n"))
    out[at : at + len(piece)] = piece


MUTATIONS: tuple[Callable[[bytearray, int, random.Random, list[bytes]], None], ...] = (
    _flip, _flip, _number, _number, _nudge, _nudge, _truncate, _append, _delete, _insert, _repeat,
    _splice, _text,
)  # fmt: skip


def attempt(action: Callable[[], Any]) -> bool:
    """Run an action that may refuse; say whether it accepted."""
    try:
        action()
    except GgftError:
        return False
    return True


def accepted_in_child(action: Callable[[], Any]) -> bool:
    """Do the same in a child, as commands do with what may crash in llama.cpp.

    A crash there is a refusal: the command's parent says it in one message.
    """
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGPROF, _on_timer)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os._exit(0 if attempt(action) else 2)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) in (0, 2), f"status {status}"
    return not status


def try_model(path: Path, counts: Counter[str]) -> None:
    """Give an accepted GGUF to those who read it for real."""

    def load() -> None:
        n_vocab = check_model(read_gguf(path)).n_vocab
        with LlamaModel(path, n_ctx=16, threads=1) as loaded:
            loaded.logits([0, n_vocab - 1])

    def open_engine() -> None:
        layers = check_model(read_gguf(path)).n_layer
        Engine(
            EngineSettings(
                paths=[str(path)], targets=["attn_q", "ffn_down"], layer_first=0,
                layer_last=layers, rank=1, alpha=1.0, n_rows=1, n_tokens=4, device="cpu",
            )
        ).close()  # fmt: skip

    attempt(lambda: check_values(read_gguf(path)))
    counts["loaded by llama.cpp"] += accepted_in_child(load)
    counts["opened by the engine"] += attempt(open_engine)


def try_file(path: Path, counts: Counter[str]) -> None:
    """Give one file to all readers."""
    show = InfoConfig(tensors=True, keys=True)
    counts["described"] += attempt(lambda: info(path, show))
    counts["described as JSON"] += attempt(
        lambda: info(path, InfoConfig(json=True, tensors=True, keys=True, check=True))
    )
    if attempt(lambda: check_model(read_gguf(path))):
        counts["models accepted"] += 1
        try_model(path, counts)
    counts["adapters accepted"] += attempt(lambda: read_adapter(path))
    if attempt(lambda: read_legacy(path)):
        counts["old files accepted"] += 1
        new = path.with_suffix(".new")
        if attempt(lambda: convert_model(path, new)):
            counts["converted"] += 1
            read_gguf(new)
            new.unlink()
        assert not new.exists()


def _on_timer(*_: object) -> None:
    # Not an exception: native code that calls back would swallow it.
    sys.stderr.write(f"a mutant took more than {LIMIT_S} s of CPU\n")
    sys.stderr.flush()
    os._exit(3)


def main(folder: Path, seed: int, count: int) -> None:
    """Try `count` mutants; print what became of them, the slowest and the memory used."""
    os.environ["GGML_NO_BACKTRACE"] = "1"
    files = originals(folder / "originals")
    names, contents = list(files), list(files.values())
    counts: Counter[str] = Counter()
    path = folder / "mutant"
    current = folder / "current"
    for data in contents:
        path.write_bytes(data)
        try_file(path, Counter())
    base_bytes = _peak_bytes()
    slowest_s = 0.0
    # Of CPU, so that a busy machine does not look like a hang.
    signal.signal(signal.SIGPROF, _on_timer)
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        name = rng.choice(names)
        data = mutate(files[name], rng, contents)
        path.write_bytes(data)
        current.write_text(f"{seed} {i} {name}\n")
        started_s = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        try_file(path, counts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest_s = max(slowest_s, time.process_time() - started_s)
    limit_bytes = LIMIT_BYTES + 8 * max(map(len, contents))
    grown_bytes = _peak_bytes() - base_bytes
    print(f"{count} mutants, slowest {slowest_s:.2f} s, {grown_bytes / 1e6:.1f} MB grown")
    print(", ".join(f"{number} {what}" for what, number in sorted(counts.items())))
    assert grown_bytes <= limit_bytes, f"more than {limit_bytes} bytes"


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
