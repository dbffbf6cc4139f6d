"""Settings of the environment change no number, and a missing device is named."""

import jax
import pytest

from research.core.errors import UserError
from research.parallel import runtime


@pytest.mark.parametrize("name, value", runtime.NUMBERS.items())
def test_settings_that_change_numbers_are_undone(name, value, caplog):
    other = {"standard": "strict", "threefry2x32": "rbg"}.get(value, not value)
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
