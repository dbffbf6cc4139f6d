"""The lines, votes, stamps and rows that the script of the chat page uses."""

import asyncio
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.serve.api.guard import read_limited
from research.studio.chats.blind_votes import BlindVotes, win_rates
from research.studio.chats.conversation_files import Conversations
from research.studio.chats.model_stamps import stamps_of
from research.studio.chats.training_rows import append_row, row_of
from research.studio.page_errors import PageError
from research.studio.pages.page_view import (
    Form,
    format_bytes,
    json_answer,
    noted,
    see,
    studio_of,
)

LONGEST = 8 << 20  # bytes of a line: an answer with the score of each token
# The actions that add lines of each kind to a conversation.
ACTIONS = {
    "turn": "ask",
    "answers": "keep answers",
    "pick": "pick answer",
    "scores": "keep scores",
}
NEW = "a new conversation"


def conversations(request: Request) -> Conversations:
    """Those beside the runs."""
    return Conversations(studio_of(request).runs.first / ".studio" / "chats")


def votes_of(request: Request) -> BlindVotes:
    """Those beside the runs."""
    return BlindVotes(studio_of(request).runs.first / ".studio")


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises PageError: it is none."""
    try:
        found = json.loads(await read_limited(request, LONGEST))
    except (ValueError, RecursionError) as error:
        raise PageError(400, f"the body cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise PageError(400, "the body must be an object")
    return found


async def stamps(request: Request) -> Response:
    """The models of a server."""
    studio = studio_of(request)
    server = await asyncio.to_thread(studio.servers.find, request.path_params["server"])
    return json_answer(await stamps_of(server, studio.runs))


def read(request: Request) -> Response:
    """The lines of a conversation, and which answers were voted on."""
    name = request.path_params["chat"]
    found = conversations(request).read(name)
    votes, _ = votes_of(request).read()
    voted = {vote["answers"]: vote["winner"] for vote in votes if vote["chat"] == name}
    return json_answer({"lines": found.lines, "voted": voted})


async def add(request: Request) -> Response:
    """Adds a line to a conversation, or to a new one."""
    body = await _body(request)
    name, line = body.get("chat", ""), body.get("line")
    if not isinstance(name, str) or not isinstance(line, dict):
        raise PageError(400, "the body must be {chat: ID or empty, line: {...}}")
    kept = conversations(request)
    action = ACTIONS.get(str(line.get("kind")), "add line")
    with noted(request, action, name[:40] or NEW) as facts:
        name, line = await asyncio.to_thread(kept.add, name, line)
        facts |= {"chat": name, "line": line["id"]}
    return json_answer({"chat": name, "line": line})


async def vote(request: Request) -> Response:
    """Keeps a vote and answers with the win rates."""
    form = await Form.read(request)
    chat, winner = form.get("chat"), form.get("winner")
    conversation = await asyncio.to_thread(conversations(request).read, chat)
    answers = conversation.line("answers", form.get("answers"))
    models = [column["model"] for column in answers["columns"]]
    if len(models) < 2 or winner not in (*models, ""):
        raise PageError(400, f"winner={winner[:80]!r}: it must be empty or of {models}")
    votes = votes_of(request)
    known, _ = await asyncio.to_thread(votes.read)
    if any(x["answers"] == answers["id"] for x in known):
        raise PageError(409, "these answers were voted on already")
    turn = conversation.line("turn", answers["turn"])
    way = conversation.way_to(turn["parent"], turn["chosen"])
    said = [one["text"] for one, _ in way] + [turn["text"]]
    prompt = json.dumps([(way[0][0] if way else turn)["context"], *said])
    who = request.scope["who"]
    with noted(request, "vote", chat, answers=answers["id"], winner=winner):
        await asyncio.to_thread(votes.add, chat, answers, prompt, winner, who)
    return rates(request)


def rates(request: Request) -> Response:
    """How often each model won."""
    found = win_rates(votes_of(request).read()[0])
    fields = ("name", "votes", "wins", "ties", "prompts", "rate", "low", "high")
    names = (*fields, "chance", "verdict", "fingerprint")
    return json_answer([{x: getattr(one, x) for x in names} for one in found])


def rows(request: Request) -> Response:
    """A conversation as a row to download."""
    fields = request.query_params
    found = conversations(request).read(fields.get("chat", ""))
    row = row_of(found.way_to(fields.get("answers", ""), fields.get("model", "")))
    name = f'attachment; filename="chat-{found.id}.jsonl"'
    headers = {"content-disposition": name}
    return Response(row.encode(), 200, headers, "application/jsonl; charset=utf-8")


async def append(request: Request) -> Response:
    """Adds a conversation as a row to a file below `--data`."""
    form = await Form.read(request)
    studio = studio_of(request)
    found = await asyncio.to_thread(conversations(request).read, form.get("chat"))
    row = row_of(found.way_to(form.get("answers"), form.get("model")))
    file = form.get("file").strip()
    with noted(request, "append row", file, chat=found.id):
        path = await asyncio.to_thread(append_row, studio.data, file, row)
    name = studio.data.name(path)
    said = f"added to {name}, which has {format_bytes(path.stat().st_size)} now"
    if form.get("script"):
        return json_answer({"said": said, "file": name})
    return see("/chat", chat=found.id, said=said)


ROUTES = (
    Route("/api/stamps/{server}", stamps),
    Route("/api/chats/{chat}", read),
    Route("/api/chats", add, methods=["POST"]),
    Route("/api/votes", rates),
    Route("/act/vote", vote, methods=["POST"]),
    Route("/chat/rows", rows),
    Route("/act/chat/rows", append, methods=["POST"]),
)
