"""The options that several commands have, each declared once.

A command gives its own words only where the option means something else there.
"""

from __future__ import annotations

from typing import Any

from ggft.gguf.linears import TARGETS
from ggft.prompts.builtin import THINKING, TemplateChoice, asked_for
from ggft.settings.option import option

DEFAULT_MODEL = "smollm2-135m-instruct"
# What is said of settings that follow from the data; tests hold it to what `data.advice` does.
DATA_RULE = "by kind and number of rows; `ggft plan -d FILE` says what"
MAX_LENGTH_RULE = "by the data: the longest example; beyond 1,024 tokens, of 99 in 100"


def model_option(
    help: str = "Base model: a GGUF file or a name that `ggft models` lists",  # noqa: A002
) -> Any:
    """Declare -m."""
    return option(
        "-m", "--model", "--model-path", default=DEFAULT_MODEL, metavar="PATH|NAME", help=help
    )


def data_option(
    help: str = "Data: a file, a folder, `hf:owner/dataset[:split]`, or `-` for standard input;"  # noqa: A002
    " may be repeated, each with its share, as in a.json@30%",
) -> Any:
    """Declare -d."""
    return option("-d", "--data", "--data-path", default=(), metavar="PATH", help=help)


def format_option() -> Any:
    """Declare --format."""
    return option(
        "--format", default="auto", metavar="NAME",
        help="Row format of the data; `auto` looks at each row; `plain`: text, whatever it holds",
    )  # fmt: skip


def columns_option() -> Any:
    """Declare --columns."""
    return option(
        "--columns", default=(), metavar="NAME=ROLE", split_commas=True,
        help="What columns of other names are, comma separated: "
        "question=instruction,answer=output; roles are instruction, input, context, output, system,"
        " history, messages, text, reasoning, tools, documents, ignore",
    )  # fmt: skip


def ignore_columns_option() -> Any:
    """Declare --ignore-columns."""
    return option(
        "--ignore-columns", default=(), metavar="NAMES", split_commas=True,
        help="Columns to leave out, comma separated",
    )  # fmt: skip


def adapter_option() -> Any:
    """Declare --adapter."""
    return option(
        "--adapter", "-a", "--lora", default=None, metavar="FILE", help="LoRA adapter (GGUF)"
    )


def adapter_scale_option() -> Any:
    """Declare --adapter-scale."""
    return option(
        "--adapter-scale", default=1.0, minimum=-100.0, maximum=100.0,
        help="Factor on the adapter's delta",
    )  # fmt: skip


def template_option(*, trained: bool) -> Any:
    """Declare --template; `trained` says whether an adapter may already be there."""
    auto = "the adapter's, else the model's own"
    if not trained:
        auto = "the model's own, else the instruction template"
    return option(
        "--template", "--chat-template", default="auto", metavar="NAME|FILE",
        help=f"Prompt template; `auto` is {auto}",
    )  # fmt: skip


def template_arg_option() -> Any:
    """Declare --template-arg."""
    return option(
        "--template-arg", "--chat-template-arg", default=(), metavar="NAME=VALUE",
        help="Give the template a variable, such as enable_thinking=false; may be repeated",
    )  # fmt: skip


def thinking_option() -> Any:
    """Declare --thinking."""
    return option(
        "--thinking", default="keep", choices=THINKING,
        help="The rows' thoughts: keep them (an answer without one is written as the template"
        " writes it), drop them, or train an empty one before every answer",
    )  # fmt: skip


def asked_template(config: Any) -> TemplateChoice:
    """Return the template that a command's settings ask for."""
    return asked_for(config.template, config.template_arg, getattr(config, "thinking", "keep"))


def system_option() -> Any:
    """Declare --system."""
    return option("--system", default=None, metavar="TEXT", shown="none", help="System prompt")


def train_on_prompt_option(
    help: str = "Train on the prompt, too, not only on answers",  # noqa: A002
) -> Any:
    """Declare --train-on-prompt."""
    return option("--train-on-prompt", default=False, help=help)


