"""What an engine will take, said by the native code that would allocate it."""

from __future__ import annotations

from typing import Any

from ggft.engine.engine import EngineSettings, for_native, load_native, native_errors


class Forecast:
    """What an engine will take, from a model or its header alone; it takes no memory itself.

    Attributes:
        kernels: The kernels that it will run: "fused" or "ggml".
        n_parameters: LoRA parameters.
        n_vocab: Tokens of the vocabulary.
        prepackable_bytes: What all weights take that can be prepacked.
        ignored: Matrices among the targets that llama.cpp never applies an adapter to.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._native = load_native()
        native = self._native.TracedForecast if settings.traced else self._native.Forecast
        with native_errors(self._native):
            self._forecast: Any = native(for_native(settings))
        self.kernels: str = self._forecast.kernels
        self.n_parameters: int = self._forecast.n_parameters
        self.n_vocab: int = self._forecast.n_vocab
        self.prepackable_bytes: int = self._forecast.prepackable_bytes
        self.ignored: list[str] = self._forecast.ignored if settings.traced else []

    def buffers(
        self, n_rows: int, n_tokens: int, keep: bool, prepacked_bytes: int
    ) -> dict[str, int]:
        """Return what `Engine.info()["buffers"]` will say of such an engine."""
        with native_errors(self._native):
            return dict(self._forecast.buffers(n_rows, n_tokens, keep, prepacked_bytes))
