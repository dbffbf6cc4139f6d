"""The modules and parameters that PEFT adapts, and the matrices of ours in each.

PEFT keeps two matrices for a module, `lora_A` `[rank, in]` and `lora_B` `[out, rank]`.
Where Hugging Face fuses several of our matrices, `lora_A` is one for all of them.

Each matrix of each expert is a module of its own in files, as it is in vLLM and was in
transformers 4. PEFT makes of them what transformers 5 has in memory: two parameters
for all experts of a layer, which it also saves so. GPT-OSS has these alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from research.formats.fused_factors import (
    Pair,
    factor_shapes,
    join_factors,
    split_factors,
)
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.weights.parameter_spec import Spec

# The head of GPT-NeoX: in files, and in the models of transformers 5.
IN_MEMORY = {"embed_out": "lm_head"}
# The text part of a multimodal model in transformers 5, whatever its files say.
MULTIMODAL = "model.language_model."
# The ends of the names of a module's two tensors.
LINEAR_ENDS = "lora_A.weight", "lora_B.weight"
TABLE_ENDS = "lora_embedding_A", "lora_embedding_B"
# Behind `lora_`, the name of the lengths of DoRA, `[out]`.
MAGNITUDE = "magnitude_vector"
LENGTHS_END = f".lora_{MAGNITUDE}"
# PEFT wraps a module once for each of its parameters: the first wrap is the inner one.
INNER = ".base_layer"


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """One module of Hugging Face's model, or one parameter of a module.

    Attributes:
      name: in whose place the two tensors lie, such as `model.layers.3.mlp.up_proj`.
      other_names: that files of adapters have in its place.
      index: into the stacking axes of its matrices; of a parameter that holds all
        experts of a layer, the layer alone.
      stored: which matrices it holds, and how.
      parameter: the name of the parameter that PEFT wraps; "" for a module.
    """

    name: str
    other_names: tuple[str, ...]
    index: tuple[int, ...]
    stored: StoredTensor
    parameter: str = ""

    @property
    def target(self) -> str:
        """The name that the patterns of a config are matched with."""
        return self.parameter or self.name

    @property
    def is_table(self) -> bool:
        """Whether it looks rows up, and multiplies nothing."""
        return self.stored.paths[0].endswith(".table")

    @property
    def is_of_expert(self) -> bool:
        """Whether it is one of several experts in its layer."""
        return len(self.index) > 1

    @property
    def has_no_pattern(self) -> bool:
        """Whether PEFT makes a parameter of it, for whose rank it has no pattern."""
        is_router = self.stored.paths[0].endswith("router.kernel")
        return not self.parameter and (self.is_of_expert or is_router)

    @property
    def may_be_padded(self) -> bool:
        """Whether its rank can be larger than that of a matrix in it."""
        several = len(self.stored.paths) > 1 or bool(self.parameter)
        return several or self.has_no_pattern

    def could_be_turned(self, specs: Mapping[str, Spec]) -> bool:
        """Whether older versions of PEFT have `turned` tensors for it."""
        return self.experts(specs) > 1 and self.stored.transposed

    @property
    def ends(self) -> tuple[str, str]:
        """The ends of the names of its two tensors."""
        return TABLE_ENDS if self.is_table else LINEAR_ENDS

    def join(self, pairs: Mapping[str, Pair], specs: Mapping[str, Spec]) -> Pair:
        """`lora_A` and `lora_B` of the module whose matrices have the factors `pairs`.

        With several experts, PEFT has the ranks of expert 0 behind those of expert 1 in
        `lora_A` `[E*r, in]`, and an expert after the other for each rank in `lora_B`
        `[out, r*E]`.
        """
        down, up = join_factors(self.stored, pairs, specs)
        if down.ndim == 2:
            return down, up
        up = np.moveaxis(up, 0, -1)
        return down.reshape(-1, down.shape[-1]), up.reshape(len(up), -1)

    def split(
        self, down: np.ndarray, up: np.ndarray, specs: Mapping[str, Spec]
    ) -> dict[str, Pair]:
        """The factors of each matrix of the module; undoes `join`."""
        if stack := self.stored.shape(specs)[:-2]:
            down = down.reshape(*stack, -1, down.shape[-1])
            up = np.moveaxis(up.reshape(len(up), -1, *stack), -1, 0)
        return split_factors(self.stored, down, up, specs)

    def turned(self, down: np.ndarray, up: np.ndarray, count: int) -> Pair:
        """Both tensors as PEFT has them since 0.19, of an adapter that was made before.

        For parameters `[E, out, in]` it took the outputs for the inputs: `lora_A` was
        `[E*r, out]` and `lora_B` `[in, r*E]`, and their product was the transpose.
        """
        outputs = down.reshape(count, -1, down.shape[1]).transpose(2, 1, 0)
        inputs = up.reshape(len(up), -1, count).transpose(2, 1, 0)
        return inputs.reshape(-1, len(up)), outputs.reshape(down.shape[1], -1)

    def shapes(
        self, rank: int, specs: Mapping[str, Spec]
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of `lora_A` and `lora_B`."""
        (*_, inputs), (*_, outputs, _) = factor_shapes(self.stored, rank, specs)
        rows = rank * self.experts(specs)
        return (rows, inputs), (outputs, rows)

    def experts(self, specs: Mapping[str, Spec]) -> int:
        """How many matrices of each path it holds."""
        stack = self.stored.shape(specs)[:-2]
        return stack[0] if stack else 1


