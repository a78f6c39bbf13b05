"""Options declared once, as fields of frozen dataclasses.

A field made with `option(...)` carries its flags, help, choices and bounds. The command line turns
`options_of(SomeConfig)` into flags; `make(SomeConfig, ...)` lays flags over a config file over the
defaults, converts and checks every value; `to_record` gives what a run directory keeps.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ggft.system.errors import InputError
from ggft.system.files import require_regular_file

_MAX_FILE_BYTES = 1 << 20
ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Option:
    """One setting, described once.

    `kind` is bool, int, float or str; `multiple` means a tuple of `kind`, whose parts may stand in
    one value when `split_commas` is set; `flags_off` are the flags that set a bool to False.
    `shown` is the default in words where the value is None.
    """

    name: str
    kind: type
    default: Any
    required: bool
    optional: bool
    multiple: bool
    flags: tuple[str, ...]
    flags_off: tuple[str, ...]
    help: str
    choices: tuple[str, ...] | None
    minimum: float | None
    above: float | None
    maximum: float | None
    below: float | None
    metavar: str | None
    shown: str | None
    recorded: bool
    split_commas: bool

    @property
    def flag(self) -> str:
        """The first long flag, as messages name it."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.flags[0])


def option(
    *flags: str,
    help: str,  # noqa: A002
    default: Any = MISSING,
    off: tuple[str, ...] = (),
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    shown: str | None = None,
    recorded: bool = True,
    split_commas: bool = False,
) -> Any:
    """Declare a dataclass field that is also a flag.

    The main flag comes first, aliases after it; `off` flags turn a bool off. `help` is one clause
    without a final period. `minimum` and `maximum` are inclusive bounds, `above` and `below` are
    exclusive. `shown` is the default in words where it is None. `recorded` says whether a run's
    config.yaml repeats the setting. `split_commas` lets one value of a tuple name several parts;
    a path, which may hold commas, does not have it.
    """
    meta = {
        "flags": flags,
        "flags_off": off,
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "metavar": metavar,
        "shown": shown,
        "recorded": recorded,
        "split_commas": split_commas,
    }
    if default is MISSING:
        return field(metadata=meta)
    return field(default=default, metadata=meta)


def options_of(config_class: type) -> tuple[Option, ...]:
    """Return every option of a config dataclass, in order of declaration."""
    hints = typing.get_type_hints(config_class)
    result = []
    for item in fields(config_class):
        if "flags" not in item.metadata:
            continue
        kind, optional, multiple = _split_type(hints[item.name])
        required = item.default is MISSING
        default = None if required else item.default
        result.append(
            Option(
                name=item.name,
                kind=kind,
                default=default,
                required=required,
                optional=optional,
                multiple=multiple,
                **item.metadata,
            )
        )
    return tuple(result)


def _split_type(hint: Any) -> tuple[type, bool, bool]:
    """Return (kind, optional, multiple) of `X`, `X | None` or `tuple[X, ...]`."""
    optional = multiple = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        optional = True
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        multiple = True
        hint = typing.get_args(hint)[0]
    return hint, optional, multiple


def make(
    config_class: type[ConfigT],
    given: Mapping[str, Any],
    config_file: str | Path | None = None,
) -> ConfigT:
    """Build a config from flags over a config file over defaults, all values checked.

    `given` holds what the user gave, by field name. Keys of the YAML `config_file` are field names
    or long flags without the leading dashes.

    Raises:
        InputError: an unknown key (names the nearest), a wrong type, a value out of range.
    """
    values: dict[str, Any] = {}
    options = {entry.name: entry for entry in options_of(config_class)}
    if config_file is not None:
        for name, value in read_config_file(config_class, config_file).items():
            values[name] = _convert(options[name], value, where=str(config_file))
    for name, value in given.items():
        if name not in options:
            raise _unknown_key(config_class, name, None)
        values[name] = _convert(options[name], value, where=None)
    for name, entry in options.items():
        if entry.required and name not in values:
            raise InputError(
                f"{entry.flag} is required",
                expected=None if entry.choices is None else " or ".join(entry.choices),
            )
    return config_class(**values)


