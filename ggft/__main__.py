"""The start of the program: `ggft`, and `python -m ggft`.

Importing the command line takes a tenth of a second in which Ctrl-C would end in a traceback.
"""

from __future__ import annotations

# What `signal` stands on, without the enums whose making takes as long as all else here.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys

# The commands that run native code, if only NumPy's, which may crash: they run in a child.
SUPERVISED = (
    "finetune", "plan", "prepare", "eval", "generate", "chat", "info", "convert", "merge",
    "quantize", "export", "doctor", "bench",
)  # fmt: skip


def main() -> None:
    """Run the command line, in a child where native code is part of it; exit with its code."""
    if is_heard := signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        sys.exit(_run(is_heard))
    except KeyboardInterrupt:
        from ggft.system.supervisor import tell

        print("ggft: interrupted", file=sys.stderr)
        tell(ended=True)
        sys.exit(130)


def _end(number: int, frame: object) -> None:
    """End at once, as nothing is lost yet; an exception within an import may become another."""
    os.write(2, b"ggft: interrupted\n")
    os._exit(130)


def _run(is_heard: bool) -> int:
    from ggft.system.errors import GgftError
    from ggft.system.supervisor import OneInterrupt, supervise, tell

    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if command in SUPERVISED and not {"-h", "--help"} & set(sys.argv):
        try:
            code = supervise()
        except GgftError as error:
            from ggft.command import report

            return report(error)
        if code is not None:
            return code
    from ggft.cli import main as run

    if is_heard:
        signal.signal(signal.SIGINT, OneInterrupt())
    code = run()
    tell(ended=True)
    return code


if __name__ == "__main__":
    main()
