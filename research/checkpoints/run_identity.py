"""The identity of a run or checkpoint: fingerprints of base model, tokenizer, data."""

import math
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from research.config.choices import SAME_ARRAYS
from research.config.field_names import shell_flag
from research.core.errors import UserError
from research.core.visible_text import counted

Identity = dict[str, str]
# Parts of an identity that name the run, the step and the checkpoint of the base model.
BASE_RUN, BASE_STEP, BASE_SUM = "base run", "base step", "base checkpoint"
# The parts of an identity that differ, as a rule, where these knobs do.
CHANGED_WITH = {
    r"model\.init_from": ("base model", "tokenizer"),
    r"text\.tokenizer": ("tokenizer", "data"),
    r"text\.|data\.(kind|source|path|eval_path|columns|max_rows)": ("data",),
}
# Knobs that decide which arrays a checkpoint has, each with what matters of its value.
OF_ARRAYS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("trainable", "model.preset", "optim.name"), str),
    "lora.rank": str,
    "lora.kind": lambda kind: SAME_ARRAYS.get(kind, kind),
    **dict.fromkeys(("lora.targets", "lora.full", "lora.rank_pattern"), tuple),
    "optim.skip_spread": bool,
    "optim.skip_window": int,
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


def refuse_impossible(
    run: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    changed: Collection[str],
    history: Mapping[str, Any],
) -> None:
    """Refuses differences that no flag can accept, as no checkpoint would fit them.

    Args:
      run: the run directory.
      old: the knobs of the run.
      new: the knobs to resume it with.
      changed: the names of the knobs that differ.
      history: its `run.json`.

    Raises:
      UserError: names what can work in their place.
    """
    made = history["saved"]
    if not made:
        return
    has_made = f"{run} has made {counted(made, 'step')}"
    others = [x for x, part in OF_ARRAYS.items() if part(old[x]) != part(new[x])]
    if arrays := sorted({*others}.intersection(changed)):
        names = " and ".join(f"config.{name}" for name in arrays)
        base = shlex.quote(f"--config.model.init_from={run}")
        raise UserError(
            f"{has_made}, and its checkpoints fit no other {names}: drop the change, "
            "choose another --config.run_dir, or begin a new run on top of this one "
            f"with --config.run_dir=NEW {base}"
        )
    if "steps" in changed and 0 < new["steps"] < made:
        raise UserError(
            f"{has_made}, and config.steps is {new['steps']}: raise config.steps to at "
            f"least {made}"
        )
    epochs = new["epochs"]
    if "epochs" not in changed or not (epochs and old["epochs"]):
        return
    planned = next((x["steps"] for x in history["starts"][::-1] if "steps" in x), 0)
    share = epochs / old["epochs"]
    # The last step of an epoch may be rounded up, so these are the most.
    if made <= planned and math.ceil(share * planned) < made:
        least = math.ceil(100 * old["epochs"] * made / planned) / 100
        raise UserError(
            f"{has_made}, and config.epochs is {epochs:g}: raise config.epochs to "
            f"at least {min(least, old['epochs']):g}"
        )
