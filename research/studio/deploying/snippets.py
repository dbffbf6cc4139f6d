"""Programs that ask a server, as they can be pasted."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from research.studio.serving.model_servers import ModelServer

PLACE = "PASTE_A_KEY"
QUESTION = "Name a whale in one short sentence."
NEW_TOKENS = 48


def curl(server: ModelServer, model: str, is_chat: bool, key: str = "") -> str:
    """A shell command; `key` is one that was just made."""
    path = "chat/completions" if is_chat else "completions"
    asked = {"model": model, **_asked(is_chat), "max_tokens": NEW_TOKENS}
    return _posting(server, path, asked, key)


def changing(server: ModelServer, verb: str, body: Mapping[str, str]) -> str:
    """A shell command that does what a button does: `load` or `unload` an adapter."""
    return _posting(server, f"{verb}_lora_adapter", body, "")


def _posting(server: ModelServer, path: str, body: Mapping[str, Any], key: str) -> str:
    words = ["curl", "-sS"]
    if server.uds:
        words += ["--unix-socket", server.uds]
    host = "http://localhost/v1" if server.uds else server.endpoint
    words.append(f"{host}/{path}")
    if server.key_file:
        words += ["-H", f"Authorization: Bearer {key or PLACE}"]
    return shlex.join([*words, "-H", "Content-Type: application/json"]) + (
        f" \\\n  -d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )


def openai_client(server: ModelServer, model: str, is_chat: bool, key: str = "") -> str:
    """A program with the client of OpenAI."""
    used = (key or PLACE) if server.key_file else "none"
    base = "http://localhost/v1" if server.uds else server.endpoint
    lines, more = ["from openai import OpenAI"], ""
    if server.uds:
        lines.insert(0, "import httpx")
        way = f"httpx.HTTPTransport(uds={server.uds!r})"
        more = f", http_client=httpx.Client(transport={way})"
    lines += ["", f"client = OpenAI(base_url={base!r}, api_key={used!r}{more})"]
    ((field, value),) = _asked(is_chat).items()
    part = "chat.completions" if is_chat else "completions"
    text = "message.content" if is_chat else "text"
    lines += [
        f"answer = client.{part}.create(",
        f"    model={model!r}, {field}={value!r}, max_tokens={NEW_TOKENS}",
        ")",
        f"print(answer.choices[0].{text})",
    ]
    return "\n".join(lines)


def _asked(is_chat: bool) -> dict[str, object]:
    if is_chat:
        return {"messages": [{"role": "user", "content": QUESTION}]}
    return {"prompt": QUESTION}
