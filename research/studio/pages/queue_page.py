"""The jobs of this machine: the one that trains, those that wait, those that ended."""

import asyncio
import signal
from pathlib import Path

import psutil
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.core.errors import UserError
from research.studio.jobs.job_queue import QueuedJob
from research.studio.page_errors import PageError
from research.studio.pages.page_view import Form, render, see, studio_of


def queue(request: Request) -> Response:
    """The list of jobs."""
    studio = studio_of(request)
    jobs = studio.queue.read()
    return render(
        request,
        "queue.html.jinja",
        title="Queue",
        jobs=jobs,
        name_of=lambda job: _name(request, job),
        folder=studio.queue.folder,
        said=request.query_params.get("said", ""),
    )


def _name(request: Request, job: QueuedJob) -> str:
    """The address of the run of a job; empty where it is not there, or not ours."""
    runs = studio_of(request).runs
    try:
        name = runs.name(Path(job.folder, job.run))
        runs.find(name)
    except PageError:
        return ""
    return name


async def change(request: Request) -> Response:
    """Moves, removes or ends a job."""
    form = await Form.read(request)
    studio, job, action = studio_of(request), form.get("job"), form.get("action")
    if action in ("up", "down"):
        by = -1 if action == "up" else 1
        await asyncio.to_thread(studio.queue.move, job, by)
        return see("/queue")
    if action not in ("remove", "end"):
        raise PageError(400, f"action={action!r}: it must be up, down, remove or end")
    studio.audit.add(f"{action} job", job, request.scope["who"])
    if action == "remove":
        removed = await asyncio.to_thread(studio.queue.remove, job)
        return see("/queue", said=f"{removed.run} does not wait any more")
    ended = await asyncio.to_thread(_end, studio.queue.read().running, job)
    return see("/queue", said=f"{ended.run} was told to save and end (SIGTERM)")


def _end(running: list[QueuedJob], name: str) -> QueuedJob:
    """Sends SIGTERM to the launcher of a job, which stops its trainers."""
    for job in running:
        if job.id == name and job.is_alive:
            psutil.Process(job.pid).send_signal(signal.SIGTERM)
            return job
    raise UserError("this job does not run any more")


ROUTES = (
    Route("/queue", queue),
    Route("/act/queue", change, methods=["POST"]),
)
