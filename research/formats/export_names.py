"""Names in an export's folder, and of the folder itself. Imports no JAX, for pages."""

from research.core.atomic_files import PARTIAL, REPLACED

EXPORTED = "model"  # The folder of a run in which its model is written for others.
EXPORTS = "exports"  # The folder of a run that has one for each other export.
# Files of every export: the step that it holds, its model card, and its proof.
ORIGIN, CARD, PARITY = "exported_from.json", "README.md", "parity.json"


def is_unfinished(name: str) -> bool:
    """Whether a folder of this name is being written, or was left by a kill."""
    return name.startswith(".") or name.endswith((PARTIAL, REPLACED))
