"""The model that a config describes, for the devices of a mesh."""

import logging

import jax.numpy as jnp
from jax.sharding import Mesh

from research.config.run_config import Config
from research.models import attention_kernels
from research.models.architecture import Architecture
from research.models.attention_sharding import make_attend
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes


def make_model(config: Config, architecture: Architecture, mesh: Mesh) -> Model:
    """Makes no array; the log names the attention kernel.

    Raises:
      UserError: the devices cannot run the kernel that `config` names, or a
        parameter does not divide over the mesh.
    """
    choice = choose_kernel(config, architecture, mesh)
    logging.info("attention: %s (%s)", choice.kernel, choice.reason)
    options = Options(
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        scan_unroll=config.model.scan_unroll,
        attend=make_attend(mesh, choice.kernel, config.model.attention_block),
        constrain=meshes.constrain(mesh),
    )
    model = Model(architecture, options)
    meshes.shardings(model.specs, mesh)
    return model


def choose_kernel(
    config: Config, architecture: Architecture, mesh: Mesh
) -> attention_kernels.KernelChoice:
    """The attention kernel for the devices of a mesh.

    Raises:
      UserError: they cannot run the kernel that `config` names.
    """
    device = mesh.devices.flat[0]
    return attention_kernels.choose(
        config.model.attention,
        device.platform,
        dtype=jnp.dtype(config.model.dtype),
        head_dim=architecture.head_dim,
        length=config.data.seq_len,
        rows=max(1, config.data.rows_per_pass // meshes.batch_shards(mesh)),
        capability=getattr(device, "compute_capability", "0.0"),
    )
