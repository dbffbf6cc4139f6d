"""All runs: state, loss, size, tags, notes; search, compare, remove."""

import dataclasses
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.checkpoints.stored_steps import size_of
from research.studio.listing.run_index import ListedRun
from research.studio.listing.run_notes import write_notes
from research.studio.listing.run_state import STATES
from research.studio.listing.run_trash import (
    empty_trash,
    move_to_trash,
    trash_size,
)
from research.studio.pages.live_run_page import find_run
from research.studio.pages.page_view import (
    Form,
    counted,
    format_bytes,
    json_answer,
    noted,
    render,
    see,
    studio_of,
)
from research.studio.studio_state import StudioState

SHOWN = 500  # runs on one page


def runs(request: Request) -> Response:
    """The list, newest first."""
    studio = studio_of(request)
    query = request.query_params.get("q", "")
    state = request.query_params.get("state", "")
    begun = time.perf_counter()
    listed = with_queue(studio)
    chosen = [run for run in listed if _matches(run, query, state)]
    return render(
        request,
        "runs.html.jinja",
        title="Runs",
        runs=chosen[:SHOWN],
        more=max(0, len(chosen) - SHOWN),
        total=len(listed),
        query=query,
        state=state,
        states=STATES,
        roots=studio.runs.folders,
        said=request.query_params.get("said", ""),
        took=time.perf_counter() - begun,
    )


def runs_json(request: Request) -> Response:
    """The list for scripts."""
    return json_answer([as_json(run) for run in with_queue(studio_of(request))])


def as_json(run: ListedRun) -> dict[str, Any]:
    """A run of the list; numbers that are not finite are null."""
    state = {
        k: None if isinstance(v, float) and v - v != 0 else v
        for k, v in dataclasses.asdict(run.state).items()
    }
    more = {"tags": list(run.tags), "notes": run.notes, "size": run.size}
    return {"name": run.name, "folder": str(run.folder), **state, **more}


def with_queue(studio: StudioState) -> list[ListedRun]:
    """All runs; those of jobs that wait or start are `queued`."""
    jobs = studio.queue.read()
    queued = {job.target for job in (*jobs.waiting, *jobs.running)}
    return [
        dataclasses.replace(run, state=dataclasses.replace(run.state, state="queued"))
        if run.folder in queued and run.state.state != "running"
        else run
        for run in studio.listed()
    ]


def _matches(run: ListedRun, query: str, state: str) -> bool:
    if state and run.state.state != state:
        return False
    text = " ".join((run.name, *run.tags, run.notes)).lower()
    return all(word in text for word in query.lower().split())


async def save_notes(request: Request) -> Response:
    """Replaces tags and notes of a run."""
    form = await Form.read(request)
    name = form.get("run")
    folder = find_run(request, name)
    with noted(request, "notes", name):
        write_notes(folder, form.get("tags"), form.get("notes"))
    return see(f"/run/{name}", said="tags and notes are saved")


def remove(request: Request) -> Response:
    """Asks before a run is removed, and names its bytes."""
    studio = studio_of(request)
    names = request.query_params.getlist("run")
    folders = [find_run(request, name) for name in names]
    sizes = [size_of(folder) for folder in folders]
    return render(
        request,
        "remove.html.jinja",
        title="Remove",
        runs=list(zip(names, folders, sizes, strict=True)),
        total=sum(sizes),
        trash=trash_size(studio.runs),
    )


async def trash(request: Request) -> Response:
    """Moves runs to the trash."""
    form = await Form.read(request)
    studio = studio_of(request)
    moved = 0
    for name in form.all("run"):
        folder = find_run(request, name)
        size = size_of(folder)
        with noted(request, "trash", name, bytes=size):
            studio.queue.read().require_none_in(folder)
            move_to_trash(studio.runs, folder)
        moved += size
    return see("/", said=f"{format_bytes(moved)} are in the trash")


async def empty(request: Request) -> Response:
    """Deletes what is in the trash."""
    studio = studio_of(request)
    with noted(request, "empty trash", "") as facts:
        count, size = trash_size(studio.runs)
        facts |= {"runs": count, "bytes": size}
        empty_trash(studio.runs)
    what = counted(count, "run")
    return see("/", said=f"{what} deleted for ever, {format_bytes(size)} are free")


ROUTES = (
    Route("/", runs),
    Route("/api/runs", runs_json),
    Route("/act/notes", save_notes, methods=["POST"]),
    Route("/remove", remove),
    Route("/act/trash", trash, methods=["POST"]),
    Route("/act/empty-trash", empty, methods=["POST"]),
)
