"""A llama decoder in NumPy float64: forward and hand-written backward side by side.

The oracle of the gradient tests. Every operation stands as a pair, `op` and `op_vjp`; the vjp
takes what the forward saved and the gradient of its output, and returns the gradients of its
inputs. `d` before a name means gradient. Everything is analytic (no abs, no conjugate), so the
forward also accepts complex arrays and complex-step derivatives prove each pair in
`test_reference.py`.

Letters: B rows, T tokens, C embedding, H heads, K kv-heads, D head size, F feed-forward,
V vocabulary, R rank. Weights are (C_out, C_in) as NumPy reads them from a GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


# ---- operations and their gradients ---------------------------------------------------------


def rms_norm(x: Array, w: Array, eps: float) -> Array:
    """Return x / rms(x) · w over the last axis. Source: Zhang and Sennrich 2019, eq. 4."""
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w)


def rms_norm_vjp(dy: Array, x: Array, w: Array, eps: float) -> Array:
    """Return dx = r·(g − n·mean(g·n)), with r = 1/rms, n = x·r, g = dy·w."""
    r = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    n, g = x * r, dy * w
    return np.asarray(r * (g - n * (g * n).mean(-1, keepdims=True)))


def softmax(s: Array, allowed: Array) -> Array:
    """Return the softmax over the last axis where `allowed`; rows without any are zero."""
    top = np.max(s.real, axis=-1, keepdims=True, where=allowed, initial=-1e30)
    e = np.exp(np.where(allowed, s - top, 0.0)) * allowed
    total = e.sum(-1, keepdims=True)
    return np.asarray(e / np.where(total == 0, 1.0, total))


def softmax_vjp(dp: Array, p: Array) -> Array:
    """Return ds = p·(dp − Σ dp·p)."""
    return np.asarray(p * (dp - (dp * p).sum(-1, keepdims=True)))


def silu(x: Array) -> Array:
    """Return x·sigmoid(x)."""
    return np.asarray(x / (1.0 + np.exp(-x)))


def swiglu(gate: Array, up: Array) -> Array:
    """Return silu(gate)·up. Source: Shazeer 2020, eq. 6."""
    return silu(gate) * up


def swiglu_vjp(dh: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """Return (d_gate, d_up)."""
    s = 1.0 / (1.0 + np.exp(-gate))
    return dh * up * s * (1.0 + gate * (1.0 - s)), dh * gate * s


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Args:
        n_rot: Rotated channels of each head; the rest pass through.
        base: Frequency base.
        scale: Linear position scale (1 / `rope.scaling.factor`).
        factors: (n_rot/2,) divisors of the frequencies (`rope_freqs.weight`), or None.
        neox: True rotates channel i with i + n_rot/2, False rotates 2i with 2i + 1.
    """

    n_rot: int
    base: float = 10000.0
    scale: float = 1.0
    factors: Array | None = None
    neox: bool = False

    def angles(self, positions: Array) -> Array:
        """Return the angle of each pair: (…,) positions -> (…, n_rot/2) radians."""
        freqs = self.base ** (-2.0 * np.arange(self.n_rot // 2) / self.n_rot)
        if self.factors is not None:
            freqs = freqs / self.factors
        return np.asarray(positions[..., None] * self.scale * freqs)


def rope(x: Array, positions: Array, spec: Rope, sign: float = 1.0) -> Array:
    """Rotate x (B, T, H, D) by its positions (B, T). Source: Su et al. 2021, eq. 34."""
    angles = spec.angles(positions)[..., None, :]
    cos, sin = np.cos(angles), sign * np.sin(angles)
    half = spec.n_rot // 2
    first = slice(0, half) if spec.neox else slice(0, spec.n_rot, 2)
    second = slice(half, spec.n_rot) if spec.neox else slice(1, spec.n_rot, 2)
    y: Array = x.copy()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., first] * sin + x[..., second] * cos
    return y


def rope_vjp(dy: Array, positions: Array, spec: Rope) -> Array:
    """Return dx: a rotation is orthogonal, so its gradient is the rotation back."""
    return rope(dy, positions, spec, sign=-1.0)


def attention(q: Array, k: Array, v: Array, allowed: Array) -> tuple[Array, Array]:
    """Grouped-query attention.

    Args:
        q: (B, T, H, D); query head h reads kv-head h // (H/K).
        k: (B, T, K, D).
        v: (B, T, K, D).
        allowed: (B, T, T) bool, query by key.

    Returns:
        The output (B, T, H, D) and the probabilities (B, K, H/K, T, T) that the vjp needs.
    """
    b, t, h, d = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, d)
    scores = np.einsum("bqkgd,bskd->bkgqs", grouped, k) / np.sqrt(d)
    p = softmax(scores, allowed[:, None, None])
    return np.einsum("bkgqs,bskd->bqkgd", p, v).reshape(b, t, h, d), p


