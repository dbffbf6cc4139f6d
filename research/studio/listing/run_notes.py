"""Tags and notes on a run: `notes.json` in its folder, which training never reads."""

import json
import re
from pathlib import Path

from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.studio.listing.run_state import read_json_object

NAME = "notes.json"
MOST_TAGS, LONGEST_TAG, LONGEST_NOTE = 20, 40, 20_000


def read_notes(folder: Path) -> tuple[list[str], str]:
    """Tags and notes; none where the file is absent or holds something else."""
    found = read_json_object(folder / NAME, {"tags": [str], "notes": str})
    return found.get("tags", []), found.get("notes", "")


def write_notes(folder: Path, tags: str, notes: str) -> None:
    """Replaces both.

    Args:
      folder: of the run, which must be there.
      tags: words between commas or blanks.
      notes: any text.

    Raises:
      UserError: too many or too long.
      OSError: the folder cannot be written.
    """
    words = [*dict.fromkeys(w for w in re.split(r"[\s,]+", tags) if w)]
    if len(words) > MOST_TAGS or any(len(word) > LONGEST_TAG for word in words):
        raise UserError(
            f"tags: at most {MOST_TAGS} of at most {LONGEST_TAG} letters each"
        )
    if len(notes) > LONGEST_NOTE:
        raise UserError(f"notes: {len(notes)} letters, at most {LONGEST_NOTE}")
    write_whole(folder / NAME, json.dumps({"tags": words, "notes": notes}))
