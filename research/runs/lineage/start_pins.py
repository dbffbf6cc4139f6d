"""A run keeps what its addresses stood for at its first start: commits and steps."""

import logging
import os
import shlex
from collections.abc import Mapping

import jax

from research.checkpoints.checkpoint_listing import choose_step
from research.checkpoints.needed_steps import need_step
from research.checkpoints.run_identity import BASE_STEP
from research.config.run_config import Config
from research.config.saved_config import as_begun
from research.core.local_paths import split_step
from research.parallel import agreement
from research.runs.lineage.hub_pins import Pins, pinned, resolve_addresses
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RUN, RunDir
from research.runs.run_history import History


def pin_start(
    folder: RunDir, config: Config, others: Mapping[str, str] | None = None
) -> Config:
    """`config` with hub addresses at their commits, a base run at its step, an edition.

    All are those of the run in `folder`, if it exists. Then `folder.pins` has them.

    All processes call it; the answers of the first hold for all.

    Args:
      folder: of the run.
      config: as the user wrote it.
      others: commits of runs that start together with this one, and share them.

    Raises:
      UserError: an address is malformed, or stands for no commit or checkpoint.
    """

    def found() -> Pins:
        known = {**(others or {}), **folder.known_pins()}
        known |= _base_run(folder, config.model.init_from, known)
        return resolve_addresses(config, known, asking=jax.process_index() == 0)

    folder.pins = agreement.of_first(agreement.together(found))
    begun = folder.config() if folder.exists else None
    return as_begun(pinned(config, folder.pins), begun)


def _base_run(folder: RunDir, written: str, known: Pins) -> Pins:
    """The pin of `RUN` or `RUN@best` as the base model; none for any other model."""
    place, step = split_step(written)
    if not place or "://" in place:
        return {}
    run = RunDir(place)
    if not run.is_run or step.isdecimal() or written in known:
        return {}
    if folder.exists and not step:
        before, had = split_step(folder.config().model.init_from)
        if not had and os.path.abspath(before) == os.path.abspath(run.path):
            return {}  # An older run, for which it stands for the exported model.
    return {written: f"{place}@{saved_step(run, step or 'latest')}"}


def keep_base_step(folder: RunDir, start: str) -> None:
    """Keeps the run `start`, RUN@STEP, from removing the step under the adapters.

    Call it at each start of the run of adapters in `folder`, which may have moved. A
    run that cannot be written gets a warning.
    """
    identity = folder.identity()
    place, step = split_step(start)
    if not step or identity.get(BASE_STEP) != step:
        return
    base = RunDir(place)
    try:
        need_step(base.path, folder.path, identity)
    except OSError as error:
        logging.warning(
            "%s cannot be told that %s needs its step %s (%s): more training there or "
            "a prune may remove the step, and these adapters are of no use without it; "
            "keep a copy: python -m research.checkpoints --run=%s export-step "
            "--step=%s --out=FOLDER",
            *(place, folder, step, error, shlex.quote(place), step),
        )


def saved_step(folder: RunDir, step: str) -> int:
    """The number of the checkpoint `step`: latest, best, or a number.

    Raises:
      UserError: there is no such checkpoint; the message lists those that are there.
    """
    by = folder.config().checkpoint.best_by  # First, as it says what is no run.
    identity = folder.identity()
    data = History(folder.history, PhaseTimer()).measured_on(identity["data"], {})
    return choose_step(folder.checkpoints, step, data, identity.get(RUN, ""), by)
