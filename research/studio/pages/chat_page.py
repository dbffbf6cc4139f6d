"""Chat: the base and up to four runs answer side by side, from one batch of a server.

The script of the page streams the answers. Without it, the page shows conversations,
and a form that answers when all models have ended.
"""

import asyncio
import contextlib
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.checkpoints.stored_steps import step_folders
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.json_files import NUMBER
from research.runs.aliases.run_alias import is_alias
from research.studio.chats.blind_votes import win_rates
from research.studio.chats.chat_api import ACTIONS, NEW, conversations, votes_of
from research.studio.chats.conversation_files import KeptChat, messages_of
from research.studio.chats.model_stamps import stamps_of
from research.studio.deploying.pasted_commands import (
    SET_BY_FORMS,
    fields_of_command,
    lost,
)
from research.studio.jobs.job_commands import as_text
from research.studio.jobs.pasted_words import words_of
from research.studio.listing.run_state import read_json_object
from research.studio.page_errors import PageError
from research.studio.pages.page_view import Form, noted, render, see, studio_of
from research.studio.serving.model_servers import ModelServer
from research.studio.serving.server_client import call_json
from research.studio.serving.server_routes import described, run_flags, start_server

MOST_MODELS = 4  # beside the base
SHOWN_STEPS, SHOWN_RUNS, SHOWN_CHATS = 8, 100, 30
NAME = "chat"
BASE_ALONE = f"--model={Config().model.init_from}"
# Field of the form and of the API, what it means, its kind.
SETTINGS = {
    "temperature": ("0 takes the likeliest token", float),
    "top_p": ("share of probability that is drawn from", float),
    "top_k": ("likeliest tokens that are drawn from; 0: all", int),
    "min_p": ("least share of the likeliest token", float),
    "repetition_penalty": ("1 changes nothing", float),
    "seed": ("the same for all models", int),
    "max_tokens": ("longest answer", int),
    "stop": ("text that ends an answer", str),
}
# The shape of an answer of `/v1/chat/completions`.
CHOICE = {
    "message": {"content": str},
    "logprobs": {"content": [{"token": str, "logprob": NUMBER}]},
    "token_ids": [int],
    "finish_reason": str,
}
USED = {"prompt_tokens": int}
ANSWER = {"choices": [CHOICE], "system_fingerprint": str, "usage": USED}
USUAL = {"temperature": "0.7", "seed": "1", "max_tokens": "200"}


async def chat(request: Request) -> Response:
    """The page."""
    studio, fields = studio_of(request), request.query_params
    servers = await described(request)
    alive = [one for one in servers if one["state"] != "ended"]
    order = sorted(alive, key=lambda one: one["state"] != "ready")
    named = [one for one in servers if one["name"] == fields.get("server")]
    server = next(iter(named or order), None)
    models, problem = [], ""
    if server and server["state"] == "ready":
        try:
            found = await asyncio.to_thread(studio.servers.find, server["name"])
            models = await stamps_of(found, studio.runs)
        except PageError as error:
            problem = error.message
    kept = conversations(request)
    chosen = fields.get("chat", "")
    conversation = await asyncio.to_thread(kept.read, chosen) if chosen else None
    votes, bad_votes = await asyncio.to_thread(votes_of(request).read)
    return render(
        request,
        "chat.html.jinja",
        title="Chat",
        servers=servers,
        server=server,
        models=models,
        problem=problem,
        conversation=conversation,
        title_of=kept.title,
        chats=await asyncio.to_thread(_titles, request),
        choices=await asyncio.to_thread(_choices, request),
        plan=await _planned(request),
        most=MOST_MODELS,
        settings=SETTINGS,
        usual=USUAL,
        base=Config().model.init_from,
        rates=win_rates(votes),
        bad_votes=bad_votes,
        votes_file=votes_of(request).path,
        trains=[job for job in studio.queue.read().running if job.is_alive],
        files=[f"{name}/" for name in studio.data.folders],
        said=fields.get("said", ""),
    )


def _titles(request: Request) -> list[tuple[str, str, float]]:
    """Id, title and time of the newest conversations."""
    kept = conversations(request)
    newest = kept.all()[:SHOWN_CHATS]
    return [(name, kept.title(name), changed) for name, changed in newest]


def _choices(request: Request) -> dict[str, list[str]]:
    """Runs and their checkpoints, by the base that they need, and aliases of some."""
    studio = studio_of(request)
    found: dict[str, list[str]] = {}
    for run in studio.listed()[:SHOWN_RUNS]:
        steps = [path.name for path in step_folders(run.folder / "checkpoints")]
        if steps:
            file = run.folder / "identity.json"
            base = read_json_object(file, {"base model": str}).get("base model", "")
            # The newest step is followed, so the run alone stands for it.
            older = [f"{run.name}@{step}" for step in steps[::-1][:SHOWN_STEPS]]
            group = f"base {base[:8]}" if base else "base not known"
            found.setdefault(group, []).extend([run.name, *older])
    for name, root in studio.runs.folders.items():
        folders = [x for x in sorted(root.iterdir()) if is_alias(x)]
        if aliases := [f"{name}/{x.name}" for x in folders if not x.is_symlink()]:
            found.setdefault("aliases", []).extend(aliases)
    return found


async def _planned(request: Request) -> dict[str, Any]:
    """The server that the form would start: its name, runs, and command."""
    written = list(dict.fromkeys(filter(None, request.query_params.getlist("run"))))
    plan: dict[str, Any] = {"runs": written, "command": None, "problem": ""}
    if "run" not in request.query_params:
        return plan
    try:
        name, flags = await asyncio.to_thread(_server_flags, request, written)
        servers = studio_of(request).servers
        plan["command"] = await asyncio.to_thread(servers.command, name, flags)
    except (UserError, PageError) as error:
        plan["problem"] = str(error)
    return plan


