"""The device mesh, and the one table from logical axis names to mesh axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.config.field_names import shell_flag
from research.config.knob_groups import MeshConfig
from research.core.errors import UserError
from research.weights import parameter_paths
from research.weights.parameter_spec import Spec

Array = jax.Array

# The axes of a mesh, outermost first: neighbours in `context` exchange most, replicas
# least. `expert` splits the batch as `fsdp` does: its devices exchange tokens only
# where they meet experts.
AXES = ("replica", "data", "fsdp", "expert", "tensor", "context")
BATCH_AXES = ("replica", "data", "fsdp", "expert")
# JAX's name for memory of a host that its devices can read directly.
HOST_MEMORY = "pinned_host"

# The mesh axes over which each logical axis of a parameter or an activation is split.
# An axis that is missing here is an error, because replicating it silently would hide
# the omission.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "vocab": "tensor",
    "embed": ("fsdp", "expert"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": ("expert", "tensor"),
    "expert_embed": "fsdp",
    "expert_mlp": None,
    "choices": None,
    "head_dim": None,
    "norm": None,
    "positions": None,
    "layers": None,
    "groups": None,
    "rank": None,
    "batch": BATCH_AXES,
    "length": "context",
    "keys": None,
    "hidden": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with `AXES` over all devices.

    On several slices, or on as many hosts as there are replicas, each slice or host
    holds whole replicas, so only replicas exchange data over the slower network
    between them.

    Args:
      config: the size of each axis; one may be -1, which takes the rest.
      devices: by default all devices of all processes.

    Raises:
      UserError: the sizes do not multiply to the number of devices, would split an
        axis other than `replica` over slices, or do not fit the devices' network.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    if any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh {_shown(sizes)}: a size is -1 (the rest) or at least 1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh {_shown(sizes)}: only one axis can be -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"mesh {_shown(sizes)} does not fit {len(devices)} devices; the sizes must "
            f"multiply to {len(devices)}, and one of them may be -1"
            f"{_nearest_sizes(sizes, len(devices))}"
        )
    if free:
        sizes[free[0]] = len(devices) // fixed
    shape = tuple(sizes[axis] for axis in AXES)
    granules = _granules(devices, sizes["replica"])
    if sizes["replica"] % granules:
        raise UserError(
            f"mesh {_shown(sizes)} on {granules} slices: other axes would cross the "
            f"network between them; use config.mesh.replica={granules} or a multiple"
        )
    try:
        return Mesh(_lay(shape, devices, granules), AXES)
    except NotImplementedError as error:
        raise UserError(
            f"mesh {_shown(sizes)} cannot be laid on the network of {len(devices)} "
            f"{devices[0].device_kind}: use sizes that divide the lengths of its torus"
        ) from error


def _nearest_sizes(sizes: Mapping[str, int], devices: int) -> str:
    """Advice: the sizes that fit when one axis changes; empty where none does."""
    fitting = []
    for axis, asked in sizes.items():
        others = math.prod(n for name, n in sizes.items() if name != axis and n != -1)
        if asked == -1 or devices % others:
            continue
        exact = -1 not in sizes.values()
        possible = [devices // others] if exact else divisors(devices // others)
        nearest = min(possible, key=lambda n: abs(n - asked))
        fitting.append(f"config.mesh.{axis}={nearest}")
    return f": try {' or '.join(fitting)}" if fitting else ""


def _lay(shape: Sequence[int], devices: Sequence[Any], granules: int) -> np.ndarray:
    """Devices in `shape`, so that neighbours in the mesh are neighbours in the network.

    Raises:
      NotImplementedError: JAX cannot map this shape to the network.
    """
    if granules == 1:
        return mesh_utils.create_device_mesh(
            shape, devices, allow_split_physical_axes=True
        )
    return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // granules, *shape[1:]),
        (granules, *[1] * (len(shape) - 1)),
        devices,
        process_is_granule=not _slices(devices) > 1,
        allow_split_physical_axes=True,
    )


def _slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices that the devices belong to."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _granules(devices: Sequence[Any], replicas: int) -> int:
    """The number of groups whose inner network is faster than the one between them.

    The groups are the slices, or else the processes where there are as many processes
    as replicas. The number is 1 where placement does not matter, as within one TPU
    slice: its network does not end at the border of a host.
    """
    slices = _slices(devices)
    if slices > 1 or devices[0].platform == "tpu":
        return slices
    processes = len({device.process_index for device in devices})
    return processes if 1 < processes == replicas else 1


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def partition(
    axes: Sequence[str], path: str = "activation", mesh: Mesh | None = None
) -> PartitionSpec:
    """The mesh axes of logical `axes`.

    With `mesh`, its axes of length 1 are dropped beside longer ones, as JAX does: it
    takes two spellings of one sharding for two shardings.

    Raises:
      ValueError: an axis has no rule, or two axes are split over the same mesh axis.
    """
    for axis in axes:
        if axis not in RULES:
            raise ValueError(f"{path}: axis {axis!r} has no rule in mesh.RULES")
    split: list[Any] = [RULES[axis] for axis in axes]
    used = [name for entry in split if entry for name in _names(entry)]
    if len(used) != len(set(used)):
        raise ValueError(
            f"{path}: axes {tuple(axes)} map to a mesh axis twice ({used}); give one "
            "of them another name in mesh.RULES"
        )
    for i, entry in enumerate(split):
        if mesh and isinstance(entry, tuple):
            long = [axis for axis in entry if mesh.shape[axis] > 1] or entry[:1]
            split[i] = tuple(long) if len(long) > 1 else long[0]
    return PartitionSpec(*split)


def _names(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def partition_if_divisible(mesh: Mesh, sizes: Mapping[str, int]) -> PartitionSpec:
    """The mesh axes of logical axes; one whose size they do not divide stays whole."""
    split = zip(sizes.values(), partition(tuple(sizes)), strict=True)
    return PartitionSpec(
        *(entry if size % ways(mesh, entry) == 0 else None for size, entry in split)
    )


def ways(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
    """The number of parts into which an entry of a `PartitionSpec` splits an axis."""
    return math.prod(mesh.shape[axis] for axis in _names(entry or ()))


def shardings(specs: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """`NamedSharding`s in the place of the `Spec`s of a tree.

    Raises:
      UserError: a dimension does not divide by its mesh axes.
    """

    def one(path: str, spec: Spec) -> NamedSharding:
        where = partition(spec.axes, path, mesh)
        if spec.keeps_odd_axes:
            sizes = dict(zip(spec.axes, spec.shape, strict=True))
            where = partition_if_divisible(mesh, sizes)
        for size, name, entry in zip(spec.shape, spec.axes, where, strict=True):
            if size % ways(mesh, entry):
                axes = _names(entry)
                knobs = " times ".join(f"config.mesh.{axis}" for axis in axes)
                raise UserError(
                    f"{path}: axis {name!r} of size {size} does not divide "
                    f"over {'*'.join(axes)}={ways(mesh, entry)}; for {knobs} use "
                    f"{', '.join(map(str, divisors(size, 64)))}"
                )
        return NamedSharding(mesh, where)

    flat, structure = parameter_paths.flatten(dict(specs))
    found = {path: one(path, spec) for path, spec in flat.items()}
    return parameter_paths.unflatten(structure, found)


def abstract_arrays(specs: Mapping[str, Any], mesh: Mesh, dtype: Any) -> dict[str, Any]:
    """Shapes with shardings in the place of the `Spec`s of a tree.

    `dtype` is that of every array whose `Spec` does not fix another.

    Raises:
      UserError: a dimension does not divide by its mesh axes.
    """
    return jax.tree.map(
        lambda spec, sharding: jax.ShapeDtypeStruct(
            spec.shape, spec.dtype or dtype, sharding=sharding
        ),
        dict(specs),
        shardings(specs, mesh),
    )


def reduced_sharding(shape: Sequence[int], spec: Spec, mesh: Mesh) -> NamedSharding:
    """The sharding of an array that sums some axes of a parameter away.

    Optimizers keep such arrays: moments in the parameter's own shape, and Adafactor's
    statistics of the rows and columns of its matrices. The axes that remain keep their
    split. An array whose shape does not follow from the parameter is replicated.
    """
    for candidate in (spec, spec.as_matrix):
        kept: list[Any] = []
        where = partition(candidate.axes, mesh=mesh)
        axes = list(zip(candidate.shape, where, strict=True))
        for size in shape:
            while axes and axes[0][0] != size:
                axes.pop(0)
            if axes:
                kept.append(axes.pop(0)[1])
        if len(kept) == len(shape):
            return NamedSharding(mesh, PartitionSpec(*kept))
    return replicated(mesh)


def on_host(sharding: NamedSharding) -> NamedSharding:
    """The same split, with each part in the memory of its device's host.

    Raises:
      UserError: the backend has no such memory.
    """
    device = sharding.mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise UserError(
            f"config.runtime.offload_optimizer needs a memory {HOST_MEMORY}; "
            f"{device.platform} has {', '.join(kinds)}: set it to False"
        )
    return sharding.with_memory_kind(HOST_MEMORY)


def divisors(size: int, most: int | None = None) -> list[int]:
    """The divisors of `size` in order, up to `most`."""
    return [n for n in range(1, min(size, most or size) + 1) if size % n == 0]


def batch_shards(mesh: Mesh) -> int:
    """The number of parts into which the mesh splits the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def require_whole_units(
    mesh: Mesh, rows: int, rows_per_unit: int, batch_size: int | None = None
) -> None:
    """Checks that each device gets whole units of the `rows` of a forward pass.

    `batch_size`: the rows of a step, for the flags that would make the pass fit.

    Raises:
      UserError: the rows do not divide over the mesh, or a unit would be split.
    """
    parts = batch_shards(mesh)
    step = parts * rows_per_unit
    if rows % step:
        flags = f", as {_flags_of_whole(rows, batch_size, step)}" if batch_size else ""
        units = f", {rows_per_unit} rows belong together" * (rows_per_unit > 1)
        raise UserError(
            f"a forward pass has {rows} rows (config.data.microbatch_size, or "
            f"batch_size){units}, and the mesh splits a batch into {parts} "
            f"({'*'.join(BATCH_AXES)}): use a multiple of {step}{flags}"
        )


