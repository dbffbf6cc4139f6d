"""A whole model as one file of llama.cpp, with its tokenizer and chat template."""

import dataclasses
import functools
import logging
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.atomic_files import write_whole
from research.formats.export_format import (
    ExportedModel,
    ExportOptions,
    WrittenModel,
)
from research.formats.gguf.gguf_file import FACTS, GGUFFile
from research.formats.gguf.gguf_writer import PlannedTensor, write_gguf
from research.formats.gguf.metadata_fields import write_metadata
from research.formats.gguf.modelfile import format_modelfile
from research.formats.gguf.rope_metadata import rope_tables
from research.formats.gguf.tensor_types import TYPES
from research.formats.huggingface.huggingface_export import fetch
from research.formats.written_tensors import whole_model
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.tokenize.gguf.gguf_tokenizer import ENDS, KEY, from_gguf_metadata
from research.tokenize.gguf.written_tokenizer import tokenizer_metadata

FILE = "model.gguf"
USAGE = """```sh
llama-cli -m THIS_FOLDER/model.gguf
ollama create my-model -f THIS_FOLDER/Modelfile
```"""


class GGUFModelFormat:
    """`model.gguf`: the adapters are added in, and matrices may be codes."""

    name = "gguf"
    library, merges = "gguf", True

    def check(self, exported: ExportedModel, options: ExportOptions) -> None:
        """See `ExportFormat`; what llama.cpp cannot compute or cut is a UserError."""
        _metadata(exported)

    def write(
        self, exported: ExportedModel, folder: Path, options: ExportOptions
    ) -> None:
        architecture = exported.model.architecture
        metadata = _metadata(exported)
        if options.quant == "q4_0":
            logging.warning(
                "export: Q4_0 keeps 4 bits of each number, and answers get worse; "
                "compare with --quant=q8_0 before you use it"
            )
        tables = [
            PlannedTensor(name, table.shape, lambda table=table: table)
            for name, table in rope_tables(architecture).items()
        ]
        tensors = [*tables, *_plan(exported)]
        write_gguf(folder / FILE, metadata, tensors, TYPES[options.numbers])
        if jax.process_index() == 0:
            system = exported.facts.get("system_prompt", "")
            text = format_modelfile(FILE, exported.tokenizer, system)
            write_whole(folder / "Modelfile", text)

    def read_back(self, folder: Path, exported: ExportedModel) -> WrittenModel:
        file = GGUFFile(folder / FILE)
        architecture = file.read_architecture()
        tokenizer = from_gguf_metadata(file.metadata, str(folder / FILE))
        whole = whole_model(file, architecture, tokenizer, for_llama_cpp=True)
        # The reader finds some by their names where the file has no ids.
        keys = {f"{KEY}{x}_token_id" for x in ENDS} & file.metadata.keys()
        ends = tuple(file.metadata[x] for x in keys)
        return dataclasses.replace(whole, ends={FILE: ends})

    def usage(self, exported: ExportedModel, options: ExportOptions) -> str:
        return USAGE


FORMAT = GGUFModelFormat()


def general_metadata(exported: ExportedModel, kind: str) -> dict[str, Any]:
    """The keys `general.*` but the architecture, and what travels inside.

    `kind` is `model` or `adapter`.
    """
    name = exported.facts.get("base_model", exported.model.architecture.family)
    metadata = {
        "general.type": kind,
        # llama.cpp takes a file whose name holds phi-3 for that very model's.
        "general.name": re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE),
        "general.license": exported.base.licence if exported.base else "",
    }
    return metadata | {f"{FACTS}{key}": x for key, x in exported.facts.items()}


def _metadata(exported: ExportedModel) -> dict[str, Any]:
    architecture = exported.model.architecture
    return {
        **write_metadata(architecture),
        **tokenizer_metadata(exported.tokenizer, architecture.vocab),
        **general_metadata(exported, "model"),
    }


def _plan(exported: ExportedModel) -> list[PlannedTensor]:
    specs = exported.model.specs

    def make(stored: StoredTensor, index: tuple[int, ...]) -> np.ndarray:
        values = [fetch(exported.weights[path], index) for path in stored.paths]
        return stored.pack(values, specs)

    return [
        PlannedTensor(name, stored.shape(specs), functools.partial(make, stored, index))
        for stored in used(family_of(exported.model.architecture).gguf_tensors, specs)
        for name, index in stored.names(specs)
    ]
