"""One server: its endpoint, figures, models, keys, and programs that ask it."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.runs.control.job_logs import tail
from research.studio.deploying import snippets
from research.studio.deploying.exports import newest
from research.studio.deploying.key_lines import make_key, read_keys, remove_key
from research.studio.deploying.served_figures import figures_of
from research.studio.jobs.job_commands import removing
from research.studio.page_errors import PageError
from research.studio.pages.live_run_page import find_run
from research.studio.pages.page_view import (
    Form,
    json_answer,
    noted,
    render,
    see,
    studio_of,
)
from research.studio.serving.model_servers import ModelServer
from research.studio.serving.server_client import (
    LOG_BYTES,
    LOOK,
    call,
    call_json,
    models_of,
    refusal,
    status_of,
)
from research.studio.serving.server_routes import start_server


async def served(request: Request) -> Response:
    """The page of a server."""
    return await _page(request, request.path_params["name"])


async def _page(request: Request, server_name: str, **made: str) -> Response:
    """`made`: the name and the text of a key that was made just now."""
    server = await _find(request, server_name)
    status = await status_of(server)
    models: list[dict[str, Any]] = []
    figures, problem, is_chat = None, server.problem, True
    if status.state == "ready":
        try:
            models = await models_of(server)
            figures = await _figures(server)
            is_chat = await _is_chat(server, _first(models))
        except PageError as error:
            problem = error.message
    keys = []
    if server.key_file:
        try:
            keys = read_keys(Path(server.key_file))
        except UserError as error:
            problem = problem or str(error)
    load = await asyncio.to_thread(_planned_load, request, server)
    asked = (server, _first(models), is_chat, made.get("key", ""))
    return render(
        request,
        "served.html.jinja",
        title=f"Server {server.name}",
        server=server,
        now=status,
        problem=problem or load["problem"],
        models=models,
        figures=figures,
        keys=keys,
        made=made,
        curl=snippets.curl(*asked),
        client=snippets.openai_client(*asked),
        unloading={x["id"]: _unload_command(server, x["id"]) for x in models},
        removing=removing(server.folder),
        load=load,
        log=tail(server.log, LOG_BYTES),
        said=request.query_params.get("said", ""),
    )


async def _find(request: Request, name: str) -> ModelServer:
    return await asyncio.to_thread(studio_of(request).servers.find, name)


def _planned_load(request: Request, server: ModelServer) -> dict[str, Any]:
    """The adapter that the fields in the address choose, and the command to load it.

    `problem` says why there is none.
    """
    runs = [x.name for x in studio_of(request).listed() if newest(x.folder)]
    fields = {x: request.query_params.get(x, "") for x in ("run", "step", "name")}
    fields["run"] = fields["run"] or "".join(runs[:1])
    found = {"runs": runs, "fields": fields, "command": "", "problem": ""}
    found["is_asked"] = "run" in request.query_params
    if not fields["run"]:
        return found
    try:
        body = _load_body(request, fields)
    except PageError as error:
        return found | {"problem": error.message}
    command = snippets.changing(server, "load", body)
    return found | {"body": body, "command": command}


def _load_body(request: Request, fields: Mapping[str, str]) -> dict[str, str]:
    """The request body that loads an adapter. Raises PageError."""
    run = find_run(request, split_step(fields["run"])[0])
    step = fields["step"].strip()
    place = f"{run}@{step}" if step else str(run)
    return {"lora_name": fields["name"].strip() or run.name, "lora_path": place}


def _unload_command(server: ModelServer, name: str) -> str:
    return snippets.changing(server, "unload", {"lora_name": name})


def _first(models: list[dict[str, Any]]) -> str:
    """The model of a program that asks: an adapter before the base."""
    names = [x["id"] for x in sorted(models, key=lambda x: not x.get("parent"))]
    return names[0] if names else "base"


async def _is_chat(server: ModelServer, model: str) -> bool:
    """Whether it has a template for a conversation."""
    asked = {"model": model, "messages": [{"role": "user", "content": "a"}]}
    body = json.dumps(asked).encode()
    return (await call(server, "POST", "/tokenize", body, LOOK)).status_code == 200


async def _figures(server: ModelServer) -> dict[str, float]:
    metrics = await call(server, "GET", "/metrics", patience=LOOK)
    slots = await call_json(server, "GET", "/slots", [dict])
    return figures_of(metrics.text, slots)


async def figures(request: Request) -> Response:
    """The figures for a page that is open; `state` says why there are none."""
    server = await _find(request, request.path_params["name"])
    status = await status_of(server)
    state, said, found = status.state, status.said, None
    if state == "ready":
        try:
            found = await _figures(server)
        except PageError as error:  # It has begun to stop meanwhile.
            state, said = "stopping", error.message
    return json_answer({"state": state, "said": said, "figures": found})


async def key(request: Request) -> Response:
    """Makes a key, whose page shows it once, or removes one."""
    form = await Form.read(request)
    server = await _find(request, form.get("server"))
    if not server.key_file:
        raise UserError(f"the server {server.name} needs no key, so it has no key file")
    file = Path(server.key_file)
    if form.get("action") == "remove":
        with noted(request, "remove key", server.name, key=form.get("key")):
            gone = await asyncio.to_thread(remove_key, file, form.get("key"))
        said = f"the key of {gone.said or gone.id} opens nothing any more"
        return see(f"/deploy/{server.name}", said=said)
    name, role = form.get("name"), form.get("role")
    with noted(request, "make key", server.name, key=name, role=role):
        made = await asyncio.to_thread(make_key, file, name, role)
    return await _page(request, server.name, name=name, key=made)


async def adapter(request: Request) -> Response:
    """Loads the adapter of a run under a name, or unloads one."""
    form = await Form.read(request)
    server, name = await _find(request, form.get("server")), form.get("name").strip()
    if form.get("action") == "unload":
        with noted(request, "unload", name, server=server.name):
            await _change(server, "unload", {"lora_name": name})
        return see(f"/deploy/{server.name}", said=f"{name} is unloaded")
    body = _load_body(request, {x: form.get(x) for x in ("run", "step", "name")})
    with noted(request, "load", form.get("run"), server=server.name, **body):
        await _change(server, "load", body)
    return see(f"/deploy/{server.name}", said=f"{body['lora_name']} is loaded")


async def again(request: Request) -> Response:
    """Starts a server that has ended, by its command of before."""
    server = await _find(request, (await Form.read(request)).get("server"))
    own = ("--port=", "--api_key_file=")
    flags = [x for x in server.command[3:] if not x.startswith(own)]
    await start_server(request, server.name, flags)
    return see(f"/deploy/{server.name}", said="it loads its models now")


async def _change(server: ModelServer, verb: str, body: dict[str, str]) -> None:
    """Raises PageError: the server refuses."""
    path, sent = f"/v1/{verb}_lora_adapter", json.dumps(body).encode()
    answer = await call(server, "POST", path, sent)
    if answer.status_code != 200:
        raise refusal(server, answer)


ROUTES = (
    Route("/deploy/{name}", served),
    Route("/api/served/{name}", figures),
    Route("/act/serve-again", again, methods=["POST"]),
    Route("/act/key", key, methods=["POST"]),
    Route("/act/adapter", adapter, methods=["POST"]),
)