def attention_vjp(dy: Array, q: Array, k: Array, v: Array, p: Array) -> tuple[Array, Array, Array]:
    """Return (dq, dk, dv); a kv-head collects the gradient of its whole group."""
    b, t, h, d = q.shape
    grouped, dout = (x.reshape(b, t, k.shape[2], -1, d) for x in (q, dy))
    ds = softmax_vjp(np.einsum("bqkgd,bskd->bkgqs", dout, v), p) / np.sqrt(d)
    dq = np.einsum("bkgqs,bskd->bqkgd", ds, k).reshape(b, t, h, d)
    dk = np.einsum("bkgqs,bqkgd->bskd", ds, grouped)
    dv = np.einsum("bkgqs,bqkgd->bskd", p, dout)
    return dq, dk, dv


@dataclass(frozen=True)
class Lora:
    """One adapted linear: y += scale·b(a·x̂), x̂ = mask·x.

    Args:
        a: (R, C_in).
        b: (C_out, R).
        scale: alpha / rank.
        mask: Dropout multipliers that broadcast to x: 0, or 1/(1 − p); None without dropout.
    """

    a: Array
    b: Array
    scale: float
    mask: Array | None = None

    def dropped(self, x: Array) -> Array:
        """Return x̂."""
        return x if self.mask is None else x * self.mask


def linear(x: Array, w: Array, bias: Array | None = None, lora: Lora | None = None) -> Array:
    """Return W·x + bias + LoRA. Source: Hu et al. 2021, eq. 3."""
    y = x @ w.T
    if bias is not None:
        y = y + bias
    if lora is not None:
        y = y + lora.scale * (lora.dropped(x) @ lora.a.T) @ lora.b.T
    return np.asarray(y)


def linear_vjp(
    dy: Array, x: Array, w: Array, lora: Lora | None = None
) -> tuple[Array, Array | None, Array | None]:
    """Return (dx, da, db); da and db are None without LoRA."""
    dx = dy @ w
    if lora is None:
        return dx, None, None
    dropped = lora.dropped(x)
    dh = lora.scale * dy @ lora.b
    dx_lora = dh @ lora.a
    dx = dx + (dx_lora if lora.mask is None else dx_lora * lora.mask)
    tokens = list(range(dy.ndim - 1))
    da = np.tensordot(dh, dropped, axes=(tokens, tokens))
    db = np.tensordot(lora.scale * dy, dropped @ lora.a.T, axes=(tokens, tokens))
    return dx, da, db


def token_nats(logits: Array, targets: Array) -> Array:
    """Return −log p(target) per position; 0 where the target is −1."""
    top = logits.real.max(-1, keepdims=True)
    log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(logits, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return np.asarray(np.where(targets >= 0, log_sum - chosen, 0.0))


def token_nats_vjp(logits: Array, targets: Array) -> Array:
    """Return the gradient of the *summed* nats: softmax − one-hot, 0 where not trained."""
    dlogits = softmax(logits, np.ones(logits.shape, bool))
    np.put_along_axis(
        dlogits,
        np.maximum(targets, 0)[..., None],
        np.take_along_axis(dlogits, np.maximum(targets, 0)[..., None], -1) - 1.0,
        -1,
    )
    return np.asarray(dlogits * (targets >= 0)[..., None])


def may_attend(segments: Array) -> Array:
    """Return (B, T, T): causal, within one example, never padding (segment −1)."""
    t = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]
    return np.asarray(same & (segments >= 0)[:, :, None] & np.tri(t, dtype=bool))


