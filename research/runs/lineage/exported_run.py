"""The model of a run for other tools, in a folder that says which step it is.

A folder that holds one step is replaced by another one only if the user says so. The
files are read back before the folder gets its name, and must compute what the run does.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from research.checkpoints.checksums import checksum
from research.checkpoints.stored_steps import seal_of
from research.config.choices import DEQUANTISED
from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.core.json_files import read_json
from research.formats.export_folder import ExportFolder
from research.formats.export_format import ExportedModel, ExportFormat, ExportOptions
from research.formats.export_names import CARD, EXPORTED, ORIGIN, PARITY
from research.formats.proof.logit_parity import prove
from research.formats.proof.proof_tokens import ProofRows
from research.parallel import agreement
from research.runs.run_directory import RUN, RunDir

REPLACE = "--config.replace_export=True"  # In training.
SHAPE = {"run": str, "step": int, "checkpoint": str, "dtype": str, "files": {...: list}}


@dataclasses.dataclass(frozen=True)
class ModelOrigin:
    """The step that an export holds.

    Attributes:
      run: the id of the run; empty in runs of older versions.
      step: optimizer updates.
      checkpoint: the sum of all checksums of its checkpoint; empty if it is not saved.
      dtype: the numbers in the files, such as bfloat16 or q8_0.
      format: name of the format.
      adapter: sha256 of an adapter that belongs to no run; "" for the model of a run.
      base: one of `EXPORT_BASES`.
    """

    run: str
    step: int
    checkpoint: str
    dtype: str
    format: str = "hf"
    adapter: str = ""
    base: str = DEQUANTISED

    @classmethod
    def of(
        cls, folder: RunDir, step: int, dtype: str, format: str = "hf"
    ) -> "ModelOrigin":
        """That of step `step` of the run in `folder`."""
        saved = seal_of(folder.checkpoints / str(step))
        return cls(folder.origin().get(RUN, ""), step, saved, dtype, format)

    def saved_as(self, checkpoint: str) -> "ModelOrigin":
        return dataclasses.replace(self, checkpoint=checkpoint)

    def __str__(self) -> str:
        what = f"step {self.step} of run {self.run[:8] or '(no id)'}"
        what = f"adapter {self.adapter[:8]}" if self.adapter else what
        said = f"{what} in {self.dtype}"
        said += "" if self.format == "hf" else f" as {self.format}"
        return said + f" over the {self.base} base" * (self.base != DEQUANTISED)


def export_model(
    origin: ModelOrigin,
    identity: Mapping[str, str],
    exported: ExportedModel,
    rows: ProofRows,
    out: ExportFolder,
    format: ExportFormat,
    options: ExportOptions,
    *,
    card: str,
    replace: bool,
    flag: str,
) -> None:
    """Writes a model in a format; every process must call it.

    A folder that holds the same already stays as it is, and the log says so.

    Args:
      origin: says which model it is.
      identity: the fingerprints of its data, tokenizer and base.
      exported: the model.
      rows: what the model and its files both compute; see `prove`.
      out: the folder to write, which is claimed.
      format, options: what is written.
      card: text of the model card; the result of the proof is added.
      replace: whether another step in `out` is replaced; `flag` sets it.

    Raises:
      UserError: `out` holds something else, or the format cannot hold the model.
      ParityError: the files compute something else. Nothing of them stays.
      OSError: the folder cannot be written.
    """
    if is_there(out, origin, replace, flag):
        return
    with out.filled() as partial:
        format.write(exported, partial, options)
        # The others read what the first one has written.
        agreement.together(lambda: None)
        written = format.read_back(partial, exported)
        parity = prove(exported, written, rows, options.numbers)
        if jax.process_index() == 0:
            proof = (
                f"## Proof\n\nRead back and compared with the run: {parity.sentence()}."
            )
            write_whole(partial / CARD, f"{card}\n{proof}\n")
            write_whole(partial / PARITY, json.dumps(parity.facts(), indent=2))
            _describe(partial, origin, identity, parity.sentence())
    logging.info("export: %s, %s; %s", out, origin, parity.sentence())
    if warning := parity.warning():
        logging.warning("export: %s", warning)


def _describe(
    written: Path, origin: ModelOrigin, identity: Mapping[str, str], verified: str
) -> None:
    """Writes which step the folder holds, and the checksums of its files."""
    sums = {file.name: checksum(file) for file in sorted(written.iterdir())}
    facts = dataclasses.asdict(origin) | {"identity": identity, "verified": verified}
    write_whole(written / ORIGIN, json.dumps(facts | {"files": sums}, indent=2))


def refuse_other_step(folder: RunDir, steps: int, replace: bool) -> None:
    """Refuses a run whose export, after `steps`, would replace another step.

    Raises:
      UserError: see `holds`.
    """
    wanted = ModelOrigin.of(folder, steps, "float32")
    holds(folder.path / EXPORTED, wanted, replace, REPLACE)


def is_there(out: ExportFolder, wanted: ModelOrigin, replace: bool, flag: str) -> bool:
    """Whether `out` is the export of `wanted` already, which the log then says.

    Every process calls it. See `holds` for the arguments and errors.
    """
    leading = jax.process_index() == 0
    found = agreement.of_first(
        agreement.together(lambda: leading and holds(out.path, wanted, replace, flag))
    )
    if found:
        logging.info("export: %s holds %s already; nothing is written", out, wanted)
    return found


def holds(out: Path, wanted: ModelOrigin, replace: bool, flag: str) -> bool:
    """Whether `out` is the export of `wanted`; False where it may be written.

    A step that was trained again is another one if its checkpoint differs, but a run
    replaces its own export of its last step. A folder with anything else than the files
    of an export is never replaced. See `export_model` for the arguments.

    Raises:
      UserError: another step is there and must not be replaced, or something that is
        no exported model.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / ORIGIN).is_file():
        raise UserError(
            f"{out} exists, and has no {ORIGIN} that says it is an export, so it is "
            "never replaced: name another folder, or move it away"
        )
    found = read_json(out / ORIGIN, SHAPE, f"remove {out}, and export again")
    names = {field.name for field in dataclasses.fields(ModelOrigin)}
    here, new = ModelOrigin(**{k: v for k, v in found.items() if k in names}), ""
    what = str(here)
    if here == wanted:
        # Reads the whole export.
        if not (changed := _changed_file(out, found["files"])):
            return True
        what = f"{here}, {changed} of which has changed since"
    elif here.saved_as(wanted.checkpoint) == wanted:
        what = f"{here} from another checkpoint ({_short(here)})"
        new = f" ({_short(wanted)})"
        # A run that was killed after its export trains its last step again.
        replace |= flag == REPLACE
    others = sorted({x.name for x in out.iterdir()} - {*found["files"], ORIGIN})
    if others and replace:
        raise UserError(
            f"{out} holds {others[0]}, which is no part of the export there, so it is "
            "not replaced: move that away, or name another folder"
        )
    if replace:
        return False
    raise UserError(
        f"{out} holds {what}, and {wanted}{new} would replace it: name another "
        f"folder, move it away, or replace it with {flag}"
    )


def _short(origin: ModelOrigin) -> str:
    return origin.checkpoint[:12] or "not saved yet"


def _changed_file(out: Path, sums: dict[str, list[Any]]) -> str:
    """The name of a file that is not as it was written, or ""."""
    for name, known in sums.items():
        if not (out / name).is_file() or checksum(out / name) != known:
            return name
    return ""
