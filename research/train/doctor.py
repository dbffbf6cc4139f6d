"""A run proves itself before it starts.

A silent defect costs people weeks: a mask that is all zero or all one, adapters that
reach nothing, an end token that is never trained. The doctor looks for each of these
in the real data and parameters. It returns its findings as data.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.core.visible_text import counted
from research.formats.base_model import Base
from research.parallel import mesh as meshes
from research.runs import display_files
from research.tasks.findings import Finding
from research.tasks.row_preview import PreviewRow
from research.tasks.task_protocol import Task
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.metrics.throughput import count_used
from research.train.step.definition_from_config import lost_in_codes
from research.train.step.train_step import StepDefinition, TrainState
from research.weights import parameter_paths
from research.weights.over_stack import over_stack
from research.weights.representations.lost_in_codes import LostInCodes
from research.weights.representations.low_rank import LowRank

# From the parameters of a model to its hidden states.
Outputs = Callable[[dict[str, Any]], jax.Array]

TEST_ROW = 64  # tokens
PREVIEW_ROWS = 4


@dataclasses.dataclass(frozen=True)
class Examination:
    """The data that the doctor found, and rows to look at.

    Attributes:
      findings: of the model, then of the rows.
      preview: the first training rows.
    """

    findings: Sequence[Finding]
    preview: Sequence[PreviewRow]


def examine(
    base: Base,
    definition: StepDefinition,
    state: TrainState,
    frozen: dict[str, Any],
    task: Task,
    lora: LoRAConfig,
    outputs: Outputs | None = None,
) -> Examination:
    """Examines a run that is ready to start; decides nothing.

    `outputs`: of `make_outputs`; one of several runs whose model is the same.
    """
    findings = examine_model(base, definition, state, frozen, lora.init_from, outputs)
    findings += task.examine()
    return Examination(findings, task.preview(PREVIEW_ROWS))


def save(folder: Path, examination: Examination) -> None:
    """Writes `doctor.json` and `preview.json` into the run directory.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        display_files.write_findings(folder, examination.findings)
        display_files.write_preview(folder, examination.preview)
    except OSError as error:
        raise UserError(
            f"run directory {folder} cannot be written: {error}; make room, or allow "
            "writing, then start the same command again"
        ) from error


def examine_model(
    base: Base,
    definition: StepDefinition,
    state: TrainState,
    frozen: dict[str, Any],
    continued: str = "",
    outputs: Outputs | None = None,
) -> list[Finding]:
    """Reports the trained parameters and devices; checks that adapters are a no-op.

    Those of `continued` are one only where they are switched off.
    """
    # A state that a checkpoint will fill has only shapes; the restore checks it.
    is_read = isinstance(state.step, jax.Array)
    odd = parameter_paths.not_finite(state.params) if is_read else []
    kept_ones = definition.trainable.used(frozen)
    trained = definition.trainable.count
    kept = parameter_paths.count(kept_ones)
    used = sum(count_used(x, definition.model) for x in (state.params, kept_ones))
    of_token = f"; a token uses {used:,} of all" if used < trained + kept else ""
    findings = [
        Finding("base model", f"{base.name}, sha256 {base.fingerprint[:12]}"),
        Finding(
            "tokenizer",
            f"{base.tokenizer.vocab_size} ids, sha256 "
            f"{base.tokenizer.fingerprint[:12]}",
        ),
        Finding(
            "parameters",
            f"{trained:,} trained ({parameter_paths.nbytes(state):,} bytes with "
            "optimizer), "
            f"{kept:,} frozen ({_bytes_by_form(frozen)}){of_token}",
            ok=trained > 0 and not odd,
            remedy="if nothing is trained, check config.lora.targets; start from other "
            f"weights if some are not finite: {', '.join(odd) or 'none are'}",
            numbers={
                "trained": trained,
                "trained_bytes": parameter_paths.nbytes(state),
                "frozen": kept,
                "frozen_bytes": parameter_paths.nbytes(frozen),
                **{
                    f"frozen_bytes/{form}": size
                    for form, size in parameter_paths.bytes_by_form(frozen).items()
                },
                "used": used,
            },
        ),
        Finding(
            "mesh",
            ", ".join(f"{axis}={n}" for axis, n in definition.mesh.shape.items())
            + f" on {jax.devices()[0].device_kind}",
        ),
        *_examine_chunk(definition),
    ]
    if definition.trainable.kind is not None:
        findings[2:2] = _examine_adapters(
            definition, state, frozen, continued, base, outputs
        )
    return findings


