"""The facts of a run, as its report has them: model, rows, recipe, machine, code."""

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from research.config.knobs import flat
from research.config.run_config import Config
from research.core.visible_text import counted
from research.report.progress_view import duration
from research.report.result_tables import Table
from research.runs import metrics_file
from research.tasks.epochs import passed
from research.tasks.findings import DROPPED
from research.train.metrics.held_out_answers import count_not_asked
from research.train.training_run import TrainingRun

SHOWN_DIGITS = 12  # of a sha256 or a commit


def describe(run: TrainingRun, steps: int) -> dict[str, Any]:
    """One value a name; facts of a start hold all values that the starts had.

    `steps` are the updates that the run has made.
    """
    config, base, starts = run.config, run.base, run.history.starts
    numbers = {x.name: x.numbers for x in run.examination.findings}
    parameters = numbers["parameters"]
    trained = parameters["trained"]
    total = trained + parameters["frozen"]
    facts = {
        "base model": base.name,
        "base model's sha256": base.fingerprint[:SHOWN_DIGITS],
        "data": run.task.origin,
        "data's sha256": run.task.sha256[:SHOWN_DIGITS],
        "trained": f"{trained:,} of {total:,} parameters ({trained / total:.2%})",
    }
    if DROPPED in numbers:  # A task may drop nothing by its nature.
        facts[DROPPED] = count_dropped(numbers[DROPPED])
    if not_asked := run.answers.not_asked:
        facts["not asked"] = count_not_asked(not_asked)
    if kind := run.definition.trainable.kind:
        facts["adapters"] = _adapters(config, numbers[f"{kind.name} targets"])
    facts |= {
        "steps": steps,
        "batch": f"{counted(config.data.batch_size, 'row')} of "
        f"{counted(config.data.seq_len, 'token')}; passes: "
        f"{config.data.passes_per_step}",
        "learning rate": f"{config.optim.learning_rate:g} at its peak, "
        f"{config.optim.schedule}, warm-up {config.optim.warmup:.0%}",
        "optimizer": config.optim.name,
        "seed": config.seed,
    }
    if run.ended_early:
        facts["ended early"] = f"{steps} of {config.steps} steps: {run.ended_early}"
    if (epochs := passed(steps, config, run.task.rows)) is not None:
        facts["epochs"] = round(epochs, 3)
    for step, lines in run.history.accepted_by_step.items():
        facts[f"accepted after step {step}"] = shortened("; ".join(lines))
    made = [start.get("provenance", {}) for start in starts]
    packages = [x.get("packages", {}) | {"Python": x.get("python")} for x in made]
    versions = [", ".join(f"{k} {v}" for k, v in x.items()) for x in packages]
    return facts | {
        "devices": _different(start.get("devices", "unknown") for start in starts),
        "mesh": ", ".join(
            f"{axis}={size}" for axis, size in run.definition.mesh.shape.items()
        ),
        "versions": _different(versions),
        "code": _different(str(x.get("code", "unknown")) for x in made),
        "starts": len(starts),
        "command": shlex.join(["python", *made[-1].get("command", ())]),
    }


def count_dropped(numbers: Mapping[str, float]) -> str:
    """How many rows or documents were dropped or cut, by reason."""
    found = [f"{count:,} {why}" for why, count in sorted(numbers.items()) if count]
    return f"{', '.join(found)}; see left_out.txt" if found else "none"


def _adapters(config: Config, targets: Mapping[str, float]) -> str:
    lora = config.lora
    patterns = (*lora.rank_pattern, *lora.alpha_pattern)
    others = f" ({', '.join(patterns)})" if patterns else ""
    whole = f"; whole: {', '.join(lora.full)}" if lora.full else ""
    return (
        f"{lora.kind} of rank {lora.rank} and alpha {lora.alpha:g}{others}, dropout "
        f"{lora.dropout:g}, on {targets['matrices']} matrices: "
        f"{', '.join(lora.targets)}{whole}"
    )


def _different(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def shortened(text: str) -> str:
    """`text` with the first digits of each sha256."""
    whole = rf"\b([0-9a-f]{{{SHOWN_DIGITS}}})[0-9a-f]{{{64 - SHOWN_DIGITS}}}\b"
    return re.sub(whole, r"\1", text)


def measure(run: TrainingRun) -> dict[str, Any]:
    """Tokens, time, speed and memory of the run, as far as its metrics are there."""
    lines = metrics_file.read_metrics(run.folder.path)
    lines = [x for x in lines if x["kind"] == "train"]
    if not lines:
        return {}
    seconds = lines[-1]["elapsed_s"]
    tokens = sum(x["tokens"] for x in lines)
    trained = sum(x.get("trained_tokens", 0) for x in lines)
    return {
        "tokens seen": f"{tokens:,}, {trained:,} of them trained",
        "training time": duration(seconds),
        "tokens per second": round(tokens / seconds),
        "peak memory, GB": round(lines[-1]["memory_gb"], 2),
    }


def changed_knobs(config: Config, written: Config) -> Table:
    """The knobs that differ from their defaults; a header, and a row for each.

    `written` is the config that the run keeps: it has epochs where the user gave them.
    """
    values, defaults = flat(config), flat(Config())
    if written.epochs:
        values |= {"epochs": written.epochs, "steps": defaults["steps"]}
    rows = [
        [f"config.{name}", repr(value), repr(defaults[name])]
        for name, value in values.items()
        if value != defaults[name] and name != "run_dir"
    ]
    return [["knob", "value", "default"], *rows]
