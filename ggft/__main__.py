"""The start of the program: `ggft`, and `python -m ggft`.

Importing the command line takes a tenth of a second in which Ctrl-C would end in a traceback.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        from ggft.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
