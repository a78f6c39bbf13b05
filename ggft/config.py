"""The settings of training and evaluation: flags, defaults, ranges and help.

`None` means "not given: chosen from the model, the data or the machine"; what was chosen is printed
and recorded. A run's config.yaml repeats the settings and can be given back with `--config`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggft.errors import InputError
from ggft.options import option

DEFAULT_MODEL = "smollm2-135m-instruct"
TARGET_ALIASES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TARGETS = tuple(TARGET_ALIASES.values())
TARGET_GROUPS = {
    "all": TARGETS,
    "attention": TARGETS[:4],
    "mlp": TARGETS[4:],
}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `ggft finetune` and `ggft plan`."""

    model: str = option(
        "-m", "--model", "--model-path", default=DEFAULT_MODEL, metavar="PATH|NAME",
        help="Base model: a GGUF file or a name that `ggft models` lists",
    )  # fmt: skip
    data: tuple[str, ...] = option(
        "-d", "--data", "--data-path", default=(), metavar="PATH",
        help="Training data: a file or folder; may be repeated",
    )  # fmt: skip
    output: str = option(
        "-o", "--output", "--output-dir", default="results", metavar="DIR", recorded=False,
        help="Run directory",
    )  # fmt: skip
    format: str = option(
        "--format", default="auto", metavar="NAME",
        help="Row format of the data; `auto` looks at each row",
    )  # fmt: skip
    epochs: int | None = option(
        "--epochs", "--num-epochs", "--num-train-epochs", default=None, minimum=1, maximum=100_000,
        shown="3, more for tiny data", help="Passes over the data",
    )  # fmt: skip
    max_steps: int | None = option(
        "--max-steps", "--iters", default=None, minimum=1, shown="no limit",
        help="Stop after this many optimizer steps",
    )  # fmt: skip
    batch_size: int | None = option(
        "--batch-size", "--per-device-train-batch-size", default=None, minimum=1, maximum=65_536,
        shown="4", help="Examples per optimizer step (times --grad-accum)",
    )  # fmt: skip
    grad_accum: int = option(
        "--grad-accum", "--gradient-accumulation-steps", default=1, minimum=1, maximum=65_536,
        help="Batches summed into one optimizer step",
    )  # fmt: skip
    lr: float | None = option(
        "--lr", "--learning-rate", default=None, above=0.0, maximum=1.0,
        shown="3e-4, more for tiny data", help="Peak learning rate",
    )  # fmt: skip
    warmup_steps: int = option(
        "--warmup-steps", default=50, minimum=0,
        help="Steps of linear warm-up; never more than a tenth of the run",
    )  # fmt: skip
    lr_scheduler: str = option(
        "--lr-scheduler", "--lr-scheduler-type", default="cosine",
        choices=("cosine", "linear", "constant"), help="How the learning rate falls after warm-up",
    )  # fmt: skip
    weight_decay: float = option(
        "--weight-decay", default=0.0, minimum=0.0, below=1.0, help="AdamW's weight decay"
    )
    beta1: float = option(
        "--beta1", "--adam-beta1", default=0.9, minimum=0.0, below=1.0, help="AdamW's first decay"
    )
    beta2: float = option(
        "--beta2", "--adam-beta2", default=0.999, minimum=0.0, below=1.0, help="AdamW's second one"
    )
    eps: float = option(
        "--eps", "--adam-epsilon", default=1e-8, above=0.0, maximum=1.0, help="AdamW's epsilon"
    )
    max_grad_norm: float = option(
        "--max-grad-norm", "--grad-clip", default=1.0, minimum=0.0,
        help="Clip the gradient's global norm; 0 is off",
    )  # fmt: skip
    rank: int | None = option(
        "--rank", "-r", "--lora-r", "--lora-rank", default=None, minimum=1, maximum=1024,
        shown="8", help="LoRA rank",
    )  # fmt: skip
    alpha: float | None = option(
        "--alpha", "--lora-alpha", default=None, above=0.0, maximum=65_536.0,
        shown="4 x rank", help="LoRA alpha; the delta is scaled by alpha / rank",
    )  # fmt: skip
    dropout: float | None = option(
        "--dropout", "--lora-dropout", default=None, minimum=0.0, below=1.0,
        shown="0.1, less for tiny data", help="Dropout of the LoRA input",
    )  # fmt: skip
    target_modules: tuple[str, ...] = option(
        "--target-modules", "--lora-target-modules", default=("all",), metavar="NAMES",
        help="Linears to train, comma separated: all, attention, mlp, "
        + ", ".join(TARGETS) + " (or Hugging Face's names)",
    )  # fmt: skip
    layers: str = option(
        "--layers", "--num-layers", default="all", metavar="N|FIRST-LAST",
        help="Blocks to train: all, the last N, or FIRST-LAST counted from 0",
    )  # fmt: skip
    max_length: int | None = option(
        "--max-length", "--max-seq-length", "--cutoff-len", default=None, minimum=8,
        shown="512", help="Longest example in tokens; longer ones are cut and counted",
    )  # fmt: skip
    packing: bool = option(
        "--packing", off=("--no-packing",), default=True,
        help="Put several short examples of a step into one row",
    )  # fmt: skip
    train_on_prompt: bool = option(
        "--train-on-prompt", default=False, help="Train on the prompt, too, not only on answers"
    )
    template: str = option(
        "--template", "--chat-template", default="auto", metavar="NAME|FILE",
        help="Prompt template; `auto` is the model's own, else the instruction template",
    )  # fmt: skip
    precision: str = option(
        "--precision", default="fast", choices=("fast", "f32"),
        help="fast: what is quickest on this machine; f32: the reference path",
    )  # fmt: skip
    recompute: bool | None = option(
        "--recompute", "--gradient-checkpointing", off=("--keep",), default=None,
        shown="by memory", help="Recompute block internals in the backward pass, or keep them",
    )  # fmt: skip
    val_split: float | None = option(
        "--val-split", "--val-size", default=None, minimum=0.0, below=1.0, shown="by size",
        help="Share of the rows held out for validation; 0 is off",
    )  # fmt: skip
    keep_duplicates: bool = option(
        "--keep-duplicates", default=False, help="Train on rows that equal an earlier one, too"
    )
    patience: int | None = option(
        "--patience", "--early-stopping-patience", default=None, minimum=0, shown="3",
        help="Stop after this many evaluations without a better one; 0 is never",
    )  # fmt: skip
    save_steps: int = option(
        "--save-steps", "--save-every", default=100, minimum=1, help="Steps between checkpoints"
    )
    logging_steps: int = option(
        "--logging-steps", "--steps-per-report", default=10, minimum=1,
        help="Steps between logged losses; fewer when the run is short",
    )  # fmt: skip
    keep_checkpoints: int = option(
        "--keep-checkpoints", "--save-total-limit", default=2, minimum=1,
        help="Checkpoints to keep",
    )  # fmt: skip
    resume: bool = option(
        "--resume", "--resume-from-checkpoint", default=False, recorded=False,
        help="Continue the run in the output directory; starts one if there is none",
    )  # fmt: skip
    overwrite: bool = option(
        "--overwrite", "--overwrite-output-dir", default=False, recorded=False,
        help="Replace the run in the output directory",
    )  # fmt: skip
    seed: int = option("--seed", default=42, minimum=1, maximum=2**31 - 1, help="Random seed")
    threads: int | None = option(
        "--threads", "-t", default=None, minimum=1, maximum=1024,
        shown="physical cores", help="CPU threads",
    )  # fmt: skip
    device: str = option(
        "--device", default="auto", metavar="NAME", help="auto, cpu or a name from `ggft doctor`"
    )
    kernels: str = option(
        "--kernels", default="auto", choices=("auto", "fused", "ggml"),
        help="CPU kernels: our fused ones or ggml's portable graph",
    )  # fmt: skip
    memory: str | None = option(
        "--memory", default=None, metavar="SIZE", shown="a safe share of what is free",
        help="Memory that the run may use, such as 6G",
    )  # fmt: skip
    samples: int = option(
        "--samples", default=3, minimum=0, maximum=100,
        help="Questions that the report answers before and after",
    )  # fmt: skip
    dry_run: bool = option(
        "--dry-run", default=False, recorded=False, help="Check everything, print the plan and stop"
    )
    json: bool = option(
        "--json", default=False, recorded=False, help="Print events as JSON lines on stdout"
    )

    @staticmethod
    def default_file(given: Mapping[str, Any]) -> Path | None:
        """Return the settings of the run that is to be continued, if there is one."""
        path = Path(str(given.get("output", "results"))) / "config.yaml"
        return path if given.get("resume") and path.is_file() else None


