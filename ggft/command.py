"""How a function becomes a command: options from its configuration dataclass, errors to exit codes.

`command` turns a function of one configuration into a click command. Its options are read from the
dataclass only when that command runs or shows its help, so `ggft --help` stays light. `run` is the
one place where errors are printed and exit codes are made.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from ggft.settings.option import Option, make, options_of
from ggft.system.errors import (
    EXIT_OK,
    EXIT_SIGINT,
    GgftError,
    InputError,
    Interrupted,
    ResourceError,
)
from ggft.system.progress import Output
from ggft.system.signals import silence_stdout
from ggft.system.text import printable

EXIT_BUG = 1
_NO_ROOM = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE,
)  # fmt: skip
_debug = False


def _turn_on_debug(_context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    global _debug
    if value and not _debug:
        _debug = True
        # Our own log only: those of HTTP libraries name signed addresses.
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logging.getLogger("ggft").addHandler(handler)
        logging.getLogger("ggft").setLevel(logging.DEBUG)


def debug_option() -> click.Option:
    """Return the --debug flag, which every command has."""
    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=_turn_on_debug, is_eager=True,
        help="Show llama.cpp's log, and a traceback on errors.",
    )  # fmt: skip


class _ReaderGoneError(Exception):
    """Whoever read our output has closed it; click would make exit code 1 of a BrokenPipeError."""


class CommandGroup(click.Group):
    """Commands in the order of declaration, with a suggestion for a mistyped one."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGoneError from None
        except KeyboardInterrupt:  # click would print an empty line
            raise Interrupted("interrupted", signal_number=signal.SIGINT) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which they were declared."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; raise InputError with the nearest name for an unknown one."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            import difflib

            near = difflib.get_close_matches(name, self.commands, n=1)
            raise InputError(
                f"unknown command `{name}`",
                hint=f"did you mean `ggft {near[0]}`?" if near else "see ggft --help",
            )
        return super().resolve_command(ctx, args)


