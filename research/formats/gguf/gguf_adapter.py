"""LoRA factors as a file of llama.cpp, which it adds to the base model's GGUF file.

llama.cpp adds `alpha / rank` times the product of a tensor's two factors, with one
`alpha` for the file and the rank of the tensor's own factors. Scales that differ from
that are multiplied into B.
"""

import functools
import shlex
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from research.core.atomic_files import write_whole
from research.core.errors import ParityError, UserError
from research.formats.export_format import (
    ExportedAdapter,
    ExportedModel,
    ExportOptions,
    WrittenModel,
)
from research.formats.fused_factors import Pair, factor_shapes, join_factors
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.gguf.gguf_model import general_metadata
from research.formats.gguf.gguf_writer import PlannedTensor, write_gguf
from research.formats.gguf.metadata_fields import write_metadata
from research.formats.gguf.modelfile import format_modelfile
from research.formats.huggingface.huggingface_export import fetch
from research.formats.proof.file_layout import FileLayout
from research.formats.proof.stored_numbers import StoredNumbers
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.weights.parameter_spec import Spec

FILE, BASE, TEMPLATE = "adapter.gguf", "base.gguf", "chat_template.jinja"
ALPHA = "adapter.lora.alpha"
EMBEDDING, PLACES = "embedding.table", "position_embedding.table"
USAGE = """```sh
llama-cli -m base.gguf --lora THIS_FOLDER/adapter.gguf{template}
```

base.gguf is the base model, {base}:

```sh
{make}
```

The Modelfile is for Ollama: it looks for base.gguf beside itself.
"""
# convert_hf_to_gguf.py lies in the repository of llama.cpp.
CONVERT = (
    "python llama.cpp/convert_hf_to_gguf.py FOLDER_OF_THE_BASE --outfile base.gguf"
)
# llama.cpp would take the template of the base model's file.
WITH_TEMPLATE = f" \\\n  --jinja --chat-template-file THIS_FOLDER/{TEMPLATE}"


class GGUFAdapterFormat:
    """`adapter.gguf`: the factors alone, in float32."""

    name = "gguf-adapter"
    library, merges = "gguf", False

    def check(self, exported: ExportedModel, options: ExportOptions) -> None:
        """See `ExportFormat`; what llama.cpp cannot adapt is a UserError."""
        _check(exported)
        write_metadata(exported.model.architecture)

    def write(
        self, exported: ExportedModel, folder: Path, options: ExportOptions
    ) -> None:
        self.check(exported, options)
        architecture = write_metadata(exported.model.architecture)
        alpha = next(iter(exported.adapters.values())).alpha
        metadata = {
            "general.architecture": architecture["general.architecture"],
            **general_metadata(exported, "adapter"),
            "adapter.type": "lora",
            ALPHA: float(alpha),
        }
        write_gguf(folder / FILE, metadata, _plan(exported, alpha), "F32")
        if jax.process_index() == 0:
            system = exported.facts.get("system_prompt", "")
            text = format_modelfile(BASE, exported.tokenizer, system, FILE)
            write_whole(folder / "Modelfile", text)
            if exported.tokenizer.chat_template:
                write_whole(folder / TEMPLATE, exported.tokenizer.chat_template)

    def read_back(self, folder: Path, exported: ExportedModel) -> WrittenModel:
        file = GGUFFile(folder / FILE, "adapter")
        _require_architecture(file, exported.model.architecture)
        alpha, specs = file.metadata[ALPHA], exported.model.specs
        family, names = family_of(exported.model.architecture), {*file.shapes()}
        tensors = {
            path: stored
            for stored in used(family.gguf_tensors, specs)
            for path in stored.paths
            if any(f"{name}.lora_a" in names for name, _ in stored.names(specs))
        }

        def read(path: str, index: tuple[int, ...]) -> np.ndarray:
            stored = tensors[path]
            name = stored.name.format(*index)
            if not {f"{name}.lora_a", f"{name}.lora_b"} <= names:
                return np.zeros(specs[path].shape[len(index) :], np.float32)
            return stored.unpack(path, _update(file, name, alpha), specs)

        held = dict.fromkeys(tensors, StoredNumbers("float32", is_update=True))
        architecture = exported.model.architecture
        layout = FileLayout(
            architecture,
            {path: stored.name for path, stored in tensors.items()},
            for_llama_cpp=True,
            read_rows=file.read_rows,
            factors=alpha,
            stored=frozenset(names),
        )
        return WrittenModel(architecture, None, read, held, file.facts(), layout=layout)

    def usage(self, exported: ExportedModel, options: ExportOptions) -> str:
        chats = exported.tokenizer.chat_template
        name = exported.facts.get("base_model", "")
        of_gguf, file = name.endswith(".gguf"), name.rpartition("/")[2]
        return USAGE.format(
            template=WITH_TEMPLATE if chats else "",
            base=name or "that training began with",
            make=f"cp FOLDER_OF_THE_BASE/{shlex.quote(file)} base.gguf"
            if of_gguf
            else CONVERT,
        )


