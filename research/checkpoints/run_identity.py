"""The identity of a run or checkpoint: fingerprints of base model, tokenizer, data."""

from collections.abc import Collection, Mapping

from research.core.errors import UserError

Identity = dict[str, str]


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
            "the difference by naming it in --config.accept"
        )
    return odd
