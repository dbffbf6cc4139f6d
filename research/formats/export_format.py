"""The contract between an export and the formats in which a model is written."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import jax
import numpy as np

from research.config.choices import EXPORT_FORMATS
from research.core.errors import look_up
from research.formats.base_model import Base
from research.formats.proof.file_layout import FileLayout
from research.formats.proof.stored_numbers import StoredNumbers
from research.models.architecture import Architecture
from research.models.transformer import Model
from research.tokenize.tokenizer import Tokenizer
from research.weights.representations.leaf import Matrix

NOTHING: Mapping[str, "ExportedAdapter"] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The numbers in the files.

    Attributes:
      dtype: float32, bfloat16 or float16.
      quant: q8_0 or q4_0 where a format stores matrices as codes; "": in `dtype`.
    """

    dtype: str = "float32"
    quant: str = ""

    @property
    def numbers(self) -> str:
        """The less exact of both."""
        return self.quant or self.dtype


@dataclasses.dataclass(frozen=True)
class ExportedAdapter:
    """The adapter of one matrix: it adds `alpha / rank` times the product of factors.

    Attributes:
      factors: by name, in their shardings; of LoRA `a` `[*stack, *in, rank]` and `b`
        `[*stack, rank, *out]`, float32.
      rank: of the update.
      alpha: of its scale.
    """

    factors: Mapping[str, jax.Array]
    rank: int
    alpha: float


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A model as the formats get it. All parameters are in their shardings.

    Attributes:
      model: has the architecture and the specs.
      weights: all parameters by path, with adapters attached.
      tokenizer: has the chat template of training, and the ids that end an answer.
      adapters: by path; empty after full training.
      adapter_kind: their kind; `lora` for each that is a low-rank update; "" without.
      base_weights: the parameters without adapters; empty where there are no adapters.
      base: that training began with; None outside of a run.
      facts: texts by name that travel inside each file that has room for them.
      full: paths of the parameters that were trained whole beside adapters.
    """

    model: Model
    weights: Mapping[str, Matrix]
    tokenizer: Tokenizer
    adapters: Mapping[str, ExportedAdapter] = dataclasses.field(default_factory=dict)
    adapter_kind: str = ""
    base_weights: Mapping[str, Matrix] = dataclasses.field(default_factory=dict)
    base: Base | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    full: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class WrittenModel:
    """The model that written files hold. They were opened anew.

    Attributes:
      architecture: as the files describe it; of adapters that of their base model.
      tokenizer: out of the files; None where they have none.
      read: `read(path, index)` gives one layer of a path in `held`, `[*in, *out]`: the
        parameter, or what the files add to it. It is in the dtype of the file, or in
        float32 where it is computed. `index` is `(layer,)` for a path that is stacked
        over layers, or else `()`. Every process calls it, in the same order.
      held: the paths that the files hold; the base model has all others.
      facts: texts by name that travel in the files.
      for_llama_cpp: some settings may differ, see `architecture_parity.excused`.
      read_rows: `read_rows(path, part)` gives rows `[n, D]` of the embeddings or of the
        vocabulary head, as `read` gives all of them; None where files do not hold
        these one by one.
      ends: the ids that end an answer, by each place in the files that other tools read
        them from.
      layout: where the numbers must lie in the files; None where only tests check it.
    """

    architecture: Architecture
    tokenizer: Tokenizer | None
    read: Callable[[str, tuple[int, ...]], np.ndarray]
    held: Mapping[str, StoredNumbers]
    facts: Mapping[str, str]
    for_llama_cpp: bool = False
    read_rows: Callable[[str, slice], np.ndarray] | None = None
    layout: FileLayout | None = None
    ends: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


class ExportFormat(Protocol):
    """One format. A new one is a module with a `FORMAT` and a line in `choices`.

    Attributes:
      name: as in `--format`.
      library: that loads the files, as the hub names it.
      merges: whether the files hold a whole model, with the adapters added in.
    """

    name: str
    library: str
    merges: bool

    def check(self, exported: ExportedModel, options: ExportOptions) -> None:
        """Refuses a model before anything is written; reads no weights.

        Raises:
          UserError: the format cannot hold it, as far as its numbers do not matter.
        """
        ...

    def write(
        self, exported: ExportedModel, folder: Path, options: ExportOptions
    ) -> None:
        """Writes the files into `folder`, which exists and is empty.

        Every process calls it, and the leading one writes; a tensor at a time lies in
        its memory. The caller removes the folder after an error.

        Raises:
          UserError: the format cannot hold this model.
          OSError: the disk refuses.
        """
        ...

    def read_back(self, folder: Path, exported: ExportedModel) -> WrittenModel:
        """Opens what `write` wrote; `exported` gives what the files do not hold.

        A format of adapters takes the base model from there, and nothing else.
        """
        ...

    def usage(self, exported: ExportedModel, options: ExportOptions) -> str:
        """Markdown for the model card: how other tools load the files."""
        ...


def find_format(name: str) -> ExportFormat:
    """The format that `--format` names. Raises UserError: there is none."""
    module = look_up(EXPORT_FORMATS, name, "--format").module
    return importlib.import_module(module).FORMAT
