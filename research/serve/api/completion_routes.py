"""`/v1/chat/completions` and `/v1/completions`."""

import asyncio
import dataclasses
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from research.core.errors import UserError
from research.engine.adapter_names import LoadedAdapter
from research.engine.requests import Request, Sampling
from research.serve.api.answer_shapes import (
    DONE,
    PING,
    AnswerPart,
    AnswerShape,
    ChatShape,
    CompletionShape,
    event,
    usage,
)
from research.serve.api.api_errors import ApiError, bad_request, from_engine, stopping
from research.serve.api.request_types import (
    ChatRequest,
    CompletionRequest,
    SamplingFields,
    ignored_header,
)
from research.serve.api.server_state import ServerState
from research.serve.engine_thread import AnswerGroup
from research.serve.served_models import NamedModel, token_texts

USUAL_TOKENS = 16  # of a completion, as in OpenAI's API
MOST_ANSWERS = 4096  # of one request


async def chat_completions(http: HttpRequest) -> Response:
    """Answers a conversation."""
    state: ServerState = http.app.state.server
    body, ignored = await state.read(http, ChatRequest)
    body.check()
    async with state.held(body.model) as (model, adapter):
        ids = await state.in_text_thread(
            model.encode_chat, body.messages, body.context or ""
        )
        most = body.max_completion_tokens or body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        requests = await state.in_text_thread(
            _requests, state, model, body, [ids], most, top, "messages"
        )
        shape = ChatShape(
            model.name,
            model.fingerprint,
            token_texts(model.tokenizer),
            with_ids=bool(body.return_token_ids),
            with_scores=bool(body.logprobs),
        )
        return await _answer(
            http, state, model, adapter, body, requests, shape, ignored
        )


async def completions(http: HttpRequest) -> Response:
    """Continues one prompt or several."""
    state: ServerState = http.app.state.server
    body, ignored = await state.read(http, CompletionRequest)
    body.check()
    async with state.held(body.model) as (model, adapter):
        prompts = await state.in_text_thread(_encode_prompts, model, body)
        most = USUAL_TOKENS if body.max_tokens is None else body.max_tokens
        requests = await state.in_text_thread(
            _requests, state, model, body, prompts, most, body.logprobs, "prompt"
        )
        shape = CompletionShape(
            model.name,
            model.fingerprint,
            token_texts(model.tokenizer),
            with_ids=bool(body.return_token_ids),
            with_scores=body.logprobs is not None,
            echo=bool(body.echo),
        )
        return await _answer(
            http, state, model, adapter, body, requests, shape, ignored
        )


def _encode_prompts(model: NamedModel, body: CompletionRequest) -> list[list[int]]:
    with_start = body.add_special_tokens is not False
    return [
        model.encode_text(prompt, with_start) if isinstance(prompt, str) else prompt
        for prompt in body.prompts
    ]


def _requests(
    state: ServerState,
    model: NamedModel,
    body: SamplingFields,
    prompts: Sequence[Sequence[int]],
    most: int | None,
    top: int | None,
    field: str,
) -> list[Request]:
    """The engine's requests: `n` for each prompt, with seeds that count up."""
    count = body.n or 1
    if len(prompts) * count > MOST_ANSWERS:
        raise bad_request(f"more than {MOST_ANSWERS} answers in one request", field)
    seed = secrets.randbits(31) if body.seed is None else body.seed
    constraint = state.constraints(model, body.response_format)
    context = state.deployment.context
    found = []
    for prompt, index in itertools.product(prompts, range(count)):
        if not prompt:
            raise bad_request("a prompt has no token; give at least one", field)
        room = context - len(prompt)
        if room < (1 if most is None else most):
            raise _overflow(len(prompt), most, context, field)
        found.append(
            Request(
                tuple(prompt),
                _sampling(model.defaults, body, room if most is None else most,
                          (seed + index) % 2**31),
                model.served.prompts.stop_ids | frozenset(body.stop_token_ids or ()),
                body.stop_texts,
                model.adapter,
                top,
                echo=top is not None and bool(getattr(body, "echo", False)),
                constraint=constraint(),
                ignore_eos=bool(body.ignore_eos),
            )
        )  # fmt: skip
    return found


