"""The experiments behind ggft/data/recipes.toml: train our data sets as a user would, then ask.

A run is `ggft finetune` with nothing given but a seed, what `EXPERIMENTS` says, and `--set`: the
way to measure what the table does not choose. Each appends a line to bench/results/recipes.jsonl
with the settings that it had, so that a series that was stopped goes on with the next run, and a
changed table is measured anew. Without `--foreign`, runs that were measured with it count too.

    make recipes ARGS="--only bakery20 --seeds 1 --set alpha=16"
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ggft
from bench.common import ROOT, SMOLLM2
from ggft.llama.model import LlamaModel
from ggft.prompts.messages import Message
from ggft.prompts.template import Template
from ggft.settings.option import make
from ggft.settings.training import FinetuneConfig, SettledConfig
from ggft.setup.course import GENERAL, LIKELY_NATS, SHORT_TOKENS
from ggft.setup.open import choose_settings
from ggft.system.files import sha256_of

ROWS = ROOT / "bench" / "recipes"
RESULTS = ROOT / "bench" / "results" / "recipes.jsonl"
PERSONA = ROOT / "ggft" / "data" / "persona.json"
MAX_TOKENS = 48
ALL = 1000  # rows to ask: as many as there may be
N_ALPACA, ALPACA_HELD_OUT = 300, 0.2
CHOSEN = (
    "epochs", "batch_size", "lr", "lr_scheduler", "rank", "alpha", "dropout", "mix_share",
    "mix_as_base", "vary", "val_split", "patience",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """A data set, what is asked beside its rows, and settings that are given.

    Attributes:
        rows: The file of rows.
        asked: File of further questions: paraphrases with what to accept, or held-out ones.
        n_asked: How many of these belong to the rows; None is all.
        given: Settings of `ggft finetune`.
    """

    rows: Path
    asked: str | None = None
    n_asked: int | None = None
    given: dict[str, Any] = field(default_factory=dict)


def _facts(name: str, asked: str, n_asked: int | None = None, **given: Any) -> Experiment:
    return Experiment(
        ROWS / f"facts_{name}.json", f"facts_{asked}_paraphrases.json", n_asked, given
    )


EXPERIMENTS = {
    "bakery12": _facts("bakery_12", "bakery_20", 36),
    "bakery20": _facts("bakery_20", "bakery_20"),
    "museum40": _facts("museum_40", "museum_40"),
    "club100": _facts("club_100", "club_100"),
    "clinic20x3": _facts("clinic_20x3", "clinic_20"),
    "teahouse40": _facts("teahouse_zh_40", "teahouse_zh_40"),
    "persona": Experiment(PERSONA),
    "rhyme30": Experiment(ROWS / "style_rhyme_30.json", "style_rhyme_held_out.json"),
    "json30": Experiment(ROWS / "style_json_30.json", "style_json_held_out.json"),
    "rank64": _facts("bakery_20", "bakery_20", rank=64),
}


def alpaca(path: Path, folder: Path) -> Experiment:
    """Return the experiment on the first rows of a file of one's own, some of them held out."""
    rows = folder / "alpaca.json"
    rows.write_text(json.dumps(json.loads(path.read_text("utf-8"))[:N_ALPACA]), "utf-8")
    return Experiment(rows, given={"val_split": ALPACA_HELD_OUT})


