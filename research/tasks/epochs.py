"""Epochs: how many steps they are, and how often a run passes over its rows.

Batches run on from one epoch into the next, so none is short: the batch that ends an
epoch is filled with the first rows of the next one, which has an order of its own. A
run of `config.epochs` makes as many steps as it takes to train each row so often.
"""

import dataclasses
import fractions
import math
from collections.abc import Mapping

from research.config.data_knobs import DataConfig
from research.config.field_names import shell_flag
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.visible_text import counted
from research.tasks.findings import Finding

MANY = 10.0  # More passes over instruction rows mostly teach them by heart.


def resolved(config: Config, rows: int) -> Config:
    """`config` with its number of steps, where it gives epochs.

    Args:
      config: of the run.
      rows: different training rows, packed; of a mixture, those of all its sources.
        0 if nobody has counted them.

    Raises:
      UserError: the rows are not counted.
    """
    if not config.epochs:
        return config
    if not rows:
        raise UserError(
            f"config.epochs is {config.epochs:g}, and the rows of this task are not "
            "counted: set --config.epochs=0 --config.steps=NUMBER"
        )
    # As it is written: in binary 0.1 is a little more, and could cost a step.
    drawn = fractions.Fraction(repr(config.epochs)) * rows
    steps = math.ceil(drawn / config.data.batch_size)
    return dataclasses.replace(config, steps=steps, epochs=0.0)


def passed(batches: int, config: Config, rows: int) -> float | None:
    """The epochs in so many batches; None if the rows are not counted."""
    return batches * config.data.batch_size / rows if rows else None


def count_epochs(
    config: Config,
    rows: Mapping[str, int],
    shares: Mapping[str, float],
) -> Finding:
    """How often the run passes over the training rows of each source.

    Args:
      config: of the run, with its number of steps.
      rows: different training rows by source; a source without one is named. Empty
        where the text is streamed.
      shares: the share of the drawn rows that comes from each source.
    """
    steps, size = config.steps, config.data.batch_size
    total = sum(n for name, n in rows.items() if shares[name])
    if not total:
        text = f"{counted(steps, 'step')} of {counted(size, 'row')}; streamed text has "
        text += "not been counted"
        return Finding("epochs", text, numbers={"steps": steps})
    drawn = steps * size
    epochs = {name: drawn * shares[name] / n for name, n in rows.items() if n}
    whole, per_epoch = drawn / total, math.ceil(total / size)
    lines = [
        f"{whole:.2f}: one epoch is {counted(per_epoch, 'step')} "
        f"({counted(total, 'row')}, {size} a step), and this run is "
        f"{counted(steps, 'step')}"
    ]
    if len(rows) > 1:
        lines += [f"  {name}: {epoch:.2f}" for name, epoch in epochs.items()]
    lines += [
        f"  {name} is not trained: it is shorter than a row of {config.data.seq_len} "
        "tokens (config.data.seq_len)"
        for name, n in rows.items()
        if not n
    ]
    if size > total:
        lines.append(
            f"  a step is {counted(size, 'row')}, and there are only {total:,}, which "
            f"it repeats: {smaller_batch(config.data, total)}, or give more data"
        )
    often = [name for name, epoch in epochs.items() if epoch > MANY]
    if often:
        lines.append(
            f"  more than {MANY:g} epochs of {', '.join(often)}: such rows are soon "
            "known by heart; lower config.epochs or config.steps, or give more data"
        )
    by_source = {f"epochs {name}": epoch for name, epoch in epochs.items()}
    return Finding(
        "epochs",
        "\n".join(lines),
        numbers={
            "epochs": whole, "rows": total, "steps": steps, "epoch_steps": per_epoch,
        } | (by_source if len(rows) > 1 else {}),
        warns=bool(often) or size > total,
    )  # fmt: skip


def require_batch(data: DataConfig, rows: int, unit: int) -> None:
    """Refuses a batch that has more rows than there are: a step would repeat some.

    Args:
      data: of the run.
      rows: different training rows, packed; 0 if nobody has counted them.
      unit: the rows of which a batch on this mesh is a multiple.

    Raises:
      UserError: names a batch that the rows fill, if there is one.
    """
    if not 0 < rows < data.batch_size:
        return
    found = (
        f"config.data.batch_size is {data.batch_size}, and the training data fill only "
        f"{counted(rows, 'packed row')} of {data.seq_len} tokens"
    )
    if rows < unit:
        raise UserError(
            f"{found}, fewer than this mesh needs, {unit}: give more data, use fewer "
            "devices, or lower config.data.seq_len, so that they fill more rows"
        )
    raise UserError(f"{found}: {smaller_batch(data, rows, unit)}, or give more data")


def smaller_batch(data: DataConfig, rows: int, unit: int = 1) -> str:
    """The flags of the largest batch that `rows` fill: `unit` times a power of 2.

    So it divides over devices, and into micro-batches of a power of 2.
    """
    size = unit << (max(rows // unit, 1).bit_length() - 1)
    flags = [shell_flag("data.batch_size", size)]
    if data.microbatch_size and size % data.microbatch_size:
        flags.append(shell_flag("data.microbatch_size", size))
    return f"set {' '.join(flags)}"