def _flags_of_whole(rows: int, batch_size: int, step: int) -> str:
    """The flags of the nearest passes that are a multiple of `step` rows."""
    sizes = [n for n in divisors(batch_size) if n % step == 0]
    if sizes:
        nearest = min(sizes, key=lambda n: abs(n - rows))
        return shell_flag("data.microbatch_size", nearest)
    whole = shell_flag("data.batch_size", math.ceil(batch_size / step) * step)
    if rows == batch_size:
        return whole
    return f"{whole} {shell_flag('data.microbatch_size', step)}"


def shards(mesh: Mesh) -> tuple[int, int]:
    """The numbers of parts into which the mesh splits the rows, and each row."""
    return batch_shards(mesh), mesh.shape["context"]


def batch_sharding(mesh: Mesh, *, microbatched: bool = False) -> NamedSharding:
    """The sharding of `[batch, seq]`, or of `[microbatch, batch, seq]`."""
    where = partition(("batch", "length"))
    return NamedSharding(mesh, PartitionSpec(None, *where) if microbatched else where)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(mesh: Mesh) -> Callable[[Array, Sequence[str]], Array]:
    """A function that pins an activation to the sharding that its axis names give."""

    def pin(x: Array, axes: Sequence[str]) -> Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition(axes)))

    return pin


