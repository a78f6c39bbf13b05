"""What every test stands on: a home of its own, no network, and where the real model is."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import given

if TYPE_CHECKING:
    from tests.support.runs import Case

# Set before anything imports huggingface_hub, which reads its folders at import. Child processes
# inherit them: nothing listens on port 9, and pip asks no index.
_HOME = tempfile.TemporaryDirectory(prefix="ggft-tests-")
_ISOLATED = {
    "HOME": _HOME.name,
    "XDG_CACHE_HOME": f"{_HOME.name}/cache",
    "XDG_CONFIG_HOME": f"{_HOME.name}/config",
    "HF_HOME": f"{_HOME.name}/hf",
    "HF_ENDPOINT": "http://127.0.0.1:9",
    "PIP_NO_INDEX": "1",
    # Tiny products: NumPy's threads would only wait for one another on a busy machine.
    "OPENBLAS_NUM_THREADS": "1",
}
assert given.ENVIRONMENT.get("HOME") != _HOME.name  # it was read before this
os.environ.update(_ISOLATED)
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "GGFT_MODELS"):
    os.environ.pop(_name, None)

# Whoever starts the tests in the background, or under nohup, has these ignored, and so would every
# child of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(autouse=True)
def _isolation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give each test its own models folder, and refuse connections that leave this machine."""
    monkeypatch.setenv("GGFT_MODELS", str(tmp_path / "models"))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise AssertionError(f"a test tried to reach {address[0]}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force an instruction set: see `EACH_ISA` in tests/support/engines.py."""
    monkeypatch.setenv("GGFT_ISA", request.param)
    return str(request.param)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return a tiny model, data and a place for runs, on the fake engine."""
    from tests.support.fakes import native_module
    from tests.support.runs import Case

    monkeypatch.setattr("ggft.engine.engine.load_native", native_module)
    return Case(tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the default model, which `make test` downloads; skip where it is not."""
    path = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip("needs the default model: make model")
    return path


@pytest.fixture(scope="session")
def gpu() -> str:
    """Return the name of the device to test; fail where GGFT_TEST_DEVICE names one that is not."""
    from ggft.engine.engine import load_native

    wanted = os.environ.get("GGFT_TEST_DEVICE")
    names = [d["name"] for d in load_native().devices() if d["type"] in ("gpu", "igpu")]
    if not names and not wanted:
        pytest.skip("needs a GPU backend of ggml: make test-gpu")
    return wanted or names[0]
