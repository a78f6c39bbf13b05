"""Which base model an adapter belongs to.

The file that it was trained on is known by its SHA-256. Another quantization of the same weights
serves as well: it has the same architecture, shapes and vocabulary, and the same norms, which stay
float32 in every quantization.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ggft.gguf.read import GGMLType, GGUFFile, read_array
from ggft.system.errors import InputError


def norms_sha256(base: GGUFFile) -> str:
    """Return the SHA-256 of a model's vectors, which quantization leaves alone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.tensors.items()):
        if len(tensor.shape) == 1 and tensor.type is GGMLType.F32:
            digest.update(name.encode() + b"\0")
            digest.update(read_array(tensor, 0, 1).tobytes())
    return digest.hexdigest()


def vocabulary_sha256(base: GGUFFile) -> str:
    """Return the SHA-256 of a model's tokens, in their order."""
    tokens = base.get("tokenizer.ggml.tokens")
    digest = hashlib.sha256()
    for token in tokens if isinstance(tokens, Sequence) else ():
        digest.update(str(token).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def base_record(base: GGUFFile) -> dict[str, str]:
    """Return what an adapter keeps of its base, as `AdapterMeta` names it."""
    return {
        "base_sha256": base.sha256(),
        "base_norms_sha256": norms_sha256(base),
        "vocabulary_sha256": vocabulary_sha256(base),
    }


def check_base(file: GGUFFile, base: GGUFFile, *, check_hash: bool) -> str | None:
    """Check that an adapter's file is for a base; return what to know of one that it was not for.

    Raises:
        InputError: It is for other weights, or nothing says that these are the same.
    """
    if file.architecture != base.architecture:
        raise InputError(
            "the adapter is for another architecture",
            path=file.path,
            found=file.architecture,
            expected=f"{base.architecture}, as {base.path}",
        )
    wanted = file.text("ggft.base_sha256")
    if not check_hash or wanted is None or wanted == base.sha256():
        return None
    name = file.text("general.base_model.0.name")
    if (
        base.get("ggft.merged_adapter") is None
        and file.text("ggft.base_norms_sha256") == norms_sha256(base)
        and file.text("ggft.vocabulary_sha256") == vocabulary_sha256(base)
    ):
        return (
            f"the adapter was trained on another file of {name or 'these weights'}: architecture,"
            " shapes, vocabulary and norms are the same, so this is another quantization of it"
        )
    raise InputError(
        "the adapter was trained on another base model",
        path=file.path,
        found=f"{base.path} with SHA-256 {base.sha256()[:16]}…",
        expected=f"{name or 'the file'} with SHA-256 {wanted[:16]}…",
        hint="give the GGUF that it was trained on to --model (merge takes --any-base)",
    )
