"""Which format each parameter of a frozen base is stored in."""

from collections.abc import Collection, Mapping, Sequence

from research.config.choices import BASE_FORMAT_MODULES, KEEP, split_entry
from research.core.errors import UserError
from research.weights import parameter_paths
from research.weights.parameter_spec import Spec
from research.weights.quantized import int8_weights
from research.weights.quantized.quantized_matrix import is_quantizable
from research.weights.representations.frozen_base_format import BaseFormat, find_format


def formats_by_path(
    name: str,
    overrides: Sequence[str],
    specs: Mapping[str, Spec],
    arrays: Collection[str] = (),
) -> dict[str, BaseFormat]:
    """The format of each parameter of `specs`.

    Args:
      name: of the format of those that no override matches.
      overrides: `config.model.quantize_paths`; the last one that matches counts.
      specs: of all parameters, by path.
      arrays: paths of those that stay arrays.

    Raises:
      UserError: an override has another form, its format is unknown or does not suit
        a matrix, or its pattern matches no matrix that could be in codes.
    """
    known = [each for each in BASE_FORMAT_MODULES if each != KEEP]
    found = {path: find_format("none" if path in arrays else name) for path in specs}
    others: dict[str, str] = {}
    matrices = {
        path: spec
        for path, spec in specs.items()
        if is_quantizable(spec) and path not in arrays
    }
    for override in overrides:
        pattern, other = split_entry(override)
        if not pattern or other not in known:
            raise UserError(
                f"config.model.quantize_paths: {override!r} is not 'pattern=format' "
                f"with one of {', '.join(known)}, such as 'down_proj=int8'"
            )
        own = parameter_paths.own_patterns([pattern], matrices)
        others |= dict.fromkeys(parameter_paths.select(matrices, own), other)
    for path, other in others.items():
        found[path] = find_format(other)
        _require_format_as_named(other, path, specs[path])
    return found


def _require_format_as_named(name: str, path: str, spec: Spec) -> None:
    of_bytes = int8_weights.FORMAT
    form = find_format(name)
    if form is not of_bytes and form.specs(spec) == of_bytes.specs(spec):
        raise UserError(
            f"config.model.quantize_paths: {name} would hold {path} in int8, as it "
            "holds all embeddings and heads; write int8 or none for it"
        )
