"""The command line: parse, call, print.

Each function below is one command; its options are declared once, in the dataclass that `command`
names. Bodies import what they need when they run, so that `ggft --help` loads neither NumPy nor
native code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ggft import __version__
from ggft.command import CommandGroup, command, debug_option, run

if TYPE_CHECKING:
    from ggft.settings.commands import (
        ConvertConfig,
        DoctorConfig,
        DownloadConfig,
        ExportConfig,
        GenerateConfig,
        InfoConfig,
        MergeConfig,
        ModelsConfig,
        PrepareConfig,
        QuantizeConfig,
        ReportConfig,
    )
    from ggft.settings.training import BenchConfig, EvalConfig, FinetuneConfig


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ggft", message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune a language model on the quantized GGUF file that you already have."""


cli.params.append(debug_option())


@command(
    cli, "ggft.settings.training:FinetuneConfig", config_file=True,
    default_file="ggft.training.run_directory:settings_to_resume",
)  # fmt: skip
def finetune(config: FinetuneConfig) -> None:
    """Train a LoRA adapter on a quantized model."""
    from ggft.recipes.finetune import finetune as action

    action(config)


@command(
    cli, "ggft.settings.training:FinetuneConfig", config_file=True,
    default_file="ggft.training.run_directory:settings_to_resume",
)  # fmt: skip
def plan(config: FinetuneConfig) -> None:
    """Say what training would do and need.

    With data (-d) it prints the settings that follow from it; without, it plans from the model's
    header alone. Nothing is downloaded.
    """
    from ggft.recipes.finetune import plan as action

    action(config)


@command(cli, "ggft.settings.commands:PrepareConfig")
def prepare(config: PrepareConfig) -> None:
    """Show what training would see of some data, and write it out cleaned."""
    from ggft.recipes.prepare import prepare as action

    action(config)


@command(cli, "ggft.settings.training:EvalConfig", name="eval", config_file=True)
def evaluate(config: EvalConfig) -> None:
    """Measure the loss of data under a model and an adapter."""
    from ggft.recipes.evaluate import evaluate as action

    action(config)


@command(cli, "ggft.settings.commands:GenerateConfig")
@click.argument("prompt", required=False)
@click.option("--input", "extra", metavar="TEXT", help="The instruction's input, if it has one")
def generate(config: GenerateConfig, prompt: str | None, extra: str | None) -> None:
    """Answer one PROMPT (or what is piped in) on stdout."""
    from ggft.recipes.generate import generate as action
    from ggft.recipes.generate import read_prompt

    text = read_prompt(prompt)
    action(config, text, extra)


@command(cli, "ggft.settings.commands:GenerateConfig")
def chat(config: GenerateConfig) -> None:
    """Talk with a model, with or without an adapter."""
    from ggft.recipes.generate import chat as action

    action(config)


@command(cli, "ggft.settings.commands:DownloadConfig")
@click.argument("model", required=False)
def download(config: DownloadConfig, model: str | None) -> None:
    """Download a model by name, checked by its SHA-256.

    MODEL is a name that `ggft models` lists (the default model if not given), or a file on the
    Hugging Face hub: owner/repository/file.gguf[@revision].
    """
    from ggft.hub.download import download as action
    from ggft.settings.declared import DEFAULT_MODEL

    click.echo(action(DEFAULT_MODEL if model is None else model, config.folder, force=config.force))


@command(cli, "ggft.settings.commands:ModelsConfig")
def models(config: ModelsConfig) -> None:
    """List the models known by name, and which fit."""
    from ggft.hub.registry import models_text

    click.echo(models_text(config))


@command(cli, "ggft.settings.commands:InfoConfig")
@click.argument("file")
def info(config: InfoConfig, file: str) -> None:
    """Say what a model file is, and what ggft can do with it.

    FILE is a GGUF (model, adapter, vocabulary, any shard) or an old GGML file.
    """
    from ggft.recipes.info import info as action

    click.echo(action(file, config))


@command(cli, "ggft.settings.commands:ConvertConfig")
@click.argument("old")
@click.argument("new")
def convert(config: ConvertConfig, old: str, new: str) -> None:
    """Convert an old llama GGML file (.bin), or a PEFT adapter, to GGUF.

    OLD is the file, the first part of several, or an adapter's folder (see --base); NEW is the
    GGUF to write.
    """
    from ggft.recipes.convert import convert as action

    click.echo(action(old, new, config))


@command(cli, "ggft.settings.commands:MergeConfig")
@click.argument("base")
@click.argument("adapter")
@click.argument("output")
def merge(config: MergeConfig, base: str, adapter: str, output: str) -> None:
    """Merge an adapter into its base model, with a receipt.

    BASE is the model's GGUF or its name, ADAPTER the adapter's GGUF, OUTPUT the GGUF to write.
    """
    from ggft.recipes.merge import merge_files as action

    click.echo(action(base, adapter, output, config))


@command(cli, "ggft.settings.commands:QuantizeConfig")
@click.argument("model")
@click.argument("output")
@click.argument("type_name", metavar="TYPE")
def quantize(config: QuantizeConfig, model: str, output: str, type_name: str) -> None:
    """Write a model in another type, such as Q4_K_M."""
    from ggft.recipes.quantize import quantize_file as action

    click.echo(action(model, output, type_name, config))


@command(cli, "ggft.settings.commands:ExportConfig")
@click.argument("model")
@click.argument("folder")
def export(config: ExportConfig, model: str, folder: str) -> None:
    """Write a folder for Ollama or PEFT.

    MODEL is the base model's GGUF or its name, or a merged model; FOLDER is made.
    """
    from ggft.recipes.export import export as action

    click.echo(action(model, folder, config))


@command(cli, "ggft.settings.commands:ReportConfig")
@click.argument("run", metavar="RUN")
def report(config: ReportConfig, run: str) -> None:
    """Summarize a training run.

    RUN is a run directory; its report.html is written anew.
    """
    from ggft.recipes.report import report as action

    click.echo(action(run, config))


@command(cli, "ggft.settings.commands:DoctorConfig")
def doctor(config: DoctorConfig) -> int:
    """Check this machine, and say what to fix."""
    from ggft.recipes.doctor import doctor as action

    return action(config)


@command(cli, "ggft.settings.training:BenchConfig")
def bench(config: BenchConfig) -> None:
    """Measure a model's training speed and memory here."""
    from ggft.recipes.bench import bench as action

    action(config)


def main() -> int:
    """Run the command line and return its exit code."""
    return run(cli)
