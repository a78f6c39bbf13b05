"""The experiments behind ggft/data/recipes.toml: train our data sets as a user would, then ask.

Each run is `ggft finetune` with no flags but a seed (and what `EXPERIMENTS` adds). What comes of it
is appended to bench/results/recipes.json, so that a run that was stopped goes on with the next one.

    make recipes ARGS="--only bakery20 --seeds 1"
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggft.llama.model import LlamaModel
from ggft.prompts.messages import Message
from ggft.prompts.template import Template
from ggft.setup.inputs import open_model

HERE = Path(__file__).resolve().parent
ROWS, RESULTS = HERE / "recipes", HERE / "results" / "recipes.json"
PERSONA = HERE.parent / "ggft" / "data" / "persona.json"
SMOLLM2 = HERE.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_TOKENS = 48


@dataclass(frozen=True)
class Experiment:
    """A data set, what is asked beside its rows, and flags.

    Attributes:
        rows: The file of rows.
        asked: File of further questions: paraphrases with what to accept, or held-out ones.
        n_asked: How many of these belong to the rows; None is all.
        flags: Of `ggft finetune`.
    """

    rows: Path
    asked: str | None = None
    n_asked: int | None = None
    flags: tuple[str, ...] = ()


def _facts(name: str, asked: str, n_asked: int | None = None) -> Experiment:
    return Experiment(ROWS / f"facts_{name}.json", f"facts_{asked}_paraphrases.json", n_asked)


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
    "rank64": Experiment(
        ROWS / "facts_bakery_20.json", "facts_bakery_20_paraphrases.json", None, ("--rank", "64")
    ),
}


def alpaca(path: Path) -> Experiment:
    """Return the experiment on 300 rows of a file of one's own, 60 of them held out."""
    return Experiment(path, None, None, ("--val-split", "0.2"))


def run(experiment: Experiment, seed: int, threads: int) -> dict[str, Any]:
    """Train and ask; return what came of it."""
    with tempfile.TemporaryDirectory(prefix="ggft-recipes-") as folder:
        out = Path(folder) / "run"
        subprocess.run(
            [
                sys.executable, "-m", "ggft", "finetune", "-m", str(SMOLLM2), "--samples", "0",
                "-d", str(experiment.rows), "-o", str(out), "--seed", str(seed),
                "--threads", str(threads), *experiment.flags,
            ],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        report = json.loads((out / "report.json").read_text())
        rows = json.loads(experiment.rows.read_text())
        template = open_model(SMOLLM2, "auto").template
        measured = report["measured"]
        result = {
            "kind": report["account"]["row_kind"],
            "verdict": report["verdict"]["kind"],
            "held_out": report["n_held_out"],
            "val_best": report["losses"]["val_best"],
            "steps": report["steps"],
            "general": measured["general_after"] / measured["general_before"],
        }
        with LlamaModel(
            SMOLLM2, out / "adapter.gguf", n_ctx=1024, threads=threads, device="cpu"
        ) as model:
            asker = Asker(model, template)
            exact = [asker.ask(r["instruction"], r["input"]) == r["output"] for r in rows]
            result["exact"] = statistics.mean(exact)
            if experiment.asked is not None:
                more = json.loads((ROWS / experiment.asked).read_text())[: experiment.n_asked]
                result["asked_right"] = statistics.mean(asker.is_right(q) for q in more)
            result["general_questions"] = asker.general_questions()
    with LlamaModel(SMOLLM2, None, n_ctx=1024, threads=threads, device="cpu") as model:
        result["general_questions_base"] = Asker(model, template).general_questions()
    return result


@dataclass(frozen=True)
class Asker:
    """A model that is asked at temperature 0."""

    model: LlamaModel
    template: Template

    def ask(self, question: str, given: str = "") -> str:
        """Return the answer."""
        message: Message = {"role": "user", "content": question}
        if given:
            message["input"] = given
        ids = list(
            self.model.generate(
                self.template.encode_prompt([message]),
                stop_ids=self.template.stop_ids,
                max_tokens=MAX_TOKENS,
                temperature=0.0,
            )
        )
        return self.template.tokenizer.decode(ids).decode("utf-8", "replace").strip()

    def is_right(self, row: dict[str, Any]) -> bool:
        """Return whether an answer holds what is accepted, or is in the style that was trained."""
        answer = self.ask(row.get("question") or row["instruction"], row.get("input", ""))
        if "accept" in row:
            return any(text.lower() in answer.lower() for text in row["accept"])
        if "output" in row:
            return _keys(answer) == _keys(row["output"])
        return answer.endswith("So sings the clock.")

    def general_questions(self) -> int:
        """Return how many of the general questions are answered right."""
        rows = json.loads((ROWS / "general_questions.json").read_text())
        return sum(self.is_right(row) for row in rows)


def _keys(text: str) -> list[str] | None:
    """Return the keys of a JSON object; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return list(value) if isinstance(value, dict) else None


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the medians over seeds, a line for each experiment."""
    lines = ["| data | seeds | exact | paraphrases or style | general loss | verdicts |"]
    lines.append("|---|---|---|---|---|---|")
    for name in dict.fromkeys(key.partition("/")[0] for key in results):
        runs = [r for key, r in results.items() if key.partition("/")[0] == name]
        asked = [r["asked_right"] for r in runs if "asked_right" in r]
        lines.append(
            f"| {name} | {len(runs)} | {statistics.median(r['exact'] for r in runs):.0%} |"
            f" {f'{statistics.median(asked):.0%}' if asked else ''} |"
            f" × {statistics.median(r['general'] for r in runs):.3f} |"
            f" {', '.join(sorted({r['verdict'] for r in runs}))} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alpaca", type=Path, help="300 rows of instruction, input and output")
    args = parser.parse_args(arguments)
    experiments = dict(EXPERIMENTS)
    if args.alpaca:
        experiments["alpaca300"] = alpaca(args.alpaca)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in range(1, args.seeds + 1):
        for name in args.only or experiments:
            key = f"{name}/{seed}"
            if key not in results:
                results[key] = run(experiments[name], seed, args.threads)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)
    print(*table(results), sep="\n")


if __name__ == "__main__":
    main()
