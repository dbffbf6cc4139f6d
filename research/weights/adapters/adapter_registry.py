"""Adapter kinds by name. The table is `research.config.choices.ADAPTER_MODULES`, which
the command line reads without JAX.
"""

import importlib

from research.config.choices import ADAPTER_MODULES
from research.core.errors import look_up
from research.weights.adapters.adapter_kind import AdapterKind


def find_kind(name: str) -> AdapterKind:
    """The adapter kind that `config.lora.kind` names. Raises UserError: none."""
    module = look_up(ADAPTER_MODULES, name, "config.lora.kind")
    return importlib.import_module(module).KIND
