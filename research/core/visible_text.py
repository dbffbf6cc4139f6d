"""Text for people: numbers with their nouns; foreign text made safe to show."""

import re

# Control characters but tab and line end, line ends that only some programs know, marks
# that reorder a line, and halves of characters.
UNSHOWABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069"
    r"\ud800-\udfff]"
)


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `1,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def visible(text: str) -> str:
    r"""`text` with escapes such as `\x1b` for characters that are not shown.

    A terminal would obey them, a font has no picture of them, and XML forbids them.
    """
    return UNSHOWABLE.sub(lambda found: ascii(found[0])[1:-1], text)
