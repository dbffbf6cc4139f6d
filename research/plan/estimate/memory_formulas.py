"""A step's memory and collectives by formula, without a compiler.

The sizes of the step's arguments are exact, because their shapes and shardings are
known. Temporaries are an estimate of what XLA keeps on TPU; the totals were within a
tenth of the compiler's wherever the two were compared (tests/plan/test_plan_tpu.py).
"""

import math

import numpy as np
from jax.sharding import Mesh

from research.core.errors import look_up
from research.models.make_model import choose_kernel
from research.parallel import mesh as meshes
from research.plan.abstract_step import AbstractStep, device_bytes, optimizer_bytes
from research.plan.step_costs import Collective, MemoryUse
from research.tasks import task_registry
from research.tasks.head_chunk import head_chunk
from research.weights import parameter_paths

FLOAT32 = 4
# How often a step reads or writes each value of a layer's activations, and each of
# its gathered weights. Both numbers were fitted to the programs of compiled steps.
ACTIVATION_TRIPS = 12
WEIGHT_TRIPS = 6
# Copies of a matrix that its singular values need: what it is made of, its two bases,
# and the work of the solver.
DECOMPOSED = 5


def estimate_memory(step: AbstractStep) -> MemoryUse:
    """Bytes of one device, without the padding of layouts and the program code."""
    return MemoryUse(
        frozen=device_bytes(step.frozen),
        trained=device_bytes(step.state.params),
        optimizer=optimizer_bytes(step),
        batch=device_bytes(step.batch),
        temporaries=_temporaries(step),
    )


def _temporaries(step: AbstractStep) -> float:
    """Bytes of gradients, of kept activations, and of the larger of two peaks.

    One peak is at the head: its gathered matrix, and the logits of a chunk in float32
    and as gradients. The other is in the backward pass of a layer: its gathered
    matrices, those of the next layer, and its activations.
    """
    a, width = step.architecture, compute_width(step)
    tensor, tokens = step.definition.mesh.shape["tensor"], device_tokens(step)
    # Gradients are summed in float32, whatever the dtype of the parameters.
    share = FLOAT32 // step.definition.trainable.dtype.itemsize
    gradients = share * device_bytes(step.state.params)
    remat = step.config.model.remat
    kept = tokens * a.layers * width * kept_per_token(step, remat)
    head = a.embed * a.vocab / tensor
    logits = min(chunk_size(step), tokens) * a.vocab / tensor
    at_head = head * width + logits * (FLOAT32 + width)
    matrices = sum(_gathered_matrices(step))
    at_layer = width * (2 * matrices + tokens * _used_per_token(step))
    at_layer += _mask_bytes(step)
    if step.passes > 1:  # The sum over the passes so far is kept, too.
        gradients *= 2
    at_update = gradients
    if step.definition.offload:  # All moments return to the device at once.
        at_update += device_bytes(step.state.opt_state)
    return max(gradients + kept + max(at_head, at_layer), at_update)


def peaks_between_steps(step: AbstractStep) -> dict[str, float]:
    """Bytes of one device in the phases that lie between steps, by phase.

    The start needs no more than the state that it makes: parameters are read one at a
    time, and donated to the state; see `_start` for adapters that decompose matrices.
    The report has no optimizer state, and reads the
    base model in place of the trained one, so samples need more than it does.
    """
    a, width = step.architecture, compute_width(step)
    tensor = step.definition.mesh.shape["tensor"]
    held = device_bytes(step.frozen) + device_bytes(step.state.params)
    held += optimizer_bytes(step)
    head = width * a.embed * a.vocab / tensor
    logits = min(chunk_size(step), device_tokens(step)) * a.vocab / tensor
    weights = 2 * width * sum(_gathered_matrices(step))

    def layer(tokens: float) -> float:
        return weights + tokens * width * _used_per_token(step)

    # A prompt is one row, which no axis but `tensor` splits.
    prompt = task_registry.find_kind(step.config).longest_prompt(step.config)
    slots = prompt + step.config.eval.max_new_tokens
    cache = 2 * width * a.layers * slots * a.kv_heads * a.head_dim / tensor
    start = {"start": _start(step)} if _decomposes(step) else {}
    return start | {
        "evaluation": held + max(layer(device_tokens(step)), head + FLOAT32 * logits),
        "samples": held + cache + max(layer(prompt), head),
    }


def _decomposes(step: AbstractStep) -> bool:
    kind = step.definition.trainable.kind
    return kind is not None and kind.decomposes


