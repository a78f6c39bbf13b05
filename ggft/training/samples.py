"""Questions of the data, asked at temperature 0: some to show, more to judge by.

A verdict from losses alone can be wrong: what a user meets is an answer. So rows are asked, trained
ones and held-out ones, and their answers compared with what the rows say.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggft.data.store import StoreView
from ggft.llama.model import LlamaModel
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import BaseModel, Data
from ggft.system.errors import ResourceError
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals

MAX_TOKENS = 64  # of an answer; longer ones are not compared word by word
SPARE_TOKENS = 16  # by which an answer may be longer than the one that was expected


@dataclass(frozen=True)
class Answers:
    """What base and adapter say.

    Attributes:
        samples: Records of question, answer before and answer after.
        asked: Records of question, expected and given answer, whether the row was held_out, and
            whether the answer is as_given in the row.
    """

    samples: list[dict[str, str]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A row to ask: token ids of the prompt, and of the answer without its end token."""

    prompt: list[int]
    expected: list[int]
    held_out: bool


def ask(
    base: BaseModel,
    data: Data,
    adapter: Path,
    config: SettledConfig,
    stop: StopSignals,
    progress: Progress,
) -> Answers:
    """Return up to `config.samples` answers before and after, and up to `config.ask` of each side.

    Samples are held-out examples where there are any. A signal, or no memory for the model, ends
    this early; a report without answers is better than none.
    """
    started_s = time.monotonic()
    prompts = choose_prompts(data, config.samples)
    questions = [
        *choose_questions(base, data.train, config.ask, held_out=False),
        *choose_questions(base, data.validation, config.ask, held_out=True),
    ]
    longest = max(map(len, [*prompts, *(question.prompt for question in questions)]), default=0)
    before: list[str] = []
    after: list[str] = []
    given: list[str] = []
    try:
        for path, answers in ((None, before), (adapter, after)):
            if not prompts and (path is None or not questions):
                continue
            with LlamaModel(
                base.file.path, path, n_ctx=longest + MAX_TOKENS + SPARE_TOKENS,
                threads=config.threads, device=config.device,
            ) as model:  # fmt: skip
                for prompt in prompts:
                    answers.append(_answer(base, model, prompt, MAX_TOKENS, stop))
                for question in questions if path else ():
                    most = len(question.expected) + SPARE_TOKENS
                    given.append(_answer(base, model, question.prompt, most, stop))
    except ResourceError as error:
        progress.warn(f"no answers in the report: {error.message}")
        return Answers()
    if stop.signal_number is not None:
        return Answers()
    if questions:
        seconds = time.monotonic() - started_s
        progress.note(f"asked {len(questions)} rows in {seconds:.0f} s (--ask 0 asks none)")
    samples = [
        {"question": _question(base, prompt), "before": old, "after": new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    return Answers(samples, [_record(base, q, g) for q, g in zip(questions, given, strict=True)])


def choose_prompts(data: Data, n: int) -> list[list[int]]:
    """Return the prompts of `n` examples, spread evenly; token ids up to the first trained one."""
    store = data.validation if len(data.validation) else data.train
    prompts: list[list[int]] = []
    for index in range(0, len(store), max(1, len(store) // max(1, n))):
        ids, trained = store.get(index)
        first = int(trained.argmax())
        if len(prompts) < n and first > 0:
            prompts.append(ids[:first].tolist())
    return prompts


def choose_questions(
    base: BaseModel, store: StoreView, n: int, *, held_out: bool
) -> list[Question]:
    """Return up to `n` rows to ask, spread evenly, of those whose answer is not too long."""
    questions: list[Question] = []
    for number in range(min(n, len(store))):
        ids, trained = store.get(number * len(store) // min(n, len(store)))
        first = int(trained.argmax())
        answer = ids[first:].tolist()
        whole = trained[first:].all() and answer[-1] == base.template.end_id
        if first and whole and len(answer) <= MAX_TOKENS:
            questions.append(Question(ids[:first].tolist(), answer[:-1], held_out))
    return questions


def _record(base: BaseModel, question: Question, given: str) -> dict[str, Any]:
    expected = _text(base, question.expected)
    return {
        "question": _question(base, question.prompt),
        "expected": expected,
        "given": given,
        "held_out": question.held_out,
        "as_given": given == expected,
    }


def _answer(
    base: BaseModel, model: LlamaModel, prompt: list[int], most: int, stop: StopSignals
) -> str:
    ids: list[int] = []
    for token in model.generate(
        prompt, stop_ids=base.template.stop_ids, max_tokens=most, temperature=0.0
    ):
        if stop.signal_number is not None:
            break
        ids.append(token)
    return _text(base, ids)


def _question(base: BaseModel, prompt: list[int]) -> str:
    """Return what was asked; without the template's text where that is the usual one."""
    parts = base.template.prompt_parts([{"role": "user", "content": "?"}])
    at = next(n for n, part in enumerate(parts) if part.is_content)
    t = base.template.tokenizer
    bos = t.token_text(t.bos_id) if t.bos_id is not None else ""
    text = _text(base, prompt).removeprefix(bos)
    before = "".join(part.text for part in parts[:at]).removeprefix(bos).strip()
    after = "".join(part.text for part in parts[at + 1 :]).strip()
    if text.startswith(before) and text.endswith(after):
        return text[len(before) : len(text) - len(after)].strip()
    return text


def _text(base: BaseModel, ids: list[int]) -> str:
    return base.template.tokenizer.decode(ids).decode("utf-8", "replace").strip()
