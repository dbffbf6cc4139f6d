"""A step of a run as a Hugging Face folder, for the commands that write one."""

import logging
from pathlib import Path

from research.core.errors import files_of_step
from research.parallel import runtime
from research.report.model_card import format_card
from research.runs.lineage.exported_run import ModelOrigin, export_run, holds
from research.runs.lineage.start_pins import saved_step
from research.runs.reopen import reopen
from research.runs.run_directory import RunDir
from research.tasks.task_registry import exported_tokenizer

FLAG = "--replace=True"


def write_model(run: str, step: str, out: Path, dtype: str, replace: bool) -> None:
    """Writes `step` (latest, best or a number) of the run to `out`.

    Raises:
      UserError: there is no such step, or `out` holds something else.
      SaveError: the disk refuses.
    """
    folder = RunDir(run)
    # Before the model is loaded. The newest step may turn out to be damaged.
    wanted = ModelOrigin.of(folder, saved_step(folder, step), dtype)
    if holds(out, wanted, replace, FLAG):
        logging.info("export: %s holds %s already; nothing is written", out, wanted)
        return
    runtime.start_alone()
    opened = reopen(run, step=step)
    with files_of_step(None, f"the export to {out}"):
        export_run(
            opened.folder,
            opened.step,
            opened.model,
            opened.weights,
            exported_tokenizer(opened.config, opened.base, opened.system),
            out,
            card=format_card(opened.folder, opened.step, opened.base.licence),
            dtype=dtype,
            replace=replace,
            flag=FLAG,
        )
