"""The protocol of a format in which frozen weights are stored while adapters train."""

import importlib
from typing import Any, Protocol

import jax

from research.config.choices import BASE_FORMAT_MODULES
from research.core.errors import look_up
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

Array = jax.Array


class BaseFormat(Protocol):
    """One format of frozen weights, a value of `config.model.quantize`.

    A new one is a file in `weights/quantized/`: a `QuantizedMatrix`, and a `FORMAT`
    that makes it.
    """

    def specs(self, spec: Spec) -> Any:
        """The stored form of a parameter: a `Spec`, or a `Leaf` with `Spec`s inside.

        The same `spec` keeps the parameter as it is, which suits scales of norms.
        """
        ...

    def store(self, weight: Array, spec: Spec) -> Matrix:
        """`weight` in the structure of `specs(spec)`; a pure function of JAX."""
        ...


def find_format(name: str) -> BaseFormat:
    """The format that `config.model.quantize` names. Raises UserError: none."""
    module = look_up(BASE_FORMAT_MODULES, name, "config.model.quantize")
    return importlib.import_module(module).FORMAT
