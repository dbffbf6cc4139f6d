"""Writes a run's model for other tools: `python -m research.export --run=runs/x`."""

import dataclasses
import logging
import sys
from collections.abc import Sequence

from research.config import command_line
from research.config.choices import (
    DEQUANTISED,
    EXPORT_BASES,
    EXPORT_DTYPES,
    EXPORT_FORMATS,
)
from research.config.knobs import knob
from research.core.errors import UserError
from research.core.local_paths import local_path

USAGE = """
python -m research.export --run=RUN_DIR [--format=hf] [--out=FOLDER] [--step=latest]
    [--dtype=float32 | --quant=q8_0] [--distributed]
python -m research.export --run=PEFT_ADAPTER_FOLDER|hub://OWNER/NAME --out=FOLDER
    [--model=ITS_BASE] [--format=hf]

Writes the model of a run, or of an adapter that PEFT trained, in one format, or in
several with commas between them:

  hf    a Hugging Face folder (config.json, safetensors, tokenizer) with the adapters
        merged into the weights
  peft  the adapters alone, as a folder of PEFT
  gguf  one file of llama.cpp with the adapters merged, and a Modelfile for Ollama;
        --quant=q8_0 or q4_0 stores matrices as codes, and those whose rows no block
        of 32 divides in float16; norms and biases stay in float32
  gguf-adapter
        the adapters alone, in float32, for llama.cpp and the GGUF file of the base

A run that was trained over codes (config.model.quantize) is written over what these
stand for: the weights that its adapters were trained on. --base=original adds them to
the base model's own weights, and measures what that does to the loss.

A format that cannot hold the model is refused before anything is written. Each gets a
model card, and exported_from.json, which names the step. The files are read back and
compared with the run on some of its held-out rows: parity.json has the differences.
Files that compute something else are removed, and the exit code is 1. A folder that
holds another step is replaced with --replace=True only, and one that is no export
never. The default folder is RUN_DIR/model, and RUN_DIR/exports/FORMAT for other
formats; with several formats, --out has a folder for each.

A model that is too large for one machine is split over a process on each: start the
same command with --distributed on all of them, as for research.serve.
"""


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    run: str = knob(
        "",
        "run directory, its config.json or config file; or an adapter of PEFT, its "
        "folder or hub://owner/name",
        is_path=True,
        may_be_adapter=True,
    )
    model: str = knob(
        "",
        "base of an adapter of PEFT: a folder, a .gguf file, or a name as for "
        "config.model.init_from; not given: "
        "that which the adapter names",
        is_path=True,
    )
    format: str = knob(
        "hf", f"with commas between several: {', '.join(EXPORT_FORMATS)}"
    )
    out: str = knob("", "folder to write; empty: in RUN_DIR", is_path=True)
    step: str = knob("latest", "checkpoint: latest, best, or a step number")
    dtype: str = knob(
        "",
        "dtype of the matrices in the files; not given: float32",
        choices=("", *EXPORT_DTYPES),
    )
    quant: str = knob(
        "",
        "codes in place of the dtype, for formats that have them",
        choices=(
            "",
            *dict.fromkeys(q for x in EXPORT_FORMATS.values() for q in x.quants),
        ),
    )
    base: str = knob(
        DEQUANTISED,
        "weights under the adapters of a run with config.model.quantize; dequantised: "
        "what its codes stand for, as trained; original: those of the base model",
        choices=EXPORT_BASES,
    )
    replace: bool = knob(False, "replace the model of another step in the folder")
    distributed: bool = knob(
        False, "join the other processes that the JAX_* variables or the cluster name"
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, ExportFlags)
    if not f.run:
        raise UserError("--run=RUN_DIR is missing, e.g. runs/finetune_dolly")
    # Before an import sets another level.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from research.export.write_model import write_model
    from research.parallel import joined_processes, runtime

    # Each once, in the order of the flag.
    formats = [*dict.fromkeys(name.strip() for name in f.format.split(","))]
    out = local_path(f.out) if f.out else None

    def write() -> None:
        options = f.dtype, f.replace, formats, f.quant, f.model, f.base
        write_model(f.run, f.step, out, *options)

    if f.distributed and joined_processes.join(f):
        joined_processes.or_abandon(write)
        return 0
    runtime.start_alone()
    write()
    return 0


if __name__ == "__main__":
    command_line.run(main)
