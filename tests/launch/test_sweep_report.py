"""The report says what metrics.jsonl says: every number is worked out here anew."""

import html
import json
import random
import re
from pathlib import Path
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from commands import ROOT
from doors import run_door
from scipy import stats

from launch.report import (
    best_run,
    seed_statistics,
    sweep_page,
    sweep_plots,
    sweep_results,
)
from launch.report.__main__ import main
from launch.sweep import sweep_runs
from launch.sweep.sweep_spec import Sweep, grid, listed
from research.core.errors import UserError
from research.report import markdown_text
from research.runs import provenance

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

CONFIG = str(ROOT / "configs" / "finetune_dolly.py")
EFFECT = {"4": 0.3, "8": 0.0, "16": -0.2, "<b>|$a_b_c$": 0.001}
STEPS = (0, 10, 20)
CODE = "0123456789abcdef"


def metrics(rng, effect, seed):
    """Lines of a run of 20 steps on a split whose level the seed decides."""
    level, lines = 3.0 + seed, []
    for step in range(1, 21):
        lines.append(
            {
                "kind": "train",
                "step": step,
                "elapsed_s": 2.5 * step,
                "loss": level,
                "memory_gb": 0.0,
                "tokens": 90 + seed,
            }
        )
    for step in STEPS:
        loss = level + effect * step / 20 + rng.normalvariate(0, 0.004)
        more = {"loss/qa": 1.5, "tokens/qa": 30}
        lines.append({"kind": "eval", "step": step, "loss": loss, **more})
    return sorted(lines, key=lambda line: line["step"])


@pytest.fixture
def folder(tmp_path):
    """Three seeds of four ranks; the last run of the first point is not done."""
    points = {name: {"lora.rank": 1 + i} for i, name in enumerate(EFFECT)}
    sweep = Sweep(
        config=CONFIG,
        axes=[listed("lora.rank", **points)],
        baseline={"lora.rank": "8"},
        question="Is <script> quoted?",
    )
    found = sweep_runs.expand(sweep, tmp_path)
    sweep_runs.write(tmp_path, sweep, "s.py", found)
    rng = random.Random(0)
    for run in found:
        run.folder.mkdir()
        lines = metrics(rng, EFFECT[run.point[0]], run.config.seed)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.folder / "metrics.jsonl").write_text(text)
        starts = [
            {
                "devices": "8 TPU v5e",
                "cause": "SIGTERM after step 20",
                "provenance": provenance.describe({provenance.CODE_VERSION: CODE}),
            }
        ]
        (run.folder / "run.json").write_text(json.dumps({"starts": starts}))
        if run is not found[2]:
            (run.folder / "complete.json").write_text("{}")
    return tmp_path


def read(place):
    return [json.loads(x) for x in (place / "metrics.jsonl").read_text().splitlines()]


def last_losses(folder):
    """By label and seed, read without the code under test."""
    found = {}
    for run in json.loads((folder / "sweep.json").read_text())["runs"]:
        place = folder / run["name"]
        lines = read(place)
        held = [x["loss"] for x in lines if x["kind"] == "eval"]
        if (place / "complete.json").exists():
            found.setdefault(run["point"][0], {})[run["seed"]] = held[-1]
    return found


def table(folder):
    lines = (folder / "report.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", x)[1:-1] for x in lines if x.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row] for row in rows[2:]}


def test_the_table_is_that_of_the_metrics(folder):
    sweep_page.write(folder)
    rows, losses = table(folder), last_losses(folder)
    assert len(rows) == len(losses) == 4
    for label, by_seed in losses.items():
        _, seeds, mean, spread, against, between, _, time, tokens, hours = rows[
            markdown_text.escaped(label)
        ]
        values = list(by_seed.values())
        mean_of, sem = np.mean(values), stats.sem(values)
        own = stats.t.interval(0.95, len(values) - 1, mean_of, sem)
        shown = [float(x) for x in spread.split(" to ")]
        assert shown == pytest.approx(own, abs=6e-5)
        assert int(seeds) == len(by_seed)
        assert float(mean) == pytest.approx(np.mean(list(by_seed.values())), abs=6e-5)
        assert time == "0:50"
        mine = [20 * (90 + seed) for seed in by_seed]
        assert float(tokens.replace(",", "")) == pytest.approx(np.mean(mine), abs=0.6)
        assert float(hours) == pytest.approx(50 * 8 / 3600, abs=6e-4)
        if label == "8":
            assert against == "-"
            continue
        shared = sorted(by_seed.keys() & losses["8"].keys())
        a, b = ([x[seed] for seed in shared] for x in (by_seed, losses["8"]))
        assert float(against) == pytest.approx(np.subtract(a, b).mean(), abs=6e-5)
        low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
        shown = [float(x) for x in between.split(" to ")]
        assert shown == pytest.approx([low, high], abs=6e-5)