def _bytes_by_form(frozen: dict[str, Any]) -> str:
    forms = parameter_paths.bytes_by_form(frozen)
    total = f"{parameter_paths.nbytes(frozen):,} bytes"
    listed = ", ".join(f"{size:,} in {form}" for form, size in forms.items())
    return f"{total}: {listed}" if len(forms) > 1 else total


def _examine_chunk(definition: StepDefinition) -> list[Finding]:
    """How large a product with the head is; nothing for an objective without one."""
    if not isinstance(definition.objective, CrossEntropy):
        return []
    count = definition.objective.positions(definition.model.architecture.vocab)
    said = f"{count} positions in one product with the vocabulary head"
    return [Finding("loss chunk", said, numbers={"positions": count})]


def _examine_adapters(
    definition: StepDefinition,
    state: TrainState,
    frozen: dict[str, Any],
    continued: str,
    base: Base,
    outputs: Outputs | None,
) -> list[Finding]:
    split = definition.trainable
    kind, adapters = split.kind, split.adapters(state.params)
    paths = "".join(
        f"\n  {path} {tuple(frozen[path].shape)} rank {kind.rank(factors)}"
        for path, factors in adapters.items()
    )
    matrices = sum(next(iter(split.specs[path].values())).copies for path in adapters)
    specs = len(jax.tree.leaves(split.specs))
    leaves = len(jax.tree.leaves(state.params))
    differing, moved, distance = _compare_outputs(
        definition, state.params, frozen, outputs or make_outputs(definition)
    )
    rounding = float(jnp.finfo(definition.model.options.dtype).eps) ** 0.5
    starts = differing == 0 or (moved < rounding and not kind.is_exact)
    how = f" by rounding ({moved:.1e})" if differing and starts else ""
    if kind.reads_lost and differing and not continued:
        path = min(filter(split.is_in_codes, adapters))
        before, after = _recovered(base, definition, state.params, frozen, path)
        starts = after < before
        how = f", and bring {path} from {before:.3%} to {after:.3%} away from its file"
    return [
        Finding(
            f"{kind.name} targets",
            f"{matrices} matrices under {len(adapters)} paths{paths}",
            numbers={"matrices": matrices, "paths": len(adapters)},
        ),
        *_examine_full(definition),
        Finding(
            f"{kind.name} at step 0",
            f"adapters change {differing:,} outputs of a test row{how}"
            f"{f' as they continue {continued}' if continued else ''}, and the base "
            f"model without them is {distance:.1e} away",
            ok=(starts or bool(continued)) and distance < rounding,
            remedy="adapters must start as an exact no-op: they differ from the no-op "
            f"state of {kind.name}, or they lie over other weights than the base "
            "model's",
            numbers={"differing": differing, "moved": moved, "distance": distance},
        ),
        Finding(
            "frozen weights",
            f"in no optimizer state: {leaves} trained arrays, {specs} of adapters"
            f"{' and whole parameters' if split.full else ''}",
            ok=leaves == specs,
            remedy="the trained state holds more than adapters: this would be full "
            f"fine-tuning under the name of {kind.name}",
        ),
    ]


