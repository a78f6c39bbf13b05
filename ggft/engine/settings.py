"""What an engine is opened with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine is opened with.

    `traced` takes llama.cpp's graph of the model for the decoder that is written by hand.
    `train=False` is for evaluation: no gradients, no moments, no backward pass, and the adapter in
    16 bits with precision fast. `layer_first` is inclusive, `layer_last` exclusive. `keep` keeps
    the internals of blocks instead of recomputing them. `prepacked_bytes` bounds the weights that
    the CPU's kernels keep as their products read them. `n_rows` and `n_tokens` bound a micro-batch.
    """

    paths: list[str]
    traced: bool = False
    targets: list[str]
    layer_first: int
    layer_last: int
    rank: int
    alpha: float
    train: bool = True
    dropout: float = 0.0
    precision: str = "fast"
    device: str = "auto"
    kernels: str = "auto"
    threads: int = 1
    keep: bool = False
    prepacked_bytes: int = 0
    n_rows: int = 1
    n_tokens: int = 512
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def for_native(self) -> dict[str, Any]:
        """Return the settings as the native module takes them."""
        values = asdict(self)
        del values["traced"]
        return values
