"""The base model and the tuned one on the same rows, with the code of training."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax

from research.core.errors import DivergedError
from research.data.grouped_values import NATS_PER_TOKEN
from research.data.metric_sums import Sums, evaluate_weights
from research.data.token_batch import Batch
from research.evaluate.held_out_losses import Evaluation, add_up, sum_batches
from research.parallel import mesh as meshes
from research.report.result_tables import perplexity
from research.runs.reopen import ReopenedRun
from research.tasks.task_protocol import EvaluationRows
from research.tasks.task_registry import make_objective


def evaluate_models(run: ReopenedRun, rows: EvaluationRows) -> dict[str, Evaluation]:
    """The results of `base`, where the run has adapters over one, and of `tuned`.

    Raises:
      DivergedError: a loss is not finite.
    """
    objective = make_objective(run.config, run.mesh, len(rows.groups))
    # The last rows of a batch may be empty, so it can have as many as the mesh needs.
    unit = meshes.batch_shards(run.mesh) * objective.rows_per_unit
    count = -(-run.config.data.rows_per_pass // unit) * unit
    mine = meshes.local_rows(run.mesh, count)
    sums_of = jax.jit(functools.partial(evaluate_weights, objective, run.model))

    def place(batch: Batch) -> Batch:
        return meshes.to_global(batch, run.mesh, rows=count)

    models = {"base": run.frozen} if run.frozen else {}
    models |= {"tuned": run.weights}

    def measure(batch: Batch) -> dict[str, Sums]:
        return {name: sums_of(weights, batch) for name, weights in models.items()}

    # Both models in one pass, so that each batch is built once.
    measured = sum_batches(measure, map(place, rows.batches(count, mine)))
    found = {}
    for name in models:
        sums = [each[name] for each in measured]
        found[name] = add_up(sums, rows.groups, rows.text_bytes, objective.loss_unit)
        if not jax.numpy.isfinite(found[name].loss):
            raise DivergedError(
                f"the loss of the {name} model on {rows.origin} is {found[name].loss}: "
                "look at the weights, or choose another --step",
                run.step,
                None,
            )
    return found


def result_name(sha256: str, changes: Mapping[str, Any], step: int) -> str:
    """The name of a result: rows with `sha256`, read with `changes` of the config.

    Rows that are read in another way give other numbers, which are kept beside these.
    """
    digest = sha256
    if changes:
        read = json.dumps([sha256, changes], sort_keys=True)
        digest = hashlib.sha256(read.encode()).hexdigest()
    return f"{digest[:12]}-step-{step}"


def as_json(found: Evaluation) -> dict[str, Any]:
    """The results of one model, as a file of `evaluations/` has them."""
    in_nats = found.loss_unit == NATS_PER_TOKEN

    def values(loss: float, tokens: int, bits: float | None) -> dict[str, Any]:
        line: dict[str, Any] = {"loss": loss, "tokens": tokens}
        if in_nats:
            line["perplexity"] = perplexity(loss)
        if bits is not None:
            line["bits_per_byte"] = bits
        return line

    whole = values(found.loss, sum(found.tokens.values()), found.bits_per_byte)
    return {
        **whole,
        "loss_unit": found.loss_unit,
        "metrics": found.metrics,
        "by_group": {
            group: values(loss, found.tokens[group], found.bits_by_group.get(group))
            for group, loss in found.by_group.items()
        },
    }
