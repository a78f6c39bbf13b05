"""Settings of the other commands."""

from __future__ import annotations

from dataclasses import dataclass

from ggft.settings.declared import (
    MAX_LENGTH_RULE,
    adapter_option,
    adapter_scale_option,
    columns_option,
    data_option,
    device_option,
    force_option,
    format_option,
    ignore_columns_option,
    json_option,
    keep_duplicates_option,
    max_length_option,
    model_option,
    seed_option,
    system_option,
    template_arg_option,
    template_option,
    thinking_option,
    threads_option,
    train_on_prompt_option,
    val_split_option,
)
from ggft.settings.option import option


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Settings of `ggft download`."""

    folder: str | None = option(
        "--to", default=None, metavar="DIR", shown="models/", help="Where the file goes"
    )
    force: bool = force_option("Download it although it is too large for this machine")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `ggft report`."""

    json: bool = json_option("Print the report as JSON")


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Settings of `ggft models`."""

    json: bool = json_option("Print the list as JSON")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `ggft prepare`."""

    model: str = model_option("Base model: its tokenizer and template are used")
    data: tuple[str, ...] = data_option()
    out: str | None = option(
        "-o", "--out", default=None, metavar="DIR",
        help="Write the cleaned rows as train.jsonl and valid.jsonl into this folder",
    )  # fmt: skip
    preview: int = option(
        "--preview", default=0, minimum=0, maximum=1000, metavar="N",
        help="Show this many rows with the trained tokens marked",
    )  # fmt: skip
    costs: bool = option("--costs", default=False, help="Show what each row costs, dearest first")
    format: str = format_option()
    columns: tuple[str, ...] = columns_option()
    ignore_columns: tuple[str, ...] = ignore_columns_option()
    template: str = template_option(trained=False)
    template_arg: tuple[str, ...] = template_arg_option()
    thinking: str = thinking_option()
    max_length: int | None = max_length_option(shown=MAX_LENGTH_RULE)
    val_split: float | None = val_split_option()
    train_on_prompt: bool = train_on_prompt_option()
    keep_duplicates: bool = keep_duplicates_option("Keep rows that equal an earlier one")
    seed: int = seed_option()
    force: bool = force_option("Replace files of these names in --out")
    json: bool = json_option("Print the result as JSON")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of `ggft generate` and `ggft chat`."""

    model: str = model_option()
    adapter: str | None = adapter_option()
    adapter_scale: float = adapter_scale_option()
    template: str = template_option(trained=True)
    template_arg: tuple[str, ...] = template_arg_option()
    system: str | None = system_option()
    max_tokens: int = option(
        "--max-tokens", "--max-new-tokens", "-n", default=200, minimum=1, maximum=1_000_000,
        help="Longest answer in tokens",
    )  # fmt: skip
    temperature: float = option(
        "--temperature", "--temp", default=0.7, minimum=0.0, maximum=100.0,
        help="Randomness of the answer; 0 takes the likeliest token each time",
    )  # fmt: skip
    top_p: float = option(
        "--top-p", default=0.95, above=0.0, maximum=1.0,
        help="Choose among the likeliest tokens that have this share of probability",
    )  # fmt: skip
    seed: int | None = option(
        "--seed", default=None, minimum=0, maximum=2**31 - 1, shown="random",
        help="Makes sampling repeatable",
    )  # fmt: skip
    context: int = option(
        "--context", "--n-ctx", "-c", default=2048, minimum=16, maximum=2**24,
        help="Tokens of prompt and answer together, at most the model's own context",
    )  # fmt: skip
    threads: int | None = threads_option("llama.cpp's choice")
    device: str = device_option(
        "auto: the GPU where there is one; cpu: never the GPU", choices=("auto", "cpu")
    )


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Settings of `ggft info`."""

    tensors: bool = option("--tensors", default=False, help="List every tensor")
    keys: bool = option("--keys", default=False, help="List every metadata key")
    check: bool = option(
        "--check", default=False, help="Read all data, too, and refuse NaN and infinity"
    )
    json: bool = json_option("Print JSON")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Settings of `ggft convert`."""

    vocab_dir: str | None = option(
        "--vocab-dir", default=None, metavar="PATH", shown="the file's own vocabulary",
        help="Take the vocabulary from a Hugging Face tokenizer folder or tokenizer.model",
    )  # fmt: skip
    gqa: int | None = option(
        "--gqa", default=None, minimum=1, maximum=1024, shown="from the shapes",
        help="Query heads per key/value head (8 for Llama 2 70B)",
    )  # fmt: skip
    context: int | None = option(
        "--context", "--context-length", default=None, minimum=8, maximum=1 << 24,
        shown="inferred", help="Context length the model was trained with, tokens",
    )  # fmt: skip
    eps: float | None = option(
        "--eps", "--rms-norm-eps", default=None, above=0.0, below=0.1, shown="inferred",
        help="Epsilon of the RMS norms (1e-6 for Llama 1, 1e-5 for Llama 2)",
    )  # fmt: skip
    rope_base: float | None = option(
        "--rope-base", "--rope-freq-base", default=None, minimum=1.0, maximum=1e12,
        shown="inferred", help="Base of the rotary positions",
    )  # fmt: skip
    type: str = option(
        "--type", default="F16", choices=("F16", "F32", "Q8_0"),
        help="Type for tensors whose old type no current one can hold (Q4_2, Q4_3, 64-element K)",
    )  # fmt: skip
    base: str | None = option(
        "--base", default=None, metavar="PATH|NAME", shown="none",
        help="For a PEFT adapter: the model in GGUF that it will be used with",
    )  # fmt: skip
    name: str | None = option(
        "--name", default=None, shown="from the file's name", help="Name written into the GGUF"
    )
    force: bool = force_option()


TYPE_CHOICES = (
    "base", "auto", "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1",
    "Q4_0", "Q3_K", "Q2_K",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Settings of `ggft merge`."""

    type: str = option(
        "--type", default="base", choices=TYPE_CHOICES,
        help="Type of the changed tensors: base is the base's own, auto is finer where it must be",
    )  # fmt: skip
    keep: float = option(
        "--keep", default=0.9, minimum=0.0, maximum=1.0,
        help="With --type auto: share of each delta that must survive",
    )  # fmt: skip
    scale: float = adapter_scale_option()
    data: tuple[str, ...] = data_option(
        "Rows to fit the weights to, and to measure what survives of the fine-tune on"
    )
    receipt: str | None = option(
        "--receipt", default=None, metavar="FILE", help="Write the receipt as JSON, too"
    )
    any_base: bool = option(
        "--any-base", default=False, help="Merge although the adapter names another base file"
    )
    force: bool = force_option()


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Settings of `ggft quantize`."""

    requantize: bool = option(
        "--requantize", "--allow-requantize", default=False,
        help="Also accept a model that is quantized already; what it lost stays lost",
    )  # fmt: skip
    pure: bool = option(
        "--pure", default=False, help="One type for all matrices, none of them finer"
    )
    threads: int | None = threads_option("all")
    force: bool = force_option()


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `ggft export`."""

    to: str = option("--to", choices=("ollama", "peft"), help="Whom the folder is for")
    adapter: str | None = adapter_option()
    template: str = template_option(trained=True)
    template_arg: tuple[str, ...] = template_arg_option()
    system: str | None = system_option()
    force: bool = force_option("Replace files in a folder that is not empty", "--overwrite")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Settings of `ggft doctor`."""

    graph: bool = option(
        "--graph", default=False, help="List the nodes of the training graphs of --model, too"
    )
    model: str = model_option(
        "The model for --graph: a GGUF file or a name that `ggft models` lists"
    )
    device: str = device_option(
        "The device to check: auto, cpu or NAME; with --graph metal is judged by its rules anywhere"
    )
    json: bool = json_option("Print the findings as JSON")
