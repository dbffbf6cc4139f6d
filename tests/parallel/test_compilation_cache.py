"""Without a home folder a run keeps no compiled programs, and says which knob helps."""

import types
from pathlib import Path

import pytest

from research.config.data_knobs import TextConfig
from research.core.errors import UserError
from research.data.text.source_fingerprint import cache_folder
from research.parallel import runtime


@pytest.fixture
def kept(monkeypatch):
    """The settings that JAX gets."""
    found = {}
    config = types.SimpleNamespace(
        update=lambda name, value: found.update({name: value})
    )
    monkeypatch.setattr(runtime, "jax", types.SimpleNamespace(config=config))
    return found


def test_a_user_without_a_home_is_told_both_knobs(kept, monkeypatch, caplog):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    runtime._use_compilation_cache("auto")
    assert not kept
    assert "no home folder); --config.runtime.compilation_cache= names" in caplog.text
    with pytest.raises(UserError, match=r"no home folder.*--config\.text\.cache_dir="):
        cache_folder(TextConfig())


def test_a_cache_that_cannot_be_made_is_done_without_unless_it_was_named(
    kept, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    runtime._use_compilation_cache("auto")
    assert not kept and "compiled programs are not kept" in caplog.text
    with pytest.raises(UserError, match=r"compilation cache .* cannot be made"):
        runtime._use_compilation_cache(str(tmp_path / "file" / "here"))
    runtime._use_compilation_cache(str(tmp_path / "new"))
    assert kept["jax_compilation_cache_dir"] == str(tmp_path / "new")
