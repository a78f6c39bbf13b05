"""What an engine will take, said by the native code that would allocate it."""

from __future__ import annotations

from typing import Any

from ggft.engine.engine import load_native, native_errors
from ggft.engine.settings import EngineSettings


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
        self._settings = settings
        self._native = load_native()
        self._forecast: Any = None
        forecast = self._opened()
        self.kernels: str = forecast.kernels
        self.n_parameters: int = forecast.n_parameters
        self.n_vocab: int = forecast.n_vocab
        self.prepackable_bytes: int = forecast.prepackable_bytes
        self.ignored: list[str] = forecast.ignored if settings.traced else []

    def _opened(self) -> Any:
        if self._forecast is None:
            traced = self._settings.traced
            native = self._native.TracedForecast if traced else self._native.Forecast
            with native_errors(self._native):
                self._forecast = native(self._settings.for_native())
        return self._forecast

    def close(self) -> None:
        """Let go of the model, which is opened again if more is asked."""
        self._forecast = None

    def buffers(
        self, n_rows: int, n_tokens: int, keep: bool, prepacked_bytes: int
    ) -> dict[str, int]:
        """Return what `Engine.info()["buffers"]` will say of such an engine."""
        with native_errors(self._native):
            return dict(self._opened().buffers(n_rows, n_tokens, keep, prepacked_bytes))
