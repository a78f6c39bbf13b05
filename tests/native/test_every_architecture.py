"""docs/architectures.md is so: what trains is proven on a small model, what is refused is refused.

`make architectures` writes the table by the same proofs, for all, on two models of each and along
more directions.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ggft.system.errors import InputError
from tests.support.architecture_table import NAMES, NOT_TRIED, read
from tests.support.architectures import Tiny, write_tiny
from tests.support.proofs import open_traced, prove

TABLE = read()
CELLS = {arch: [cell.strip() for cell in row.split("|")[2:-1]] for arch, row in TABLE.items()}
TRAINED = [arch for arch, cells in CELLS.items() if cells[0] == "yes"]
REFUSED = [arch for arch, cells in CELLS.items() if cells[0] == "no" and cells[-1] != NOT_TRIED]
PROMISED = (
    "llama", "mistral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi2", "phi3", "granite",
    "smollm3", "olmo2", "stablelm", "starcoder2", "glm4", "exaone4", "hunyuan-dense", "ernie4_5",
    "cohere2", "command-r", "internlm2", "minicpm", "minicpm3", "nemotron", "falcon", "gptneox",
    "mpt", "bloom", "gpt2", "chatglm", "seed_oss", "bitnet", "plamo", "orion", "xverse", "apertus",
    "arcee", "qwen3moe", "olmoe", "granitemoe", "gpt-oss",
)  # fmt: skip
# All take four minutes.
PROVEN = sorted({*PROMISED, *sorted(set(TRAINED) - set(PROMISED))[::2]})


def test_the_table_has_every_architecture_once() -> None:
    assert list(TABLE) == sorted(NAMES)
    assert len(set(NAMES)) == len(NAMES) > 150
    assert len(TRAINED) >= 66
    assert set(PROMISED) <= set(TRAINED)


@pytest.mark.parametrize("arch", PROVEN)
def test_what_trains_trains(arch: str, tmp_path: Path) -> None:
    assert prove(Tiny(arch, hard=True), tmp_path, brief=True).failures() == {}


@pytest.mark.parametrize("arch", REFUSED)
def test_what_is_refused_is_refused_in_the_same_words(arch: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", Tiny(arch))
    with pytest.raises(InputError) as caught:
        open_traced(path)
    assert caught.value.message == CELLS[arch][-1]
