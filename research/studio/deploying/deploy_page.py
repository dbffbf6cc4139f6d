"""Deploy: aliases, servers and exports; each button shows its command before."""

import asyncio
import contextlib
import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.runs.aliases.run_alias import folder_of, history, is_alias
from research.runs.control.job_logs import last_error
from research.studio.deploying import exports
from research.studio.deploying.pasted_commands import fields_of_command, lost
from research.studio.jobs.job_commands import as_text, python
from research.studio.page_errors import PageError
from research.studio.pages.live_run_page import find_run
from research.studio.pages.page_view import Form, noted, render, see, studio_of
from research.studio.pages.queue_page import jobs_of
from research.studio.roots import shown_paths
from research.studio.serving import server_routes
from research.studio.studio_state import StudioState

PROD = "prod"
MOST_RUNS = 200  # in a list to choose from
SIZES = ("slots", "adapters", "port", "weights")  # fields of a server, as its flags
PROMOTING = 600.0  # seconds; a busy machine needs a minute to start Python
KINDS = ("serve", "export", "promote", "back")
Fields = Mapping[str, Any]


async def deploy(request: Request) -> Response:
    """The page; fields in the address choose something, whose command is shown."""
    studio, fields = studio_of(request), dict(request.query_params)
    fields["runs"] = request.query_params.getlist("run")
    runs, aliases = await asyncio.to_thread(lambda: (_runs(studio), _aliases(studio)))
    planned: dict[str, Any] = {"command": None, "problem": ""}
    kind = fields.get("do", "")
    if kind:
        try:
            planned["command"] = await _command(request, kind, fields)
        except (UserError, PageError) as error:
            planned["problem"] = str(error)
    return render(
        request,
        "deploy.html.jinja",
        title="Deploy",
        do=kind,
        fields=fields,
        runs=runs,
        aliases=aliases,
        servers=await server_routes.described(request),
        formats=exports.known_formats(),
        exports=await asyncio.to_thread(_exports, studio, runs),
        **await asyncio.to_thread(jobs_of, request, "research.export"),
        said=fields.get("said", ""),
        **planned,
    )


def _runs(studio: StudioState) -> list[tuple[str, str]]:
    """Name and newest step of the runs that have a checkpoint, the newest first."""
    found = []
    for run in studio.listed()[:MOST_RUNS]:
        if step := exports.newest(run.folder):
            found.append((run.name, step))
    return found


def _aliases(studio: StudioState) -> list[dict[str, Any]]:
    """The aliases below the roots, with their histories, the newest first."""
    found = []
    for root in studio.runs.folders.values():
        for folder in sorted(root.iterdir()):
            if not is_alias(folder) or folder.is_symlink():
                continue
            name = studio.runs.name(folder)
            try:
                moves = [
                    (x, _name(studio, folder_of(folder, x))) for x in history(folder)
                ]
                found.append({"name": name, "moves": moves[::-1], "problem": ""})
            except UserError as error:
                found.append({"name": name, "moves": [], "problem": str(error)})
    return found


def _name(studio: StudioState, folder: Path) -> str:
    try:
        return studio.runs.name(folder)
    except PageError:  # Promoted by hand, from elsewhere.
        return str(folder)


def _exports(
    studio: StudioState, runs: list[tuple[str, str]]
) -> list[tuple[str, exports.FoundExport]]:
    found = []
    for name, _ in runs:
        found += [(name, x) for x in exports.find_exports(studio.runs.find(name))]
    return found


async def paste(request: Request) -> Response:
    """Fills the form that would make a pasted command."""
    text = (await Form.read(request)).get("pasted")
    fields = fields_of_command(text, studio_of(request).runs)
    made: list[str] = []
    with contextlib.suppress(UserError, PageError):  # The page says why.
        runs = {"runs": fields.get("run", [])}
        made = await _command(request, fields["do"], fields | runs)
    return see("/deploy", **fields, said=lost(text, made))


async def _command(request: Request, kind: str, fields: Fields) -> list[str]:
    """The command of a button. Raises UserError, PageError: it cannot be run."""
    studio = studio_of(request)
    if kind == "serve":
        flags = _serve_flags(request, fields)
        return await asyncio.to_thread(
            studio.servers.command, fields.get("name", ""), flags
        )
    if kind == "export":
        return _exporting(request, fields)[0]
    if kind in ("promote", "back"):
        return _promoting(request, kind, fields)
    raise PageError(400, f"do={kind[:40]!r}: it must be one of {', '.join(KINDS)}")


