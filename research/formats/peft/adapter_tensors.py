"""The tensors in an adapter folder of PEFT, matched with the matrices of a model."""

import dataclasses
import functools
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from research.core.errors import UserError, nearest
from research.formats.fused_factors import Pair, split_lengths
from research.formats.huggingface.huggingface_weights import PLAIN_TYPES
from research.formats.huggingface.packed.packed_tensor import FLOATS
from research.formats.peft.adapter_config import CONFIG, MERGED, PREFIX, LoraNumbers
from research.formats.peft.find_adapter import open_tensors
from research.formats.peft.lora_modules import (
    INNER,
    MAGNITUDE,
    LoraModule,
    lora_modules,
    modules_in_memory,
    names_in_memory,
    tied_head,
)
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.weights.parameter_spec import Spec

FACTOR = re.compile(
    rf"(.+)\.lora_(?:embedding_)?([AB]|{MAGNITUDE})(?:\.default)?(?:\.weight)?"
)
# How PEFT marks a parameter that it saves whole.
WHOLE = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.(weight|bias)$)")


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A module that the adapter changes: its tensors' names, its rank and scale.

    `is_turned` tells whether its tensors are `turned`; None: their shapes do not.
    `lengths` names those of DoRA; "" without.
    """

    module: LoraModule
    down: str
    up: str
    rank: int
    scale: float
    is_turned: bool | None = False
    lengths: str = ""

    @property
    def layer(self) -> tuple[int, ...]:
        """Its index without that of an expert."""
        return self.module.index[:1]


class AdapterTensors:
    """The open tensors of an adapter.

    Attributes:
      entries: the modules that have adapters, in the order of the model.
      whole: parameters that the file holds whole, by name: the tensor's name, how it
        lies there, and its index.
      kind: the least exact numbers of the factors, such as `bfloat16`.
      facts: texts by name that an export has put beside the tensors.

    Raises:
      UserError: the file is damaged, holds an adapter to a model of other shapes, or
        one that is not computed here.
    """

    def __init__(
        self,
        file: Path,
        numbers: LoraNumbers,
        architecture: Architecture,
        specs: Mapping[str, Spec],
    ):
        self._file, self._numbers = file, numbers
        self._architecture, self._specs = architecture, specs
        self._handle = open_tensors(file)
        self._near: tuple[Any, dict[str, dict[str, Pair]]] = None, {}
        names, self.whole = self._sorted_names()
        self.entries = self._match(self._without_tied_head(names))
        keys = [key for entry in self.entries for key in (entry.down, entry.up)]
        kinds = {self._handle.get_slice(key).get_dtype() for key in keys}
        # In the order from exact to coarse; float64 is read as float32.
        found = [name for code, name in FLOATS.items() if code in {"F32", *kinds}]
        self.kind = found[-1]
        self.facts: Mapping[str, str] = self._handle.metadata() or {}

    def absent(self) -> list[str]:
        """Modules that the config names, and for which the file has no tensors.

        Experts and routers do not count, as PEFT has no modules for them.
        """
        held = {(path, x.layer) for x in self.entries for path in x.module.stored.paths}
        return [
            module.name
            for module in self._modules
            if not (module.parameter or module.has_no_pattern)
            and f"{module.name}.weight" not in self.whole
            and held.isdisjoint((x, module.index[:1]) for x in module.stored.paths)
            and any(f".{module.name}".endswith(f".{x}") for x in self._numbers.targets)
        ]

    def absent_biases(self) -> bool:
        """Whether the config says that biases were trained, and the file has none."""
        adapted = {x.module.name for x in self.entries}
        places = [x.rpartition(".") for x in self._parameters()]
        every = {place for place, _, part in places if part == "bias"}
        own = every & adapted if self._numbers.bias == "lora_only" else every
        has_some = any(name.endswith(".bias") for name in self.whole)
        return self._numbers.bias != "none" and bool(own) and not has_some

    def pairs(self, entry: AdaptedModule) -> dict[str, Pair]:
        """The factors of the matrices of a module.

        Those of one layer are kept, as each of its matrices is read by itself.
        """
        if self._near[0] != entry.layer:
            self._near = entry.layer, {}
        known = self._near[1]
        if entry.down not in known:
            down, up = self.read(entry.down), self.read(entry.up)
            if entry.is_turned:
                down, up = entry.module.turned(
                    down, up, entry.module.experts(self._specs)
                )
            known[entry.down] = entry.module.split(down, up, self._specs)
        return known[entry.down]

    def lengths(self, entry: AdaptedModule) -> dict[str, np.ndarray]:
        """Those of DoRA for each matrix of a module, `[*out]`."""
        value = self.read(entry.lengths)
        return split_lengths(entry.module.stored, value, self._specs)

    def stored(self, key: str) -> np.ndarray:
        """A tensor in the dtype of the file."""
        return self._handle.get_tensor(key)

    def read(self, key: str) -> np.ndarray:
        """A tensor in float32. Raises UserError: a number in it is not finite."""
        value = self.stored(key).astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(
                f"{self._file}: {key} holds a number that is not finite: the training "
                "that wrote it has diverged, or the file is damaged; use an earlier one"
            )
        return value

    def _sorted_names(self) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
        """Names of both factors by module, and of the tensors of whole parameters."""
        factors: dict[str, dict[str, str]] = {}
        whole, known = {}, self._parameters()
        for key in self._handle.keys():  # noqa: SIM118, it is no dictionary
            kind = self._handle.get_slice(key).get_dtype()
            if kind not in PLAIN_TYPES:
                raise UserError(
                    f"{self._file}: {key} is stored as {kind}, not as float32, "
                    "bfloat16 or float16: save the adapter in one of them"
                )
            name = key.removeprefix(PREFIX)
            if found := FACTOR.fullmatch(name):
                own = factors.setdefault(found[1], {})
                self._require_one_name(key, own.setdefault(found[2], key))
                continue
            if ".lora_" in name:
                raise UserError(
                    f"{self._file}: {key} is part of an adapter that is more than two "
                    f"factors, which is not computed here: {MERGED}"
                )
            if ".original_module." in name:
                continue  # The base's own, beside the one that was trained.
            name = WHOLE.sub("", name)
            if name not in known:
                raise self._other_base(f"{key} is no parameter of it", name, known)
            stored, index = known[name]
            shape = tuple(self._handle.get_slice(key).get_shape())
            if shape != (needed := stored.shape(self._specs)):
                raise self._other_base(_differs(key, shape, needed))
            first, *_ = whole.setdefault(name, (key, stored, index))
            # PEFT may write one value under two names.
            if key != first and not np.array_equal(
                self.stored(first), self.stored(key)
            ):
                self._require_one_name(key, first)
        if not factors:
            raise UserError(f"{self._file} holds no lora_A and lora_B")
        return factors, whole

    def _parameters(self) -> dict[str, tuple[StoredTensor, tuple[int, ...]]]:
        """Every tensor of the base, by each name that it can have in such a file."""
        family, found = family_of(self._architecture), {}
        for layout in (*family.other_hf_tensors, family.hf_tensors):
            for stored in used(layout, self._specs):
                for name, index in stored.names(self._specs):
                    place, _, part = name.rpartition(".")
                    own, others = names_in_memory(place, self._architecture)
                    for each in (own, *others):
                        found[f"{each}.{part}"] = stored, index
        if self._architecture.tied_head:
            tables = (x for x in found.values() if "embedding.table" in x[0].paths)
            found[f"{tied_head(self._architecture)}.weight"] = next(tables)
        return found

    def _without_tied_head(
        self, names: dict[str, dict[str, str]]
    ) -> dict[str, dict[str, str]]:
        """`names` without those of a tied head, which must be those of the embeddings.

        Raises:
          UserError: only one of both ends has this adapter.
        """
        if not self._architecture.tied_head:
            return names
        head = tied_head(self._architecture)
        (table,) = [x for x in self._modules if "embedding.table" in x.stored.paths]
        ends = [names.get(name) for name in (table.name, *table.other_names)]
        own, other = next(filter(None, ends), None), names.get(head)
        if own is None and other is None:
            return names
        tied = self._numbers.tied if own and not other else False
        if own and other and own.keys() == other.keys() == {"A", "B"}:
            pairs = (own["A"], other["B"]), (own["B"], other["A"])
            tied = all(np.array_equal(self.read(x), self.read(y).T) for x, y in pairs)
            scales = [self._numbers.scale_of(name) for name in (table.name, head)]
            tied &= scales[0] == scales[1]
        if not tied:
            raise UserError(
                f"{self._file}: the base model ties its head to its embeddings, and "
                f"the adapter changes {table.name if own else head} alone, or both "
                "differently, which is not computed here; adapters of both ends that "
                "are one have ensure_weight_tying in their config"
            )
        return {name: own for name, own in names.items() if name != head}

    @functools.cached_property
    def _modules(self) -> list[LoraModule]:
        return lora_modules(self._architecture, self._specs)

    def _match(self, names: dict[str, dict[str, str]]) -> list[AdaptedModule]:
        """The modules that have adapters, in the order of the model."""
        rest, entries = dict(names), []
        others = modules_in_memory(self._architecture, self._specs)
        for module in (*self._modules, *others):
            for name in (module.name, *module.other_names):
                if module.name.endswith(INNER) and name not in rest:
                    name = self._alone(name, module, rest)
                if found := rest.pop(name, None):
                    entries.append(self._entry(module, name, found))
        if rest:
            known = [module.name for module in self._modules]
            name = min(rest)
            raise self._other_base(f"{name} is no matrix of it", name, known)
        self._require_one_of_each(entries)
        is_turned = self._are_turned(entries)
        return [
            dataclasses.replace(entry, is_turned=is_turned)
            if entry.is_turned is None
            else entry
            for entry in entries
        ]

    def _are_turned(self, entries: Iterable[AdaptedModule]) -> bool:
        """Whether tensors that are square have the order of PEFT before 0.19.

        Raises:
          UserError: neither other tensors of the file nor its config tell.
        """
        kinds = {
            entry.is_turned: entry
            for entry in entries
            if entry.module.could_be_turned(self._specs)
        }
        if None not in kinds or len(kinds) > 1:
            return bool(kinds.get(True))
        version = re.match(r"(\d+)\.(\d+)", self._numbers.version)
        if not version:
            raise UserError(
                f"{self._file}: {kinds[None].down} and its lora_B are as large as each "
                "other, and PEFT exchanged both in version 0.19: set peft_version in "
                f"{CONFIG} to the version that made the adapter"
            )
        return tuple(map(int, version.groups())) < (0, 19)

    def _alone(
        self, name: str, module: LoraModule, names: Mapping[str, dict[str, str]]
    ) -> str:
        """Where the tensors of an inner parameter lie if PEFT wraps no other one."""
        outer = name.removesuffix(INNER)
        keys = names.get(outer, {})
        if len(keys) < 2:
            return name
        (_, inputs), (outputs, _) = module.shapes(1, self._specs)
        found = {self._shape(keys["A"])[-1:], self._shape(keys["B"])[:1]}
        return outer if found == {(inputs,), (outputs,)} else name

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._handle.get_slice(key).get_shape())

    def _require_one_of_each(self, entries: Iterable[AdaptedModule]) -> None:
        """Raises UserError: two modules of the file hold the same matrix."""
        owners: dict[Any, str] = {}
        for entry in sorted(entries, key=lambda entry: len(entry.module.index)):
            for path in entry.module.stored.paths:
                own = owners.setdefault((path, entry.module.index), entry.down)
                # A parameter of all experts is there before a module of one of them.
                for first in (own, owners.get((path, entry.layer), own)):
                    self._require_one_name(entry.down, first)

    def _require_one_name(self, name: str, first: str) -> None:
        if name != first:
            raise UserError(
                f"{self._file}: {first} and {name} are two names of one tensor: remove "
                "the one that PEFT did not write"
            )

    def _entry(
        self, module: LoraModule, name: str, keys: dict[str, str]
    ) -> AdaptedModule:
        needed = {"A", "B", *([MAGNITUDE] if self._numbers.dora else [])}
        if extra := keys.keys() - needed:
            raise UserError(
                f"{self._file}: {name} has a lora_{min(extra)}, and {CONFIG} does not "
                "say use_dora: copy both files from one folder"
            )
        if missing := needed - keys.keys():
            raise UserError(
                f"{self._file}: {name} lacks its lora_{min(missing)}; copy the folder "
                "again"
            )
        target = module.parameter or self._numbers.target_of(name)
        rank = self._numbers.rank_of(target)
        needed, is_turned = module.shapes(rank, self._specs), False
        shapes = self._shape(keys["A"]), self._shape(keys["B"])
        if module.could_be_turned(self._specs):
            (rows, inputs), (outputs, _) = needed
            turned = (rows, outputs), (inputs, rows)
            is_turned = None if inputs == outputs else shapes == turned
            needed = turned if is_turned else needed
        for side, (found, shape) in enumerate(zip(shapes, needed, strict=True)):
            key = keys["AB"[side]]
            fits = len(found) == 2 and found[1 - side] == shape[1 - side]
            if fits and found != shape:
                own = found[side] // module.experts(self._specs)
                raise UserError(
                    f"{self._file}: {key} has rank {own}, and {CONFIG} gives {rank} "
                    "(r, rank_pattern); copy both files from one folder"
                )
            if found != shape:
                raise self._other_base(_differs(key, found, shape))
        scale, lengths = self._numbers.scale_of(target), keys.get(MAGNITUDE, "")
        if lengths:
            self._check_lengths(module, lengths)
        down, up = keys["A"], keys["B"]
        return AdaptedModule(module, down, up, rank, scale, is_turned, lengths)

    def _check_lengths(self, module: LoraModule, key: str) -> None:
        found = tuple(self._handle.get_slice(key).get_shape())
        if found != (shape := (module.shapes(1, self._specs)[1][0],)):
            raise self._other_base(_differs(key, found, shape))
        if module.has_no_pattern or module.parameter:
            raise UserError(
                f"{self._file}: {key} is of an expert or a router, for which PEFT has "
                f"no DoRA: {MERGED}"
            )

    def _other_base(
        self, what: str, name: str = "", known: Collection[str] = ()
    ) -> UserError:
        if family_of(self._architecture).ignores(name):
            return UserError(
                f"{self._file} adapts {name}, a part of the multimodal model that is "
                "not computed here, which reads its text part alone: train the adapter "
                "with target_modules of the text part, or remove these tensors if the "
                "adapter is for text"
            )
        for own in known if name else ():
            if f".{name}".endswith(f".{own}") or own.endswith(f".{name}"):
                return UserError(
                    f"{self._file}: the name {name} has other first parts than "
                    f"{PREFIX}{own}, as PEFT names it: save the adapter again with "
                    "PEFT's save_pretrained, or rename its tensors so"
                )
        trained = self._numbers.base_name or "a base without a name"
        return UserError(
            f"{self._file} is an adapter to another base model than the one that is "
            f"open: {what}{nearest(name, known) if name else ''}; it was trained on "
            f"{trained}"
        )


def _differs(key: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    return f"{key} is {list(found)}, and it needs {list(needed)}"
