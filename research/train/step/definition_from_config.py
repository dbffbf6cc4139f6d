"""From a config and an opened base model to a step definition and its parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.config.knob_groups import LoRAConfig
from research.config.run_config import Config
from research.core.errors import UserError
from research.data.metric_sums import Objective
from research.data.token_batch import Batch
from research.formats.base_model import Base
from research.formats.kept_tensors import kept_kinds, require_kept
from research.formats.load_parameters import load_base, load_frozen, load_param
from research.formats.peft.adapter_folder import AdapterFolder
from research.models.families.family_registry import family_of
from research.models.make_model import model_of_run
from research.parallel import mesh as meshes
from research.train.step import optimizers
from research.train.step.input_directions import measure_directions
from research.train.step.train_step import StepDefinition, abstract_params
from research.weights import trainable
from research.weights.representations.leaf import Matrix
from research.weights.representations.lost_in_codes import LostInCodes

Array = jax.Array
Params = dict[str, Any]


def make_step_definition(
    config: Config, base: Base, mesh: Mesh, objective: Objective
) -> StepDefinition:
    """Model, optimizer and split of the parameters; no array is made.

    `objective` is what the step differentiates and reports.

    Raises:
      UserError: rows, targets or dimensions do not fit the model or the mesh, or a
        model with experts is to multiply bytes.
    """
    _check_rows(config, base, mesh)
    rows, batch_size = config.data.rows_per_pass, config.data.batch_size
    meshes.require_whole_units(mesh, rows, objective.rows_per_unit, batch_size)
    if config.model.int8_products and base.architecture.experts:
        raise UserError(
            "config.model.int8_products=True: this model has experts, whose products "
            "have no form in bytes; set --config.model.int8_products=False"
        )
    model = model_of_run(config.model, config.data, base.architecture, mesh)
    kept = kept_kinds(
        config.model.quantize, base.tensors, base.architecture, model.specs
    )
    split = trainable.make(
        config.trainable, config.model, config.lora, model.specs, kept
    )
    return StepDefinition(
        model=model,
        trainable=split,
        optimizer=optimizers.make_optimizer(config.optim, config.steps, split.specs),
        mesh=mesh,
        objective=objective,
        seed=config.seed,
        offload=config.runtime.offload_optimizer,
        grad_norms=config.runtime.grad_norms,
        noise_alpha=config.optim.neftune_noise_alpha,
        int8_products=config.model.int8_products,
    )


def require_new_start(config: Config, base: Base, definition: StepDefinition) -> None:
    """Refuses what only a run that has not begun is asked: older runs may have it.

    Raises:
      UserError: a rank is above those of its matrix, `keep` would keep no codes, or
        none of the targets of LoftQ or QERA is in codes.
    """
    specs, quantize = definition.model.specs, config.model.quantize
    kept = kept_kinds(quantize, base.tensors, base.architecture, specs)
    require_kept(quantize, base.tensors, kept)
    if config.trainable == "lora":
        trainable.require_new_ranks(config.lora, specs)
        _require_lost(config, definition.trainable)


def _require_lost(config: Config, split: trainable.Trainable) -> None:
    targets = split.specs.keys() - split.full
    if split.kind.reads_lost and not any(map(split.is_in_codes, targets)):
        raise UserError(
            f"config.lora.kind={config.lora.kind} starts at what codes have lost, and "
            f"config.model.quantize_paths={config.model.quantize_paths} keeps each of "
            "its targets as an array: drop an entry, or set --config.lora.kind=lora"
        )


def _check_rows(config: Config, base: Base, mesh: Mesh) -> None:
    longest = base.architecture.max_position
    stretches = mesh.shape["context"]
    if config.data.seq_len % stretches:
        raise UserError(
            f"config.data.seq_len is {config.data.seq_len}, and config.mesh.context="
            f"{stretches} splits each row: use a multiple of {stretches}"
        )
    if config.data.seq_len > longest:
        raise UserError(
            f"config.data.seq_len is {config.data.seq_len}; the base model's context "
            f"is {longest}"
        )
    if config.eval.max_new_tokens >= longest:
        raise UserError(
            f"config.eval.max_new_tokens is {config.eval.max_new_tokens}; it must be "
            f"less than the base model's context, {longest}"
        )


def load_start(
    definition: StepDefinition,
    base: Base,
    frozen: Params | None = None,
    continued: LoRAConfig | None = None,
    first_batches: Callable[[], Sequence[Batch]] | None = None,
) -> tuple[Params, Params]:
    """The trained parameters at their start, and the frozen ones.

    Args:
      definition: of the step.
      base: the base model.
      frozen: the frozen parameters, where they are loaded already.
      continued: names an adapter folder whose values are the start; None for none.
      first_batches: gives the run's first batches on its devices, for adapters that
        start from them; None where a checkpoint will replace the start.

    Raises:
      UserError: the adapter cannot be read, or is not what the config was made for.
    """
    split, model, mesh = definition.trainable, definition.model, definition.mesh
    if not split.frozen_specs:
        return load_base(base, model, mesh, split.dtype, definition.seed), {}
    frozen = frozen or load_frozen(base, model, mesh, split, definition.seed)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(definition))
    if continued and continued.init_from:
        adapter = AdapterFolder(continued.init_from, base.architecture, model.specs)
        if adapter.lora_config(continued) != continued:
            raise UserError(
                f"the adapter {continued.init_from} has other targets, ranks or alphas "
                "than when the run began: bring it back, or choose another "
                "--config.run_dir"
            )
        adapter.warn_of_other_base(base)
        adapter.require_base(base.tensors.on(mesh))
        return adapter.load(shardings), frozen
    reads = split.kind.reads_inputs or split.kind.reads_lost
    if reads and first_batches is None:
        return _zeros(definition, shardings), frozen
    inputs = {}
    adapters = split.adapters(split.specs)
    if split.kind.reads_inputs:
        inputs = measure_directions(definition, frozen, first_batches(), adapters)
    key = jax.random.key(definition.seed)
    if split.kind.reads_lost:
        start = split.init(key, _LostByPath(definition, base, frozen), inputs)
        return jax.jit(lambda x: x, out_shardings=shardings)(start), frozen
    init = jax.jit(split.init, out_shardings=shardings)
    return init(key, frozen, inputs), frozen


class _LostByPath(Mapping[str, Any]):
    """The `LostInCodes` of each adapted path, and frozen parameters at other paths.

    A lookup reads the weights of its path, so one path at a time is in memory.
    """

    def __init__(self, definition: StepDefinition, base: Base, frozen: Params):
        self._definition, self._base, self._frozen = definition, base, frozen

    def __getitem__(self, path: str) -> LostInCodes | Matrix:
        split, codes = self._definition.trainable, self._frozen[path]
        if path in split.full:
            return codes
        return lost_in_codes(self._definition, self._base, path, codes)

    def __contains__(self, path: object) -> bool:
        return path in self._frozen

    def get(self, path: str, default: Any = None) -> Any:
        """That of `Mapping` takes a KeyError of a file for a path that is not there."""
        if path not in self:
            return default
        return self[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._frozen)

    def __len__(self) -> int:
        return len(self._frozen)


def _zeros(definition: StepDefinition, shardings: Any) -> Params:
    like = abstract_params(definition)

    def make() -> Params:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    return jax.jit(make, out_shardings=shardings)()


def lost_in_codes(
    definition: StepDefinition, base: Base, path: str, codes: Matrix
) -> LostInCodes:
    """The weight at `path` in its file, beside the codes that stand for it."""
    model, mesh = definition.model, definition.mesh
    sharding = meshes.shardings({path: model.specs[path]}, mesh)[path]
    family, tensors = family_of(model.architecture), base.tensors.on(mesh)
    dtype = definition.trainable.frozen_dtype
    weight = load_param(tensors, family, path, model.specs, sharding, dtype)
    return LostInCodes(weight, codes)
