"""The jobs of this machine: the one that runs, those that wait, those that ended."""

import asyncio
import signal
import urllib.parse
from typing import Any

import psutil
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.core.errors import UserError
from research.runs.control.job_logs import progress, tail
from research.runs.display_files import EVALUATIONS
from research.studio.jobs.job_queue import QueuedJob
from research.studio.listing.run_index import is_run
from research.studio.page_errors import PageError, not_found
from research.studio.pages.page_view import (
    Form,
    address,
    json_answer,
    noted,
    render,
    see,
    studio_of,
)
from research.studio.sweeps import sweep_files

LOG_BYTES = 24_000


def queue(request: Request) -> Response:
    """The list of jobs."""
    studio = studio_of(request)
    return render(
        request,
        "queue.html.jinja",
        title="Queue",
        **jobs_of(request),
        folder=studio.queue.folder,
        said=request.query_params.get("said", ""),
    )


def jobs_of(request: Request, door: str = "") -> dict[str, Any]:
    """The jobs that a page shows, and their parts; those of one `door` have a list."""
    jobs = studio_of(request).queue.read()
    return {"jobs": jobs, "door": door, "views": JobViews(request)}


class JobViews:
    """The parts of a job that a page shows beside its fields."""

    def __init__(self, request: Request):
        self._runs = studio_of(request).runs

    def page(self, job: QueuedJob) -> str:
        """The address of what it makes; empty where that is not there, or not ours."""
        try:
            name = self._runs.name(job.target)
            folder = self._runs.find(name)
        except PageError:
            return ""
        if is_run(folder):
            return f"/run/{urllib.parse.quote(name)}"
        if folder.name == EVALUATIONS:
            return address("/evaluate", run=self._runs.name(folder.parent))
        if (folder / sweep_files.FILE).is_file():
            return f"/sweep/{urllib.parse.quote(name)}"
        return ""

    @staticmethod
    def log(job: QueuedJob) -> str:
        """The end of its output since it began."""
        return tail(job.log, LOG_BYTES, job.log_begin) if job.began else ""

    @staticmethod
    def progress(log: str) -> tuple[int, int] | None:
        return progress(log)


def job_json(request: Request) -> Response:
    """A job for a page that is open: its state, how far it is, and its log."""
    jobs = studio_of(request).queue.read()
    name = request.path_params["job"]
    for state, listed in vars(jobs).items():
        for job in listed:
            if job.id == name:
                log = JobViews.log(job)
                page = JobViews(request).page(job)
                found = {"progress": progress(log), "log": log, "page": page}
                return json_answer({"state": state, **found})
    raise not_found("this job is not listed any more")


async def change(request: Request) -> Response:
    """Moves, removes or ends a job."""
    form = await Form.read(request)
    studio, job, action = studio_of(request), form.get("job"), form.get("action")
    if action not in ("up", "down", "remove", "end"):
        raise PageError(400, f"action={action!r}: it must be up, down, remove or end")
    with noted(request, f"{action} job", job):
        if action in ("up", "down"):
            by = -1 if action == "up" else 1
            await asyncio.to_thread(studio.queue.move, job, by)
            return see("/queue")
        if action == "remove":
            removed = await asyncio.to_thread(studio.queue.remove, job)
            return see("/queue", said=f"{removed.name} does not wait any more")
        ended = await asyncio.to_thread(_end, studio.queue.read().running, job)
    return see("/queue", said=f"{ended.name} was told to save and end (SIGTERM)")


def _end(running: list[QueuedJob], name: str) -> QueuedJob:
    """Sends SIGTERM to a job; a launcher stops its trainers, which save."""
    for job in running:
        if job.id == name and job.is_alive:
            psutil.Process(job.pid).send_signal(signal.SIGTERM)
            return job
    raise UserError("this job does not run any more")


ROUTES = (
    Route("/queue", queue),
    Route("/api/job/{job}", job_json),
    Route("/act/queue", change, methods=["POST"]),
)
