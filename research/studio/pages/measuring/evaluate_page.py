"""Evaluate: choose runs and rows, start the command, and see all evaluations."""

import asyncio
import functools
import hashlib
import itertools
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.checkpoints.stored_steps import step_folders
from research.core.errors import UserError
from research.core.local_paths import local_path, split_step
from research.evaluate.evaluate_flags import EvaluateFlags
from research.runs.display_files import EVALUATIONS
from research.studio.evaluations import evaluation_flags as flags_of_form
from research.studio.evaluations.evaluation_files import FILE, ROWS, read_results
from research.studio.evaluations.evaluation_flags import BASE, DOOR
from research.studio.jobs import job_commands as commands
from research.studio.jobs.pasted_words import read_pasted, without, words_of
from research.studio.page_errors import PageError, not_found
from research.studio.pages.data_page import data_files
from research.studio.pages.page_view import Form, noted, render, see, studio_of
from research.studio.pages.queue_page import jobs_of
from research.studio.roots import shown_paths

MOST_RUNS, MOST_FILES, MOST_LISTED = 300, 500, 100
FIRST = ("metrics", "rows", "max_new_tokens", "step")
MORE = ("temperature", "top_p", "seed", "stop", "slots")
FIELD = "flag."  # before the name of a flag in the form
METRICS = ("auto", "none", "choice_none", "choice_tokens", "choice_bytes")


def evaluate(request: Request) -> Response:
    """The form of the flags in the address, their command, jobs and results."""
    studio, query = studio_of(request), request.query_params
    problem, command, flags = "", None, []
    fields = flags_of_form.fields_of([])
    try:
        flags = words_of(query.get("flags", ""))
        fields = flags_of_form.fields_of(flags)
        if chosen := query.get("file", ""):  # An upload, or a choice of another page.
            fields["data"] = shown_paths([studio.data.find(chosen)])[0]
            flags = flags_of_form.flags_of(fields)
        if flags:
            flags_of_form.check_evaluation(flags, studio.confined)
            command = commands.evaluating(flags)
    except (UserError, PageError) as error:
        problem = str(error)
    runs = _choosable(request)
    named = fields["run"].splitlines()
    of_run = query.get("run", "")
    listed, total = studio.evaluations(of_run, MOST_LISTED)
    return render(
        request,
        "evaluate.html.jinja",
        title="Evaluate",
        field=FIELD,
        fields=fields,
        runs=runs,
        chosen=set(named),
        others=[each for each in named if each not in {run["path"] for run in runs}],
        baselines=_with(["", BASE, *(run["path"] for run in runs)], fields["against"]),
        files=_with(["", *_data_paths(request)], fields["data"]),
        data_root=next(iter(studio.data.folders)),
        shown=[*flags_of_form.describe(FIRST)],
        more=[*flags_of_form.describe((*MORE, *_knob_flags()))],
        metrics=METRICS,
        flags=flags,
        command=command,
        problem=problem,
        **jobs_of(request, DOOR),
        listed=listed,
        total=total,
        of_run=of_run,
        said=query.get("said", ""),
    )


def _knob_flags() -> list[str]:
    return [flags_of_form.KNOB + path for path in flags_of_form.file_knobs()]


def _with(choices: list[str], chosen: str) -> list[str]:
    return [*dict.fromkeys((*choices, chosen))]


def _choosable(request: Request) -> list[dict[str, Any]]:
    """The runs that have a checkpoint, the newest first."""
    saved = (
        (run, [int(path.name) for path in step_folders(run.folder / "checkpoints")])
        for run in studio_of(request).listed()
    )
    return [
        {
            "name": run.name,
            "path": shown_paths([run.folder])[0],
            "state": run.state.state,
            "held_out": run.state.held_out,
            "step": max(steps),
        }
        for run, steps in itertools.islice(
            (each for each in saved if each[1]), MOST_RUNS
        )
    ]


def _data_paths(request: Request) -> list[str]:
    roots = studio_of(request).data
    names = (name for name, _ in itertools.islice(data_files(request), MOST_FILES))
    return shown_paths(roots.find(name) for name in names)


async def change(request: Request) -> Response:
    """Makes flags of the form, or of a pasted command, and shows them."""
    form = await Form.read(request)
    if pasted := form.get("pasted").strip():
        found = read_pasted(pasted, DOOR)
        flags = commands.as_text(_flags(commands.as_text(found.words)))
        return see("/evaluate", flags=flags, said=without(found.before))
    names = [*(f for f in flags_of_form.OWN if f != "run"), *_knob_flags()]
    fields = {n: form.get(FIELD + n) for n in names if form.has(FIELD + n)}
    runs = [*form.all("run"), *form.get("others").splitlines()]
    fields["run"] = "\n".join(runs)
    return see("/evaluate", flags=commands.as_text(flags_of_form.flags_of(fields)))


def _flags(text: str) -> list[str]:
    flags = words_of(text)
    flags_of_form.fields_of(flags)
    return flags


async def start(request: Request) -> Response:
    """Queues an evaluation."""
    studio, who = studio_of(request), request.scope["who"]
    flags = _flags((await Form.read(request)).get("flags"))
    found = await asyncio.to_thread(
        flags_of_form.check_evaluation, flags, studio.confined
    )
    command = commands.evaluating(flags)
    name, digest = _name(found), hashlib.sha256(repr(command).encode()).hexdigest()
    with noted(request, "evaluate", name, command=commands.as_text(command)):
        place = local_path(split_step(found.run[0])[0]).absolute() / EVALUATIONS
        log = studio.logs / f"evaluate-{digest[:16]}.log"
        add = functools.partial(studio.queue.add, name=name, log=log)
        await asyncio.to_thread(add, command, place, who)
    return see("/evaluate", said=f"queued: {name}")


def _name(f: EvaluateFlags) -> str:
    """`evaluate a, b and 3 more on test.jsonl`."""
    names = [Path(run).name for run in f.run]
    named = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
    return f"evaluate {named} on {Path(f.data).name if f.data else 'held-out rows'}"


def results(request: Request) -> Response:
    """The results of an evaluation."""
    name = request.path_params["name"].strip("/")
    runs = studio_of(request).runs
    folder = runs.find(name)
    if folder.parent.name != EVALUATIONS:
        raise not_found(f"{name} is no evaluation")
    runs.find(f"{name}/{FILE}")  # None of the files leads out.
    try:
        rows = runs.find(f"{name}/{ROWS}")
    except PageError as error:
        if error.status != 404:
            raise
        rows = None
    found = read_results(folder, rows)
    return render(
        request,
        "evaluation_result.html.jinja",
        title="Evaluation",
        name=name,
        run=runs.name(folder.parents[1]),
        changed=(folder / FILE).stat().st_mtime,
        found=found,
    )


ROUTES = (
    Route("/evaluate", evaluate),
    Route("/evaluation/{name:path}", results),
    Route("/flags/evaluate", change),
    Route("/act/evaluate", start, methods=["POST"]),
)
