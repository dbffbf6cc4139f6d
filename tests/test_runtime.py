"""A Ctrl-C is never lost, wherever it falls."""

import os
import signal

import pytest

from research import runtime
from research.config import RuntimeConfig


@pytest.fixture
def started():
    before = signal.getsignal(signal.SIGINT)
    runtime.start(RuntimeConfig(compilation_cache=""))
    yield
    signal.signal(signal.SIGINT, before)
    runtime._interrupted.clear()


class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # The handler runs between two of these.
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_destructor_is_raised_later(started):
    runtime.raise_if_interrupted()
    Dropped()
    with pytest.raises(KeyboardInterrupt):
        runtime.raise_if_interrupted()


def test_an_interrupt_elsewhere_is_raised_at_once(started):
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