FORMAT = GGUFAdapterFormat()


def _require_architecture(file: GGUFFile, architecture: Architecture) -> None:
    """Raises ParityError: llama.cpp would not add the adapter to this model."""
    found = file.metadata.get("general.architecture")
    if found != (needed := family_of(architecture).gguf_architecture):
        raise ParityError(
            f"the written adapter is for the architecture {found!r}, and the base "
            f"model is {needed!r}: please report this, with the command"
        )


def _check(exported: ExportedModel) -> None:
    """Raises UserError: llama.cpp would skip an adapter, or stop at it."""
    how = "; export the merged model with --format=gguf instead"
    if not exported.adapters and not exported.full:
        raise UserError(
            "the run trained all parameters, so there is no adapter to write: export "
            "the model with --format=gguf"
        )
    if exported.adapter_kind != "lora":
        raise UserError(
            f"llama.cpp has no adapters of kind {exported.adapter_kind!r}{how}"
        )
    if exported.full:
        raise UserError(
            "an adapter of llama.cpp holds no whole parameters, and this run trained "
            f"{min(exported.full)} whole (config.lora.full){how}"
        )
    if PLACES in exported.adapters:
        raise UserError(f"llama.cpp skips an adapter of {PLACES}{how}")
    if EMBEDDING in exported.adapters and exported.model.architecture.tied_head:
        raise UserError(
            f"llama.cpp cannot adapt embeddings that are the vocabulary head, too{how}"
        )


def _adapted(exported: ExportedModel) -> list[StoredTensor]:
    tensors = used(
        family_of(exported.model.architecture).gguf_tensors, exported.model.specs
    )
    return [stored for stored in tensors if exported.adapters.keys() & {*stored.paths}]


def _plan(exported: ExportedModel, alpha: float) -> list[PlannedTensor]:
    specs, planned = exported.model.specs, []

    def make(stored: StoredTensor, index: tuple[int, ...], which: int) -> np.ndarray:
        own = {p: exported.adapters[p] for p in stored.paths if p in exported.adapters}
        factors = {
            path: tuple(fetch(adapter.factors[x], index) for x in ("a", "b"))
            for path, adapter in own.items()
        }
        scales = {path: adapter.alpha / adapter.rank for path, adapter in own.items()}
        return packed_factors(stored, factors, scales, alpha, specs)[which]

    for stored in _adapted(exported):
        shapes = _shapes(stored, exported.adapters, specs)
        for name, index in stored.names(specs):
            for which, suffix in enumerate(("lora_a", "lora_b")):
                one = functools.partial(make, stored, index, which)
                planned.append(PlannedTensor(f"{name}.{suffix}", shapes[which], one))
    return planned


def _shapes(
    stored: StoredTensor,
    adapters: Mapping[str, ExportedAdapter],
    specs: Mapping[str, Spec],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those of the two arrays of `packed_factors`."""
    rank = sum(adapters[path].rank for path in stored.paths if path in adapters)
    down, up = factor_shapes(stored, rank, specs)
    return (down if stored.transposed else (*down[:-2], down[-1], rank)), up


def packed_factors(
    stored: StoredTensor,
    factors: Mapping[str, Pair],
    scales: Mapping[str, float],
    alpha: float,
    specs: Mapping[str, Spec],
) -> Pair:
    """One tensor's factors as llama.cpp multiplies them.

    Args:
      stored: the tensor of the base model.
      factors: by path, one layer of A `[*stack, *in, rank]` and B `[*stack, rank,
        *out]`.
      scales: by path, the number by which a product is multiplied.
      alpha: of the file.
      specs: of the model.

    Returns:
      A `[*stack, r, in]` and B `[*stack, out, r]`, in the file's order of outputs; of
      an embedding, which is looked up, A `[vocabulary, r]` and B `[embed, r]`.
    """
    total = sum(a.shape[-1] for a, _ in factors.values())
    scaled = {
        path: (a, b * np.float32(scales[path] * total / alpha))
        for path, (a, b) in factors.items()
    }
    down, up = join_factors(stored, scaled, specs)
    return (down if stored.transposed else down.swapaxes(-1, -2)), up


def _update(file: GGUFFile, name: str, alpha: float) -> np.ndarray:
    """The product that llama.cpp adds to the tensor `name`, as the file has it."""
    a, b = (file.read(f"{name}.{suffix}") for suffix in ("lora_a", "lora_b"))
    rank = b.shape[-1]
    # An embedding is looked up: its A has a row for each token.
    product = b @ a if a.shape[-2] == rank else a @ b.T
    return product * np.float32(alpha / rank)
