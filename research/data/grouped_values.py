"""Values by category or source, as the flat fields of a line in `metrics.jsonl`.

Imports no JAX: pages and launchers read these lines.
"""

from collections.abc import Mapping
from typing import Any

UNNAMED = "(none)"  # The group of rows without a category, in files and tables.
NATS_PER_TOKEN = "nats per trained token"


def group_fields(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by group as fields of a line in metrics.jsonl, which is flat.

    A field is called `NAME/GROUP`. A name holds no slash, and a group may.
    """
    # A category of the user that has the name of none is no less a category.
    named = {UNNAMED: f"{UNNAMED} (category)", "": UNNAMED}
    return {f"{name}/{named.get(g, g)}": value for g, value in values.items()}


def by_group(line: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The values of one name among the fields of a line, by group.

    Lines of earlier versions have no name for the group without one.
    """
    start = f"{name}/"
    found = {x.removeprefix(start): line[x] for x in line if x.startswith(start)}
    return {group or UNNAMED: value for group, value in found.items()}
