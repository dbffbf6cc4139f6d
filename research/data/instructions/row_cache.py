"""Tokenises rows once, into a folder that any number of runs share.

The rows are read twice: once to check, count and split them, and once to tokenise them
in units. Neither their texts nor their ids are held. A unit that is finished is never
made again, so a build that is killed or fails loses one unit at most.
"""

import atexit
import collections
import dataclasses
import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from research.config.data_knobs import NEWEST_EDITION, DataConfig, TextConfig
from research.core.atomic_files import remove_leftovers
from research.core.cache_folders import use_entry
from research.core.errors import UserError, look_up
from research.data.instructions.packing import TokenizedDocument
from research.data.instructions.row_selection import RowSource, refuse_row
from research.data.instructions.row_store import (
    RowUnit,
    pack_numbers,
    read_manifest,
    read_unit,
    write_unit,
)
from research.data.row_readers import BadRowError
from research.data.shared_builds import one_at_a_time
from research.data.text.source_fingerprint import (
    cache_folder,
    cannot_write,
    file_hashes,
    sweep_old,
)
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Record

UNIT_ROWS, UNIT_LETTERS = 8192, 8 << 20
CUT = "context cut to fit"  # The reason of a row that is kept with less.
_PLACE = re.compile(r".*?:(?: item | row | byte )?\d+(?=: )")
OF_SCHEMA = 3  # documents of each schema that are shown to people
SECONDS_BETWEEN_LINES = 5.0
# More characters than any tokenizer packs into a token, on average over a long text. A
# row that is enormous is seen by its length: its tokens alone could exhaust the memory.
TOKEN_CHARACTERS = 512
# Fields of `DataConfig` that change no id and no split. `edition` is added resolved.
FREE_FIELDS = (
    "path", "eval_path", "source", "batch_size", "microbatch_size", "hub_timeout",
    "edition",
)  # fmt: skip
# Their code decides what a row becomes.
CODE = ("data/instructions", "data", "tokenize", "tokenize/templates")

Build = Callable[[Path, str], None]


def place_of(line: str) -> str:
    """The place, such as `rows.jsonl:7`, of `place: reason`; a reason may have colons.

    A line that begins with no place is given as it is.
    """
    found = _PLACE.match(line)
    return found[0] if found else line


