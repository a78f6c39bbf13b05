"""Foreign templates: they render as llama-cpp-python renders them, and cannot do harm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ggft.prompts.jinja import JinjaProcess, render_here
from ggft.prompts.messages import Message
from ggft.system.errors import InputError, ResourceError
from ggft.system.processes import Child
from tests.support.children import is_gone

CHAT: list[Message] = [{"role": "user", "content": "hi <b>"}]

# (template, what the error says)
HARMFUL = {
    "class chain": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails: SecurityError"),
    "cycler": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "Error"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
    "import": ("{% import 'os' as os %}", "fails: TypeError|no loader"),
    "include": ("{% include '/etc/passwd' %}", "fails: TypeError|no loader"),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
    "endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "exceeds the limits",
    ),
    "long output": ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "far more than"),
    "repetition": ("{{ 'x' * 10**10 }}", "too long a text"),
    "power": ("{{ 10 ** (10 ** 10) }}", "a power is too large"),
    "doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s }}",
        "exceeds the limits|too much memory",
    ),
    "padding": ("{{ '%99999999999d' | format(1) }}", "exceeds the limits|too much memory|Error"),
    "centred": ("{{ 'x' | center(10**11) }}", "exceeds the limits|too much memory"),
    "recursive macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without"),
    "deep nesting": ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "nested too deeply|not compile"),
    "syntax": ("line one\n{% if %}", "does not compile"),
    "raise": ("{{ raise_exception('only users') }}", "refuses this conversation: only users"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
}


# The sandbox gives nothing instead of failing.
VAIN = [
    "{{ raise_exception.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ joiner.__init__ }}{{ self._TemplateReference__context }}",
]


@pytest.mark.parametrize("source", VAIN)
def test_what_the_sandbox_hides_is_empty(source: str) -> None:
    assert JinjaProcess(source, "", "")([(CHAT, False)]) == [""]


# What Jinja refuses, but not llama.cpp's engine: it gives no `tools`, and takes nothing for it.
LENIENT = [
    "{% for tool in tools %}x{% endfor %}",
    "{{ nothing.at.all }}",
    "{% set ids = [] %}{% set _ = ids.append('x') %}{{ ids.pop() | replace('x', '') }}",
    "{{ '' + functions }}",
]


@pytest.mark.parametrize("source", LENIENT)
def test_what_only_llama_cpp_renders_is_rendered(source: str) -> None:
    assert JinjaProcess(source, "", "")([(CHAT, False)]) == [""]


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_templates_are_stopped_and_named(name: str) -> None:
    source, says = HARMFUL[name]
    started_s = time.monotonic()
    try:
        answer = JinjaProcess(source, "<s>", "</s>", cpu_s=1)([(CHAT, False)])[0]
    except InputError as error:
        answer = error
    assert isinstance(answer, InputError), answer
    assert re.search(says, str(answer)), answer
    assert answer.path == "chat template"
    assert len(str(answer)) < 1500
    assert time.monotonic() - started_s < 60


def test_errors_name_the_line() -> None:
    with pytest.raises(InputError) as caught:
        JinjaProcess("one\ntwo\n{% bad %}", "", "")
    assert caught.value.line == 3
    answer = JinjaProcess("one\ntwo\n{{ raise_exception('x') }}", "", "")([(CHAT, False)])[0]
    assert isinstance(answer, InputError)
    assert answer.line == 3


def test_one_bad_conversation_does_not_spoil_the_others() -> None:
    source = "{{ raise_exception('no') if messages|length > 1 }}{{ messages[0].content }}"
    render = JinjaProcess(source, "", "")
    answers = render([(CHAT, False), (CHAT * 2, False), (CHAT, True)])
    assert [isinstance(x, InputError) for x in answers] == [False, True, False]
    assert answers[0] == answers[2] == "hi <b>"


def test_the_process_sees_neither_environment_nor_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = JinjaProcess("{{ messages[0].content }}", "", "")
    environ = Path(f"/proc/{process._process.pid}/environ")
    if environ.exists():
        assert b"secret" not in environ.read_bytes()
    process.close()
    assert process._process.poll() is not None


def test_it_ends_when_the_parent_is_killed() -> None:
    code = (
        "import os, signal; from ggft.prompts.jinja import JinjaProcess;"
        "p = JinjaProcess('x', '', ''); print(p._process.pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert is_gone(int(done.stdout)), "the process outlives its parent"


def test_a_process_that_does_not_start_is_not_the_templates_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def other(_: str) -> Child:
        return Child("tests.support.children:fail")

    monkeypatch.setattr("ggft.prompts.jinja.Child", other)
    with pytest.raises(ResourceError, match=r"did not start.*can't start new thread") as caught:
        JinjaProcess("x", "", "")
    assert "trust" not in str(caught.value)


def test_extensions_of_chat_templates() -> None:
    source = (
        "{%- for m in messages -%}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{%- endfor %}"
        "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') }}{{ bos_token }}"
    )
    expected = 'hi <b>{"a": "<é>"}2024<s>'
    assert JinjaProcess(source, "<s>", "")([(CHAT * 2, False)]) == [expected]
    assert render_here(source, "<s>", "", {})([(CHAT * 2, False)]) == [expected]


def test_lone_surrogates_survive_the_pipe() -> None:
    chat: list[Message] = [{"role": "user", "content": json.loads('"\\ud800"')}]
    assert JinjaProcess("{{ messages[0].content }}", "", "")([(chat, False)]) == ["\ud800"]
