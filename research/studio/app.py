"""All pages together: routes, access, and errors as a page or as JSON."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from research.core.errors import UserError
from research.serve.api.api_errors import ApiError
from research.serve.http.access_keys import ApiKeys
from research.studio.access import Access
from research.studio.chats import chat_api
from research.studio.deploying import deploy_page, served_page
from research.studio.page_errors import PageError, as_page_error
from research.studio.pages import (
    chat_page,
    compare_page,
    data_page,
    live_run_page,
    queue_page,
    run_actions,
    runs_page,
    train_page,
)
from research.studio.pages.measuring import evaluate_page, plan_page, sweeps_page
from research.studio.pages.page_view import json_answer, render, wants_json
from research.studio.serving import server_routes
from research.studio.studio_state import StudioState

# Each has `ROUTES`. A new page is a file in `pages/`, a template, and a line here.
PAGES = (
    runs_page,
    live_run_page,
    run_actions,
    compare_page,
    queue_page,
    data_page,
    train_page,
    server_routes,
    evaluate_page,
    deploy_page,
    served_page,
    chat_page,
    chat_api,
    plan_page,
    sweeps_page,
)
STATIC = Path(__file__).parent / "static"
WORK_EVERY = 5.0  # seconds between two looks whether jobs wait and nobody runs them


def make_app(
    studio: StudioState, keys: ApiKeys, host: str, names: Sequence[str] = ()
) -> Starlette:
    """The ASGI app, served on the address `host`, and under more `names`."""
    errors = (PageError, UserError, ApiError, HTTPException, OSError, Exception)
    app = Starlette(
        routes=[
            *(route for page in PAGES for route in page.ROUTES),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[
            Middleware(Access, keys=keys, host=host, names=names, answer_error=_refuse),
        ],
        exception_handlers=dict.fromkeys(errors, _answer_error),
    )
    app.state.studio = studio
    return app


async def keep_working(studio: StudioState) -> None:
    """Sees to it that jobs which wait are run, whoever has added them."""
    while True:
        with contextlib.suppress(OSError, UserError):
            await asyncio.to_thread(studio.queue.work)
        await asyncio.sleep(WORK_EVERY)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException | ApiError):
        status = error.status_code if isinstance(error, HTTPException) else error.status
        found = PageError(status, str(error.args[-1] if error.args else error))
        if status == 404:
            found.message = f"there is no page {request.url.path}"
    else:
        found = as_page_error(error)
    if found.status == 500:  # Others are answers, as of a studio with many tabs.
        logging.error("%s %s", request.method, request.url.path, exc_info=error)
    return _error_page(request, found)


def _refuse(scope: Scope, error: PageError) -> Response:
    return _error_page(Request(scope), error)


def _error_page(request: Request, error: PageError) -> Response:
    if wants_json(request):
        return json_answer({"error": error.message}, error.status)
    return render(request, "error.html.jinja", error.status, title="Error", error=error)
