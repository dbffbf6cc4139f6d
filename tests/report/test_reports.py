"""Names and texts of users reach people letter by letter, and no report costs a run."""

import contextlib
import dataclasses
import html.parser
import io
import json
import math
import types

import numpy as np
import pytest
from rich.console import Console
from studio_place import make_run

from research.config.run_config import Config
from research.core.errors import UserError
from research.core.visible_text import visible
from research.data.grouped_values import by_group, group_fields
from research.data.instructions.instruction_dataset import _group_categories
from research.report import final_report, loss_plot, plan_tables, run_page, terminal
from research.report.markdown_text import escaped
from research.report.result_tables import tabulate_losses
from research.report.run_results import LOG_BYTES, RunResults, read_results
from research.runs import display_files
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import IDENTITY_PARTS, RunDir
from research.runs.run_history import History
from research.tasks.findings import Finding
from research.tasks.model_answers import ComparedAnswer, Sample
from research.tasks.row_preview import PreviewDocument, PreviewRow, PreviewSpan
from research.train import finish_run
from research.train.step.train_step import TrainState

HOSTILE = ["[/x]", r"$\R$", "a|b", "_x", "# h", "", "**b** <i>&amp; ~~s~~", "[bold]y"]
# A terminal would obey these, and XML and fonts have none of them.
CONTROLS = "\x1b[2Ja\x9b31m\rb\x07\u202ec"


def evaluation(step, groups, **more):
    losses = group_fields("loss", {g: 2.0 + step + i for i, g in enumerate(groups)})
    tokens = group_fields("tokens", {g: 10 + i for i, g in enumerate(groups)})
    line = {"step": step, "kind": "eval", "loss": 3.0 + step}
    return line | losses | tokens | more


def results(groups, text=HOSTILE[0], **more):
    values = {
        "name": r"$\R$ [/x]|",
        "facts": {"data": "[/x] $\\R$ a|b"},
        "settings": (),
        "train": [{"step": i, "loss": 5.0 - i, "kind": "train"} for i in (1, 2, 3)],
        "evaluations": [evaluation(0, groups), evaluation(3, groups)],
        "wall_time": [("step", 3.0), ("start", 1.0)],
        "answers": [ComparedAnswer(g, "f:1", text, text, text, text) for g in groups],
        "samples": [Sample(3, text, text)],
    }
    return RunResults(**values | more)


def screen(show, *arguments, width=200):
    file = io.StringIO()
    show(Console(file=file, width=width), *arguments)
    return file.getvalue()


@pytest.mark.parametrize("group", HOSTILE)
def test_a_hostile_name_is_shown_as_it_is(group):
    found = results([group, "plain"], text=group + "\n```\n" + group)
    assert (group or "(none)") in screen(terminal.show_results, found)
    lines = run_page.format_report(found).splitlines()
    cells = [x for x in lines if x.startswith("|") and x.count("|")]
    # A pipe within a cell is escaped: as many cells in all rows of a table.
    assert {x.replace(r"\|", "").count("|") for x in cells} == {8, 4}
    # Inside a fence nothing is Markdown; a fence in the text does not end it.
    assert lines.count("````text") == 6 * 2 - 2 and "```" in lines


def test_hostile_names_are_drawn():
    """In one plot, which any of them would stop."""
    assert len(loss_plot.draw_loss(results([*HOSTILE, "plain"]))) > 10_000
    # No rows were held out.
    assert len(loss_plot.draw_loss(results([], evaluations=[]))) > 10_000


def test_every_special_sign_of_markdown_is_escaped():
    signs = escaped(r"\ ` * [ ] < > | $ ~ & # _a_ b" "\n# c")
    assert signs == r"\\ \` \* \[ \] \< \> \| \$ \~ \& \# \_a\_ b \# c"
    assert escaped("closed_qa") == "closed_qa"


def test_control_characters_are_written_out():
    found = results([CONTROLS], text=CONTROLS, name=CONTROLS, facts={"data": CONTROLS})
    span = PreviewSpan((1,), CONTROLS, True)
    row = PreviewRow((PreviewDocument("g", "f:1", (span,)),))
    for shown in (
        screen(terminal.show_results, found),
        screen(terminal.show_findings, [Finding(CONTROLS, CONTROLS)]),
        screen(terminal.show_preview, [row]),
        run_page.format_report(found),
        run_page.format_page(found),
    ):
        assert "x1b" in shown and not set(CONTROLS) - set(" \n[2Ja31mbc") & set(shown)


