"""A whole model out of a file of tensors, a layer of a parameter at a time."""

import dataclasses
from collections.abc import Callable

import numpy as np

from research.formats.export_format import WrittenModel
from research.formats.load_parameters import check_tensors
from research.formats.proof.file_layout import FileLayout
from research.formats.proof.stored_numbers import StoredNumbers
from research.formats.tensor_file import RowFile
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.transformer import Model
from research.tokenize.tokenizer import Tokenizer


def whole_model(
    tensors: RowFile,
    architecture: Architecture,
    tokenizer: Tokenizer,
    for_llama_cpp: bool = False,
) -> WrittenModel:
    """The model that a file holds, with all its parameters.

    `for_llama_cpp`: the file is one of llama.cpp, or else of transformers.

    Raises:
      UserError: the file does not hold a model of this shape.
    """
    model = Model(architecture)
    check_tensors(tensors, model)
    specs, layout = model.specs, tensors.layout(family_of(architecture))
    held = {
        path: StoredNumbers(
            tensors.kind(stored.first),
            by_inputs=stored.transposed and specs[path].n_in > 0,
            shift=stored.shift,
        )
        for stored in layout
        for path in stored.paths
        if path in specs
    }
    return WrittenModel(
        architecture,
        tokenizer,
        _layer_reader(tensors, model),
        held,
        tensors.facts(),
        read_rows=_row_reader(tensors, model),
        layout=FileLayout(
            architecture,
            {path: stored.name for stored in layout for path in stored.paths},
            for_llama_cpp,
            tensors.read_rows,
        ),
        for_llama_cpp=for_llama_cpp,
    )


def _row_reader(tensors: RowFile, model: Model) -> Callable[[str, slice], np.ndarray]:
    """Reads rows of tables and heads, which all files have as `[vocabulary, embed]`."""
    layout, specs = tensors.layout(family_of(model.architecture)), model.specs

    def read(path: str, rows: slice) -> np.ndarray:
        (stored,) = [x for x in layout if path in x.paths]
        part, spec = tensors.read_rows(stored.name, rows), specs[path]
        shape = part.T.shape if stored.transposed else part.shape
        own = {path: dataclasses.replace(spec, shape=shape)}
        value = stored.unpack(path, part, own)
        return value.T if stored.transposed else value

    return read


def _layer_reader(
    tensors: RowFile, model: Model
) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    layout, specs = tensors.layout(family_of(model.architecture)), model.specs

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