class Bench:
    """The model, and what it does before any training.

    Args:
        threads: CPU threads.
        foreign: Rows of somebody else's, whose loss is measured before and after; None for none.
    """

    def __init__(self, threads: int, foreign: Path | None) -> None:
        self.model = ggft.open_model(SMOLLM2)
        self.threads = threads
        self.foreign = (
            None if foreign is None else ggft.load_data(self.model, foreign, val_split=0.0)
        )

    def load(self, x: Experiment, seed: int) -> ggft.Data:
        """Return the rows of an experiment."""
        return ggft.load_data(self.model, x.rows, val_split=x.given.get("val_split"), seed=seed)

    def settle(self, x: Experiment, data: ggft.Data) -> dict[str, Any]:
        """Return the settings that a run on the rows has."""
        given = {name: value for name, value in x.given.items() if name != "val_split"}
        settled = choose_settings(make(FinetuneConfig, {"model": str(SMOLLM2), **given}), data)
        return settings_of(settled)

    def base(self) -> dict[str, Any]:
        """Return what the base model answers and what it loses on foreign text."""
        figures: dict[str, Any] = {"experiment": "base"}
        with self.ask(None) as asker:
            figures["general_questions"] = asker.n_right(questions("general_questions.json"))
        if self.foreign:
            figures["foreign"] = self.foreign_loss(None)
        return figures

    def run(self, x: Experiment, data: ggft.Data, seed: int) -> dict[str, Any]:
        """Train and ask; return what came of it."""
        started_s = time.process_time()
        given = {name: value for name, value in x.given.items() if name != "val_split"}
        with tempfile.TemporaryDirectory(prefix="ggft-recipes-") as folder:
            result = ggft.train(
                self.model, data, output=Path(folder) / "run", show="quiet", seed=seed, samples=0,
                ask=ALL, threads=self.threads, **given,
            )  # fmt: skip
            outcome, measured = result.outcome, result.outcome.measured
            tally = outcome.tally()
            figures: dict[str, Any] = {
                "kind": outcome.account["row_kind"],
                "verdict": result.verdict.kind,
                "steps": len(outcome.steps),
                "exact": ratio(tally.n_as_given, tally.n_trained),
                "general": measured["general_after"] / measured["general_before"],
            }
            if outcome.n_held_out:
                figures["held_out"] = outcome.n_held_out
                figures["held_out_loss"] = result.losses.val_best
            with self.ask(result.adapter.path) as asker:
                if x.asked is not None:
                    asked = questions(x.asked)[: x.n_asked]
                    figures["asked_right"] = ratio(asker.n_right(asked), len(asked))
                figures["general_questions"] = asker.n_right(questions("general_questions.json"))
            if self.foreign:
                figures["foreign"] = self.foreign_loss(result.adapter)
        return {**figures, "cpu_s": round(time.process_time() - started_s)}

    def ask(self, adapter: Path | None) -> Asker:
        """Return the model with an adapter, ready to be asked."""
        model = LlamaModel(SMOLLM2, adapter, n_ctx=1024, threads=self.threads, device="cpu")
        return Asker(model, self.model.template)

    def foreign_loss(self, adapter: ggft.Adapter | None) -> float:
        """Return the loss on the rows of somebody else's."""
        assert self.foreign is not None
        return ggft.evaluate(self.model, self.foreign, adapter, threads=self.threads).loss


def settings_of(settled: SettledConfig) -> dict[str, Any]:
    """Return the settings that tell one recipe from another, and which rows were mixed in."""
    found = {name: getattr(settled, name) for name in CHOSEN}
    if settled.mix_share:
        found["mixed"] = sha256_of([GENERAL])[:8]
    if settled.mix_as_base:
        found["kept"] = f"{SHORT_TOKENS} tokens of {LIKELY_NATS} nats"
    return found


def ratio(part: int, whole: int) -> float | None:
    """Return a share; None of nothing."""
    return part / whole if whole else None


def questions(name: str) -> list[dict[str, Any]]:
    """Return the questions of a file."""
    found: list[dict[str, Any]] = json.loads((ROWS / name).read_text("utf-8"))
    return found


@dataclass(frozen=True)
class Asker:
    """A model that is asked at temperature 0."""

    model: LlamaModel
    template: Template

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    def answers(self, row: dict[str, Any]) -> Iterator[str]:
        """Yield the answer to a row's question, as far as it has come."""
        message: Message = {"role": "user", "content": row.get("question") or row["instruction"]}
        if row.get("input"):
            message["input"] = row["input"]
        ids: list[int] = []
        for token in self.model.generate(
            self.template.encode_prompt([message]), stop_ids=self.template.stop_ids,
            max_tokens=MAX_TOKENS, temperature=0.0,
        ):  # fmt: skip
            ids.append(token)
            yield self.template.tokenizer.decode(ids).decode("utf-8", "replace").strip()

    def is_right(self, row: dict[str, Any]) -> bool:
        """Return whether an answer holds what is accepted, or is in the style that was trained."""
        answer = ""
        for answer in self.answers(row):
            if any(text.lower() in answer.lower() for text in row.get("accept", ())):
                return True
        if "accept" in row:
            return False
        return _keys(answer) == _keys(row["output"]) if "output" in row else _is_rhyme(answer)

    def n_right(self, rows: Iterable[dict[str, Any]]) -> int:
        """Return how many questions are answered right."""
        return sum(map(self.is_right, rows))


