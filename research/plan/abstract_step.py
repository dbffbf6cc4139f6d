"""The step that training would run, with shapes in place of arrays.

The tokenizer and the weights of the base model are not read: the step needs only the
size of the vocabulary and the shapes of the weights.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.config.choices import KEEP
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.hub_access import is_hub
from research.core.local_paths import split_step
from research.data.text.choose_tokenizer import open_tokenizer
from research.data.token_batch import Batch
from research.formats.base_model import Base, open_tensors
from research.formats.tensor_file import TensorFile
from research.models.architecture import Architecture
from research.models.presets import PRESETS, preset
from research.parallel import mesh as meshes
from research.runs.lineage.adapter_start import with_adapter
from research.runs.lineage.base_of_run import start_architecture
from research.runs.run_directory import RunDir
from research.tasks import task_registry
from research.tokenize.tokenizer import Tokenizer
from research.train.step import train_step
from research.train.step.definition_from_config import (
    make_step_definition,
    require_new_start,
)


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A step's definition and its abstract arguments, with their shardings.

    Attributes:
      state: first argument of the jitted train step.
      frozen: parameters that are not trained, the second argument.
      batch: third argument; its arrays are `[passes, rows, seq]`.
    """

    config: Config
    definition: train_step.StepDefinition
    state: train_step.TrainState
    frozen: dict[str, Any]
    batch: Batch

    @property
    def architecture(self) -> Architecture:
        return self.definition.model.architecture

    @property
    def tokens(self) -> int:
        """Tokens of a step, padding included."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def passes(self) -> int:
        """Forward passes of a step."""
        return self.config.data.passes_per_step


def find_architecture(config: Config, override: str = "") -> Architecture:
    """The shape of the model that `config` trains, or of the preset `override`.

    Raises:
      UserError: the model cannot be read, or there is no such preset.
    """
    if config.model.init_from and not override:
        try:
            return start_architecture(config)
        except UserError as error:
            raise UserError(
                f"{error}; only its shape is needed: --preset=NAME gives one of "
                f"{', '.join(PRESETS)}"
            ) from error
    name = override or config.model.preset
    if "/" in override or override.endswith(".gguf"):
        raise UserError(
            f"--preset={override} is no preset; a folder, a file or a model of the hub "
            f"is named by --config.model.init_from={override}"
        )
    if config.model.init_from:
        return preset(name)
    return preset(name, _vocabulary(config))


def _vocabulary(config: Config) -> int:
    """Vocabulary size of `config.text.tokenizer`; 0 if it must be fetched first."""
    asked = config.text.tokenizer
    kind, _, size = asked.partition(":")
    if kind == "bpe" and size.isdigit():
        return int(size)
    if asked == "byte" or Path(asked).exists():
        return open_tokenizer(config.text, config.data).largest_id + 1
    return 0


def make_abstract_step(
    config: Config, architecture: Architecture, mesh: Mesh
) -> AbstractStep:
    """Makes the step definition of `config` on `mesh` and its abstract arguments.

    Raises:
      UserError: rows, targets or dimensions do not fit the model or the mesh.
    """
    config = with_adapter(config, architecture=architecture)
    # A step definition reads nothing of the tokenizer.
    tensors = _kept_tensors(config) if config.model.quantize == KEEP else None
    base = Base("planned", architecture, cast(Tokenizer, None), tensors)
    objective = task_registry.make_objective(config, mesh)
    definition = make_step_definition(config, base, mesh, objective)
    # Which codes the base of another run has is not known here.
    is_known = tensors or config.model.quantize != KEEP or not config.model.init_from
    has_begun = config.run_dir and RunDir(config.run_dir).exists
    if is_known and not has_begun:
        require_new_start(config, base, definition)
    split = definition.trainable
    frozen = meshes.abstract_arrays(split.frozen_specs, mesh, split.frozen_dtype)
    data = config.data
    shape = (data.passes_per_step, data.rows_per_pass, data.seq_len)
    rows = meshes.batch_sharding(mesh, microbatched=True)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    batch = Batch(ids, ids, weights, ids, ids, ids, objective.rows_per_unit)
    # JAX gives a stand-in for a device no memory of its host.
    real = isinstance(mesh.devices.flat[0], jax.Device)
    state = train_step.abstract_state(
        definition if real else dataclasses.replace(definition, offload=False)
    )
    return AbstractStep(config, definition, state, frozen, batch)


def _kept_tensors(config: Config) -> TensorFile | None:
    """The file whose codes are kept: only it says how many bytes they take.

    Raises:
      UserError: it is not here.
    """
    start = config.model.init_from
    if not start or (not is_hub(start) and RunDir(split_step(start)[0]).is_run):
        return None
    try:
        return _open_tensors(start)
    except UserError as error:
        raise UserError(
            f"{error}: config.model.quantize=keep is planned by the types in the file; "
            "download it, or plan --config.model.quantize=nf4 or int8"
        ) from error


# A search for a layout plans many steps.
_open_tensors = functools.lru_cache(maxsize=1)(open_tensors)


def optimizer_bytes(step: AbstractStep) -> int:
    """Bytes of the optimizer's state that one device holds between steps."""
    leaves = jax.tree.leaves((step.state.opt_state, step.state.step))
    if step.definition.offload:
        leaves = [leaf for leaf in leaves if not leaf.ndim]
    return device_bytes(leaves)


def device_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of sharded shapes, without padding."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
