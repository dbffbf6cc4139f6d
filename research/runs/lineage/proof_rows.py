"""The rows on which an export is compared with its run.

A run keeps some of its held-out rows as ids, so an export needs neither the data nor
its tokens again.
"""

import json
from pathlib import Path

import numpy as np

from research.core.atomic_files import write_whole
from research.core.json_files import read_json
from research.data.token_batch import Batch
from research.formats.proof.proof_tokens import ProofRows
from research.tokenize.tokenizer import Tokenizer

FILE = "proof_rows.json"
# One row is as long as it is, up to a limit. A second one of the same length has the
# ends of others, where their answers are.
MOST_TOKENS, END = 512, 64
FIELDS = ("tokens", "positions", "segments")
SHAPE = {name: [[int]] for name in FIELDS}
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969 three people flew to the "
    "moon, and two of them walked on it; how far is that? "
)


def keep_rows(folder: Path, batch: Batch) -> None:
    """Writes parts of the first held-out rows of a run. Raises OSError."""
    kept = {name: value.tolist() for name, value in _parts(batch).items()}
    write_whole(folder / FILE, json.dumps(kept))


def _parts(batch: Batch) -> dict[str, np.ndarray]:
    """Two rows `[2, T]` of parts of the batch's rows, padded with segment 0."""
    own = {name: np.asarray(getattr(batch, name)) for name in FIELDS}
    lengths = (own["segments"] > 0).sum(1)
    longest = int(lengths.argmax())
    size = int(min(lengths[longest], MOST_TOKENS))
    end = min(END, size)
    others = [row for row in range(len(lengths)) if row != longest and lengths[row]]
    kept = {name: np.zeros((2, size), np.int32) for name in FIELDS}

    def put(row: int, place: int, count: int) -> None:
        """The last `count` tokens of a row; padding is behind all tokens."""
        stop = lengths[row]
        for name, value in own.items():
            part = value[row, max(0, stop - count) : stop]
            if name == "segments":
                # Neighbours in the packed row must not see each other.
                part = part + kept[name].max()
            kept[name][int(row != longest), place : place + len(part)] = part

    put(longest, 0, size)
    for number, row in enumerate(others[: size // end if end else 0]):
        put(row, number * end, end)
    return kept


def find_rows(folder: Path, tokenizer: Tokenizer) -> ProofRows:
    """The held-out rows that a run has kept, or a fixed text where it has none.

    Raises:
      UserError: the file holds something else.
    """
    found = read_json(folder / FILE, SHAPE, "remove it, and export again", absent={})
    if found and any(map(any, found["segments"])):
        arrays = {name: np.array(found[name], np.int32) for name in FIELDS}
        return ProofRows(**arrays, origin="held-out rows of the run")
    return text_rows(tokenizer, "a fixed text, as the run kept no rows")


def text_rows(tokenizer: Tokenizer, origin: str) -> ProofRows:
    """A fixed text; `origin` says what it is."""
    (ids,) = tokenizer.encode_texts([TEXT])
    tokens = np.array([ids[:END]], np.int32)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return ProofRows(tokens, places, np.ones_like(tokens), origin)