def read_config_file(config_class: type, path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping and return its values by field name.

    Raises:
        InputError: unreadable, not a mapping, an unknown or repeated key.
    """
    import yaml

    if require_regular_file(Path(path)) > _MAX_FILE_BYTES:
        raise InputError("a config file is not that large", path=path, expected="a page of YAML")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file cannot be read: {error}", path=path) from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        loaded = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        what = getattr(error, "problem", None) or str(error)
        raise InputError(f"not valid YAML: {what}", path=path, line=line) from None
    if node is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError("config file must hold `key: value` lines", path=path)
    names = _names_by_key(config_class)
    values: dict[str, Any] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        name = names.get(key.replace("-", "_"))
        if name is None:
            raise _unknown_key(config_class, key, path, line)
        if name in values:
            raise InputError(f"`{key}` is set twice", path=path, line=line)
        values[name] = loaded[key]
    return values


def _names_by_key(config_class: type) -> dict[str, str]:
    """Map field names and long flags (dashes as underscores) to field names."""
    names = {}
    for entry in options_of(config_class):
        for flag in entry.flags:
            if flag.startswith("--"):
                names[flag[2:].replace("-", "_")] = entry.name
        names[entry.name] = entry.name
    return names


def _unknown_key(
    config_class: type, key: str, path: str | Path | None, line: int | None = None
) -> InputError:
    near = difflib.get_close_matches(key.replace("-", "_"), _names_by_key(config_class), n=1)
    hint = f"did you mean `{near[0]}`?" if near else "the keys are the long flags of the command"
    return InputError(f"unknown setting `{key}`", path=path, line=line, hint=hint)


def _convert(entry: Option, value: Any, where: str | None) -> Any:
    """Return `value` as the option's type, checked against its choices and bounds."""
    if value is None:
        if entry.optional or entry.default is None:
            return None
        raise InputError(f"{entry.flag} has no value", path=where, expected=entry.kind.__name__)
    if entry.multiple:
        parts = value if isinstance(value, list | tuple) else [value]
        if entry.split_commas:
            parts = [part for text in parts for part in str(text).split(",") if part.strip()]
        return tuple(_convert_one(entry, part, where) for part in parts)
    return _convert_one(entry, value, where)


def _convert_one(entry: Option, value: Any, where: str | None) -> Any:
    number: float | int | None = None
    try:
        if entry.kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif entry.kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            value = number = int(value)
        elif entry.kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = number = float(value)
        elif isinstance(value, dict | list):
            raise ValueError
        else:
            value = str(value).strip()
            if not value and entry.metavar not in (None, "TEXT"):
                raise InputError(f"{entry.flag} is empty", path=where, expected=entry.metavar)
    except (TypeError, ValueError):
        raise InputError(
            f"{entry.flag} has a wrong value", path=where, found=repr(value),
            expected={bool: "true or false", int: "a whole number", float: "a number"}.get(
                entry.kind, "text"
            ),
        ) from None  # fmt: skip
    if entry.choices is not None and value not in entry.choices:
        near = difflib.get_close_matches(str(value), entry.choices, n=1)
        raise InputError(
            f"{entry.flag} has an unknown value", path=where, found=repr(value),
            expected=", ".join(entry.choices),
            hint=f"did you mean `{near[0]}`?" if near else None,
        )  # fmt: skip
    if number is not None:
        _check_bounds(entry, number, where)
    return value


def _check_bounds(entry: Option, number: float, where: str | None) -> None:
    bounds = []
    if entry.minimum is not None:
        bounds.append((number >= entry.minimum, f"at least {entry.minimum:g}"))
    if entry.above is not None:
        bounds.append((number > entry.above, f"more than {entry.above:g}"))
    if entry.maximum is not None:
        bounds.append((number <= entry.maximum, f"at most {entry.maximum:g}"))
    if entry.below is not None:
        bounds.append((number < entry.below, f"less than {entry.below:g}"))
    if not math.isfinite(number) or not all(holds for holds, _ in bounds):
        expected = " and ".join(text for _, text in bounds) or "a finite number"
        raise InputError(
            f"{entry.flag} is out of range", path=where, found=number, expected=expected
        )


def to_record(config: Any) -> dict[str, Any]:
    """Return the recorded settings by field name, tuples as lists."""
    record = {}
    for entry in options_of(type(config)):
        if entry.recorded:
            value = getattr(config, entry.name)
            record[entry.name] = list(value) if isinstance(value, tuple) else value
    return record


def to_yaml(record: Mapping[str, Any]) -> str:
    """Return a record as YAML that `make(..., config_file=)` reads back."""
    import yaml

    return str(yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True))
