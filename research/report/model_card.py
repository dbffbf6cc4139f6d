"""`README.md` of an exported model, in the form of the Hugging Face hub.

It names models, data and files, and no folder of the machine that trained.
"""

import ast
import contextlib
import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from research.config.choices import KEEP, ROW_SOURCES
from research.config.knob_groups import ModelConfig
from research.config.knobs import flat
from research.core.hub_access import HubAddress, is_hub
from research.core.local_paths import public_name
from research.core.visible_text import counted
from research.formats.export_format import NOTHING, ExportedAdapter, ExportedModel
from research.report.markdown_text import escaped, format_table
from research.report.result_tables import tabulate_losses
from research.runs.display_files import read_system
from research.runs.metrics_file import read_metrics
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History


def format_card(
    folder: RunDir,
    step: int,
    licence: str,
    usage: str,
    command: Sequence[str] = (),
    library: str = "transformers",
    merged: bool = True,
    adapters: Mapping[str, ExportedAdapter] = NOTHING,
    frozen: str = "",
) -> str:
    """The card of the model of a run after `step` updates.

    Args:
      folder: of the run.
      step: the updates.
      licence: of the base model; empty where it is not known.
      usage: Markdown that says how the files are loaded.
      command: flags of `research.export` that write the same again.
      library: that loads the files.
      merged: whether adapters are added to the weights; or else they are alone.
      adapters: of the model, by path.
      frozen: what the weights under them are, if not as in training.
    """
    changes = History(folder.history, PhaseTimer()).accepted_by_step
    newest = flat(folder.config())
    knobs = _knobs_at(step, newest, changes)
    base = knobs["model.init_from"]
    sources: dict[str, int] = {}  # The first update with each.
    for begun in (0, *(x for x in sorted(changes) if x < step)):
        for source in _sources(_knobs_at(begun + 1, newest, changes)):
            sources.setdefault(source, begun + 1)
    data = [
        public_name(x) + f" (from update {n} on)" * (n > 1) for x, n in sources.items()
    ] or [f"read by the task {knobs['data.kind']!r}"]
    facts = {
        "base model": public_name(base) if base else f"random {knobs['model.preset']}",
        "licence of the base model": licence or "not known",
        "data": ", ".join(data),
        "trained": _trained(knobs, merged, adapters.values()),
        "steps": f"{step:,} of {counted(knobs['data.batch_size'], 'row')} of "
        f"{counted(knobs['data.seq_len'], 'token')}",
        "learning rate": f"{knobs['optim.learning_rate']:g}, {knobs['optim.schedule']}",
        "seed": knobs["seed"],
        "run": f"{folder.origin().get('run', 'without an id')}, step {step}",
    }
    facts["system text"] = _system_fact(read_system(folder.path, knobs["data.system"]))
    facts["frozen weights"] = frozen or _frozen_as_trained(knobs)
    facts["changed in training"] = _changed_facts(changes, step)
    facts = {name: fact for name, fact in facts.items() if fact != ""}
    known = read_metrics(folder.path)
    measured = [x for x in known if x["kind"] == "eval" and x["step"] <= step]
    parts = {
        "Use": usage,
        "Licence": "The licence of the base model holds for this model, too.",
        "Made by": _command(folder, step, command),
    }
    head = _front(base, licence, sources, library)
    return _card(folder.path.absolute().name, head, facts, measured, parts)


def format_adapter_card(
    name: str,
    base: str,
    licence: str,
    usage: str,
    exported: ExportedModel,
    command: Sequence[str],
    library: str,
    merged: bool,
) -> str:
    """The card of a model whose adapter belongs to no run.

    Args:
      name: of the adapter, as the command had it.
      base: the base model, as `config.model.init_from` names it.
      exported: the model.
      licence, usage, command, library, merged: see `format_card`.
    """
    knobs = {"lora.kind": exported.adapter_kind, "lora.full": sorted(exported.full)}
    facts = {
        "adapter": public_name(name),
        "base model": public_name(base),
        "licence of the base model": licence or "not known",
        "trained": _trained(knobs, merged, exported.adapters.values()),
        "data": "not known, as the adapter does not say",
    }
    again = shlex.join([f"--run={public_name(name)}", *command])
    parts = {
        "Use": usage,
        "Licence": "The licences of the base model and of the adapter hold for this "
        "model, too.",
        "Made by": f"```\npython -m research.export {again}\n```",
    }
    return _card(
        public_name(name), _front(base, licence, (), library), facts, (), parts
    )


