"""Adapter kinds by name. The table is `research.config.choices.ADAPTER_MODULES`, which
the command line reads without JAX.
"""

import importlib

from research.config.choices import ADAPTER_MODULES
from research.weights.adapters.adapter_kind import AdapterKind


def find_kind(name: str) -> AdapterKind:
    """The adapter kind that `config.lora.kind` names."""
    return importlib.import_module(ADAPTER_MODULES[name]).KIND
