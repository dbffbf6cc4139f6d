"""Settings of the environment change no number, and a missing device is named."""

import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from research.core.errors import UserError
from research.parallel import runtime
from research.runs import provenance


@pytest.mark.parametrize("name, value", runtime.NUMBERS.items())
def test_settings_that_change_numbers_are_undone(name, value, caplog):
    others = {"standard": "strict", "threefry2x32": "rbg", "allow": "disallow"}
    other = others.get(value, not value)
    caplog.set_level("INFO")
    jax.config.update(name, other)
    try:
        runtime._use_own_numbers()
        assert getattr(jax.config, name) == value
    finally:
        jax.config.update(name, value)
    assert f"{name.upper()} is set, and not used" in caplog.text


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Unable to initialize backend 'cuda':\n  no"), AssertionError()],
)
def test_a_platform_that_is_not_here_is_one_line(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match=r"no device .*JAX_PLATFORMS is") as raised:
        runtime._require_devices()
    assert "\n" not in str(raised.value) and "()" not in str(raised.value)


def test_the_settings_that_change_nothing_are_listed():
    text = Path("docs/recovery.md").read_text()
    for name in runtime.NUMBERS:
        assert name.upper().replace("JAX_TRANSFER_GUARD_", "_") in text, name


def test_what_changes_numbers_is_compared_without_its_value(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION"):
        monkeypatch.delenv(name, raising=False)
        before = provenance.shared_parts()
        monkeypatch.setenv(name, "secret-a")
        one = provenance.shared_parts()
        monkeypatch.setenv(name, "secret-b")
        two = provenance.shared_parts()
        assert len({str(x) for x in (before, one, two)}) == 3
        assert "secret" not in str(one)


@pytest.mark.parametrize("library", ["glibc", "another"])
def test_free_memory_is_returned_where_the_c_library_can(library, monkeypatch):
    calls = []
    functions = {"malloc_trim": calls.append} if library == "glibc" else {}
    opened = types.SimpleNamespace(**functions)
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: opened)
    runtime.return_free_memory()
    assert calls == ([0] if library == "glibc" else [])


COMPUTED_AT_RETURN = """
import jax, jax.numpy as jnp
from research.config.knob_groups import RuntimeConfig
from research.parallel import runtime
runtime.start(RuntimeConfig(distributed=False, compilation_cache=""))
product = jax.jit(lambda x: x @ x)
x = jax.block_until_ready(product(jnp.ones((1024, 1024))))
print(product(x).is_ready())
"""


def test_a_step_is_computed_in_the_thread_that_calls_it():
    """Another thread's large arrays would be returned to the system after each step."""
    command = [sys.executable, "-c", COMPUTED_AT_RETURN]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
