"""One run: figures and curves as they come, samples, log, findings, starts."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from research.checkpoints.stored_steps import size_of, step_folders
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.thinning import MOST_POINTS, smooth, thin
from research.report.result_tables import comparable, tabulate_losses
from research.report.run_page import format_page
from research.report.run_results import LOG_BYTES, read_results
from research.runs.control.job_logs import last_error, log_of, tail
from research.runs.display_files import read_findings, read_samples
from research.runs.run_directory import RunDir
from research.runs.run_history import goodput
from research.runs.run_history import read as read_history
from research.studio.jobs import job_commands as commands
from research.studio.listing.run_index import is_run
from research.studio.listing.run_notes import read_notes
from research.studio.live.metric_columns import MetricColumns, held_out_curves
from research.studio.live.run_feed import figures, plain_list
from research.studio.page_errors import not_found
from research.studio.pages.page_view import (
    format_number,
    json_answer,
    number_of,
    render,
    studio_of,
)
from research.studio.roots import shown_paths
from research.tasks.model_answers import Sample

# Field, title, unit of each chart of a `train` line.
CHARTS = (
    ("loss", "Training loss", "per step"),
    ("learning_rate", "Learning rate", "per step"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("tokens_per_s", "Tokens per second", "tokens/s"),
    ("memory_gb", "Peak memory", "GB"),
)
HELD_OUT = "held_out"
TABLE_ROWS = 40  # of a chart's data table
SAMPLES = 12
MOST_STEP = 2**62
WRONG_VALUES = (ArithmeticError, TypeError, ValueError)  # of a damaged file
REQUESTS = {
    "stop": "Save after the step in hand, then end. Resumes bit for bit on a CPU.",
    "checkpoint": "Save now and continue.",
    "sample": "Answer eval.prompts held-out prompts now; see Samples below.",
}


def run(request: Request) -> Response:
    """The page of a run."""
    name = request.path_params["name"].strip("/")
    studio = studio_of(request)
    folder = find_run(request, name)
    columns = studio.columns(folder)
    state = studio.state_of(folder)
    tags, notes = read_notes(folder)
    log = tail(log_of(folder), LOG_BYTES)
    return render(
        request,
        "run.html.jinja",
        title=name,
        name=name,
        folder=folder,
        state=state,
        figures=figures(columns, state.steps, state.first),
        bad_lines=columns.bad,
        bad_file=columns.problem,
        tables=_tables(columns),
        losses=tabulate_losses(comparable(columns.evals())),
        size=size_of(folder),
        tags=tags,
        notes=notes,
        steps=[int(path.name) for path in step_folders(folder / "checkpoints")],
        requests={
            kind: (help, commands.requesting(folder, kind))
            for kind, help in REQUESTS.items()
        },
        resume=commands.launching(commands.resuming(folder)),
        job=studio.queue.read().state_of(folder),
        log=log,
        error=last_error(log) if state.state == "failed" else "",
        said=request.query_params.get("said", ""),
        evaluate=commands.as_text([f"--run={shown_paths([folder])[0]}"]),
        **_from_files(folder),
    )


def find_run(request: Request, name: str) -> Path:
    """The folder of a run. Raises PageError: it is no run, or not below the roots."""
    folder = studio_of(request).runs.find(name)
    if not is_run(folder):
        raise not_found(f"{name} is not a run directory")
    return folder


def _from_files(folder: Path) -> dict[str, Any]:
    """Parts of the page whose files may be absent or damaged."""
    found: dict[str, Any] = {"problems": []}

    def read(name: str, absent: Any, reader: Any) -> None:
        try:
            found[name] = reader()
        except (UserError, OSError, LookupError, *WRONG_VALUES) as error:
            found[name] = absent
            found["problems"].append(str(error))

    read("findings", [], lambda: read_findings(folder))
    read("samples", [], lambda: _newest_samples(folder))
    absent = {"starts": [], "events": []}
    read("history", absent, lambda: read_history(folder / "run.json"))
    starts = found["history"]["starts"]
    read("goodput", None, lambda: goodput(starts) if starts else None)
    read("knobs", [], lambda: changed_knobs(RunDir(folder).config(), Config()))
    return found


def changed_knobs(config: Config, base: Config) -> list[tuple[str, Any, Any]]:
    """Knob, its value in `base`, and its value in `config`, where they differ."""
    old, new = flat(base), flat(config)
    return [(k, old[k], new[k]) for k in new if new[k] != old[k] and k != "run_dir"]


def _tables(columns: MetricColumns) -> dict[str, list[list[Any]]]:
    """The data table of each chart: a header, then rows."""
    train = columns.train()
    tables: dict[str, list[list[Any]]] = {}
    steps = train["step"]
    places = range(len(steps))
    if len(steps) > TABLE_ROWS:
        last = len(steps) - 1
        places = sorted({round(i * last / (TABLE_ROWS - 1)) for i in range(TABLE_ROWS)})
    for field, title, _ in CHARTS:
        values = train[field]
        rows = [[int(steps[i]), plain_list(values[i : i + 1])[0]] for i in places]
        tables[field] = [["step", title.lower()], *rows]
    evals = columns.evals()
    groups = list(held_out_curves(evals))
    header = ["step", *("all" if group == "" else group for group in groups)]
    rows = []
    for line in evals[-TABLE_ROWS:]:
        curve = held_out_curves([line])
        rows.append([line["step"], *(curve.get(g, [0, [None]])[1][0] for g in groups)])
    tables[HELD_OUT] = [header, *rows]
    return tables


def curves(request: Request) -> Response:
    """The curves of a run, thinned to what a screen shows, and a cursor behind them.

    With `from` or `to` only those steps, and one on each side, so that lines reach both
    sides of a chart.
    """
    studio = studio_of(request)
    folder = find_run(request, request.query_params.get("run", ""))
    columns = studio.columns(folder)
    window = number_of(request.query_params.get("smooth", ""), 100_000)
    first, last = (request.query_params.get(x, "") for x in ("from", "to"))
    cursor = columns.cursor()
    train = columns.train(0, cursor.train)
    steps = train["step"]
    begin, end = 0, len(steps)
    if first:
        begin = max(0, int(steps.searchsorted(number_of(first, MOST_STEP))) - 1)
    if last:
        end = int(steps.searchsorted(number_of(last, MOST_STEP), "right")) + 1
    found: dict[str, Any] = {}
    for field, _, _ in CHARTS:
        values = smooth(train[field], window)[begin:end]
        x, y = thin(steps[begin:end], values, MOST_POINTS)
        found[field] = [x.tolist(), plain_list(y)]
    held = {
        group: [steps, [v if v - v == 0 else None for v in losses]]
        for group, (steps, losses) in held_out_curves(
            columns.evals(0, cursor.evals)
        ).items()
    }
    return json_answer({"cursor": str(cursor), "train": found, HELD_OUT: held})


async def events(request: Request) -> Response:
    """The stream of a run, see `RunFeed.events`; it may be refused."""
    studio = studio_of(request)
    folder = find_run(request, request.query_params.get("run", ""))
    last = request.headers.get("last-event-id") or request.query_params.get("after", "")
    studio.feed.require_room()
    columns = studio.columns(folder)
    stream = studio.feed.events(folder, columns, last)
    return StreamingResponse(stream, media_type="text/event-stream")


def log(request: Request) -> Response:
    """The end of the log and the newest samples, for a page that is open."""
    folder = find_run(request, request.query_params.get("run", ""))
    samples = [dataclasses.asdict(sample) for sample in _newest_samples(folder)]
    return json_answer({"log": tail(log_of(folder), LOG_BYTES), "samples": samples})


def _newest_samples(folder: Path) -> list[Sample]:
    """The samples that the page shows, the newest first."""
    return read_samples(folder)[-SAMPLES:][::-1]


def report(request: Request) -> Response:
    """The run as one file: `report.html`, or before its end what there is by now."""
    name = request.query_params.get("run", "")
    folder = find_run(request, name)
    if os.path.lexists(folder / "report.html"):
        return own_page(folder / "report.html")
    studio, found = studio_of(request), _from_files(folder)
    columns, state = studio.columns(folder), studio.state_of(folder)
    knobs = [[k, str(new), str(old)] for k, old, new in found["knobs"]]
    figures = {"step": state.step, "loss": state.loss, "held out": state.held_out}
    facts = {"run": name, "state": state.state}
    facts |= {k: format_number(x) for k, x in figures.items()}
    results = read_results(
        folder,
        facts,
        found["goodput"].parts if found["goodput"] else [],
        [["knob", "value", "default"], *knobs],
        columns.evals(),
    )
    return _harmless(format_page(results, train=columns.train()).encode())


def own_page(path: Path) -> Response:
    """A page that a command has written, without scripts. Raises PageError: none."""
    if path.is_symlink() or not path.is_file():
        raise not_found(f"there is no {path.name} yet; it is written at the end")
    return _harmless(path.read_bytes())


def _harmless(page: bytes) -> Response:
    """A page that keeps its own styles, runs no script and reads nothing."""
    policy = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    headers = {"content-security-policy": policy}
    return Response(page, media_type="text/html", headers=headers)


ROUTES = (
    Route("/run/{name:path}", run),
    Route("/api/curves", curves),
    Route("/api/events", events),
    Route("/api/log", log),
    Route("/report", report),
)
