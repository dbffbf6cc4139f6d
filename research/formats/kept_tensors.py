"""Which matrices of a file can be kept in its codes, and how they are read."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from research.config.choices import KEEP
from research.core.errors import UserError
from research.formats.tensor_file import CodedFile, TensorFile, require_finite
from research.models.architecture import Architecture
from research.models.families.family_registry import family_of
from research.models.families.stored_tensor import StoredTensor
from research.weights.parameter_spec import Spec
from research.weights.quantized.block_kind import BlockKind, common_kind
from research.weights.quantized.kept_codes import KeptMatrix, kept_parts
from research.weights.quantized.quantized_matrix import is_quantizable

SHORTEST = 8  # Inputs in a block; shorter ones have more scales than codes.


def kept_kinds(
    quantize: str,
    tensors: TensorFile | None,
    architecture: Architecture,
    specs: Mapping[str, Spec],
) -> dict[str, BlockKind]:
    """By path, the codes of the matrices that `config.model.quantize=keep` keeps.

    Others stay arrays: those that the file has as numbers, and those in which the
    layers have types without a common one. `load_frozen` says which.

    Raises:
      UserError: the codes of a matrix do not lie along its inputs, or not in blocks.
    """
    if quantize != KEEP or not isinstance(tensors, CodedFile):
        return {}
    return _kinds(tensors, architecture, specs)


def require_kept(
    quantize: str, tensors: TensorFile | None, kept: Mapping[str, BlockKind]
) -> None:
    """Refuses `config.model.quantize=keep` of a new run that would keep nothing.

    Raises:
      UserError: the base has no codes.
    """
    if quantize == KEEP and not kept:
        place = "a base of random weights" if tensors is None else tensors.place
        raise UserError(
            f"config.model.quantize=keep: {place} holds no matrix in codes that could "
            "be kept; use --config.model.quantize=nf4, int4, int8 or none"
        )


def _kinds(
    tensors: CodedFile, architecture: Architecture, specs: Mapping[str, Spec]
) -> dict[str, BlockKind]:
    layout, found = tensors.layout(family_of(architecture)), {}
    there = tensors.shapes().keys()
    for stored in (x for x in layout if {*x.paths} & specs.keys()):
        names = [name for name, _ in stored.names(specs) if name in there]
        kinds = [tensors.block_kind(name) for name in names]
        if not kinds or None in kinds:
            continue
        for path in stored.paths:
            if not is_quantizable(specs[path]):
                continue
            kind = common_kind(kinds)
            if kind is not None:
                _require_blocks(path, names[0], specs[path], stored, kind)
                found[path] = kind
    return found


def _require_blocks(
    path: str, name: str, spec: Spec, stored: StoredTensor, kind: BlockKind
) -> None:
    problem = ""
    if not (stored.transposed or spec.is_table):
        problem = "lie along its outputs"
    elif kind.block < SHORTEST:
        problem = (
            f"have a scale for each {kind.block} inputs: rows that no block divides, "
            "or act-order"
        )
    if problem:
        raise UserError(
            f"config.model.quantize=keep: the codes ({kind.name}) of {name}, which is "
            f"{path}, {problem}; use --config.model.quantize=nf4, int8 or none"
        )


def say_what_is_kept(
    frozen: Mapping[str, Any], specs: Mapping[str, Spec], dtype: Any
) -> None:
    """Logs which matrices of a model have the codes of their file, and which not."""
    kinds = {p: x.kind.name for p, x in frozen.items() if isinstance(x, KeptMatrix)}
    plain = [p for p in specs if is_quantizable(specs[p]) and p not in kinds]
    said = ", ".join(f"{n} {k}" for k, n in _counted(kinds.values()))
    logging.info("weights: codes of the file are kept in %s matrices", said)
    if plain:
        logging.warning(
            "weights: %s %s not codes of one type in the file, and %s %s",
            ", ".join(plain), "is" if len(plain) == 1 else "are",
            "stays" if len(plain) == 1 else "stay", dtype,
        )  # fmt: skip


def _counted(names: Any) -> list[tuple[str, int]]:
    names = list(names)
    return [(name, names.count(name)) for name in sorted({*names})]


def read_kept(
    tensors: CodedFile,
    stored: StoredTensor,
    path: str,
    specs: Mapping[str, Spec],
    kept: KeptMatrix,
    wanted: Callable[[tuple[int, ...]], bool],
) -> Iterator[tuple[tuple[int, ...], list[np.ndarray]]]:
    """The arrays of `kept`, the specs of `path`, by index into its first axes.

    Only those of `wanted` indices are read. Rows change their order where the file has
    another one (heads of llama.cpp's Llama, fused matrices); no number is touched.

    Raises:
      UserError: a scale is NaN or infinite.
    """
    outer = kept.scales.shape[kept.stack : -1]
    rows = None if specs[path].is_table else _rows_in_file(stored, path, specs)
    for name, index in stored.names(specs):
        if not wanted(index):
            continue
        matrix = tensors.codes(name)
        for part in (matrix.scales, matrix.offsets):
            if part is not None:
                require_finite(tensors, name, part)
        matrix = matrix.widened(kept.kind)
        if rows is not None:
            matrix = matrix.rows(rows)
        yield (
            index,
            [
                part.reshape(*part.shape[:-2], *outer, part.shape[-1])
                for part in kept_parts(matrix)
            ],
        )


def _rows_in_file(
    stored: StoredTensor, path: str, specs: Mapping[str, Spec]
) -> np.ndarray:
    """For each output of `path`, its row in the tensors of the file."""
    columns = {name: _with_one_input(specs[name]) for name in stored.paths}
    shape = stored.shape(columns)
    rows = np.broadcast_to(np.arange(shape[-2])[:, None], shape)
    found = stored.unpack(path, rows, columns)
    return found.reshape(-1, math.prod(_outputs(specs[path])))[0]


def _with_one_input(spec: Spec) -> Spec:
    stack = spec.stacked
    return Spec(
        (*spec.shape[:stack], 1, *_outputs(spec)),
        (*spec.axes[: stack + 1], *spec.axes[stack + spec.n_in :]),
        1,
        stack,
    )


def _outputs(spec: Spec) -> tuple[int, ...]:
    return spec.shape[spec.stacked + spec.n_in :]