def _trained(
    knobs: Mapping[str, Any], merged: bool, adapters: Collection[ExportedAdapter]
) -> str:
    if not adapters:
        return "all parameters"
    kind = knobs["lora.kind"]
    kind = "LoRA adapters" if kind == "lora" else f"adapters of the kind {kind!r}"
    place = "added to the weights" if merged else "without the base model"
    whole = knobs.get("lora.full")
    beside = f" and whole parameters ({', '.join(whole)})" if whole else ""
    rank = _range(x.rank for x in adapters)
    alpha = _range(x.alpha for x in adapters)
    return f"{kind} of rank {rank} and alpha {alpha}{beside}, {place}"


def _system_fact(system: str) -> str:
    if not system:
        return ""
    return (
        f"{json.dumps(system, ensure_ascii=False)}, which the chat template writes "
        "into conversations without a system message"
    )


def _frozen_as_trained(knobs: Mapping[str, Any]) -> str:
    quantize, others = (knobs[f"model.{x}"] for x in ("quantize", "quantize_paths"))
    if quantize == "none":
        return ""
    codes = "the codes of the base model's file"
    if quantize != KEEP:
        form = ModelConfig(quantize=quantize, quantize_paths=tuple(others)).frozen_form
        codes = f"{form} codes of the base model"
    return f"what {codes} stand for, over which the adapters were trained"


def _range(values: Iterable[float]) -> str:
    """The smallest and the largest of `values`, or the one that all are."""
    ordered = sorted({*values})
    return " to ".join(f"{x:g}" for x in dict.fromkeys((ordered[0], ordered[-1])))


def _front(
    base: str, licence: str, sources: Iterable[str], library: str
) -> dict[str, Any]:
    """The fields that the hub reads."""
    return {
        "base_model": HubAddress.parse(base, "model").name if is_hub(base) else None,
        "license": licence or None,
        "datasets": [HubAddress.parse(x, "dataset").name for x in sources if is_hub(x)],
        "library_name": library,
        "pipeline_tag": "text-generation",
    }


def _command(folder: RunDir, step: int, flags: Sequence[str]) -> str:
    name = folder.path.absolute().name
    again = shlex.join([f"--run={name}", f"--step={step}", *flags])
    return f"```\npython -m research.export {again}\n```"


def _knobs_at(
    update: int, newest: Mapping[str, Any], changes: Mapping[int, Sequence[str]]
) -> dict[str, Any]:
    """The knobs by name with which the optimizer made `update`, counted from 1.

    `newest` are those of now, and `changes` the accepted ones by the updates before.
    """
    knobs = dict(newest)
    for made in sorted(changes, reverse=True):
        for line in reversed(changes[made]) if made >= update else ():
            name, _, change = line.partition(": ")
            if name in knobs:
                knobs[name] = _old_value(change)
    return knobs


def _old_value(change: str) -> Any:
    """The value before the arrow in `old -> new`; a text may hold an arrow, too."""
    parts = change.split(" -> ")
    for count in range(1, len(parts)):
        with contextlib.suppress(SyntaxError, ValueError):
            return ast.literal_eval(" -> ".join(parts[:count]))
    return change


def _sources(knobs: Mapping[str, Any]) -> list[str]:
    """Files and datasets that the knobs name; none where only the task knows them."""
    kind, path, texts = (knobs[x] for x in ("data.kind", "data.path", "text.sources"))
    if kind == "text" or (kind != "instructions" and texts):
        return [x.rpartition("=")[2] for x in texts]
    if kind == "instructions" and not path:
        return [ROW_SOURCES[knobs["data.source"]]]
    return [x.strip() for x in path.split(",") if x]


def _changed_facts(changes: Mapping[int, Sequence[str]], step: int) -> str:
    """The accepted differences before the last update, without paths and checksums."""
    return "; ".join(
        f"{line} (after update {made})"
        for made in sorted(changes)
        for line in changes[made]
        if 0 < made < step and re.match(r"(data|optim|lora)\.\w+: [^/]*$|seed:", line)
    )


def _card(
    name: str,
    head: Mapping[str, Any],
    facts: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    parts: Mapping[str, str],
) -> str:
    # JSON is YAML, too.
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value]
    lines = ["---", *front, "---", "", f"# {escaped(name)}", ""]
    lines += [f"- {key}: {escaped(str(value))}" for key, value in facts.items()]
    if table := tabulate_losses(evaluations):
        lines += ["", "## Held-out losses"]
        lines += format_table(table)
    for title, text in parts.items():
        lines += ["", f"## {title}", "", text]
    return "\n".join([*lines, ""])