# ---- the decoder ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters that the weights' shapes do not tell."""

    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    rope: Rope
    eps: float = 1e-5


@dataclass
class Batch:
    """A micro-batch of (B, T) integer arrays; targets −1 are not trained."""

    tokens: Array
    positions: Array
    segments: Array
    targets: Array


@dataclass
class Decoder:
    """A frozen llama with LoRA on any of its linears.

    Args:
        shape: Hyper-parameters.
        weights: llama.cpp names to arrays; `output.weight` absent means a tied output.
        lora: Base tensor name (`blk.0.attn_q.weight`) to its Lora.
    """

    shape: Shape
    weights: Mapping[str, Array]
    lora: dict[str, Lora] = field(default_factory=dict)

    def _args(self, name: str) -> tuple[Array, Array | None, Lora | None]:
        weight = f"{name}.weight"
        return self.weights[weight], self.weights.get(f"{name}.bias"), self.lora.get(weight)

    def _linear(self, name: str, x: Array) -> Array:
        return linear(x, *self._args(name))

    def _linear_vjp(self, name: str, dy: Array, x: Array, grads: dict[str, Array]) -> Array:
        w, _, lora = self._args(name)
        dx, da, db = linear_vjp(dy, x, w, lora)
        if da is not None and db is not None:
            grads[f"{name}.weight.lora_a"], grads[f"{name}.weight.lora_b"] = da, db
        return dx

    def _head_norm(self, i: int, which: str, x: Array) -> Array:
        """Normalize every head of x (B, T, heads, D) where the model does (Qwen3)."""
        w = self.weights.get(f"blk.{i}.attn_{which}_norm.weight")
        return x if w is None else rms_norm(x, w, self.shape.eps)

    def _head_norm_vjp(self, i: int, which: str, dy: Array, x: Array) -> Array:
        w = self.weights.get(f"blk.{i}.attn_{which}_norm.weight")
        return dy if w is None else rms_norm_vjp(dy, x, w, self.shape.eps)

    def block(self, i: int, x: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """Run block i on x (B, T, C); return its output and what `block_vjp` needs."""
        s, s_ = self.shape, {"x": x}
        b, t, _ = x.shape
        s_["h"] = rms_norm(x, self.weights[f"blk.{i}.attn_norm.weight"], s.eps)
        q, k, v = (
            self._linear(f"blk.{i}.attn_{n}", s_["h"]).reshape(b, t, heads, -1)
            for n, heads in (("q", s.n_head), ("k", s.n_head_kv), ("v", s.n_head_kv))
        )
        s_["q_raw"], s_["k_raw"] = q, k
        q, k = self._head_norm(i, "q", q), self._head_norm(i, "k", k)
        s_["q"], s_["k"] = rope(q, batch.positions, s.rope), rope(k, batch.positions, s.rope)
        s_["v"] = v
        att, s_["p"] = attention(s_["q"], s_["k"], v, may_attend(batch.segments))
        s_["att"] = att.reshape(b, t, -1)
        s_["mid"] = x + self._linear(f"blk.{i}.attn_output", s_["att"])
        s_["f"] = rms_norm(s_["mid"], self.weights[f"blk.{i}.ffn_norm.weight"], s.eps)
        s_["gate"] = self._linear(f"blk.{i}.ffn_gate", s_["f"])
        s_["up"] = self._linear(f"blk.{i}.ffn_up", s_["f"])
        s_["act"] = swiglu(s_["gate"], s_["up"])
        return s_["mid"] + self._linear(f"blk.{i}.ffn_down", s_["act"]), s_

    def block_vjp(
        self, i: int, dy: Array, s_: dict[str, Array], batch: Batch, grads: dict[str, Array]
    ) -> Array:
        """Return dx of block i and add its LoRA gradients to `grads`; mirrors `block`."""
        s = self.shape
        b, t, _ = dy.shape
        dact = self._linear_vjp(f"blk.{i}.ffn_down", dy, s_["act"], grads)
        dgate, dup = swiglu_vjp(dact, s_["gate"], s_["up"])
        df = self._linear_vjp(f"blk.{i}.ffn_up", dup, s_["f"], grads)
        df = df + self._linear_vjp(f"blk.{i}.ffn_gate", dgate, s_["f"], grads)
        ffn_norm = self.weights[f"blk.{i}.ffn_norm.weight"]
        dmid = dy + rms_norm_vjp(df, s_["mid"], ffn_norm, s.eps)
        datt = self._linear_vjp(f"blk.{i}.attn_output", dmid, s_["att"], grads)
        dq, dk, dv = attention_vjp(
            datt.reshape(b, t, s.n_head, -1), s_["q"], s_["k"], s_["v"], s_["p"]
        )
        dq, dk = rope_vjp(dq, batch.positions, s.rope), rope_vjp(dk, batch.positions, s.rope)
        dq = self._head_norm_vjp(i, "q", dq, s_["q_raw"])
        dk = self._head_norm_vjp(i, "k", dk, s_["k_raw"])
        dh = np.zeros_like(s_["h"])
        for n, d in (("q", dq), ("k", dk), ("v", dv)):
            dh = dh + self._linear_vjp(f"blk.{i}.attn_{n}", d.reshape(b, t, -1), s_["h"], grads)
        attn_norm = self.weights[f"blk.{i}.attn_norm.weight"]
        return np.asarray(dmid + rms_norm_vjp(dh, s_["x"], attn_norm, s.eps))

    def forward(self, batch: Batch) -> tuple[Array, list[dict[str, Array]], Array]:
        """Return logits (B, T, V), each block's saved arrays and the last block's output."""
        x, saved = self.weights["token_embd.weight"][batch.tokens], []
        for i in range(self.shape.n_layer):
            x, block = self.block(i, x, batch)
            saved.append(block)
        h = rms_norm(x, self.weights["output_norm.weight"], self.shape.eps)
        return h @ self.output.T, saved, x

    @property
    def output(self) -> Array:
        """The output matrix (V, C): its own, or the token embedding where tied."""
        return self.weights.get("output.weight", self.weights["token_embd.weight"])

    def loss(self, batch: Batch) -> Any:
        """Return the summed nats over trained positions."""
        return token_nats(self.forward(batch)[0], batch.targets).sum()

    def gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        """Return the summed nats and their gradient by every lora_a and lora_b."""
        logits, saved, x = self.forward(batch)
        grads: dict[str, Array] = {}
        dh = token_nats_vjp(logits, batch.targets) @ self.output
        dx = rms_norm_vjp(dh, x, self.weights["output_norm.weight"], self.shape.eps)
        for i in reversed(range(self.shape.n_layer)):
            dx = self.block_vjp(i, dx, saved[i], batch, grads)
        return float(token_nats(logits, batch.targets).sum()), grads


# ---- the optimizer --------------------------------------------------------------------------


@dataclass
class AdamW:
    """AdamW with global-norm clipping. Source: Loshchilov and Hutter 2019, algorithm 2."""

    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 0.0
    step: int = 0
    m: dict[str, Array] = field(default_factory=dict)
    v: dict[str, Array] = field(default_factory=dict)

    def update(self, values: dict[str, Array], grads: dict[str, Array], n_targets: int) -> float:
        """Update `values` in place from summed gradients; return the norm before clipping."""
        self.step += 1
        scaled = {name: g / n_targets for name, g in grads.items()}
        norm = float(np.sqrt(sum((g * g).sum() for g in scaled.values())))
        clip = min(1.0, self.max_grad_norm / norm) if self.max_grad_norm > 0 and norm else 1.0
        for name, g in scaled.items():
            g = g * clip
            m = self.m.get(name, 0.0) * self.beta1 + (1 - self.beta1) * g
            v = self.v.get(name, 0.0) * self.beta2 + (1 - self.beta2) * g * g
            self.m[name], self.v[name] = m, v
            m_hat = m / (1 - self.beta1**self.step)
            v_hat = v / (1 - self.beta2**self.step)
            values[name] = values[name] * (1 - self.lr * self.weight_decay)
            values[name] = values[name] - self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
        return norm