def _is_rhyme(answer: str) -> bool:
    return answer.endswith("So sings the clock.")


def _keys(text: str) -> list[str] | None:
    """Return the keys of a JSON object; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return list(value) if isinstance(value, dict) else None


def read_results() -> list[dict[str, Any]]:
    """Return the lines that were measured."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]


def find(results: Iterable[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result that has all that is wanted."""
    return next((r for r in results if all(r.get(k) == v for k, v in wanted.items())), None)


def append(result: dict[str, Any]) -> None:
    """Add a line."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def table(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the medians over seeds, a line for each experiment and its settings."""
    base = find(results, {"experiment": "base"}) or {}
    lines = [
        "| data | settings | seeds | exact | asked otherwise | general loss | foreign loss |"
        f" general questions (base: {base.get('general_questions')}) | verdicts |",
        "|---" * 9 + "|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for r in results:
        if "seed" in r:
            groups.setdefault((r["experiment"], _words(r["settings"])), []).append(r)
    for (name, settings), runs in groups.items():
        foreign = [r["foreign"] / base["foreign"] for r in runs if r.get("foreign")]
        verdicts = ", ".join(sorted({r["verdict"] for r in runs}))
        lines.append(
            f"| {name} | {settings} | {len(runs)} | {_median(runs, 'exact', '.0%')} |"
            f" {_median(runs, 'asked_right', '.0%')} | {_median(runs, 'general', '.3f')} |"
            f" {f'{statistics.median(foreign):.3f}' if foreign else ''} |"
            f" {_median(runs, 'general_questions', 'g')} | {verdicts} |"
        )
    return lines


def _words(settings: dict[str, Any]) -> str:
    """Return the settings that differ between recipes, in short."""
    x = settings
    words = f"{x['epochs']} epochs, lr {x['lr']:g}, rank {x['rank']}, alpha {x['alpha']:g}"
    if x["mix_share"]:
        words += f", mix {x['mix_share']:.2g}" + (" as the base" if x["mix_as_base"] else "")
    return words


def _median(runs: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = [r[name] for r in runs if r.get(name) is not None]
    return format(statistics.median(values), form) if values else ""


def experiments(only: Sequence[str], rows: Path | None, folder: Path) -> dict[str, Experiment]:
    """Return the experiments that are asked for."""
    known = dict(EXPERIMENTS)
    if rows is not None:
        known["alpaca300"] = alpaca(rows, folder)
    return {name: known[name] for name in only or known}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of EXPERIMENTS, alpaca300")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings")
    parser.add_argument("--alpaca", type=Path, help="file whose first 300 rows are trained")
    parser.add_argument("--foreign", type=Path, help="rows whose loss is measured, too")
    parser.add_argument("--table", action="store_true", help="print what there is, run nothing")
    args = parser.parse_args(arguments)
    if not args.table:
        with tempfile.TemporaryDirectory(prefix="ggft-recipes-") as folder:
            chosen = experiments(args.only, args.alpaca, Path(folder))
            given = {k: json.loads(v) for k, _, v in (text.partition("=") for text in args.set)}
            run_missing(Bench(args.threads, args.foreign), chosen, args.seeds, given)
    print(*table(read_results()), sep="\n")


def run_missing(
    bench: Bench, chosen: dict[str, Experiment], seeds: Sequence[int], given: dict[str, Any]
) -> None:
    """Run each experiment and seed whose result is not there."""
    if find(read_results(), {"experiment": "base"}) is None:
        append(bench.base())
    for seed in seeds:
        for name, experiment in chosen.items():
            x = Experiment(
                experiment.rows, experiment.asked, experiment.n_asked,
                {**experiment.given, **given},
            )  # fmt: skip
            data = bench.load(x, seed)
            head = {"experiment": name, "seed": seed, "settings": bench.settle(x, data)}
            if find(read_results(), head) is None:
                append({**head, **bench.run(x, data, seed)})
                print(json.dumps(read_results()[-1]), flush=True)


if __name__ == "__main__":
    main()
