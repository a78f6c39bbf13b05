"""Files are written whole or not at all, and read back as they were given."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import ggft
import ggft.gguf.write
from ggft.gguf.read import GGMLType, Value, ValueType, read_array, read_gguf
from ggft.gguf.write import TensorSource, gguf_bytes, write_gguf
from ggft.system.errors import InputError, ResourceError
from ggft.system.files import atomic_output

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "bool": True,
    "small": 7,
    "negative": -7,
    "large": 1 << 40,
    "real": 0.5,
    "text": "ä \x1b",
    "numbers": [1, -2],
    "reals": [1.0, 2.5],
    "flags": [True, False],
    "texts": ["a", "", "ü"],
    "bytes": array("B", [1, 2, 3]),
    "empty": [],
}


def source(name: str, shape: tuple[int, ...], data: bytes, pieces: int = 1) -> TensorSource:
    step = max(1, -(-len(data) // pieces))
    return TensorSource(
        name,
        GGMLType.F32,
        shape,
        lambda: [data[i : i + step] for i in range(0, len(data), step)],
    )


def some_tensors() -> list[TensorSource]:
    rng = np.random.default_rng(0)
    return [
        source("a", (5, 3), rng.bytes(60), 7),
        source("b", (1,), rng.bytes(4)),
        source("c", (2, 2, 2, 2), rng.bytes(64), 2),
    ]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(path, METADATA, some_tensors(), types={"real": ValueType.FLOAT64})
    file = read_gguf(path)
    assert list(file.metadata) == list(METADATA)
    for key, value in METADATA.items():
        got = file.metadata[key]
        assert got == value if isinstance(value, (int, float, str)) else list(got) == list(value)  # type: ignore[arg-type]
    assert file.types["real"] is ValueType.FLOAT64
    assert file.types["large"] is ValueType.UINT64
    for tensor in some_tensors():
        assert read_array(file.tensors[tensor.name]).tobytes() == b"".join(tensor.chunks())
    assert path.stat().st_size == gguf_bytes(
        METADATA, some_tensors(), types={"real": ValueType.FLOAT64}
    )
    assert leftovers(tmp_path) == []


def test_gguf_py_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    write_gguf(path, METADATA | {"general.alignment": 64}, some_tensors())
    reader: Any = gguf.GGUFReader(path)
    assert {t.name: t.data.tobytes() for t in reader.tensors} == {
        t.name: b"".join(t.chunks()) for t in some_tensors()
    }
    assert reader.fields["texts"].contents() == ["a", "", "ü"]
    assert reader.fields["large"].contents() == 1 << 40


def test_we_read_what_gguf_py_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokens", ["a", "b"])
    writer.add_float64("f64", 0.1)
    writer.add_int8("i8", -3)
    values = np.arange(64, dtype=np.float16).reshape(2, 32)
    writer.add_tensor("x", values)
    writer.add_tensor("y", np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.metadata["tokens"] == ["a", "b"]
    assert (file.metadata["f64"], file.metadata["i8"]) == (0.1, -3)
    assert file.tensors["x"].shape == (32, 2)
    assert read_array(file.tensors["x"]).tobytes() == values.tobytes()


@pytest.mark.parametrize("n_bytes", [11, 13], ids=["too few", "too many"])
def test_a_tensor_that_lies_about_its_size_leaves_nothing(tmp_path: Path, n_bytes: int) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="12 expected"):
        write_gguf(path, {}, [source("t", (3,), bytes(n_bytes))])
    assert path.read_bytes() == b"before"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError("no")])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: Any) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(6)
        raise error

    with pytest.raises((KeyboardInterrupt, RuntimeError, InputError)):
        write_gguf(tmp_path / "out.gguf", {}, [TensorSource("t", GGMLType.F32, (3,), chunks)])
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    code = (
        "import time; from ggft.gguf.write import atomic_output\n"
        f"with atomic_output({str(path)!r}):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    root = Path(ggft.__file__).parent.parent
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert len(leftovers(tmp_path)) == 1
    with atomic_output(path) as temporary:
        temporary.write_bytes(b"by another process meanwhile")
    assert len(leftovers(tmp_path)) == 1, "a running writer's file must stay"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with atomic_output(path) as temporary:
        temporary.write_bytes(b"new")
    assert leftovers(tmp_path) == []
    assert path.read_bytes() == b"new"


def test_bad_outputs(tmp_path: Path) -> None:
    source_file = tmp_path / "in.gguf"
    source_file.write_bytes(b"in")
    link = tmp_path / "link.gguf"
    link.symlink_to(source_file)
    hard = tmp_path / "hard.gguf"
    os.link(source_file, hard)
    os.mkfifo(tmp_path / "pipe")
    for output, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "out.gguf", "folder does not exist"),
        (source_file, "is the input"),
        (link, "is the input"),
        (hard, "is the input"),
        (tmp_path / "pipe", "not a regular file"),
    ):
        with pytest.raises(InputError, match=message), atomic_output(output, inputs=[source_file]):
            pass
    assert source_file.read_bytes() == b"in"
    assert leftovers(tmp_path) == []


def test_a_link_as_output_stays_a_link(tmp_path: Path) -> None:
    target = tmp_path / "real" / "out.gguf"
    target.parent.mkdir()
    link = tmp_path / "link.gguf"
    link.symlink_to(target)
    with atomic_output(link) as temporary:
        assert temporary.parent == target.parent
        temporary.write_bytes(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_full_disk_is_refused_first(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    with (
        pytest.raises(ResourceError, match="not enough disk space") as caught,
        atomic_output(path, expected_bytes=1 << 60),
    ):
        pytest.fail("must not start")
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_errors_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "out.gguf"
    path.write_bytes(b"before")

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceError, match=os.strerror(code)):
        write_gguf(path, METADATA, some_tensors())
    assert path.read_bytes() == b"before"
    assert leftovers(tmp_path) == []


def test_memory_stays_small(tmp_path: Path) -> None:
    """256 MB of tensors, made a megabyte at a time, must not add up."""
    code = f"""
import resource
from ggft.gguf.write import TensorSource, write_gguf
from ggft.gguf.types import GGMLType
chunk = bytes(1 << 20)
sources = [TensorSource(f"t{{i}}", GGMLType.F32, (1 << 18, 64), lambda: (chunk for _ in range(64)))
           for i in range(4)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_gguf({str(tmp_path / "out.gguf")!r}, {{}}, sources)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    root = Path(ggft.__file__).parent.parent
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 32 << 20
    assert time.monotonic() - started < 60
