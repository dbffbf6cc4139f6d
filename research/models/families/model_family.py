"""A model family as the rest of the code knows it: its switches and its names."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from research.models.architecture import Architecture
from research.models.families.config_fields import ConfigFields
from research.models.families.stored_tensor import StoredTensor


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """One family of models.

    Attributes:
      model_type: as in a Hugging Face `config.json`.
      members: the models it covers, for error messages.
      from_hf_config: the shape and switches that a `config.json` describes. It raises
        a UserError where the model computes what the Block does not.
      to_hf_config: the `config.json` of a shape; undone by `from_hf_config`.
      hf_tensors: every tensor of a Hugging Face folder. Tensors of parameters that a
        model does not have, such as the head of one with tied embeddings, count for
        nothing.
      other_hf_tensors: other ways in which folders hold a model, as `hf_tensors` each.
        They are read, and never written.
      beginnings: of names in `hf_tensors`. They have the first; a file may have any
        other in its place.
      ignored_tensors: regular expressions; a tensor whose name one of them finds is no
        parameter.
      quantised_as: methods in a `quantization_config` whose tensors are read, beside
        those that are read in every family.
      gguf_architecture: as in llama.cpp's `general.architecture`; "" if llama.cpp
        files of the family cannot be read.
      gguf_tensors: every tensor of a llama.cpp file.
      other_gguf_tensors: as `other_hf_tensors`, of such files.
      gguf_fields: by the name of a field of llama.cpp's metadata, without the
        architecture in front: the field of `config.json` that says the same. Those of
        rotary embeddings are common to all families, and are not among them.
      gguf_mark: such a name, which files of this family have and files of others with
        the same `gguf_architecture` lack; "" if they have none.
      gguf_period: llama.cpp gives the window to all layers but each of this number; 0:
        it computes no windows.
      gguf_unsaid: from the fields of `config.json` that a llama.cpp file has: those
        that it leaves unsaid, for llama.cpp knows them.
    """

    model_type: str
    members: str
    from_hf_config: Callable[[ConfigFields], Architecture]
    to_hf_config: Callable[[Architecture], dict[str, Any]]
    hf_tensors: tuple[StoredTensor, ...]
    other_hf_tensors: tuple[tuple[StoredTensor, ...], ...] = ()
    beginnings: tuple[str, ...] = ("",)
    ignored_tensors: tuple[str, ...] = ()
    quantised_as: tuple[str, ...] = ()
    gguf_architecture: str = ""
    gguf_tensors: tuple[StoredTensor, ...] = ()
    other_gguf_tensors: tuple[tuple[StoredTensor, ...], ...] = ()
    gguf_fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_mark: str = ""
    gguf_period: int = 0
    gguf_unsaid: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}

    def hf_layout(self, names: Iterable[str]) -> tuple[StoredTensor, ...]:
        """`hf_tensors` as a file with tensors of these `names` has them."""
        names = {*names}
        found = _closest((self.hf_tensors, *self.other_hf_tensors), names)
        written = self.beginnings[0]
        for beginning in self.beginnings:
            tensors = tuple(
                dataclasses.replace(
                    tensor, name=beginning + tensor.name.removeprefix(written)
                )
                if tensor.name.startswith(written)
                else tensor
                for tensor in found
            )
            if any(t.name in names for t in tensors if "embedding.table" in t.paths):
                return tensors
        return found

    def gguf_layout(self, names: Iterable[str]) -> tuple[StoredTensor, ...]:
        """`gguf_tensors` as a file with tensors of these `names` has them."""
        return _closest((self.gguf_tensors, *self.other_gguf_tensors), {*names})

    def ignores(self, name: str) -> bool:
        """Whether the tensor `name` of a file is no parameter."""
        return any(re.search(pattern, name) for pattern in self.ignored_tensors)


def _closest(
    layouts: tuple[tuple[StoredTensor, ...], ...], names: set[str]
) -> tuple[StoredTensor, ...]:
    """The layout of which a file with these names has the most."""
    return max(layouts, key=lambda layout: sum(t.first in names for t in layout))
