"""The READMEs say what is so: generated parts are current, commands exist, files are there.

python -m tests.test_docs     writes the generated parts anew (make docs)
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from ggft.cli import cli
from ggft.command import run

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
READMES = [ENGLISH, CHINESE]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
GENERATED = re.compile(r"(<!-- (commands|speed): .*? -->\n).*?(<!-- /\2 -->)", re.DOTALL)
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)\)")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands_text() -> str:
    """Return the list of commands as ggft's help gives it."""
    context = click.Context(cli)
    rows = [
        f"ggft {name:<10} {command.get_short_help_str(limit=100).rstrip('.')}"
        for name in cli.list_commands(context)
        if (command := cli.get_command(context, name)) is not None
    ]
    return "```\n" + "\n".join(rows) + "\n```\n"


def speed_text() -> str:
    """Return chart and table of each kind of processor whose `make bench` results are kept."""
    return "\n".join(map(speed_table, sorted(RESULTS.glob("*.json"))))


def speed_table(path: Path) -> str:
    """Return the chart and the table of a record."""
    record = json.loads(path.read_text(encoding="utf-8"))
    chart = path.with_suffix(".svg").relative_to(ROOT).as_posix()
    lines = [
        f"![tokens per second and peak memory, ggft beside PEFT]({chart})\n",
        f"{record['model']}, rank 8, seven linears; {record['machine']}, whose fast path is "
        f"{record['products']}; {record['date']}; median of {record['runs']}:\n",
        "| | rows x tokens | tokens/s | peak memory, MB |",
        "|---|---|---|---|",
    ]
    for row in sorted(record["variants"], key=lambda row: -float(row["tokens_per_s"])):
        speed, memory = row["tokens_per_s"], row["peak_rss_bytes"] / 1e6
        lines.append(f"| {row['name']} | {row['shape']} | {speed:.0f} | {memory:.0f} |")
    return "\n".join(lines) + "\n"


def generated(text: str) -> str:
    """Return a README with its generated parts made anew."""
    parts = {"commands": commands_text, "speed": speed_text}
    return GENERATED.sub(lambda match: match[1] + parts[match[2]]() + match[3], text)


def shell_lines() -> list[str]:
    """Return the commands that the README tells people to type."""
    blocks = BLOCK.findall(ENGLISH.read_text(encoding="utf-8"))
    return [line for kind, text in blocks if kind == "sh" for line in text.splitlines() if line]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_generated_parts_are_current(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [match[2] for match in GENERATED.finditer(text)] == ["commands", "speed"]
    assert text == generated(text), "make docs"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_every_attack_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \*\*.*?(?=^- |^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(entries) > 20
    for entry in entries:
        named = re.findall(r"\[`(tests/\S+?)::(\w+)`\]", entry)
        assert named, f"no test: {entry}"
        for file, name in named:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_both_languages_tell_the_same() -> None:
    english, chinese = (path.read_text(encoding="utf-8") for path in READMES)
    assert BLOCK.findall(english) == BLOCK.findall(chinese)
    levels = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]
    code = [sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text))) for text in (english, chinese)]
    assert code[0] == code[1]


def test_the_tree_names_what_exists() -> None:
    (tree,) = (
        text for _, text in BLOCK.findall(ENGLISH.read_text(encoding="utf-8")) if "native/" in text
    )
    for line in tree.splitlines():
        assert (ROOT / line.split()[0]).exists(), line


@pytest.mark.parametrize("line", shell_lines())
def test_commands_exist(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:.*## ", MAKEFILE, re.MULTILINE), f"no target {words[1]}"
        for word in words[2:]:
            assert re.search(rf"^{word.partition('=')[0]} =", MAKEFILE, re.MULTILINE), word
    elif words[0] == "ggft":
        command = cli.commands[words[1]]
        context = command.make_context(words[1], words[2:])
        assert all(flag in words or not flag.startswith("--") for flag in context.args)
    else:
        assert words == [".", ".venv/bin/activate"]


def test_the_commands_run(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the README's ggft commands in order, on its own example, for one step and four tokens."""
    (example,) = (
        text for kind, text in BLOCK.findall(ENGLISH.read_text(encoding="utf-8")) if kind == "json"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train_data.json").write_text(example, encoding="utf-8")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / smollm2.name).symlink_to(smollm2)
    short = {"finetune": ["--max-steps", "1"], "generate": ["-n", "4"], "chat": ["-n", "4"]}
    lines = [shlex.split(line)[1:] for line in shell_lines() if line.startswith("ggft ")]
    assert len(lines) >= 8
    start = [sys.executable, "-c", "from ggft.__main__ import main; main()"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for args in lines:
        process = subprocess.run(
            [*start, *args, *short.get(args[0], [])],
            input="hello\n", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert process.returncode == 0, f"ggft {shlex.join(args)}: {process.stderr}"
        if args[0] != "finetune":  # which reports on stderr
            assert process.stdout.strip()


def test_help_documents_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in cli.commands.items():
        for parameter in command.get_params(click.Context(command)):
            if isinstance(parameter, click.Option):
                assert parameter.help, f"ggft {name} {parameter.opts[0]} has no help"
    assert run(cli, ["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.commands)


def test_the_makefile_suits_old_tools() -> None:
    """GNU Make 3.81 knows none of these, and bash 3.2 none of those."""
    for new in (
        ".ONESHELL",
        "!=",
        "$(file",
        "&:",
        "$(let",
        ".EXTRA_PREREQS",
        "|&",
        "mapfile",
        "${!",
        ",,}",
    ):
        assert new not in MAKEFILE, new


def test_phony_targets_are_the_rules_with_a_name() -> None:
    (names,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert set(names.split()) == set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(generated(readme.read_text(encoding="utf-8")), encoding="utf-8")
