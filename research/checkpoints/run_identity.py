"""The identity of a run or checkpoint: fingerprints of base model, tokenizer, data."""

import re
from collections.abc import Collection, Mapping

from research.config.field_names import shell_flag
from research.core.errors import UserError

Identity = dict[str, str]
# Parts of an identity that name the run, the step and the checkpoint of the base model.
BASE_RUN, BASE_STEP, BASE_SUM = "base run", "base step", "base checkpoint"
# The parts of an identity that differ, as a rule, where these knobs do.
CHANGED_WITH = {
    r"model\.init_from": ("base model", "tokenizer"),
    r"text\.tokenizer": ("tokenizer", "data"),
    r"text\.|data\.(kind|source|path|eval_path|columns|max_rows)": ("data",),
}


def check_identity(
    saved: Mapping[str, str],
    now: Mapping[str, str],
    what: str,
    accept: Collection[str] = (),
) -> dict[str, str]:
    """Refuses parts that differ and are not accepted.

    Args:
      saved: the identity of the run or checkpoint.
      now: the identity to compare with.
      what: names the run or checkpoint in messages.
      accept: parts that may differ.

    Returns:
      `old -> new` by part, for parts that differ and are accepted.

    Raises:
      UserError: names each part (base model, tokenizer, data) that is refused.
    """
    odd = {
        part: f"{saved.get(part)} -> {now[part]}"
        for part in now
        if saved.get(part) != now[part]
    }
    refused = [f"  {part}: {odd[part]}" for part in odd if part not in accept]
    if refused:
        raise UserError(
            f"{what} was made with something else:\n" + "\n".join(refused) + "\n"
            "restore what it was made with, choose another --config.run_dir, or accept "
            f"the difference: add {accepting(odd, accept)}"
        )
    return odd


def accepting(refused: Collection[str], accept: Collection[str]) -> str:
    """The flag that accepts `refused` beside `accept`, and what follows from it.

    Other knobs of the data mean other data, so nothing is refused in a second try.
    """
    names = {*refused, *accept}
    for knobs, parts in CHANGED_WITH.items():
        if any(re.match(knobs, name) for name in refused):
            names.update(parts)
    return shell_flag("accept", tuple(sorted(names)))
