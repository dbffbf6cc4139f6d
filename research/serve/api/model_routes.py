"""Models and adapters by name, tokens of texts, health, and metrics."""

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response

from research.serve.api.api_errors import ApiError, bad_request
from research.serve.api.guard import require_admin
from research.serve.api.prometheus_text import CONTENT_TYPE
from research.serve.api.request_types import (
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from research.serve.api.server_state import ServerState
from research.serve.served_models import token_texts


def _json(fields: object) -> Response:
    return Response(msgspec.json.encode(fields), 200, None, "application/json")


def _state(http: HttpRequest) -> ServerState:
    return http.app.state.server


async def models(http: HttpRequest) -> Response:
    """All models."""
    deployment = _state(http).deployment
    cards = [model.card(deployment.context) for model in deployment.models.all()]
    return _json({"object": "list", "data": cards})


async def model(http: HttpRequest) -> Response:
    """One model."""
    deployment = _state(http).deployment
    found = deployment.models.find(http.path_params["name"])
    return _json(found.card(deployment.context))


async def load_adapter(http: HttpRequest) -> Response:
    """Loads the adapter of a run directory."""
    require_admin(http)
    state = _state(http)
    body, _ = await state.read(http, LoadAdapterRequest)
    load = state.deployment.load
    inplace = bool(body.load_inplace)
    await state.in_admin_thread(load, body.lora_name, body.lora_path, inplace)
    return PlainTextResponse(f"Success: adapter {body.lora_name!r} is served.")


async def unload_adapter(http: HttpRequest) -> Response:
    """Forgets an adapter; answers that have it come to their end."""
    require_admin(http)
    state = _state(http)
    body, _ = await state.read(http, UnloadAdapterRequest)
    await state.in_admin_thread(state.deployment.unload, body.lora_name)
    return PlainTextResponse(f"Success: adapter {body.lora_name!r} is removed.")


async def tokenize(http: HttpRequest) -> Response:
    """Ids of a text, or of a conversation as a chat puts it to the model.

    A text that is the name of the model's start or end token alone is that token;
    elsewhere in a text it is letters.
    """
    state = _state(http)
    body, _ = await state.read(http, TokenizeRequest)
    body.check()
    found = state.models.find(body.model)
    tokenizer = found.tokenizer
    # Harnesses ask for the ids of the names that `tokenizer_info` has given them.
    named = {tokenizer.bos_token: tokenizer.bos, tokenizer.eos_token: tokenizer.eos}
    if body.messages is not None:
        chat = (body.messages, body.context or "")
        ids = await state.in_text_thread(found.encode_chat, *chat)
    elif body.prompt and body.prompt in named:
        ids = [named[body.prompt]]
    else:
        start = body.add_special_tokens is not False
        ids = await state.in_text_thread(found.encode_text, body.prompt, start)
    context = state.deployment.context
    return _json({"tokens": ids, "count": len(ids), "max_model_len": context})


async def detokenize(http: HttpRequest) -> Response:
    """The text of ids, control tokens included."""
    state = _state(http)
    body, _ = await state.read(http, DetokenizeRequest)
    tokenizer = state.models.find(body.model).tokenizer
    largest = state.deployment.vocabulary - 1
    for index, token in enumerate(body.tokens):
        if token > largest:
            raise bad_request(
                f"id {token} is above the largest, {largest}", f"tokens[{index}]"
            )
    text = await state.in_text_thread(token_texts(tokenizer).text, body.tokens)
    return _json({"prompt": text})


async def tokenizer_info(http: HttpRequest) -> Response:
    """The names of special tokens and the chat template, as lm-eval asks for them."""
    tokenizer = _state(http).models.find(http.query_params.get("model")).tokenizer
    return _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.eos_token or None,
            "bos_token": tokenizer.bos_token or None,
            "pad_token": tokenizer.settings.get("pad_token"),
            "chat_template": tokenizer.chat_template or None,
        }
    )


async def slots(http: HttpRequest) -> Response:
    """The state of each slot, with the names of llama.cpp's server, and no text."""
    deployment = _state(http).deployment
    found = deployment.engine.slot_stats()
    if http.query_params.get("fail_on_no_slot") and all(found):
        raise ApiError(503, "all slots are in use", None, "no_slot", 1)
    base = next(m.name for m in deployment.models.all() if not m.adapter)
    cards = []
    for number, stats in enumerate(found):
        card = {"id": number, "n_ctx": deployment.context, "is_processing": bool(stats)}
        if stats:
            card |= {
                "model": stats.adapter or base,
                "n_prompt_tokens": stats.prompt_tokens,
                "n_prompt_tokens_processed": stats.written_tokens,
                "n_prompt_tokens_cache": stats.cached_tokens,
                "next_token": {
                    "n_decoded": stats.new_tokens,
                    "n_remain": stats.most_new_tokens - stats.new_tokens,
                },
            }
        cards.append(card)
    return _json(cards)


async def health(http: HttpRequest) -> Response:
    """200 when the server answers requests, else 503."""
    state = _state(http)
    if state.is_stopping:
        raise ApiError(503, "the server stops", None, "stopping")
    _ = state.deployment
    return _json({"status": "ok"})


async def metrics(http: HttpRequest) -> Response:
    """The page that Prometheus reads."""
    state = _state(http)
    state.update_gauges()
    return Response(state.metrics.text().encode(), 200, {"content-type": CONTENT_TYPE})
