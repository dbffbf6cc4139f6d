"""Whose a run or a checkpoint is: fingerprints of base model, tokenizer and data."""

from collections.abc import Collection, Mapping

from research.core.errors import UserError

Identity = dict[str, str]


def check_identity(
    saved: Mapping[str, str],
    now: Mapping[str, str],
    what: str,
    accept: Collection[str] = (),
) -> dict[str, str]:
    """Refuses parts that differ, unless they are accepted.

    Returns:
      `old -> new` by part, of those that differ and were accepted.

    Raises:
      UserError: naming each other part (base model, tokenizer, data) that differs.
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
            "give back what it was made with, choose another --config.run_dir, or go "
            "on with the difference by naming it in --config.accept"
        )
    return odd
