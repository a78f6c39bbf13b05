"""The settings of training and evaluation: flags, defaults, ranges and help.

`None` means "not given: chosen from the model, the data or the machine"; what was chosen is printed
and recorded. A run's config.yaml repeats the settings and can be given back with `--config`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ggft.settings.declared import (
    DATA_RULE,
    MAX_LENGTH_RULE,
    adapter_option,
    adapter_scale_option,
    columns_option,
    data_option,
    device_option,
    format_option,
    ignore_columns_option,
    json_option,
    keep_duplicates_option,
    kernels_option,
    layers_option,
    max_length_option,
    memory_option,
    model_option,
    overwrite_option,
    precision_option,
    rank_option,
    recompute_option,
    seed_option,
    target_modules_option,
    template_arg_option,
    template_option,
    thinking_option,
    threads_option,
    train_on_prompt_option,
    val_split_option,
)
from ggft.settings.option import option


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of `ggft finetune` and `ggft plan`."""

    model: str = model_option()
    data: tuple[str, ...] = data_option()
    output: str = option(
        "-o", "--output", "--output-dir", default="results", metavar="DIR", recorded=False,
        help="Run directory",
    )  # fmt: skip
    format: str = format_option()
    columns: tuple[str, ...] = columns_option()
    ignore_columns: tuple[str, ...] = ignore_columns_option()
    epochs: int | None = option(
        "--epochs", "--num-epochs", "--num-train-epochs", default=None, minimum=1, maximum=100_000,
        shown=DATA_RULE,
        help="Passes over the data",
    )  # fmt: skip
    max_steps: int | None = option(
        "--max-steps", "--iters", default=None, minimum=1, shown="no limit",
        help="Stop after this many optimizer steps",
    )  # fmt: skip
    batch_size: int | None = option(
        "--batch-size", "--per-device-train-batch-size", default=None, minimum=1, maximum=65_536,
        shown=DATA_RULE,
        help="Examples per optimizer step (times --grad-accum)",
    )  # fmt: skip
    grad_accum: int = option(
        "--grad-accum", "--gradient-accumulation-steps", default=1, minimum=1, maximum=65_536,
        help="Batches summed into one optimizer step",
    )  # fmt: skip
    lr: float | None = option(
        "--lr", "--learning-rate", default=None, above=0.0, maximum=1.0,
        shown=DATA_RULE, help="Peak learning rate",
    )  # fmt: skip
    warmup_steps: int | None = option(
        "--warmup-steps", default=None, minimum=0, shown="a tenth of the run, at most 50",
        help="Steps of linear warm-up",
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
    rank: int | None = rank_option(
        shown="by tokens to learn: 8 below 200,000, 16 below 2,000,000, then 32"
    )
    alpha: float | None = option(
        "--alpha", "--lora-alpha", default=None, above=0.0, maximum=65_536.0,
        shown="4 x rank, 16 with --rslora", help="LoRA alpha; the delta is scaled by alpha / rank",
    )  # fmt: skip
    rslora: bool = option(
        "--rslora", "--use-rslora", default=False,
        help="Scale the delta by alpha / sqrt(rank), so that high ranks learn as fast",
    )  # fmt: skip
    dropout: float | None = option(
        "--dropout", "--lora-dropout", default=None, minimum=0.0, below=1.0,
        shown=DATA_RULE, help="Dropout of the LoRA input",
    )  # fmt: skip
    target_modules: tuple[str, ...] = target_modules_option()
    layers: str = layers_option()
    max_length: int | None = max_length_option(shown=MAX_LENGTH_RULE)
    packing: bool = option(
        "--packing", off=("--no-packing",), default=True,
        help="Put several short examples of a step into one row",
    )  # fmt: skip
    train_on_prompt: bool = train_on_prompt_option()
    template: str = template_option(trained=False)
    template_arg: tuple[str, ...] = template_arg_option()
    thinking: str = thinking_option()
    precision: str = precision_option()
    recompute: bool | None = recompute_option()
    val_split: float | None = val_split_option()
    keep_duplicates: bool = keep_duplicates_option("Train on rows that equal an earlier one, too")
    mix: str = option(
        "--mix", default="auto", metavar="auto|none|FILE",
        help="General rows mixed in against forgetting; `auto`: packaged ones where data is small",
    )  # fmt: skip
    mix_share: float | None = option(
        "--mix-share", default=None, minimum=0.0, below=1.0,
        shown=DATA_RULE,
        help="Share of general rows among an epoch's examples",
    )  # fmt: skip
    mix_as_base: bool = option(
        "--mix-as-base", default=False,
        help="Train general rows on what the base itself would say there, not on their answers:"
        " other text changes less, reworded questions are found less often",
    )  # fmt: skip
    vary: str = option(
        "--vary", default="auto", choices=("auto", "none", "questions"),
        help="Ask the rows' questions a little differently in each epoch; `auto`: those of facts",
    )  # fmt: skip
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
        help="Continue the run in the output directory, or extend one that has ended by --epochs;"
        " starts one if there is none",
    )  # fmt: skip
    init_adapter: str | None = option(
        "--init-adapter", "--resume-adapter-file", default=None, metavar="FILE",
        shown="none",
        help="Begin with this adapter instead of a new one, to train it on",
    )  # fmt: skip
    overwrite: bool = overwrite_option(
        "Replace the run in the output directory", "--overwrite-output-dir"
    )
    seed: int = seed_option()
    threads: int | None = threads_option()
    device: str = device_option()
    kernels: str = kernels_option()
    memory: str | None = memory_option()
    ask: int = option(
        "--ask", default=20, minimum=0, maximum=1000,
        help="Trained rows, and held-out ones, asked at the end for the verdict; 0: none",
    )  # fmt: skip
    samples: int = option(
        "--samples", default=3, minimum=0, maximum=100,
        help="Questions that the report answers before and after",
    )  # fmt: skip
    report_to: str = option(
        "--report-to", default="none", choices=("none", "tensorboard", "wandb"), recorded=False,
        help="Also send losses to TensorBoard or Weights & Biases, by the extra of that name",
    )  # fmt: skip
    dry_run: bool = option(
        "--dry-run", default=False, recorded=False, help="Check everything, print the plan and stop"
    )
    json: bool = json_option("Print events as JSON lines on stdout")


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
        mix_share: float
        val_split: float
        patience: int
        threads: int


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `ggft eval`."""

    model: str = model_option()
    data: tuple[str, ...] = data_option()
    adapter: str | None = adapter_option()
    adapter_scale: float = adapter_scale_option()
    format: str = format_option()
    columns: tuple[str, ...] = columns_option()
    ignore_columns: tuple[str, ...] = ignore_columns_option()
    template: str = template_option(trained=True)
    template_arg: tuple[str, ...] = template_arg_option()
    thinking: str = thinking_option()
    train_on_prompt: bool = train_on_prompt_option("Count the prompt's tokens, too")
    max_length: int = max_length_option(512)
    precision: str = precision_option()
    threads: int | None = threads_option()
    device: str = device_option()
    memory: str | None = memory_option()
    forgetting: bool = option(
        "--forgetting",
        default=False,
        help="Measure what the adapter does to general text instead: packaged rows, no --data",
    )
    json: bool = json_option("Print the result as JSON")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of `ggft bench`."""

    model: str = model_option()
    shape: str = option(
        "--shape", default="4x512", metavar="BxT", help="Rows per optimizer step, tokens per row"
    )
    steps: int = option(
        "--steps", default=5, minimum=1, help="Timed steps, after a short one to warm up"
    )
    rank: int = rank_option(8)
    target_modules: tuple[str, ...] = target_modules_option()
    layers: str = layers_option()
    precision: str = precision_option()
    recompute: bool | None = recompute_option()
    threads: int | None = threads_option()
    device: str = device_option()
    kernels: str = kernels_option()
    memory: str | None = memory_option()
    peak: bool = option(
        "--peak", off=("--no-peak",), default=True,
        help="Measure the machine's peak in matrix products at this model's shapes",
    )  # fmt: skip
    profile: bool = option(
        "--profile", off=("--no-profile",), default=True, help="Say where a step's time goes"
    )
    json: bool = json_option("Print the result as one line of JSON")