def test_findings_and_previews_print_markup_as_text():
    assert "[/x]" in screen(terminal.show_findings, [Finding("[/x]", "[red]y[/z]")])
    span = PreviewSpan((1,), "[/x]", True)
    row = PreviewRow((PreviewDocument("[/x]", "f:1", (span,)),))
    assert "[[[/x]]]" in screen(terminal.show_preview, [row])


def test_long_words_of_a_table_are_wrapped_and_not_cut():
    word = "x".join(map(str, range(60)))
    layouts = plan_tables._table("layouts", "mesh", "HBM")
    layouts.add_row(word, "50%")
    shown = (
        screen(terminal.show_findings, [Finding("data", word)], width=80),
        screen(terminal.show_results, results([word], text=word), width=80),
        screen(Console.print, layouts, width=80),
    )
    for text in shown:
        assert "…" not in text


def test_a_row_of_each_schema_is_shown_and_of_other_rows_the_first():
    rows = [
        PreviewRow((PreviewDocument("g", "f:1", (PreviewSpan((1,), text, True),)),), of)
        for text, of in (("one", ""), ("two", ""), ("three", "[/x]"), ("four", "q"))
    ]
    shown = screen(terminal.show_preview, rows)
    assert "two" not in shown and "a row of [/x], " in shown
    assert all(f"[[{word}]]" in shown for word in ("one", "three", "four"))


def test_a_long_row_is_cut_and_says_so():
    span = PreviewSpan((1,), "word " * 3000, False)
    row = PreviewRow((PreviewDocument("g", "f:1", (span,)),))
    shown = screen(terminal.show_preview, [row])
    assert len(shown) < 4500 and "characters more in preview.json" in shown


def test_losses_of_two_data_sets_are_not_compared():
    """Evaluations before the data changed: other groups, or other tokens in them."""
    old, new = evaluation(0, ["a", "b"]), [evaluation(s, ["b", "c"]) for s in (4, 8)]
    header, *rows = tabulate_losses([old, *new])
    assert [row[0] for row in rows] == ["b", "c", "all"]
    assert rows[-1][2:4] == ["7.000", "11.000"] and header[2] == "loss step 4"
    fewer = evaluation(0, ["b", "c"]) | {"tokens/b": 1, "tokens/c": 2}
    assert tabulate_losses([fewer, *new]) == [header, *rows]
    assert tabulate_losses([]) == []


def test_rows_of_as_many_tokens_may_be_other_data(tmp_path):
    """A line names its data; one of an earlier version does not."""
    steps = ((0, "one"), (4, "one"), (4, "two"), (8, "two"))
    lines = [evaluation(step, ["a"], data=data) for step, data in steps]
    header, row, _ = tabulate_losses(lines)
    assert header[2] == "loss step 4" and row[2:4] == ["6.000", "10.000"]
    unnamed = [{k: v for k, v in x.items() if k != "data"} for x in lines]
    assert tabulate_losses(unnamed)[1][2:4] == ["2.000", "10.000"]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    found = read_results(tmp_path, {}, []).evaluations
    assert [(x["step"], x["data"]) for x in found] == [(4, "two"), (8, "two")]


def test_a_category_named_all_is_not_the_total():
    header, *rows = tabulate_losses([evaluation(0, ["all", "", "(none)", "b"])])
    named = ["(none)", "(none) (category)", "all (category)", "b", "all"]
    assert [row[0] for row in rows] == named
    assert header[0] == "category" and rows[-1][1] == "46"


def test_rows_without_a_category_have_a_name_and_no_second_plot():
    line = evaluation(0, [""])
    assert "loss/(none)" in line and not any(field.endswith("/") for field in line)
    older = {f"{field.partition('/')[0]}/": 1 for field in line if "/" in field}
    assert by_group(older, "loss") == {"(none)": 1}
    found = results([""])
    assert loss_plot._plots(found) == [loss_plot._draw_all]
    assert len(loss_plot._plots(results(["", "a"]))) == 2
    _, *rows = tabulate_losses(found.evaluations)
    assert [row[:2] for row in rows] == [["all", "10"]], "one row, with all tokens"
    assert loss_plot.draw_loss(found).startswith(b"\x89PNG")


def test_text_has_bits_per_byte():
    bits = {"bits_per_byte": 1.25, "bits_per_byte/a": 1.5}
    header, row, total = tabulate_losses([evaluation(s, ["a"], **bits) for s in (0, 2)])
    assert header[-2:] == ["bits/byte start", "tuned"]
    assert (row[-2:], total[-2:]) == (["1.500"] * 2, ["1.250"] * 2)


