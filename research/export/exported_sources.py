"""The models that the command exports: of a run at a step, or of an adapter of PEFT."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax

from research.config.choices import DEQUANTISED
from research.core.errors import UserError
from research.export.trained_over import check, over, require_own_codes
from research.formats.export_format import ExportedModel, ExportFormat, ExportOptions
from research.formats.peft.find_adapter import names_adapter
from research.formats.proof.proof_tokens import ProofRows
from research.parallel import agreement
from research.report.model_card import format_adapter_card, format_card
from research.runs.answering.found_adapters import open_folder
from research.runs.lineage.exported_model import (
    base_facts,
    exported_model,
    with_facts,
)
from research.runs.lineage.exported_run import ModelOrigin
from research.runs.lineage.proof_rows import find_rows, text_rows
from research.runs.lineage.start_pins import saved_step
from research.runs.reopen import find_run
from research.runs.run_directory import RunDir

LATEST = "latest"


class ExportSource(Protocol):
    """A model that is exported.

    Attributes:
      folder: the run directory, which has places for exports; None without one.
      identity: the fingerprints of what it was made of.
    """

    folder: Path | None
    identity: Mapping[str, str]

    def origin(self, numbers: str, format: str) -> ModelOrigin:
        """The description that an export of it in a format has of it."""
        ...

    def load(self) -> ExportedModel:
        """The model over all devices. Every process calls it, and once.

        Raises:
          UserError: it cannot be read, or does not divide over the devices.
        """
        ...

    def rows(self, exported: ExportedModel) -> ProofRows:
        """The rows on which its files are compared with it."""
        ...

    def card(
        self,
        exported: ExportedModel,
        format: ExportFormat,
        options: ExportOptions,
        flags: Sequence[str],
    ) -> str:
        """The text of the model card; `flags` write the same export again."""
        ...


def open_source(
    run: str,
    step: str,
    out: Path | None,
    model: str,
    base: str = DEQUANTISED,
    formats: Sequence[str] = (),
) -> ExportSource:
    """The model that a command was asked to export; no parameter is read.

    Args:
      run: a run directory; or an adapter of PEFT, by its folder or hub:// address.
      step: of a run: latest, best or a number.
      out: the folder to write, if one is named.
      model: the base of an adapter; "": that which it names.
      base: of a run over codes, one of `EXPORT_BASES`.
      formats: that it will be written in, by name.

    Raises:
      UserError: there is no such model or step, a flag has no effect on it, or a format
        needs another `base`.
    """
    if not names_adapter(run):
        if model:
            raise UserError(
                f"--model={model} is the base of an adapter of PEFT, and {run} is "
                "none: drop --model, as a run knows its base"
            )
        return _RunSource(run, step, base, formats)
    if base != DEQUANTISED:
        raise UserError(
            f"--base={base} is for runs that were trained over codes, and --run={run} "
            "is an adapter of PEFT: drop --base, as --model names its base"
        )
    if step != LATEST:
        raise UserError(
            f"--run={run} is an adapter of PEFT, which has no steps: drop --step"
        )
    if out is None:
        raise UserError(
            f"--run={run} is an adapter of PEFT, and no run with a place for exports: "
            "name the folder to write with --out=FOLDER"
        )
    return _AdapterSource(run, model)


class _RunSource:
    """A run at a step."""

    def __init__(self, run: str, step: str, base: str, formats: Sequence[str]):
        self._run, self._step, self._of_run = run, step, RunDir(run)
        self._base, self._note = base, ""
        self.folder = self._of_run.path
        # The newest step may turn out to be damaged.
        found = agreement.together(lambda: saved_step(self._of_run, step))
        self._number = agreement.of_first(found)
        require_own_codes(self._of_run.config().lora.kind, base, formats)
        check(base, self._of_run.config().model.frozen_form, formats)

    @property
    def identity(self) -> Mapping[str, str]:
        return self._of_run.identity()

    def origin(self, numbers: str, format: str) -> ModelOrigin:
        origin = ModelOrigin.of(self._of_run, self._number, numbers, format)
        return dataclasses.replace(origin, base=self._base)

    def load(self) -> ExportedModel:
        opened = find_run(self._run).load(
            devices=jax.devices(), step=self._step, number=self._number
        )
        self._number = opened.step
        opened, self._note = over(self._base, opened)
        return exported_model(opened)

    def rows(self, exported: ExportedModel) -> ProofRows:
        return find_rows(self.folder, exported.tokenizer)

    def card(
        self,
        exported: ExportedModel,
        format: ExportFormat,
        options: ExportOptions,
        flags: Sequence[str],
    ) -> str:
        if self._base != DEQUANTISED:
            flags = [*flags, f"--base={self._base}"]
        return format_card(
            self._of_run,
            self._number,
            exported.base.licence,
            format.usage(exported, options),
            flags,
            format.library,
            format.merges,
            exported.adapters,
            self._note,
        )


class _AdapterSource:
    """An adapter of PEFT over its base."""

    folder = None

    def __init__(self, name: str, model: str):
        self._name = name
        self._found = agreement.together(
            lambda: open_folder(name, model, is_exact=True)
        )
        base = self._found.base
        self.identity = {
            "adapter": self._found.identity,
            "base model": base.fingerprint,
            "tokenizer": base.tokenizer.fingerprint,
        }

    def origin(self, numbers: str, format: str) -> ModelOrigin:
        base = self._found.base.fingerprint
        return ModelOrigin("", 0, base, numbers, format, self._found.identity)

    def load(self) -> ExportedModel:
        opened = self._found.load(devices=jax.devices())
        facts = {
            "adapter_sha256": self._found.identity,
            **base_facts(opened.config, opened.base),
            "system_prompt": "",
        }
        return with_facts(facts, opened.base.tokenizer, opened)

    def rows(self, exported: ExportedModel) -> ProofRows:
        return text_rows(exported.tokenizer, "a fixed text")

    def card(
        self,
        exported: ExportedModel,
        format: ExportFormat,
        options: ExportOptions,
        flags: Sequence[str],
    ) -> str:
        return format_adapter_card(
            self._name,
            exported.base.name,
            exported.base.licence,
            format.usage(exported, options),
            exported,
            flags,
            format.library,
            format.merges,
        )
