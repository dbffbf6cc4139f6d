"""An adapter folder of PEFT: opened for one base model, and read matrix by matrix."""

import collections
import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from research.config.knob_groups import LoRAConfig
from research.core.errors import UserError
from research.core.hub_access import HubAddress, is_hub
from research.formats.base_model import Base
from research.formats.fused_factors import Pair
from research.formats.load_parameters import make_sharded
from research.formats.peft.adapter_config import (
    CONFIG,
    TENSORS,
    LoraNumbers,
    read_numbers,
)
from research.formats.peft.adapter_tensors import AdaptedModule, AdapterTensors
from research.formats.peft.find_adapter import find_adapter
from research.formats.peft.whole_parameters import WholeParameters
from research.formats.tensor_file import TensorFile, fingerprint_files
from research.models.architecture import Architecture
from research.weights.adapters.adapter_registry import find_kind
from research.weights.adapters.lora import KIND
from research.weights.parameter_spec import Spec


class AdapterFolder:
    """An open adapter of a folder or the hub, whose tensors fit a model of one shape.

    Attributes:
      numbers: ranks and scales as its config has them.
      adapter_kind: LoRA or DoRA.
      ranks: by path of ours, the rank that holds the adapters of all its layers.
      scales: by path, alpha / rank.
      whole: parameters that it holds whole.
      fingerprint: sha256 of its two files.
      kind, facts: see `AdapterTensors`.

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
        self._specs = specs
        shape = architecture, specs
        self._tensors = AdapterTensors(self._file, self.numbers, *shape)
        self.whole = WholeParameters(self._file, self._tensors, self.numbers, *shape)
        self._warn_of_absent()
        entries = self._tensors.entries
        self._entries: dict[Any, list[AdaptedModule]] = {}
        for entry in entries:
            for path in entry.module.stored.paths:
                self._entries.setdefault((path, entry.layer), []).append(entry)
        self.ranks, self.scales = self._numbers_by_path(entries)
        self.adapter_kind = find_kind("dora" if self.numbers.dora else "lora")
        if not self.ranks:
            raise UserError(
                f"{self._file} holds zeros alone, so it changes nothing and has no "
                "rank: use the base model without it"
            )
        self.fingerprint = fingerprint_files([self._folder / CONFIG, self._file])
        self.kind, self.facts = self._tensors.kind, self._tensors.facts

    def lora_config(self, lora: LoRAConfig) -> LoRAConfig:
        """`lora` with the kind, targets, ranks, alphas and whole parameters of this."""
        alphas = {path: _tidy(s * self.ranks[path]) for path, s in self.scales.items()}
        rank, ranks = _patterns(self.ranks)
        alpha, others = _patterns(alphas)
        return dataclasses.replace(
            lora,
            kind=self.adapter_kind.name,
            rslora=False,
            layers="",
            targets=tuple(map(_exactly, self.ranks)),
            rank=int(rank),
            alpha=float(alpha),
            rank_pattern=ranks,
            alpha_pattern=others,
            full=tuple(map(_exactly, self.whole.trained)),
        )

    def layer(self, path: str, index: tuple[int, ...] = ()) -> Pair:
        """The factors of one layer of a matrix, with zeros up to its rank.

        Where the layer has another scale than the matrix, factor b has the quotient.

        Args:
          path: of the matrix.
          index: `(layer,)`, or `()` where it is not stacked over layers.

        Returns:
          a `[*stack, *in, rank]` and b `[*stack, rank, *out]`, float32.
        """
        spec = self._specs[path]
        shapes = KIND.matrix_specs(spec, self.ranks[path])
        a, b = (np.zeros(shapes[x].shape[len(index) :], np.float32) for x in "ab")
        for entry in self._entries.get((path, index), ()):
            if path not in (pairs := self._tensors.pairs(entry)):
                continue
            down, up = pairs[path]
            if entry.scale != self.scales[path]:
                up = up * np.float32(entry.scale / self.scales[path])
            expert = entry.module.index[len(index) :]
            a[expert][..., : down.shape[-1]] = down
            axes = [slice(None)] * (spec.stacked - len(entry.module.index))
            b[(*expert, *axes, slice(down.shape[-1]))] = up
        return a, b

    def lengths(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray | None:
        """Those of DoRA for one layer of a matrix, `[*out]`; None for LoRA.

        They are zero where the layer has no adapter, and nowhere else.
        """
        if not self.numbers.dora:
            return None
        if (path, index) not in self._entries:
            spec = self._specs[path]
            return np.zeros(spec.shape[spec.stacked + spec.n_in :], np.float32)
        (entry,) = self._entries[path, index]
        value = self._tensors.lengths(entry)[path]
        return np.where(value == 0, np.finfo(np.float32).tiny, value)

    def factors(self, path: str) -> dict[str, np.ndarray]:
        """The factors of all layers of a matrix; see `layer` and `lengths`."""
        shapes = self.adapter_kind.matrix_specs(self._specs[path], self.ranks[path])
        found = {name: np.empty(x.shape, np.float32) for name, x in shapes.items()}
        for index in self._layers(path):
            for name in found:
                found[name][index] = self._factor(path, name, index)
        return found

    def _factor(self, path: str, name: str, index: tuple[int, ...]) -> np.ndarray:
        if name == "magnitude":
            return self.lengths(path, index)
        return self.layer(path, index)["ab".index(name)]

    def load(self, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """All adapters and trained whole parameters, each array made in its sharding.

        A host holds its own share of one factor, and one layer.
        """

        def make(path: str, name: str, spec: Spec) -> jax.Array:
            parts = (
                (index, self._factor(path, name, index)) for index in self._layers(path)
            )
            return make_sharded(spec.shape, np.float32, shardings[path][name], parts)

        return {
            path: {
                name: make(path, name, spec)
                for name, spec in self.adapter_kind.matrix_specs(
                    self._specs[path], rank
                ).items()
            }
            for path, rank in self.ranks.items()
        } | self.whole.load(shardings)

    def _layers(self, path: str) -> list[tuple[int, ...]]:
        spec = self._specs[path]
        return [(i,) for i in range(spec.shape[0])] if spec.stacked else [()]

    def require_base(self, tensors: TensorFile) -> None:
        """See `WholeParameters.require_base`."""
        self.whole.require_base(tensors)

    def _warn_of_absent(self) -> None:
        """Warns of parts that the config names and the file lacks, as PEFT does."""
        if absent := self._tensors.absent():
            logging.warning(
                "%s has no tensors for %d modules that target_modules of %s names "
                "(%s): they stay as the base has them; if that is not meant, copy both "
                "files from one folder",
                self._file,
                len(absent),
                CONFIG,
                ", ".join(absent[:3]) + ", ..." * (len(absent) > 3),
            )
        if self._tensors.absent_biases():
            logging.warning(
                "%s has no biases, and bias of %s is %s: they stay as the base has "
                "them; if that is not meant, copy both files from one folder",
                self._file,
                CONFIG,
                self.numbers.bias,
            )

    def warn_of_other_base(self, base: Base) -> None:
        """Warns where the folder says that it was trained on another base than `base`.

        An export of ours has the sha256 of its base. Others name a repository of the
        hub at most, which is compared where `base` is one, too.
        """
        digest = self.facts.get("base_sha256", "")
        if digest:
            trained, here = (f"sha256 {x[:12]}" for x in (digest, base.fingerprint))
            differs = digest != base.fingerprint
        else:
            trained, here = self.numbers.base_name, ""
            if is_hub(base.name):
                here = HubAddress.parse(base.name, "model").name
            is_local = not trained or Path(trained).exists() or trained.count("/") != 1
            differs = bool(here) and not is_local and trained.lower() != here.lower()
        if differs:
            logging.warning(
                "the adapter %s was trained on another base model (%s) than %s (%s): "
                "another model of the same shape makes the adapter useless, and "
                "another file format of the same model does not",
                self._folder,
                trained,
                base.name,
                here,
            )

    def _numbers_by_path(
        self, entries: Iterable[AdaptedModule]
    ) -> tuple[dict[str, int], dict[str, float]]:
        ranks: dict[str, int] = {}
        scales: dict[str, collections.Counter[float]] = {}
        for entry in entries:
            found = dict.fromkeys(entry.module.stored.paths, entry.rank)
            # Only the values show by how much. Lengths act where factors are zero.
            if entry.module.may_be_padded and not entry.lengths:
                pairs = self._tensors.pairs(entry)
                found = {path: a.shape[-1] for path, (a, _) in pairs.items()}
            for path, rank in found.items():
                ranks[path] = max(rank, ranks.get(path, 0))
                scales.setdefault(path, collections.Counter())[entry.scale] += 1
        ordered = [path for path in self._specs if ranks.get(path)]
        usual = {path: scales[path].most_common(1)[0][0] for path in ordered}
        return {path: ranks[path] for path in ordered}, usual


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
