"""The rows of a data set as a page shows them: lengths, copies, rows one by one."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from research.core.atomic_files import write_whole
from research.core.json_files import read_json
from research.runs.display_files import PREVIEW, SHAPES
from research.tasks.row_preview import PreviewRow, RowPage

SURVEY = "rows.json"
BLOCK = 200  # rows that one check reads for the page
BARS = 16  # of the histogram
NAMED = 200  # copies, and rows that were dropped or cut, whose places are listed


@dataclasses.dataclass(frozen=True)
class RowSurvey:
    """The content of `rows.json`.

    Attributes:
      total: training rows.
      first: the number of the first of `rows`, from 0.
      rows: at most `BLOCK` of them, as the model reads them.
      lengths: `(least, most, rows)` of each bar of the histogram, in tokens.
      longest: tokens of the longest row.
      too_long: rows that were cut or dropped, because they were too long.
      copies: `(place, place of the first)` of rows with the same tokens, `NAMED` of
        them; and how many there are.
      left_out: lines `file:line: reason`, `NAMED` of them; and how many there are.
    """

    total: int
    first: int
    rows: Sequence[PreviewRow]
    lengths: Sequence[tuple[int, int, int]]
    longest: int
    too_long: int
    copies: Sequence[tuple[str, str]]
    copy_count: int
    left_out: Sequence[str]
    left_out_count: int


def summed_up(page: RowPage, left_out: Sequence[str], seq_len: int) -> RowSurvey:
    """The survey of what a task has read."""
    return RowSurvey(
        total=len(page.lengths),
        first=page.first,
        rows=page.rows,
        lengths=histogram(page.lengths, seq_len),
        longest=int(max(page.lengths, default=0)),
        too_long=page.too_long,
        copies=page.copies[:NAMED],
        copy_count=len(page.copies),
        left_out=left_out[:NAMED],
        left_out_count=len(left_out),
    )


def histogram(lengths: np.ndarray, seq_len: int) -> list[tuple[int, int, int]]:
    """`(least, most, rows)` of bars of one width, the last of which ends at the limit.

    A row of n predictions has n + 1 tokens, so the limit is `seq_len` + 1.
    """
    limit = seq_len + 1
    width = -(-limit // BARS)
    bars = -(-limit // width)
    counts = np.bincount((np.asarray(lengths, np.int64) - 1) // width, minlength=bars)
    return [
        (bar * width + 1, min((bar + 1) * width, limit), int(counts[bar]))
        for bar in range(bars)
    ]


def write_survey(folder: Path, found: RowSurvey) -> None:
    """Writes `rows.json`. Raises OSError."""
    write_whole(folder / SURVEY, json.dumps(dataclasses.asdict(found)))


def read_survey(folder: Path) -> RowSurvey | None:
    """Reads `rows.json`; None where there is none. Raises UserError: it is damaged."""
    shape = {field.name: object for field in dataclasses.fields(RowSurvey)}
    shape |= SHAPES[PREVIEW]
    values = read_json(folder / SURVEY, shape, "check the rows again", absent={})
    if not values:
        return None
    rows = [PreviewRow.from_json(row) for row in values["rows"]]
    return RowSurvey(**{**values, "rows": rows})
