"""A run proves itself before it starts.

Silent wrongness is what costs people weeks: masks that are all zero or all one,
adapters that reach nothing, an end token that is never trained. Each of these is
checked here on the real data and parameters, and the findings are shown as a table.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from research.config.run_config import Config
from research.core.errors import UserError
from research.data.token_batch import Batch
from research.formats.base_model import Base
from research.parallel import mesh as meshes
from research.train.step.train_step import StepDefinition, TrainState
from research.weights import parameter_paths

TEST_ROW = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table. `remedy`: what to do when `ok` is false."""

    name: str
    value: str
    ok: bool = True
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class MaskCount:
    """What the built batches say of the loss mask, in positions and documents."""

    real: int
    trained: int
    documents: int
    ends: int


def count_mask(batches: Iterable[Batch], stop_ids: frozenset[int]) -> MaskCount:
    """Counts over the very batches that training will see, not over their sources."""
    real = trained = documents = ends = 0
    stops = list(stop_ids)
    for batch in batches:
        following = np.pad(batch.segments[:, 1:], ((0, 0), (0, 1)))
        last = (batch.segments > 0) & (batch.segments != following)
        stopped = np.isin(batch.targets, stops) & (batch.weights > 0)
        real += int((batch.segments > 0).sum())
        trained += int((batch.weights > 0).sum())
        documents += int(last.sum())
        ends += int((last & stopped).sum())
    return MaskCount(real, trained, documents, ends)


def epochs(config: Config, rows: int) -> Finding:
    """How often the run passes over `rows` training rows."""
    drawn = config.steps * config.data.batch_size
    return Finding(
        "epochs",
        f"{drawn / rows:.2f}: {config.steps} steps of {config.data.batch_size} rows",
    )


def examine_model(
    base: Base, definition: StepDefinition, state: TrainState, frozen: dict[str, Any]
) -> list[Finding]:
    """What is trained and where it lies."""
    trained, kept = parameter_paths.count(state.params), parameter_paths.count(frozen)
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
            f"{kept:,} frozen ({parameter_paths.nbytes(frozen):,} bytes)",
            ok=trained > 0,
            remedy="nothing is trained: check config.lora.targets",
        ),
        Finding(
            "mesh",
            ", ".join(f"{axis}={n}" for axis, n in definition.mesh.shape.items())
            + f" on {jax.devices()[0].device_kind}",
        ),
    ]
    if frozen:
        findings[2:2] = _examine_adapters(definition, state, frozen)
    return findings


def _examine_adapters(
    definition: StepDefinition, state: TrainState, frozen: dict[str, Any]
) -> list[Finding]:
    paths = "\n".join(
        f"  {path} {tuple(frozen[path].shape)} rank {factor['a'].shape[-1]}"
        for path, factor in state.params.items()
    )
    matrices = sum(
        math.prod(spec.shape[: spec.stacked])
        for spec in (definition.model.specs[path] for path in state.params)
    )
    specs = sum(len(factor) for factor in definition.trainable.specs.values())
    leaves = len(jax.tree.leaves(state.params))
    differing, distance = _compare_outputs(definition, state.params, frozen)
    rounding = float(jnp.finfo(definition.model.options.dtype).eps) ** 0.5
    return [
        Finding(
            "lora targets",
            f"{matrices} matrices under {len(state.params)} paths\n{paths}",
        ),
        Finding(
            "lora at step 0",
            f"adapters change {differing:,} outputs of a test row, and the base model "
            f"without them is {distance:.1e} away",
            ok=differing == 0 and distance < rounding,
            remedy="adapters must start as an exact no-op: B is not zero, or they lie "
            "over other weights than the base model's",
        ),
        Finding(
            "frozen weights",
            f"in no optimizer state: {leaves} trained arrays, {specs} of adapters",
            ok=leaves == specs,
            remedy="the trained state holds more than adapters: this would be full "
            "fine-tuning under the name of LoRA",
        ),
    ]


def _compare_outputs(
    definition: StepDefinition, params: Any, frozen: dict[str, Any]
) -> tuple[int, float]:
    """Runs one row of arbitrary ids with the adapters, with zeros, and without.

    Returns:
      How many outputs differ in any bit from those of adapters that are all zero,
      which the very same program computes; and how far they are from the base model,
      as a share of its norm. That one is another program, whose products the compiler
      may round in another order: it cannot be held to bits on every processor.
    """
    tokens = (
        np.arange(TEST_ROW, dtype=np.int32)[None] % definition.model.architecture.vocab
    )
    tokens = np.repeat(tokens, meshes.batch_shards(definition.mesh), axis=0)
    segments = np.ones_like(tokens)

    @jax.jit
    def outputs(weights: Any) -> jax.Array:
        return definition.model.hidden(weights, tokens, tokens, segments)

    def adapted(adapters: Any) -> jax.Array:
        return outputs(definition.trainable.forward(adapters, frozen, None))

    found, base = adapted(params), outputs(frozen)
    differing = int(jnp.sum(found != adapted(jax.tree.map(jnp.zeros_like, params))))
    wide = base.astype(jnp.float32)
    norm = jnp.linalg.norm(found.astype(jnp.float32) - wide) / jnp.linalg.norm(wide)
    return differing, float(norm)


def show(console: Console, findings: Sequence[Finding]) -> None:
    table = Table(title="doctor", show_header=False, title_justify="left")
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("FAILED", "bold red")
        table.add_row(mark, finding.name, Text(finding.value))
    console.print(table)


def require_healthy(findings: Sequence[Finding]) -> None:
    """Raises UserError with the remedies of all failed findings."""
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        raise UserError(
            "the doctor stops this run:\n"
            + "\n".join(f"  {f.name}: {f.value}\n    {f.remedy}" for f in failed)
        )