def _start(step: AbstractStep) -> float:
    """Bytes of adapters that start from a decomposition of each matrix.

    The factors are there twice, as they are made and as they are placed. One matrix at
    a time is whole on every device, in float32, with `DECOMPOSED` others of its size.
    A kind that starts from what codes have lost has the weights of one path beside it,
    in the dtype of arrays of the base.
    """
    split, specs = step.definition.trainable, step.definition.model.specs
    adapted = {path: specs[path] for path in split.adapters(split.specs)}
    weights = meshes.abstract_arrays(adapted, step.definition.mesh, split.frozen_dtype)
    needed = 0.0
    for path, spec in adapted.items():
        matrix = FLOAT32 * math.prod(spec.as_matrix.shape[-2:])
        read = device_bytes(weights[path]) if split.kind.reads_lost else 0
        needed = max(needed, read + (1 + DECOMPOSED) * matrix)
    return device_bytes(step.frozen) + 2 * device_bytes(step.state.params) + needed


def _mask_bytes(step: AbstractStep) -> float:
    """Bytes of cuDNN's mask: three for each pair of query and key in a row."""
    mesh = step.definition.mesh
    choice = choose_kernel(
        step.config.model,
        step.architecture,
        mesh,
        length=step.config.data.seq_len,
        rows=step.config.data.rows_per_pass,
    )
    length = step.config.data.seq_len
    # A program by the places of documents has room for it, too: see cudnn_attention.
    has_mask = choice.kernel in ("cudnn", "cudnn_mask")
    return 3 * device_tokens(step) * length if has_mask else 0.0


def _gathered_matrices(step: AbstractStep) -> tuple[float, float]:
    """Scalars of one layer on one device where they are used: all others, and experts.

    Experts lie whole, but on other devices along `expert` and `tensor`.
    """
    a, shape = step.architecture, step.definition.mesh.shape
    dense = (a.matrices_per_layer - a.experts_per_layer) / shape["tensor"]
    return dense, a.experts_per_layer / (shape["tensor"] * shape["expert"])


def kept_per_token(step: AbstractStep, remat: str) -> float:
    """Values per token that a layer's forward pass keeps for its backward pass.

    `full` keeps the layer's input. `dots` also keeps the products with weights:
    queries, keys, values, the attention's result, gate and up. `none` also keeps what
    attention needs; norms and what the gate makes are computed again, but a router's
    input is kept. With an `expert` axis it keeps the tokens that a device gathers, and
    nothing that experts make of them.
    """
    a, shape = step.architecture, step.definition.mesh.shape
    tensor = shape["tensor"]
    tile = 128 if step.definition.mesh.devices.flat[0].platform == "tpu" else 1
    # A TPU's attention kernel pads each head to whole tiles.
    head_dim = math.ceil(a.head_dim / tile) * tile
    queries, keys = (n * head_dim / tensor for n in (a.heads, a.kv_heads))
    products = 2 if a.gated_mlp else 1
    mlp, routed = a.mlp / tensor, 0
    if a.experts:
        mlp = (a.experts.chosen if shape["expert"] == 1 else 0) * a.mlp
        routed = a.embed
    met = shape["expert"] * a.embed if shape["expert"] > 1 else 0
    kept = {
        "full": a.embed,
        "dots": 2 * a.embed + queries + 2 * keys + products * mlp,
        "none": 2 * a.embed + routed + 2 * (queries + keys) + products * mlp + met,
    }
    return look_up(kept, remat, "config.model.remat")


def _used_per_token(step: AbstractStep) -> float:
    """Values per token of a device that a layer holds while it computes.

    Beside what `none` keeps these are the inputs of products that are computed again.
    With an `expert` axis also what all have made of the tokens that it gathers, and the
    gradients of both; and the rows of one device's tokens, and their gradients.
    """
    a, shape = step.architecture, step.definition.mesh.shape
    ways = shape["expert"]
    rows, met = _rows_per_token(step), ways * a.embed
    more = 3 * met + 2 * rows if ways > 1 else rows
    again = a.embed if a.experts else 2 * a.embed + a.mlp / shape["tensor"]
    return kept_per_token(step, "none") + again + more


def _rows_per_token(step: AbstractStep) -> float:
    """Values of the rows in which a token's experts are computed, but those kept."""
    a = step.architecture
    if a.experts is None:
        return 0.0
    is_kept = step.definition.mesh.shape["expert"] == 1  # Outputs of gate and up.
    return a.experts.chosen * ((1 if is_kept else 3) * a.mlp + 2 * a.embed)


def device_tokens(step: AbstractStep) -> float:
    """Tokens of one forward pass on one device."""
    data = step.config.data
    shards = math.prod(meshes.shards(step.definition.mesh))
    return data.rows_per_pass * data.seq_len / shards


def compute_width(step: AbstractStep) -> int:
    """Bytes of one value in the compute dtype."""
    return step.definition.model.options.dtype.itemsize


def head_chunks(step: AbstractStep) -> int:
    """Products with the head in a forward pass, if every token is trained."""
    return math.ceil(device_tokens(step) / chunk_size(step))


