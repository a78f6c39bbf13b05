"""The CPU kernels' own tests, in C++: built for this machine, as the module is, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

NATIVE = Path(__file__).resolve().parents[2] / "native"


def test_kernels_against_naive_loops(tmp_path: Path) -> None:
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=search)
    assert cmake, "cmake is missing: `make dev` installs it"

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": search},
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    nanobind = run(sys.executable, "-m", "nanobind", "--cmake_dir").strip()
    run(
        cmake, "-S", NATIVE, "-B", tmp_path, "-G", "Ninja", "-DGGFT_TESTS=ON",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind}",
    )  # fmt: skip
    run(cmake, "--build", tmp_path, "--target", "kernels_test")
    assert run(tmp_path / "kernels_test").endswith("all passed\n")
