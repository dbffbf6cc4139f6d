"""The model that a config describes, for the devices of a mesh."""

import functools
import logging

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from research.config.data_knobs import DataConfig
from research.config.knob_groups import ModelConfig
from research.core.errors import UserError
from research.models import attention_kernels
from research.models.architecture import Architecture
from research.models.attention import ScoreRule
from research.models.attention_sharding import make_attend
from research.models.parts.expert_dispatch import mix_experts
from research.models.parts.expert_kernels import choose_expert_kernel
from research.models.parts.expert_sharding import make_mix_experts
from research.models.transformer import Model, Options
from research.parallel import mesh as meshes


def make_model(
    config: ModelConfig,
    architecture: Architecture,
    mesh: Mesh,
    *,
    length: int,
    rows: int,
) -> Model:
    """Makes no array; the log names the attention kernel.

    A forward pass has `rows` rows of `length` tokens, over all devices.

    Raises:
      UserError: the devices cannot run the kernel that `config` names, a parameter
        does not divide over the mesh, or there is an `expert` axis and no expert.
    """
    choice = choose_kernel(config, architecture, mesh, length=length, rows=rows)
    _log_once("attention", choice)
    platform = mesh.devices.flat[0].platform
    product = choose_expert_kernel(config.expert_kernel, platform)
    if architecture.experts:
        _log_once("experts", product)
    alone = functools.partial(mix_experts, kernel=product.kernel)
    options = Options(
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        scan_unroll=config.scan_unroll,
        attend=make_attend(mesh, choice.kernel, config.attention_block),
        mix_experts=make_mix_experts(mesh, alone),
        constrain=meshes.constrain(mesh),
    )
    model = Model(architecture, options)
    experts = mesh.shape["expert"]
    if experts > 1 and not architecture.experts:
        raise UserError(
            f"config.mesh.expert is {experts}, and the model has no experts: set it to "
            "1 and give its devices to config.mesh.fsdp or config.mesh.data"
        )
    meshes.shardings(model.specs, mesh)
    return model


def model_of_run(
    config: ModelConfig, data: DataConfig, architecture: Architecture, mesh: Mesh
) -> Model:
    """`make_model` for the forward passes of a run on `data`."""
    return make_model(
        config, architecture, mesh, length=data.seq_len, rows=data.rows_per_pass
    )


@functools.cache  # A start makes the model again once its data is counted.
def _log_once(what: str, choice: attention_kernels.KernelChoice) -> None:
    logging.info("%s: %s (%s)", what, choice.kernel, choice.reason)


def choose_kernel(
    config: ModelConfig,
    architecture: Architecture,
    mesh: Mesh,
    *,
    length: int,
    rows: int,
) -> attention_kernels.KernelChoice:
    """The attention kernel for the devices of a mesh; see `make_model`.

    Raises:
      UserError: they cannot run the kernel that `config` names.
    """
    device = mesh.devices.flat[0]
    return attention_kernels.choose(
        config.attention,
        device.platform,
        dtype=jnp.dtype(config.dtype),
        head_dim=architecture.head_dim,
        length=length,
        rows=max(1, rows // meshes.batch_shards(mesh)),
        capability=getattr(device, "compute_capability", "0.0"),
        rule=_rule_of_scores(architecture),
    )


def _rule_of_scores(a: Architecture) -> ScoreRule:
    sinks = jax.ShapeDtypeStruct((a.heads,), jnp.float32) if a.attention_sinks else None
    return ScoreRule(max(a.windows), a.attention_softcap, sinks=sinks)
