"""`report.md` and `report.html`: the report of a run for reading later.

Both show the same. The page is a single file, with its picture inside.
"""

import base64
from pathlib import Path
from typing import Any

from research.core.text_templates import fill
from research.core.visible_text import visible
from research.report.markdown_text import escaped, fenced, format_table
from research.report.result_tables import (
    tabulate_losses,
    tabulate_measures,
    tabulate_wall_time,
    text_columns,
)
from research.report.run_results import COMPARED, RunResults

TEMPLATES = Path(__file__).parent / "templates"
STYLED = TEMPLATES / "page.html.jinja"  # the frame of every page
# The page shows so many characters of a longer text, until a click.
FOLDED, PREVIEW = 1500, 200


def format_report(results: RunResults) -> str:
    """The text of `report.md`; `loss.png` is expected beside it."""
    return _fill("run.md.jinja", results)


def format_page(results: RunResults, picture: bytes = b"") -> str:
    """The text of `report.html`; `picture` is a PNG file, or empty."""
    return _fill("run.html.jinja", results, picture=base64.b64encode(picture).decode())


def _fill(name: str, results: RunResults, **more: Any) -> str:
    prompts = dict.fromkeys(sample.prompt for sample in results.samples)
    return fill(
        TEMPLATES / name,
        lambda value: visible(value) if type(value) is str else value,
        filters={
            "literal": lambda value: escaped(str(value)),
            "fenced": fenced,
            "words": text_columns,
            "lines": lambda table: "\n".join(format_table(table)[1:]),
        },
        autoescape=".html" in name,
        base=STYLED,
        results=results,
        losses=tabulate_losses(results.evaluations),
        measures=tabulate_measures(results.measures),
        times=tabulate_wall_time(results.wall_time),
        samples=[(p, [s for s in results.samples if s.prompt == p]) for p in prompts],
        compared=list(COMPARED),
        folded=FOLDED,
        preview=PREVIEW,
        **more,
    )
