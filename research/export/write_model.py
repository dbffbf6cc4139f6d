"""A step of a run in the formats of other tools, for the commands that write them."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.core.errors import UserError, files_of_step
from research.formats.base_model import EXPORTED
from research.formats.export_format import ExportFormat, ExportOptions, find_format
from research.parallel import runtime
from research.report.model_card import format_card
from research.runs.lineage.exported_model import exported_model
from research.runs.lineage.exported_run import ModelOrigin, export_run, holds
from research.runs.lineage.proof_rows import find_rows
from research.runs.lineage.start_pins import saved_step
from research.runs.reopen import ReopenedRun, reopen
from research.runs.run_directory import RunDir

FLAG = "--replace=True"
EXPORTS = "exports"  # The folder of a run with the formats that have no other place.


def write_model(
    run: str,
    step: str,
    out: Path | None,
    dtype: str,
    replace: bool,
    formats: Sequence[str] = ("hf",),
    quant: str = "",
) -> None:
    """Writes `step` (latest, best or a number) of the run in each of `formats`.

    Args:
      run: its folder.
      step: of the checkpoint.
      out: the folder to write, or the one that has a folder for each of several
        formats; None for the folders in the run.
      dtype, quant: see `ExportOptions`.
      replace: whether another step in a folder is replaced.
      formats: names, see `find_format`.

    Raises:
      UserError: there is no such step or format, a folder holds something else, or a
        format cannot hold the model.
      ParityError: the files compute something else than the run.
      SaveError: the disk refuses.
    """
    folder = RunDir(run)
    chosen = _with_options([find_format(name) for name in formats], dtype, quant)
    places = _places(folder, out, formats)
    # Before the model is loaded. The newest step may turn out to be damaged.
    number = saved_step(folder, step)
    wanted = {}
    for format, options in chosen.items():
        origin = ModelOrigin.of(folder, number, options.numbers, format.name)
        if holds(places[format.name], origin, replace, FLAG):
            logging.info(
                "export: %s holds %s already; nothing is written",
                *(places[format.name], origin),
            )
        else:
            wanted[format] = options
    if not wanted:
        return
    runtime.start_alone()
    opened = reopen(run, step=step)
    for format, options in wanted.items():
        _write(opened, format, options, places[format.name], replace)


def _with_options(
    formats: Sequence[ExportFormat], dtype: str, quant: str
) -> dict[ExportFormat, ExportOptions]:
    """Gives each format what it can store of `dtype` and `quant`.

    Raises:
      UserError: no format stores one of them.
    """
    named = ",".join(format.name for format in formats)
    if not any(dtype in format.dtypes for format in formats):
        raise UserError(
            f"--dtype={dtype}: --format={named} stores {formats[0].dtypes[0]} alone; "
            "remove --dtype"
        )
    if quant and not any(quant in format.quants for format in formats):
        raise UserError(
            f"--quant={quant}: --format={named} stores plain numbers; use --dtype, or "
            "--format=gguf"
        )
    return {
        format: ExportOptions(
            dtype if dtype in format.dtypes else format.dtypes[0],
            quant if quant in format.quants else "",
        )
        for format in formats
    }


def _places(
    folder: RunDir, out: Path | None, formats: Sequence[str]
) -> Mapping[str, Path]:
    """The folder of each format."""
    if out is None:
        others = {name: folder.path / EXPORTS / name for name in formats}
        return others | {"hf": folder.path / EXPORTED}
    return {name: out if len(formats) == 1 else out / name for name in formats}


def _write(
    opened: ReopenedRun,
    format: ExportFormat,
    options: ExportOptions,
    out: Path,
    replace: bool,
) -> None:
    exported = exported_model(
        opened.folder,
        opened.step,
        opened.config,
        opened.base,
        opened.model,
        opened.trainable,
        opened.params,
        opened.frozen,
    )
    flags = [f"--format={format.name}", f"--dtype={options.dtype}"]
    if options.quant:
        flags.append(f"--quant={options.quant}")
    usage = format.usage(exported, options)
    with files_of_step(None, f"the export to {out}"):
        export_run(
            opened.folder,
            opened.step,
            exported,
            find_rows(opened.folder.path, exported.tokenizer),
            out,
            format,
            options,
            card=format_card(
                opened.folder,
                opened.step,
                opened.base.licence,
                usage,
                flags,
                format.library,
                format.merges,
            ),
            replace=replace,
            flag=FLAG,
        )