def chunk_size(step: AbstractStep) -> int:
    """Positions of a device in one product with the head."""
    mesh = step.definition.mesh
    return step.config.model.loss_chunk or head_chunk(step.architecture.vocab, mesh)


def estimate_moved(step: AbstractStep) -> float:
    """Bytes that a step reads from and writes to one device's memory."""
    a, width = step.architecture, compute_width(step)
    tensor, tokens = step.definition.mesh.shape["tensor"], device_tokens(step)
    rows = step.definition.mesh.shape["expert"] * _rows_per_token(step)
    activations = tokens * (kept_per_token(step, "none") + rows) * ACTIVATION_TRIPS
    weights = sum(_gathered_matrices(step)) * WEIGHT_TRIPS
    head = a.embed * a.vocab / tensor * head_chunks(step) * WEIGHT_TRIPS / 2
    logits = tokens * a.vocab / tensor * (FLOAT32 / width + 1) * 2
    a_pass = width * (a.layers * (activations + weights) + head + logits)
    # Adam reads parameter, gradient and moments, and writes all but the gradient.
    state = (step.state.params, step.state.opt_state)
    update = 2 * device_bytes(state) + device_bytes(step.state.params)
    return step.passes * a_pass + update


def estimate_collectives(step: AbstractStep) -> list[Collective]:
    """The collectives that a device takes part in during a step."""
    mesh, passes = step.definition.mesh, step.passes
    a, width = step.architecture, compute_width(step)
    shape, tokens = mesh.shape, device_tokens(step)
    dense, experts = _gathered_matrices(step)
    head, chunks = a.embed * a.vocab / shape["tensor"], head_chunks(step)
    stream = tokens * a.embed * width
    again = step.config.model.remat == "full"
    found: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], nbytes: float, times: float) -> None:
        split = tuple(axis for axis in axes if shape[axis] > 1)
        if split and nbytes:
            members = axis_members(mesh, split)
            found.append(Collective(kind, split, round(nbytes), times, members))

    # The forward and the backward pass each gather a layer's weights.
    split = meshes.RULES["embed"]
    add("all-gather", split, dense * width, 2 * a.layers * passes)
    add("all-gather", ("fsdp",), experts * width, 2 * a.layers * passes)
    add("all-gather", split, head * width, chunks * passes)
    add("all-to-all", split, stream, passes)
    # Tokens come to experts, and what these make returns; both also as gradients.
    met = stream * shape["expert"]
    for kind in ("all-gather", "reduce-scatter"):
        add(kind, ("expert",), met, (2 + again) * a.layers * passes)
    # Attention and MLP each end with a sum over `tensor`; the backward pass of each
    # has another one.
    add("all-reduce", ("tensor",), stream, (4 + again) * a.layers * passes)
    rows = tokens * shape["context"] * a.kv_heads * a.head_dim / shape["tensor"]
    add("all-gather", ("context",), 2 * rows * width, (1 + again) * a.layers * passes)
    add("reduce-scatter", ("context",), 2 * rows * width, a.layers * passes)
    if step.frozen:
        dense, experts, head, times = *_adapters(step), 0.0, 1
    else:
        times = a.layers
    add("reduce-scatter", split, dense * width, times * passes)
    add("reduce-scatter", ("fsdp",), experts * width, times * passes)
    add("reduce-scatter", split, head * width, chunks * passes)
    reduced = _reduced_bytes(step, times * dense, times * experts, head)
    for axis in ("context", "data", "replica"):
        add("all-reduce", (axis,), reduced, passes)
    return found


def _adapters(step: AbstractStep) -> tuple[float, float]:
    """Scalars of adapters on one device before `fsdp` splits them, as
    `_gathered_matrices` has those of a layer.
    """
    shape, specs = step.definition.mesh.shape, step.definition.model.specs
    count = {True: 0, False: 0}
    for path, factors in step.state.params.items():
        count["expert" in specs[path].axes] += parameter_paths.count(factors)
    tensor = shape["tensor"]
    return count[False] / tensor, count[True] / (tensor * shape["expert"])


def _reduced_bytes(
    step: AbstractStep, dense: float, experts: float, head: float
) -> float:
    """Bytes of gradients that replicas of the parameters sum after each pass.

    Gradients are scattered over `fsdp` first, those of replicated adapters too. A head
    that is sharded over `fsdp` is reduced after every chunk; otherwise it is reduced
    once, in float32 as the embedding is.
    """
    width, shape = compute_width(step), step.definition.mesh.shape
    fsdp, split = (
        shape["fsdp"],
        meshes.ways(step.definition.mesh, meshes.RULES["embed"]),
    )
    body = width * (dense / split + experts / fsdp)
    if split == 1:
        return body + 2 * head * FLOAT32
    return body + width * head * head_chunks(step) / split


def axis_members(mesh: Mesh, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Indices of the devices that differ from the first one only along `axes`."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    return tuple(ids[index].ravel().tolist())
