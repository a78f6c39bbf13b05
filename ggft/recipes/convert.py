"""Converts to GGUF: old llama GGML files, and adapters of PEFT.

The tensors of an old file stream from file to file, a few rows at a time; codes are moved, never
requantized, as long as a current type can hold them. What such a file leaves out (context length,
norm epsilon, rope base) is inferred, printed with the reason, and can be given by flag.
"""

from __future__ import annotations

from pathlib import Path

from ggft.adapters.peft import convert_peft, is_peft
from ggft.gguf.read import read_gguf
from ggft.hub.download import find_model
from ggft.legacy.convert import ConvertReport, convert_model
from ggft.settings.commands import ConvertConfig
from ggft.system.errors import InputError
from ggft.system.files import require_new
from ggft.system.progress import ByteBar
from ggft.system.text import format_bytes


def convert(old: str | Path, new: str | Path, config: ConvertConfig) -> str:
    """Convert with a progress bar where somebody watches; return what `ggft convert` prints."""
    if is_peft(Path(old)):
        return _convert_adapter(Path(old), Path(new), config)
    if config.base is not None and Path(old).exists():
        raise InputError(
            "--base is for PEFT adapters", path=old, expected="a folder with adapter_config.json"
        )

    with ByteBar() as bar:
        report = convert_model(old, new, config, bar.move_to)
    return render(report)


def _convert_adapter(old: Path, new: Path, config: ConvertConfig) -> str:
    """Convert an adapter of PEFT; return what `ggft convert` prints."""
    if config.base is None:
        raise InputError(
            "a PEFT adapter needs its base model in GGUF", path=old,
            hint=f"ggft convert {old} {new} --base MODEL.gguf",
        )  # fmt: skip
    require_new(new, force=config.force)
    meta = convert_peft(old, new, read_gguf(find_model(config.base)))
    size = format_bytes(new.stat().st_size)
    return f"wrote {new}, {size}: LoRA of rank {meta.rank}, alpha {meta.alpha:g}"


def render(report: ConvertReport) -> str:
    """Return the report as lines for a terminal."""
    file = report.source
    hparams = file.hparams
    version = f" v{file.version}" if file.version else ""
    parts = f", {len(file.paths)} parts" if len(file.paths) > 1 else ""
    lines = [
        f"{file.paths[0].name}: {file.container}{version}{parts}, {format_bytes(file.file_bytes)}, "
        f"{hparams.n_layer} blocks, {hparams.n_embd} wide, {hparams.n_head} heads, "
        f"{hparams.n_vocab} tokens",
    ]
    for inference in report.inferences:
        why = f"  ({inference.why})" if inference.why else ""
        lines.append(f"  {inference.what:16} {inference.value}{why}")
    for entry in report.repackings.values():
        lines.append(f"  {entry.n_tensors:4} × {entry.source} → {entry.target}, {entry.how}")
    if report.scale_error:
        lines.append(f"  scales rounded to F16: worst relative error {report.scale_error:.1e}")
    if report.n_subnormal:
        lines.append(f"  {report.n_subnormal} scales are F16 subnormals: less precise than usual")
    lines.append(f"wrote {report.output}, {format_bytes(report.n_bytes)}")
    if report.refusal is not None:
        lines.append(f"ggft cannot train it: {report.refusal}")
    return "\n".join(lines)
