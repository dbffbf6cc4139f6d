"""From a config and an opened base model to a step definition and its parameters."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.config.run_config import Config
from research.core.errors import UserError
from research.formats.base_model import Base
from research.formats.load_parameters import load_params
from research.models import attention_kernels
from research.models.architecture import Architecture
from research.models.attention_sharding import make_attend
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes
from research.train.step import optimizers
from research.train.step.train_step import StepDefinition, abstract_params
from research.weights import trainable

Params = dict[str, Any]


def make_step_definition(
    config: Config, base: Base, mesh: Mesh, groups: int = 1
) -> StepDefinition:
    """Model, optimizer and split of the parameters; no array is made.

    `groups`: how many groups losses are reported by.

    Raises:
      UserError: rows, targets or dimensions do not fit the model or the mesh.
    """
    _check_rows(config, base, mesh)
    options = Options(
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        attend=make_attend(
            mesh, _announced_kernel(config, base, mesh), config.model.attention_block
        ),
        constrain=meshes.constrain(mesh),
    )
    model = Model(base.architecture, options)
    meshes.shardings(model.specs, mesh)
    split = trainable.make(config, model.specs)
    return StepDefinition(
        model=model,
        trainable=split,
        optimizer=optimizers.make_optimizer(config.optim, config.steps, split.specs),
        mesh=mesh,
        loss_chunk=config.model.loss_chunk,
        groups=groups,
        z_loss=config.optim.z_loss,
        seed=config.seed,
        offload=config.runtime.offload_optimizer,
        grad_norms=config.runtime.grad_norms,
    )


def choose_kernel(
    config: Config, architecture: Architecture, mesh: Mesh
) -> attention_kernels.Choice:
    """The attention kernel for the devices of this mesh.

    Raises:
      UserError: they cannot run the one that is asked for.
    """
    device = mesh.devices.flat[0]
    return attention_kernels.choose(
        config.model.attention,
        device.platform,
        dtype=jnp.dtype(config.model.dtype),
        head_dim=architecture.head_dim,
        length=config.data.seq_len,
        rows=config.data.rows_per_pass // meshes.batch_shards(mesh),
        capability=getattr(device, "compute_capability", "0.0"),
    )


def _announced_kernel(config: Config, base: Base, mesh: Mesh) -> str:
    choice = choose_kernel(config, base.architecture, mesh)
    logging.info("attention: %s (%s)", choice.kernel, choice.reason)
    return choice.kernel


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
    if base.tokenizer.largest_id >= base.architecture.vocab:
        raise UserError(
            f"the tokenizer has ids up to {base.tokenizer.largest_id} and the model "
            f"{base.architecture.vocab} of them: they do not belong together"
        )
    shards = meshes.batch_shards(mesh)
    rows = config.data.rows_per_pass
    if rows % shards:
        raise UserError(
            f"a forward pass has {rows} rows (config.data.microbatch_size, or "
            f"batch_size) and the mesh splits a batch into {shards} "
            f"({'*'.join(meshes.BATCH_AXES)}): use a multiple of {shards}"
        )


def load_base(definition: StepDefinition, base: Base, dtype: Any) -> Params:
    """The base model's parameters in their shardings: read, or drawn at random."""
    shardings = meshes.shardings(definition.model.specs, definition.mesh)
    if base.tensors is not None:
        return load_params(base.tensors, definition.model.specs, shardings, dtype)

    def init(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), definition.model.init(key))

    return jax.jit(init, out_shardings=shardings)(jax.random.key(definition.seed))


def load_start(
    definition: StepDefinition, base: Base, frozen: Params | None = None
) -> tuple[Params, Params]:
    """What is trained, at its start, and what is frozen (or is there already)."""
    if definition.trainable.frozen_specs:
        frozen = frozen or load_base(
            definition, base, definition.trainable.frozen_dtype
        )
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, abstract_params(definition)
        )
        init = jax.jit(
            lambda key: definition.trainable.init(key, frozen), out_shardings=shardings
        )
        return init(jax.random.key(definition.seed)), frozen
    return load_base(definition, base, definition.trainable.dtype), {}
