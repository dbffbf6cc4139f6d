"""Sweeps: start one from a form, and follow its runs and its report."""

import asyncio
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.config.command_line import NoFlags, parse_with_config
from research.core.errors import UserError
from research.core.local_paths import local_path
from research.studio.checks.config_presets import first_preset, presets
from research.studio.jobs import job_commands as commands
from research.studio.jobs.pasted_words import lacking, read_pasted, without, words_of
from research.studio.listing.run_index import is_run
from research.studio.page_errors import PageError
from research.studio.pages.live_run_page import own_page
from research.studio.pages.page_view import Form, noted, render, see, studio_of
from research.studio.pages.queue_page import jobs_of
from research.studio.pages.train_page import is_config
from research.studio.roots import shown_paths
from research.studio.studio_state import StudioState
from research.studio.sweeps import sweep_flags
from research.studio.sweeps.sweep_files import read_sweep, sweep_folders
from research.studio.sweeps.sweep_flags import DOOR

FIELDS = (*sweep_flags.OWN, sweep_flags.CONFIG, sweep_flags.CHANGES)
MOST_COMPARED = 8


def sweeps(request: Request) -> Response:
    """The form of the flags in the address, its command, jobs, and all sweeps."""
    studio, query = studio_of(request), request.query_params
    problem, command, flags = "", None, []
    fields = sweep_flags.fields_of([])
    try:
        if text := query.get("flags", ""):
            given = words_of(text)
            fields = sweep_flags.fields_of(given)
            flags = _complete(given, studio)
            check_sweep(flags, studio)
            fields = sweep_flags.fields_of(flags)
            command = commands.sweeping(flags)
    except (UserError, PageError) as error:
        problem = str(error)
    chosen = fields[sweep_flags.CONFIG]
    configs = [*dict.fromkeys((first_preset(), *presets(), *filter(None, [chosen])))]
    return render(
        request,
        "sweeps.html.jinja",
        title="Sweeps",
        fields=fields,
        files=sweep_flags.sweep_files(),
        configs=configs,
        flags=flags,
        command=command,
        problem=problem,
        **jobs_of(request, DOOR),
        sweeps=sweep_folders(studio.listed()),
        said=query.get("said", ""),
    )


def _complete(flags: list[str], studio: StudioState) -> list[str]:
    """With a folder below the first root."""
    fields = sweep_flags.fields_of(flags)
    if not fields["folder"]:
        folder = sweep_flags.new_folder(fields, studio.runs.first)
        fields["folder"] = shown_paths([folder])[0]
    return sweep_flags.flags_of(fields)


def check_sweep(flags: list[str], studio: StudioState) -> Path:
    """The folder of a sweep that the studio may start.

    Raises:
      UserError: the command would refuse a flag, or one names a program.
      PageError: the folder or another path lies outside of the roots.
    """
    fields = sweep_flags.fields_of(flags)
    sweep_flags.check_words(fields)
    config = fields[sweep_flags.CONFIG]
    if not fields["sweep"] and not is_config(config, studio):
        raise UserError(
            f"--config={config}: the studio takes a file of {', '.join(presets())} or "
            "a run below --runs"
        )
    folder = local_path(fields["folder"], "--folder").absolute()
    studio.confined.check_written("--folder", str(folder), folder)
    if not fields["sweep"]:
        begun, _ = parse_with_config([DOOR, f"--config={config}"], "", NoFlags)
        studio.confined.check_config(begun, folder)
    for knob, value in sweep_flags.named_paths(fields):
        studio.confined.check_knob(knob, value, folder)
    if is_run(folder):
        raise UserError(f"--folder={folder} is a run: choose a folder for the sweep")
    return folder


async def change(request: Request) -> Response:
    """Makes flags of the form, or of a pasted command, and shows them."""
    form = await Form.read(request)
    if pasted := form.get("pasted").strip():
        found = read_pasted(pasted, DOOR)
        fields = sweep_flags.fields_of(found.words)
        flags = sweep_flags.flags_of(fields)
        lost = lacking(sweep_flags.all_flags(fields), flags)
        said = without([*found.before, *lost])
    else:
        flags = sweep_flags.flags_of({name: form.get(name) for name in FIELDS})
        said = ""
    return see("/sweeps", flags=commands.as_text(flags), said=said)


async def start(request: Request) -> Response:
    """Queues a sweep."""
    studio, who = studio_of(request), request.scope["who"]
    given = words_of((await Form.read(request)).get("flags"))
    flags = _complete(given, studio)
    folder = await asyncio.to_thread(check_sweep, flags, studio)
    command = commands.sweeping(flags)
    name = f"sweep {folder.name}"
    with noted(request, "sweep", name, command=commands.as_text(command)):
        await asyncio.to_thread(studio.queue.add, command, folder, who, name=name)
    return see("/sweeps", said=f"queued: {name}")


def sweep(request: Request) -> Response:
    """A sweep: its best run, its table, its runs with their states."""
    studio, name = studio_of(request), request.path_params["name"].strip("/")
    found = read_sweep(name, studio.runs.find, studio.state_of)
    folder = studio.runs.find(name)
    jobs = studio.queue.read()
    here = [job for job in (*jobs.running, *jobs.waiting) if job.target == folder]
    begun = [run.name for run in found.runs if run.name]
    report = studio.reports.look(studio.reports.place(str(folder)))
    return render(
        request,
        "sweep.html.jinja",
        title=name,
        name=name,
        found=found,
        axes=[axis["name"] for axis in found.sweep["axes"]],
        compared=begun[:MOST_COMPARED],
        command=commands.reporting(folder),
        report=report,
        has_page=(folder / "report.html").is_file(),
        is_live=found.is_running or bool(here) or report.state == "running",
        jobs=here,
        said=request.query_params.get("said", ""),
    )


async def make_report(request: Request) -> Response:
    """Starts the report of a sweep."""
    studio, name = studio_of(request), (await Form.read(request)).get("sweep")
    await asyncio.to_thread(read_sweep, name, studio.runs.find, studio.state_of)
    folder = studio.runs.find(name)
    place, words = studio.reports.place(str(folder)), commands.reporting(folder)
    with noted(request, "report", name):
        await asyncio.to_thread(studio.reports.start, place, words)
    return see(f"/sweep/{name}")


def report_page(request: Request) -> Response:
    """`report.html` of a sweep as it is."""
    name = request.query_params.get("sweep", "")
    return own_page(studio_of(request).runs.find(name) / "report.html")


ROUTES = (
    Route("/sweeps", sweeps),
    Route("/sweep/{name:path}", sweep),
    Route("/sweep-report", report_page),
    Route("/flags/sweeps", change),
    Route("/act/sweep", start, methods=["POST"]),
    Route("/act/sweep-report", make_report, methods=["POST"]),
)
