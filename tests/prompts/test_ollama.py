"""Modelfiles: the tokens of training in Ollama, for every template on every family."""

from __future__ import annotations

import pytest

from ggft.prompts.builtin import BUILTIN
from ggft.prompts.messages import Message
from ggft.prompts.ollama import go_template, learn_turns, modelfile, ollama_ids
from ggft.system.errors import InputError
from tests.support import go_template as go
from tests.support.models import CHATML
from tests.support.vocabularies import FAMILIES, Model

MOVES_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.first and messages[0].role == 'system' %} {{ messages[0].content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM: Message = {"role": "system", "content": "You are terse."}
CHAT: list[Message] = [
    {"role": "user", "content": "What is the weather\nin Paris?"},
    {"role": "assistant", "content": "It is 21 degrees: 晴天。"},
    {"role": "user", "content": 'Thanks for "that" {{ .Content }} 你呢?'},
    {"role": "assistant", "content": "Welcome <b>!</b>"},
    {"role": "user", "content": "Bye"},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("vocabularies")
    return {name: Model(name, folder) for name in FAMILIES}


@pytest.mark.parametrize("name", [*BUILTIN, "gguf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ollama_gives_the_tokens_of_training(
    models: dict[str, Model], family: str, name: str
) -> None:
    template = models[family].template(name, CHATML)
    source = go_template(learn_turns(template))
    for messages in (CHAT[:1], [SYSTEM, *CHAT[:1]], CHAT[:3], [SYSTEM, *CHAT]):
        text = go.render(source, [dict(m) for m in messages])
        assert ollama_ids(template.tokenizer, text) == template.encode_prompt(messages)


def test_a_system_message_in_the_middle(models: dict[str, Model]) -> None:
    """As `/set system` of `ollama run` gives it."""
    for name in BUILTIN:
        template = models["llama2"].template(name)
        messages: list[Message] = [*CHAT[:2], SYSTEM, CHAT[2]]
        text = go.render(go_template(learn_turns(template)), [dict(m) for m in messages])
        assert ollama_ids(template.tokenizer, text) == template.encode_prompt(messages)


def test_an_answer_that_is_to_go_on(models: dict[str, Model]) -> None:
    """Ollama continues a last answer; nothing may be written behind it."""
    source = go_template(learn_turns(models["chatml"].template("chatml")))
    assert go.render(source, [dict(m) for m in CHAT[:2]]).endswith(CHAT[1]["content"])


@pytest.mark.parametrize(
    ("own", "says"),
    [
        (
            "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}",
            "depends on more",
        ),
        (MOVES_SYSTEM, "another order"),
        (
            CHATML.replace("{{ '<|im_start|>' +", "{{ loop.revindex ~ '<|im_start|>' +"),
            "cannot be split|depends on more",
        ),
    ],
)
def test_templates_without_an_equal(models: dict[str, Model], own: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        learn_turns(models["chatml"].template("gguf", own))
    assert error.value.exit_code == 2
    assert error.value.hint


def test_a_template_without_a_system_prompt(models: dict[str, Model]) -> None:
    own = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    turns = learn_turns(models["chatml"].template("gguf", own))
    assert not turns.takes_system
    assert "takes no system prompt" in turns.notes[0]
    assert "system" not in go_template(turns)


def test_a_template_that_strips(models: dict[str, Model]) -> None:
    assert "strips blanks" in learn_turns(models["llama3"].template("llama3")).notes[0]
    assert learn_turns(models["chatml"].template("chatml")).notes == []


def test_a_modelfile_keeps_what_is_put_in() -> None:
    template = '{{- "a \\"\\"\\" b\\n" }}'
    text = modelfile(
        "/a b/m.gguf", template, adapter="./adapter.gguf", system='Say "hi".\nTwice.',
        stops=["<|im_end|>", "</s>"],
    )  # fmt: skip
    assert go.read_modelfile(text) == {
        "FROM": ["/a b/m.gguf"],
        "ADAPTER": ["./adapter.gguf"],
        "TEMPLATE": [template],
        "SYSTEM": ['Say "hi".\nTwice.'],
        "PARAMETER": ['stop "<|im_end|>"', 'stop "</s>"'],
    }
    assert go.render(template, []) == 'a """ b\n'


@pytest.mark.parametrize(
    "given", [{"model": "/a\nb.gguf"}, {"model": "/a.gguf", "system": 'three """ quotes'}]
)
def test_what_no_modelfile_can_hold(given: dict[str, str]) -> None:
    with pytest.raises(InputError, match="cannot stand in a Modelfile"):
        modelfile(
            template="", adapter=None, system=given.get("system"), stops=[], model=given["model"]
        )