def _serve_flags(request: Request, fields: Fields) -> list[str]:
    """The flags of a server. Raises PageError: a run is not below the roots."""
    studio = studio_of(request)
    chosen = fields["runs"]
    if not chosen:
        raise UserError("choose at least one run or alias to serve")
    for name in chosen:
        if not is_alias(studio.runs.find(split_step(name)[0])):
            find_run(request, split_step(name)[0])
    flags = server_routes.run_flags(request, chosen)
    flags += [f"--{x}={fields[x].strip()}" for x in SIZES if fields.get(x, "").strip()]
    # Adapters of all runs of the first root can be loaded later.
    return [*flags, f"--adapters_from={shown_paths([studio.runs.first])[0]}"]


def _chosen(request: Request, fields: Fields) -> tuple[Path, str]:
    """The run of a form, and its step as a number or `best`."""
    chosen = [*fields["runs"], ""][0]
    if not chosen:
        raise UserError("choose a run")
    run = find_run(request, chosen)
    step = fields.get("step", "").strip()
    step = exports.newest(run) if step in ("", "latest") else step
    exports.require_step(run, step)
    return run, step


def _exporting(request: Request, fields: Fields) -> tuple[list[str], Path]:
    run, step = _chosen(request, fields)
    return exports.exporting(run, step, fields.get("format", ""))


def _promoting(request: Request, kind: str, fields: Fields) -> list[str]:
    studio = studio_of(request)
    name = fields.get("alias", "").strip()
    words = [python(), "-m", "research.runs.aliases"]
    if kind == "back":
        alias = studio.runs.find(name)
        return [*words, f"--alias={shown_paths([alias])[0]}", "--back"]
    if "/" not in name:
        name = f"{next(iter(studio.runs.folders))}/{name}"
    root, _, below = name.partition("/")
    if root not in studio.runs.folders or "/" in below or below[:1] in ("", "."):
        raise UserError(f"{name[:80]!r} is no name for an alias, such as {PROD}")
    alias = studio.runs.require_inside(studio.runs.folders[root] / below)
    run, step = _chosen(request, fields)
    place, target = shown_paths([alias, run])
    return [*words, f"--alias={place}", f"--run={target}@{step}"]


async def _sent(request: Request) -> dict[str, Any]:
    form = await Form.read(request)
    names = ("name", "step", "format", "alias", "do", *SIZES)
    return {x: form.get(x) for x in names} | {"runs": form.all("run")}


async def serve(request: Request) -> Response:
    """Starts a server."""
    fields = await _sent(request)
    flags = _serve_flags(request, fields)
    server = await server_routes.start_server(request, fields["name"], flags)
    return see(f"/deploy/{server.name}", said="it loads its models now")


async def export(request: Request) -> Response:
    """Queues an export."""
    studio, who, fields = studio_of(request), request.scope["who"], await _sent(request)
    command, out = _exporting(request, fields)
    name = studio.runs.name(out)
    with noted(request, "export", name, command=as_text(command)):
        await asyncio.to_thread(out.parent.mkdir, exist_ok=True)
        add = functools.partial(studio.queue.add, name=f"export {name}")
        await asyncio.to_thread(add, command, out, who)
    return see("/deploy", said=f"the export {name} is queued")


async def promote(request: Request) -> Response:
    """Moves an alias, by the command that the page shows."""
    fields = await _sent(request)
    kind = "back" if fields["do"] == "back" else "promote"
    command = _promoting(request, kind, fields)
    with noted(request, kind, fields["alias"], command=as_text(command)):
        await asyncio.to_thread(_run, command)
    return see("/deploy", said=f"{fields['alias']} is moved; servers of it follow")


def _run(command: list[str]) -> None:
    """Runs a short command. Raises UserError: its message, or that it takes long."""
    try:
        ended = subprocess.run(
            [sys.executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROMOTING,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"the command has not ended within {PROMOTING:g} s and was stopped: "
            "see what the alias names now, and try again, or run it in a shell"
        ) from error
    if ended.returncode:
        said = last_error(ended.stderr) or ended.stderr[-500:].strip()
        raise UserError(said.removeprefix("error: "))


ROUTES = (
    Route("/deploy", deploy),
    Route("/flags/deploy", paste),
    Route("/act/serve", serve, methods=["POST"]),
    Route("/act/export", export, methods=["POST"]),
    Route("/act/promote", promote, methods=["POST"]),
)
