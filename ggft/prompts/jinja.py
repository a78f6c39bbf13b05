"""Run Jinja templates that came with a model: sandboxed, and in a process of their own.

The sandbox forbids access to Python's internals. What it cannot forbid, endless loops and strings
that fill the memory, the process can: it has limits of CPU time and memory, no environment and
no writable files. Run as a module, this file is that process; it speaks JSON over pipes.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import IO, Any

from ggft.system.errors import InputError, ResourceError
from ggft.system.processes import TOO_LARGE, Child, limit_cpu, limit_memory, signal_name

MAX_CPU_S = 5  # for one batch of renderings, which takes a few milliseconds
MAX_WAIT_S = 600.0  # the same, by the clock, for a machine that is busy or short of memory
MAX_MEMORY_BYTES = 512 << 20  # beyond what the process has at its start
MAX_CHARS = 1 << 20  # of a rendering, beyond four times its contents
# For templates that ask for today's: a prompt must not change by the day.
# Failures that llama.cpp's engine does not know: what is not there, none, and lists that grow.
_LENIENT = re.compile(r"UndefinedError|TypeError|SecurityError: access to attribute '\w+' of 'list")
VARIABLES = "variables"  # of one rendering
MAX_FORMAT_CHARS = 200
FIXED_DATE = datetime(2024, 7, 26)
_OF_ROW = ("tools", "documents", VARIABLES)  # stand on the first message

Request = tuple[Sequence[Any], bool]
Render = Callable[[Sequence[Any], bool], str]


def compile_template(
    source: str, bos: str, eos: str, arguments: Mapping[str, object] | None = None
) -> Render:
    """Return a renderer of a Jinja template, in this process.

    Jinja is set up as llama-cpp-python and transformers do: blocks are trimmed, `{% generation %}`
    is ignored, `tojson` does not escape. Where a template fails like that, but not in llama.cpp's
    own engine, which gives it no `tools` and takes what is not there for nothing, it is run so.

    Args:
        source: The template.
        bos: What `bos_token` stands for.
        eos: What `eos_token` stands for.
        arguments: Further variables that the template is given.

    Raises:
        InputError: The template does not compile; later, from the renderer: it fails.
    """
    strict = _compiled(source)
    lenient: Any = None
    given = {
        "bos_token": bos,
        "eos_token": eos,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        **(arguments or {}),
    }

    def checked(messages: Sequence[Any], prompt: bool) -> str:
        nonlocal lenient
        try:
            return _render(strict, {"tools": None, **given}, messages, prompt)
        except (InputError, _RefusalError) as e:
            raise e if isinstance(e, InputError) else _failure(e) from None
        except Exception as e:  # whatever a foreign program can raise
            failure = _failure(e)
            if not _LENIENT.search(failure.message):
                raise failure from None
        try:
            lenient = lenient or _compiled(source, lenient=True)
            return _render(lenient, given, messages, prompt)
        except Exception:
            raise failure from None

    return checked


def _render(
    template: Any, variables: Mapping[str, Any], messages: Sequence[Any], prompt: bool
) -> str:
    """Return what a compiled template writes; what belongs to the row is with its first message."""
    first = messages[0] if messages else {}
    of_row = {key: first[key] for key in _OF_ROW if key in first}
    if of_row:
        plain = {k: v for k, v in first.items() if k not in _OF_ROW}
        messages = [plain, *messages[1:]]
    room = MAX_CHARS + 4 * _n_chars(messages) + 16 * _n_chars(of_row)
    variables = {**variables, **of_row.pop(VARIABLES, {}), **of_row}
    if "tools" in of_row:
        # As the templates of SmolLM3 and Firefunction call them.
        variables["xml_tools"] = of_row["tools"]
        variables["functions"] = _tojson(of_row["tools"], indent=2)
    out: list[str] = []
    for chunk in template.generate(messages=messages, add_generation_prompt=prompt, **variables):
        out.append(chunk)
        room -= len(chunk)
        if room < 0:
            raise _error("the chat template writes far more than it is given", None)
    return "".join(out)


def _compiled(source: str, *, lenient: bool = False) -> Any:
    import jinja2

    try:
        return _environment(lenient=lenient).from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise _error(f"the chat template does not compile: {e.message}", e.lineno) from None
    except RecursionError:
        raise _error("the chat template is nested too deeply", None) from None


def _n_chars(value: Any) -> int:
    """Return how much text there is in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(key) + _n_chars(v) for key, v in value.items())
    return sum(map(_n_chars, value)) if isinstance(value, list) else 8


