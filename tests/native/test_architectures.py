from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from ggft.gguf.read import read_gguf
from tests.support.architectures import ARCHITECTURES, Tiny, write_tiny


def logits(path: Path, n_tokens: int = 16) -> Any:
    """Return llama.cpp's logits after a few tokens, attention and caches in F32."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
    settings.type_k = settings.type_v = settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context
    tokens = (ctypes.c_int32 * n_tokens)(*[7 * i % 200 for i in range(n_tokens)])
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, n_tokens)) == 0
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (n_vocab,)).copy()
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return row


@pytest.mark.parametrize("hard", [False, True], ids=["plain", "hard"])
@pytest.mark.parametrize("arch", ["gpt2", "phi3", "gemma3", "qwen35", "gpt-oss"])
def test_llama_cpp_runs_the_tiny_models(arch: str, hard: bool, tmp_path: Path) -> None:
    row = logits(write_tiny(tmp_path / "m.gguf", Tiny(arch, hard=hard)))
    assert np.isfinite(row).all()
    assert 0.1 < row.std() < 10


def test_a_tiny_model_has_the_types_that_were_asked_for(tmp_path: Path) -> None:
    types = {"*": "Q4_0", "ffn_down": "Q8_0"}
    file = read_gguf(write_tiny(tmp_path / "m.gguf", Tiny("gemma2", types=types)))
    assert file.tensors["blk.0.attn_q.weight"].type.name == "Q4_0"
    assert file.tensors["blk.0.ffn_down.weight"].type.name == "Q8_0"
    assert file.tensors["blk.0.attn_norm.weight"].type.name == "F32"


def test_every_name_is_listed_once() -> None:
    assert len(set(ARCHITECTURES)) == len(ARCHITECTURES) > 100