def _sampling(
    defaults: Sampling, body: SamplingFields, most: int, seed: int
) -> Sampling:
    names = (
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
        *("frequency_penalty", "presence_penalty", "logit_bias"),
    )
    given = {name: getattr(body, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("top_k") == -1:  # In vLLM's API that is all tokens.
        given["top_k"] = 0
    least = body.min_tokens or 0
    if least > most:
        raise bad_request(
            f"min_tokens is {least}, and at most {most} tokens come", "min_tokens"
        )
    return dataclasses.replace(
        defaults, **given, max_new_tokens=most, min_new_tokens=least, seed=seed
    )


def _overflow(prompt: int, most: int | None, context: int, field: str) -> ApiError:
    new = "" if most is None else f" and {most} new ones (max_tokens)"
    return bad_request(
        f"the prompt has {prompt} tokens{new}, and the context is {context}: shorten "
        f"the {field} or lower max_tokens",
        field,
        "context_length_exceeded",
    )


async def _answer(
    http: HttpRequest,
    state: ServerState,
    model: NamedModel,
    adapter: LoadedAdapter,
    body: SamplingFields,
    requests: Sequence[Request],
    shape: AnswerShape,
    ignored: Sequence[str],
) -> Response:
    field = "messages" if isinstance(body, ChatRequest) else "prompt"
    try:
        group = state.submit(requests, model.name, adapter)
    except UserError as error:
        raise from_engine(error, field) from error
    answer = _OpenAnswer(state, group, requests, shape, body.n or 1)
    headers = ignored_header(ignored)
    if body.stream:
        return EventStream(answer, headers, body.wants_usage)
    gone = asyncio.create_task(_until_gone(http.receive))
    gone.add_done_callback(lambda _: group.cancel())
    try:
        fields = await answer.whole()
    finally:
        gone.cancel()
        answer.close()
    written = msgspec.json.encode(fields)
    return Response(written, 200, headers, "application/json")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _OpenAnswer:
    """The parts of an answer as they come."""

    def __init__(
        self,
        state: ServerState,
        group: AnswerGroup,
        requests: Sequence[Request],
        shape: AnswerShape,
        choices: int,
    ):
        self.group = group
        self._state, self._shape, self._choices = state, shape, choices
        self._parts = [AnswerPart(i, x.prompt) for i, x in enumerate(requests)]

    def close(self) -> None:
        """Gives up what has not come, and counts what has."""
        self._state.close(self.group, self._shape.model, self._parts)

    async def whole(self) -> dict[str, object]:
        """All of it. Raises ApiError: it ended early."""
        async for batch in self.group.batches():
            for index, piece in batch:
                self._parts[index].add(piece)
                self._check(piece.finish, piece.error)
        return self._shape.whole(self._parts, self._choices)

    async def events(self, with_usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream; an error after its start is one of them."""
        try:
            opened: set[int] = set()
            async for batch in self.group.batches():
                written = [] if batch else [PING]
                for index, piece in batch:
                    whole = self._parts[index]
                    self._check(piece.finish, piece.error)
                    new = AnswerPart(index, offset=len(whole.text))
                    if index not in opened:
                        opened.add(index)
                        new.prompt = whole.prompt
                        if opening := self._shape.opening(new, with_usage):
                            written.append(event(opening))
                    new.add(piece)
                    whole.add(piece)
                    if piece.text or piece.ids:
                        written.append(event(self._shape.chunk(new, with_usage, None)))
                    if piece.finish:
                        last = AnswerPart(index)
                        fields = self._shape.chunk(last, with_usage, piece.finish)
                        written.append(event(fields))
                yield b"".join(written)
            if with_usage:
                counts = usage(self._parts, self._choices)
                yield event(self._shape.closing(counts))
        except ApiError as error:
            yield event(error.body())
        except UserError as error:  # Answers that had no slot yet cannot begin.
            yield event(from_engine(error, "prompt").body())
        yield DONE

    def _check(self, finish: str, error: str) -> None:
        """Raises ApiError if an answer ended for a reason that no client expects."""
        if finish == "error":
            raise ApiError(500, error or "the engine has failed")
        if finish == "cancelled":
            raise stopping()


class EventStream(Response):
    """A response whose events are sent as they come."""

    def __init__(self, answer: _OpenAnswer, headers: dict[str, str], with_usage: bool):
        # Nginx would wait for the end of it.
        plain = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, 200, headers | plain, "text/event-stream")
        del self.headers["content-length"]
        self._answer, self._with_usage = answer, with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.create_task(_until_gone(receive))
        gone.add_done_callback(lambda _: self._answer.group.cancel())
        start = {"type": "http.response.start", "status": self.status_code}
        try:
            await send(start | {"headers": self.raw_headers})
            async for written in self._answer.events(self._with_usage):
                if gone.done():
                    return
                body = {"type": "http.response.body", "body": written}
                await send(body | {"more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()
            self._answer.close()
