"""The roofline's products are those of the counted FLOPs; a profile adds up."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from research.plan.compiled import hlo_text
from research.plan.estimate.step_flops import count_step_flops

BENCH = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import compiled_programs
        import roofline
        import step_products
        import traced_operations

        yield SimpleNamespace(
            programs=compiled_programs,
            roofline=roofline,
            products=step_products,
            traced=traced_operations,
        )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("job", ["lora", "full"])
def test_the_products_have_the_flops_that_the_planner_counts(bench, job, remat):
    step = bench.programs.make_step(job)
    model = dataclasses.replace(step.config.model, remat=remat)
    step = dataclasses.replace(
        step, config=dataclasses.replace(step.config, model=model)
    )
    pairs = step.tokens * (step.config.data.seq_len + 1) / 2
    products = bench.products.products_of(step, step.tokens, pairs)
    again = [p.flops for p in products if p.kind == bench.products.AGAIN]
    counted = count_step_flops(step)
    assert sum(again) == pytest.approx(counted.recomputed)
    assert sum(p.flops for p in products) == pytest.approx(counted.total)


def event(name, begin, end, **stats):
    return SimpleNamespace(
        name=name, start_ns=begin * 1e9, end_ns=end * 1e9, stats=stats.items()
    )


def test_a_call_has_the_time_of_its_parts_in_other_threads_and_not_of_those_inside(
    bench,
):
    first = [
        event("loop", 0, 10, hlo_op="while.1"),
        event("dot", 1, 5, hlo_op="dot.2"),
        event(bench.traced.RECORD, 2, 2, _p=7),
        event("dot", 6, 7, hlo_op="dot.2"),
        event("end: dot", 7, 7),
        event("Await", 8, 9),
    ]
    second = [
        event(bench.traced.REGION, 3, 3, _c=7),
        event("add", 4, 6, hlo_op="add.3"),
        event(bench.traced.REGION_END, 9, 9),
        event(bench.traced.REGION, 20, 20, _c=8),
        event(bench.traced.REGION_END, 21, 21),
    ]
    lines = [SimpleNamespace(events=events) for events in (first, second)]
    assert bench.traced.read_calls(lines) == {
        bench.traced.DISPATCH: [1],  # A flow that no operation began.
        "while.1": [10 - 4 - 1 - 1],
        "dot.2": [4 + 6 - 2, 1],
        "add.3": [2],
    }


PROGRAM = """
%turned (p.1: bf16[2,3]) -> bf16[3,2] {
  %p.1 = bf16[2,3]{1,0} parameter(0)
  %c.1 = s32[] constant(5)
  %s.1 = s32[] subtract(%c.1, %c.1)
  ROOT %t.1 = bf16[3,2]{1,0} transpose(%p.1), dimensions={1,0}
}
%product (p.2: bf16[2,3], p.3: bf16[3,2]) -> f32[2,2] {
  %p.2 = bf16[2,3]{1,0} parameter(0)
  %p.3 = bf16[3,2]{1,0} parameter(1)
  ROOT %d.1 = f32[2,2]{1,0} dot(%p.2, %p.3), lhs_contracting_dims={1}
}
%sums (p.4: bf16[2,3]) -> bf16[2,3] {
  %p.4 = bf16[2,3]{1,0} parameter(0)
  ROOT %a.1 = bf16[2,3]{1,0} add(%p.4, %p.4)
}
ENTRY %main (x: bf16[2,3]) -> f32[2,2] {
  %x = bf16[2,3]{1,0} parameter(0)
  %f.1 = bf16[3,2]{1,0} fusion(%x), kind=kLoop, calls=%turned
  %f.2 = bf16[2,3]{1,0} fusion(%x), kind=kLoop, calls=%sums
  ROOT %f.3 = f32[2,2]{1,0} fusion(%f.2, %f.1), kind=kCustom, calls=%product
}
"""


def test_an_operation_is_what_its_fusion_consists_of(bench):
    program, traced = hlo_text.parse(PROGRAM), bench.traced
    groups = [traced.group_of(name, program) for name in ("f.1", "f.2", "f.3")]
    assert groups == [traced.MOVE, traced.REST, traced.PRODUCT]
    assert traced.group_of(traced.DISPATCH, program) == traced.LOOP


def test_a_product_is_timed_by_the_repetition(bench, monkeypatch):
    roofline = bench.roofline
    monkeypatch.setattr(roofline, "LEAST_SECONDS", 8.0)
    clock = iter(range(0, 10**6))
    asked = []

    def call(times):
        asked.append(times)
        for _ in range(times):
            next(clock)

    monkeypatch.setattr(roofline, "spent", lambda: next(clock))
    # Each reading of the clock is a second, too.
    assert roofline.seconds_of(call) == (16 + 1) / 16
    assert asked == [1, 1, 4, *[16] * roofline.ROUNDS]


def test_both_tables_are_printed(bench, capsys, monkeypatch):
    compiled = []

    def first_alone(product, dtype):
        if compiled:
            return 1e-3  # Compiling each of them would take long.
        compiled.append(product)
        return timed(product, dtype)

    timed = bench.roofline.product_seconds
    monkeypatch.setattr(bench.roofline, "product_seconds", first_alone)
    monkeypatch.setattr(bench.roofline, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(bench.roofline, "ROUNDS", 1)
    # It would set up this process, which has other tests, too.
    monkeypatch.setattr(bench.roofline.runtime, "start", lambda *_, **__: None)
    monkeypatch.setattr(bench.roofline, "COPIED_BYTES", 2**12)
    job = ("--config=configs/pretrain_tiny.py", "--preset=tiny", "--rows=2", "--seq=32")
    few = ("--steps=1", "--warmup=1", "--traces=1", "--longest=1")
    bench.roofline.main(["roofline", *job, *few])
    printed = capsys.readouterr().out
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:]
        for line in printed.splitlines()
        if line.startswith("| ")
    }
    products, traced = bench.products, bench.traced
    assert float(rows["all"][2].replace(",", "")) > 0
    assert {products.FORWARD, products.WEIGHTS, products.HEAD} <= rows.keys()
    groups = (traced.PRODUCT, traced.MOVE, traced.REST, traced.LOOP)
    shares = [float(rows[group][0].rstrip("%")) for group in groups]
    assert sum(shares) == pytest.approx(100, abs=0.3)
