"""The evaluation of a tuned run against Hugging Face `generate`, and its scoring.

    python tests/bench/evaluation.py --run=runs/finetune_dolly --merged=FOLDER \\
        --data=dolly-15k.jsonl.gz --torch-python=.venv-torch/bin/python

`--merged` is the export of the run (`python -m research.export`). Three measurements:

answers: the rows of `--data` that `research.evaluate` answers with the base and the
    tuned model, by the code of the command, against `generate` in batches of 8 with the
    merged model in bf16. Prompts, stop ids and limit are equal, and both sides read
    the prompts. Rows of `generate` are sorted by length, so that it pads little. The
    sides take turns, round by round.
scoring: tokens per second of the losses by row, against the forward pass of the
    training step on the same packed rows.
command: the seconds of the whole command on `--rows` rows with `--new` tokens.

Prints a table of ratios and their goals, and writes every figure with `--out`.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from serving import ROOT, Side, rival

from research.data.instructions.instruction_dataset import eval_batches
from research.data.metric_sums import evaluate_weights
from research.engine.answers.full_answer import FullAnswer
from research.engine.requests import Request, Sampling
from research.evaluate.measuring.ask_models import (
    ask_group,
    open_group,
    requests_of,
    share_bases,
)
from research.evaluate.measuring.evaluated_models import find_models, open_whole
from research.evaluate.measuring.evaluated_rows import choose_rows
from research.evaluate.measuring.measure_models import AskedRows, documents_of
from research.evaluate.measuring.row_losses import measure_rows
from research.evaluate.run_evaluation import EvaluationChoices, read_rows
from research.parallel import mesh as meshes
from research.parallel import runtime
from research.tasks.task_registry import make_objective

BATCH = 8
Figures = dict[str, list[float]]


class Bench:
    """The measurements on one run and its rows."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.models = find_models([options.run])
        sampling = Sampling(max_new_tokens=options.new)
        self.choices = EvaluationChoices(data=options.data, sampling=sampling)
        own = read_rows(self.models, self.choices)[self.models.target.name]
        self.read = own
        self.rows = choose_rows(own.records(), own.groups, options.rows)

    def answers(self) -> Figures:
        """Answers per second."""
        models, options = self.models.models, self.options
        rounds = options.rounds
        count = options.each * rounds
        asked = AskedRows.of(
            self.rows[:count], models, self.choices.sampling, self.choices.stop
        ).requests()
        keys = [*next(iter(asked.values()))]
        [group] = share_bases(models)
        opened, every = open_group(group), requests_of(group, asked)
        tuned = asked[self.models.target.name]
        parts = np.array_split(keys, rounds)
        figures: Figures = {
            "ours": [],
            "generate": [],
            "tokens": [],
            "their tokens": [],
        }
        with rival(self.options.torch_python, "generate", self.options.merged) as side:
            for number, part in enumerate([keys[: 2 * BATCH], *parts]):
                # As if the others were known: slots have one size in all rounds.
                known = {key for key in every if key[1] not in part}
                how = every, known, options.slots, {}
                ask = functools.partial(ask_group, opened, *how)
                seconds, found = timed(lambda ask=ask: [*ask()])
                own = [tuned[key] for key in part]
                generate = functools.partial(self._generate, side, own)
                their_seconds, tokens = timed(generate)
                if number:  # The first part compiles and warms.
                    figures["ours"].append(len(found) / seconds)
                    figures["generate"].append(len(own) / their_seconds)
                    ours = sum(FullAnswer.of(x).tokens for _, x, _ in found)
                    figures["tokens"].append(ours / seconds)
                    figures["their tokens"].append(tokens / their_seconds)
        return figures

    def _generate(self, side: Side, requests: list[Request]) -> int:
        """The tokens of all answers, made in batches of rows of like lengths."""
        order = sorted(requests, key=lambda request: len(request.prompt))
        stop, tokens = [*order[0].stop_ids], 0
        for first in range(0, len(order), BATCH):
            prompts = [[*x.prompt] for x in order[first : first + BATCH]]
            tokens += side.answer(prompts, self.options.new, stop)
        return tokens

    def scoring(self) -> Figures:
        """Real tokens per second and model, of scoring and of the step's forward."""
        [(names, opens), *_] = open_whole(self.models.models)
        opened, packed = opens(), self.read.packed
        numbers = np.array([*documents_of(self.read, self.rows[: self.options.each])])
        chosen = packed.only(numbers, 0)
        tokens = int(chosen.documents.slots[numbers].sum())
        rows = opened.config.data.rows_per_pass
        objective = make_objective(opened.config, opened.mesh, len(self.read.groups))
        forward = jax.jit(functools.partial(evaluate_weights, objective, opened.model))
        mine = meshes.local_rows(opened.mesh, rows)

        def score() -> None:
            [*measure_rows(opened, packed, numbers, 0, self.read.origin)]

        def step() -> None:
            for batch in eval_batches(chosen, rows, mine):
                placed = meshes.to_global(batch, opened.mesh, rows=rows)
                for weights in opened.weights.values():
                    jax.block_until_ready(forward(weights, placed))

        figures: Figures = {"scoring": [], "forward": []}
        for number in range(self.options.rounds + 1):
            for name, action in (("scoring", score), ("forward", step)):
                seconds, _ = timed(action)
                if number:
                    figures[name].append(tokens * len(names) / seconds)
        return figures

    def command(self) -> Figures:
        """Seconds of the whole command, without what an earlier one has kept."""
        options = self.options
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / Path(options.run).name
            run.mkdir()
            for path in Path(options.run).absolute().iterdir():
                if path.name != "evaluations":
                    (run / path.name).symlink_to(path)
            flags = (
                f"--run={run}",
                f"--data={options.data}",
                f"--rows={options.rows}",
                f"--max_new_tokens={options.new}",
            )
            command = [sys.executable, "-m", "research.evaluate", *flags]
            seconds, _ = timed(
                lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
            )
        return {"seconds": [seconds]}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = action()
    return time.perf_counter() - begun, found


