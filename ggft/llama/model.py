"""llama.cpp for tokens and text: the tokenizer of a GGUF file, and generation with an adapter.

The only importer of `llama_cpp`. Its log goes to Python's `logging` ("ggft.llama.model"); what it
refuses becomes a `GgftError` that quotes its last complaint. Files are checked by `ggft.gguf.read`
before llama.cpp sees them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggft.gguf.read import read_gguf
from ggft.llama.library import (
    N_BATCH,
    Part,
    _log,
    complaint,
    forget_complaints,
    free,
    load,
    open_context,
    open_model,
)
from ggft.llama.vocabulary import Vocabulary
from ggft.system.errors import InputError, ResourceError
from ggft.system.signals import deferred
from ggft.system.supervisor import loading

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_TRIAL_TOKENS = 64

_log.addHandler(logging.NullHandler())


class LlamaTokenizer(Vocabulary):
    """The tokenizer that a GGUF file carries, without its weights (`templates.Tokenizer`).

    Args:
        path: A GGUF model; of a split one, any shard.
        of_model: Also have llama.cpp look at all of the model but the values of its weights, so
            that what it refuses, or crashes at, is known before any work is done.

    Raises:
        InputError: Not a usable GGUF, or one without a vocabulary.
    """

    def __init__(self, path: str | Path, *, of_model: bool = False) -> None:
        api = load()
        # llama.cpp wants the first shard of a split model; any may be given.
        path = read_gguf(path).path
        with loading(path):
            model = open_model(path, Part.HEADER if of_model else Part.VOCABULARY)
            # Also runs at exit, while Python can still take llama.cpp's log.
            weakref.finalize(self, api.llama_model_free, model)
            super().__init__(api, model, path)
            self.try_out()
            if of_model:
                context = open_context(model, path, n_ctx=_TRIAL_TOKENS)
                api.llama_free(context)


class LlamaModel:
    """A model with at most one LoRA adapter, ready to continue token ids.

    What it has read stays in its cache: a prompt that begins like the one before it (the next turn
    of a chat) costs only its new tokens.

    Args:
        path: A GGUF model; of a split one, any shard.
        adapter: A LoRA adapter in GGUF, checked by the caller.
        adapter_scale: Factor on the adapter's delta.
        n_ctx: Tokens of context; `None` is the model's own, at most 4096.
        threads: CPU threads; `None` is llama.cpp's default.
        device: "cpu" keeps everything on the CPU; else the GPU is used where there is one.

    Raises:
        InputError: A file that llama.cpp refuses.
        ResourceError: Not enough memory.
    """

    def __init__(
        self,
        path: str | Path,
        adapter: str | Path | None = None,
        *,
        adapter_scale: float = 1.0,
        n_ctx: int | None = None,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        self.path = Path(path)
        self._api = load()
        first = read_gguf(path).path  # of a split model's shards
        with loading(first):
            self._model = open_model(first, on_gpu=device != "cpu")
            self._handles: list[tuple[Any, Any]] = [(self._api.llama_model_free, self._model)]
            self._free = weakref.finalize(self, free, self._handles)
            self.vocabulary = Vocabulary(self._api, self._model, self.path)
            self.vocabulary.try_out()
            n_ctx_train = int(self._api.llama_model_n_ctx_train(self._model))
            self.n_ctx = min(n_ctx or 4096, n_ctx_train)
            self._context = open_context(self._model, first, n_ctx=self.n_ctx, threads=threads)
        self._handles.append((self._api.llama_free, self._context))
        if adapter is not None:
            self._attach(Path(adapter), adapter_scale)
        self._seen: list[int] = []

    def _attach(self, path: Path, scale: float) -> None:
        read_gguf(path)
        forget_complaints()
        with deferred():
            adapter = self._api.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise InputError(
                "the adapter does not fit this model", path=path, found=complaint(),
                hint=f"use it with the model it was trained on, not {self.path.name}",
            )  # fmt: skip
        adapters = (self._api.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(scale)
        if self._api.llama_set_adapters_lora(self._context, adapters, 1, scales) != 0:
            raise InputError("llama.cpp cannot apply the adapter", path=path, found=complaint())

    def close(self) -> None:
        """Give the memory back; the object is of no use afterwards."""
        self._free()

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_length(self, n_ids: int, n_new: int = 0) -> None:
        if n_ids == 0:
            raise InputError("the prompt is empty")
        if n_ids + n_new > self.n_ctx:
            raise InputError(
                "the prompt is longer than the context", found=f"{n_ids} tokens",
                expected=f"at most {self.n_ctx - n_new}",
                hint="shorten it, or start a new conversation (/reset in chat)",
            )  # fmt: skip

    def _decode(self, ids: Sequence[int], *, all_logits: bool = False) -> None:
        """Read at most N_BATCH tokens after those already read."""
        array = (self._api.llama_token * len(ids))(*ids)
        batch = self._api.llama_batch_get_one(array, len(ids))
        if all_logits:
            wanted = (ctypes.c_int8 * len(ids))(*([1] * len(ids)))
            batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        forget_complaints()
        status = self._api.llama_decode(self._context, batch)
        if status != 0:
            self._forget(0)
            raise ResourceError(
                f"llama.cpp could not read {len(ids)} tokens (status {status})", found=complaint()
            )
        self._seen.extend(ids)

    def _forget(self, n_keep: int) -> None:
        """Drop all but the first `n_keep` tokens from the cache."""
        memory = self._api.llama_get_memory(self._context)
        if n_keep == 0 or not self._api.llama_memory_seq_rm(memory, 0, n_keep, -1):
            self._api.llama_memory_clear(memory, True)
            n_keep = 0
        del self._seen[n_keep:]

    def _read(self, ids: Sequence[int]) -> None:
        """Read a prompt, but for what the cache already holds of it."""
        n_same = 0
        # The last token is read anew in any case: its logits are what generation starts from.
        while n_same < min(len(self._seen), len(ids) - 1) and self._seen[n_same] == ids[n_same]:
            n_same += 1
        self._forget(n_same)
        for first in range(len(self._seen), len(ids), N_BATCH):
            self._decode(ids[first : first + N_BATCH])

    def generate(
        self,
        ids: Sequence[int],
        *,
        stop_ids: Iterable[int] = (),
        max_tokens: int = 200,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield the tokens that continue `ids`, one at a time; the end token is not yielded.

        Args:
            ids: The prompt, BOS included where the model wants one.
            stop_ids: Tokens that end the answer, besides the model's own end tokens.
            max_tokens: Longest answer; it ends earlier where the context is full.
            temperature: 0 takes the likeliest token each time.
            top_p: Sample among the likeliest tokens that make up this share of probability.
            seed: Makes sampling repeatable.

        Raises:
            InputError: The prompt is empty, or fills the context.
        """
        self._check_length(len(ids), 1)
        ends = self.vocabulary.end_ids.union(stop_ids)
        self._read(ids)
        sampler = self._make_sampler(temperature, top_p, seed)
        try:
            for _ in range(max_tokens):
                token = int(self._api.llama_sampler_sample(sampler, self._context, -1))
                if token in ends:
                    return
                yield token
                if len(self._seen) >= self.n_ctx:
                    return
                self._decode([token])
        finally:
            self._api.llama_sampler_free(sampler)

    def _make_sampler(self, temperature: float, top_p: float, seed: int | None) -> Any:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature <= 0:
            stages = [api.llama_sampler_init_greedy()]
        else:
            seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
            stages = [
                api.llama_sampler_init_top_p(top_p, 1),
                api.llama_sampler_init_temp(temperature),
                api.llama_sampler_init_dist(seed & 0xFFFFFFFE),  # all ones means "random"
            ]
        for stage in stages:
            api.llama_sampler_chain_add(chain, stage)
        return chain

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token of `ids`, shape (T, V).

        Raises:
            InputError: No tokens, or more than the context holds.
        """
        import numpy as np

        return np.concatenate(list(self._logits(ids)))

    def nats(self, ids: Sequence[int]) -> npt.NDArray[np.float64]:
        """Return the negative log-likelihood of `ids[1:]`, each given all before it, shape (T-1,).

        Holds the logits of at most N_BATCH tokens at a time.
        """
        import numpy as np

        result, first = [], 0
        for block in self._logits(ids):
            targets = np.asarray(ids[first + 1 : first + 1 + len(block)], dtype=np.int64)
            rows = block[: len(targets)].astype(np.float64)
            top = rows.max(axis=1)
            log_sum = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
            result.append(log_sum - rows[np.arange(len(targets)), targets])
            first += len(block)
        return np.concatenate(result)

    def _logits(self, ids: Sequence[int]) -> Iterator[npt.NDArray[np.float32]]:
        import numpy as np

        self._check_length(len(ids))
        self._forget(0)
        for first in range(0, len(ids), N_BATCH):
            part = ids[first : first + N_BATCH]
            self._decode(part, all_logits=True)
            data = self._api.llama_get_logits(self._context)
            n_vocab = self.vocabulary.n_vocab
            yield np.ctypeslib.as_array(data, shape=(len(part), n_vocab)).copy()
