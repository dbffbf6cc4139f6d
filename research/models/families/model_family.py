"""A model family as the rest of the code knows it: its switches and its names."""

import dataclasses
from collections.abc import Callable
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
      ignored_tensors: endings of names of tensors that are no parameters.
      gguf_architecture: as in llama.cpp's `general.architecture`; "" if llama.cpp
        files of the family cannot be read.
      gguf_tensors: every tensor of a llama.cpp file.
    """

    model_type: str
    members: str
    from_hf_config: Callable[[ConfigFields], Architecture]
    to_hf_config: Callable[[Architecture], dict[str, Any]]
    hf_tensors: tuple[StoredTensor, ...]
    ignored_tensors: tuple[str, ...] = ()
    gguf_architecture: str = ""
    gguf_tensors: tuple[StoredTensor, ...] = ()
