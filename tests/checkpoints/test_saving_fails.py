"""A save that cannot be: it is said of its step, and what was saved stays."""

import contextlib
import resource
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from small_states import FUTURES, POSITION, abstract, make_state, open_checkpoints
from waiting import wait_until

from research.checkpoints.checksums import find_damage
from research.checkpoints.disk_space import require_room
from research.config.run_config import CheckpointConfig
from research.core.errors import SaveError, UserError

pytestmark = FUTURES


@contextlib.contextmanager
def full_disk():
    """Within it no file grows over 1000 bytes: pytest's own, too, so keep it short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_said_of_the_step_it_hit(tmp_path):
    done = []
    with open_checkpoints(tmp_path, committed=done.append) as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, None)
        checkpointer.save(2, make_state(2), POSITION, None)
        checkpointer.wait()
        with (
            full_disk(),
            pytest.raises(SaveError, match="step 3 could not be saved") as failed,
        ):
            checkpointer.save(3, make_state(3), POSITION, None)
            checkpointer.wait()
        assert failed.value.step == 3 and failed.value.exit_code == 4
        assert "checkpoints left: 1, 2" in str(failed.value)
        # Nothing half-written, and the older ones as they were.
        assert sorted(x.name for x in (tmp_path / "checkpoints").iterdir()) == [
            "1",
            "2",
        ]
        assert not find_damage(tmp_path / "checkpoints/2")
        # With room again the same run saves again.
        checkpointer.save(4, make_state(4), POSITION, None)
        checkpointer.wait()
    assert done == [1, 2, 4]


def test_a_save_that_fails_is_learnt_without_waiting_for_the_next(tmp_path):
    with (
        open_checkpoints(tmp_path) as checkpointer,
        full_disk(),
        pytest.raises(SaveError, match="step 5"),
    ):
        checkpointer.save(5, make_state(5), POSITION, None)
        wait_until(checkpointer.check)


def test_leaving_waits_for_the_save_and_says_when_it_failed(tmp_path):
    with open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, None)
    assert not find_damage(tmp_path / "checkpoints/1")
    with (
        pytest.raises(SaveError, match="step 2"),
        full_disk(),
        open_checkpoints(tmp_path) as checkpointer,
    ):
        checkpointer.save(2, make_state(2), POSITION, None)


@pytest.mark.parametrize("left", [SystemExit, KeyboardInterrupt, ZeroDivisionError])
def test_the_first_error_is_shown_and_the_last_save_kept(tmp_path, left):
    with pytest.raises(left), open_checkpoints(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), POSITION, None)
        raise left
    assert not find_damage(tmp_path / "checkpoints/1")


def test_the_first_error_is_shown_when_the_save_fails_too(tmp_path):
    said = []
    with (
        pytest.raises(ZeroDivisionError),
        full_disk(),
        open_checkpoints(tmp_path, report=said.append) as checkpointer,
    ):
        checkpointer.save(1, make_state(1), POSITION, None)
        raise ZeroDivisionError
    assert "step 1 could not be saved" in said[0]


def test_a_folder_that_is_gone_is_a_failed_save(tmp_path):
    with open_checkpoints(tmp_path) as checkpointer:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("")
        with pytest.raises(SaveError, match="step 1"):
            checkpointer.save(1, make_state(1), POSITION, None)
            checkpointer.wait()


def test_checkpoints_that_cannot_fit_are_refused_before_the_run(tmp_path):
    state = {"w": jax.ShapeDtypeStruct((1 << 40, 1 << 10), jnp.float32)}
    with pytest.raises(UserError, match="keep_last=2, keep_best=1"):
        require_room(tmp_path / "run" / "checkpoints", state, CheckpointConfig())
    require_room(tmp_path / "run", abstract(make_state(0)), CheckpointConfig())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [0, 1])
def test_room_is_counted_to_the_byte(tmp_path, monkeypatch, missing):
    """For three checkpoints of 1000 bytes, of which there are 300 already."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "old").write_bytes(b"x" * 300)
    state = {"w": jax.ShapeDtypeStruct((250,), jnp.float32)}
    free = SimpleNamespace(free=3 * 1000 - 300 - missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    refused = pytest.raises(UserError, match=r"3 checkpoints of .* do not fit")
    keep = CheckpointConfig(keep_last=1, keep_best=1)
    with refused if missing else contextlib.nullcontext():
        require_room(folder, state, keep)