def max_length_option(default: int | None = None, *, shown: str | None = None) -> Any:
    """Declare --max-length."""
    return option(
        "--max-length", "--max-seq-length", "--cutoff-len", default=default, minimum=8,
        shown=shown, help="Longest example in tokens; longer ones are cut and counted",
    )  # fmt: skip


def val_split_option() -> Any:
    """Declare --val-split."""
    return option(
        "--val-split", "--val-size", default=None, minimum=0.0, below=1.0,
        shown=DATA_RULE,
        help="Share of the rows held out for validation; 0 is off",
    )  # fmt: skip


def keep_duplicates_option(help: str) -> Any:  # noqa: A002
    """Declare --keep-duplicates."""
    return option("--keep-duplicates", default=False, help=help)


def seed_option() -> Any:
    """Declare --seed of what is repeatable by itself."""
    return option("--seed", default=42, minimum=1, maximum=2**31 - 1, help="Random seed")


def precision_option() -> Any:
    """Declare --precision."""
    return option(
        "--precision", default="fast", choices=("fast", "f32"),
        help="fast: what is quickest on this machine; f32: the reference path",
    )  # fmt: skip


def threads_option(shown: str = "physical cores") -> Any:
    """Declare --threads."""
    return option(
        "--threads", "-t", default=None, minimum=1, maximum=1024, shown=shown, help="CPU threads"
    )


def device_option(
    help: str = "auto, cpu or a name from `ggft doctor`",  # noqa: A002
    *,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declare --device."""
    return option("--device", default="auto", metavar="NAME", choices=choices, help=help)


def memory_option() -> Any:
    """Declare --memory."""
    return option(
        "--memory", default=None, metavar="SIZE", shown="a safe share of what is free",
        help="Memory that the run may use, such as 6G",
    )  # fmt: skip


def rank_option(default: int | None = None, *, shown: str | None = None) -> Any:
    """Declare --rank."""
    return option(
        "--rank", "-r", "--lora-r", "--lora-rank", default=default, minimum=1, maximum=1024,
        shown=shown, help="LoRA rank",
    )  # fmt: skip


def target_modules_option() -> Any:
    """Declare --target-modules."""
    return option(
        "--target-modules", "--lora-target-modules", default=("all",), metavar="NAMES",
        split_commas=True, help="Linears to train, comma separated: all, attention, mlp, "
        + ", ".join(TARGETS) + " (or Hugging Face's names); of other architectures the names of"
        " their matrices, as `ggft info` lists them; * stands for any part of a name",
    )  # fmt: skip


def layers_option() -> Any:
    """Declare --layers."""
    return option(
        "--layers", "--num-layers", default="all", metavar="N|FIRST-LAST",
        help="Blocks to train: all, the last N, or FIRST-LAST counted from 0",
    )  # fmt: skip


def recompute_option() -> Any:
    """Declare --recompute."""
    return option(
        "--recompute", "--gradient-checkpointing", off=("--keep",), default=None,
        shown="by memory", help="Recompute block internals in the backward pass, or keep them",
    )  # fmt: skip


def kernels_option() -> Any:
    """Declare --kernels."""
    return option(
        "--kernels", default="auto", choices=("auto", "fused", "ggml"),
        help="CPU kernels: our fused ones or ggml's portable graph",
    )  # fmt: skip


def json_option(help: str) -> Any:  # noqa: A002
    """Declare --json."""
    return option("--json", default=False, recorded=False, help=help)


def force_option(
    help: str = "Replace the output if it exists",  # noqa: A002
    *aliases: str,
) -> Any:
    """Declare --force."""
    return option("--force", *aliases, default=False, help=help)


def overwrite_option(help: str, *aliases: str) -> Any:  # noqa: A002
    """Declare --overwrite."""
    return option("--overwrite", *aliases, default=False, recorded=False, help=help)
