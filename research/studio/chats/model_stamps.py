"""The exact models of a server: base, adapter, step, template."""

import asyncio
import hashlib
import urllib.parse
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.runs.run_directory import RunDir
from research.studio.listing.run_index import is_run
from research.studio.page_errors import PageError
from research.studio.roots import Roots
from research.studio.serving.model_servers import ModelServer
from research.studio.serving.server_client import call_json, models_of

SHORT = 8  # digits of a fingerprint


async def stamps_of(server: ModelServer, runs: Roots) -> list[dict[str, Any]]:
    """The models of a server that is ready, its base first.

    Raises:
      PageError: it does not answer.
    """
    cards = await models_of(server)
    known = {card["id"]: card for card in cards}
    paths = (f"/tokenizer_info?model={urllib.parse.quote(card)}" for card in known)
    shape = {"chat_template": str | None}
    tokenizers = await asyncio.gather(
        *(call_json(server, "GET", path, shape) for path in paths)
    )
    stamps = []
    for card, tokenizer in zip(cards, tokenizers, strict=True):
        base = known.get(card["parent"], card)
        stamps.append(
            {
                "model": card["id"],
                "base": base["root"],
                "base_model": base["id"],
                "is_base": base is card,
                "run": _name(Path(card["root"]), runs),
                "step": card["step"],
                "fingerprint": card["system_fingerprint"],
                "context": card["max_model_len"],
                "template": _template(card, tokenizer["chat_template"], runs),
            }
        )
    return sorted(stamps, key=lambda stamp: not stamp["is_base"])


def _name(root: Path, runs: Roots) -> str:
    """The run by which pages know a folder; "" if it is none of ours."""
    try:
        name = runs.name(root)
        return name if is_run(runs.find(name)) else ""
    except (PageError, OSError, ValueError):
        return ""


def _template(card: dict[str, Any], source: str | None, runs: Roots) -> str:
    """How a conversation becomes a prompt: of the run where it is known."""
    kind = "chat" if source else ""
    if _name(Path(card["root"]), runs):
        try:
            kind = RunDir(Path(card["root"])).config().data.template
        except UserError:
            kind = "unknown"
    if kind != "chat" or not source:
        return kind or "none: it continues text"
    return f"chat {hashlib.sha256(source.encode()).hexdigest()[:SHORT]}"