# The ratio of two figures, or a figure, and the goal.
GOALS = (
    ("answers", "answers per second against generate", "ours", "generate", 4.0),
    ("scoring", "scoring against the forward of the step", "scoring", "forward", 1.0),
)
MOST_SECONDS = 360.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run directory with adapters")
    parser.add_argument("--merged", help="its export")
    parser.add_argument("--data", required=True, help="rows with answers")
    parser.add_argument("--torch-python", help="with transformers")
    parser.add_argument("--rows", type=int, default=500, help="of the command")
    parser.add_argument("--new", type=int, default=96, help="most tokens of an answer")
    # Fewer leave most slots empty for much of the time.
    parser.add_argument("--each", type=int, default=128, help="rows of each round")
    parser.add_argument("--slots", type=int, default=0, help="see research.evaluate")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="answers,scoring,command")
    parser.add_argument("--out", help="file of all figures, JSON")
    options = parser.parse_args()
    runtime.start_alone()
    bench = Bench(options)
    results: dict[str, Figures] = {}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()}", flush=True)
    for name in options.only.split(","):
        results[name] = getattr(bench, name)()
        middle = {k: round(statistics.median(x), 2) for k, x in results[name].items()}
        print(name, middle, flush=True)
    print("| | measured | goal | |\n|---|---:|---:|---|")
    for name, words, ours, other, goal in GOALS:
        if name in results:
            pairs = zip(results[name][ours], results[name][other], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in pairs)
            done = "yes" if ratio >= goal else "no"
            print(f"| {words} | {ratio:.2f} | {goal} | {done} |")
    if "command" in results:
        [seconds] = results["command"]["seconds"]
        words = f"seconds of {options.rows} rows, base and tuned, {options.new} tokens"
        done = "yes" if seconds <= MOST_SECONDS else "no"
        print(f"| {words} | {seconds:.0f} | {MOST_SECONDS:.0f} | {done} |")
    if options.out:
        text = json.dumps({"options": vars(options), "results": results}, indent=1)
        Path(options.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