def _server_flags(request: Request, written: list[str]) -> tuple[str, list[str]]:
    """A free name and the flags of a server of these runs, or of the base alone."""
    if len(written) > MOST_MODELS:
        raise UserError(f"{len(written)} runs: choose at most {MOST_MODELS}")
    running = {one.name for one in studio_of(request).servers.all() if one.process}
    names = (f"{NAME}-{number}" if number > 1 else NAME for number in range(1, 1000))
    name = next(one for one in names if one not in running)
    return name, run_flags(request, written) or [BASE_ALONE]


async def paste(request: Request) -> Response:
    """Chooses the runs of a pasted command of a server."""
    words = words_of((await Form.read(request)).get("pasted"))
    text = as_text([x for x in words if x != BASE_ALONE])
    fields = fields_of_command(text, studio_of(request).runs)
    if more := fields.keys() - {"do", "run", "name", "port"}:
        shown = ", ".join(sorted(more))
        raise UserError(f"this form has runs alone, and no {shown}: use Deploy")
    made: list[str] = []
    with contextlib.suppress(UserError, PageError):  # The page says why.
        name, flags = await asyncio.to_thread(_server_flags, request, fields["run"])
        servers = studio_of(request).servers
        made = await asyncio.to_thread(servers.command, name, flags)
    said = lost(text, made, (*SET_BY_FORMS, "port"))
    return see("/chat", run=fields["run"] or [""], said=said)


async def serve(request: Request) -> Response:
    """Starts a server of the chosen runs."""
    form = await Form.read(request)
    written = list(dict.fromkeys(filter(None, form.all("run"))))
    name, flags = await asyncio.to_thread(_server_flags, request, written)
    await start_server(request, name, flags)
    return see("/chat", server=name)


async def ask(request: Request) -> Response:
    """Asks the chosen models and keeps their answers: the form without scripts."""
    form = await Form.read(request)
    studio, kept = studio_of(request), conversations(request)
    server = await asyncio.to_thread(studio.servers.find, form.get("server"))
    stamps = {one["model"]: one for one in await stamps_of(server, studio.runs)}
    models = [name for name in form.all("model") if name in stamps][: MOST_MODELS + 1]
    if not models or not form.get("text").strip():
        raise UserError("choose at least one model, and write a message")
    parent, chosen = form.get("parent"), form.get("chosen")
    chat = form.get("chat")
    before = await asyncio.to_thread(kept.read, chat) if chat else KeptChat("", ())
    turn = {
        "kind": "turn",
        "parent": parent,
        "chosen": chosen,
        **{name: form.get(name) for name in ("text", "context", "system")},
    }
    messages, context = messages_of(before.way_to(parent, chosen), turn)
    settings = _settings(form)
    with noted(request, ACTIONS["turn"], chat or NEW, models=models) as facts:
        chat, turn = await asyncio.to_thread(kept.add, chat, turn)
        facts["chat"] = chat
        body = settings | {"messages": messages, "context": context}
        body |= {"logprobs": True, "return_token_ids": True}
        asked = (
            _column(server, stamps[name], body | {"model": name}) for name in models
        )
        answers = {"kind": "answers", "turn": turn["id"], "server": server.name}
        answers |= {"settings": settings, "columns": await asyncio.gather(*asked)}
        await asyncio.to_thread(kept.add, chat, answers)
    return see("/chat", server=server.name, chat=chat)


def _settings(form: Form) -> dict[str, Any]:
    """The fields of sampling that are filled. Raises UserError: one is no number."""
    found = {}
    for name, (_, kind) in SETTINGS.items():
        if written := form.get(name):
            try:
                found[name] = kind(written)
            except ValueError as error:
                message = f"{name}={written[:40]!r} is no number: {error}"
                raise UserError(message) from error
    return found


async def _column(
    server: ModelServer, stamp: dict[str, Any], body: dict[str, Any]
) -> dict[str, Any]:
    """The answer of one model, in the form in which it is kept."""
    path, asked = "/v1/chat/completions", json.dumps(body).encode()
    found = await call_json(server, "POST", path, ANSWER, asked)
    if not found["choices"]:
        raise PageError(502, f"the server {server.name} answered without a choice")
    choice = found["choices"][0]
    scores, fingerprint = choice["logprobs"]["content"], found["system_fingerprint"]
    if fingerprint != stamp["fingerprint"]:  # It has been read anew meanwhile.
        stamp = stamp | {"fingerprint": fingerprint, "step": None}
    return {
        "model": stamp["model"],
        "stamp": stamp,
        "text": choice["message"]["content"],
        "ids": choice["token_ids"],
        "tokens": [{"text": x["token"], "logprob": x["logprob"]} for x in scores],
        "finish": choice["finish_reason"],
        "prompt_tokens": found["usage"]["prompt_tokens"],
    }


async def remove(request: Request) -> Response:
    """Moves a conversation to the trash."""
    form = await Form.read(request)
    name = form.get("chat")
    with noted(request, "remove chat", name):
        await asyncio.to_thread(conversations(request).remove, name)
    return see("/chat", said="the conversation is in .studio/chats/.trash")


ROUTES = (
    Route("/chat", chat),
    Route("/flags/chat", paste),
    Route("/act/chat/serve", serve, methods=["POST"]),
    Route("/act/chat/ask", ask, methods=["POST"]),
    Route("/act/chat/remove", remove, methods=["POST"]),
)
