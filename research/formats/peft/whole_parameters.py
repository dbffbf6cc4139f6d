"""Parameters that an adapter folder of PEFT holds whole, in both directions.

PEFT trains modules (`modules_to_save`) and biases (`bias`) beside adapters. It also
writes embeddings that have an adapter, as they are in the base.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.core.errors import UserError
from research.formats.load_parameters import make_sharded
from research.formats.peft.adapter_config import CONFIG, MERGED, PREFIX, LoraNumbers
from research.formats.peft.adapter_tensors import AdapterTensors
from research.formats.peft.lora_modules import names_in_memory, tied_head
from research.formats.tensor_file import TensorFile
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.weights.parameter_spec import Spec

TABLE = "embedding.table"
# The parts that PEFT's modules have; others, such as sinks, belong to no module alone.
PARTS = ("weight", "bias")


class WholeParameters:
    """Those that an open adapter folder holds.

    Attributes:
      trained: by path, in the order of the model, the tensor of each index into the
        stacking axes. The config of the folder names them as trained.

    Raises:
      UserError: a trained parameter is not complete, or would untie the embeddings.
    """

    def __init__(
        self,
        file: Path,
        tensors: AdapterTensors,
        numbers: LoraNumbers,
        architecture: Architecture,
        specs: Mapping[str, Spec],
    ):
        self._file, self._tensors, self._specs = file, tensors, specs
        self._architecture = architecture
        self._kept, found = {}, {}
        for name, (key, stored, index) in self._without_head(numbers).items():
            if not numbers.trains(name):
                self._kept[name] = key, stored, index
                continue
            for path in stored.paths:
                found.setdefault(path, {})[index] = key, stored
        for path, parts in found.items():
            self._require_all(path, parts)
        self._require_named(numbers)
        self.trained = {path: found[path] for path in specs if path in found}

    def layer(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """One layer of a trained parameter, float32; see `AdapterFolder.layer`."""
        value = np.empty(self._specs[path].shape[len(index) :], np.float32)
        for own, part in self._parts(path):
            if own[: len(index)] == index:
                value[own[len(index) :]] = part()
        return value

    def shift(self, path: str) -> float:
        """The number that the file adds to the values of a trained parameter."""
        return next(stored.shift for _, stored in self.trained[path].values())

    def load(self, shardings: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The trained parameters, each made in its sharding, float32."""
        return {
            path: make_sharded(
                self._specs[path].shape,
                np.float32,
                shardings[path],
                ((index, part()) for index, part in self._parts(path)),
            )
            for path in self.trained
        }

    def require_base(self, base: TensorFile) -> None:
        """Checks that the parameters which are not trained are those of the base.

        Raises:
          UserError: one differs.
        """
        family = family_of(self._architecture)
        layout = {p: x for x in base.layout(family) for p in x.paths}
        for name, (key, stored, index) in self._kept.items():
            value = self._tensors.stored(key)
            for path in stored.paths:
                own = stored.unpack(path, value, self._specs)
                tensor = base.read(layout[path].name.format(*index))
                expected = layout[path].unpack(path, tensor, self._specs)
                if not np.array_equal(own, expected.astype(own.dtype)):
                    raise UserError(
                        f"{self._file}: {key} differs from {name} of the base model, "
                        f"and neither modules_to_save nor bias of {CONFIG} says that "
                        f"it was trained, so it belongs to another base: {MERGED}"
                    )

    def _parts(
        self, path: str
    ) -> Iterator[tuple[tuple[int, ...], Callable[[], np.ndarray]]]:
        for index, (key, stored) in self.trained[path].items():

            def part(key: str = key, stored: StoredTensor = stored) -> np.ndarray:
                return stored.unpack(path, self._tensors.read(key), self._specs)

            yield index, part

    def _without_head(self, numbers: LoraNumbers) -> dict[str, Any]:
        """All of the file but a tied head, which must be the embeddings."""
        whole = dict(self._tensors.whole)
        if not self._architecture.tied_head:
            return whole
        head = f"{tied_head(self._architecture)}.weight"
        other = whole.pop(head, None)
        names = [name for name, (_, x, _) in whole.items() if TABLE in x.paths]
        trained = [numbers.trains(name) for name in names]
        if other is None:
            is_one = not any(trained) or numbers.tied
        elif names:
            keys = other[0], whole[names[0]][0]
            is_one = np.array_equal(*map(self._tensors.stored, keys))
        else:
            is_one = not numbers.trains(head)
            whole[head] = other  # Must be that of the base.
        if not is_one:
            raise UserError(
                f"{self._file}: the base model ties its head to its embeddings, and "
                f"the adapter trains {(names or [head])[0]} alone, or both apart, "
                "which is not computed here; a table that is both ends has "
                "ensure_weight_tying in its config"
            )
        return whole

    def _require_all(self, path: str, parts: Mapping[tuple[int, ...], Any]) -> None:
        shape, axes = self._specs[path].shape, len(next(iter(parts)))
        if len(parts) != np.prod(shape[:axes], dtype=int):
            layers = ", ".join(str(index[0]) for index in sorted(parts))
            raise UserError(
                f"{self._file}: {path} was trained whole in layers {layers} alone of "
                f"{shape[0]}, and here all layers of a parameter train or none: "
                f"{MERGED}"
            )

    def _require_named(self, numbers: LoraNumbers) -> None:
        for module in numbers.modules:
            one = dataclasses.replace(numbers, modules=(module,), bias="none")
            if not any(map(one.trains, self._tensors.whole)):
                raise UserError(
                    f"{self._file} holds nothing of {module}, which modules_to_save of "
                    f"{CONFIG} names: copy both files from one folder"
                )


