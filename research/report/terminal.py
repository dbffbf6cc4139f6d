"""Data shown in the terminal.

Everything that comes from data, folders or models passes through `_literal`: `[/bold]`
in a category is no markup, and an escape sequence in an answer is not obeyed.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from research.core.visible_text import visible
from research.report import result_tables
from research.report.run_results import COMPARED, RunResults
from research.tasks.findings import Finding
from research.tasks.model_answers import ComparedAnswer, Sample
from research.tasks.row_preview import PreviewRow

# Long texts are cut, where all of a row is trained as well. `preview.json` has all.
MOST_CHARACTERS = 4000


def _literal(text: str) -> Text:
    return Text(visible(text))


def show_findings(console: Console, findings: Sequence[Finding]) -> None:
    """The doctor's table."""
    table = Table(title="doctor", show_header=False, title_justify="left")
    for _ in range(3):
        table.add_column(overflow="fold")  # A long path is wrapped, and not cut.
    for finding in findings:
        mark = Text("look", "bold yellow") if finding.warns else Text("ok", "green")
        if not finding.ok:
            mark = Text("FAILED", "bold red")
        table.add_row(mark, _literal(finding.name), _literal(finding.text))
    console.print(table)


def show_preview(console: Console, rows: Sequence[PreviewRow]) -> None:
    """The first row, and each that shows a schema.

    Trained tokens are green and stand between double brackets.
    """
    for number, row in enumerate(rows):
        if row.schema or not number:
            what = f"a row of {row.schema}" if row.schema else "first packed row"
            title = f"{visible(what)}, [[trained]] tokens marked:"
            console.print(Text(title, "bold"))
            console.print(_marked(row))


def _marked(row: PreviewRow) -> Text:
    text = Text()
    for document in row.documents:
        for span in document.spans:
            if span.trained:
                text.append(f"[[{visible(span.text)}]]", "bold green")
            else:
                text.append(visible(span.text), "dim")
        text.append("\n" + "-" * 8 + "\n", "dim")
    hidden = len(text) - MOST_CHARACTERS
    if hidden > 0:
        text.right_crop(hidden)
        text.append(f"\n... and {hidden:,} characters more in preview.json", "dim")
    return text


def show_results(console: Console, results: RunResults) -> None:
    """Answers, samples and tables of a run that is done."""
    for answer in results.answers:
        _show_answer(console, answer)
    for prompt in dict.fromkeys(sample.prompt for sample in results.samples):
        _show_samples(console, [s for s in results.samples if s.prompt == prompt])
    losses = result_tables.tabulate_losses(results.evaluations)
    show_table(console, "held out, first and last", losses, bold=result_tables.TOTAL)
    measures = result_tables.tabulate_measures(results.measures)
    show_table(console, "answers to held-out rows", measures, bold="")
    times = result_tables.tabulate_wall_time(results.wall_time)
    show_table(console, "wall time, all starts", times, bold="step")


def _show_answer(console: Console, answer: ComparedAnswer) -> None:
    group = _literal(answer.group or "(none)")
    console.print(Panel(_literal(answer.prompt), title=group, style="dim"))
    table = Table(show_lines=True, expand=True)
    for name in COMPARED:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(_literal(getattr(answer, name)) for name in COMPARED))
    console.print(table)


def _show_samples(console: Console, samples: Sequence[Sample]) -> None:
    text = Text()
    for sample in samples:
        text.append(f"step {sample.step}\n", "bold")
        text.append(visible(sample.prompt), "dim")
        text.append(visible(sample.text) + "\n\n")
    console.print(Panel(text, title="samples", title_align="left"))


def show_table(
    console: Console, title: str, table: result_tables.Table, bold: str
) -> None:
    if not table:
        return
    header, *rows = table
    words = result_tables.text_columns(table)
    shown = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        side = "left" if number in words else "right"
        shown.add_column(_literal(name), justify=side, overflow="fold")
    for row in rows:
        shown.add_row(*map(_literal, row), style="bold" if row[0] == bold else "")
    console.print(shown)
