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
from research.formats.proof.logit_parity import ProofRows
from research.tokenize.tokenizer import Tokenizer

FILE = "proof_rows.json"
MOST_ROWS, MOST_TOKENS = 4, 64  # of which each row keeps its beginning
FIELDS = ("tokens", "positions", "segments")
SHAPE = {name: [[int]] for name in FIELDS}
TEXT = (
    "The quick brown fox jumps over the lazy dog. In 1969 three people flew to the "
    "moon, and two of them walked on it; how far is that? "
)


def keep_rows(folder: Path, batch: Batch) -> None:
    """Writes the first held-out rows of a run. Raises OSError."""
    kept = {
        name: np.asarray(getattr(batch, name))[:MOST_ROWS, :MOST_TOKENS].tolist()
        for name in FIELDS
    }
    write_whole(folder / FILE, json.dumps(kept))


def find_rows(folder: Path, tokenizer: Tokenizer) -> ProofRows:
    """The held-out rows that a run has kept, or a fixed text where it has none.

    Raises:
      UserError: the file holds something else.
    """
    found = read_json(folder / FILE, SHAPE, "remove it, and export again", absent={})
    if found:
        arrays = {name: np.array(found[name], np.int32) for name in FIELDS}
        return ProofRows(**arrays, origin="held-out rows of the run")
    (ids,) = tokenizer.encode_texts([TEXT])
    tokens = np.array([ids[:MOST_TOKENS]], np.int32)
    places = np.arange(tokens.shape[1], dtype=np.int32)[None]
    return ProofRows(
        tokens, places, np.ones_like(tokens), "a fixed text, as the run kept no rows"
    )
