"""`README.md` of an exported model, in the form of the Hugging Face hub.

It names models, data and files, and no folder of the machine that trained.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from research.config.hub_pins import DEFAULT_ROWS
from research.core.hub_access import HubAddress, is_hub
from research.report.markdown_text import escaped, format_table
from research.report.result_tables import tabulate_losses
from research.runs.metrics_file import read_metrics
from research.runs.run_directory import RunDir

LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
```"""


def format_card(folder: RunDir, step: int, licence: str) -> str:
    """The card of the model of a run after `step` updates.

    `licence`: of the base model; empty where it is not known.
    """
    config = folder.config()
    data, base = config.data, config.model.init_from
    text = data.kind == "text"
    sources = [x.rpartition("=")[2] for x in config.text.sources] if text else []
    sources = sources or (data.path or DEFAULT_ROWS).split(",")
    tuned = "all parameters"
    if config.trainable == "lora":
        tuned = f"LoRA adapters of rank {config.lora.rank}, added to the weights"
    facts = {
        "base model": public_name(base) if base else f"random {config.model.preset}",
        "licence of the base model": licence or "not known",
        "data": ", ".join(map(public_name, sources)),
        "trained": tuned,
        "steps": f"{step:,} of {data.batch_size} rows of {data.seq_len} tokens",
        "learning rate": f"{config.optim.learning_rate:g}, {config.optim.schedule}",
        "seed": config.seed,
        "run": f"{folder.origin().get('run', 'without an id')}, step {step}",
    }
    lines = read_metrics(folder.path)
    measured = [x for x in lines if x["kind"] == "eval" and x["step"] <= step]
    head = {
        "base_model": HubAddress.parse(base, "model").name if is_hub(base) else None,
        "license": licence or None,
        "datasets": [HubAddress.parse(x, "dataset").name for x in sources if is_hub(x)],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    return _card(folder.path.absolute().name, head, facts, measured)


def _card(
    name: str,
    head: Mapping[str, Any],
    facts: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> str:
    # JSON is YAML, too.
    front = [f"{key}: {json.dumps(value)}" for key, value in head.items() if value]
    lines = ["---", *front, "---", "", f"# {escaped(name)}", ""]
    lines += [f"- {key}: {escaped(str(value))}" for key, value in facts.items()]
    if table := tabulate_losses(evaluations):
        lines += ["", "## Held-out losses"]
        lines += format_table(table)
    return "\n".join([*lines, "", "## Use", "", LOAD, ""])


def public_name(where: str) -> str:
    """An address as it is; of a path only the last part."""
    return where if "://" in where else PurePosixPath(where.strip()).name or where
