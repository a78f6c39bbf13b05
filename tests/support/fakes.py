"""A native engine in a few lines of NumPy, with the real one's interface and real gradients.

The model is a bigram softmax: a token's frozen logits plus, for every LoRA pair, the pair's delta
of a frozen input vector of that token, projected to the vocabulary. It ignores attention, so that a
token's loss depends only on its predecessor: enough to test recipes, resume and signals quickly.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

from ggft import _native
from ggft.gguf.read import read_gguf


class Error(Exception):
    """As the native module's: args are (kind, message)."""


class FakeEngine:
    delay_s = 0.0  # of every row, to have time for a signal
    nan_at_step = -1  # loss becomes NaN at this optimizer step

    def __init__(self, settings: dict[str, Any]) -> None:
        tensors = read_gguf(settings["paths"][0]).tensors
        self.settings = SimpleNamespace(**settings)
        self.scale = settings["alpha"] / settings["rank"]
        self.n_vocab = tensors["token_embd.weight"].shape[1]
        rng = np.random.default_rng(7)
        self.base = rng.normal(0, 0.5, (self.n_vocab, self.n_vocab))
        self.pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
        self.state: dict[str, dict[str, np.ndarray]] = {}
        for layer in range(settings["layer_first"], settings["layer_last"]):
            for target in settings["targets"]:
                name = f"blk.{layer}.{target}.weight"
                c_in, c_out = tensors[name].shape[:2]
                x = rng.normal(0, 1, (self.n_vocab, c_in))
                u = rng.normal(0, c_out**-0.5, (c_out, self.n_vocab))
                self.pairs.append((name, x, u))
                for suffix, shape in (
                    ("lora_a", (settings["rank"], c_in)),
                    ("lora_b", (c_out, settings["rank"])),
                ):
                    self.state[f"{name}.{suffix}"] = {
                        which: np.zeros(shape, np.float32) for which in ("value", "grad", "m", "v")
                    }
        self.step = 0
        self._cancel = threading.Event()

    def parameters(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, state["value"].shape) for name, state in self.state.items()]

    def get_tensor(self, name: str, which: str) -> np.ndarray:
        return np.array(self.state[name][which])

    def set_tensor(self, name: str, which: str, array: np.ndarray) -> None:
        assert array.dtype == np.float32
        self.state[name][which] = array.copy()

    def forward_backward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        segments: np.ndarray,
        targets: np.ndarray,
        seed: int,
        weights: np.ndarray | None = None,
    ) -> tuple[float, int]:
        assert weights is None  # this engine does not weigh
        if self.step == self.nan_at_step:
            raise Error("numeric", "blk.0.attn_q.weight.lora_a: the gradient is not finite")
        nats, count = 0.0, 0
        grads = {name: np.zeros_like(state["grad"]) for name, state in self.state.items()}
        for row, (ids, labels) in enumerate(zip(tokens, targets, strict=True)):
            self._wait()
            kept = labels >= 0
            ids, labels = ids[kept], labels[kept]
            rng = np.random.default_rng([seed, row]) if seed and self.settings.dropout else None
            logits, inputs = self._logits(ids, rng)
            log_p = _log_softmax(logits)
            nats -= float(log_p[np.arange(len(ids)), labels].sum())
            count += len(ids)
            d_logits = np.exp(log_p)
            d_logits[np.arange(len(ids)), labels] -= 1.0
            for (name, _, u), x in zip(self.pairs, inputs, strict=True):
                a, b = (self.state[f"{name}.{s}"]["value"] for s in ("lora_a", "lora_b"))
                dy = d_logits @ u.T * self.scale
                grads[f"{name}.lora_b"] += (dy.T @ (x @ a.T)).astype(np.float32)
                grads[f"{name}.lora_a"] += ((dy @ b).T @ x).astype(np.float32)
        _check_finite(nats)
        for name, grad in grads.items():
            self.state[name]["grad"] += grad
        return nats, count

    def evaluate(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        segments: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray | None = None,
    ) -> tuple[float, int]:
        assert weights is None  # this engine does not weigh
        self._cancel.clear()
        nats = float(self.token_nats(tokens, positions, segments, targets).sum(dtype=np.float64))
        _check_finite(nats)
        return nats, int((targets >= 0).sum())

    def token_nats(
        self, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray, targets: np.ndarray
    ) -> np.ndarray:
        nats = np.zeros(tokens.shape, np.float32)
        for row, labels in enumerate(targets):
            self._wait()
            kept = labels >= 0
            log_p = _log_softmax(self._logits(tokens[row][kept], None)[0])
            nats[row, kept] = -log_p[np.arange(kept.sum()), labels[kept]]
        return nats

    def logits(self, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
        return np.stack([self._logits(row, None)[0] for row in tokens]).astype(np.float32)

    def optimizer_step(self, lr: float, n_targets: int) -> float:
        s = self.settings
        squares = sum(
            float(np.square(state["grad"], dtype=np.float64).sum()) for state in self.state.values()
        )
        norm = np.sqrt(squares) / n_targets
        clip = min(1.0, s.max_grad_norm / norm) if s.max_grad_norm and norm else 1.0
        self.step += 1
        for state in self.state.values():
            g = state["grad"] * np.float32(clip / n_targets)
            state["m"] = (s.beta1 * state["m"] + (1 - s.beta1) * g).astype(np.float32)
            state["v"] = (s.beta2 * state["v"] + (1 - s.beta2) * g * g).astype(np.float32)
            m = state["m"] / (1 - s.beta1**self.step)
            v = state["v"] / (1 - s.beta2**self.step)
            value = state["value"] * (1 - lr * s.weight_decay) - lr * m / (np.sqrt(v) + s.eps)
            state["value"] = value.astype(np.float32)
        self.zero_grad()
        return float(norm)

    def zero_grad(self) -> None:
        for state in self.state.values():
            state["grad"][:] = 0

    def cancel(self) -> None:
        self._cancel.set()

    def info(self) -> dict[str, Any]:
        return {
            "device": "CPU", "device_description": "fake", "kernels": "fake",
            "precision": self.settings.precision, "threads": self.settings.threads,
            "ggml_version": "0", "n_params_matmul": 1, "base_bytes": 0, "buffers": {},
        }  # fmt: skip

    def graph_report(self) -> list[dict[str, Any]]:
        return []

    def _logits(
        self, ids: np.ndarray, rng: np.random.Generator | None
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return (n, V) logits and each pair's input (n, C_in) after dropout."""
        logits = self.base[ids].copy()
        inputs = []
        for name, table, u in self.pairs:
            x = table[ids]
            if rng is not None:
                keep = 1.0 - self.settings.dropout
                x = x * (rng.random(x.shape) < keep) / keep
            a, b = (self.state[f"{name}.{s}"]["value"] for s in ("lora_a", "lora_b"))
            logits += self.scale * (x @ a.T @ b.T @ u)
            inputs.append(x)
        return logits, inputs

    def _wait(self) -> None:
        if self._cancel.wait(self.delay_s):
            self._cancel.clear()
            raise Error("cancelled", "cancelled")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _check_finite(nats: float) -> None:
    if not np.isfinite(nats):
        raise Error("numeric", "the loss is not finite")


def native_module(engine: Any = FakeEngine) -> Any:
    """Return what `ggft.engine.engine.load_native` gives in tests."""
    cpu = {"name": "CPU", "description": "fake", "type": "cpu", "memory_free": 1 << 34,
           "host_pointer": True, "trains": True}  # fmt: skip
    return SimpleNamespace(
        Engine=engine, Error=Error, Forecast=_native.Forecast, devices=lambda: [cpu]
    )