@dataclass(frozen=True, kw_only=True)
class SettledConfig(FinetuneConfig):
    """Settings of a run, with all that was left open chosen from the data and the machine."""

    if TYPE_CHECKING:
        epochs: int
        batch_size: int
        lr: float
        rank: int
        alpha: float
        dropout: float
        max_length: int
        val_split: float
        patience: int
        threads: int


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `ggft eval`."""

    model: str = option(
        "-m", "--model", "--model-path", default=DEFAULT_MODEL, metavar="PATH|NAME",
        help="Base model: a GGUF file or a name that `ggft models` lists",
    )  # fmt: skip
    data: tuple[str, ...] = option(
        "-d", "--data", "--data-path", default=(), metavar="PATH",
        help="Data: a file or folder; may be repeated",
    )  # fmt: skip
    adapter: str | None = option(
        "--adapter", "-a", "--lora", default=None, metavar="FILE", help="LoRA adapter (GGUF)"
    )
    adapter_scale: float = option(
        "--adapter-scale", default=1.0, minimum=-100.0, maximum=100.0,
        help="Factor on the adapter's delta",
    )  # fmt: skip
    format: str = option(
        "--format", default="auto", metavar="NAME",
        help="Row format of the data; `auto` looks at each row",
    )  # fmt: skip
    template: str = option(
        "--template", "--chat-template", default="auto", metavar="NAME|FILE",
        help="Prompt template; `auto` is the adapter's, else the model's own",
    )  # fmt: skip
    train_on_prompt: bool = option(
        "--train-on-prompt", default=False, help="Count the prompt's tokens, too"
    )
    max_length: int = option(
        "--max-length", "--max-seq-length", default=512, minimum=8,
        help="Longest example in tokens; longer ones are cut and counted",
    )  # fmt: skip
    precision: str = option(
        "--precision", default="fast", choices=("fast", "f32"),
        help="fast: what is quickest on this machine; f32: the reference path",
    )  # fmt: skip
    threads: int | None = option(
        "--threads", "-t", default=None, minimum=1, maximum=1024,
        shown="physical cores", help="CPU threads",
    )  # fmt: skip
    device: str = option(
        "--device", default="auto", metavar="NAME", help="auto, cpu or a name from `ggft doctor`"
    )
    memory: str | None = option(
        "--memory", default=None, metavar="SIZE", shown="a safe share of what is free",
        help="Memory that the run may use, such as 6G",
    )  # fmt: skip
    json: bool = option("--json", default=False, help="Print the result as JSON")


def parse_size(text: str, flag: str = "--memory") -> int:
    """Return the bytes of a size such as `6G`, `750M`, `1.5GiB` (powers of 1024).

    Raises:
        InputError: not a positive number with an optional K, M, G or T.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    body = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = body[-1:] if body[-1:] in ("K", "M", "G", "T") else ""
    try:
        size = float(body.removesuffix(unit)) * units[unit]
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and 1 <= size < 2**63):
        raise InputError(f"{flag} is not a size", found=repr(text), expected="such as 6G or 750M")
    return int(size)