def open_folder(
    sources: list[RowSource],
    config: DataConfig,
    seed: int,
    chat_format: ChatFormat,
    text: TextConfig,
    build: Build,
) -> tuple[Path, dict[str, Any]]:
    """The folder of the rows of `sources`, and its manifest; builds it where needed.

    Processes that want the same folder build it one after another, and all but the
    first find it finished. Where the user's cache cannot be written, a temporary folder
    takes its place.

    Args:
      sources: of the rows, and of the held-out rows if they have their own.
      config, seed, chat_format: decide what the rows become.
      text: names the cache.
      build: fills the folder and writes the manifest with the given key.

    Raises:
      UserError: rows cannot be used, or the folder that the user named not be written.
    """
    why: Exception
    try:
        cache = cache_folder(text)
    except UserError as error:
        if text.cache_dir != "auto":
            raise
        why = error
    else:
        try:
            found = _built(cache, sources, config, seed, chat_format, build)
            sweep_old(text)
            return found
        except OSError as error:
            if text.cache_dir != "auto":
                raise cannot_write(cache, error) from error
            why = error
    temporary = Path(tempfile.mkdtemp(prefix="research-rows-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    logging.warning(
        "data: rows are tokenised at every start, as there is no cache (%s); name a "
        "folder with --config.text.cache_dir=", why,
    )  # fmt: skip
    return _built(temporary, sources, config, seed, chat_format, build)


def _built(
    cache: Path,
    sources: list[RowSource],
    config: DataConfig,
    seed: int,
    chat_format: ChatFormat,
    build: Build,
) -> tuple[Path, dict[str, Any]]:
    key = _key(sources, config, seed, chat_format, cache)
    folder = cache / "rows" / key[:24]
    use_entry(folder)
    manifest = read_manifest(folder, key)
    if manifest is None:
        with one_at_a_time(folder, _say_that_it_waits):
            if read_manifest(folder, key) is None:
                remove_leftovers(folder)
                build(folder, key)
        manifest = read_manifest(folder, key)
    if manifest is None:
        raise OSError(f"{folder} has changed while it was made")
    return folder, manifest


def _say_that_it_waits() -> None:
    logging.info("data: another process tokenises these rows; waiting for it")


def _key(
    sources: list[RowSource],
    config: DataConfig,
    seed: int,
    chat_format: ChatFormat,
    cache: Path,
) -> str:
    values = dataclasses.asdict(config)
    parts = {
        "unit": [UNIT_ROWS, UNIT_LETTERS],
        "code": _code_digest(),
        "config": {k: v for k, v in values.items() if k not in FREE_FIELDS},
        "edition": config.edition or NEWEST_EDITION,
        "seed": seed if config.edition == 1 else None,
        "chat": chat_format.fingerprint,
        "rows": [
            _hashes(source, cache) if source.files else [source.revision]
            for source in sources
        ],
        "tests": [source.is_test for source in sources],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hashes(source: RowSource, cache: Path) -> list[list[str]]:
    try:
        return file_hashes(source.named_files(), cache, source.origin)
    except UserError:
        for _ in source.read():
            pass  # The reader of the rows says which knob has the wrong path.
        raise


def _code_digest() -> str:
    package = Path(__file__).parents[2]
    files = [f for folder in CODE for f in sorted((package / folder).glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class UnitBuild:
    """Tokenises the records of both sides, unit by unit."""

    def __init__(
        self,
        folder: Path,
        config: DataConfig,
        chat_format: ChatFormat,
        group_of: dict[str, str],
        sampled: set[str],
    ):
        """Prepares.

        Args:
          folder: of the units.
          config: of the rows.
          chat_format: encodes them.
          group_of: the group of each category.
          sampled: `where` of the records that are kept in `sample`.
        """
        self.sample: list[Record] = []
        self.of_schema: dict[str, list[int]] = {}  # Numbers of training documents.
        self.held_examples: list[str] = []  # Reasons of rows that are held out.
        self.prompts = 0  # Rows of a test without an answer, which have no document.
        self._folder, self._config, self._chat = folder, config, chat_format
        self._group_of, self._sampled = group_of, sampled
        groups = sorted(set(group_of.values()))
        self._number = {group: i for i, group in enumerate(groups)}
        ways = {"truncate": True, "drop": False}
        self._cuts_context = look_up(ways, config.overlength, "config.data.overlength")
        self._seen, self._said = 0, time.monotonic()

    def run(self, side: str, records: Iterable[Record]) -> Iterator[RowUnit]:
        """Yields the finished units of a side; makes those that are missing.

        Raises:
          UserError: the template refuses a row, and such rows stop the run.
          OSError: no space or no permission.
        """
        first = 0
        for number, part in enumerate(_parts(records)):
            self.sample += [r for r in part if r.where in self._sampled]
            rows, part = part, [record for record in part if record.has_answer]
            self.prompts += len(rows) - len(part)
            unit = read_unit(self._folder, side, number)
            if unit is None:
                unit = self._make(side, number, part)
            for note in unit.template_notes:
                self._chat.say(note)
            self._tell(len(rows))
            if side == "train":
                for name, places in unit.schemas.items():
                    shown = self.of_schema.setdefault(name, [])
                    shown += [first + place for place in places]
            else:
                self.held_examples += unit.examples
            first += len(unit.where)
            yield unit

    def _tell(self, count: int) -> None:
        self._seen += count
        if time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            logging.info("data: %d rows tokenised", self._seen)

    def _make(self, side: str, number: int, records: list[Record]) -> RowUnit:
        kept, documents, cut = [], [], 0
        dropped: collections.Counter[str] = collections.Counter()
        examples: list[str] = []
        budget = self._config.seq_len + 1  # n positions predict n ids of n + 1

        def drop(record: Record) -> None:
            dropped["too long"] += 1
            examples.append(
                f"{record.where}: longer than {self._config.seq_len} tokens"
            )

        candidates = []
        for record in records:
            record, fits = self._shortened(record, budget * TOKEN_CHARACTERS)
            if fits:
                candidates.append(record)
            else:
                drop(record)
        encodings = self._chat.encode_each(candidates)
        for record, encoded in zip(candidates, encodings, strict=True):
            if isinstance(encoded, UserError):
                bad = BadRowError("refused by the template", record.where, str(encoded))
                refuse_row(bad, self._config)
                dropped[bad.reason] += 1
                examples.append(str(bad))
                continue
            if len(encoded.ids) > budget and self._cuts_context:
                encoded = self._chat.shorten(record, encoded, budget)
                if encoded is not None:
                    cut += 1
                    examples.append(f"{record.where}: {CUT}")
            if encoded is None or len(encoded.ids) > budget:
                drop(record)
                continue
            kept.append(record)
            documents.append(
                TokenizedDocument(
                    np.array(encoded.ids, np.int32),
                    np.array(encoded.trained, bool),
                    self._number[record.category],
                )
            )
        numbers = pack_numbers(documents)
        unit = RowUnit(
            side=side,
            number=number,
            where=[record.where for record in kept],
            schemas=_first_of_schemas(kept),
            ids=sum(len(document.ids) for document in documents),
            sha256=hashlib.sha256(numbers).hexdigest(),
            held=[dataclasses.asdict(r) for r in kept] if side != "train" else [],
            dropped=dict(dropped),
            truncated=cut,
            examples=examples,
            template_notes=list(self._chat.notes),
        )
        write_unit(self._folder, unit, numbers)
        return unit

    def _shortened(self, record: Record, most: int) -> tuple[Record, bool]:
        """The record in its group, with at most `most` letters if it fits in them."""
        record = dataclasses.replace(record, category=self._group_of[record.category])
        if len(record.context) > most and self._cuts_context:
            record = dataclasses.replace(record, context=record.context[:most])
        texts = _letters(record)
        return record, max(texts, len(record.context)) <= most


def _first_of_schemas(records: list[Record]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        found.setdefault(record.schema, []).append(number)
    return {schema: numbers[:OF_SCHEMA] for schema, numbers in found.items()}


def _letters(record: Record) -> int:
    return sum(len(turn.text) + len(turn.fields) for turn in record.turns)


def _parts(records: Iterable[Record]) -> Iterator[list[Record]]:
    part: list[Record] = []
    letters = 0
    for record in records:
        part.append(record)
        letters += len(record.context) + _letters(record)
        if len(part) >= UNIT_ROWS or letters >= UNIT_LETTERS:
            yield part
            part, letters = [], 0
    if part:
        yield part
