"""Names and texts of the user in Markdown, which shows every character of them."""

import re

from research.core.visible_text import visible
from research.report.result_tables import Table, text_columns

# An underscore within a word is text already, and names such as `closed_qa` stay
# readable in the file.
SPECIAL = re.compile(r"[\\`*\[\]<>|$~&#]|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    """`text` on one line, so that Markdown shows every character of it."""
    return SPECIAL.sub(r"\\\g<0>", visible(" ".join(text.split())))


def fenced(text: str) -> str:
    """A block that shows `text` letter by letter, whatever fences are in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}text", visible(text), fence])


def format_table(table: Table) -> list[str]:
    """The lines of a table, an empty line before them; none for an empty table."""
    if not table:
        return []
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in table]
    words = text_columns(table)
    rules = ["---" if number in words else "---:" for number in range(len(table[0]))]
    rule = f"|{'|'.join(rules)}|"
    return ["", lines[0], rule, *lines[1:]]
