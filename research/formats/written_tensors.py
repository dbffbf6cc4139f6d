"""One layer of one parameter at a time, out of a file of tensors."""

from collections.abc import Callable

import numpy as np

from research.formats.load_parameters import check_tensors
from research.formats.tensor_file import TensorFile
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.transformer import Model


def layer_reader(
    tensors: TensorFile, architecture: Architecture
) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """`WrittenModel.read` of a file that holds a whole model.

    Raises:
      UserError: the file does not hold a model of this shape.
    """
    model = Model(architecture)
    check_tensors(tensors, model)
    layout, specs = tensors.layout(family_of(architecture)), model.specs

    def read(path: str, index: tuple[int, ...]) -> np.ndarray:
        (stored,) = [x for x in layout if path in x.paths]
        value = None
        for name, place in stored.names(specs):
            if place[: len(index)] != index:
                continue
            part = stored.unpack(path, tensors.read(name), specs)
            inner = place[len(index) :]
            if not inner:
                return part
            if value is None:
                value = np.empty(specs[path].shape[len(index) :], part.dtype)
            value[inner] = part
        assert value is not None, path
        return value

    return read
