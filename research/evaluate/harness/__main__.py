"""Standard tasks: `python -m research.evaluate.harness --run=RUN -- --tasks=TASK`."""

import dataclasses
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError

USAGE = """
python -m research.evaluate.harness --run=RUN_DIR [--compare] -- --tasks arc_easy

Runs tasks of lm-evaluation-harness (the extra `lm-eval`) on the model of a run, through
the engine that serves it. All flags after -- are those of `lm-eval run`, such as
--limit, --num_fewshot, --apply_chat_template, --include_path and --output_path. Tasks
of your own are YAML files in the folder of --include_path.
"""


@dataclasses.dataclass(frozen=True)
class HarnessFlags:
    run: str = knob("", "run directory, its config.json or config file", is_path=True)
    step: str = knob("latest", "checkpoint: latest, best, or a step number")
    compare: bool = knob(False, "the base model first, then the tuned one")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    f = command_line.parse(argv[:end], USAGE, HarnessFlags)
    if not f.run:
        raise UserError("--run is missing, e.g. --run=runs/finetune_dolly")
    commands = entry_points(group="console_scripts", name="lm_eval")
    if not commands:
        raise UserError(
            "lm-evaluation-harness is not installed: pip install 'lm-eval[api]>=0.4.13'"
        )
    from research.evaluate.harness.harness_model import BASE, NAME, TUNED
    from research.parallel import runtime
    from research.runs.run_directory import RunDir

    folder = str(RunDir(f.run).path.absolute())
    if set(folder) & set(",="):
        raise UserError(
            f"--run={f.run}: the harness cannot read a path with a comma or an equals "
            "sign; rename the folder, or give a link to it"
        )
    runtime.start_alone()
    [command] = commands
    for model in (BASE, TUNED) if f.compare else (TUNED,):
        args = f"run={folder},step={f.step},model={model}"
        sys.argv = ["lm-eval", "run", "--model", NAME, "--model_args", args]
        sys.argv += argv[end + 1 :]
        command.load()()
    return 0


if __name__ == "__main__":
    command_line.run(main)
