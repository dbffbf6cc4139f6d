"""An adapter folder of PEFT: opened for one base model, and read matrix by matrix."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError, nearest
from research.formats.huggingface.huggingface_weights import PLAIN_TYPES
from research.formats.peft.adapter_config import (
    CONFIG,
    PREFIX,
    TENSORS,
    LoraNumbers,
    read_numbers,
)
from research.formats.peft.find_adapter import find_adapter, open_tensors
from research.formats.peft.lora_modules import (
    LoraModule,
    Pair,
    StackedExperts,
    lora_modules,
    stacked_experts,
    tied_head,
    without_idle,
)
from research.formats.tensor_file import TensorFile, fingerprint_files
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor, used
from research.weights.adapters.lora import KIND
from research.weights.parameter_spec import Spec

FACTOR = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?")
# How PEFT marks a parameter that it saves whole.
WHOLE = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.(weight|bias)$)")
MERGED = "merge the adapter with PEFT's merge_and_unload, and start from that folder"


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A module that the adapter changes: its tensors' names, its rank and scale.

    `stack` is the parameter of which it is a part, in folders of transformers 5.
    """

    module: LoraModule
    down: str
    up: str
    rank: int
    scale: float
    stack: StackedExperts | None = None


class AdapterFolder:
    """An open adapter of a folder or the hub, whose tensors fit a model of one shape.

    Attributes:
      numbers: ranks and scales as its config has them.
      ranks: by path of ours, the rank that holds the adapters of all its layers.
      scales: by path, alpha / rank.
      fingerprint: sha256 of its two files.

    Raises:
      UserError: it is absent, damaged or pickled, is an adapter to a model of other
        shapes, or computes something that is not computed here.
    """

    def __init__(
        self,
        name: str,
        architecture: Architecture,
        specs: Mapping[str, Spec],
        hub_timeout: float = 5.0,
    ):
        self._folder = find_adapter(name, hub_timeout)
        self._file = self._folder / TENSORS
        self.numbers: LoraNumbers = read_numbers(self._folder)
        self._handle = open_tensors(self._file)
        self._architecture, self._specs = architecture, specs
        names, self._whole = self._sorted_names()
        self._entries = self._match(self._without_tied_head(names))
        self.ranks, self.scales = self._numbers_by_path()
        self.fingerprint = fingerprint_files([self._folder / CONFIG, self._file])

    def lora_config(self, lora: LoRAConfig) -> LoRAConfig:
        """`lora` with the targets, ranks and alphas of this adapter."""
        alphas = {path: _tidy(s * self.ranks[path]) for path, s in self.scales.items()}
        rank, ranks = _patterns(self.ranks)
        alpha, others = _patterns(alphas)
        return dataclasses.replace(
            lora,
            targets=tuple(map(_exactly, self.ranks)),
            rank=int(rank),
            alpha=float(alpha),
            rank_pattern=ranks,
            alpha_pattern=others,
        )

    def factors(self, path: str) -> dict[str, np.ndarray]:
        """The factors of one matrix, with zeros where a layer has a smaller rank.

        A layer whose scale is another one has the quotient in its factor b.
        """
        shapes = KIND.matrix_specs(self._specs[path], self.ranks[path])
        found = {name: np.zeros(s.shape, np.float32) for name, s in shapes.items()}
        for entry in self._entries:
            if path not in entry.module.stored.paths:
                continue
            pair = self._pairs(entry).get(path)
            if pair is None:
                continue
            (a, b), index = pair, entry.module.index
            if entry.scale != self.scales[path]:
                b = b * np.float32(entry.scale / self.scales[path])
            found["a"][index][..., : len(b)] = a
            found["b"][index][: len(b)] = b
        return found

    def load(self, shardings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """All adapters, each factor made in its sharding."""

        def place(value: np.ndarray, sharding: Any) -> jax.Array:
            return jax.make_array_from_callback(
                value.shape, sharding, value.__getitem__
            )

        return {
            path: {
                name: place(value, shardings[path][name])
                for name, value in self.factors(path).items()
            }
            for path in self.ranks
        }

    def require_base(self, tensors: TensorFile) -> None:
        """Checks that parameters which the folder holds whole are those of the base.

        PEFT writes those of targeted embeddings beside their adapters.

        Raises:
          UserError: one differs, so it was trained (`modules_to_save`, `bias`), or lies
            over another base.
        """
        family = family_of(self._architecture)
        layout = {p: x for x in tensors.layout(family) for p in x.paths}
        for name, (key, stored, index) in self._whole.items():
            value = self._handle.get_tensor(key)
            for path in stored.paths:
                own = stored.unpack(path, value, self._specs)
                tensor = tensors.read(layout[path].name.format(*index))
                base = layout[path].unpack(path, tensor, self._specs)
                if not np.array_equal(own, base.astype(own.dtype)):
                    raise UserError(
                        f"{self._file}: {key} differs from {name} of the base model. "
                        "It was trained beside the adapter (modules_to_save or bias), "
                        f"which is not done here, or belongs to another base: {MERGED}"
                    )

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
                factors.setdefault(found[1], {})[found[2]] = key
                continue
            if ".lora_" in name:
                raise UserError(
                    f"{self._file}: {key} is part of an adapter that is more than two "
                    f"factors, which is not computed here: {MERGED}"
                )
            name = WHOLE.sub("", name)
            if name not in known:
                raise self._other_base(f"{key} is no parameter of it", name, known)
            stored, index = known[name]
            shape = tuple(self._handle.get_slice(key).get_shape())
            if shape != (needed := stored.shape(self._specs)):
                raise self._other_base(_differs(key, shape, needed))
            whole[name] = key, stored, index
        if not factors:
            raise UserError(f"{self._file} holds no lora_A and lora_B")
        return factors, whole

    def _parameters(self) -> dict[str, tuple[StoredTensor, tuple[int, ...]]]:
        """Every tensor of the base, by each name that it can have in such a file."""
        family, found = family_of(self._architecture), {}
        first, *others = family.beginnings
        for stored in used(family.hf_tensors, self._specs):
            for name, index in stored.names(self._specs):
                found[name] = stored, index
                if name.startswith(first):
                    for other in others:
                        found[other + name.removeprefix(first)] = stored, index
                if self._architecture.tied_head and "embedding.table" in stored.paths:
                    found[f"{tied_head(self._architecture)}.weight"] = stored, index
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
        tied = self.numbers.tied if own and not other else False
        if own and other and own.keys() == other.keys() == {"A", "B"}:
            pairs = (own["A"], other["B"]), (own["B"], other["A"])
            tied = all(np.array_equal(self._read(x), self._read(y).T) for x, y in pairs)
            scales = [self.numbers.scale_of(name) for name in (table.name, head)]
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

    def _match(self, names: dict[str, dict[str, str]]) -> list[_Entry]:
        """The modules that have adapters, in the order of the model."""
        rest, entries = dict(names), []
        for module in self._modules:
            for name in (module.name, *module.other_names):
                if found := rest.pop(name, None):
                    entries.append(self._entry(module, name, found))
        for stack in stacked_experts(self._architecture, self._specs):
            if found := rest.pop(stack.keys, None):
                entry = self._entry(stack.experts[0], stack.name, found, stack)
                entries += [
                    dataclasses.replace(entry, module=module)
                    for module in stack.experts
                ]
        if rest:
            known = [module.name for module in self._modules]
            name = min(rest)
            raise self._other_base(f"{name} is no matrix of it", name, known)
        return entries

    def _entry(
        self,
        module: LoraModule,
        name: str,
        keys: dict[str, str],
        stack: StackedExperts | None = None,
    ) -> _Entry:
        if missing := {"A", "B"} - keys.keys():
            raise UserError(
                f"{self._file}: {name} lacks its lora_{min(missing)}; copy the folder "
                "again"
            )
        rank = self.numbers.rank_of(name)
        count = len(stack.experts) if stack else 1
        (_, inputs), (outputs, _) = module.shapes(rank, self._specs)
        needed = (count * rank, inputs), (outputs, count * rank)
        for side, shape in enumerate(needed):
            key = keys["AB"[side]]
            found = tuple(self._handle.get_slice(key).get_shape())
            fits = len(found) == 2 and found[1 - side] == shape[1 - side]
            if fits and found != shape:
                raise UserError(
                    f"{self._file}: {key} has rank {found[side] // count}, and "
                    f"{CONFIG} gives {rank} (r, rank_pattern); copy both files from "
                    "one folder"
                )
            if found != shape:
                raise self._other_base(_differs(key, found, shape))
        scale = self.numbers.scale_of(name)
        return _Entry(module, keys["A"], keys["B"], rank, scale, stack)

    def _numbers_by_path(self) -> tuple[dict[str, int], dict[str, float]]:
        ranks: dict[str, int] = {}
        scales: dict[str, collections.Counter[float]] = {}
        for entry in self._entries:
            paths = entry.module.stored.paths
            found = dict.fromkeys(paths, entry.rank)
            # These may be padded, which only their values show.
            if len(paths) > 1 or entry.module.has_no_pattern:
                found = {path: len(b) for path, (_, b) in self._pairs(entry).items()}
            for path, rank in found.items():
                ranks[path] = max(rank, ranks.get(path, 0))
                scales.setdefault(path, collections.Counter())[entry.scale] += 1
        ordered = [path for path in self._specs if ranks.get(path)]
        usual = {path: scales[path].most_common(1)[0][0] for path in ordered}
        return {path: ranks[path] for path in ordered}, usual

    def _pairs(self, entry: _Entry) -> dict[str, Pair]:
        down, up = self._read(entry.down), self._read(entry.up)
        if entry.stack:
            down, up = entry.stack.part(down, up, entry.module.index[-1])
        pairs = entry.module.split(down, up, self._specs)
        return {path: without_idle(pair) for path, pair in pairs.items()}

    def _read(self, key: str) -> np.ndarray:
        return self._handle.get_tensor(key).astype(np.float32)

    def _other_base(
        self, what: str, name: str = "", known: Iterable[str] = ()
    ) -> UserError:
        return UserError(
            f"{self._file} is an adapter to another base model than config.model."
            f"init_from: {what}{nearest(name, [*known]) if name else ''}; it was "
            f"trained on {self.numbers.base_name}"
        )


def _differs(key: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    return f"{key} is {list(found)}, and it needs {list(needed)}"


def _exactly(path: str) -> str:
    return f"^{re.escape(path)}$"


def _patterns(numbers: Mapping[str, float]) -> tuple[float, tuple[str, ...]]:
    """The most frequent number, and `pattern=number` for each path with another."""
    usual = collections.Counter(numbers.values()).most_common(1)[0][0]
    others = {path: x for path, x in numbers.items() if x != usual}
    return usual, tuple(f"{_exactly(path)}={x!r}" for path, x in others.items())


def _tidy(alpha: float) -> float:
    """`alpha` without the last digits of its rounding: 96.0 for 95.99999999999999."""
    return float(f"{alpha:.14g}")