def test_the_values_are_those_of_the_page(folder):
    sweep_page.write(folder)
    values = json.loads((folder / "report.json").read_text())
    shown = table(folder)
    for cells in values["rows"]:
        escaped = [*map(markdown_text.escaped, cells)]
        assert shown[escaped[0]] == escaped
    assert (values["done"], values["count"]) == (11, 12)
    said = markdown_text.escaped(values["best"]["words"])
    assert said in (folder / "report.md").read_text()
    known = last_losses(folder).values()
    assert values["best"]["value"] in {x for by_seed in known for x in by_seed.values()}
    states = [run["state"] for run in values["runs"]]
    assert states.count("done") == 11 and "step 20" in states[2]


def test_the_verdicts_are_in_words(folder):
    sweep_page.write(folder)
    verdicts = {label: row[6] for label, row in table(folder).items()}
    assert verdicts["8"] == "baseline"
    assert re.fullmatch(r"better than the baseline by 0\.(19|20)\d\d", verdicts["16"])
    assert verdicts["4"].endswith("1 of 3 runs not done")
    assert verdicts[r"\<b\>\|\$a_b_c\$"] == "not distinguishable at 3 seeds"


def test_the_best_run_is_named_with_how_sure_that_is(folder):
    """16 is far below the others; 8 and the odd label lie within the noise."""
    sweep_page.write(folder)
    losses = last_losses(folder)
    means = {label: np.mean(list(found.values())) for label, found in losses.items()}
    place = min((v, seed) for seed, v in losses["16"].items())
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert f"lora.rank=16 has the lowest mean loss: {means['16']:.4f}" in text
        assert "over 3 seeds, 95 % interval" in text
        apart = means["8"] - means["16"]
        assert f"8 (by {apart:.4f})" in text and "It is better than" in text
        assert "1 point is not compared: some of their runs are not done" in text
        assert "--config.lora.rank=3" in text and f"{place[0]:.4f}" in text
    assert re.search(rf"lowest value: \[.*16.*seed-{place[1]}", text.replace("<", "["))


def points_of(values, seeds, baseline="a"):
    """A report of one axis, from `{label: values by seed}`."""
    results = {
        label: tuple(
            sweep_results.RunResult(
                f"{label}-{seed}", (label,), seed, (), "done", ((1, v),), v,
                1.0, 1, 0.1, "",
            )
            for seed, v in zip(seeds, found, strict=True)
        )
        for label, found in values.items()
    }  # fmt: skip
    by_seed = {
        label: {r.seed: r.value for r in found} for label, found in results.items()
    }
    rows = []
    for label, found in results.items():
        compared = seed_statistics.compare(by_seed[label], by_seed[baseline])
        own = (None, 1.0) if label == baseline else (compared, compared.p)
        rows.append(sweep_results.PointResult((label,), found, *own, ""))
    points = {label: {"lora.rank": i + 1} for i, label in enumerate(values)}
    sweep = {
        "axes": [{"name": "r", "points": points}], "metric": "loss",
        "baseline": [baseline],
    }  # fmt: skip
    return sweep_results.SweepReport(Path("x"), sweep, tuple(rows))


def test_one_seed_says_that_noise_is_unknown():
    best = best_run.find_best(points_of({"a": [2.0], "b": [1.0]}, [0]))
    assert "r=b has the lowest mean loss: 1.0000, with one seed." in best.words
    assert "nothing is known about noise" in best.words
    assert (best.flags, best.run.name) == ("--config.lora.rank=2", "b-0")


def test_what_lies_within_the_noise_is_not_called_better():
    """`c` is the best of three means; its lead over `b` changes sign with the seed."""
    values = {"a": [3.0, 3.1, 3.2], "b": [2.0, 2.3, 2.0], "c": [2.1, 2.0, 2.1]}
    best = best_run.find_best(points_of(values, [0, 1, 2]))
    assert best.words.startswith("r=c has the lowest mean")
    assert "It is not distinguishable from b at 3 seeds." in best.words
    assert "better than a" in best.words


