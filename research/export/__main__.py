"""Writes a run's model for other tools: `python -m research.export --run=runs/x`."""

import dataclasses
import logging
import sys
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError
from research.core.local_paths import local_path

USAGE = """
python -m research.export --run=RUN_DIR [--out=FOLDER] [--step=latest] [--dtype=float32]

Writes a Hugging Face folder (config.json, safetensors, tokenizer) with the adapters
merged into the weights, a model card, and exported_from.json, which names the step. A
folder that holds another step is replaced with --replace=True only. The default folder
is RUN_DIR/model.
"""


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    run: str = knob("", "run directory, its config.json or config file", is_path=True)
    out: str = knob("", "folder to write; empty: RUN_DIR/model", is_path=True)
    step: str = knob("latest", "checkpoint: latest, best, or a step number")
    dtype: str = knob(
        "float32",
        "dtype of the weights in the file",
        choices=("float32", "bfloat16", "float16"),
    )
    replace: bool = knob(False, "replace the model of another step in the folder")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, ExportFlags)
    if not f.run:
        raise UserError("--run=RUN_DIR is missing, e.g. runs/finetune_dolly")
    # Before an import sets another level.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from research.export.write_model import write_model
    from research.formats.base_model import EXPORTED
    from research.runs.run_directory import RunDir

    out = local_path(f.out) if f.out else RunDir(f.run).path / EXPORTED
    write_model(f.run, f.step, out, f.dtype, f.replace)
    return 0


if __name__ == "__main__":
    command_line.run(main)
