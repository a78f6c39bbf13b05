"""Any row is read or refused with its line, whatever stands in columns that have a meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggft.data.examples import FORMATS, Example, RowOptions, RowReader
from ggft.data.files import Row
from ggft.data.rows.columns import NAMES
from ggft.data.rows.turns import CONTENT_KEYS, MASKED_KEYS, REFUSED_KEYS, ROLE_KEYS, TRAIN_KEYS
from ggft.system.errors import InputError

COLUMNS = [name for names in NAMES.values() for name in names]
FIELDS = [
    *ROLE_KEYS, *CONTENT_KEYS, *TRAIN_KEYS, *MASKED_KEYS, *REFUSED_KEYS, "replies", "rank",
    "message_id", "parent_id", "title", "name", "type", "human", "assistant", "label",
]  # fmt: skip
WORDS = [
    "user", "assistant", "system", "tool", "prompter", "text", "say", "", " ", "[", "[]", "{}",
    '[{"role": "user"}]', "<|im_start|>user\na<|im_end|>", "[INST] a [/INST] b", "</s>", "\0",
]  # fmt: skip
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
    | st.sampled_from(WORDS) | st.text(max_size=5)
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(WORDS), "content": values},
        optional=dict.fromkeys(sorted({*FIELDS} - {"role", "content"}), values),
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    row=st.dictionaries(
        st.sampled_from(COLUMNS) | st.text(max_size=4), values | turns, min_size=1, max_size=5
    ),
    format_name=st.sampled_from(FORMATS),
)
def test_any_row_is_an_example_or_refused(row: dict[str, Any], format_name: str) -> None:
    reader = RowReader(RowOptions(format_name))
    said = ""
    examples: list[Example] = []
    try:
        examples = list(reader.examples(Row(row, Path("x"), 7)))
    except InputError as error:
        said = str(error)
    assert not said or said.startswith("x:7: ")
    for example in examples:
        assert all(m["role"] in ("system", "user", "assistant", "tool") for m in example.messages)
        json.dumps(example.messages)
    reader.notes()
