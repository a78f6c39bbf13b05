"""`ggft export`: a model or an adapter as other programs take it.

For Ollama, a folder with a Modelfile whose template writes the very prompts of training; for PEFT,
a folder that `PeftModel.from_pretrained` loads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ggft.adapters.adapter import Adapter, read_adapter
from ggft.adapters.peft import write_peft
from ggft.gguf.finite import check_and_hash
from ggft.gguf.read import GGUFFile, check_model, read_gguf
from ggft.hub.download import find_model
from ggft.llama.model import LlamaTokenizer
from ggft.prompts.ollama import go_template, learn_turns, modelfile
from ggft.settings.commands import ExportConfig
from ggft.settings.declared import asked_template
from ggft.setup.inputs import choose_template
from ggft.system.errors import InputError
from ggft.system.files import (
    atomic_output,
    copy_file,
    make_folder,
    remove_empty,
    require_plain_name,
)
from ggft.system.text import printable

MODELFILE, ADAPTER = "Modelfile", "adapter.gguf"


def export(model: str, folder: str, config: ExportConfig) -> str:
    """Write the folder, whole or not at all; return what `ggft export` prints.

    Args:
        model: The base model's GGUF or its name, or a merged model.
        folder: Where to write; made if it is not there.
        config: Whom for, and what with.

    Raises:
        InputError: The files do not fit, the folder is in use, or the other program has no equal
            of what was trained.
        ResourceError: The disk is full.
    """
    if not folder.strip():
        raise InputError("the folder's name is empty")
    base = read_gguf(find_model(model))
    info = check_model(base)
    check_and_hash(base)
    adapter = None if config.adapter is None else read_adapter(config.adapter, base)
    target = Path(folder)
    if config.to == "ollama":
        texts, notes = _for_ollama(base, adapter, config)
        with _folder(target, config.force):
            if adapter is not None and adapter.path.resolve() != (target / ADAPTER).resolve():
                copy_file(adapter.path, target / ADAPTER)
            with atomic_output(target / MODELFILE) as temporary:
                temporary.write_text(texts, encoding="utf-8")
        todo = f"ollama create NAME -f {target / MODELFILE}"
    else:
        if adapter is None:
            raise InputError("for PEFT there must be an adapter", hint="give one with --adapter")
        with _folder(target, config.force):
            write_peft(target, adapter, info)
        notes, todo = [], f'PeftModel.from_pretrained(model, "{target}")'
    lines = [f"wrote {target}", *(f"note: {note}" for note in notes), f"next: {todo}"]
    return printable("\n".join(lines))


def _for_ollama(
    base: GGUFFile, adapter: Adapter | None, config: ExportConfig
) -> tuple[str, list[str]]:
    """Return the Modelfile, and what to know of it."""
    if len(base.paths) > 1:
        raise InputError(
            "Ollama takes no model in parts", path=base.path, hint="ggft merge writes one file"
        )
    notes: list[str] = []
    tokenizer = LlamaTokenizer(base.path)
    template = choose_template(asked_template(config), adapter, base, tokenizer, notes.append)
    turns = learn_turns(template)
    if config.system is not None and not turns.takes_system:
        raise InputError(f"the template `{template.name}` takes no system prompt")
    stops = [tokenizer.decode([token]).decode("utf-8", "replace") for token in template.stop_ids]
    text = modelfile(
        str(base.path.resolve()), go_template(turns), system=config.system, stops=sorted(stops),
        adapter=None if adapter is None else f"./{ADAPTER}",
    )  # fmt: skip
    return text, notes + turns.notes


@contextlib.contextmanager
def _folder(path: Path, force: bool) -> Iterator[None]:
    """Have a folder to write into; on any exception nothing new stays in it."""
    require_plain_name(path)
    if path.exists() and not path.is_dir():
        raise InputError("the output is a file", path=path, expected="a folder")
    if not path.parent.is_dir():
        raise InputError(
            "the output's folder does not exist", path=path, hint=f"mkdir -p {path.parent}"
        )
    made = make_folder(
        path, "cannot write here",
        hint="choose another folder or change the permissions of the one around it",
    )  # fmt: skip
    before = set(path.iterdir())
    if before and not force:
        raise InputError(
            "the folder is not empty", path=path,
            hint="choose another one, or replace files in it with --force",
        )  # fmt: skip
    try:
        yield
    except BaseException:
        for left in set(path.iterdir()) - before:
            left.unlink()
        remove_empty(made)
        raise
