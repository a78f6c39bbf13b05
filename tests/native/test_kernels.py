"""The CPU kernels' own tests, in C++, for every instruction set that this machine runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ggft.engine.engine import kernel_set
from ggft.system.errors import InputError
from tests.support.engines import ISAS, open_engine
from tests.support.models import Spec, write_model

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / Path(sys.prefix).name
"""Where `make dev` compiles the module."""
SEARCH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": SEARCH, **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def program() -> Path:
    """Compile the tests against the kernels that the module has."""
    assert (BUILD / "CMakeCache.txt").is_file(), "the module is not built here: make dev"
    cmake = shutil.which("cmake", path=SEARCH)
    assert cmake, "cmake is missing: `make dev` installs it"
    done = run(cmake, "--build", BUILD, "--target", "kernels_test")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return BUILD / "tests" / "kernels_test"


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_against_naive_loops(program: Path, isa: str) -> None:
    done = run(program, GGFT_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, *_, last = done.stdout.splitlines()
    assert first.startswith(f"{isa}, ")
    assert last == "all passed"


def test_an_instruction_set_is_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = write_model(tmp_path / "tiny.gguf", Spec())
    for isa in ISAS:
        monkeypatch.setenv("GGFT_ISA", isa)
        assert kernel_set()["isa"] == isa
        with open_engine(tiny, precision="fast") as engine:
            info = engine.info()
        assert info["isa"] == isa
        assert info["products"] == kernel_set()["products"]
    monkeypatch.delenv("GGFT_ISA")
    assert kernel_set()["isa"] == ISAS[0]
    with open_engine(tiny, kernels="ggml") as engine:
        assert engine.info()["isa"] is None


def test_an_unknown_instruction_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = write_model(tmp_path / "tiny.gguf", Spec())
    monkeypatch.setenv("GGFT_ISA", "mmx")
    with pytest.raises(InputError, match=f"'mmx'.*no instruction set.*: {', '.join(ISAS)}"):
        open_engine(tiny)


def test_an_instruction_set_that_the_processor_lacks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = {path.name for path in (BUILD / "kernels" / "CMakeFiles").glob("ggft_kernels_*.dir")}
    names = {name.removeprefix("ggft_kernels_").removesuffix(".dir") for name in compiled}
    lacking = {name.replace("_", "-") for name in names} - set(ISAS)
    if not lacking:
        pytest.skip("this machine runs every instruction set that the compiler makes")
    tiny = write_model(tmp_path / "tiny.gguf", Spec())
    for isa in lacking:
        monkeypatch.setenv("GGFT_ISA", isa)
        with pytest.raises(InputError, match=f"'{isa}'.*lacks.*: {', '.join(ISAS)}"):
            open_engine(tiny)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
def test_no_instruction_set_leaks_into_shared_code() -> None:
    """A linker keeps one of several copies of an inline function, which might be AVX-512's.

    So the objects of an instruction set must define nothing outside its namespace that another
    object could define, too.
    """
    objects = sorted((BUILD / "kernels" / "CMakeFiles").glob("ggft_kernels_*.dir/**/*.o"))
    assert objects
    shared = []
    for path in objects:
        name = re.search(r"ggft_kernels_(\w+)\.dir", str(path))
        assert name
        for line in run("nm", "-C", "--defined-only", path).stdout.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            # The personality routine's address is data.
            own = f"ggft::{name[1]}::" in symbol or symbol.startswith("DW.ref.")
            if kind in "TDBRWVu" and not own:
                shared.append(f"{path.name}: {line}")
    assert not shared
