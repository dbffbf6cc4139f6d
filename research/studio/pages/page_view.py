"""Templates, forms and numbers that all pages share."""

import datetime
import json
import math
import urllib.parse
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jinja2.sandbox
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from research.core.visible_text import visible
from research.report.progress_view import duration
from research.report.result_tables import text_columns
from research.serve.api.guard import read_limited
from research.studio.jobs.job_commands import as_text
from research.studio.page_errors import PageError
from research.studio.studio_state import StudioState

TEMPLATES = Path(__file__).parents[1] / "templates"
# Address, title. A page adds itself here, and its `ROUTES` in `app.PAGES`.
TABS = (
    ("/", "Runs"),
    ("/data", "Data"),
    ("/train", "Train"),
    ("/evaluate", "Evaluate"),
    ("/sweeps", "Sweeps"),
    ("/chat", "Chat"),
    ("/queue", "Queue"),
    ("/deploy", "Deploy"),
)
# Pages below that of a tab, by the first part of their address.
BELOW = {
    **dict.fromkeys(("run", "compare", "branch", "remove"), "/"),
    "plans": "/train",
    "evaluation": "/evaluate",
    "sweep": "/sweeps",
}
LARGEST_FORM = 1 << 20  # bytes


def studio_of(request: Request) -> StudioState:
    """The state that the pages share."""
    return request.app.state.studio


def noted(
    request: Request, action: str, what: str, **more: Any
) -> AbstractContextManager[dict[str, Any]]:
    """`AuditLog.noting` for who sent the request; each change stands in its block."""
    return studio_of(request).audit.noting(action, what, request.scope["who"], **more)


def render(
    request: Request, template: str, status: int = 200, **values: Any
) -> HTMLResponse:
    """A page. Every value is text and never HTML: the templates escape all of them."""
    top = request.url.path.split("/")[1]
    text = ENVIRONMENT.get_template(template).render(
        tabs=TABS,
        tab=BELOW.get(top, f"/{top}"),
        is_below=request.url.path not in dict(TABS),
        may_change=request.scope.get("role") == "admin",
        **values,
    )
    return HTMLResponse(text, status)


def json_answer(value: Any, status: int = 200) -> Response:
    """JSON; it must hold no number that is not finite."""
    body = json.dumps(value, allow_nan=False).encode()
    return Response(body, status, media_type="application/json")


def wants_json(request: Request) -> bool:
    """Whether a script sent the request, and not a person."""
    accepted = request.headers.get("accept", "")
    return request.url.path.startswith("/api/") or "text/html" not in accepted


def see(path: str, **fields: Any) -> RedirectResponse:
    """Leads the browser to a page after a form was sent."""
    return RedirectResponse(address(path, **fields), 303)


def address(path: str, **fields: Any) -> str:
    """A path of this server, with names as they are, and with fields; lists repeat."""
    found = quoted(path)
    return f"{found}?{urllib.parse.urlencode(fields, doseq=True)}" if fields else found


def quoted(path: str) -> str:
    """A path whose names may hold any letter, for an address."""
    return urllib.parse.quote(path, safe="/")


def number_of(written: str, most: int) -> int:
    """A number from 0 to `most` of an address; 0 for what is none."""
    if not written.isdecimal():
        return 0
    return min(int(written), most) if len(written) <= len(str(most)) else most


class Form:
    """The fields of a form that was sent."""

    def __init__(self, fields: Mapping[str, list[str]]):
        self._fields = fields

    @classmethod
    async def read(cls, request: Request) -> "Form":
        """Reads the body, or the address of a form that changes nothing (GET).

        Raises:
          ApiError: the body is too long.
          PageError: this is no form.
        """
        body = await read_limited(request, LARGEST_FORM)
        try:
            text = request.url.query if request.method == "GET" else body.decode()
            if request.headers.get("content-type", "").startswith("application/json"):
                found = json.loads(text)
                return cls({str(k): [str(v)] for k, v in found.items()})
            fields = urllib.parse.parse_qs(
                text, keep_blank_values=True, errors="strict"
            )
        except (ValueError, AttributeError, RecursionError) as error:
            raise PageError(400, f"this is no form: {error}") from error
        return cls(fields)

    def get(self, name: str) -> str:
        """The value of a field; empty without one."""
        return self._fields.get(name, [""])[0]

    def has(self, name: str) -> bool:
        return name in self._fields

    def all(self, name: str) -> list[str]:
        return self._fields.get(name, [])


def format_bytes(size: int | None) -> str:
    """`1.5 GB`, in powers of 1000; `...` while it is not known."""
    if size is None:
        return "..."
    number, unit = float(size), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, bigger
    return f"{number:,.0f} {unit}" if unit == "B" else f"{number:,.1f} {unit}"


def counted(count: int | None, noun: str) -> str:
    """`1 run`, `2,000 runs`, `- runs` where the count is not known."""
    return f"{format_number(count)} {noun}{'' if count == 1 else 's'}"


def format_number(value: Any) -> str:
    """Four significant digits, thousands with commas; a dash for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def format_time(value: str | float) -> str:
    """ISO 8601 or seconds since 1970 as a local time to the minute."""
    try:
        if isinstance(value, str):
            when = datetime.datetime.fromisoformat(value).astimezone()
        else:
            when = datetime.datetime.fromtimestamp(value).astimezone()
    except (ValueError, TypeError, OverflowError, OSError):
        return ""
    return f"{when:%Y-%m-%d %H:%M}"


def _make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Characters that change how a line is read stand as their names.
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {
        "bytes": format_bytes,
        "counted": counted,
        "number": format_number,
        "time": format_time,
        "duration": lambda seconds: "" if seconds is None else duration(seconds),
        "command": as_text,
        "words": text_columns,
        "quote": quoted,
    }
    environment.globals["address"] = address
    return environment


ENVIRONMENT = _make_environment()