@contextlib.contextmanager
def figure_of(found):
    """The figure of a run, laid out as in its file, and its two plots."""
    from matplotlib import pyplot

    with pyplot.rc_context({"text.parse_math": False}):
        figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        loss_plot._draw(figure, axes, found)
        figure.canvas.draw()
        yield figure, axes
    pyplot.close(figure)


def names_in(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_plot_names_every_group():
    """A label that begins with an underscore is hidden by default."""
    with figure_of(results([*HOSTILE, CONTROLS])) as (_, (_, right)):
        named = sorted(name or "(none)" for name in [*HOSTILE, CONTROLS])
        shown = [visible(name) for name in named]
        assert names_in(right) == shown and "\x1b" not in "".join(shown)
        assert right.get_title() == "held-out loss by category"


def test_of_many_groups_the_highest_and_lowest_are_named():
    """All of them are drawn, and none takes the place of the mean."""
    groups = ["all", *(f"{i:03} {'x' * 300} {i:03}" for i in range(60))]
    with figure_of(results(groups)) as (_, (_, right)):
        mean, others, *named = names_in(right)
        assert (mean, others) == ("all", "53 others")
        # The values of `evaluation` rise with the number of the group.
        assert [name[-3:] for name in named[:-1]] == [
            *("059", "058", "057", "056"),
            *("002", "001", "000"),
        ]
        assert named[-1] == "all (category)" and max(map(len, named)) <= 40
        assert len(right.lines) == len(groups) + 1 + len(named)
        assert right.get_title().endswith("highest and lowest 4 of 61")


def test_more_categories_than_have_losses_are_one_in_the_report():
    names = _group_categories([f"id {i}" for i in range(2000)] + ["usual"] * 500)
    groups = sorted(set(names.values()))
    assert groups == ["(other)", "usual"]
    found = results(groups)
    with figure_of(found) as (_, (_, right)):
        assert names_in(right) == groups
    assert "| (other) | 10 |" in run_page.format_report(found)
    assert ">(other)</td>" in run_page.format_page(found)


@pytest.mark.parametrize("count, letters", [(1, 300), (8, 25), (40, 300)])
def test_legends_lie_below_the_plots_and_hide_nothing(count, letters):
    groups = [f"{i:03}" + "m" * letters for i in range(count)]
    with figure_of(results(groups, name="m" * 300)) as (figure, axes):
        boxes = [one.get_legend().get_window_extent() for one in axes]
        for one, legend in zip(axes, boxes, strict=True):
            assert legend.y1 < one.xaxis.label.get_window_extent().y0
            assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= legend.y0
            assert one.get_window_extent().height > 300
        assert boxes[0].x1 < boxes[1].x0
        title = figure._suptitle.get_window_extent()
        assert figure.bbox.x0 <= title.x0 and title.x1 <= figure.bbox.x1


def test_smoothing_does_not_lag_nor_bend_the_first_values():
    falling = [5.0 - 0.01 * i for i in range(200)]
    assert loss_plot.smoothed(falling) == pytest.approx(falling)
    noisy = [x + (-1) ** i for i, x in enumerate(falling)]
    apart = np.abs(np.subtract(loss_plot.smoothed(noisy), falling))
    assert apart.max() < 0.4 and apart[10:-10].max() < 0.11
    odd = [*falling[:50], math.nan, math.inf, *falling[52:]]
    assert loss_plot.smoothed(odd) == pytest.approx(falling)
    for few in ([], [1.0], [1.0, 2.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        assert loss_plot.smoothed(few) == pytest.approx(few)
    assert np.isnan(loss_plot.smoothed([math.nan] * 4)).all()


class Shown(html.parser.HTMLParser):
    """The text of a page as a browser shows it, and the addresses it would fetch."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.links = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_is_one_file_that_says_what_the_run_is():
    long = "first line\n" + "word " * 2000 + "last <word>"
    found = results(
        ["a"],
        text=long,
        facts={"seed": 7, "command": "python -m x '<script>alert(1)</script>'"},
        settings=[["knob", "value", "default"], ["config.lora.rank", "4", "16"]],
    )
    page = Shown(run_page.format_page(found, b"\x89PNG"))
    assert page.links == ["data:image/png;base64,iVBORw=="]
    assert not {"script", "link", "iframe"} & {*page.tags}
    assert "<script>alert(1)</script>" in page.text and "config.lora.rank" in page.text
    # A long text is folded, and whole.
    assert page.text.count(long) == 7 and page.tags.count("details") == 6
    assert "img" not in Shown(run_page.format_page(found)).tags
    text = run_page.format_report(found)
    assert "- seed: 7\n" in text and long in text
    assert "| config.lora.rank | 4 | 16 |" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_quotes_every_name_and_text(text):
    found = results([text, "plain"], text=text, name=text, facts={text or "x": text})
    page = Shown(run_page.format_page(found))
    assert page.text.count(text) > 12 if text else "(none)" in page.text
    assert not {"b", "s", "i", "x"} & {*page.tags}


def test_a_defect_in_one_part_costs_no_other(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise KeyError("defect")

    monkeypatch.setattr(loss_plot, "draw_loss", fail)
    console = Console(file=io.StringIO())
    failed = final_report.write_report(console, tmp_path, results(["a"]))
    assert failed == ["loss.png: KeyError: 'defect'"] and "Traceback" in caplog.text
    assert "# " in (tmp_path / "report.md").read_text()
    assert "held out" in console.file.getvalue()


def test_any_part_of_the_end_may_fail_but_the_disk(caplog):
    def fail(error):
        raise error

    failed = []
    assert final_report.attempt("a part", lambda: 3, failed, OSError) == 3
    assert final_report.attempt("b", lambda: fail(ValueError("x")), failed) is None
    assert final_report.attempt("c", lambda: fail(OSError("y")), failed) is None
    assert (
        failed == ["b: ValueError: x", "c: OSError: y"]
        and "no part for b" in caplog.text
    )
    with pytest.raises(OSError):
        final_report.attempt("d", lambda: fail(OSError("z")), failed, OSError)


def test_answers_and_metrics_that_are_lost_do_not_cost_the_completion(
    tmp_path, monkeypatch
):
    """A run of which all steps are done, and nothing else is as it should be."""

    def fail(*_):
        raise ValueError("no base")

    folder = RunDir(tmp_path / "run")
    with folder.create(Config(), dict.fromkeys(IDENTITY_PARTS, "x"), []):
        pass
    monkeypatch.setattr(finish_run, "tuned_generator", lambda *_: None)
    monkeypatch.setattr(run_page, "tabulate_losses", fail)
    space = types.SimpleNamespace
    base = space(name="base", tokenizer=None, tensors=None)
    run = space(
        folder=folder,
        history=History(folder.history, PhaseTimer()),
        config=space(export=False, steps=3),
        definition=space(mesh=None),
        alike=None,
        base=base,
        answers=space(rows=[1], answer=fail, not_asked=[]),
        answered=None,
        task=space(origin="rows", rows=0),
        decoders=None,
        state=TrainState(3, {}, None),
        frozen=None,
        console=Console(file=io.StringIO()),
    )
    odd = {"kind": "eval", "step": 3, "loss": 1, "tokens/a": "x"}
    (folder.path / "metrics.jsonl").write_bytes(json.dumps(odd).encode() + b"\n\xff\n")
    finish_run.finish(run, 3)
    facts = json.loads((folder.path / "complete.json").read_text())
    assert "the answers: ValueError: no base" in facts["missing in the report"]
    assert "report.md: ValueError" in facts["missing in the report"]
    folder._lock.release()


def test_a_full_disk_is_no_defect(tmp_path):
    with pytest.raises(OSError):
        final_report.write_report(
            Console(file=io.StringIO()), tmp_path / "gone", results(["a"])
        )


def test_what_is_written_is_read_back(tmp_path):
    findings = [Finding("a", "b\nc", False, "d", {"n": 1.5}), Finding("\udcff", "x")]
    spans = (PreviewSpan((1, 2), "\u2028x", False), PreviewSpan((3,), "y", True))
    rows = [PreviewRow((PreviewDocument("g", "f:1", spans),))]
    answers = results(HOSTILE).answers
    display_files.write_findings(tmp_path, findings)
    display_files.write_preview(tmp_path, rows)
    display_files.write_answers(tmp_path, answers)
    assert display_files.read_findings(tmp_path) == findings
    assert display_files.read_preview(tmp_path) == rows
    assert read_results(tmp_path, {}, []).answers == answers
    assert json.loads((tmp_path / "doctor.json").read_text())["ok"] is False


def test_a_step_made_again_replaces_its_samples(tmp_path):
    display_files.add_samples(tmp_path, 0, [])
    assert not list(tmp_path.iterdir())
    first = [Sample(step, "p\u2028", str(step)) for step in (1, 2, 3)]
    for sample in first:
        display_files.add_samples(tmp_path, sample.step, [sample])
    again = dataclasses.replace(first[1], text="again")
    display_files.add_samples(tmp_path, 2, [again])
    assert display_files.read_samples(tmp_path) == [first[0], again]


def test_lines_that_are_no_samples_cost_no_others(tmp_path, caplog):
    sample = Sample(1, "p", "x")
    display_files.add_samples(tmp_path, 1, [sample])
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 2}\n\xff\n')
    display_files.add_samples(tmp_path, 3, [Sample(3, "p", "z")])
    assert display_files.read_samples(tmp_path) == [sample, Sample(3, "p", "z")]
    assert "2 of 3 lines cannot be read" in caplog.text


@pytest.mark.parametrize("name", ["doctor", "preview", "answers"])
def test_a_file_of_a_run_that_holds_something_else_is_named(tmp_path, name):
    read = {
        "doctor": display_files.read_findings,
        "preview": display_files.read_preview,
        "answers": display_files.read_answers,
    }[name]
    assert read(tmp_path) == []
    for content in ("", "[]", "{}", '{"findings": [3], "rows": [{}], "answers": {}}'):
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(UserError, match=f"{name}.json cannot be used .*remove it"):
            read(tmp_path)


def test_the_page_draws_the_course_of_the_run_and_no_peak_is_lost():
    line = {"kind": "train", "loss": 1.0, "tokens": 1}
    train = [
        line
        | {"step": n, "learning_rate": 1e-3, "grad_norm": 50.0 if n == 777 else 1.0}
        for n in range(1, 3001)
    ]
    train[5]["grad_norm"] = math.nan
    _, rate, norm = run_page.drawn_curves(run_page.columns_of(train))
    assert (rate.title, rate.last, rate.steps) == ("learning rate", "0.001", (1, 3000))
    assert (norm.low, norm.high) == ("1", "50")
    points = [tuple(map(float, point.split(","))) for point in norm.points.split()]
    assert len(points) <= run_page.CURVE_POINTS + 2 and "nan" not in norm.points
    assert [p for p in points if p[1] < 60] == [(pytest.approx(155.25, abs=0.1), 0.0)]
    assert points[0][0] == 0 and points[-1][0] == run_page.CURVE_WIDTH
    for picture, curves in ((b"", 3), (b"\x89PNG", 2)):  # The picture has the loss.
        page = run_page.format_page(results(["a"], train=train), picture)
        assert page.count("<polyline") == curves and "<script" not in page
    for few in (train[:1], []):
        assert run_page.drawn_curves(run_page.columns_of(few)) == []


def test_the_page_has_starts_findings_and_the_end_of_the_log(tmp_path):
    """And first of all why the run has failed, with what its log says to do."""
    run = make_run(tmp_path / "<i>a", "failed")
    record = json.loads((run / "run.json").read_text())
    record["starts"].append(record["starts"][0] | {"first": None, "step": None})
    (run / "run.json").write_text(json.dumps(record))
    findings = [
        Finding("rows", "7 <b>"),
        Finding("loss", "is high", ok=False, remedy="lower the rate"),
    ]
    display_files.write_findings(run, findings)
    log = "step 3\nerror: no room <u>\n  use less\n"
    run.with_name("<i>a.log").write_text("x" * 2 * LOG_BYTES + "\n" + log)
    found = read_results(run, {}, [])
    assert found.problems == ["error: no room <u>\n  use less"]
    page, text = run_page.format_page(found), run_page.format_report(found)
    shown = Shown(page)
    for part in ("<i>a", "7 <b>", "is high\nlower the rate", "1 cpu", "0 to 3", log):
        assert part in shown.text, part
    assert shown.text.index("use less") < shown.text.index("The run")
    assert not {"b", "i", "u"} & {*shown.tags} and len(page) < 3 * LOG_BYTES
    assert "| elsewhere | 1 cpu | none |" in text and "lower the rate" in text
    # A damaged file costs its part alone.
    (run / "doctor.json").write_text("{")
    (run / "run.json").write_text("[]")
    found = read_results(run, {}, [])
    assert len(found.problems) == 2 and found.log and found.train
    # Without a log the cause stands there, and a run that goes well has no problem.
    for end, problems in (("failed", 1), ("stopped", 0), ("killed", 0)):
        run = make_run(tmp_path / end, end)
        found = read_results(run, {}, [])
        assert len(found.problems) == problems and len(found.starts) == 1
