"""Trains several LoRA runs as one program: `python -m research.train.together`."""

import dataclasses
import json
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob
from research.config.run_config import Config, with_effect
from research.core import stop_signals
from research.core.errors import UserError
from research.core.local_paths import local_path
from research.train.together import compatibility

USAGE = """
python -m research.train.together --config=FILE.py [--config.KNOB=VALUE ...]
    --runs=RUNS.json

RUNS.json is a list of objects such as {"run_dir": "runs/a", "lora.rank": 8}: each says
what its run changes in the config. --runs takes the list itself, too. Runs may differ
in rank, alpha, dropout and targets of their adapters, learning rate, schedule and seed.
They share the frozen weights and one compilation, and write the same run directories as
research.train. --at_once is the number of runs whose steps are one batched product; 0
takes all on an accelerator, and one after another on a CPU.
"""


@dataclasses.dataclass(frozen=True)
class TogetherFlags:
    """The flags of `python -m research.train.together`."""

    runs: str = knob(
        "", "JSON list of objects, knob -> value, or the file with it", is_path=True
    )
    at_once: int = knob(0, "runs in one product; 0: what suits the device", low=0)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 done, 7 or 75 stopped; see `docs/recovery.md`."""
    stop_signals.resume_after_signals()
    config, f = command_line.parse_with_config(argv, USAGE, TogetherFlags)
    configs = read_runs(f.runs, config)
    compatibility.check(configs)
    # Imported late: importing JAX takes longer than saying what is wrong with a flag.
    from research.train.start_to_report import train

    return train(configs, f.at_once)


def read_runs(given: str, shared: Config) -> list[Config]:
    """Reads the configs of all runs in `given`: each is `shared` with its own changes.

    Args:
      given: a JSON list, or the path of a file with one.
      shared: the config that the runs change.

    Raises:
      UserError: the file is missing or has another form, or there is no such knob.
    """
    if not given:
        raise UserError("--runs=RUNS.json is missing; see --help")
    file = "[...]" if given.lstrip().startswith("[") else given
    try:
        text = given if file != given else local_path(file).read_text(encoding="utf-8")
        found = json.loads(text)
    except OSError as error:
        raise UserError(f"--runs: {error}") from error
    except ValueError as error:
        raise UserError(f"--runs={file} is not JSON: {error}") from error
    if not (isinstance(found, list) and found and all(type(x) is dict for x in found)):
        raise UserError(f"--runs={file} must hold a list of objects, one a run")
    return [
        with_effect(shared, changes, f"--runs={file}, run {number}", [shared])
        for number, changes in enumerate(found, 1)
    ]


if __name__ == "__main__":
    command_line.run(main, prints_results=False)
