"""The template that an adapter was trained with, as a merged file carries it.

Other programs render `tokenizer.chat_template`, and give it no arguments; so the file has there
what was trained with, and arguments are set in its first lines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from ggft.adapters.adapter import AdapterMeta
from ggft.gguf.read import Value
from ggft.prompts.builtin import BUILTIN, with_arguments


def template_of(meta: AdapterMeta) -> str:
    """Return the name of the template that was trained with, or itself where a name is not all."""
    arguments = json.loads(meta.template_arguments or "{}")
    name, source = meta.template or "auto", meta.template_source
    if source is None or (name in BUILTIN and not arguments):
        return name
    return with_arguments(source, arguments)


def template_keys(meta: AdapterMeta, base: Mapping[str, object]) -> dict[str, Value]:
    """Return the keys of a merged file that say how it is to be prompted.

    Args:
        meta: What the adapter says.
        base: The base's keys.
    """
    if meta.template is None:
        return {}
    keys: dict[str, Value] = {"ggft.template": meta.template}
    if meta.template_sha256 is not None:
        keys["ggft.template_sha256"] = meta.template_sha256
    source = meta.template_source or BUILTIN.get(meta.template)
    if source is None:
        return keys
    arguments = json.loads(meta.template_arguments or "{}")
    carried = with_arguments(source, arguments) if arguments else source
    if carried == base.get("tokenizer.chat_template"):
        return keys
    keys["tokenizer.chat_template"] = carried
    if meta.template not in BUILTIN or arguments:
        keys["ggft.template"] = "gguf"
        keys["ggft.template_sha256"] = hashlib.sha256(carried.encode()).hexdigest()
    return keys
