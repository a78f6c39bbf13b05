"""A model run by llama.cpp itself, as exactly as it can: attention and caches in F32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import llama_cpp
import numpy as np

N_CTX = 256


class OwnLlama:
    """Logits of short texts, with an adapter or without."""

    def __init__(self, path: Path) -> None:
        self._api: Any = llama_cpp
        parameters = self._api.llama_model_default_params()
        parameters.n_gpu_layers, parameters.use_extra_bufts = 0, False
        self._model = self._api.llama_model_load_from_file(str(path).encode(), parameters)
        assert self._model, f"llama.cpp cannot open {path.name}"
        settings = self._api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = N_CTX
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = settings.flash_attn_type = 0
        self._context = self._api.llama_init_from_model(self._model, settings)
        assert self._context
        vocab = self._api.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._api.llama_vocab_n_tokens(vocab))

    def logits(self, tokens: Sequence[int], adapter: Path | None = None) -> Any:
        """Return the logits after every token, (T, V)."""
        api, n, loaded = self._api, len(tokens), None
        if adapter is not None:
            loaded = api.llama_adapter_lora_init(self._model, str(adapter).encode())
            assert loaded, f"llama.cpp cannot open {adapter.name}"
            array = (api.llama_adapter_lora_p_ctypes * 1)(loaded)
            api.llama_set_adapters_lora(self._context, array, 1, (ctypes.c_float * 1)(1.0))
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        ids, wanted = (ctypes.c_int32 * n)(*map(int, tokens)), (ctypes.c_int8 * n)(*([1] * n))
        batch = api.llama_batch_get_one(ids, n)
        batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        assert api.llama_decode(self._context, batch) == 0
        data = api.llama_get_logits(self._context)
        rows = np.ctypeslib.as_array(data, (n, self.n_vocab)).astype(np.float64)
        if loaded is not None:
            api.llama_set_adapters_lora(self._context, None, 0, None)
            api.llama_adapter_lora_free(loaded)
        return rows

    def __enter__(self) -> OwnLlama:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
