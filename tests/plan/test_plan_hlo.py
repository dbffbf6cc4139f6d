"""A plan reads a compiled program rightly, where the truth is known beforehand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from research.plan.compiled import hlo_text
from research.plan.compiled.collectives import find_collectives
from research.plan.compiled.compile_step import read_needed
from research.plan.compiled.schedule import read_schedule
from research.plan.planned_devices import parse_topology
from research.plan.step_costs import summarize

TRIPS, ROUNDS, WIDTH = 5, 3, 16


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def program(mesh):
    """A loop in a loop of one collective of each kind, as the compiler writes it."""

    def local(x):
        def inner(x, _):
            whole = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
            part = jax.lax.psum_scatter(whole * 2.0, "fsdp", tiled=True)
            turned = jax.lax.ppermute(
                part, "fsdp", [(i, (i + 1) % 4) for i in range(4)]
            )
            return jnp.tanh(turned), None

        def outer(x, _):
            x, _ = jax.lax.scan(inner, x, length=TRIPS)
            return jax.lax.all_to_all(x, "data", 0, 0, tiled=True), None

        x, _ = jax.lax.scan(outer, x, length=ROUNDS)
        return jax.lax.psum(x, ("data", "fsdp"))

    spec = P(("data", "fsdp"), None)
    function = jax.shard_map(
        local, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False
    )
    x = jax.ShapeDtypeStruct(
        (8 * 8, WIDTH), jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    return jax.jit(function).lower(x).compile().as_text()


def test_kinds_axes_bytes_and_trips_of_a_program_made_to_have_them(program, mesh):
    local = 8 * WIDTH * 4
    rows = summarize(find_collectives(hlo_text.parse(program), mesh))
    found = {(r.kind, r.axes): (r.count, r.nbytes) for r in rows}
    inner, outer = TRIPS * ROUNDS, ROUNDS
    assert found == {
        ("all-gather", "fsdp"): (inner, inner * 4 * local),
        ("reduce-scatter", "fsdp"): (inner, inner * 4 * local),
        ("collective-permute", "fsdp"): (inner, inner * local),
        ("all-to-all", "data"): (outer, outer * local),
        ("all-reduce", "data*fsdp"): (1, local),
    }
    assert rows[0].nbytes == max(row.nbytes for row in rows)


def test_collectives_of_a_sharded_product_are_those_of_its_axes(mesh):
    """Nothing says them here but the shardings."""

    def product(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0].sum()

    x = jax.ShapeDtypeStruct(
        (8, 32), jnp.float32, sharding=NamedSharding(mesh, P("data"))
    )
    w = jax.ShapeDtypeStruct(
        (3, 32, 32), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
    )
    text = jax.jit(product).lower(x, w).compile().as_text()
    found = find_collectives(hlo_text.parse(text), mesh)
    assert {axis for c in found for axis in c.axes} == {"data", "fsdp"}
    assert max(c.times for c in found) == 3


# As a TPU program has them: no trip count beside the loop, a kernel whose text has
# braces at the start of a line, a gather that is under way through three fusions.
TPU_PROGRAM = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%start (p: bf16[64,8]) -> (bf16[64,8], bf16[64,32]) {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.0 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %begin = (bf16[64,8]{1,0}, bf16[64,32]{1,0}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}

%done (p.1: bf16[64,8], q.1: bf16[64,32]) -> bf16[64,32] {
  %p.1 = bf16[64,8]{1,0} parameter(0)
  %q.1 = bf16[64,32]{1,0} parameter(1)
  %gather.1 = bf16[64,32]{1,0} all-gather(%p.1), channel_id=7, replica_groups={{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}, dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %end = bf16[64,32]{1,0} custom-call(%p.1, %q.1, %gather.1), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (x: f32[64,32]) -> f32[16,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %zero.1 = s32[]{:T(128)} constant(0)
  %all.1 = f32[64,32]{1,0} all-reduce(%x), channel_id=8, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}, use_global_device_ids=true, to_apply=%add
  ROOT %part = f32[16,32]{1,0} dynamic-slice(%all.1, %zero.1, %zero.1), dynamic_slice_sizes={16,32}
}

%condition (s: (s32[], bf16[64,8], s32[])) -> pred[] {
  %s = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %n = s32[]{:T(128)} get-tuple-element(%s), index=2
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (s.1: (s32[], bf16[64,8], s32[])) -> (s32[], bf16[64,8], s32[]) {
  %s.1 = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %shard = bf16[64,8]{1,0} get-tuple-element(%s.1), index=1
  %n.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=2
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.1, %two)
  %kernel = bf16[64,8]{1,0} custom-call(%shard), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"name":"splash"
}}, backend_config={"body":"x = y"}
  %started = (bf16[64,8]{1,0}, bf16[64,32]{1,0}) fusion(%kernel), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %was = bf16[64,8]{1,0} get-tuple-element(%started), index=0
  %buffer = bf16[64,32]{1,0} get-tuple-element(%started), index=1
  %gathered = bf16[64,32]{1,0} fusion(%was, %buffer), kind=kCustom, calls=%done
  %turning = (bf16[64,8]{1,0}, bf16[64,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%kernel), channel_id=9, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4},{8,9},{9,10},{10,11},{11,8},{12,13},{13,14},{14,15},{15,12}}
  %turned = bf16[64,8]{1,0} collective-permute-done(%turning)
  %sent = (bf16[64,8]{1,0}, u32[]{:S(2)}, token[]) send(%shard, %shard), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %state = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) tuple(%next, %shard, %n.1)
}

ENTRY %main (y: f32[64,32], z: bf16[64,8], m: s32[]) -> f32[16,32] {
  %y = f32[64,32]{1,0} parameter(0)
  %z = bf16[64,8]{1,0} parameter(1)
  %m = s32[]{:T(128)} parameter(2)
  %four = s32[]{:T(128)} constant(4)
  %first = s32[]{:T(128)} copy(%four)
  %ten = s32[]{:T(128)} constant(10)
  %begin.1 = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) tuple(%first, %z, %ten)
  %known = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) while(%begin.1), condition=%condition, body=%body
  %begin.2 = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) tuple(%first, %z, %m)
  %unknown = (s32[]{:T(128)}, bf16[64,8]{1,0}, s32[]{:T(128)}) while(%begin.2), condition=%condition, body=%body
  ROOT %out = f32[16,32]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def two_slices():
    devices = np.array(parse_topology("v5e:4x4", 2).devices())
    return Mesh(devices.reshape(2, 4, 4), ("replica", "fsdp", "tensor"))


def test_trip_counts_follow_start_step_and_bound():
    module = hlo_text.parse(TPU_PROGRAM)
    main = module.computations["main"]
    # 4, 6, 8: the counter goes by two.
    assert hlo_text.trip_count(module, main, main["known"]) == 3
    assert hlo_text.trip_count(module, main, main["unknown"]) is None


def test_a_tpu_program_of_two_slices_is_counted_once_and_by_its_axes(two_slices):
    """The end of an async gather is no second gather; a kernel ends nothing."""
    found = find_collectives(hlo_text.parse(TPU_PROGRAM), two_slices, unknown_trips=10)
    rows = {(r.kind, r.axes): (r.count, r.nbytes) for r in summarize(found)}
    assert rows == {
        ("all-gather", "fsdp"): (13, 13 * 64 * 32 * 2),
        ("all-reduce", "replica"): (13, 13 * 64 * 8 * 2),
        ("collective-permute", "tensor"): (13, 13 * 64 * 8 * 2),
        ("reduce-scatter", "fsdp"): (1, 64 * 32 * 4),
    }


PRODUCT = "  %product = bf16[8,8]{1,0} convolution(%kernel, %kernel), dim_labels=b\n"


@pytest.mark.parametrize(
    "before, hidden",
    [
        ("  %was = ", {"all-gather"}),
        ("  %turned = ", {"collective-permute"}),
        ("  %started = ", set()),
    ],
)
def test_a_transfer_is_hidden_where_a_product_runs_between_its_ends(
    two_slices, before, hidden
):
    text = TPU_PROGRAM.replace(before, PRODUCT + before)
    found = read_schedule(hlo_text.parse(text), two_slices, [])
    everything = {"all-gather", "all-reduce", "collective-permute", "reduce-scatter"}
    assert {each.kind for each in found.hidden} == hidden
    assert {each.kind for each in found.bare} == everything - hidden


# A SparseCore is started, gets its operand later, and gathers meanwhile.
OFFLOADED = """%offloaded (part.1: bf16[64,8]) -> bf16[64,32] {
  %part.1 = bf16[64,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[64,32]{1,0} all-gather(%part.1), channel_id=11, replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={1}, use_global_device_ids=true
}, execution_thread="sparsecore"

%condition ("""  # noqa: E501
STARTED = """  %call-start = ((), (), (s32[8]{0:T(128)}, /*index=1*/s32[0]{0})) custom-call-start(), async_execution_thread="sparsecore", custom_call_target="offload", called_computations={%offloaded}
  %call-update = ((bf16[64,8]{1,0}), bf16[64,32]{1,0}, (s32[8]{0:T(128)})) custom-call-update(%call-start, %shard), output_to_operand_aliasing={{2,0}: (0, {2,0})}
  %call-done = bf16[64,32]{1,0} custom-call-done(%call-update)
  %sent = """  # noqa: E501


@pytest.mark.parametrize(
    ("before", "hidden"),
    [("%call-start =", False), ("%call-update =", False), ("%call-done =", True)],
)
def test_a_gather_on_a_sparsecore_begins_when_it_gets_its_operand(
    two_slices, before, hidden
):
    text = TPU_PROGRAM.replace("%condition (", OFFLOADED).replace("  %sent = ", STARTED)
    text = text.replace(f"  {before}", f"{PRODUCT}  {before}")
    found = read_schedule(hlo_text.parse(text), two_slices, [], unknown_trips=10)
    where = found.hidden if hidden else found.bare
    gathers = [x for x in where if (x.kind, x.axes) == ("all-gather", ("tensor",))]
    # In both loops.
    assert [(x.nbytes, x.times) for x in gathers] == [(64 * 32 * 2, 3), (4096, 10)]


def test_copies_of_weights_into_another_order_are_found_by_their_sizes(two_slices):
    """For all layers or for one; copies of activations are not listed."""
    moved = (
        "  %heavy = bf16[4,512,16,128]{3,2,1,0} parameter(3)\n"
        "  %moved = bf16[4,512,16,128]{3,1,2,0} copy(%heavy)\n"
        "  %one = bf16[16,1,128,512]{3,2,1,0} transpose(%heavy), dimensions={2,0,3,1}\n"
        "  %other = bf16[4,512,16,64]{3,1,2,0} copy(%heavy)\n"
    )
    text = TPU_PROGRAM.replace("  %four = ", f"{moved}  %four = ")
    found = read_schedule(hlo_text.parse(text), two_slices, [(4, 512, 16, 128)])
    assert [(x.shape, x.nbytes, x.times) for x in found.copies] == [
        ("bf16[4,512,16,128]", 4 * 512 * 16 * 128 * 2, 1),
        ("bf16[16,1,128,512]", 512 * 16 * 128 * 2, 1),
    ]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", "tensor"),
        ("{}", "fsdp*tensor"),
        ("[4,4]<=[16]", "tensor"),
        ("[4,4]<=[4,4]T(1,0)", "fsdp"),
        ("[2,8]<=[16]", "fsdp*tensor"),
        ("mesh['a'=4,'b'=4] {'b'}", "tensor"),
        ("mesh['a'=4,'b'=4] {'a','b'}", "fsdp*tensor"),
        ("mesh['a'=4,'b'=1,'c'=4] {'c','a'}", "fsdp*tensor"),
        # The TPU compiler writes neither parts of axes nor other orders of devices.
        ("mesh['a'=16] {'a':(1)4}", "?"),
        ("mesh['a'=2,'b'=2], device_ids=(0,4,1,5) {'b'}", "?"),
        ("of-tomorrow", "?"),
    ],
)
def test_replica_groups_in_every_spelling(two_slices, groups, axes):
    written = "replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0'}"
    assert TPU_PROGRAM.count(written) == 1
    text = TPU_PROGRAM.replace(written, f"replica_groups={groups}")
    found = find_collectives(hlo_text.parse(text), two_slices)
    assert [c.label for c in found if c.kind == "reduce-scatter"] == [axes]


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (200.50G) exceeds available "
            "HBM (15.75G). HLO module: jit__lambda.",
            200.5,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 33.11G of 15.75G hbm. Exceeded hbm capacity",
            33.11,
        ),
        ("RESOURCE_EXHAUSTED: Mosaic failed. Used 3.0G of 16.0M vmem", None),
        ("RESOURCE_EXHAUSTED: too many of something else", None),
    ],
)
def test_needed_bytes_of_a_step_that_does_not_fit(message, gib):
    needed = read_needed(message)
    assert needed is None if gib is None else math.isclose(needed, gib * 2**30)
