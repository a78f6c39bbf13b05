"""The command line: parse, call, print.

Each function below is one command; its options are declared once, in the dataclass that `verb`
names. Bodies import what they need when they run, so that `ggft --help` loads neither NumPy nor
native code.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ggft import __version__
from ggft.command import VerbGroup, debug_option, run, verb

if TYPE_CHECKING:
    from ggft.config import FinetuneConfig

ConfigT = TypeVar("ConfigT")


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ggft", message="%(prog)s %(version)s")
def cli() -> None:
    """Fine-tune a language model on the quantized GGUF file that you already have."""


cli.params.append(debug_option())


def _with_model(config: ConfigT) -> ConfigT:
    """Return the config with its model's name replaced by the path of the (downloaded) file."""
    from ggft.hub import find_model

    return replace(config, model=str(find_model(config.model)))  # type: ignore[type-var,attr-defined]


@verb(cli, "ggft.config:FinetuneConfig", config_file=True)
def finetune(config: FinetuneConfig) -> Any:
    """Train a LoRA adapter on a quantized model."""
    from ggft.train import finetune as action

    return action(_with_model(config))


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(cli))
