"""How a parameter of ours lies in a file of another tool, in both directions."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np

from research.weights.parameter_spec import Spec


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, and the parameters that it holds.

    The inputs of a matrix are flattened to one axis, and so are its outputs. Where
    `name` has a `{}`, the file has one tensor for each entry of a stacking axis of
    the parameter: the first `{}` is the layer, a second would be the expert. Stacking
    axes without a `{}` stay in front, as in `[E, out, in]`.

    Attributes:
      name: in the file, such as `model.layers.{}.self_attn.q_proj.weight`.
      paths: of the parameters in it; several where the file fuses matrices that have
        the same inputs.
      transposed: the file has `[out, in]`, as PyTorch's `Linear`; or else `[in, out]`.
      interleaved: how several parameters share the outputs. False: all outputs of
        one, then all of the next. True: by turns, a slice of each along its first
        output axis (the query, key and value of head 0, then those of head 1).
      rotary_neighbours: both numbers of a rotary pair lie beside each other, as in
        llama.cpp's Llama; or else half a head apart, as in `attention.rotate`.
      shift: the file has the values plus this.
    """

    name: str
    paths: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    rotary_neighbours: bool = False
    shift: float = 0.0

    def names(self, specs: Mapping[str, Spec]) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Each tensor's name, with its index into the stacking axes."""
        sizes = specs[self.paths[0]].shape[: self._named_axes]
        for index in itertools.product(*(range(size) for size in sizes)):
            yield self.name.format(*index), index

    @property
    def first(self) -> str:
        """The name of its first tensor."""
        return self.name.replace("{}", "0")

    def shape(self, specs: Mapping[str, Spec]) -> tuple[int, ...]:
        """The shape of each of these tensors in the file."""
        first = specs[self.paths[0]]
        stack = first.shape[self._named_axes : first.stacked]
        widths = (
            specs[path].shape[first.stacked + first.n_in :] for path in self.paths
        )
        width = sum(map(math.prod, widths))
        if not first.n_in:
            return (*stack, width)
        inputs = math.prod(first.in_shape)
        ends = (width, inputs) if self.transposed else (inputs, width)
        return (*stack, *ends)

    def pack(self, values: list[np.ndarray], specs: Mapping[str, Spec]) -> np.ndarray:
        """The file's tensor that holds `values`, one for each of `paths`."""
        parts = [
            self._matrix(value, specs[path])
            for path, value in zip(self.paths, values, strict=True)
        ]
        matrix = np.concatenate(parts, -1) if len(parts) > 1 else parts[0]
        matrix = matrix + self.shift if self.shift else matrix
        matrix = matrix.reshape(*matrix.shape[:-2], -1)
        if not specs[self.paths[0]].n_in:
            return matrix[..., 0, :]
        return matrix.swapaxes(-1, -2) if self.transposed else matrix

    def unpack(
        self, path: str, tensor: np.ndarray, specs: Mapping[str, Spec]
    ) -> np.ndarray:
        """The value of one of `paths` that `tensor` holds; undoes `pack`."""
        spec, position = specs[path], self.paths.index(path)
        tensor = tensor - self.shift if self.shift else tensor
        if not spec.n_in:
            matrix = tensor[..., None, :]
        else:
            matrix = tensor.swapaxes(-1, -2) if self.transposed else tensor
        groups, width = self._groups(spec)
        start = sum(self._groups(specs[p])[1] for p in self.paths[:position])
        matrix = matrix.reshape(*matrix.shape[:-1], groups, -1)
        value = matrix[..., start : start + width]
        value = value.reshape(spec.shape[self._named_axes :])
        return _swap_rotary(value, (-1, 2)) if self.rotary_neighbours else value

    @property
    def _named_axes(self) -> int:
        return self.name.count("{}")

    def _groups(self, spec: Spec) -> tuple[int, int]:
        """Into how many slices the outputs are cut, and how long each is."""
        outputs = spec.shape[spec.stacked + spec.n_in :]
        groups = outputs[0] if self.interleaved else 1
        return groups, math.prod(outputs) // groups

    def _matrix(self, value: np.ndarray, spec: Spec) -> np.ndarray:
        """`value` as `[*stack, in, groups, width]`."""
        if self.rotary_neighbours:
            value = _swap_rotary(value, (2, -1))
        stack = spec.shape[self._named_axes : spec.stacked]
        inputs = math.prod(spec.in_shape)
        return value.reshape(*stack, inputs, *self._groups(spec))


def _swap_rotary(value: np.ndarray, pairs: tuple[int, int]) -> np.ndarray:
    """Turns the last axis, a head, from one order of rotary pairs into the other.

    `pairs`: (2, -1) where a pair lies half a head apart, (-1, 2) where side by side.
    """
    return (
        value.reshape(*value.shape[:-1], *pairs).swapaxes(-1, -2).reshape(value.shape)
    )


def used(
    tensors: tuple[StoredTensor, ...], specs: Mapping[str, Spec]
) -> list[StoredTensor]:
    """Those of a family's `tensors` that a model with these parameters has.

    Raises:
      ValueError: the family names no tensor, or two, for a parameter of the model.
    """
    found = [tensor for tensor in tensors if specs.keys() & {*tensor.paths}]
    held = collections.Counter(path for tensor in found for path in tensor.paths)
    if held != collections.Counter(specs.keys()):
        odd = sorted(p for p in {*held, *specs} if held[p] != (p in specs))
        raise ValueError(f"the family must name one tensor for each of {odd}")
    return found
