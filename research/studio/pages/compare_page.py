"""Several runs side by side: curves over each other, losses, knobs that differ."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.config.knobs import flat
from research.core.errors import UserError
from research.runs.run_directory import RunDir
from research.studio.pages.live_run_page import find_run
from research.studio.pages.page_view import counted, render, studio_of

MOST = 8  # runs whose curves can be told apart


def compare(request: Request) -> Response:
    """The runs that were selected in the list."""
    names = [*dict.fromkeys(request.query_params.getlist("run"))]
    if not 2 <= len(names) <= MOST:
        raise UserError(
            f"{counted(len(names), 'run')} selected: select 2 to {MOST} to compare"
        )
    studio = studio_of(request)
    folders = [find_run(request, name) for name in names]
    states = [studio.state_of(folder) for folder in folders]
    knobs, problems = [], []
    for folder in folders:
        try:
            knobs.append(flat(RunDir(folder).config()))
        except UserError as error:
            knobs.append({})
            problems.append(str(error))
    return render(
        request,
        "compare.html.jinja",
        title="Compare",
        names=names,
        states=states,
        differing=_differing(knobs),
        problems=problems,
    )


def _differing(knobs: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Knobs whose values are not the same in all runs, with the value of each."""
    found = []
    for name in dict.fromkeys(name for run in knobs for name in run):
        values = [run.get(name) for run in knobs]
        if name != "run_dir" and any(value != values[0] for value in values):
            found.append((name, values))
    return found


ROUTES = (Route("/compare", compare),)
