"""The modules that PEFT adapts, and the matrices of ours that lie in each.

PEFT keeps two matrices for a module, `lora_A` `[rank, in]` and `lora_B` `[out, rank]`.
Where Hugging Face fuses several of our matrices, `lora_A` is one for all of them.

Each matrix of each expert is a module of its own in files, as it is in vLLM and was in
transformers 4. PEFT makes of them what transformers 5 has in memory: two parameters
for all experts of a layer, which it also saves so.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.weights.adapters.lora import KIND
from research.weights.parameter_spec import Spec

# The factors of one matrix: a `[*in, rank]` and b `[rank, *out]`.
Pair = tuple[np.ndarray, np.ndarray]
# The head of GPT-NeoX: in files, and in the models of transformers 5.
IN_MEMORY = {"embed_out": "lm_head"}
# The text part of a multimodal model in transformers 5, whatever its files say.
MULTIMODAL = "model.language_model."
# The ends of the names of a module's two tensors.
LINEAR_ENDS = "lora_A.weight", "lora_B.weight"
TABLE_ENDS = "lora_embedding_A", "lora_embedding_B"


@dataclasses.dataclass(frozen=True)
class LoraModule:
    """One module of Hugging Face's model.

    Attributes:
      name: such as `model.layers.3.self_attn.q_proj`.
      other_names: that files of adapters have in its place.
      index: into the stacking axes of its matrices.
      stored: which matrices it holds, and how.
    """

    name: str
    other_names: tuple[str, ...]
    index: tuple[int, ...]
    stored: StoredTensor

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
        return self.is_of_expert or self.stored.paths[0].endswith("router.kernel")

    @property
    def ends(self) -> tuple[str, str]:
        """The ends of the names of its two tensors."""
        return TABLE_ENDS if self.is_table else LINEAR_ENDS

    def join(self, pairs: Mapping[str, Pair], specs: Mapping[str, Spec]) -> Pair:
        """`lora_A` and `lora_B` of the module whose matrices have the factors `pairs`.

        The ranks of fused matrices add up: `lora_A` has the rows of one behind those
        of the other, and `lora_B` is block-diagonal. A matrix without factors stays
        as it is.
        """
        rank = sum(len(b) for _, b in pairs.values())
        wide, rows, values, start = self._outputs(rank, specs), [], [], 0
        for path in self.stored.paths:
            spec = wide[path]
            value = np.zeros(spec.shape[spec.stacked :], np.float32)
            if path in pairs:
                a, b = pairs[path]
                rows.append(a.reshape(-1, len(b)).T)
                value[start : start + len(b)] = b
                start += len(b)
            values.append(value)
        return np.concatenate(rows), self._by_rows.pack(values, wide)

    def split(
        self, down: np.ndarray, up: np.ndarray, specs: Mapping[str, Spec]
    ) -> dict[str, Pair]:
        """The factors of each matrix of the module; undoes `join`.

        A component of a fused module that changes other matrices, and not this one, is
        none of its factors.
        """
        wide = self._outputs(len(down), specs)
        ups = {path: self._by_rows.unpack(path, up, wide) for path in self.stored.paths}
        acts = {path: b.reshape(len(b), -1).any(1) for path, b in ups.items()}
        idle = ~np.any([*acts.values()], axis=0)
        return {
            path: (
                down[acts[path] | idle].T.reshape(*specs[path].in_shape, -1),
                b[acts[path] | idle],
            )
            for path, b in ups.items()
            if (acts[path] | idle).any()
        }

    def shapes(
        self, rank: int, specs: Mapping[str, Spec]
    ) -> tuple[tuple[int, int], ...]:
        """The shapes of `lora_A` and `lora_B`."""
        return (
            (rank, int(np.prod(specs[self.stored.paths[0]].in_shape))),
            self._by_rows.shape(self._outputs(rank, specs)),
        )

    @property
    def _by_rows(self) -> StoredTensor:
        # Both of PEFT's matrices are `[out, in]`, also where the weight is not.
        return dataclasses.replace(self.stored, transposed=True)

    def _outputs(self, rank: int, specs: Mapping[str, Spec]) -> dict[str, Spec]:
        """Specs of the factors b of this rank."""
        return {
            path: KIND.matrix_specs(specs[path], rank)["b"]
            for path in self.stored.paths
        }


def lora_modules(
    architecture: Architecture, specs: Mapping[str, Spec], beginning: str = ""
) -> list[LoraModule]:
    """Every module of a model that has matrices, in the order of its family's files.

    Args:
      architecture, specs: of the model.
      beginning: of the names in the files of the base, one of its family's; "" for
        the usual one. A text model that is part of a multimodal one has another name
        in memory, too.
    """
    return [
        module
        for stored in used(family_of(architecture).hf_tensors, specs)
        if is_module(stored, specs)
        for module in _modules(stored, architecture, specs, beginning)
    ]


@dataclasses.dataclass(frozen=True)
class StackedExperts:
    """One parameter of transformers 5 that holds matrices of all experts of a layer.

    Attributes:
      name: of the parameter, such as `model.layers.3.mlp.experts.gate_up_proj`.
      keys: the module in whose place PEFT writes the tensors of its adapter.
      experts: the modules of the experts, in their order.
    """

    name: str
    keys: str
    experts: tuple[LoraModule, ...]

    def part(self, down: np.ndarray, up: np.ndarray, expert: int) -> Pair:
        """`lora_A` and `lora_B` of one expert.

        PEFT has the ranks of expert 0 behind those of expert 1 in `down` `[E*r, in]`,
        and an expert after the other for each rank in `up` `[out, r*E]`.
        """
        count = len(self.experts)
        down = down.reshape(count, -1, down.shape[1])
        return down[expert], up.reshape(len(up), -1, count)[..., expert]


def stacked_experts(
    architecture: Architecture, specs: Mapping[str, Spec]
) -> list[StackedExperts]:
    """The parameters of a model of transformers 5 that hold several experts."""
    family, found = family_of(architecture), []
    for layout in (family.hf_tensors, *family.other_hf_tensors):
        for stored in used(layout, specs):
            spec = specs[stored.paths[0]]
            if not spec.n_in or spec.stacked == stored.name.count("{}"):
                continue
            single = dataclasses.replace(stored, name=f"{stored.name}.{{}}")
            for name, index in stored.names(specs):
                place, _, what = name.rpartition(".")
                # PEFT wraps the module twice, the inner time for the first parameter.
                keys = f"{place}.base_layer" if what.startswith("gate") else place
                modules = tuple(
                    LoraModule(f"{name}.{i}", (), (*index, i), single)
                    for i in range(spec.shape[len(index)])
                )
                found.append(StackedExperts(name, keys, modules))
    return found


def is_module(stored: StoredTensor, specs: Mapping[str, Spec]) -> bool:
    """Whether PEFT has a module for it: for one matrix, and not for a stack of them.

    GPT-OSS's router is a parameter that it knows under no module's name.
    """
    spec = specs[stored.paths[0]]
    is_matrix = spec.n_in > 0 and spec.stacked == stored.name.count("{}")
    return is_matrix and not stored.name.endswith(".router.weight")


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
    first, *others = family_of(architecture).beginnings
    for tensor, index in stored.names(specs):
        name = tensor.removesuffix(".weight")
        known, own = {name}, IN_MEMORY.get(name, name)
        if name.startswith(first):
            rest = name.removeprefix(first)
            known |= {other + rest for other in others}
            own = MULTIMODAL + rest if "language_model." in beginning else own
        yield LoraModule(own, tuple(sorted(known - {own})), index, stored)


def without_idle(pair: Pair) -> Pair:
    """`pair` without components that are zero in both factors.

    They pad ranks, change nothing, and get no gradient.
    """
    a, b = pair
    rank = len(b)
    used = a.reshape(-1, rank).any(0) | b.reshape(rank, -1).any(1)
    return a[..., used], b[used]
