"""A model in the formats of other tools, for the command that writes them."""

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.config.choices import DEQUANTISED, EXPORT_FORMATS
from research.core.errors import UserError, files_of_step, look_up
from research.core.standard_streams import said_once
from research.core.stop_signals import unwinding_on_signals
from research.export.exported_sources import ExportSource, open_source
from research.formats.export_folder import ExportFolder
from research.formats.export_format import (
    ExportedModel,
    ExportFormat,
    ExportOptions,
    find_format,
)
from research.formats.export_names import EXPORTED, EXPORTS
from research.parallel import agreement
from research.runs.lineage.exported_run import export_model, is_there

FLAG = "--replace=True"


def write_model(
    run: str,
    step: str,
    out: Path | None,
    dtype: str,
    replace: bool,
    formats: Sequence[str] = ("hf",),
    quant: str = "",
    model: str = "",
    base: str = DEQUANTISED,
) -> None:
    """Writes `step` (latest, best or a number) of the run in each of `formats`.

    The model is split over the devices of all processes, and every one calls this.

    Args:
      run: its folder; or an adapter of PEFT, see `open_source`.
      step: of the checkpoint.
      out: the folder to write, or the one that has a folder for each of several
        formats; None for the folders in the run.
      dtype, quant: see `ExportOptions`; "" for the usual ones of each format.
      replace: whether another step in a folder is replaced.
      formats: names, see `find_format`.
      model: the base of an adapter of PEFT; "": that which it names.
      base: one of `EXPORT_BASES`, see `trained_over.check`.

    Raises:
      UserError: there is no such step or format, a folder holds something else, or a
        format cannot hold the model. Nothing is written then.
      ParityError: the files compute something else than the run.
      SaveError: the disk refuses.
    """
    chosen = choose_options(formats, dtype, quant)
    source = open_source(run, step, out, model, base, formats)
    with unwinding_on_signals(), said_once(), contextlib.ExitStack() as stack:
        wanted = {}
        for name, place in _places(source.folder, out, formats).items():
            with files_of_step(None, f"the export to {place}"):
                claimed = stack.enter_context(ExportFolder.claimed(place))
            origin = source.origin(chosen[name].numbers, name)
            if not is_there(claimed, origin, replace, FLAG):
                wanted[claimed] = find_format(name), chosen[name]
        if not wanted:
            return
        exported = source.load()
        for format, options in wanted.values():
            agreement.together(functools.partial(format.check, exported, options))
        for claimed, (format, options) in wanted.items():
            _write(source, exported, format, options, claimed, replace)


def choose_options(
    formats: Sequence[str], dtype: str, quant: str
) -> dict[str, ExportOptions]:
    """Gives each format, by name, what it can store of `dtype` and `quant`.

    Raises:
      UserError: there is no such format, or one of them has an effect in none.
    """
    found = {name: look_up(EXPORT_FORMATS, name, "--format") for name in formats}
    named, coded = ",".join(found), [x for x in found.values() if quant in x.quants]
    if quant and not coded:
        raise UserError(
            f"--quant={quant}: --format={named} stores plain numbers; use --dtype, or "
            "--format=gguf"
        )
    plain = [x for x in found.values() if x not in coded]
    if dtype and not any(dtype in x.dtypes for x in plain):
        stored = [
            f"{name} is stored in {quant if x in coded else ' or '.join(x.dtypes)}"
            for name, x in found.items()
        ]
        raise UserError(
            f"--dtype={dtype} has no effect, as {' and '.join(stored)}; remove --dtype"
        )
    return {
        name: ExportOptions(
            dtype if dtype in each.dtypes else each.dtypes[0],
            quant if each in coded else "",
        )
        for name, each in found.items()
    }


def _places(
    folder: Path | None, out: Path | None, formats: Sequence[str]
) -> Mapping[str, Path]:
    """Where each format goes: below `out`, or else into `folder`, that of a run."""
    if out is None:
        others = {name: folder / EXPORTS / name for name in formats}
        return others | ({"hf": folder / EXPORTED} if "hf" in others else {})
    return {name: out if len(formats) == 1 else out / name for name in formats}


def _write(
    source: ExportSource,
    exported: ExportedModel,
    format: ExportFormat,
    options: ExportOptions,
    out: ExportFolder,
    replace: bool,
) -> None:
    flags = [f"--format={format.name}"]
    flags.append(
        f"--quant={options.quant}" if options.quant else f"--dtype={options.dtype}"
    )
    with files_of_step(None, f"the export to {out}"):
        export_model(
            source.origin(options.numbers, format.name),
            source.identity,
            exported,
            source.rows(exported),
            out,
            format,
            options,
            card=source.card(exported, format, options, flags),
            replace=replace,
            flag=FLAG,
        )