def _raise_exception(message: object) -> None:
    raise _RefusalError(str(message))


def _strftime_now(form: str = "%d %b %Y") -> str:
    if len(form) > MAX_FORMAT_CHARS or re.search("%(?!-?[A-Za-z%])", form):
        raise _RefusalError("strftime_now has no plain format")
    return FIXED_DATE.strftime(form)


class _RefusalError(Exception):
    """A template called raise_exception."""


def _error(message: str, line: int | None) -> InputError:
    hint = "choose another template with --template"
    return InputError(message, path="chat template", line=line, hint=hint)


def _failure(error: Exception) -> InputError:
    """Return what went wrong in a template, with its line."""
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    if isinstance(error, _RefusalError):
        message = f"the chat template refuses this conversation: {error}"
    elif isinstance(error, RecursionError):
        message = "the chat template calls itself without end"
    elif isinstance(error, MemoryError):
        message = "the chat template needs too much memory"
    else:
        message = f"the chat template fails: {type(error).__name__}: {error}"
    return _error(message[:500], line)


def _environment(*, lenient: bool = False) -> Any:
    """Return Jinja's sandbox with the extensions that chat templates use."""
    import jinja2.ext
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

    class PassGeneration(jinja2.ext.Extension):
        """Ignore Hugging Face's `{% generation %}` tags."""

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    PassGeneration.tags = {"generation"}

    base: Any = SandboxedEnvironment if lenient else ImmutableSandboxedEnvironment

    class Sandbox(base):  # type: ignore[misc]
        """Refuse at once the cheapest ways to fill the memory."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) for x in (left, right) if isinstance(x, (str, list, tuple))]
            counts = [abs(x) for x in (left, right) if isinstance(x, int)]
            if sizes and counts and sizes[0] * counts[0] > MAX_CHARS:
                raise SecurityError("a repetition makes too long a text")
            if operator == "**" and any(x > 1000 for x in counts):
                raise SecurityError("a power is too large")
            return super().call_binop(context, operator, left, right)

    env = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[PassGeneration, jinja2.ext.loopcontrols],
        undefined=_nothing() if lenient else jinja2.Undefined,
    )
    env.filters["tojson"] = _tojson
    return env


def _nothing() -> Any:
    """Return the type of variables that are not there, taken for empty texts and lists."""
    import jinja2

    class Nothing(jinja2.ChainableUndefined):
        """A variable that is not there."""

        def __add__(self, other: Any) -> Any:
            return other

        def __radd__(self, other: Any) -> Any:
            return other

    return Nothing


def _tojson(
    x: object, ensure_ascii: bool = False, indent: int | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False, **_: object,
) -> str:  # fmt: skip
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys,
        default=list,
    )  # fmt: skip


def render_here(
    source: str, bos: str, eos: str, arguments: Any
) -> Callable[[Sequence[Request]], list[Any]]:
    """Return a `RenderAll` for a template that is known to be harmless."""
    render = compile_template(source, bos, eos, arguments)

    def render_all(requests: Sequence[Request]) -> list[str | InputError]:
        results: list[str | InputError] = []
        for messages, prompt in requests:
            try:
                results.append(render(messages, prompt))
            except InputError as e:
                results.append(e)
        return results

    return render_all


class JinjaProcess:
    """A process that renders one template; calling it, from any thread, is a `RenderAll`.

    Args:
        source: The template.
        bos: What `bos_token` stands for.
        eos: What `eos_token` stands for.
        arguments: Further variables that the template is given.
        cpu_s: CPU seconds that a batch may take.

    Raises:
        InputError: The template does not compile or exceeds the limits.
        ResourceError: The process cannot be started.
    """

    def __init__(
        self, source: str, bos: str, eos: str, arguments: Any = None, *, cpu_s: int = MAX_CPU_S
    ) -> None:
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._process = Child("ggft.prompts.jinja:serve")
        self.close = weakref.finalize(self, self._process.stop)
        setup = [source, bos, eos, arguments or {}, cpu_s]
        if not isinstance(self._converse(setup), list):  # before it has seen the template
            raise ResourceError(
                "the process that renders chat templates did not start",
                found=self._process.last_words(),
                hint="close other programs, or allow more memory and processes (ulimit -a)",
            )
        self._answer(self._converse(None))

    def __call__(self, requests: Sequence[Request]) -> list[str | InputError]:
        """Render every request; a failed one gives its error instead."""
        answer = self._answer(self._converse(requests))
        return [_error(x[0], x[1]) if isinstance(x, list) else x for x in answer]

    def _converse(self, message: object) -> Any:
        """Send a message, unless it is None, and return the answer; None if the process ended."""
        process = self._process
        with self._lock:
            timer = threading.Timer(MAX_WAIT_S, process.kill)
            timer.daemon = True
            timer.start()
            try:
                if message is not None:
                    _send(process.stdin, message)
                return _receive(process.stdout)
            except (OSError, ValueError):
                return None
            finally:
                timer.cancel()

    def _answer(self, answer: Any) -> list[Any]:
        """Return an answer, or raise what became of the process."""
        if not isinstance(answer, list):
            self._process.kill()
            raise InputError(
                "the chat template exceeds the limits and was stopped",
                path="chat template",
                found=_reason(self._process.wait()),
                expected=f"at most {self._cpu_s} s and {MAX_MEMORY_BYTES >> 20} MB",
                hint="do not trust this model's template; choose another with --template",
            )
        if answer and isinstance(answer[0], dict):
            raise _error(answer[0]["error"], answer[0]["line"])
        return answer


def _reason(code: int) -> str:
    if code == TOO_LARGE:
        return "too much memory"
    if code >= 0:
        return f"it ended with code {code}"
    name = signal_name(-code)
    return {"SIGXCPU": "too much CPU time", "SIGKILL": "too much time or memory"}.get(name, name)


def _send(pipe: IO[bytes], message: object) -> None:
    data = json.dumps(message).encode()
    pipe.write(struct.pack("<Q", len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """Return a message, None at the end of the pipe."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    data = pipe.read(size)
    return json.loads(data) if len(data) == size else None


def serve() -> None:
    """Answer requests on standard input until it ends."""
    pipe_in, pipe_out = sys.stdin.buffer, sys.stdout.buffer
    source, bos, eos, arguments, cpu_s = _receive(pipe_in)
    _environment()  # import before the memory is limited
    limit_memory(MAX_MEMORY_BYTES)
    _send(pipe_out, [])  # ready: what happens from here on is the template's doing
    limit_cpu(cpu_s)
    try:
        render = compile_template(source, bos, eos, arguments)
    except InputError as e:
        _send(pipe_out, [{"error": e.message, "line": e.line}])
        return
    _send(pipe_out, [])
    while (requests := _receive(pipe_in)) is not None:
        limit_cpu(cpu_s)
        answers: list[Any] = []
        for messages, prompt in requests:
            try:
                answers.append(render(messages, prompt))
            except InputError as e:
                answers.append([e.message, e.line])
        _send(pipe_out, answers)
