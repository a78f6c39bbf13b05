"""The traced engine: llama.cpp's own graph, cloned and differentiated by the rules.

Where there is a decoder by hand it is compared as that is, with the float64 reference. For other
architectures llama.cpp itself is the reference: its logits, and its loss with a saved adapter. The
gradient is compared with central differences of the loss, along what is left of it when half of
its numbers are set to zero; float32 leaves 1e-3 of a difference of two losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggft.adapters.adapter import AdapterMeta, write_adapter
from ggft.engine.engine import Engine
from ggft.engine.forecast import Forecast
from ggft.engine.memory import (
    PREPACKED,
    PROGRAM,
    TRACED_LIMIT,
    Limits,
    Shape,
    is_modest,
    make_plan,
)
from ggft.engine.settings import EngineSettings
from ggft.gguf.read import check_model, read_gguf
from ggft.llama.model import LlamaModel
from ggft.system.errors import InputError
from tests.support.engines import make_batch, relative, set_random_lora
from tests.support.models import Spec, write_model
from tests.support.other_models import N_LAYER, OTHERS, WINDOW, write_other
from tests.support.reference import Array

LENGTHS = ((21, 9, 6), (30,))
"""Examples longer than a window, two of them packed behind the first, and a padded row."""
T = 40

Make = Callable[..., tuple[Path, int]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Write each model once for the whole file."""
    folder: Path = tmp_path_factory.mktemp("models")
    written: dict[tuple[str, str], tuple[Path, int]] = {}

    def make_model(arch: str, type_name: str = "F32") -> tuple[Path, int]:
        key = arch, type_name
        if key not in written:
            path = folder / f"{arch}-{type_name}.gguf"
            written[key] = path, write_other(path, arch, type_name)
        return written[key]

    return make_model


def open_traced(path: Path, arch: str, **changes: Any) -> Engine:
    """Open the engine on all matrices: F32 path, one thread, rank 4."""
    targets = [name for name, shape in OTHERS[arch].block.items() if len(shape) == 2]
    defaults: dict[str, Any] = {
        "paths": [str(path)],
        "traced": True,
        "targets": targets,
        "layer_first": 0,
        "layer_last": N_LAYER,
        "rank": 4,
        "alpha": 8.0,
        "precision": "f32",
        "device": "cpu",
        "n_rows": 2,
        "n_tokens": T,
    }
    return Engine(EngineSettings(**{**defaults, **changes}))


def test_the_window_is_shorter_than_an_example() -> None:
    assert max(LENGTHS[0]) > 2 * WINDOW


@pytest.mark.parametrize("arch", OTHERS)
def test_logits_are_llama_cpps(make: Make, arch: str) -> None:
    """NMSE 1e-5: llama.cpp is asked with keys and values rounded to 16 bits."""
    path, n_vocab = make(arch)
    batch = make_batch(n_vocab, ((30,),), 30)
    with open_traced(path, arch) as engine:
        got = engine.logits(batch)[0]
    with LlamaModel(path, device="cpu", threads=1) as model:
        want = model.logits(batch["tokens"][0].tolist())
    assert relative(got, want) ** 2 <= 1e-5


@pytest.mark.parametrize("arch", OTHERS)
def test_gradient_is_the_loss_s_slope(make: Make, arch: str) -> None:
    path, n_vocab = make(arch)
    batch = make_batch(n_vocab, LENGTHS, T)
    rng = np.random.default_rng(3)
    with open_traced(path, arch) as engine:
        set_random_lora(engine)
        nats, _ = engine.forward_backward(batch, 0)
        gradient, values = engine.get_all("grad"), engine.get_all()
        assert all(g.any() for g in gradient.values())
        for _ in range(2):
            way = {name: g * rng.integers(0, 2, g.shape) for name, g in gradient.items()}
            slope = sum(float((way[name] * g).sum()) for name, g in gradient.items())
            step = 1e-3 * nats / slope
            losses = []
            for sign in (1, -1):
                for name, value in values.items():
                    moved = value + np.float32(sign * step) * way[name]
                    engine.set(name, "value", moved.astype(np.float32))
                losses.append(engine.evaluate(batch)[0])
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize("arch", OTHERS)
def test_a_saved_adapter_gives_llama_cpp_the_same_loss(
    make: Make, arch: str, tmp_path: Path
) -> None:
    path, n_vocab = make(arch)
    batch = make_batch(n_vocab, ((30,),), 30, trained=1.0)
    batch["targets"][0, :-1] = batch["tokens"][0, 1:]
    batch["targets"][0, -1] = -1
    with open_traced(path, arch) as engine:
        set_random_lora(engine)
        got = engine.token_nats(batch)[0, :-1]
        write_adapter(
            tmp_path / "a.gguf",
            engine.parameters,
            engine.get,
            AdapterMeta(architecture=arch, rank=4, alpha=8.0),
        )
    with LlamaModel(path, tmp_path / "a.gguf", device="cpu", threads=1) as model:
        want = model.nats(batch["tokens"][0].tolist())
    assert relative(got, want) <= 5e-3


