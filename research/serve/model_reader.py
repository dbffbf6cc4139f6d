"""Reads adapters and newer weights while a server answers, in each of its processes."""

import dataclasses
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.engine.slot_decoder import SlotDecoder
from research.runs.answering.open_for_answering import (
    Answering,
    ServedModel,
    newest_step,
)
from research.runs.answering.run_addresses import RunAddress
from research.weights.adapters.serving_bank import Row

ADAPTER, WEIGHTS, PLACE = "adapter", "weights", "place"
Task = dict[str, Any]


def reading(kind: str, address: RunAddress) -> Task:
    """The task of reading what an address stands for now, for all processes alike.

    Raises:
      UserError: it stands for nothing.
    """
    fields = dataclasses.asdict(address) | {"folder": str(address.folder)}
    return {"kind": kind, "address": fields, "number": newest_step(address)[0]}


class ModelReader:
    """Reads in one process. Tasks are JSON values, so that the others hear of them.

    Attributes:
      opened: the base that answers.
    """

    def __init__(self, opened: Answering, decoder: SlotDecoder):
        """`decoder` answers with the parameters of `opened`."""
        self.opened, self._decoder = opened, decoder
        self._rows: dict[str, Row] = {}
        self._next: Answering | None = None

    def row(self, identity: str) -> Row:
        """The adapter that was read last, which has this identity."""
        return self._rows[identity]

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
            self._decoder.params = self.opened.params
            return self.opened.served_base
        if task["kind"] == WEIGHTS:
            self._next = None  # A try before may not have been placed.
            self._next = self.opened.reread(task["number"])
            return self._next.served_base
        fields = task["address"]
        address = RunAddress(**fields | {"folder": Path(fields["folder"])})
        served, row = self.opened.read(address, task["number"])
        self._rows = {served.identity: row}
        return served