def local_rows(mesh: Mesh, rows: int, microbatches: int = 1) -> list[int]:
    """The indices of the rows that this process's devices hold, in order.

    They follow from the sharding: processes that a tensor or context axis joins hold
    the same rows. `rows` counts those of the global batch, which the step splits into
    `microbatches` parts.
    """
    size = rows // microbatches
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    held = by_rows.addressable_devices_indices_map((size,))
    mine = sorted({i for where in held.values() for i in range(size)[where[0]]})
    return [m * size + i for m in range(microbatches) for i in mine]


def to_global(
    batch: Any, mesh: Mesh, microbatches: int | None = None, rows: int | None = None
) -> Any:
    """Global arrays from the NumPy rows of each process; no host holds all rows.

    Args:
      batch: a pytree of `[local rows, seq]`, the rows that `local_rows` names.
      mesh: over all processes.
      microbatches: number of parts; the result is then `[microbatch, batch, seq]`.
      rows: number of rows of the global batch; by default this process has them all.

    Returns:
      A pytree of `jax.Array`s of shape `[rows, seq]`, or with the microbatches first.

    Raises:
      UserError: rows that belong together (`batch.rows_per_unit`) would be split.
    """
    lead = () if microbatches is None else (microbatches,)
    sharding = batch_sharding(mesh, microbatched=microbatches is not None)
    total = (rows or jax.tree.leaves(batch)[0].shape[0]) // (microbatches or 1)
    require_whole_units(mesh, total, getattr(batch, "rows_per_unit", 1))
    place_of = {row: i for i, row in enumerate(local_rows(mesh, total))}

    def place(x: np.ndarray) -> Array:
        local = np.asarray(x).reshape(*lead, -1, *x.shape[1:])

        def read(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[len(lead)].indices(total)
            here = slice(place_of[start], place_of[start] + stop - start)
            return local[(*index[: len(lead)], here, *index[len(lead) + 1 :])]

        shape = (*lead, total, *x.shape[1:])
        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree.map(place, batch)
