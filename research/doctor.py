"""A run proves itself before it starts.

Silent wrongness is what costs people weeks: masks that are all zero or all one,
adapters that reach nothing, an end token that is never trained. Each of these is
checked here on the real data and parameters, and the findings are shown as a table.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from research import trees
from research.base import Base
from research.config import Config
from research.data.chat import ChatFormat
from research.data.loader import Dataset
from research.errors import UserError
from research.step import Job, TrainState


@dataclasses.dataclass(frozen=True)
class Finding:
    """One row of the table. `remedy`: what to do when `ok` is false."""

    name: str
    value: str
    ok: bool = True
    remedy: str = ""


def examine_data(config: Config, dataset: Dataset, chat: ChatFormat) -> list[Finding]:
    """What the data says of itself, before any parameter is read."""
    train, held = dataset.train, dataset.held_out
    categories = ", ".join(
        f"{name or '(none)'} {n}" for name, n in dataset.rows.categories().items()
    )
    dropped = ", ".join(f"{n} {why}" for why, n in sorted(dataset.dropped.items()))
    dropped += f", {dataset.truncated} contexts truncated" if dataset.truncated else ""
    told = "".join(f"\n  {example}" for example in dataset.examples)
    share = train.trained_tokens / max(train.real_tokens, 1)
    stops = [
        int(document.ids[-1]) in chat.stop_ids and bool(document.trained[-1])
        for document in train.documents
    ]
    return [
        Finding("data", f"{dataset.rows.origin}, sha256 {dataset.rows.sha256[:12]}"),
        Finding("rows", f"{len(dataset.rows.records)}: {categories}"),
        Finding("left out", (dropped or "none") + told),
        Finding(
            "split",
            f"{len(train.documents)} documents train in {len(train.rows)} rows of "
            f"{train.seq_len} ({train.fill:.1%} full), {len(held.documents)} held out",
        ),
        Finding(
            "trained tokens",
            f"{train.trained_tokens:,} of {train.real_tokens:,} ({share:.1%})",
            ok=0.0 < share < 1.0,
            remedy="a share of 0 or 1 means the loss mask is broken: check "
            "config.data.template and the columns",
        ),
        Finding(
            "end token",
            f"trained in {sum(stops)} of {len(stops)} documents",
            ok=all(stops),
            remedy="an answer whose end is not trained never stops: check the "
            "tokenizer's eos token and config.data.template",
        ),
        _epochs(config, dataset),
    ]


def _epochs(config: Config, dataset: Dataset) -> Finding:
    rows = config.steps * config.data.batch_size
    return Finding(
        "epochs",
        f"{rows / len(dataset.train.rows):.2f}: {config.steps} steps of "
        f"{config.data.batch_size} rows",
    )


def examine_model(
    base: Base, job: Job, state: TrainState, frozen: dict[str, Any]
) -> list[Finding]:
    """What is trained and where it lies."""
    trained, kept = trees.count(state.params), trees.count(frozen)
    findings = [
        Finding("base model", f"{base.name}, sha256 {base.fingerprint[:12]}"),
        Finding(
            "tokenizer",
            f"{base.tokenizer.vocab_size} ids, sha256 "
            f"{base.tokenizer.fingerprint[:12]}",
        ),
        Finding(
            "parameters",
            f"{trained:,} trained ({trees.nbytes(state):,} bytes with optimizer), "
            f"{kept:,} frozen ({trees.nbytes(frozen):,} bytes)",
            ok=trained > 0,
            remedy="nothing is trained: check config.lora.targets",
        ),
        Finding(
            "mesh",
            ", ".join(f"{axis}={n}" for axis, n in job.mesh.shape.items())
            + f" on {jax.devices()[0].device_kind}",
        ),
    ]
    if frozen:
        findings[2:2] = _examine_adapters(state.params, frozen)
    return findings


def _examine_adapters(
    adapters: dict[str, Any], frozen: dict[str, Any]
) -> list[Finding]:
    paths = "\n".join(
        f"  {path} {tuple(frozen[path].shape)} rank {factor['a'].shape[-1]}"
        for path, factor in adapters.items()
    )
    matrices = sum(
        frozen[path].shape[0] if path.startswith("layers.") else 1 for path in adapters
    )
    nonzero = [
        path for path, factor in adapters.items() if bool(jnp.any(factor["b"] != 0))
    ]
    return [
        Finding(
            "lora targets", f"{matrices} matrices under {len(adapters)} paths\n{paths}"
        ),
        Finding(
            "lora at step 0",
            "every B is zero: adapted model = base model",
            ok=not nonzero,
            remedy=f"adapters do not start at the base model: {', '.join(nonzero)}",
        ),
    ]


def show(console: Console, findings: Sequence[Finding]) -> None:
    table = Table(title="doctor", show_header=False, title_justify="left")
    for finding in findings:
        mark = Text("ok", "green") if finding.ok else Text("FAILED", "bold red")
        table.add_row(mark, finding.name, Text(finding.value))
    console.print(table)


def show_first_row(console: Console, dataset: Dataset, base: Base) -> None:
    """The first packed row as text, what is trained in green between brackets."""
    text = Text()
    for index in dataset.train.rows[0]:
        document = dataset.train.documents[index]
        edges = np.flatnonzero(np.diff(document.trained)) + 1
        for ids, mask in zip(
            np.split(document.ids, edges),
            np.split(document.trained, edges),
            strict=True,
        ):
            words = base.tokenizer.decode(ids.tolist(), skip_control=False)
            if mask[0]:
                text.append("[[" + words + "]]", "bold green")
            else:
                text.append(words, "dim")
        text.append("\n" + "-" * 8 + "\n", "dim")
    console.print(Text("first packed row, [[trained]] tokens marked:", "bold"))
    console.print(text)


def require_healthy(findings: Sequence[Finding]) -> None:
    """Raises UserError with the remedies of all failed findings."""
    failed = [finding for finding in findings if not finding.ok]
    if failed:
        raise UserError(
            "the doctor stops this run:\n"
            + "\n".join(f"  {f.name}: {f.value}\n    {f.remedy}" for f in failed)
        )
