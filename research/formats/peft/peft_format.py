"""The export format `peft`: the adapters of a run as a folder that PEFT reads."""

import collections
import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.atomic_files import write_whole
from research.core.errors import ParityError, UserError
from research.core.hub_access import HubAddress, is_hub
from research.formats.export_format import ExportedModel, ExportOptions, WrittenModel
from research.formats.fused_factors import Pair, update_of, with_lengths
from research.formats.huggingface.huggingface_export import fetch
from research.formats.huggingface.safetensors_writer import SafetensorsWriter
from research.formats.peft.adapter_config import CONFIG, TENSORS
from research.formats.peft.adapter_folder import AdapterFolder
from research.formats.peft.lora_modules import lora_modules
from research.formats.peft.peft_export import adapted_modules, plan_adapter
from research.formats.peft.whole_parameters import WholePlan, plan_whole
from research.formats.proof.stored_numbers import StoredNumbers
from research.models.families.family_registry import family_of
from research.tokenize.tokenizer_training import save_tokenizer

USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

# Trained on {name}
base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```"""

TIED = """

The embeddings are the vocabulary head, too, and the adapter is written for both ends:
`merge_and_unload` of PEFT 0.21 adds it to their one table twice. Use it unmerged, or
export the merged model with `--format=hf`."""


class PeftFormat:
    """`adapter_config.json`, `adapter_model.safetensors`, and the tokenizer."""

    name = "peft"
    library, merges = "peft", False

    def check(self, exported: ExportedModel, options: ExportOptions) -> None:
        """See `ExportFormat`; what PEFT has no place for is a UserError."""
        if exported.adapter_kind == "dora":
            _check_lengths(exported)
        elif exported.adapter_kind != "lora":
            raise UserError(
                "--format=peft writes the adapters of LoRA, and this run has "
                f"{exported.adapter_kind or 'none, as it trained all its parameters'}: "
                "use --format=hf"
            )
        if not exported.adapters:
            raise UserError(
                "--format=peft writes whole parameters beside adapters, and this run "
                "has no adapters: use --format=hf"
            )
        modules = adapted_modules(
            exported.model.architecture,
            exported.model.specs,
            exported.adapters,
            _beginning(exported),
        )
        _plan_whole(exported, {x.name for x in modules if not x.parameter})

    def write(
        self, exported: ExportedModel, folder: Path, options: ExportOptions
    ) -> None:
        self.check(exported, options)

        def pair(path: str, index: tuple[int, ...]) -> Pair:
            factors = exported.adapters[path].factors
            return fetch(factors["a"], index), fetch(factors["b"], index)

        def lengths(path: str, index: tuple[int, ...]) -> np.ndarray:
            return fetch(exported.adapters[path].factors["magnitude"], index)

        model = exported.model
        scales = {p: x.alpha / x.rank for p, x in exported.adapters.items()}
        shape, beginning = (model.architecture, model.specs), _beginning(exported)
        dora = lengths if exported.adapter_kind == "dora" else None
        plan = plan_adapter(*shape, scales, pair, beginning, dora)
        whole = _plan_whole(exported, plan.config["target_modules"])
        tensors = itertools.chain(plan.tensors(), whole.tensors())
        if jax.process_index() > 0:
            collections.deque(tensors, maxlen=0)
            return
        shapes = plan.shapes | whole.shapes
        file = folder / TENSORS
        with SafetensorsWriter(file, shapes, options.dtype, exported.facts) as writer:
            for name, tensor in tensors:
                writer.add(name, tensor)
        config = _base(exported) | plan.config | whole.fields
        text = json.dumps(config, indent=2)
        write_whole(folder / CONFIG, text)
        save_tokenizer(exported.tokenizer, folder)

    def read_back(self, folder: Path, exported: ExportedModel) -> WrittenModel:
        model = exported.model
        adapter = AdapterFolder(str(folder), model.architecture, model.specs)
        _require_base(folder, _base(exported))

        def read(path: str, index: tuple[int, ...]) -> np.ndarray:
            if path in adapter.whole.trained:
                return adapter.whole.layer(path, index)
            pair, spec = adapter.layer(path, index), model.specs[path]
            update = update_of(pair, spec, adapter.scales[path])
            lengths = adapter.lengths(path, index)
            if lengths is None:
                return update
            base = np.float32(fetch(exported.base_weights[path], index))
            return with_lengths(base + update, lengths) - base

        held = dict.fromkeys(adapter.ranks, StoredNumbers(adapter.kind, is_update=True))
        for path in adapter.whole.trained:
            held[path] = StoredNumbers(adapter.kind, shift=adapter.whole.shift(path))
        return WrittenModel(model.architecture, None, read, held, adapter.facts)

    def usage(self, exported: ExportedModel, options: ExportOptions) -> str:
        name = exported.facts.get("base_model", "")
        text = USAGE.format(name=name, base=_argument(name, _base(exported)))
        tied = exported.model.architecture.tied_head
        changed = "embedding.table" in {*exported.adapters, *exported.full}
        return text + TIED if tied and changed else text


FORMAT = PeftFormat()


def _plan_whole(exported: ExportedModel, adapted: Collection[str]) -> WholePlan:
    """The parameters that were trained whole, beside modules that are `adapted`."""
    return plan_whole(
        exported.model.architecture,
        exported.model.specs,
        exported.full,
        adapted,
        lambda path, index: fetch(exported.weights[path], index),
        _beginning(exported),
    )


def _check_lengths(exported: ExportedModel) -> None:
    """Raises UserError: PEFT has no DoRA of these matrices."""
    how, model, paths = "use --format=hf", exported.model, exported.adapters.keys()
    if model.architecture.tied_head and "embedding.table" in paths:
        raise UserError(
            "PEFT has no DoRA of embeddings that are the vocabulary head, too: " + how
        )
    for module in lora_modules(model.architecture, model.specs):
        own = paths & {*module.stored.paths}
        if own and (module.has_no_pattern or module.parameter):
            raise UserError(f"PEFT has no DoRA of {min(own)}, in {module.name}: {how}")
        if own and (others := sorted({*module.stored.paths} - own)):
            raise UserError(
                f"PEFT has one DoRA for {module.name}, and {', '.join(others)} in it "
                f"has no adapter: {how}"
            )


def _beginning(exported: ExportedModel) -> str:
    """The beginning of the names in the files of the base; "" where it has none."""
    family = family_of(exported.model.architecture)
    if exported.base is None or exported.base.tensors is None:
        return ""
    names = [
        stored.name
        for stored in exported.base.tensors.layout(family)
        if "embedding.table" in stored.paths
    ]
    fitting = [x for x in family.beginnings if names[0].startswith(x)]
    return max(fitting, key=len, default="")


def _base(exported: ExportedModel) -> dict[str, Any]:
    """The fields that name the base model, where other tools can find it by a name."""
    name = exported.facts.get("base_model", "")
    if not is_hub(name):
        return {}
    address = HubAddress.parse(name, "model")
    fields = {"base_model_name_or_path": address.name, "revision": address.revision}
    return {name: value for name, value in fields.items() if value}


def _require_base(folder: Path, wanted: dict[str, Any]) -> None:
    """Raises ParityError: the folder names another base model than `wanted`."""
    found = json.loads((folder / CONFIG).read_text())
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ParityError(
                f"{CONFIG} has {found.get(name)!r} as {name}, and the run began with "
                f"{value!r}: please report this, with the command"
            )


def _argument(name: str, fields: dict[str, Any]) -> str:
    """How transformers gets the base model `name`; of a run it needs an export."""
    if fields:
        known = json.dumps(fields["base_model_name_or_path"])
        at = fields.get("revision")
        return f"{known}, revision={json.dumps(at)}" if at else known
    of_gguf = f", gguf_file={json.dumps(name.rpartition('/')[2])}"
    return f'"FOLDER_OF_THE_BASE"{of_gguf if name.endswith(".gguf") else ""}'
