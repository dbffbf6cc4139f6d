"""The compiled programs cost no more than was recorded: see `compiled_figures.py`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

BENCH = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def guard():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import compiled_figures

        yield compiled_figures


def named():
    """The programs of the record: only a test may import those of the code."""
    every = json.loads((BENCH / "compiled_figures.json").read_text())
    return sorted({name for programs in every.values() for name in programs})


def test_every_program_is_recorded(guard):
    for programs in guard.recorded_figures().values():
        assert programs.keys() == guard.PROGRAMS.keys(), f"run {guard.ACCEPT}"


@pytest.mark.parametrize("name", named())
def test_no_figure_of_a_compiled_program_rises(guard, name):
    recorded = guard.recorded_figures().get(guard.toolchain())
    if recorded is None:
        pytest.skip(f"no figures for {guard.toolchain()}; `{guard.ACCEPT}` adds them")
    found = guard.read_figures(guard.PROGRAMS[name]().compile())
    rose, _ = guard.describe(name, recorded[name], found)
    advice = f"if it is worth it, run `{guard.ACCEPT}` and say why in the commit"
    assert not rose, "\n".join([*rose, advice])


ROWS = jax.ShapeDtypeStruct((8, 8), jnp.float32)


def compiled(function, **options):
    return jax.jit(function, **options).lower(ROWS).compile()


def plain(x):
    return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=3)[0]


def rounded(x):
    return plain(x.astype(jnp.bfloat16).astype(jnp.float32))


def twice(x):
    return plain(x) @ x


@pytest.mark.parametrize(
    ("worse", "options", "risen"),
    [
        (rounded, {"donate_argnums": 0}, {"casts"}),
        (twice, {"donate_argnums": 0}, {"flops", "dots"}),
        (plain, {}, {"new result bytes"}),
    ],
    ids=["a cast", "a product", "no donation"],
)
def test_each_waste_is_named(guard, worse, options, risen):
    before = guard.read_figures(compiled(plain, donate_argnums=0))
    after = guard.read_figures(compiled(worse, **options))
    assert before["dots"] == 3, "a loop of three rounds"
    rose, _ = guard.describe("it", before, after)
    for figure in risen:
        (line,) = [line for line in rose if line.startswith(f"it: {figure} rose from ")]
        assert f"to {after[figure]:,}" in line
    assert guard.describe("it", before, before) == ([], [])


def test_a_figure_that_falls_is_no_failure(guard):
    rose, fell = guard.describe(
        "it", {"copies": 4, "dots": 2}, {"copies": 3, "dots": 2}
    )
    assert rose == [] and fell == ["it: copies fell from 4 to 3 (-25.00%)"]
