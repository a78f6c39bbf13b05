from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ggft.gguf.linears import parse_layers, parse_targets
from ggft.settings.option import make, options_of, to_record, to_yaml
from ggft.settings.training import EvalConfig, FinetuneConfig
from ggft.system.errors import InputError
from ggft.system.text import parse_size


def config(**given: Any) -> FinetuneConfig:
    return make(FinetuneConfig, given)


@pytest.mark.parametrize("config_class", [FinetuneConfig, EvalConfig])
def test_each_flag_belongs_to_one_option(config_class: type) -> None:
    flags = [flag for entry in options_of(config_class) for flag in entry.flags + entry.flags_off]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("config_class", [FinetuneConfig, EvalConfig])
def test_each_default_is_valid_and_each_none_is_explained(config_class: type) -> None:
    for entry in options_of(config_class):
        if entry.default is None:
            assert entry.shown or entry.name == "adapter"
        else:
            make(config_class, {entry.name: entry.default})


def test_tutorial_defaults() -> None:
    assert (config().warmup_steps, config().save_steps, config().logging_steps) == (None, 100, 10)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "3e-4", 3e-4),
        ("lr", 1, 1.0),
        ("rank", "16", 16),
        ("rank", 16.0, 16),
        ("epochs", None, None),
        ("packing", False, False),
        ("target_modules", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("target_modules", ["attn_q"], ("attn_q",)),
        ("data", "a.json", ("a.json",)),
        ("lr_scheduler", "linear", "linear"),
    ],
)
def test_values_are_converted(name: str, value: Any, expected: Any) -> None:
    assert getattr(config(**{name: value}), name) == expected


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("rank", 0, ["--rank", "found 0", "at least 1"]),
        ("rank", -1, ["--rank", "found -1"]),
        ("rank", "eight", ["--rank", "'eight'", "a whole number"]),
        ("rank", 1.5, ["--rank", "1.5"]),
        ("rank", True, ["--rank", "True"]),
        ("lr", "nan", ["--lr", "nan", "more than 0"]),
        ("lr", "inf", ["--lr", "inf"]),
        ("lr", 0, ["--lr", "more than 0"]),
        ("dropout", 1.0, ["--dropout", "less than 1"]),
        ("epochs", 0, ["--epochs", "at least 1"]),
        ("warmup_steps", -1, ["--warmup-steps", "at least 0"]),
        ("val_split", 1, ["--val-split", "less than 1"]),
        ("precision", "f16", ["--precision", "'f16'", "fast, f32"]),
        ("lr_scheduler", "cosin", ["did you mean `cosine`"]),
        ("packing", "maybe", ["--packing", "true or false"]),
        ("seed", 0, ["--seed", "at least 1"]),
        ("model", {}, ["--model", "text"]),
        ("rnak", 8, ["`rnak`", "did you mean `rank`"]),
    ],
)
def test_wrong_values_are_named(name: str, value: Any, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        config(**{name: value})
    for part in parts:
        assert part in str(caught.value)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("rank: 4\nlr: 1e-3\n")
    made = make(FinetuneConfig, {"rank": "2"}, path)
    assert (made.rank, made.lr, made.epochs) == (2, 1e-3, None)


def test_the_file_may_use_aliases(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 1e-3\nnum-train-epochs: 7\n")
    made = make(FinetuneConfig, {}, path)
    assert (made.lr, made.epochs) == (1e-3, 7)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("epoch: 3", [":1:", "`epoch`", "did you mean `epochs`"]),
        ("rank: 1\nzzzzz: 3", [":2:", "`zzzzz`"]),
        ("rank: 1\nrank: 2", [":2:", "twice"]),
        ("lr: 1\nlearning_rate: 2", [":2:", "twice"]),
        ("- rank", ["key: value"]),
        ("rank: [", ["not valid YAML"]),
        ("rank: !!python/object:os.system {}", ["not valid YAML"]),
        ("rank: 0", ["--rank", "at least 1"]),
    ],
)
def test_bad_config_files_are_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        make(FinetuneConfig, {}, path)
    for part in ["c.yaml", *parts]:
        assert part in str(caught.value)


def test_the_record_reads_back(tmp_path: Path) -> None:
    made = config(model="m.gguf", data=["a.json", "b.json"], lr=1e-3, recompute=True)
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(to_record(made)))
    assert make(FinetuneConfig, {}, path) == made


@pytest.mark.parametrize(
    ("text", "expected"),
    [("6G", 6 << 30), ("750M", 750 << 20), ("1.5GiB", 3 << 29), ("2gb", 2 << 30), ("1024", 1024)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "0", "six", "nan", "1e40", "6X"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InputError, match="--memory"):
        parse_size(text)


def test_targets() -> None:
    assert parse_targets(("v_proj", "attn_q", "q_proj")) == ("attn_q", "attn_v")
    assert len(parse_targets(("all",))) == 7
    assert parse_targets(("mlp",)) == ("ffn_gate", "ffn_up", "ffn_down")
    with pytest.raises(InputError, match=r"'q_prj'.*\n.*did you mean `q_proj`"):
        parse_targets(("q_prj",))
    with pytest.raises(InputError):
        parse_targets(())


@pytest.mark.parametrize(
    ("text", "expected"),
    [("all", (0, 30)), ("8", (22, 30)), ("30", (0, 30)), ("3-5", (3, 6)), ("0-29", (0, 30))],
)
def test_layers(text: str, expected: tuple[int, int]) -> None:
    assert parse_layers(text, 30) == expected


@pytest.mark.parametrize("text", ["0", "31", "-1", "5-3", "0-30", "x", "1-", "1-2-3", ""])
def test_bad_layers(text: str) -> None:
    with pytest.raises(InputError, match="0-29"):
        parse_layers(text, 30)
