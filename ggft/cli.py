"""The command line: parse, call, print.

Every option is declared once, as a field of a configuration dataclass; `with_options` turns the
fields into click options. Command bodies import what they need when they run, so that
`ggft --help` loads neither NumPy nor native code.
"""

from __future__ import annotations

import click

from ggft import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ggft")
def cli() -> None:
    """Fine-tune a language model on the quantized GGUF file that you already have."""


def main() -> None:
    """Run the command line and exit with its code."""
    cli()
