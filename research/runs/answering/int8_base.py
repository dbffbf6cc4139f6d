"""A base model in bytes, for decoding, and the loss that this costs."""

import dataclasses
import functools
import importlib.resources
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core.errors import look_up
from research.data.token_batch import Batch
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.answering.weight_forms import INT8, WEIGHTS
from research.runs.display_files import read_preview
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.tokenize.tokenizer import Tokenizer
from research.weights.contraction import materialize
from research.weights.quantized.int8_weights import as_int8, int8_specs

Params = dict[str, Any]
LENGTH, ROWS = 256, 4  # Ids of each text on which the loss is measured, and texts.


def with_int8(params: Params, model: Model, mesh: Mesh) -> Params:
    """`params` with every matrix of the layers, and the vocabulary head, in bytes.

    A table of embeddings that is not the head stays: of it, decoding reads few rows.
    One matrix at a time is in memory in both forms: `params` is left empty.
    """
    specs = model.specs
    paths = {path for path, spec in specs.items() if spec.stacked and spec.n_in}
    paths |= model.head(params).keys()

    def convert(path: str, weight: Any) -> Any:
        if path not in paths:
            return weight
        described = dataclasses.replace(int8_specs(specs[path]), rounds_inputs=True)
        where = meshes.shardings({path: described}, mesh)[path]

        def made(weight: Any) -> Any:
            codes = as_int8(materialize(weight), specs[path])
            return dataclasses.replace(codes, rounds_inputs=True)

        return jax.jit(made, out_shardings=where)(weight)

    return {path: convert(path, params.pop(path)) for path in sorted(params)}


def mean_loss(
    params: Params, model: Model, mesh: Mesh, texts: Sequence[Sequence[int]]
) -> float:
    """Mean cross entropy of each next id, in nats, over the starts of some texts.

    Args:
      params: of `model`, by path.
      model: the decoder on `mesh`.
      mesh: devices of the parameters.
      texts: ids; the first `LENGTH` of each of the first `ROWS` count.
    """
    parts = meshes.batch_shards(mesh)
    shape = (-(-min(ROWS, len(texts)) // parts) * parts, LENGTH)
    tokens, targets, filled = (np.zeros(shape, np.int32) for _ in range(3))
    for row, ids in enumerate(texts[:ROWS]):
        ids = ids[: LENGTH + 1]
        own = row, slice(len(ids) - 1)
        tokens[own], targets[own], filled[own] = ids[:-1], ids[1:], 1
    batch = Batch(
        tokens=tokens,
        targets=targets,
        weights=filled.astype(np.float32),
        segments=filled,
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        groups=np.zeros(shape, np.int32),
    )
    objective = CrossEntropy(1, 0, meshes.shards(mesh), mesh=mesh)
    evaluate = jax.jit(functools.partial(objective.evaluate, model))
    loss = evaluate(params, meshes.to_global(batch, mesh))["loss"]
    return float(loss.numerator[0] / loss.denominator[0])


def texts_to_measure(run: Path | None, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the first training rows of a run, or else of the embedded sample."""
    rows = read_preview(run) if run else []
    documents = [document for row in rows for document in row.documents]
    if documents:
        return [[i for span in x.spans for i in span.ids] for x in documents]
    sample = importlib.resources.files("research.data.instructions") / "sample"
    lines = (sample / "general_qa.jsonl").read_text(encoding="utf-8").splitlines()
    known = [json.loads(line) for line in lines]
    texts = [f"{row['instruction']}\n{row['response']}" for row in known]
    # As long as what is measured of each.
    parts = [texts[i::ROWS] for i in range(ROWS)]
    return [tokenizer.encode_texts(["\n\n".join(part)])[0] for part in parts]


def in_form(
    weights: str,
    params: Params,
    model: Model,
    mesh: Mesh,
    run: Path | None,
    tokenizer: Tokenizer,
) -> Params:
    """A base model's `params` in the form that `--weights` names.

    For `int8` a line in the log has the loss before and after; see `with_int8`.

    Args:
      weights: one of `WEIGHTS`.
      params: of `model` on `mesh`.
      model, mesh: see `mean_loss`.
      run, tokenizer: see `texts_to_measure`.

    Raises:
      UserError: there is no such form.
    """
    look_up(dict.fromkeys(WEIGHTS), weights, "--weights")
    if weights != INT8:
        return params
    texts = texts_to_measure(run, tokenizer)
    before = mean_loss(params, model, mesh, texts)
    changed = with_int8(params, model, mesh)
    after = mean_loss(changed, model, mesh, texts)
    logging.warning(
        "int8 weights: loss %.4f instead of %.4f (%+.4f nats per token, %+.2f%%) on "
        "%d tokens of %d texts",
        after,
        before,
        after - before,
        100 * (after / before - 1),
        sum(min(len(ids) - 1, LENGTH) for ids in texts[:ROWS]),
        min(len(texts), ROWS),
    )
    return changed
