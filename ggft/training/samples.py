"""Answers before and after: a few questions of the data, asked of the base and of the adapter."""

from __future__ import annotations

from pathlib import Path

from ggft.llama.model import LlamaModel
from ggft.settings.training import SettledConfig
from ggft.setup.inputs import BaseModel, Data
from ggft.system.errors import ResourceError
from ggft.system.progress import Progress
from ggft.system.signals import StopSignals

MAX_TOKENS = 64


def ask(
    base: BaseModel,
    data: Data,
    adapter: Path,
    config: SettledConfig,
    stop: StopSignals,
    progress: Progress,
) -> list[dict[str, str]]:
    """Return question, answer before and answer after for up to `config.samples` examples.

    Held-out examples are taken where there are any. A signal, or no memory for the model, ends
    this early; a report without answers is better than none.
    """
    prompts = choose_prompts(data, config.samples)
    answers: list[list[str]] = []
    try:
        for path in (None, adapter):
            answers.append([])
            n_ctx = max(map(len, prompts), default=0) + MAX_TOKENS
            with LlamaModel(
                base.file.path, path, n_ctx=n_ctx, threads=config.threads, device=config.device
            ) as model:
                for prompt in prompts:
                    answers[-1].append(_answer(base, model, prompt, stop))
    except ResourceError as error:
        progress.warn(f"no answers in the report: {error.message}")
        return []
    if stop.signal_number is not None:
        return []
    return [
        {"question": _question(base, prompt), "before": before, "after": after}
        for prompt, before, after in zip(prompts, *answers, strict=True)
    ]


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


def _answer(base: BaseModel, model: LlamaModel, prompt: list[int], stop: StopSignals) -> str:
    ids: list[int] = []
    for token in model.generate(
        prompt, stop_ids=base.template.stop_ids, max_tokens=MAX_TOKENS, temperature=0.0
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
