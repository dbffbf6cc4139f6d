"""Orbax's checkpoint manager, set up for our checkpoints."""

import dataclasses
import functools
import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from research.checkpoints.checkpoint_listing import comparable_cost
from research.checkpoints.checksums import SealedArrays, SealedPath
from research.checkpoints.needed_steps import needed_steps
from research.config.knob_groups import CheckpointConfig
from research.parallel import agreement
from research.weights.parameter_paths import flatten


class Manager(ocp.CheckpointManager):
    """A manager that leaves signals to `StopRequest`."""

    def reached_preemption(self, step: int) -> bool:
        """Never: `StopRequest` alone asks JAX's preemption service.

        In each save Orbax would ask whether to stop at a moment with the number of the
        step. The service derives the moment to stop at from the last number that it
        was asked about. A SIGTERM during a save would then be agreed for a moment that
        has passed, and the run would never stop.
        """
        return False


def _match_below(folder: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """`folder.glob(pattern)`, in which the folder's own name is no pattern.

    The original joins both: below `runs/lr[1e-4]` Orbax would find none of its files,
    merge none of its arrays, and report success.
    """
    return (folder / name for name in glob.glob(pattern, root_dir=folder))


@dataclasses.dataclass
class PreserveNeeded(ocp.checkpoint_managers.PreservationPolicy):
    """Preserves the steps of the run in `base` that other runs are built on.

    The first process reads them, so that all have the same list.
    """

    base: Path

    def should_preserve(
        self,
        checkpoints: Sequence[ocp.checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: ocp.checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        needed = agreement.of_first(sorted(needed_steps(self.base)))
        return [each.step in needed for each in checkpoints]


def open_manager(
    folder: Path,
    config: CheckpointConfig,
    data: str,
    failed: Callable[[Exception], None],
    *,
    read_only: bool,
) -> Manager:
    """Opens the checkpoints in `folder`.

    Args:
      folder: absolute.
      config: how many checkpoints are kept.
      data: fingerprint of the data of this run; see `comparable_cost`.
      failed: called with the error of an asynchronous save, as soon as it fails.
      read_only: nothing is written, moved or removed.

    Raises:
      OSError: the folder cannot be read, or be written unless `read_only`.
    """
    type(epath.Path(folder)).glob = _match_below
    keep = ocp.checkpoint_managers
    rank = functools.partial(comparable_cost, data=data, best_by=config.best_by)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep.AnyPreservationPolicy(
            [
                keep.LatestN(config.keep_last),
                keep.BestN(
                    get_metric_fn=rank,
                    reverse=True,
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
                PreserveNeeded(folder.parent),
            ]
        ),
        # Without it Orbax neither writes nor reads metrics.
        best_fn=rank,
        best_mode="min",
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        # A reader sets nothing aside, so damaged metrics must not stop it here.
        lightweight_initialize=read_only,
        create=not read_only,
        enable_async_checkpointing=True,
        # Orbax would wait minutes for a folder that cannot be made.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        temporary_path_class=SealedPath,
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    arrays, json_files = SealedArrays(failed), ocp.JsonCheckpointHandler()
    for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add("state", args, arrays)
    partial = ocp.handlers.PyTreeCheckpointHandler()
    registry.add("state", ocp.args.PyTreeRestore, partial)
    for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
        registry.add("meta", args, json_files)
    return Manager(folder, options=options, handler_registry=registry)


def find_other_shape(folder: Path, wanted: Any, whole: bool = False) -> str:
    """The first array of `wanted` that the step saved with another shape, or "".

    A read that fails on its way leaves other reads of Orbax running; this check reads
    no array.

    Args:
      folder: of the step.
      wanted: the tree or a part of it, with anything that has a shape as leaves.
      whole: `wanted` is the whole tree, so no other array may be saved.
    """
    with ocp.StandardCheckpointer() as reader:
        saved, _ = flatten(reader.metadata(folder / "state").item_metadata.tree)
    shapes, _ = flatten(wanted)
    found = [
        f"{path} is {list(saved[path].shape)}, not {list(leaf.shape)}"
        if path in saved
        else f"{path} is not saved"
        for path, leaf in shapes.items()
        if path not in saved or tuple(saved[path].shape) != tuple(leaf.shape)
    ]
    more = sorted(saved.keys() - shapes.keys()) if whole else []
    found += [f"{path} is saved, and no part of this run" for path in more]
    # Other parameters have other moments, too; the parameters are the cause.
    return min(found, key=lambda text: text.startswith("opt_state."), default="")