@dataclasses.dataclass(frozen=True)
class WholePlan:
    """The whole parameters of an adapter folder, before it is written.

    Attributes:
      fields: of the config.
      shapes: of the tensors by name, in their order.
      tensors: makes the tensors one after the other. Every process calls it.
    """

    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class _Written:
    """A tensor that is written.

    Attributes:
      stored, index: how it lies in the files of the base.
      module: its name in models of transformers 5.
      part: of the module, weight or bias.
      is_saved: whether all of the module is saved, and not this bias alone.
      has_adapter: whether the module has an adapter.
    """

    stored: StoredTensor
    index: tuple[int, ...]
    module: str
    part: str
    is_saved: bool
    has_adapter: bool

    @property
    def key(self) -> str:
        """Its name in the file."""
        is_inner = self.has_adapter and not self.is_saved
        inner = ".base_layer" if is_inner else ""
        return f"{PREFIX}{self.module}{inner}.{self.part}"


def plan_whole(
    architecture: Architecture,
    specs: Mapping[str, Spec],
    full: frozenset[str],
    adapted: Collection[str],
    fetch: Callable[[str, tuple[int, ...]], np.ndarray],
    beginning: str = "",
) -> WholePlan:
    """The modules and biases of `full`, as PEFT 0.21 reads them.

    A module is written with all its parameters, as PEFT asks for each of them. A tied
    head is written, too: older versions of PEFT do not know that it is the embeddings.

    Args:
      architecture, specs: of the model.
      full: paths of the parameters that were trained whole.
      adapted: names of modules that have adapters in the same folder.
      fetch: `(path, index) -> value`, one layer of any parameter.
      beginning: that of `lora_modules`.

    Raises:
      UserError: PEFT has no module for one of them, or other parts of its module have
        an adapter.
    """
    tensors = used(family_of(architecture).hf_tensors, specs)
    places = {
        stored.name.rpartition(".")[0]
        for stored in tensors
        if stored.name.endswith(".weight") and not full.isdisjoint(stored.paths)
    }
    written: list[_Written] = []
    for stored in tensors:
        place, _, part = stored.name.rpartition(".")
        is_saved = place in places and part in PARTS
        if is_saved or not full.isdisjoint(stored.paths):
            _require_module(stored, specs)
            for name, index in stored.names(specs):
                place = name.rpartition(".")[0]
                own, _ = names_in_memory(place, architecture, beginning)
                has_adapter = own in adapted
                written.append(
                    _Written(stored, index, own, part, is_saved, has_adapter)
                )
    if architecture.tied_head and TABLE in full:
        (table,) = [x for x in written if TABLE in x.stored.paths]
        head = tied_head(architecture)
        written.append(dataclasses.replace(table, module=head))

    def made() -> Iterator[tuple[str, np.ndarray]]:
        for x in written:
            values = [fetch(path, x.index) for path in x.stored.paths]
            yield x.key, x.stored.pack(values, specs)

    shapes = {x.key: x.stored.shape(specs) for x in written}
    return WholePlan(_fields(written, architecture.tied_head), shapes, made)


def _fields(written: Sequence[_Written], tied: bool) -> dict[str, Any]:
    """Those of the config; `tied`: the head is the table of embeddings.

    Raises:
      UserError: other parts of a module that is saved have an adapter.
    """
    for x in written:
        if x.is_saved and x.has_adapter:
            raise UserError(
                f"{x.module} holds {' and '.join(x.stored.paths)}, of which some were "
                "trained whole and some have adapters, and PEFT has one or the other "
                "for a module: use --format=hf"
            )
    fields: dict[str, Any] = {}
    if biases := [x for x in written if not x.is_saved]:
        all_adapted = all(x.has_adapter for x in biases)
        fields["bias"] = "lora_only" if all_adapted else "all"
    if saved := [x.module for x in written if x.is_saved]:
        fields["modules_to_save"] = [*dict.fromkeys(saved)]
    if tied and any(TABLE in x.stored.paths for x in written):
        fields["ensure_weight_tying"] = True
    return fields


def _require_module(stored: StoredTensor, specs: Mapping[str, Spec]) -> None:
    """Raises UserError: the tensor is no part of a module that PEFT can save."""
    place, _, part = stored.name.rpartition(".")
    is_of_experts = ".experts" in place or stored.paths[0].endswith("router.kernel")
    if part not in PARTS or is_of_experts or specs[stored.paths[0]].stacked > 1:
        raise UserError(
            f"PEFT has no module for {stored.paths[0]} alone, which was trained whole: "
            "use --format=hf"
        )