def test_a_lead_over_many_is_corrected_for_every_pair():
    """Three seeds that show a lead alone do not show it as one of 45 pairs."""
    few = {"z": [3.0, 3.1, 3.2], "a": [2.0, 2.2, 2.1], "b": [1.9, 2.08, 2.0]}
    many = few | {f"n{i}": [2.5 + i, 2.1 + i, 2.9 + i] for i in range(7)}
    seeds = [0, 1, 2]
    found = {
        size: best_run.find_best(points_of(values, seeds, "z")).words
        for size, values in (("few", few), ("many", many))
    }
    assert seed_statistics.compare(*_by_seed(few, "b", "a")).p < 0.05 / 3
    assert "better than a" in found["few"]
    assert "not distinguishable from a" in found["many"]


def _by_seed(values, *labels):
    return [dict(enumerate(values[label])) for label in labels]


def test_the_page_needs_no_other_file_and_quotes_what_it_shows(folder):
    sweep_page.write(folder)
    text = (folder / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "<b>|" not in text
    assert text.count("<svg") == 2
    assert "$a_b_c$" in (folder / "curves.svg").read_text(), "read as a formula"
    assert not re.search(r'(src|href)="(https?:)?//', text)
    assert not re.search(r"<(link|img|script)", text)
    for run in json.loads((folder / "sweep.json").read_text())["runs"]:
        assert f"--config.run_dir={folder / run['name']}" in text


def test_a_hostile_label_is_shown_as_it_is_in_every_form(tmp_path):
    """Markdown, HTML, SVG and what hides a line's name from a legend."""
    odd = "_[x](y)|`$z$\x1b[1m<i>"
    sweep = Sweep(
        config=CONFIG,
        axes=[listed("lora.rank", **{odd: {"lora.rank": 2}, "nan": {"lora.rank": 3}})],
        question="[q](r) <i>\n# s",
    )
    sweep_runs.write(
        tmp_path, sweep, "`s|.py", runs := sweep_runs.expand(sweep, tmp_path)
    )
    for run in runs:
        run.folder.mkdir()
        lines = metrics(random.Random(0), 0.0, run.config.seed)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (run.folder / "metrics.jsonl").write_text(text)
        (run.folder / "complete.json").write_text("{}")
    sweep_page.write(tmp_path)
    shown = odd.replace("\x1b", r"\x1b")
    for name in ("curves", "axis-1"):
        tree = ElementTree.fromstring((tmp_path / f"{name}.svg").read_text())
        assert shown in "".join(tree.itertext())
    page = (tmp_path / "report.html").read_text()
    assert html.escape(shown, quote=False) in page and "<i>" not in page
    text = (tmp_path / "report.md").read_text()
    assert r"| \_\[x\](y)\|\`\$z\$\\x1b\[1m\<i\> |" in text
    assert r"Question: \[q\](r) \<i\> \# s" in text and r"\`s\|.py" in text
    assert "\x1b" not in page + text


def test_a_sweep_that_holds_something_else_is_one_line(folder):
    path = folder / "sweep.json"
    for content in (
        "",
        "[]",
        "{}",
        path.read_text().replace('"seed": 1', '"seed": "1"'),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=r"sweep\.json cannot be used .*anew"):
            sweep_results.load(folder)


def test_curves_and_bands_are_the_seeds(folder, monkeypatch):
    """The drawn values, not the picture, are compared with the files."""
    drawn, band = {}, sweep_plots._band

    def draw(axes, found, style):
        drawn.setdefault(style["label"], found)
        return band(axes, found, style)

    monkeypatch.setattr(sweep_plots, "_band", draw)
    report = sweep_results.load(folder)
    sweep_plots.curves(report)
    for name, curves in drawn.items():
        row = next(x for x in report.rows if x.point == (name,))
        for result, curve in zip(row.results, curves, strict=True):
            lines = read(folder / result.name)
            assert curve == {x["step"]: x["loss"] for x in lines if x["kind"] == "eval"}


def test_along_an_axis_stand_means_and_differences_with_their_intervals(
    folder, monkeypatch
):
    drawn, bars = [], sweep_plots._bars

    def draw(axes, found, style):
        drawn.append(found)
        return bars(axes, found, style)

    monkeypatch.setattr(sweep_plots, "_bars", draw)
    report = sweep_results.load(folder)
    sweep_plots.along(report, 0)
    left, right = drawn
    losses, places = last_losses(folder), {name: i for i, name in enumerate(EFFECT)}
    assert left.keys() == set(places.values())
    for name, by_seed in losses.items():
        values = list(by_seed.values())
        found = left[places[name]]
        assert found.mean == pytest.approx(np.mean(values))
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
        assert found.half == pytest.approx(half)
        if name != "8":
            shared = by_seed.keys() & losses["8"].keys()
            apart = [by_seed[seed] - losses["8"][seed] for seed in shared]
            assert right[places[name]].mean == pytest.approx(np.mean(apart))
    assert right.keys() == left.keys() - {places["8"]}


def test_runs_that_were_not_made_alike_are_told(folder):
    sweep_page.write(folder)
    text = (folder / "report.md").read_text()
    made = f"code {CODE[:12]}, JAX {jax.__version__}, 8 TPU v5e"
    assert f"All by {made}." in text
    place = next(folder.glob("*seed-1")) / "run.json"
    other = json.loads(place.read_text())
    other["starts"][-1]["provenance"]["code"] = "fedcba9876543210"
    place.write_text(json.dumps(other))
    sweep_page.write(folder)
    text = (folder / "report.md").read_text()
    assert "not made alike" in text and "1 by code fedcba987654" in text
    assert "not made alike" in (folder / "report.html").read_text()


def test_numbers_have_a_scale_and_names_have_none():
    def positions(*labels):
        return sweep_plots._positions({"points": {label: {} for label in labels}})

    assert positions("4", "16", "64") == ({"4": 4.0, "16": 16.0, "64": 64.0}, "log")
    assert positions("1", "2", "3")[1] == "linear"
    assert positions("attention", "mlp") == ({"attention": 0.0, "mlp": 1.0}, "")


def test_another_metric_and_one_that_is_not_measured(tmp_path, folder):
    path = folder / "sweep.json"
    sweep = json.loads(path.read_text())
    for metric in ("loss/qa", "by_group.qa"):  # The second in earlier versions.
        path.write_text(json.dumps(sweep | {"metric": metric}))
        results = [r for row in sweep_results.load(folder).rows for r in row.results]
        assert all(r.value == 1.5 for r in results if r.state == "done")
    path.write_text(json.dumps(sweep | {"metric": "bits_per_byte"}))
    with pytest.raises(UserError, match=r"has loss and loss/qa"):
        sweep_results.load(folder)


def test_one_run_that_lacks_the_metric_does_not_end_the_report(folder):
    path = folder / "sweep.json"
    sweep = json.loads(path.read_text()) | {"metric": "loss/qa"}
    path.write_text(json.dumps(sweep))
    name = sweep["runs"][0]["name"]
    metrics = folder / name / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss/qa": 1.5, ', ""))
    found = {r.name: r for row in sweep_results.load(folder).rows for r in row.results}
    assert found[name].value is None and found[name].state == sweep_results.UNMEASURED
    assert sum(r.state == "done" for r in found.values()) == len(found) - 2


def test_nothing_done_yet_is_a_report_too(tmp_path):
    sweep = Sweep(config=CONFIG, axes=[grid("lora.rank", 4, 8)], seeds=(0,))
    sweep_runs.write(tmp_path, sweep, "s.py", sweep_runs.expand(sweep, tmp_path))
    sweep_page.write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "0 of 2 runs are done" in text and "not begun" in text


def report(folder, *flags):
    return run_door(main, folder, "launch.report", *flags)


def test_the_command_writes_and_shows(folder):
    done = report(folder, f"--sweep={folder}")
    assert done.returncode == 0, done.stderr
    assert "better than the baseline" in done.stdout
    assert str(Path(folder) / "report.html") in done.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--sweep=absent",), "absent has no sweep.json"),
        (("--sweep=x/lora_rank.py",), "runs/sweeps/lora_rank has no sweep.json"),
        (("--sweep=absent",), "name the folder of its runs with --folder=DIR"),
        (("runs/mine",), "unexpected argument 'runs/mine'; write --sweep=runs/mine"),
        ((), "--sweep"),
        (("--swep=a",), "--swep"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, said):
    done = report(tmp_path, *flags)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
