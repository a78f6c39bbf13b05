from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest

from ggft.cli import cli
from ggft.command import CommandGroup, command, run
from ggft.system.errors import GgftError, InputError, Interrupted, NetworkError, NumericError
from tests.support.engines import ISAS
from tests.support.models import CHATML, Spec, write_model

GGFT = [sys.executable, "-c", "from ggft.__main__ import main; main()"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_model(folder / "tiny.gguf", Spec(chat_template=CHATML)).path


# (arguments, exit code, what stderr must say); {model} is a usable model, {folder} an empty folder.
WRONG = [
    (["fintune"], 2, ["unknown command `fintune`", "did you mean `ggft finetune`"]),
    (["xyzzy"], 2, ["unknown command `xyzzy`", "ggft --help"]),
    (["--nonsense"], 2, ["--nonsense"]),
    (["finetune", "--learning-rat", "1"], 2, ["--learning-rat", "--learning-rate"]),
    (["finetune", "extra"], 2, ["extra", "ggft finetune --help"]),
    (["finetune", "--rank"], 2, ["--rank"]),
    (["finetune", "--rank", "-1"], 2, ["--rank is out of range", "found -1"]),
    (["finetune", "--rank", "0"], 2, ["--rank is out of range", "at least 1"]),
    (["finetune", "--rank", "x"], 2, ["--rank", "'x'", "a whole number"]),
    (["finetune", "--lr", "nan"], 2, ["--lr is out of range", "found nan"]),
    (["finetune", "--lr", "1e9"], 2, ["--lr is out of range"]),
    (["finetune", "--epochs", "0"], 2, ["--epochs is out of range"]),
    (["finetune", "--precision", "f64"], 2, ["--precision", "'f64'", "fast, f32"]),
    (["finetune", "--config", "{folder}/none.yaml"], 2, ["none.yaml", "no such file"]),
    (["finetune", "-m", "{folder}/none.gguf"], 2, ["none.gguf", "no such model file"]),
    (["finetune", "-m", "smollm2-135m"], 2, ["did you mean `smollm2-135m-instruct`"]),
    (["generate", "hi", "-m", "{folder}"], 2, ["{folder}"]),
    (["generate", "hi", "-m", "/dev/zero"], 2, ["/dev/zero"]),
    (["generate", "hi", "-m", "{folder}/page.gguf"], 2, ["page.gguf at byte 0", "magic GGUF"]),
    (["generate", " ", "-m", "{model}"], 2, ["the prompt is empty"]),
    (["generate", "a\0b", "-m", "{model}"], 2, ["NUL"]),
    (["generate", "hi", "-m", "{model}", "--adapter", "{model}"], 2, ["not a LoRA adapter"]),
    (["generate", "hi", "-m", "{model}", "--adapter", "{folder}/no"], 2, ["{folder}/no"]),
    (["generate", "hi", "-m", "{model}", "--template", "nope"], 2, ["no such template", "'nope'"]),
    (["generate", "a" * 999, "-m", "{model}", "-c", "64"], 2, ["the context", "at most 63"]),
    (["generate", "hi", "-m", "{model}", "--temperature", "-1"], 2, ["--temperature"]),
    (["generate", "hi", "-m", "{model}", "--top-p", "0"], 2, ["--top-p"]),
    (["chat", "-m", "{folder}/none.gguf"], 2, ["no such model file"]),
    (["finetune", "-m", ""], 2, ["--model is empty"]),
    (["finetune", "-m", "{model}", "-o", ""], 2, ["--output is empty"]),
    (["finetune", "--config", "{folder}"], 2, ["not a regular file"]),
    (["finetune", "--config", "/dev/zero"], 2, ["not a regular file"]),
    (["finetune", "--config", "{folder}/pipe"], 2, ["not a regular file"]),
    (["report", "{model}"], 2, ["no finished run here"]),
    (["doctor", "--graph", "-m", "{folder}/page.gguf"], 2, ["page.gguf at byte 0"]),
    (["export", "{model}", "", "--to", "ollama"], 2, ["the folder's name is empty"]),
    (["merge", "", "{folder}/a", "{folder}/b"], 2, ["the model's name is empty"]),
    (["download", ""], 2, ["unknown model ``"]),
    (["download", "nope"], 2, ["unknown model `nope`", "owner/repository/file.gguf"]),
    (["download", "o/r/../../x.gguf"], 2, ["leads out of its folder"]),
    (["download", "o/r/x.gguf", "--to", "{folder}"], 4, ["cannot be reached"]),
]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    WRONG,
    ids=[" ".join(args)[:50].replace("\0", "0") for args, *_ in WRONG],
)
def test_wrong_input_is_told_in_one_message(
    args: list[str],
    code: int,
    says: list[str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ggft.hub.fetch.WAIT_S", 0.0)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "page.gguf").write_text("<!DOCTYPE html><html></html>")
    os.mkfifo(folder / "pipe")

    def fill(text: str) -> str:
        return text.replace("{model}", str(tiny)).replace("{folder}", str(folder))

    before = sorted(folder.iterdir())
    assert run(cli, [fill(arg) for arg in args]) == code
    out, err = capsys.readouterr()
    assert out == ""
    for part in says:
        assert fill(part) in err
    messages = [line for line in err.splitlines() if line.startswith("ggft: ")]
    assert len(messages) == 1
    assert "Traceback" not in err
    assert "internal error" not in err
    assert sorted(folder.iterdir()) == before


COMPUTING = [
    "plan -m {model}",
    "plan -m {model} -d {data}",
    "plan -m {model} --kernels ggml",
    "finetune -m {model} -d {data} -o {folder}/run",
    "eval -m {model} -d {data}",
    "bench -m {model}",
    "doctor",
    "doctor --json --graph -m {model}",
]


@pytest.mark.parametrize("args", COMPUTING)
@pytest.mark.parametrize(
    ("isa", "says"),
    [("mmx", "no instruction set of ggft"), ("avx512-bf16", "this processor lacks")],
)
def test_an_instruction_set_that_cannot_be_used_is_told_in_one_message(
    args: str,
    isa: str,
    says: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isa in ISAS or (isa != "mmx" and platform.machine() != "x86_64"):
        pytest.skip(f"this machine runs {isa}, or no x86")
    data = tmp_path / "rows.json"
    data.write_text(
        '[{"instruction": "one", "output": "1"}, {"instruction": "two", "output": "2"}]'
    )
    monkeypatch.setenv("GGFT_ISA", isa)
    filled = args.format(model=tiny, data=data, folder=tmp_path)
    assert run(cli, filled.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    messages = [line for line in err.splitlines() if line.startswith("ggft: ")]
    assert len(messages) == 1
    assert f"GGFT_ISA is '{isa}'" in messages[0]
    assert says in messages[0]
    assert all(name in messages[0] for name in ISAS)
    assert list(tmp_path.iterdir()) == [data]


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, []) == 2
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_and_debug(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, [name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: ggft {name}" in text
    assert "--debug" in text
    assert (cli.commands[name].help or "").rstrip().endswith((".", "]."))


def test_no_flag_means_two_things() -> None:
    for name, entry in cli.commands.items():
        seen: dict[str, str | None] = {}
        for parameter in entry.get_params(click.Context(entry)):
            for flag in (*parameter.opts, *parameter.secondary_opts):
                if flag.startswith("-"):
                    assert flag not in seen, f"ggft {name}: {flag} is declared twice"
                    seen[flag] = parameter.name


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from ggft.cli import cli\n"
        "from ggft.command import run\n"
        "assert run(cli, sys.argv[1:]) == 0\n"
        "heavy = {'numpy', 'llama_cpp', 'ggft._native', 'huggingface_hub', 'jinja2', 'gguf'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for args in (["--help"], ["finetune", "--help"], ["generate", "--help"], ["--version"]):
        subprocess.run([sys.executable, "-c", code, *args], check=True, capture_output=True)


def toy(action: object) -> CommandGroup:
    """Return a group whose one command, `act`, runs `action`."""
    group = CommandGroup(name="toy")

    @command(group, "ggft.settings.commands:DownloadConfig")
    def act(config: object) -> object:
        """Act."""
        if isinstance(action, BaseException):
            raise action
        return action

    return group


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (None, 0, ""),
        (7, 7, ""),
        (InputError("bad", path="f", line=3, found=1, expected=2), 2, "f:3: bad (found 1, exp"),
        (NetworkError("gone", hint="try later"), 4, "ggft: gone\n  → try later"),
        (NumericError("NaN"), 5, "NaN"),
        (Interrupted("stopped"), 130, "stopped"),
        (Interrupted("stopped", signal_number=15), 143, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 3, "out of memory"),
        (ImportError("x.so: failed to map segment from shared object"), 3, "out of memory"),
        (RuntimeError("can't start new thread"), 3, "ulimit -u"),
        (FileNotFoundError(2, "No such file or directory", "x.bin"), 2, "x.bin: No such file"),
        (PermissionError(13, "Permission denied", "x.bin"), 2, "x.bin: Permission denied"),
        (OSError(28, "No space left on device", "x.bin"), 3, "x.bin: No space left"),
        (BrokenPipeError(32, "Broken pipe"), 0, ""),
        (GgftError("evil \x1b[31m name"), 2, "evil \\x1b[31m name"),
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops"),
    ],
    ids=repr,
)
def test_exit_codes(
    raised: object,
    code: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not this process's own stdout, which capsys reads.
    monkeypatch.setattr("ggft.command.silence_stdout", lambda: None)
    assert run(toy(raised), ["act"]) == code
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("ggft")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logger.level)
    assert run(toy(InputError("bad")), ["act", "--debug"]) == 2
    assert logging.getLogger().level > logging.DEBUG  # others' logs may hold signed addresses
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().endswith("ggft: bad")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rnak: 4\n", "unknown setting `rnak`"),
        ("rank: four\n", "--rank has a wrong value"),
        ("rank: 0\n", "--rank is out of range"),
        ("- a\n", "`key: value`"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_config_file_errors_name_the_file(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert run(cli, ["finetune", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "config.yaml" in err


def test_flags_win_over_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    path = tmp_path / "config.yaml"
    path.write_text("rank: 4\nlearning-rate: 0.001\npacking: false\n")
    monkeypatch.setattr("ggft.recipes.finetune.finetune", seen.append)
    monkeypatch.setattr("ggft.hub.download.find_model", Path)
    args = ["-d", "a,b.json", "-d", "c", "--rank", "2", "--target-modules", "attn_q,ffn_up"]
    assert run(cli, ["finetune", "--config", str(path), *args]) == 0
    (config,) = seen
    assert (config.rank, config.lr, config.packing) == (2, 0.001, False)
    assert config.data == ("a,b.json", "c")  # a path may hold a comma
    assert config.target_modules == ("attn_q", "ffn_up")


def test_a_closed_pipe_is_no_error(tiny: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [*GGFT, "generate", "hello", "-m", str(tiny), "-n", "5"],
            stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)


def test_no_stdout_at_all_is_no_error(tiny: Path) -> None:
    command = f"{' '.join(GGFT[:1])} -c '{GGFT[2]}' generate hi -m '{tiny}' -n 2 >&- 2>&- <&-"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number: int, code: int, tiny: Path) -> None:
    with subprocess.Popen(
        [*GGFT, "chat", "-m", str(tiny), "-n", "2"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.readline() != ""  # it answers: all is set up, and it waits for more
        time.sleep(0.05)
        process.send_signal(number)
        # Its input stays open meanwhile: the end of it would end the chat, too.
        assert process.wait(timeout=20) == code
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "ggft: interrupted"


def test_ctrl_c_in_a_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    group = CommandGroup()

    @group.command()
    def wait() -> None:
        raise KeyboardInterrupt

    assert run(group, ["wait"]) == 130
    assert capsys.readouterr().err == "ggft: interrupted\n"
