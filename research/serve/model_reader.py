"""Reads adapters and newer weights while a server answers, in each of its processes."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.engine.slot_decoder import SlotDecoder
from research.runs.answering.found_adapters import find_adapters
from research.runs.answering.open_for_answering import (
    Answering,
    ServedModel,
    newest_step,
)
from research.runs.answering.run_addresses import RunAddress
from research.runs.run_directory import RunDir
from research.weights.adapters.serving_bank import Row

ADAPTER, WEIGHTS, PLACE = "adapter", "weights", "place"
Task = dict[str, Any]


def reading(kind: str, address: RunAddress) -> Task:
    """The task of reading what an address stands for now, for all processes alike.

    Raises:
      UserError: it stands for nothing.
    """
    fields = dataclasses.asdict(address) | {"folder": str(address.folder.absolute())}
    return {"kind": kind, "address": fields, "number": newest_step(address)[0]}


class ModelReader:
    """Reads in one process. Tasks are JSON values, so that the others hear of them.

    Attributes:
      opened: the base that answers.
      decoder: answers with its parameters.
    """

    def __init__(self, opened: Answering, decoder: SlotDecoder):
        """`decoder` answers with the parameters of `opened`."""
        self.opened, self.decoder = opened, decoder
        self._rows: dict[str, Row] = {}
        self._next: Answering | None = None

    def row(self, identity: str) -> Row:
        """The adapter that was read last, which has this identity."""
        return self._rows[identity]

    def check(self, task: Task) -> None:
        """Finds whether this process can begin a task, without waiting for others.

        Raises:
          UserError: it does not see the checkpoint, or may not read it.
        """
        if task["kind"] == PLACE:
            return
        address = _address(task)
        saved = address.folder
        if not address.is_folder:
            saved = RunDir(address.folder).checkpoints / str(task["number"])
        if not saved.is_dir():
            raise UserError(f"there is no checkpoint {saved} here")
        hidden = [x for x in saved.rglob("*") if not os.access(x, os.R_OK)]
        if hidden:
            raise UserError(f"{hidden[0]} may not be read here")
        try:
            if task["kind"] == ADAPTER:
                find_adapters(address, self.opened.base, self.opened.frozen_form)
        except OSError as error:
            raise UserError(f"the run cannot be read: {error}") from error

    def perform(self, task: Task) -> tuple[str, ServedModel]:
        """Does a task; returns the identity of what was read, and the model.

        `adapter` reads a row for the bank, `weights` a newer step of a base that was
        fully trained, and `place` puts those weights into the decoder.

        Raises:
          UserError: it cannot be read.
        """
        try:
            served = self._perform(task)
        except OSError as error:
            raise UserError(f"the run cannot be read: {error}") from error
        return served.identity, served

    def _perform(self, task: Task) -> ServedModel:
        if task["kind"] == PLACE:
            self.opened, self._next = self._next, None
            self.decoder.params = self.opened.params
            return self.opened.served_base
        if task["kind"] == WEIGHTS:
            self._next = None  # A try before may not have been placed.
            self._next = self.opened.reread(_address(task), task["number"])
            return self._next.served_base
        served, row = self.opened.read(_address(task), task["number"])
        self._rows = {served.identity: row}
        return served


def _address(task: Task) -> RunAddress:
    fields = task["address"]
    return RunAddress(**fields | {"folder": Path(fields["folder"])})
