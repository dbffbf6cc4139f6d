"""The base model and the tuned one on the same rows, with the code of training."""

import functools
from typing import Any

import jax

from research.core.errors import DivergedError
from research.data.metric_sums import NATS_PER_TOKEN
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.report.result_tables import perplexity
from research.runs.reopen import ReopenedRun
from research.tasks.task_protocol import EvaluationRows
from research.tasks.task_registry import make_objective
from research.train.metrics.evaluation import Evaluation, add_up, sum_batches
from research.train.step.train_step import evaluate_weights


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

    found = {}
    models = {"base": run.frozen} if run.frozen else {}
    for name, weights in (models | {"tuned": run.weights}).items():
        batches = map(place, rows.batches(count, mine))
        sums = sum_batches(functools.partial(sums_of, weights), batches)
        found[name] = add_up(sums, rows.groups, rows.text_bytes, objective.loss_unit)
        if not jax.numpy.isfinite(found[name].loss):
            raise DivergedError(
                f"the loss of the {name} model on {rows.origin} is {found[name].loss}: "
                "look at the weights, or choose another --step",
                run.step,
                None,
            )
    return found


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
