"""Where each number of a model lies in a file, by the definitions of the formats.

Written apart from the tables and functions that write and read files, which could be
wrong in the same way. Only names of tensors come from the tables of families. The
orders are those of

- transformers (github.com/huggingface/transformers, `modeling_*.py`): a `Linear`
  is `[out, in]`, a `Conv1D` `[in, out]`; GPT-NeoX, Phi-3, GPT-2 and GPT-OSS fuse
  matrices;
- llama.cpp (https://github.com/ggml-org/llama.cpp, `convert_hf_to_gguf.py`): `permute`
  of queries and keys, fused matrices of head-wise ones one after the other, and scales
  of Gemma's norms with 1 added.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from research.core.errors import ParityError
from research.models.architecture import Architecture
from research.weights.parameter_spec import Spec

# llama.cpp turns neighbours in these; in all others the halves of a head, as we do.
PERMUTED = {"llama", "mistral", "mixtral", "granite", "smollm3"}
GEMMA = {"gemma2", "gemma3_text"}
ONE_AFTER_THE_OTHER = {"phi3", "gpt2", "gpt_neox"}
TABLES = {"embedding.table", "position_embedding.table"}
QKV = ("query", "key", "value")
SAMPLES = 16  # of inputs, and of outputs, of each tensor
COPIES = 2  # experts of a layer


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The order of numbers in a file.

    Attributes:
      architecture: of the model.
      names: of the tensors, by path, with `{}` for the layer and the expert.
      for_llama_cpp: the file is one of llama.cpp, or else of transformers.
      read_rows: rows of a tensor of the file along its first axis.
      factors: where the file has the factors of LoRA: what llama.cpp multiplies their
        products with, times the rank; None in a file of parameters.
      stored: the names of the tensors in a file of factors.
    """

    architecture: Architecture
    names: Mapping[str, str]
    for_llama_cpp: bool
    read_rows: Callable[[str, slice], np.ndarray]
    factors: float | None = None
    stored: frozenset[str] = frozenset()

    def require(
        self, path: str, spec: Spec, index: tuple[int, ...], value: np.ndarray
    ) -> None:
        """Compares sampled numbers of one layer with the places where they must lie.

        Args:
          path: of the parameter.
          spec: of all its layers.
          index: the layer; `()` for a parameter that is in none.
          value: what was read, `[*in, *out]`, behind the axis of experts if it has one.

        Raises:
          ParityError: another number is there.
        """
        stack = value.shape[: spec.stacked - len(index)]
        ends = value.shape[len(stack) :]
        inputs, outputs = math.prod(ends[: spec.n_in]), math.prod(ends[spec.n_in :])
        matrices = value.reshape(*stack, inputs, outputs)
        rng = np.random.default_rng(zlib.crc32(f"{path} {index}".encode()))
        for copy in _some_copies(rng, stack):
            i, o = _some(rng, inputs), _some(rng, outputs)
            found = matrices[copy][np.ix_(i, o)].astype(np.float32)
            there = self._numbers(path, spec, (*index, *copy), i, o)
            # A sum of products may be added up in another order.
            allowed = 0.0 if self.factors is None else 1e-4 * np.abs(there).max()
            if not np.allclose(found, there, rtol=0, atol=allowed, equal_nan=True):
                raise ParityError(
                    f"the written files hold the numbers of {path} in another order "
                    f"than {'llama.cpp' if self.for_llama_cpp else 'transformers'} "
                    f"reads {self.names[path]} in: please report this, with the command"
                )

    def _numbers(
        self,
        path: str,
        spec: Spec,
        place: tuple[int, ...],
        i: np.ndarray,
        o: np.ndarray,
    ) -> np.ndarray:
        """Numbers `[inputs i, outputs o]` of a layer or an expert at `place`."""
        template = self.names[path]
        name = template.format(*place)
        copy, rows = place[template.count("{}") :], self._row(path, o)
        if self.factors is not None:
            return self._products(path, name, copy, i, rows)
        if not spec.n_in:
            tensor = self.read_rows(name, slice(None))[copy]
            return tensor[rows][None].astype(np.float32) - self._added(path)
        turned = self._by_inputs(path)
        first, last = (i, rows) if turned else (rows, i)
        if copy:
            (expert,) = copy
            tensor = self.read_rows(name, slice(expert, expert + 1))[0][first]
        else:
            parts = [self.read_rows(name, slice(int(n), int(n) + 1)) for n in first]
            tensor = np.concatenate(parts)
        part = tensor[:, last].astype(np.float32)
        return part if turned else part.T

    def _row(self, path: str, o: np.ndarray) -> np.ndarray:
        """Where outputs `o` lie along the outputs in the file."""
        family, shape = self.architecture.family, self.architecture
        module, width = path.split(".")[-2], shape.head_dim
        if module in QKV:
            head, d = o // width, o % width
            which, half = QKV.index(module), width // 2
            if self.for_llama_cpp and family in PERMUTED and module != "value":
                d = np.where(d < half, 2 * d, 2 * (d - half) + 1)
            if family == "gpt_neox" and not self.for_llama_cpp:
                return (3 * head + which) * width + d
            if family in ONE_AFTER_THE_OTHER:
                before = (0, shape.heads, shape.heads + shape.kv_heads)
                head = head + before[which]
            return head * width + d
        if module in ("gate", "up") and family == "phi3":
            return o + (shape.mlp if module == "up" else 0)
        if module in ("gate", "up") and family == "gpt_oss" and not self.for_llama_cpp:
            return 2 * o + (1 if module == "up" else 0)
        return o

    def _by_inputs(self, path: str) -> bool:
        """Whether a tensor of the file is `[in, out]`."""
        family = self.architecture.family
        if path in TABLES:
            return True
        if self.for_llama_cpp or path == "head.kernel":
            return False
        return family == "gpt2" or (
            family == "gpt_oss" and path.startswith("layers.mlp.")
        )

    def _added(self, path: str) -> float:
        gemma = self.for_llama_cpp and self.architecture.family in GEMMA
        return 1.0 if gemma and path.endswith("norm.scale") else 0.0

    def _products(
        self,
        path: str,
        name: str,
        copy: tuple[int, ...],
        i: np.ndarray,
        rows: np.ndarray,
    ) -> np.ndarray:
        """The update that llama.cpp adds; A of a table has a row for each token."""
        names = [f"{name}.lora_{x}" for x in "ab"]
        if not {*names} <= self.stored:
            return np.zeros((len(i), len(rows)), np.float32)
        a, b = (self.read_rows(x, slice(None))[copy] for x in names)
        down = a[i] if path in TABLES else a[:, i].T
        return down @ b[rows].T * np.float32(self.factors / b.shape[-1])


def with_places(written: Any, specs: Mapping[str, Spec]) -> Any:
    """A `WrittenModel` of which all that is read is compared with its `layout`."""
    layout: FileLayout | None = written.layout
    if layout is None:
        return written

    def read(path: str, index: tuple[int, ...]) -> np.ndarray:
        value = written.read(path, index)
        if path in layout.names:
            layout.require(path, specs[path], index, value)
        return value

    return dataclasses.replace(written, read=read)


def _some(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.choice(size, min(size, SAMPLES), replace=False)


def _some_copies(
    rng: np.random.Generator, stack: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    chosen = [rng.choice(n, min(n, COPIES), replace=False) for n in stack]
    return itertools.product(*([int(x) for x in places] for places in chosen))