@pytest.mark.parametrize("arch", OTHERS)
def test_twenty_steps_lower_the_loss_on_quantized_weights(make: Make, arch: str) -> None:
    path, n_vocab = make(arch, "Q8_0")
    batch = make_batch(n_vocab, LENGTHS, T)
    losses = []
    with open_traced(path, arch, precision="fast", dropout=0.05, threads=2) as engine:
        engine.init_lora(seed=1)
        for step in range(20):
            nats, count = engine.forward_backward(batch, step + 1)
            engine.optimizer_step(1e-2, count)
            losses.append(nats / count)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("arch", OTHERS)
def test_the_fast_path_follows_the_exact_one(make: Make, arch: str) -> None:
    path, n_vocab = make(arch, "Q8_0")
    batch = make_batch(n_vocab, LENGTHS, T)
    gradients = []
    for precision in ("f32", "fast"):
        with open_traced(path, arch, precision=precision) as engine:
            set_random_lora(engine)
            engine.forward_backward(batch, 0)
            gradients.append(flat(engine.get_all("grad")))
    assert relative(gradients[1], gradients[0]) <= 2e-2


@pytest.mark.parametrize("arch", OTHERS)
def test_packed_examples_give_the_sum_of_each_alone(make: Make, arch: str) -> None:
    path, n_vocab = make(arch)
    whole = make_batch(n_vocab, ((21, 9),), 30)
    with open_traced(path, arch) as engine:
        set_random_lora(engine)
        nats, _ = engine.forward_backward(whole, 0)
        want = flat(engine.get_all("grad"))
        engine.zero_grad()
        alone = 0.0
        for part in (slice(0, 21), slice(21, 30)):
            alone += engine.forward_backward({k: a[:, part] for k, a in whole.items()}, 0)[0]
        assert alone == pytest.approx(nats, rel=1e-6)
        assert relative(flat(engine.get_all("grad")), want) <= 1e-5


def test_later_blocks_alone(make: Make) -> None:
    """Blocks below the first one that is trained get no gradient; the others the same one."""
    path, n_vocab = make("gemma3")
    batch = make_batch(n_vocab, LENGTHS, T)
    gradients = []
    for first in (0, 1):
        with open_traced(path, "gemma3", layer_first=first) as engine:
            for name, shape in engine.parameters.items():
                rng = np.random.default_rng(len(name) + shape[0])
                size = 0.0 if name.startswith("blk.0.") else 0.1
                engine.set(name, "value", (size * rng.normal(size=shape)).astype(np.float32))
            engine.forward_backward(batch, 0)
            gradients.append(engine.get_all("grad"))
    assert set(gradients[1]) < set(gradients[0])
    for name, array in gradients[1].items():
        assert relative(array, gradients[0][name]) <= 1e-6


def test_what_llama_cpp_never_applies_is_refused(make: Make) -> None:
    path, _ = make("gemma3")
    with pytest.raises(InputError, match="no target module"):
        open_traced(path, "gemma3", targets=["attn_qkv"])


def test_an_unknown_architecture_is_refused_in_llama_cpps_words(tmp_path: Path) -> None:
    tiny = write_model(tmp_path / "a.gguf", Spec())
    raw = tiny.path.read_bytes()
    strange = raw.replace(b"llama", b"lamas")
    tiny.path.write_bytes(strange)
    with pytest.raises(InputError, match="unknown model architecture: 'lamas'"):
        open_traced(tiny.path, "gemma3")


def n_mappings(path: Path) -> int:
    """Return how often this process has a file mapped."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum(line.endswith(str(path)) for line in lines)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are Linux's to tell")
def test_a_model_is_mapped_once_for_plan_and_run_and_not_afterwards(make: Make) -> None:
    path, _ = make("phi3")
    with open_traced(path, "phi3") as engine:
        alone = n_mappings(path)
        forecast = Forecast(engine.settings)
        assert n_mappings(path) == alone
    assert n_mappings(path) == alone > 0
    forecast.close()
    assert n_mappings(path) == 0
    assert forecast.buffers(1, 16, False, 0)["weights"] > 0


def test_speed_does_not_swell_a_traced_run(make: Make) -> None:
    """Beside the file no more than TRACED_LIMIT for its sake, however much is free."""
    path, _ = make("phi3")
    with open_traced(path, "phi3") as engine:
        shape = Shape(model=check_model(read_gguf(path)), settings=engine.settings)
    large = Limits(budget_bytes=2**40, free_bytes=2**40, total_bytes=2**40)
    plan = make_plan(shape, large, n_tokens=64, max_rows=1)
    assert plan.prepacked_bytes > 0
    assert plan.keep
    parts = {**plan.parts, PROGRAM: TRACED_LIMIT}
    assert not is_modest(replace(plan, parts=parts))
    slow = replace(plan, parts={**parts, PREPACKED: 0}, prepacked=0.0)
    assert not is_modest(slow)
    assert is_modest(slow, keep_is_given=True)
    assert is_modest(replace(slow, keep=False))


def flat(arrays: dict[str, Array]) -> Array:
    """Return all arrays as one."""
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])
