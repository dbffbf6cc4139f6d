"""Plan: memory, time and cost of a start on chips here and elsewhere, and its launch.

The Train page shows it as a part of itself.
"""

import asyncio
import functools
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.core.errors import UserError
from research.studio.checks.start_plans import DEVICES, OWN, TARGETS, PricedDevices
from research.studio.jobs import job_commands as commands
from research.studio.page_errors import PageError
from research.studio.pages.page_view import Form, address, noted, render, see, studio_of
from research.studio.pages.train_page import check_flags, complete, read_flags


def plans(request: Request) -> Response:
    """The plan and the dry runs of the flags in the address, as far as they are."""
    studio, query = studio_of(request), request.query_params
    fields = _fields(query)
    values: dict[str, Any] = {"problem": "", "plan": None, "targets": []}
    values |= {"flags": [], "command": None}
    try:
        flags = complete(read_flags(query.get("flags", "")), studio)
        check_flags(flags, studio)
        values["flags"] = flags
        values["targets"] = [_target(request, name, fields, flags) for name in TARGETS]
        devices = PricedDevices.from_text(fields["devices"])
        values["plan"] = studio.plans.read_plan(flags, devices)
        values["command"] = studio.plans.plan_command(flags, devices)
    except (UserError, PageError) as error:
        values["problem"] = str(error)
    running = [values["plan"], *(target.get("run") for target in values["targets"])]
    return render(
        request,
        "plans.html.jinja",
        title="Plan",
        fields=fields,
        here=address("/plans", flags=commands.as_text(values["flags"]), **fields),
        is_running=any(each and each.state == "running" for each in running),
        **values,
    )


def _fields(given: Mapping[str, str]) -> dict[str, str]:
    """The fields of the page, with their defaults."""
    defaults = {"devices": DEVICES} | {OWN + k: own for k, own in TARGETS.items()}
    return {name: given.get(name) or default for name, default in defaults.items()}


def _target(
    request: Request, name: str, fields: Mapping[str, str], flags: list[str]
) -> dict[str, Any]:
    own = fields[OWN + name]
    target: dict[str, Any] = {"name": name, "field": OWN + name, "own": own}
    target |= {"run": None, "is_changed": own != TARGETS[name]}
    found = studio_of(request).plans
    try:
        return target | {
            "problem": "",
            "dry_run": found.dry_run(name, own, flags),
            "launch": found.launch(name, own, flags),
            "run": found.read_dry_run(name, own, flags),
        }
    except UserError as error:
        return target | {"problem": str(error)}


async def act(request: Request) -> Response:
    """Starts the plan, or the dry run of a target."""
    form, studio = await Form.read(request), studio_of(request)
    given = {name: form.get(name) for name in _fields({}) if form.has(name)}
    fields, kind = _fields(given), form.get("start")
    flags = complete(read_flags(form.get("flags")), studio)
    await asyncio.to_thread(check_flags, flags, studio)
    if kind == "plan":
        devices = PricedDevices.from_text(fields["devices"])
        command = studio.plans.plan_command(flags, devices)
        start = functools.partial(studio.plans.start_plan, flags, devices)
    else:
        own = fields.get(OWN + kind, "")
        command = studio.plans.dry_run(kind, own, flags)
        start = functools.partial(studio.plans.start_dry_run, kind, own, flags)
    with noted(request, "plan", kind, command=commands.as_text(command)):
        await asyncio.to_thread(start)
    return see("/plans", flags=commands.as_text(flags), **fields)


ROUTES = (
    Route("/plans", plans),
    Route("/act/plan", act, methods=["POST"]),
)
