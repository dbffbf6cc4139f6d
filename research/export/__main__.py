"""Writes a run's model for other tools: `python -m research.export --run=runs/x`."""

import dataclasses
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError, files_of_step
from research.core.local_paths import local_path

USAGE = """
python -m research.export --run=RUN_DIR [--out=FOLDER] [--step=latest] [--dtype=float32]

Writes a Hugging Face folder (config.json, safetensors, tokenizer) with the adapters
merged into the weights. The default folder is RUN_DIR/model, where
--config.model.init_from=RUN_DIR finds it.
"""


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    run: str = knob("", "run directory that research.train made")
    out: str = knob("", "folder to write; empty: RUN_DIR/model")
    step: str = knob("latest", "checkpoint: latest, best, or a step number")
    dtype: str = knob(
        "float32",
        "dtype of the weights in the file",
        choices=("float32", "bfloat16", "float16"),
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, ExportFlags)
    if not f.run:
        raise UserError("--run=RUN_DIR is missing, e.g. runs/finetune_dolly")
    from research.formats.base_model import EXPORTED
    from research.formats.huggingface_export import export
    from research.parallel import runtime
    from research.runs.reopen import reopen
    from research.runs.run_directory import RunDir
    from research.tasks.task_registry import exported_tokenizer

    out = local_path(f.out) if f.out else RunDir(f.run).path / EXPORTED
    if f.out and out.exists():
        raise UserError(f"--out={f.out} exists; name a folder that does not")
    runtime.start_alone()
    run = reopen(f.run, step=f.step)
    tokenizer = exported_tokenizer(run.config, run.base)
    with files_of_step(None, f"the export to {out}"):
        export(run.model, run.weights, tokenizer, out, f.dtype)
    return 0


if __name__ == "__main__":
    command_line.run(main)