def parse_targets(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return llama.cpp's names of the linears to train, in the order of the block.

    Raises:
        InputError: an unknown name; the message lists the known ones.
    """
    chosen: set[str] = set()
    for name in names:
        if name in TARGET_GROUPS:
            chosen.update(TARGET_GROUPS[name])
        elif name in TARGET_ALIASES:
            chosen.add(TARGET_ALIASES[name])
        elif name in TARGETS:
            chosen.add(name)
        else:
            known = [*TARGET_GROUPS, *TARGETS, *TARGET_ALIASES]
            near = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                "unknown target module", found=repr(name), expected=", ".join(known),
                hint=f"did you mean `{near[0]}`?" if near else None,
            )  # fmt: skip
    if not chosen:
        raise InputError("--target-modules names no linear")
    return tuple(name for name in TARGETS if name in chosen)


def parse_layers(text: str, n_layer: int) -> tuple[int, int]:
    """Return (first, one past the last) of the blocks to train.

    Raises:
        InputError: not `all`, a count or `FIRST-LAST`, or outside the model's blocks.
    """
    if text == "all":
        return 0, n_layer
    first_text, dash, last_text = text.partition("-")
    try:
        if dash:
            first, end = int(first_text), int(last_text) + 1
        else:
            first, end = n_layer - int(first_text), n_layer
    except ValueError:
        first, end = -1, -1
    if not 0 <= first < end <= n_layer:
        raise InputError(
            "--layers names blocks that do not exist", found=repr(text),
            expected=f"all, 1 to {n_layer} for the last ones, or a range within 0-{n_layer - 1}",
        )  # fmt: skip
    return first, end
