"""`report.md`: the report of a run for reading later.

Names and texts of the user are shown as they are. Markdown in them is escaped.
"""

import re
from collections.abc import Sequence

from research.core.visible_text import visible
from research.report.result_tables import Table, tabulate_losses, tabulate_wall_time
from research.report.run_results import RunResults
from research.tasks.model_answers import ComparedAnswer, Sample

# An underscore within a word is text already, and names such as `closed_qa` stay
# readable in the file.
SPECIAL = re.compile(r"[\\`*\[\]<>|$~&#]|(?<![^\W_])_|_(?![^\W_])")


def format_report(results: RunResults) -> str:
    """The whole file; `loss.png` is expected beside it."""
    lines = [f"# {escaped(results.name)}", "", "![loss](loss.png)", ""]
    facts = results.facts.items()
    lines += [f"- {escaped(name)}: {escaped(str(value))}" for name, value in facts]
    for table in (
        tabulate_losses(results.evaluations),
        tabulate_wall_time(results.wall_time),
    ):
        lines += format_table(table)
    for answer in results.answers:
        lines += _format_answer(answer)
    for prompt in dict.fromkeys(sample.prompt for sample in results.samples):
        lines += _format_samples([s for s in results.samples if s.prompt == prompt])
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """`text` on one line, so that Markdown shows every character of it."""
    return SPECIAL.sub(r"\\\g<0>", visible(" ".join(text.split())))


def fenced(text: str) -> list[str]:
    """A block that shows `text` letter by letter, whatever fences are in it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", visible(text), fence]


def format_table(table: Table) -> list[str]:
    """The lines of a table, an empty line before them; none for an empty table."""
    if not table:
        return []
    lines = [f"| {' | '.join(map(escaped, row))} |" for row in table]
    rule = "|---" + "|---:" * (len(table[0]) - 1) + "|"
    return ["", lines[0], rule, *lines[1:]]


def _format_answer(answer: ComparedAnswer) -> list[str]:
    lines = ["", f"## A held-out prompt: {escaped(answer.group or '(none)')}", ""]
    for name in ("prompt", "base", "tuned", "reference"):
        lines += [f"**{name}**", "", *fenced(getattr(answer, name)), ""]
    return lines


def _format_samples(samples: Sequence[Sample]) -> list[str]:
    lines = ["", "## Text after a prompt", "", *fenced(samples[0].prompt), ""]
    for sample in samples:
        lines += [f"Step {sample.step}:", "", *fenced(sample.prompt + sample.text), ""]
    return lines