class SettingsCommand(click.Command):
    """A command whose options are the fields of a dataclass.

    Args:
        config: `module:Class` of the dataclass.
        config_file: Whether `--config` may give settings.
        default_file: `module:function` that returns the config file where the user names none, of
            the settings that were given; None: no file.
        action: What runs, called with the settings.
        kw: What else click takes.
    """

    def __init__(
        self,
        *,
        config: str,
        config_file: bool,
        default_file: str | None,
        action: Callable[..., Any],
        **kw: Any,
    ) -> None:
        super().__init__(**kw)
        self._config = config
        self._config_file = config_file
        self._default_file = default_file
        self._action = action
        self._complete = False
        self.callback = self._call

    def _config_class(self) -> type:
        found: type = _import(self._config)
        return found

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, reading them from the dataclass the first time."""
        if not self._complete:
            self._complete = True
            self.params += [_click_option(entry) for entry in options_of(self._config_class())]
            if self._config_file:
                self.params.append(
                    click.Option(
                        ["--config"], metavar="FILE",
                        help="YAML file with settings, such as a run's config.yaml; flags win.",
                    )
                )  # fmt: skip
            self.params.append(debug_option())
        return super().get_params(ctx)

    def _call(self, **values: Any) -> Any:
        config_file = values.pop("config", None)
        entries = {entry.name: entry for entry in options_of(self._config_class())}
        given, rest = {}, {}
        for name, value in values.items():
            entry = entries.get(name)
            if entry is None:
                rest[name] = value
            elif value is not None and value != ():
                given[name] = value
        if config_file is None and self._default_file is not None:
            config_file = _import(self._default_file)(given)
        return self._action(make(self._config_class(), given, config_file), **rest)


def _import(name: str) -> Any:
    """Return what `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _click_option(entry: Option) -> click.Option:
    """Return the flag of one option; values stay text, since `options.make` checks them."""
    text = entry.help
    if entry.shown is not None:
        text += f" [default: {entry.shown}]"
    elif entry.default not in (None, (), False, ""):
        shown = ",".join(entry.default) if entry.multiple else entry.default
        if entry.kind is not bool:
            text += f" [default: {shown}]"
    if entry.kind is bool:
        on, *aliases = entry.flags
        name = "/".join((on, *entry.flags_off[:1]))
        return click.Option([entry.name, name, *aliases], is_flag=True, default=None, help=text)
    metavar = entry.metavar or {int: "N", float: "X"}.get(entry.kind, "TEXT")
    if entry.choices is not None:
        metavar = "|".join(entry.choices)
    return click.Option(
        [entry.name, *entry.flags], type=str, multiple=entry.multiple, default=None, help=text,
        metavar=metavar,
    )  # fmt: skip


def command(
    group: click.Group,
    config: str,
    *,
    name: str | None = None,
    config_file: bool = False,
    default_file: str | None = None,
) -> Callable[[Callable[..., Any]], SettingsCommand]:
    """Make the decorated function, which takes one configuration, a command of `group`.

    Args:
        group: Where the command goes.
        config: `module:Class` of the dataclass that declares its options.
        name: The command's name; the function's, unless given.
        config_file: Whether `--config` may give settings.
        default_file: `module:function` that names the file where the user does not; see
            `SettingsCommand`.
    """

    def decorate(action: Callable[..., Any]) -> SettingsCommand:
        arguments = list(reversed(getattr(action, "__click_params__", [])))
        made = SettingsCommand(
            name=name or action.__name__.replace("_", "-"), help=action.__doc__, params=arguments,
            config=config, config_file=config_file, default_file=default_file, action=action,
        )  # fmt: skip
        group.add_command(made)
        return made

    return decorate


def _on_sigterm(number: int, _frame: object) -> None:
    raise Interrupted("interrupted", signal_number=number)


def run(group: click.Group, args: Sequence[str] | None = None) -> int:
    """Run a command line, print what went wrong in one message, and return the exit code."""
    global _debug
    _debug = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _on_sigterm)
    try:
        with _watched_output():
            result = group.main(args, prog_name="ggft", standalone_mode=False)
        return result if isinstance(result, int) else EXIT_OK
    except BaseException as error:
        if _debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        return report(error)


@contextlib.contextmanager
def _watched_output() -> Iterator[None]:
    """Make lost output an error of the command, unless there is another one.

    Raises:
        ResourceError: Standard output took not all.
    """
    if sys.stdout is None:
        yield
        return
    stdout = sys.stdout
    output = Output(stdout)
    sys.stdout = output
    try:
        yield
        output.require()
    except OSError:
        if output.lost is not None:
            output.require()
        raise
    finally:
        sys.stdout = stdout
        with contextlib.suppress(ResourceError):
            output.require()  # lest Python fail to write the rest of it at its end


def report(error: BaseException) -> int:
    """Print an error's message to stderr and return its exit code."""
    if isinstance(error, BrokenPipeError | _ReaderGoneError):
        # Whoever read our output has seen enough, as in `ggft info FILE | head`.
        silence_stdout()
        return EXIT_OK
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message())
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_BUG
    shown = _as_ggft_error(error)
    if shown is None:
        message = f"internal error: {type(error).__name__}: {error}\n  → add --debug for the place"
        code = EXIT_BUG
    else:
        message, code = str(shown), shown.exit_code
    # Where nobody is left to read it, the exit code still tells.
    with contextlib.suppress(OSError, AttributeError, ValueError):
        print(f"ggft: {printable(message)}", file=sys.stderr, flush=True)
    return code


def _as_ggft_error(error: BaseException) -> GgftError | None:
    """Return what the user is told, or None for a bug."""
    if isinstance(error, GgftError):
        return error
    # Where it falls into the making of a class, older Pythons raise a RuntimeError from it.
    if isinstance(error, KeyboardInterrupt | click.Abort) or isinstance(
        error.__cause__, KeyboardInterrupt
    ):
        return Interrupted("interrupted", signal_number=EXIT_SIGINT - 128)
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "ggft"
        return InputError(error.format_message().rstrip("."), hint=f"see {where} --help")
    if isinstance(error, click.ClickException):
        return InputError(error.format_message())
    no_room = isinstance(error, ImportError) and "failed to map segment" in str(error)
    if isinstance(error, MemoryError) or no_room:
        return ResourceError("out of memory", hint="close other programs, or use a smaller model")
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return ResourceError(
            "no more threads can be started",
            hint="close other programs, or allow more processes and memory (ulimit -u, ulimit -v)",
        )
    if isinstance(error, OSError) and error.errno is not None:
        kind = ResourceError if error.errno in _NO_ROOM else InputError
        path = error.filename if isinstance(error.filename, str) else None
        return kind(error.strerror or str(error), path=path)
    return None