def lora_modules(
    architecture: Architecture, specs: Mapping[str, Spec], beginning: str = ""
) -> list[LoraModule]:
    """Every module and parameter that is written, in the order of its family's files.

    Args:
      architecture, specs: of the model.
      beginning: of the names in the files of the base, one of its family's; "" for
        the usual one. A text model that is part of a multimodal one has another name
        in memory, too.
    """
    return [
        module
        for stored in used(family_of(architecture).hf_tensors, specs)
        if specs[stored.paths[0]].n_in
        for module in _modules(stored, architecture, specs, beginning)
    ]


def modules_in_memory(
    architecture: Architecture, specs: Mapping[str, Spec]
) -> list[LoraModule]:
    """Modules that models of transformers 5 have in place of some `lora_modules`."""
    family = family_of(architecture)
    return [
        module
        for layout in family.other_hf_tensors
        for stored in used(layout, specs)
        if specs[stored.paths[0]].n_in and stored not in family.hf_tensors
        for module in _modules(stored, architecture, specs, "")
    ]


def tied_head(architecture: Architecture) -> str:
    """The name of the head of a model whose head is its table of embeddings."""
    (name,) = [
        stored.name.removesuffix(".weight")
        for stored in family_of(architecture).hf_tensors
        if stored.paths == ("head.kernel",)
    ]
    return IN_MEMORY.get(name, name)


def _modules(
    stored: StoredTensor,
    architecture: Architecture,
    specs: Mapping[str, Spec],
    beginning: str,
) -> Iterator[LoraModule]:
    has_experts = len(stored.shape(specs)) > 2
    for tensor, index in stored.names(specs):
        name = tensor.removesuffix(".weight")
        if has_experts:
            place, _, what = tensor.rpartition(".")
            name = place + INNER if what.startswith("gate") else place
        own, others = names_in_memory(name, architecture, beginning)
        # GPT-OSS's router is no `Linear`, and PEFT has no older name for it.
        is_parameter = has_experts or tensor.endswith(".router.weight")
        parameter = tensor if is_parameter else ""
        yield LoraModule(own, others, index, stored, parameter)


def names_in_memory(
    name: str, architecture: Architecture, beginning: str = ""
) -> tuple[str, tuple[str, ...]]:
    """The name of a module in models of transformers 5, and others that it may have.

    Args:
      name: of the module in its family's files.
      architecture: of the model.
      beginning: that of `lora_modules`.
    """
    first, *others = family_of(architecture).beginnings
    known, own = {name}, IN_MEMORY.get(name, name)
    if name.startswith(first):
        rest = name.removeprefix(first)
        known |= {other + rest for other in others}
        own = MULTIMODAL + rest if "language_model." in beginning else own
    return own, tuple(sorted(known - {own}))
