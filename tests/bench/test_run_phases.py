"""The phases that a run is timed by, as functions of the code."""

import functools
import importlib

import pytest
from run_phases import PHASES


@pytest.mark.parametrize(("module", "name"), sorted({entry[1:] for entry in PHASES}))
def test_each_phase_is_a_function_of_the_code(module, name):
    owner = importlib.import_module(module)
    assert callable(functools.reduce(getattr, name.split("."), owner))