def _recovered(
    base: Base,
    definition: StepDefinition,
    params: dict[str, Any],
    frozen: dict[str, Any],
    path: str,
) -> tuple[float, float]:
    """How far the codes of a path are from the file without and with its adapter.

    Both are shares of the norm of the weights in the file.
    """
    lost = lost_in_codes(definition, base, path, frozen[path])
    adapted = definition.trainable.forward(params, frozen, None)[path]

    def squares(parts: tuple[LostInCodes, LowRank]) -> list[jax.Array]:
        lost, adapted = parts
        before = lost.subtract()
        whole = lost.weight.astype(jnp.float32)
        return [jnp.sum(x * x) for x in (before, before - adapted.update(), whole)]

    measured = jax.jit(over_stack(squares, adapted.scale.ndim))((lost, adapted))
    before, after, whole = (float(jnp.sqrt(jnp.sum(x))) for x in measured)
    return before / whole, after / whole


def _examine_full(definition: StepDefinition) -> list[Finding]:
    """The parameters that are trained whole beside adapters; nothing without any."""
    full, model = definition.trainable.full, definition.model
    if not full:
        return []
    specs = model.specs
    tied = model.head(specs).keys() if model.architecture.tied_head else ()
    paths = "".join(
        f"\n  {path} {specs[path].shape}{', which is the head, too' * (path in tied)}"
        for path in specs
        if path in full
    )
    count = parameter_paths.count([specs[path] for path in full])
    return [
        Finding(
            "whole parameters",
            f"{count:,} trained in float32 under {counted(len(full), 'path')}{paths}",
            numbers={"scalars": count, "paths": len(full)},
        )
    ]


def make_outputs(definition: StepDefinition) -> Outputs:
    """The hidden states of one row of arbitrary ids, compiled once for each shape."""
    tokens = (
        np.arange(TEST_ROW, dtype=np.int32)[None] % definition.model.architecture.vocab
    )
    tokens = np.repeat(tokens, meshes.batch_shards(definition.mesh), axis=0)
    segments = np.ones_like(tokens)

    @jax.jit
    def outputs(weights: Any) -> jax.Array:
        return definition.model.hidden(weights, tokens, tokens, segments)

    return outputs


def _compare_outputs(
    definition: StepDefinition, params: Any, frozen: dict[str, Any], outputs: Outputs
) -> tuple[int, float, float]:
    """Compares `outputs` with the adapters, with them off, and without.

    Returns:
      The number of outputs that differ in any bit from those of adapters in their
      no-op state, which the same compiled program computes; their distance from those;
      and the distance of these from the base model's outputs. A distance is a share of
      the norm of the outputs that it is from. The base model is
      another program, whose products the compiler may round in another order, so its
      outputs cannot be compared bit for bit on every processor.
    """

    def adapted(adapters: Any) -> jax.Array:
        return outputs(definition.trainable.forward(adapters, frozen, None))

    found, base = adapted(params), outputs(frozen)
    without = adapted(definition.trainable.off(params, frozen))
    differing, moved, distance = _distances(found, without, base)
    return int(differing), float(moved), float(distance)


@jax.jit  # One program: as many as there are operations would each take a moment.
def _distances(
    found: jax.Array, without: jax.Array, base: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    differing = jnp.sum(found != without)
    return differing, _distance(found, without), _distance(without, base)


def _distance(x: jax.Array, origin: jax.Array) -> jax.Array:
    x, origin = x.astype(jnp.float32), origin.astype(jnp.float32)
    return jnp.linalg.norm(x - origin) / jnp.linalg.norm(origin)


class UnhealthyError(UserError):
    """The doctor stops a run. `examination` is all that it has found."""

    def __init__(self, message: str, examination: Examination):
        super().__init__(message)
        self.examination = examination


def require_healthy(examination: Examination) -> None:
    """Raises UnhealthyError with the remedies of all failed findings."""
    failed = [finding for finding in examination.findings if not finding.ok]
    if failed:
        raise UnhealthyError(
            "the doctor stops this run:\n"
            + "\n".join(f"  {f.name}: {f.text}\n    {f.remedy}" for f in failed),
            examination,
        )
