"""The buttons of a run: a request, a resumption, a branch."""

import asyncio
import os
import re
import shlex
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.checkpoints.stored_steps import step_folders
from research.core.errors import UserError
from research.core.local_paths import local_path, split_step
from research.runs.control.request_files import write_request
from research.runs.run_directory import RunDir
from research.studio.jobs import job_commands as commands
from research.studio.jobs.pasted_words import given_knobs, read_start, without
from research.studio.listing.run_state import require_idle
from research.studio.pages.live_run_page import changed_knobs, find_run
from research.studio.pages.page_view import Form, noted, render, see, studio_of

NAME = re.compile(r"[\w.+=@-][\w.+=@ /-]*")


async def ask(request: Request) -> Response:
    """Writes a request to a running job: stop, checkpoint or sample."""
    form = await Form.read(request)
    studio, name, kind = studio_of(request), form.get("run"), form.get("kind")
    folder = find_run(request, name)
    state = await asyncio.to_thread(studio.state_of, folder)
    if state.state != "running":
        raise UserError(f"no job trains in {name}, so nobody would answer")
    command = commands.as_text(commands.requesting(folder, kind))
    with noted(request, kind, name, command=command):
        write_request(folder, kind)
    return see(f"/run/{name}", said=f"{kind}: the job acts after the step in hand")


async def resume(request: Request) -> Response:
    """Queues the command that resumes a run."""
    form = await Form.read(request)
    folder = find_run(request, form.get("run"))
    return await enqueue(request, commands.resuming(folder))


async def enqueue(request: Request, flags: list[str]) -> Response:
    """Queues a training by its flags, and shows its run or the queue.

    Raises:
      UserError: the trainer would refuse a flag, or a job trains in the folder.
      PageError: a path would lie outside of the roots.
    """
    studio, who = studio_of(request), request.scope["who"]
    _, folder = await asyncio.to_thread(commands.config_of, flags, studio.confined)
    command = commands.launching(flags)
    name = studio.runs.name(folder)
    with noted(request, "start", name, command=commands.as_text(command)):
        await asyncio.to_thread(require_idle, folder)
        await asyncio.to_thread(studio.queue.add, command, folder, who, name=name)
    return see("/queue", said=f"{name} is queued")


def branch(request: Request) -> Response:
    """The form of a branch: step, folder, knobs; shows what would differ."""
    fields = request.query_params
    name = fields.get("run", "")
    folder = find_run(request, name)
    steps = [int(path.name) for path in step_folders(folder / "checkpoints")]
    step = fields.get("step", str(steps[-1]) if steps else "")
    target = fields.get("target", f"{folder.name}_from_{step}")
    changes = fields.get("changes", "")
    shown = {"command": None, "knobs": [], "problem": ""}
    if "target" in fields:
        try:
            shown |= _planned(request, folder, step, target, changes)
        except UserError as error:
            shown["problem"] = str(error)
    return render(
        request,
        "branch.html.jinja",
        title=f"Branch of {name}",
        name=name,
        steps=steps,
        step=step,
        target=target,
        changes=changes,
        said=fields.get("said", ""),
        **shown,
    )


async def paste(request: Request) -> Response:
    """Fills the form from a pasted command of a branch."""
    start = read_start((await Form.read(request)).get("pasted"))
    given: dict[str, str] = {}
    for x in given_knobs(start.flags):
        if x.value is None:
            raise UserError(f"{x.words[0][:80]!r} is no flag: write --NAME=VALUE")
        given[x.name] = x.value
    config = given.pop("config", "")
    place, step = split_step(given.pop("config.model.init_from", ""))
    if not step:
        raise UserError("a branch has --config.model.init_from=RUN@STEP")
    folder, runs = local_path(place).absolute(), studio_of(request).runs
    if config and local_path(config).absolute() != folder:
        raise UserError(
            f"--config={config}: a branch has the config of the run that it begins at, "
            f"{place}; use Train for another one"
        )
    target = local_path(given.pop("config.run_dir", f"{folder}_from_{step}"))
    return see(
        "/branch",
        run=runs.name(folder),
        step=step,
        target=os.path.relpath(target.absolute(), folder.parent),
        changes=commands.as_text([f"--{k}={v}" for k, v in given.items()]),
        said=without(start.dropped([])),
    )


def _flags(
    request: Request, folder: Path, step: str, target: str, changes: str
) -> list[str]:
    steps = [path.name for path in step_folders(folder / "checkpoints")]
    if step not in steps:
        raise UserError(
            f"step {step!r} is no checkpoint of this run; it has {', '.join(steps)}"
        )
    if not NAME.fullmatch(target) or ".." in target:
        raise UserError(f"{target!r} is no name for a folder beside the run")
    place = studio_of(request).runs.require_inside(folder.parent / target)
    if place.exists():
        raise UserError(f"{place} is there already; choose another name")
    try:
        words = shlex.split(changes)
    except ValueError as error:
        raise UserError(f"knobs: {error}") from error
    if strange := [word for word in words if not word.startswith("--config.")]:
        raise UserError(f"{strange[0]!r} is no knob; write --config.NAME=VALUE")
    return commands.branching(folder, int(step), place, words)


def _planned(
    request: Request, folder: Path, step: str, target: str, changes: str
) -> dict[str, object]:
    flags = _flags(request, folder, step, target, changes)
    config, _ = commands.config_of(flags, studio_of(request).confined)
    return {
        "command": commands.launching(flags),
        "knobs": changed_knobs(config, RunDir(folder).config()),
    }


async def start_branch(request: Request) -> Response:
    """Queues a branch."""
    form = await Form.read(request)
    folder = find_run(request, form.get("run"))
    given = [form.get(name) for name in ("step", "target", "changes")]
    return await enqueue(request, _flags(request, folder, *given))


ROUTES = (
    Route("/act/request", ask, methods=["POST"]),
    Route("/act/resume", resume, methods=["POST"]),
    Route("/branch", branch),
    Route("/flags/branch", paste),
    Route("/act/branch", start_branch, methods=["POST"]),
)
